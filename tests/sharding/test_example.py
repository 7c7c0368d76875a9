"""The examples of docs/distributed.md: what they write under torchrun merges into the trace of the whole model."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("q", "k", "v", "scores", "weights", "output")


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_example", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_and_merged(name: str, folder: Path, *options: str) -> tuple[str, hookattn.Trace]:
    """What an example prints under torchrun, and what `hookattn merge` makes of its files."""
    around = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters")]), "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        said = subprocess.run(
            [sys.executable, *command], cwd=folder, env=around, capture_output=True, text=True, timeout=180
        )
        assert said.returncode == 0, said.stderr[-2000:]
        return said.stdout

    script = str(ROOT / "examples" / f"{name}.py")
    printed = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script)
    files = sorted(path.name for path in folder.glob("*.rank*.safetensors"))
    run("-c", "from hookattn.cli import main; main()", "merge", *files, *options, "-o", "run.safetensors")
    return printed, hookattn.load(folder / "run.safetensors")


@pytest.mark.slow
def test_ranks_of_heads_merge_into_the_whole(tmp_path: Path) -> None:
    said, found = run_and_merged("tensor_parallel", tmp_path)
    assert "run.rank01-of-02.safetensors: heads from 4 of 8, rank 1 of 2 on tp, heads (4, 5, 6, 7)" in said
    whole = hookattn.trace(example("tensor_parallel").model(), {"input_ids": torch.arange(12).unsqueeze(0)})
    assert [call.site for call in found] == [call.site for call in whole]
    for call, expected in zip(found, whole, strict=True):
        assert call.heads is None and call.shards == () and call.certificate.status == expected.certificate.status
        for name in FIELDS:
            torch.testing.assert_close(call.get(name), expected.get(name), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_stages_merge_into_the_whole(tmp_path: Path) -> None:
    said, found = run_and_merged("pipeline", tmp_path, "--steps", "batches")
    assert "stage.rank01-of-02.safetensors: layers [2, 3], 4 calls" in said
    made = example("pipeline")
    whole = hookattn.trace(made.Stage(0, made.LAYERS).eval(), made.inputs())
    assert [call.site.path for call in found] == [call.site.path for call in whole]
    for call, expected in zip(found, whole, strict=True):
        assert call.step == 0 and call.certificate.status == expected.certificate.status
        for name in FIELDS:
            torch.testing.assert_close(call.get(name), expected.get(name), atol=1e-6, rtol=1e-6)


def test_a_merged_trace_splits_by_request(tmp_path: Path) -> None:
    """Requests are of batch entries, and ranks of heads: either may come first."""
    model, inputs = example("tensor_parallel").model(), {"input_ids": torch.arange(24).view(2, 12)}
    whole = hookattn.trace(model, inputs)
    parts = []
    for rank in range(2):
        part = hookattn.trace(model, inputs)
        for call in part:
            half = call.at(heads=slice(4 * rank, 4 * rank + 4))
            half.shards = (hookattn.Shard("H", 4 * rank, 8, 2 * rank, 4, "tp", rank, 2),)
            half.requests = ("a", "b")
            part.calls[call.index] = half
        parts.append(part)
    split = hookattn.merge(parts).split("request")
    other = [part.split("request")["b"] for part in parts]
    for call, again, expected in zip(split["b"], hookattn.merge(other), whole, strict=True):
        for found in (call, again):
            assert found.requests == ("b",)
            torch.testing.assert_close(found.weights, expected.weights[1:], atol=1e-6, rtol=1e-6)
