"""The certificate of a call finds what is wrong with a record, and does not cry wolf."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn import KernelCall, UnfaithfulError, UnfaithfulWarning
from hookattn.calls.certificate import TOLERANCE
from hookattn.recording.verification import rows_to_check
from hookattn.taps import sdpa
from hookattn.taps.eager import assemble
from tests.reference import draw

B, H, G, D = 2, 4, 2, 8
Change = Callable[[KernelCall], Any]


class Sdpa(nn.Module):
    def __init__(self, dropout: float = 0.0, causal: bool = True) -> None:
        super().__init__()
        self.dropout, self.causal = dropout, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        p = self.dropout * self.training
        return F.scaled_dot_product_attention(q, k, v, mask, p, is_causal=self.causal and mask is None, enable_gqa=True)


class Eager(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
        weights = (q @ k.mT * 0.4).softmax(-1)
        return F.dropout(weights, 0.3, self.training) @ v


class Layers(nn.Module):
    """Several of them, each on the same inputs."""

    def __init__(self, n: int, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Sdpa(**options) for _ in range(n))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(*inputs) for layer in self.layers]


def qkv(t: int = 12, dtype: torch.dtype = torch.float32, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    return (
        draw(B, H, t, D, seed=1, dtype=dtype),
        draw(B, G, t, D, seed=2, dtype=dtype),
        draw(B, G, t, D, seed=3, std=size, dtype=dtype),
    )


def trace(model: nn.Module, inputs: Any, **options: Any) -> hookattn.Trace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfaithfulWarning)
        return hookattn.trace(model, inputs, **options)


def wrong(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Have the tap of the fused kernel report something else than what ran."""
    read = sdpa.read

    def changed(*args: Any) -> KernelCall:
        call = read(*args)
        change(call)
        return call

    monkeypatch.setattr(sdpa, "read", changed)


def later_rows(call: KernelCall) -> None:
    call.mask = torch.ones(1, 1, call.q.shape[2], call.k.shape[2], dtype=torch.bool).tril(1)
    call.causal = False


def put(name: str, value: Any) -> Change:
    return lambda call: setattr(call, name, value(call) if callable(value) else value)


WRONG: dict[str, Change] = {
    "scale": put("scale", lambda call: call.scale * 1.05),
    "no causal mask": put("causal", False),
    "softcap": put("softcap", 3.0),
    "window": put("window", 3),
    "offset": put("offset", 1),
    "mask by one": later_rows,
    "bias": put("bias", draw(1, H, 1, 12, seed=5, std=0.1)),
    "sinks": put("sinks", torch.full((H,), -2.0)),
    "a key hidden": put("mask", (torch.arange(12) != 2).view(1, 1, 1, 12)),
    "the groups of k": put("k", lambda call: call.k.flip(1)),
    "the groups of v": put("v", lambda call: call.v.flip(1)),
    "the heads of q": put("q", lambda call: call.q[:, [0, 2, 1, 3]]),
    "batch": put("k", lambda call: call.k.flip(0)),
    "output": put("output", lambda call: call.output.roll(1, 1)),
    "v": put("v", lambda call: call.v * 1.001),
    "a NaN": put("q", lambda call: call.q.index_fill(2, torch.tensor([11]), math.nan)),
}


@pytest.mark.parametrize("verify", ["sample", "full"])
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_record_is_found(monkeypatch: pytest.MonkeyPatch, what: str, verify: str) -> None:
    model = Layers(2)
    assert hookattn.trace(model, qkv(), strict=True, verify=verify).faithful
    wrong(monkeypatch, WRONG[what])
    with pytest.warns(UnfaithfulWarning, match=r"layers\.[01] \(step 0, tap sdpa\) is unfaithful: output .* of .* row"):
        found = hookattn.trace(model, qkv(), verify=verify).certify()
    assert not found.faithful and [c.certificate.status for c in found] == ["unfaithful"] * 2
    assert "2 unfaithful" in repr(found) and "unfaithful" in repr(found[0])
    assert not found[0].certificate.max_error <= found[0].certificate.tolerance
    with pytest.raises(UnfaithfulError, match=r"2 of 2 calls are not .*layers\.0 \(tap sdpa\).*strict=False"):
        hookattn.trace(model, qkv(), verify=verify, strict=True)


