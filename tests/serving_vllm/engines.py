"""A server with a tiny random model: made, run and traced, and the same weights in transformers in another process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hookattn

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """An ``LLM`` of a folder, which is shut down afterwards."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    settings = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    llm = LLM(str(folder), **{**settings, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def model_of(llm: Any) -> torch.nn.Module:
    """The model that it runs, in this process."""
    (model,) = llm.apply_model(lambda model: model)
    return model  # type: ignore[no-any-return]


def generate(llm: Any, prompts: Sequence[Sequence[int]], tokens: int = 3) -> list[tuple[str, list[int]]]:
    """For each prompt the id of its request, and its tokens with those that were generated."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    done = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
    return [(r.request_id, list(p) + list(r.outputs[0].token_ids)) for p, r in zip(prompts, done, strict=True)]


def traced(llm: Any, prompts: Sequence[Sequence[int]], **options: Any) -> tuple[Any, dict[str, list[int]]]:
    """A trace of their generation, which has to make the tokens that are made without it, and what each request was."""
    plain = [tokens for _, tokens in generate(llm, prompts)]
    if llm.llm_engine.vllm_config.cache_config.enable_prefix_caching:
        llm.reset_prefix_cache()
    with hookattn.tracing(model_of(llm), verify="full", **options) as trace:
        made = generate(llm, prompts)
    assert [tokens for _, tokens in made] == plain, "a trace has changed the tokens"
    return trace, dict(made)


def weights_by_transformers(folder: Path, sequences: Sequence[Sequence[int]], out: Path) -> list[list[Tensor]]:
    """For each sequence the weights of each layer, H S S, by transformers' eager attention: vLLM changes classes of
    transformers in its own process."""
    asked = out / "asked.pt"
    torch.save([list(s) for s in sequences], asked)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.serving_vllm.reference_weights", str(folder), str(asked)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=300)
    return torch.load(f"{asked}.weights")  # type: ignore[no-any-return]


def known_requests(names: Sequence[str], made: dict[str, list[int]]) -> list[str]:
    """What requests are called where they are asked for: vLLM appends digits to that within."""
    return [name if name in made else name.rpartition("-")[0] for name in names]


def distance(trace: Any, made: dict[str, list[int]], folder: Path, out: Path, layers: int | None = None) -> float:
    """The largest distance of the weights of any call from those of transformers, at the keys that each request has.

    Every row of every request has to be there, once for each layer.

    Args:
        trace, made: as :func:`traced` has them.
        folder: of the model.
        out: a folder to work in.
        layers: how many layers are compared, from the first; None: all.
    """
    names = list(made)
    reference = dict(zip(names, weights_by_transformers(folder, [made[n] for n in names], out), strict=True))
    worst, rows = 0.0, {(name, layer): 0 for name in names for layer in range(len(reference[names[0]]))}
    for call in trace:
        assert call.requests is not None and call.lengths is not None
        for b, name in enumerate(known_requests(call.requests, made)):
            t, s = call.lengths[b]
            own, theirs = call.weights[b, :, :t, :s].float(), reference[name][call.site.layer][:, s - t : s, :s]
            if layers is None or call.site.layer < layers:
                worst = max(worst, float((own - theirs).abs().max()))
            rows[name, call.site.layer] += t
    # The last token is generated, and nothing is computed for it.
    assert rows == {(name, layer): len(made[name]) - 1 for name, layer in rows}, rows
    return worst
