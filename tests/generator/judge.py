"""What a trace says of a case, compared with what is true of it."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hookattn
from hookattn.errors import NoAttentionError

from .source import Case

TOLERANCE = 1e-4


@dataclass
class Verdict:
    """What came of a case.

    Attributes:
        outcome: as the package's docstring names them.
        why: in words.
        also: what beside the fields is untrue of one that is right.
    """

    outcome: str
    why: str = ""
    also: list[str] = field(default_factory=list)


def judge(case: Case) -> Verdict:
    """Trace the case and say how right it is."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        plain = case.module(*case.inputs)
        try:
            trace = hookattn.trace(case.module, case.inputs)
        except NoAttentionError as e:
            return Verdict("silent", f"NoAttentionError: {str(e)[:90]}")
        except Exception as e:  # noqa: BLE001 - whatever a trace raises is a finding
            return Verdict("crash", f"{type(e).__name__}: {str(e)[:110]}")
        after = case.module(*case.inputs)
        calls = [c for c in trace if _ours(case, c.site.path)]
        skipped = [s for s in trace.skipped if _ours(case, s.path)]
        return compare(case, calls, skipped, not torch.equal(plain, after))


def _ours(case: Case, path: str) -> bool:
    return case.features["beside"] == "no" or path == "inner" or path.startswith("inner.")


def compare(case: Case, calls: list[Any], skipped: list[Any], changed: bool = False) -> Verdict:
    """The verdict on what was recorded."""
    if changed:
        return Verdict("wrong", "the trace changed the model")
    if not calls:
        return (
            Verdict("skipped", skipped[0].reason) if skipped else Verdict("silent", "nothing recorded, nothing skipped")
        )
    guessed = any("guessed" in c.basis.values() for c in calls)
    whole, why = _assembled(case, calls)
    if not why:
        why = _untrue(case, whole)
    if why and len(calls) > 1 and _in_turn(case, calls):
        return Verdict("guessed" if guessed else "parts", f"{len(calls)} calls, which say the how many-th they are")
    if guessed:
        return Verdict("guessed", "right" if not why else f"and wrong: {why}")
    if why:
        return Verdict("skipped", skipped[0].reason) if skipped else Verdict("wrong", why)
    if any(c.certificate.status not in ("faithful",) for c in calls):
        return Verdict("wrong", f"right, and its certificate says {calls[0].certificate.status}")
    if misnamed := _misnamed(case, calls[0]):
        return Verdict("wrong", misnamed)
    return Verdict("right", also=_also(case, calls))


def _in_turn(case: Case, calls: list[Any]) -> bool:
    """Whether each of several calls says the how many-th it is, and is that part of the whole along one axis."""
    n = len(calls)
    if not all(any(str(note).startswith(f"{i} of {n} ") for note in c.notes) for i, c in enumerate(calls, 1)):
        return False
    parts = [_get(c, "weights") for c in calls]
    want = case.truth.weights
    for axis in range(3):
        for order in _batch_orders(case):
            true = want if order is None else want[order]
            try:
                whole = torch.cat(parts, axis)
            except (RuntimeError, TypeError):
                break
            if whole.shape == true.shape and _close(whole, true):
                return True
    return False


@dataclass
class Whole:
    """What was recorded, of one call or put together of its parts; absent fields are None."""

    fields: dict[str, Tensor | None]
    scale: Any
    kv_heads: tuple[int, ...] | None


def _get(call: Any, name: str) -> Tensor | None:
    try:
        return call.get(name)
    except (hookattn.errors.HookattnError, AttributeError):
        return None


def _assembled(case: Case, calls: list[Any]) -> tuple[Whole, str]:
    names = ("q", "k", "v", "scores", "mask", "weights", "output")
    if len(calls) == 1:
        c = calls[0]
        return Whole({n: _get(c, n) for n in names}, c.scale, c.kv_heads), ""
    empty = Whole({}, 1.0, None)
    want = case.truth.weights
    made = torch.full_like(want, torch.nan)
    for c in calls:  # each says which heads, which queries it holds
        w = _get(c, "weights")
        if w is None or (c.heads is None and c.queries is None and getattr(c, "batch", None) is None):
            return empty, f"{len(calls)} calls, and not said which part each is"
        heads = list(c.heads) if c.heads is not None else list(range(want.shape[1]))
        rows = list(c.queries) if c.queries is not None else list(range(want.shape[2]))
        batch = list(getattr(c, "batch", None) or range(want.shape[0]))
        try:
            made[
                torch.tensor(batch)[:, None, None], torch.tensor(heads)[None, :, None], torch.tensor(rows)[None, None]
            ] = w.double()
        except (RuntimeError, IndexError):
            return empty, f"{len(calls)} calls, whose shapes are not the parts that they say"
    return Whole({"weights": made}, 1.0, None), ""


def _untrue(case: Case, whole: Whole) -> str:
    """What of the fields is not so; empty: all is."""
    t = case.truth
    w = whole.fields.get("weights")
    if w is None:
        return "no weights"
    orders = _batch_orders(case)
    first = ""
    for order in orders:
        why = _untrue_in(case, whole, order)
        if not why:
            return ""
        first = first or why
    del t
    return first


def _batch_orders(case: Case) -> list[Any]:
    """Windows that are an axis may join the batch in either order."""
    if "axis" not in case.features["windows"]:
        return [None]
    n = case.sizes["w"]
    b = len(case.truth.weights) // n
    return [None, torch.arange(b * n).reshape(b, n).T.flatten()]


