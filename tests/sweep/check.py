"""One model type in one implementation: everything that has to hold of a trace, as one row of results."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import hookattn
from hookattn.errors import NoAttentionError
from hookattn.testing import check_clean, check_trace
from hookattn.testing.clean import state_of

from .axes import untrue, watch_inputs
from .cases import UnbuildableError, build, copy_of, inputs_of, run
from .classes import NoModelError
from .inputs import ROWS, said
from .offered import compare_offered
from .recipes import Recipe
from .skips import unread
from .table import RECIPES
from .unseen import watch

FLAT = 0.97  # of the entropy of a uniform row
GAINS = (1.6, 3.0, 6.0)


@dataclass
class Row:
    """What came of one case.

    Attributes:
        model_type: the type.
        implementation: ``eager`` or ``sdpa``.
        status: ``green``; ``red``: something does not hold; ``none``: no softmax attention ran; ``unbuilt``: there is
            no case, for the reason in ``reason``; ``refused``: the model does not offer this implementation.
        reason: for the last two, why.
        model: the model class.
        problems: what does not hold.
        calls: how many calls were captured; ``kinds``, ``taps``: how many of each.
        skipped: ``path: reason`` of what was skipped.
        error: the largest error of a certificate; ``offered``: the largest distance to the attentions that the eager
            model returns itself, over ``compared`` of them.
        flat: the largest mean entropy of a call's rows, in units of that of a uniform row.
        inputs: shapes of the inputs.
        notes: what a reader has to know.
        seconds: how long it took.
    """

    model_type: str
    implementation: str
    status: str = "green"
    reason: str = ""
    model: str = ""
    problems: list[str] = field(default_factory=list)
    calls: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    taps: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    error: float = 0.0
    offered: float | None = None
    compared: int = 0
    flat: float = 0.0
    inputs: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def check(model_type: str, implementation: str) -> Row:
    """Run one case."""
    started = time.perf_counter()
    row = Row(model_type, implementation)
    recipe = RECIPES.get(model_type, Recipe())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if recipe.reason:
                raise UnbuildableError(recipe.reason)
            for gain in GAINS:
                row = Row(model_type, implementation)
                _check(row, gain)
                if row.flat <= FLAT:
                    break
        except (UnbuildableError, NoModelError) as error:
            row.status, row.reason = "unbuilt", str(error)
            if row.reason.startswith(f"KeyError: '{implementation}'"):
                row.status = "refused"  # a model that looks its function up by name, and has none of its own
        except Exception as error:  # noqa: BLE001 - building or running it without a trace; a trace's errors are red
            row.status, row.reason = "unbuilt", said(error)
    if row.problems:
        row.status = "red"
    row.seconds = round(time.perf_counter() - started, 2)
    return row


def _check(row: Row, gain: float) -> None:
    try:
        model, config = build(row.model_type, row.implementation, gain)
    except ValueError as error:
        if "does not support an attention implementation" in str(error):
            row.status, row.reason = "refused", " ".join(str(error).split())[:120]
            return
        raise UnbuildableError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    row.model = type(model).__name__
    inputs = inputs_of(row.model_type, model, config)
    row.inputs = {k: _shape(v) for k, v in inputs.items()}
    plain = run(model, inputs)
    seen = watch(model, lambda: run(model, inputs))
    before = state_of(model)
    torch.manual_seed(3)
    try:
        with torch.no_grad():
            trace = hookattn.trace(model, copy_of(inputs), verify="full")
    except NoAttentionError:
        row.status = "none"
        row.problems += [f"unseen: {x}" for x in seen.uncovered([], [])]
        return
    except Exception as error:  # noqa: BLE001 - whatever a trace raises is what this looks for
        row.problems.append(f"raises: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return
    if before != state_of(model):
        row.problems.append(f"left behind: {sorted(map(str, before ^ state_of(model)))[:3]}")
    try:
        check_clean(model)
    except AssertionError as error:
        row.problems.append(f"left behind: {error}")
    differs = difference(plain, trace.output)
    if differs:
        row.problems.append(f"output differs: {differs}")
    broken = not _finite(plain)
    _calls(row, trace, broken)
    given = watch_inputs(model, lambda: run(model, inputs))
    row.problems += untrue(model, config, trace, given)
    row.problems += [
        f"unseen: {x}" for x in seen.uncovered([c.site.path for c in trace], [s.path for s in trace.skipped])
    ]
    if broken:
        row.notes.append("the model itself computes NaN, without a trace as well")
    if not trace.calls:
        return
    if row.implementation == "eager":
        compare_offered(row, model, inputs, trace)
    else:
        _compare_eager(row, inputs, trace, plain, gain)


def _compare_eager(row: Row, inputs: dict[str, Any], trace: hookattn.Trace, plain: Any, gain: float) -> None:
    """A fused trace against the attentions of the eager model, which has the same parameters.

    Batch entries with a row that has nothing to attend to are left out: the two paths make different things of it, and
    go on with them.
    """
    eager, _ = build(row.model_type, "eager", gain)
    try:
        theirs = run(eager, inputs)
    except KeyError:
        row.notes.append("not compared with eager, which the model does not have")
        return
    if not _finite(theirs):
        row.notes.append("not compared with eager, whose own output is not finite")
        return
    alive = torch.ones(ROWS, dtype=torch.bool)
    for mask in (c.mask for c in trace if c.mask.shape[0] == ROWS):
        alive &= mask.any(-1).flatten(1).all(-1)
    apart = furthest(plain, theirs, alive)
    before = list(row.problems)
    compare_offered(row, eager, inputs, trace, alive)
    if apart > 1e-3 and row.problems != before:
        row.problems = before
        row.notes.append("its own two paths differ: the model's outputs in eager and in sdpa do not agree either")


def _calls(row: Row, trace: hookattn.Trace, broken: bool) -> None:
    row.calls = len(trace)
    row.kinds = dict(Counter(f"{c.site.stack} {c.site.kind}" for c in trace))
    row.taps = dict(Counter(c.tap for c in trace))
    row.skipped = sorted({f"{s.path}: {s.reason}" for s in trace.skipped})
    row.problems += sorted(
        {f"unread: {s.path}: {s.reason}" for s in trace.skipped if unread(row.model_type, s.path, s.reason)}
    )
    row.notes += sorted({n for c in trace for n in c.notes})
    if any(c.own_scores for c in trace):
        row.notes.append("scores are the model's own")
    if not trace.calls:
        row.status = "none"
        return
    for call in trace:
        if broken and bool(call.q.isnan().any(-1).all() or call.k.isnan().any(-1).all()):
            row.notes.append(f"the model itself computes NaN: every query or every key of {call.site.label}")
            continue  # nothing in it can hold or fail
        one = hookattn.Trace(calls=[call], selection=trace.selection)
        try:
            check_trace(one)
        except AssertionError as error:
            row.problems.append(f"invariant: {str(error)[:250]}")
        except Exception as error:  # noqa: BLE001 - so that the row names it
            row.problems.append(f"invariant raises: {call.site.label}: {type(error).__name__}: {str(error)[:200]}")
        if not call.certificate.faithful:
            row.problems.append(f"certificate: {call.site.label} ({call.tap}): {call.certificate}")
        elif call.certificate.basis.startswith("nothing"):
            row.problems.append(f"certificate: {call.site.label} ({call.tap}): {call.certificate.basis}")
    row.error = max(c.certificate.max_error for c in trace)
    row.flat = round(max(map(flatness, trace)), 3)
    if row.flat > FLAT:
        worst = max(trace, key=flatness)
        row.notes.append(f"nearly uniform: {worst.site.label} ({row.flat})")


def flatness(call: hookattn.Call) -> float:
    """The mean entropy of the rows that may attend to two keys or more, in units of the uniform one."""
    w = call.weights.double()
    n = call.mask.expand_as(w).sum(-1)
    rows = n >= 2
    if not rows.any():
        return 0.0
    entropy = -torch.special.xlogy(w, w).sum(-1) / n.clamp_min(2).log()
    return float(entropy[rows].nanmean())


def difference(a: Any, b: Any, path: str = "output") -> str:
    """Where two outputs are not bit-identical; empty where they are."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return f"{path}: {_shape(a)} and {_shape(b)}"
        if not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) or not torch.equal(a.isnan(), b.isnan()):
            return f"{path} by {(a.double() - b.double()).abs().max().item():.3g}"
        return ""
    if isinstance(a, dict):
        return next((d for k in a if (d := difference(a[k], b[k], f"{path}.{k}"))), "")
    if isinstance(a, (list, tuple)):
        return next(
            (d for i, (x, y) in enumerate(zip(a, b, strict=True)) if (d := difference(x, y, f"{path}[{i}]"))), ""
        )
    if hasattr(a, "__dict__") and not isinstance(a, (nn.Module, type)) and "transformers" in type(a).__module__:
        skip = {k for k, v in vars(a).items() if "onfig" in type(v).__name__}
        return difference({k: v for k, v in vars(a).items() if k not in skip}, vars(b), path)
    return ""


def furthest(a: Any, b: Any, alive: Tensor) -> float:
    """The largest distance of two outputs, in units of the larger; infinite where they are shaped differently."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape:
            return float("inf")
        if a.dim() and len(a) == len(alive):
            a, b = a[alive], b[alive]
        if not a.is_floating_point() or not a.numel():
            return 0.0
        gap = (a.double() - b.double()).abs().nan_to_num().max().item()
        return gap / max(1.0, a.double().nan_to_num().abs().max().item())
    if isinstance(a, dict) and isinstance(b, dict):
        return max((furthest(a[k], b[k], alive) for k in a if k in b), default=0.0)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return max((furthest(x, y, alive) for x, y in zip(a, b, strict=False)), default=0.0)
    return 0.0


def _finite(x: Any) -> bool:
    if isinstance(x, Tensor):
        return not x.is_floating_point() or not bool(x.isnan().any())
    if isinstance(x, dict):
        return all(map(_finite, x.values()))
    return all(map(_finite, x)) if isinstance(x, (list, tuple)) else True


def _shape(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else str(x)[:40]
