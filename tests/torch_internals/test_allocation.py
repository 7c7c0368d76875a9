"""Memory for what is kept."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn.attention.derivation import derive
from hookattn.attention.masks import causal_mask
from hookattn.torch_internals import allocation

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (1 << 11, 1 << 11), (0, 4)], ids=str)
def test_empty_is_like_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = allocation.empty(shape, dtype, CPU)
    assert (made.shape, made.dtype, made.device) == (torch.Size(shape), dtype, CPU)
    assert made.is_contiguous()
    assert made.data_ptr() % 64 == 0


def test_copies_are_equal_contiguous_and_on_their_own() -> None:
    base = torch.randn(3, 700, 500)
    several = [base[0].t(), base[1].to(torch.bfloat16), base[:, ::2], base[:0], base > 0, torch.tensor(3)]
    made = allocation.copies(several)
    for own, x in zip(made, several, strict=True):
        torch.testing.assert_close(own, x, rtol=0, atol=0)
        assert own.is_contiguous()
        assert own.untyped_storage().nbytes() == x.numel() * x.element_size(), "what saves it saves no more"
        assert own.numel() < 2 or own.data_ptr() % 64 == 0
    before = [x.clone() for x in made[1:]]
    made[0].fill_(7)
    for own, x in zip(made[1:], before, strict=True):
        assert torch.equal(own, x), "they do not overlap"


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only where the system has huge pages")
def test_large_tensors_lie_in_huge_pages() -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("huge pages are switched off")
    made = allocation.empty((1 << 24,), torch.float32, CPU).zero_()
    if (found := _huge(made)) < 32 << 10:
        # Memory in pieces has none to give, however it is asked: what Python maps itself gets as few then.
        mapped = mmap.mmap(-1, 1 << 26, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapped.madvise(mmap.MADV_HUGEPAGE)
        control = torch.frombuffer(mapped, dtype=torch.uint8).zero_()
        if _huge(control) < 32 << 10:
            pytest.skip("the system has no huge pages left")
    assert found >= 32 << 10, "kB of huge pages, at least half of what it takes"


def _huge(x: torch.Tensor) -> int:
    """How many kB of the mapping that a tensor lies in are huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= x.data_ptr() < end
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1])
    raise AssertionError("no mapping")


@pytest.mark.parametrize("call", [None, lambda *_: -1], ids=["none", "refused"])
def test_without_huge_pages_it_is_the_same(monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    monkeypatch.setattr(allocation, "_madvise", lambda: call)
    x = torch.randn(1 << 11, 1 << 11)
    assert torch.equal(allocation.copies([x.t()])[0], x.t())
    assert allocation.empty((1 << 22,), torch.float32, CPU).numel() == 1 << 22


def test_small_tensors_cost_no_call_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(allocation, "_madvise", lambda: lambda *given: asked.append(given[1]))
    allocation.empty((1000,), torch.float32, CPU)
    allocation.copies([torch.ones(1000), torch.ones(10)])
    assert not asked
    several = allocation.copies([torch.ones(1 << 18)] * 3)
    assert len(asked) == 3
    assert all(size >= x.nbytes for size, x in zip(asked, several, strict=True))


def test_memory_goes_with_its_tensors() -> None:
    def size() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    made = allocation.empty((1 << 26,), torch.uint8, CPU).fill_(1)
    held = size()
    view = made[:10]
    del made
    assert size() > held - (1 << 24), "a view holds it"
    assert int(view.sum()) == 10
    del view
    assert size() < held - (1 << 25)


@pytest.mark.parametrize("want_scores", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("t", "s"), [(700, 700), (40, 40_000), (1400, 900)])
def test_blocks_of_heads_and_of_rows(t: int, s: int, groups: int, want_scores: bool) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, t, 16), torch.randn(2, 6 // groups, s, 16)
    bias, mask = torch.randn(1, 6, 1, s), causal_mask(t, s, offset=s - t if s > t else 0)
    scores, weights = derive(q, k, 0.25, softcap=5.0, bias=bias, mask=mask, empty=False, want_scores=want_scores)
    heads = torch.arange(6) // groups
    plain = torch.einsum("bhtd,bhsd->bhts", q.double(), k.double()[:, heads]) * 0.25
    plain = 5.0 * torch.tanh(plain / 5.0) + bias.double()
    assert (scores is None) is not want_scores
    if scores is not None:
        torch.testing.assert_close(scores.double(), plain, rtol=0, atol=1e-5)
    assert weights is not None
    masked = plain.masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(weights.double(), masked.softmax(-1), rtol=0, atol=1e-5)


def test_a_trace_of_large_calls_can_be_saved_apart(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x.roll(1, 1), x.roll(2, 1))

    x = torch.randn(1, 8, 700, 64)
    trace = hookattn.trace(Model(), x)
    call = trace[0]
    assert torch.equal(call.q, x)
    assert torch.equal(call.v, x.roll(2, 1))
    file = tmp_path / "q.pt"
    torch.save(call.q, file)
    assert file.stat().st_size < 2 * x.numel() * 4