def _untrue_in(case: Case, whole: Whole, order: Any) -> str:
    t = case.truth
    put = (lambda y: y) if order is None else (lambda y: y[order])
    w, want = whole.fields["weights"], put(t.weights)
    if w.shape != want.shape:
        return _how_shaped(w, want)
    if not _close(w, want):
        return _how_exchanged(w, want)
    for name, true in (
        ("v", t.v),
        ("output", t.heads_out),
        ("q", t.q),
        ("k", t.k),
        ("scores", t.scores),
        ("mask", t.mask),
    ):
        got = whole.fields.get(name)
        if got is None or (name in "qk" and case.features["score"] != "dot"):
            continue
        true = put(true)
        if name in ("k", "v"):
            got = _repeated(got, true.shape[1], whole.kv_heads)
        if name == "scores" and case.features["score"] != "dot":
            continue
        if name in ("q", "k"):
            why = _untrue_vectors(name, got, true)
            if why:
                return why
            continue
        if name == "mask":
            if not _masked_so(case, got.expand_as(true), true, want):
                return "mask"
            continue
        if name == "scores":
            got = _comparable(case, got.double().expand_as(true), true, put(t.mask))
            got, true = (y.masked_fill(~put(t.mask), 0.0) for y in (got, true))
        if got.shape != true.shape:
            return f"{name}: {tuple(got.shape)}, in truth {tuple(true.shape)}"
        if not _close(got, true):
            return f"{name} off by {(got.double() - true).abs().max().item():.2g}"
    return ""


def _masked_so(case: Case, got: Tensor, true: Tensor, weights: Tensor) -> bool:
    """Whether the mask is the true one. Where a model sets weights to 0 itself that no softmax made, its scores are not
    masked, and a mask may leave that to the weights."""
    if case.features["more"] == "top-k":  # what was not chosen weighs nothing: hidden, or not, as it was made
        return not bool((true & ~got).any()) and not bool(weights[got & ~true].any())
    if case.features["normalizer"] in ("softmax", "late", "softmax1", "sparsemax", "sigmoid"):
        return torch.equal(got, true)
    return not bool((true & ~got).any()) and not bool(weights[got & ~true].any())


def _comparable(case: Case, got: Tensor, true: Tensor, mask: Tensor) -> Tensor:
    """Scores up to what their normalizer makes nothing of, or what may be counted as theirs or as its own."""
    form = case.features["normalizer"]
    gap = torch.where(mask, true - got, 0.0)
    if form in ("softmax", "late", "sparsemax") and case.features["more"] != "sinks":  # a constant for each row
        return got + gap.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    if form == "sigmoid" and _close(gap, mask * case.truth.shift):
        return true
    if form == "none" and _close(got * case.sizes["s"], true):
        return true
    return got


def _untrue_vectors(name: str, got: Tensor, true: Tensor) -> str:
    """q and k up to one factor, as a scale may be on either side of the product."""
    if got.shape[1:] != true.shape[1:] or (len(got) != len(true) and len(got) != 1):
        return f"{name}: {tuple(got.shape)}, in truth {tuple(true.shape)}"
    got = got.double().expand_as(true)
    factor = (got * true).sum() / (true * true).sum()
    return "" if _close(got, factor * true) and factor > 0 else f"{name} off"


def _repeated(y: Tensor, heads: int, kv_heads: tuple[int, ...] | None) -> Tensor:
    if kv_heads is not None:
        return y[:, list(kv_heads)]
    return y.repeat_interleave(heads // y.shape[1], 1) if y.shape[1] and heads % y.shape[1] == 0 else y


def _close(got: Tensor, true: Tensor) -> bool:
    return bool(torch.allclose(got.double(), true.double(), atol=TOLERANCE, rtol=TOLERANCE))


def _how_shaped(w: Tensor, want: Tensor) -> str:
    if w.dim() == want.dim() and sorted(w.shape) == sorted(want.shape):
        return "axes exchanged (shape)"
    if w.numel() == want.numel():
        return "axes folded" if w.shape[-1] == want.shape[-1] else "shape"
    return f"shape {'larger' if w.numel() > want.numel() else 'smaller'}"


def _how_exchanged(w: Tensor, want: Tensor) -> str:
    for order in itertools.permutations(range(4)):
        moved = want.permute(order)
        if moved.shape == w.shape and _close(w, moved):
            return "axes exchanged (same shape)"
    if w.numel() == want.numel() and _close(w.flatten().sort().values, want.flatten().sort().values):
        return "weights in another order"
    return f"weights off by {(w.double() - want).abs().max().item():.2g}"


def _misnamed(case: Case, c: Any) -> str:
    """What is untrue of the names of a call's score and normalizer; empty: nothing."""
    f = case.features
    if (c.normalizer == "softmax") != (f["normalizer"] in ("softmax", "late")):
        return f"normalizer {c.normalizer} of {f['normalizer']}"
    # 2 q·k - |q|² - |k|² is a product with two biases as well.
    if (c.score == "dot") != (f["score"] == "dot") and f["score"] != "bilinear" and f.get("distance") != "expanded":
        return f"score {c.score} of {f['score']}"
    return ""


def _also(case: Case, calls: list[Any]) -> list[str]:
    """What is said beside the fields."""
    found = []
    f = case.features
    c = calls[0]
    if f["kind"] != "pool" and c.site.kind != f["kind"]:  # learned queries are of no sequence
        found.append(f"kind {c.site.kind} of {f['kind']}")
    return found