@pytest.mark.parametrize(
    "options",
    [
        {"capture": ("q",)},
        {"heads": [3, 0]},
        {"queries": [4, 11]},
        {"layers": [0]},
        {"dtype": torch.float16},
        {"heads": 1, "queries": slice(-2, None)},
    ],
)
@pytest.mark.parametrize("what", ["scale", "no causal mask", "the groups of v"])
def test_a_selection_is_checked_too(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], what: str) -> None:
    assert trace(Layers(1), qkv(), **options).faithful
    wrong(monkeypatch, WRONG[what])
    if not (what == "no causal mask" and options.get("heads") == 1):  # the last two rows see nearly everything
        assert trace(Layers(1), qkv(), **options)[0].certificate.status == "unfaithful"


def test_wrong_weights_of_a_hand_written_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    build = assemble.CallBuilder.call
    good = trace(Eager(), qkv())[0].certificate
    assert good.faithful and good.weights_error is not None and good.weights_error <= good.weights_tolerance
    for change in (
        put("scale", lambda call: call.scale * 1.05),
        put("weights", lambda call: call.weights.roll(1, -1)),
        put("mask", (torch.arange(12) != 2).view(1, 1, 1, 12)),
    ):

        def changed(self: Any, given: Any = None, shared: Any = None, change: Change = change) -> KernelCall:
            call = build(self, given, shared)
            call.scores = None
            change(call)
            return call

        monkeypatch.setattr(assemble.CallBuilder, "call", changed)
        found = trace(Eager(), qkv())[0].certificate
        assert found.status == "unfaithful" and found.weights_error > found.weights_tolerance, found


# ------------------------------------------------------------------------------------------------ which rows


@pytest.mark.parametrize("t", [1, 2, 7, 8, 9, 15, 16, 17, 100, 513])
def test_rows(t: int) -> None:
    rows = list(range(t))[rows_to_check(t, False)]
    assert rows[-1] == t - 1 and len(rows) == min(t, len(rows)) and (len(rows) == t if t <= 8 else 4 < len(rows) <= 8)
    gaps = {b - a for a, b in itertools.pairwise(rows)}
    assert len(gaps) <= 1 and rows[0] <= max(gaps, default=0)  # spread evenly
    assert list(range(t))[rows_to_check(t, True)] == list(range(t))
    small = B * H * t * t <= 1 << 14  # leaving rows out of a small call would cost more than it saves
    for verify, n in (("sample", t if small else len(rows)), ("full", t)):
        found = hookattn.trace(Sdpa(), qkv(t), verify=verify)[0].certificate
        assert (found.rows, found.of_rows) == (n, t) and f"{n} of {t} rows" in str(found)


def test_a_sample_and_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong row: all rows find it wherever it is, a sample only if it looks there."""
    t = 100
    looked = list(range(t))[rows_to_check(t, False)]
    for row in (looked[0], looked[-1], looked[0] + 1, looked[-1] - 1):
        with monkeypatch.context() as patch:
            wrong(patch, put("output", lambda call, row=row: call.output.index_fill(2, torch.tensor([row]), 9.0)))
            assert trace(Sdpa(), qkv(t), verify="full")[0].certificate.status == "unfaithful"
            assert trace(Sdpa(), qkv(t))[0].certificate.faithful == (row not in looked)


class Reused(nn.Module):
    """Writes to its mask after each use, as models do that keep one buffer for all layers."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(12, 12, dtype=torch.bool)
        for i in range(5):
            mask[:, i] = False
            out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return out + mask.fill_(True).sum()


