"""The plug-in on vLLM itself: in its own process, with its engine in another, and with two ranks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

import hookattn
from tests.serving_vllm.engines import ROOT, SETTINGS, weights_by_transformers

WHOLE = {"capture": ["q", "k", "v", "mask", "weights", "output"]}


def prompt(n: int) -> list[int]:
    made = torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n))
    return [int(x) for x in made]


def serve(
    folder: Path, out: Path, prompts: list[list[int]], rounds: list[list[Any]], separate: bool = False, **options: Any
) -> list[list[tuple[str, list[int]]]]:
    """For each round and prompt the id of its request, and its tokens with those that were generated."""
    own = [str(ROOT), str(ROOT / "adapters")]
    if not any(p.name == "hookattn" for p in entry_points(group="vllm.general_plugins")):
        # Not installed, or from before there was the plug-in: vLLM looks for it among installed packages.
        about = out.parent / "plugin-0.dist-info"
        about.mkdir(exist_ok=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 0\n")
        (about / "entry_points.txt").write_text(
            "[vllm.general_plugins]\nhookattn = hookattn.serving.vllm_plugin:register\n"
        )
        own.append(str(about.parent))
    environment = {
        **os.environ,
        **SETTINGS,
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(separate)),
        "HOOKATTN_VLLM": str(out),
        "PYTHONPATH": os.pathsep.join(own),
    }
    given: dict[str, Any] = {"folder": str(folder), "out": str(out), "options": options, "prompts": prompts}
    given |= {"rounds": rounds, "ranks": options.get("tensor_parallel_size", 1)}
    command = [sys.executable, "-m", "tests.serving_vllm.plugin_run", json.dumps(given)]
    # In a session of its own: its workers are to end with it, should it hang.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out_text, err_text = process.communicate(timeout=900)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err_text[-3000:]
    told = [json.loads(x.removeprefix("ROUND ")) for x in out_text.splitlines() if x.startswith("ROUND ")]
    return [[(name, p + tokens) for p, (name, tokens) in zip(prompts, one, strict=True)] for one in told]


def distance(path: Path, tokens: list[int], folder: Path) -> float:
    """How far a picture of a file is from transformers' weights, whose heads and rows may be some of them."""
    (reference,) = weights_by_transformers(folder, [tokens], path.parent)
    trace, worst = hookattn.load(path), 0.0
    assert not trace.skipped and all(c.certificate.faithful for c in trace)
    picture = trace.stitch()
    assert len(picture) == len(reference)
    for call in picture:
        s = len(tokens) - 1
        assert call.weights.shape[3] == s
        theirs = reference[call.site.layer][
            list(call.heads or range(call.weights.shape[1])), s - call.weights.shape[2] : s, :s
        ]
        worst = max(worst, float((call.weights[0] - theirs).abs().max()))
    return worst


def test_in_one_process(llama: Path, tmp_path: Path) -> None:
    prompts = [prompt(7), prompt(40), prompt(5)]
    plain, traced = serve(llama, tmp_path / "out", prompts, [[None] * 3, [WHOLE, None, True]])
    assert [t for _, t in plain] == [t for _, t in traced], "the plug-in has changed the tokens"
    names = [name for name, _ in traced]
    found = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert found == sorted(f"{names[i]}.rank0.safetensors" for i in (0, 2))
    assert distance(tmp_path / "out" / f"{names[0]}.rank0.safetensors", traced[0][1], llama) < 1e-6
    statistics = hookattn.load(tmp_path / "out" / f"{names[2]}.rank0.safetensors")
    assert "entropy" in statistics[0].captured and "weights" not in statistics[0].captured


def test_an_engine_of_its_own_with_chunks_and_a_cached_prefix(llama: Path, tmp_path: Path) -> None:
    prompts = [prompt(70), prompt(70)[:64] + prompt(9)]
    first, second = serve(
        llama,
        tmp_path / "out",
        prompts,
        [[WHOLE, None], [None, WHOLE]],
        separate=True,
        enable_prefix_caching=True,
        block_size=32,
        max_num_batched_tokens=32,
    )
    assert distance(tmp_path / "out" / f"{first[0][0]}.rank0.safetensors", first[0][1], llama) < 1e-6
    path = tmp_path / "out" / f"{second[1][0]}.rank0.safetensors"
    assert distance(path, second[1][1], llama) < 1e-6
    picture = hookattn.load(path).stitch()
    assert picture[0].queries == tuple(range(64, 76))
    assert any("first 64 positions" in note for note in hookattn.load(path).notes)


def test_two_ranks(llama: Path, tmp_path: Path) -> None:
    (((name, tokens), _),) = serve(
        llama, tmp_path / "out", [prompt(7), prompt(12)], [[WHOLE, None]], separate=True, tensor_parallel_size=2
    )
    for rank, heads in ((0, (0, 1)), (1, (2, 3))):
        path = tmp_path / "out" / f"{name}.rank{rank}.safetensors"
        assert {c.heads for c in hookattn.load(path)} == {heads}
        assert distance(path, tokens, llama) < 1e-6


def test_a_compiled_model(llama: Path, tmp_path: Path) -> None:
    (((name, tokens),),) = serve(llama, tmp_path / "out", [prompt(7)], [[WHOLE]], enforce_eager=False)
    assert distance(tmp_path / "out" / f"{name}.rank0.safetensors", tokens, llama) < 1e-6
