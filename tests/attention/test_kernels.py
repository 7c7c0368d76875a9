"""The GPU kernel against explicit float64 math: on a GPU as it is compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import hookattn
from hookattn import KernelCall
from hookattn.attention.kernels import launch
from hookattn.attention.masks import Diagonal, causal_mask
from hookattn.torch_internals import devices
from tests.interpreter import DEVICE, Broken, interpreted
from tests.reference import draw, masked_softmax, repeat_heads

pytest.importorskip("triton.language")

__all__ = ["interpreted"]  # a fixture
EXACT = 2e-5  # float32 sums, and scores of a few units


def small_tiles(t: int, d: int, formed: bool) -> launch.Tile:
    """Several tiles also where a test is small."""
    return launch.Tile(16, 16, 4)


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_tile_of", small_tiles)
    monkeypatch.setattr(launch, "_CHECK", launch.Tile(16, 16, 4))


def expected(
    q: Tensor, k: Tensor, scale: Any, softcap: Any = None, bias: Any = None, mask: Any = None, sinks: Any = None
) -> tuple[Tensor, Tensor]:
    """In float64, by the definitions of the contract."""
    wide = repeat_heads(k, q.shape[1]).double().expand(q.shape[0], -1, -1, -1)
    scores = q.double() @ wide.mT * (scale.double() if isinstance(scale, Tensor) else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    return scores, masked_softmax(scores, mask if mask is None else mask.expand(scores.shape), sinks)


def derived(q: Tensor, k: Tensor, scale: Any = 0.3, scores: bool = True, weights: bool = True, **given: Any) -> Any:
    """What the kernel writes."""
    options = {"softcap": None, "bias": None, "mask": None, "sinks": None, "diagonal": None, "rows": None} | given

    def there(x: Any) -> Any:
        return x.to(DEVICE) if isinstance(x, Tensor) else x

    made = launch.derive(*map(there, (q, k, scale, *options.values(), scores, weights)))
    assert not isinstance(made, str), made
    return made


def compare(q: Tensor, k: Tensor, scale: Any = 0.3, mask: Tensor | None = None, **given: Any) -> None:
    """Scores and weights, each alone and both, against float64."""
    diagonal = given.pop("diagonal", None)
    want = expected(q, k, scale, mask=mask, **given)
    rounding = torch.finfo(q.dtype).eps
    for scores, weights in ((True, True), (False, True), (True, False)):
        made = derived(q, k, scale, scores, weights, mask=mask, diagonal=diagonal, **given)
        for asked, got, true, dtype, slack in zip(
            (scores, weights), made, want, (torch.float32, q.dtype), (EXACT, max(EXACT, rounding)), strict=True
        ):
            assert (got is not None) == asked
            if got is not None:
                assert got.dtype == dtype and got.is_contiguous() and got.shape == true.shape
                torch.testing.assert_close(got.cpu().double(), true, atol=slack, rtol=slack)


few = settings(max_examples=25, deadline=None, phases=[Phase.generate])  # shrinking takes minutes in the interpreter
sizes = st.fixed_dictionaries(
    {name: st.integers(1, most) for name, most in zip("bgrtsd", (2, 2, 2, 20, 36, 20), strict=True)}
    | {"seed": st.integers(0, 99)}
)


def qk(n: dict[str, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (
        draw(n["b"], n["g"] * n["r"], n["t"], n["d"], seed=n["seed"], dtype=dtype),
        draw(n["b"], n["g"], n["s"], n["d"], seed=n["seed"] + 1, dtype=dtype),
    )


def broadcast(data: st.DataObject, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(data.draw(st.sampled_from(sorted({1, n}))) for n in shape)


@pytest.mark.slow
@given(st.data(), sizes, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@few
def test_everything_at_once(data: st.DataObject, n: dict[str, int], dtype: torch.dtype) -> None:
    """Any part there is or is not, in any shape that broadcasts, rows with nothing to attend to among them."""
    q, k = qk(n, dtype)
    shape = (n["b"], q.shape[1], n["t"], n["s"])
    given: dict[str, Any] = {}
    if data.draw(st.booleans()):
        given["mask"] = draw(*broadcast(data, shape), seed=7) > data.draw(st.sampled_from([-1.0, 0.5, 9.0]))
    if data.draw(st.booleans()):
        given["bias"] = draw(*broadcast(data, shape), seed=8, dtype=dtype)
    if data.draw(st.booleans()):
        given["softcap"] = data.draw(st.sampled_from([1.0, 30.0]))
    sinks = data.draw(st.sampled_from([None, "heads", "rows"]))
    if sinks is not None:
        given["sinks"] = draw(shape[1], seed=9) if sinks == "heads" else draw(*broadcast(data, (*shape[:3], 1)), seed=9)
    scale = draw(*broadcast(data, shape), seed=5) if data.draw(st.booleans()) else data.draw(st.floats(-2, 2))
    compare(q, k, scale, **given)


@given(sizes, st.booleans(), st.sampled_from([None, 1, 3, 20]), st.integers(-50, 50), st.booleans(), st.booleans())
@few
def test_what_a_kernel_hides_by_itself(
    n: dict[str, int], causal: bool, window: int | None, offset: int, chosen: bool, half: bool
) -> None:
    """No mask is read: a diagonal anywhere, a window on one side or both, all rows or some in any order."""
    q, k = qk(n, torch.bfloat16 if half else torch.float32)
    rows = torch.arange(n["t"])
    if chosen:
        rows = rows.flip(0)[::2]
        q = q[:, :, rows]
    if not causal and window is None:
        window = 2
    mask = causal_mask(n["t"], n["s"], window=window, offset=offset, causal=causal)[:, :, rows]
    hides = {"diagonal": Diagonal(causal, offset, window), "rows": rows if chosen else None}
    want = expected(q, k, 0.3, mask=mask)
    for scores in (True, False):
        made = derived(q, k, scores=scores, **hides, mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool))
        for got, true in zip(made, want, strict=True):
            if got is not None:
                slack = max(EXACT, torch.finfo(got.dtype).eps)
                torch.testing.assert_close(got.cpu().double(), true, atol=slack, rtol=slack)
        assert not made[1].cpu()[~mask.expand(want[0].shape)].any(), "a hidden entry weighs something"


@pytest.mark.parametrize("d", [1, 24, 80, 192, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_head_widths(d: int, dtype: torch.dtype) -> None:
    q, k = draw(1, 2, 20, d, seed=1, dtype=dtype), draw(1, 1, 19, d, seed=2, dtype=dtype)
    compare(q, k, d**-0.5, mask=causal_mask(20, 19))


def test_the_tiles_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for t, s, d, dtype in ((3, 300, 64, torch.half), (150, 130, 64, torch.half), (70, 70, 160, torch.half)):
        q, k = draw(1, 2, t, d, seed=1, dtype=dtype), draw(1, 2, s, d, seed=2, dtype=dtype)
        compare(q, k, d**-0.5, mask=causal_mask(t, s), diagonal=Diagonal(True))
    compare(draw(1, 2, 9, 8, seed=1), draw(1, 2, 1100, 8, seed=2), mask=causal_mask(9, 1100, offset=1091))


def test_strided_and_expanded_operands() -> None:
    q = draw(2, 20, 3, 16, seed=1, dtype=torch.half).transpose(1, 2)
    k = draw(1, 18, 16, 3, seed=2, dtype=torch.half).permute(0, 3, 1, 2)
    bias = draw(18, 20, seed=3).t()
    mask = (draw(18, 1, seed=4) > 0).expand(18, 20).t()
    compare(q, k, 0.2, bias=bias, mask=mask)
    compare(q.float(), k.float(), draw(3, 1, 1, seed=5), bias=bias, mask=mask)


@pytest.mark.parametrize("spot", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_hidden_need_not_be_finite(spot: float, dtype: torch.dtype) -> None:
    q, k = draw(1, 2, 20, 8, seed=1, dtype=dtype), draw(1, 2, 20, 8, seed=2, dtype=dtype)
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    k[:, :, 5, 0], mask[..., 5] = spot, False
    k[:, :, 19], mask[..., 19] = spot, False
    _, weights = derived(q, k, mask=mask)
    assert not weights[..., [5, 19]].any()
    clean = k.clone()
    clean[:, :, [5, 19]] = 0
    assert torch.equal(weights.cpu(), derived(q, clean, mask=mask)[1].cpu())
    seen = derived(q, k)[1].cpu()  # what is not hidden is not covered up
    assert seen.isnan().any() and torch.equal(seen.isnan(), (q.double() @ k.double().mT * 0.3).softmax(-1).isnan())


def test_far_apart_scores_and_small_ones() -> None:
    q, k = draw(1, 1, 20, 8, seed=1, std=30), draw(1, 1, 40, 8, seed=2, std=30)
    want, got = expected(q, k, 1.0)[1], derived(q, k, 1.0)[1]
    torch.testing.assert_close(got.cpu().double(), want, atol=1e-3, rtol=1e-2)  # scores of 5000 are rounded to 2⁻¹¹
    assert got.isfinite().all()
    for size in (1e-6, 1e-3, 0.2, 0.3, 3.0):  # the soft-cap keeps its digits near 0
        q = draw(1, 1, 20, 8, seed=1) * size
        want, got = expected(q, k / 30, 1.0, softcap=2.0)[0], derived(q, k / 30, 1.0, softcap=2.0)[0]
        torch.testing.assert_close(got.cpu().double(), want, atol=1e-6 * size, rtol=2e-6)


# ------------------------------------------------------------------------------------------------ the certificate


@given(st.data(), sizes, st.sampled_from([torch.float16, torch.bfloat16]))
@few
def test_a_check_finds_what_float64_finds(data: st.DataObject, n: dict[str, int], dtype: torch.dtype) -> None:
    """Error, largest score and value of each head, of some rows, against an output that is off here and there."""
    q, k = qk(n, dtype)
    shape, e = (n["b"], q.shape[1], n["t"], n["s"]), data.draw(st.integers(1, 20))
    v = draw(*k.shape[:3], e, seed=3, dtype=dtype)
    causal, lowest = data.draw(st.booleans()), data.draw(st.sampled_from([-0.5, 1.0, 9.0]))
    mask = causal_mask(n["t"], n["s"], offset=-1) if causal else draw(*broadcast(data, shape), seed=7) > lowest
    bias = draw(*broadcast(data, shape), seed=8) if data.draw(st.booleans()) else None
    sinks = draw(shape[1], seed=9) if data.draw(st.booleans()) else None
    rows = slice(data.draw(st.integers(0, n["t"] - 1)), n["t"], data.draw(st.integers(1, 5)))
    scores, weights = expected(q, k, 0.3, 5.0, bias, mask, sinks)
    true = weights @ repeat_heads(v, q.shape[1]).double()
    off = draw(*true.shape, seed=4) * (draw(*true.shape, seed=5) > 1)
    output = (true + off).to(dtype)
    live = (mask.expand(shape).any(-1, keepdim=True))[:, :, rows]
    error = ((true - output.double())[:, :, rows] * live).abs().flatten(2).amax(2).flatten()
    seen = (scores * mask.expand(shape))[:, :, rows].abs().flatten(2).amax(2).flatten()
    diagonal = Diagonal(True, -1) if causal else None
    bias, mask, sinks = (None if x is None else x.to(DEVICE) for x in (bias, mask, sinks))
    call = KernelCall(*(x.to(DEVICE) for x in (q, k, v, output)), 0.3, "", bias, softcap=5.0, sinks=sinks)
    found = launch.check(call, rows, mask, diagonal)
    assert found is not None
    excess, reach, gap, size = found.cpu().double()
    assert excess.abs().max() < 1e-5
    torch.testing.assert_close(gap, error, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(reach, seen, atol=1e-4, rtol=1e-4)
    most = repeat_heads(v, q.shape[1]).double().abs().flatten(2).amax(2).flatten()
    assert (size <= most).all() and (causal or n["s"] > 16 or torch.equal(size, most))


@pytest.mark.parametrize("where", ["q", "v", "output"])
def test_a_check_is_never_content_with_no_number(where: str) -> None:
    given = {name: draw(1, 2, 20, 8, seed=i, dtype=torch.half) for i, name in enumerate(("q", "k", "v", "output"))}
    given[where][0, 1, 19 if where != "v" else 3, 2] = math.nan
    call = KernelCall(*(x.to(DEVICE) for x in given.values()), 0.3, "")
    found = launch.check(call, slice(3, 20, 4), None, Diagonal(True))
    assert found is not None and found[2, 1].isinf() and found[2, 0].isfinite()


@pytest.mark.parametrize("fault", [None, "scale", "mask", "a value"])
def test_a_trace_of_nothing_but_arguments(monkeypatch: pytest.MonkeyPatch, fault: str | None) -> None:
    """It is certified by the kernel, and a wrong record is found out."""
    asked: list[Tensor | None] = []
    before = launch.check

    def heeded(
        call: KernelCall, checked: slice, mask: Tensor | None, diagonal: Diagonal, rows: Tensor | None
    ) -> Tensor | None:
        if fault == "scale":
            call = replace(call, scale=call.scale * 3)
        if fault == "mask":
            diagonal = Diagonal(True, offset=5)
        if fault == "a value":
            call = replace(call, v=call.v.clone())
            call.v[1, 1, 0, 0] += 3
        asked.append(before(call, checked, mask, diagonal, rows))
        return asked[-1]

    monkeypatch.setattr("hookattn.attention.kernels.check", heeded)
    made, heard = traced(monkeypatch, torch.bfloat16, capture=("q", "k", "v"), verify="full")
    assert not heard.calls and len(asked) == 1 and asked[0] is not None
    certificate = made[0].certificate
    assert certificate.faithful == (fault is None) and certificate.rows == 24
    monkeypatch.setattr("hookattn.attention.kernels.check", lambda *args: None)
    plain = traced(monkeypatch, torch.bfloat16, capture=("q", "k", "v"), verify="full")[0][0].certificate
    assert plain.faithful
    if fault is None:
        assert certificate.tolerance == pytest.approx(plain.tolerance, rel=1e-6)
        assert certificate.output_error == pytest.approx(plain.output_error, rel=1e-3)


# ------------------------------------------------------------------------------------------------ in a trace


class Attention(nn.Module):
    """One sdpa, large enough to be derived by itself."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def traced(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, **options: Any) -> tuple[hookattn.Trace, Any]:
    """A trace whose calls the kernel derives; and how often it was asked. Without a GPU ``derive`` is told there is."""
    heard = SimpleNamespace(calls=[])
    before = launch.derive

    def heeded(*args: Any) -> Any:
        heard.calls.append(inspect.signature(before).bind(*args).arguments)
        return before(*args)

    monkeypatch.setattr("hookattn.attention.kernels.derive", heeded)
    monkeypatch.setattr("hookattn.recording.certifying.SMALL", 0)
    monkeypatch.setattr(devices, "on_gpu", lambda x: True)
    q = draw(2, 4, 24, 16, seed=1, dtype=dtype).to(DEVICE)
    k, v = (draw(2, 2, 24, 16, seed=i, dtype=dtype).to(DEVICE) for i in (2, 3))
    made = hookattn.trace(Attention(), (q, k, v), **options).certify()
    for name in made[0].fields:
        made[0].get(name)  # while the kernel is listened to
    return made, heard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"queries": slice(3, None, 5)}, {"heads": [3, 0], "queries": [9, 2]}, {"capture": "weights"}]
)
def test_a_trace_is_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: dict[str, Any]) -> None:
    whole = {} if "capture" in options else {"verify": "full", "strict": True}
    made, heard = traced(monkeypatch, dtype, **options, **whole)
    assert len(heard.calls) == (1 if "capture" in options else 2) and not made[0].notes
    assert heard.calls[-1]["diagonal"] is not None, "weights need no mask to be formed"
    monkeypatch.undo()
    q = draw(2, 4, 24, 16, seed=1, dtype=dtype)
    k, v = (draw(2, 2, 24, 16, seed=i, dtype=dtype) for i in (2, 3))
    plain = hookattn.trace(Attention(), (q, k, v), **options)
    assert made.faithful and list(made[0].fields) == list(plain[0].fields)
    for name in plain[0].fields:
        got, want = made[0].get(name), plain[0].get(name)
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert got.dtype == want.dtype
            slack = torch.finfo(dtype).eps * 4
            torch.testing.assert_close(got.cpu(), want, atol=slack, rtol=slack)