@pytest.mark.parametrize("capture", [None, ("k", "v"), ("weights",)])
def test_a_mask_that_is_written_to_later(capture: Any) -> None:
    model = Reused()
    with hookattn.tracing(model, capture=capture) as found:
        for _ in range(3):  # whether measured call by call or all together
            model(*qkv())
    assert len(found) == 15 and found.faithful, found.calls


def test_verification_off(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, WRONG["scale"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = hookattn.trace(Layers(2), qkv(), verify="off", strict=True)
    assert {c.certificate.status for c in found} == {"unverified"} and not found.faithful
    assert found[0].certificate.rows == 0 and "unverified" in repr(found[0])


# ------------------------------------------------------------------------------------------------ how near is near


@pytest.mark.parametrize("size", [1.0, 100.0, 1e-2])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_tolerance_of_each_dtype(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: float) -> None:
    inputs = qkv(40, dtype, size)
    bounds = (TOLERANCE[dtype] * inputs[2].abs().amax((2, 3)).double()).flatten().tolist()
    bound = min(bounds)
    plain = hookattn.trace(Sdpa(), inputs, verify="full")[0].certificate
    assert plain.faithful and any(math.isclose(plain.tolerance, b, rel_tol=1e-6) for b in bounds), plain
    assert plain.output_error <= bound / 4 and plain.weights_tolerance == TOLERANCE[dtype]
    for factor in (0.3, 3.0):
        with monkeypatch.context() as patch:
            wrong(patch, put("output", lambda call, by=factor * bound: call.output + by))
            assert trace(Sdpa(), inputs)[0].certificate.faithful == (factor < 1)


@pytest.mark.parametrize("t", [12, 600])
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("head", range(H))
def test_a_quiet_head_is_held_to_its_own_size(monkeypatch: pytest.MonkeyPatch, head: int, batch: int, t: int) -> None:
    """An error that would be nothing beside the values of another head."""
    q, k, v = qkv(t)
    v[batch, head // (H // G)] *= 1e-2
    quiet = v[batch, head // (H // G)].abs().max().item()
    assert hookattn.trace(Sdpa(), (q, k, v), strict=True, verify="full").faithful

    def slip(call: KernelCall) -> Tensor:
        out = call.output.clone()
        out[batch, head] += 3 * TOLERANCE[torch.float32] * quiet
        return out

    wrong(monkeypatch, put("output", slip))
    found = trace(Sdpa(), (q, k, v))[0].certificate
    assert not found.faithful and math.isclose(found.tolerance, TOLERANCE[torch.float32] * quiet, rel_tol=0.05)


@pytest.mark.parametrize("spot", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", [Sdpa, Eager])
def test_a_nan_is_never_faithful(kind: type[nn.Module], value: float, spot: str) -> None:
    inputs = dict(zip("qkv", qkv(), strict=True))
    inputs[spot][:, :, 11, 0] = value
    found = trace(kind(), inputs, verify="full")
    # What the fused kernel makes of a NaN differs from processor to processor: NaN, or a row of zeros.
    assert found[0].certificate.status == "unfaithful"
    assert not found[0].certificate.max_error < 1


def test_rows_with_nothing_to_attend_to_do_not_count() -> None:
    """The kernel makes NaN or 0 of them, as it likes, and every other row is checked."""
    mask = torch.ones(12, 12, dtype=torch.bool).tril(-1)
    found = hookattn.trace(Sdpa(), (*qkv(), mask), verify="full")
    assert found[0].certificate.faithful and found[0].empty_rows.flatten().tolist() == [True] + [False] * 11
    assert not found[0].weights[:, :, 0].any()
    assert hookattn.trace(Sdpa(), (*qkv(), mask & False))[0].certificate.faithful


def test_nothing_there_to_check() -> None:
    q, k, v = qkv()
    for inputs in ((q[:0], k[:0], v[:0]), (q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0])):
        assert hookattn.trace(Sdpa(causal=False), inputs)[0].certificate.faithful


# ------------------------------------------------------------------------------------------------ dropout, warnings


def test_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel runs again without; a hand-written one shows the weights it applied."""
    model = Sdpa(dropout=0.5)
    found = trace(model.train(), qkv(), verify="full")[0]
    assert found.certificate.faithful and found.certificate.basis == "the kernel rerun without dropout"
    assert found.dropout == 0.5 and trace(model.eval(), qkv())[0].certificate.basis == "output"
    assert not torch.allclose(found.weights @ found.v.repeat_interleave(H // G, 1), found.output, atol=0.1)
    by_hand = trace(Eager().train(), qkv(), verify="full")[0]
    assert by_hand.certificate.faithful and by_hand.certificate.basis == "output"
    wrong(monkeypatch, WRONG["scale"])
    assert not trace(model.train(), qkv())[0].certificate.faithful


def test_warnings_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, WRONG["scale"])
    with pytest.warns(UnfaithfulWarning) as caught:
        with hookattn.tracing(model := Layers(6)) as found:
            model(*qkv()), model(*qkv())
        assert not caught, "nobody has read anything"
        found.certify()
    texts = [str(w.message) for w in caught]
    assert [t.split()[0] for t in texts] == ["layers.0", "layers.1", "layers.2", "more"] and "certify()" in texts[-1]
    assert all(w.filename == __file__ for w in caught), "the code that read it is named"


@pytest.mark.parametrize("t", [12, 600])
@pytest.mark.parametrize("kind", [Sdpa, Eager])
def test_large_scores_may_round(kind: type[nn.Module], t: int) -> None:
    """A score of 1e5 in float32 is known to 4e-3, and its weight no better; that is no fault of the record."""
    q, k, v = qkv(t)
    small = hookattn.trace(kind(), (q, k, v), strict=True, verify="full")[0].certificate
    large = hookattn.trace(kind(), (q * 200, k * 200, v), strict=True, verify="full")[0].certificate
    assert small.weights_tolerance < 1e-4 < large.weights_tolerance < 0.1 or large.output_error <= small.tolerance


@pytest.mark.parametrize("t", [12, 600])
def test_large_scores_do_not_excuse_everything(monkeypatch: pytest.MonkeyPatch, t: int) -> None:
    q, k, v = qkv(t)
    wrong(monkeypatch, WRONG["no causal mask"])
    assert not trace(Sdpa(), (q * 30, k * 30, v))[0].certificate.faithful


def test_a_value_that_nobody_attends_to_may_be_nan() -> None:
    class Chosen(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = (q @ k.mT * 0.4).softmax(-1)
            return (weights @ v)[0]

    q, k, v = (draw(2, H, 12, D, seed=i) for i in range(3))
    v[1] = math.nan  # its whole batch entry: the rows of the other one are as good as ever
    found = trace(Chosen(), (q, k, v), heads=[0])[0].certificate
    assert found.status == "unfaithful"  # NaN is NaN
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    mask[1] = False

    class Masked(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT * 0.4).masked_fill(~mask, -math.inf).softmax(-1) @ v

    found = trace(Masked(), (q, k, v))[0].certificate
    assert found.faithful and 0 < found.tolerance < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_in_float32_and_weights_in_the_dtype_of_the_values(dtype: torch.dtype) -> None:
    """As GPT-J has it: what is multiplied in the end is known no better than the narrowest of them."""

    class Mixed(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = (q.float() @ k.float().mT * 0.4).softmax(-1).to(v.dtype)
            return weights @ v

    q, k, v = (draw(2, H, 12, D, seed=i, dtype=dtype) for i in range(3))
    found = hookattn.trace(Mixed(), (q, k, v), strict=True, verify="full")[0]
    assert found.certificate.weights_tolerance >= TOLERANCE[dtype] and found.weights.dtype == dtype
