"""The example of docs/distributed.md: what it writes under torchrun merges into the trace of the whole model."""

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
EXAMPLE = ROOT / "examples" / "tensor_parallel.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("tensor_parallel_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_its_ranks_merge_into_the_whole(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    around = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters")]), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(run, cwd=tmp_path, env=around, capture_output=True, text=True, timeout=180)
    assert said.returncode == 0, said.stderr[-2000:]
    assert "run.rank01-of-02.safetensors: heads from 4 of 8, rank 1 of 2 on tp, heads (4, 5, 6, 7)" in said.stdout
    command = [sys.executable, "-c", "from hookattn.cli import main; main()", "merge", "-o", "run.safetensors"]
    files = sorted(path.name for path in tmp_path.glob("run.rank*.safetensors"))
    merged = subprocess.run([*command, *files], cwd=tmp_path, env=around, capture_output=True, text=True, timeout=180)
    assert merged.returncode == 0, merged.stderr
    found = hookattn.load(tmp_path / "run.safetensors")
    whole = hookattn.trace(example().model(), {"input_ids": torch.arange(12).unsqueeze(0)})
    assert [call.site for call in found] == [call.site for call in whole]
    for call, expected in zip(found, whole, strict=True):
        assert call.heads is None and call.shards == () and call.certificate.status == expected.certificate.status
        for name in ("q", "k", "v", "scores", "weights", "output"):
            torch.testing.assert_close(call.get(name), expected.get(name), atol=1e-6, rtol=1e-6)


def test_a_merged_trace_splits_by_request(tmp_path: Path) -> None:
    """Requests are of batch entries, and ranks of heads: either may come first."""
    model, inputs = example().model(), {"input_ids": torch.arange(24).view(2, 12)}
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