def test_what_no_kernel_takes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = traced(monkeypatch, torch.float64, verify="full", strict=True)
    assert any("no kernel takes float64" in note for note in made[0].notes)
    monkeypatch.setattr(launch, "_has_triton", lambda: False)
    made, _ = traced(monkeypatch, torch.float32, verify="full", strict=True)
    assert any("triton is not installed" in note for note in made[0].notes)


def test_a_kernel_that_cannot_start_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken()
    monkeypatch.setattr(launch, "_refused", {})
    monkeypatch.setattr(launch, "kernels", lambda: SimpleNamespace(derive_rows=broken, check_rows=broken))
    for _ in range(2):
        made, _ = traced(monkeypatch, torch.float16, verify="full", strict=True)
        (note,) = made[0].notes
        assert "out of resource: shared memory" in note and "length" not in note
    assert broken.tried == 2, "once for scores and once for weights"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_beyond_two_to_the_31_elements() -> None:
    q, k = (torch.randn(1, 34, 8192, 16, dtype=torch.half, device=DEVICE) for _ in "qk")
    _, weights = derived(q, k, scores=False, diagonal=Diagonal(True))
    last = expected(q[:, -1:, -1:].cpu(), k[:, -1:].cpu(), 0.3)[1]
    torch.testing.assert_close(weights[:, -1:, -1:].cpu().double(), last, atol=1e-3, rtol=1e-3)
