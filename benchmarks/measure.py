"""One case, measured: the rows of its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from hookattn.torch_internals.devices import free_memory, size_of

from .cases import Case, bytes_taken
from .clock import Clock, Timed, Variant, added, clock_of, compare, quartiles, time_all
from .memory import peak
from .variants import BASE, EAGER, UNTRACED

_SPARE = 0.8  # of the free memory
_MOST_FORWARDS = 40  # of one run
# Bytes that a run may write elsewhere: more would take the time of all other rows.
_TO_DISK, _TO_HOST = 3 << 30, 32 << 30


@dataclass
class Row:
    """One variant of one case.

    Attributes:
        name: of the variant.
        milliseconds: median.
        ratio, low, high: to the first variant's, by round: median and quartiles.
        added: seconds beyond the first's, median.
        per_call: microseconds beyond the first's for each attention call.
        peak: bytes at most, beyond what was allocated before the run.
        kept: bytes of what it keeps, if they are known.
        left_out: why there are no numbers.
    """

    name: str
    milliseconds: float = 0.0
    ratio: float = 0.0
    low: float = 0.0
    high: float = 0.0
    added: float = 0.0
    per_call: float = 0.0
    peak: int | None = None
    kept: int | None = None
    left_out: str | None = None

    def to_json(self) -> dict[str, object]:
        """As plain data."""
        return asdict(self)


def measure(
    case: Case,
    device: torch.device,
    seconds: float,
    rounds: int = 0,
    clock: Clock | None = None,
    memory: bool = True,
    wanted: Callable[[Variant], bool] = lambda _: True,
) -> list[Row]:
    """Every row of a case that is wanted, beside the first; what does not fit into memory is a row that says so."""
    clock = clock or clock_of(device)
    model, x = case.make(device), case.inputs(device)
    with torch.no_grad():
        every = case.rows(model, x)
        every = [v for v in every if v is every[0] or wanted(v)]
        fit, rows = [], {}
        for variant in every:
            reason = too_large(case, variant, device)
            if reason is None:
                fit.append(variant)
            else:
                rows[variant.name] = Row(variant.name, left_out=reason)
        look = partial(peak, device=device) if memory else None
        found = time_all(fit, clock, seconds, rounds, case.context_every, look)
        for timed in found:
            rows[timed.variant.name] = _row(timed, found[0], case.calls)
    return [rows[v.name] for v in every]


def too_large(case: Case, variant: Variant, device: torch.device) -> str | None:
    """Why a variant is left out, or None."""
    scores = case.batch * case.heads * case.tokens**2
    eager = variant.peer or variant.name == EAGER
    kept = variant.kept or 0
    if variant.peer:
        kept = case.layers * scores * case.dtype.itemsize * (1 if "output_attentions" in variant.name else 2)
    need = 0 if variant.name in (BASE, UNTRACED) else bytes_taken(case, eager, kept)
    if variant.forwards > _MOST_FORWARDS:
        return f"left out: it runs the model {variant.forwards} times"
    for where, size, most in (("disk", variant.disk, _TO_DISK), ("the host", variant.host, _TO_HOST)):
        if size > most:
            return f"left out: {size_of(size)} to {where} would take the time of all else"
    for where, size, place in (("", need, device), (" of the host", variant.host, torch.device("cpu"))):
        known = free_memory(place)
        free = size if known is None else int(_SPARE * known)
        if size > free:
            return f"left out: needs about {size_of(size)} of {size_of(free)}{where}"
    return None


def _row(timed: Timed, base: Timed, calls: int) -> Row:
    if timed.failed is not None:
        return Row(timed.variant.name, left_out=f"failed: {timed.failed}")
    median, low, high = compare(timed, base)
    more = added(timed, base)
    return Row(
        timed.variant.name,
        1e3 * quartiles(list(timed.seconds.values()))[0],
        median,
        low,
        high,
        more,
        1e6 * more / calls,
        timed.peak,
        timed.variant.kept,
    )
