"""Serves prompts with the plug-in, in a process of its own: ``python -m tests.serving_vllm.plugin_run JSON``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def main(given: dict[str, Any]) -> None:
    """Each round: all prompts at once, each with what it asks of hookattn; prints the tokens of each."""
    llm = LLM(
        given["folder"],
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        **{"enforce_eager": True, "enable_prefix_caching": False, "max_num_batched_tokens": 128, **given["options"]},
    )
    prompts = [{"prompt_token_ids": p} for p in given["prompts"]]
    for asked in given["rounds"]:
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=4,
                ignore_eos=True,
                detokenize=False,
                extra_args=None if one is None else {"hookattn": one},
            )
            for one in asked
        ]
        done = llm.generate(prompts, params, use_tqdm=False)
        print("ROUND", json.dumps([[o.request_id, list(o.outputs[0].token_ids)] for o in done]), flush=True)
    # An engine in another process completes the files a step after it has answered.
    expected = sum(one is not None for asked in given["rounds"] for one in asked) * given["ranks"]
    until = time.monotonic() + 120
    while sum(p.name[0] != "." for p in Path(given["out"]).glob("*.rank*")) < expected and time.monotonic() < until:
        time.sleep(0.1)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
