"""What has to be reached, and which rows tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import variants as v
from .cases import LARGE, LONG, SMALL, TOY
from .measure import Row

Rows = Mapping[str, Sequence[Row]]
BRIDGE = "TransformerBridge.run_with_cache (same fields)"


@dataclass(frozen=True)
class Verdict:
    """One bar: a limit from above (``≤``) or below (``≥``), and what was measured (None: not run)."""

    name: str
    limit: float
    measured: float | None
    sign: str = "≤"

    @property
    def reached(self) -> bool:
        """Whether the measured value is on the right side."""
        if self.measured is None:
            return False
        return self.measured <= self.limit if self.sign == "≤" else self.measured >= self.limit


def verdicts(rows: Rows, extra: Mapping[str, float], device: str) -> list[Verdict]:
    """Every bar that this kind of run can tell of; ``extra``: what was measured beside the cases."""

    def row(case: str, name: str) -> Row | None:
        return next((r for r in rows.get(case, ()) if r.name == name and r.left_out is None), None)

    def ratio(case: str, name: str) -> float | None:
        found = row(case, name)
        return None if found is None else found.ratio

    def over(case: str, name: str, other: str) -> float | None:
        a, b = row(case, name), row(case, other)
        return None if a is None or b is None else a.milliseconds / b.milliseconds

    def per_call(case: str, name: str) -> float | None:
        found = row(case, name)
        return None if found is None else found.per_call

    left = [abs(r.ratio - 1) for case in rows.values() for r in case if r.name == v.AFTER and r.left_out is None]
    both = [
        Verdict("untraced after tracing: furthest median ratio from 1", 0.02, max(left, default=None)),
        Verdict("streaming to disk ÷ writing the same bytes", 1.15, extra.get("stream ÷ plain write")),
        Verdict("peak of a streamed trace beyond the untraced forward, in calls", 3, extra.get("stream peak in calls")),
    ]
    if device == "cuda":
        full, eager = row(LARGE, v.FULL), row(LARGE, v.OUTPUT_ATTENTIONS)
        compared = None if full is None or eager is None else full.added / eager.added
        peak = None if full is None or not full.peak or not full.kept else full.peak / full.kept
        return [
            Verdict("8B-shaped, 2k tokens, bfloat16: q k v ÷ untraced", 1.03, ratio(LARGE, v.QKV)),
            Verdict("the same: time added by everything ÷ by output_attentions", 0.5, compared),
            Verdict("the same: peak memory of everything ÷ bytes kept", 1.1, peak),
            Verdict("scores and weights written ÷ bandwidth of a copy", 0.8, extra.get("derive ÷ copy"), "≥"),
            Verdict("statistics at 131k tokens: time added ÷ flash forward", 3, extra.get("statistics ÷ forward")),
            *both,
        ]
    return [
        Verdict("toy: everything ÷ untraced", 1.25, ratio(TOY, v.FULL)),
        Verdict("toy: q k v ÷ untraced", 1.08, ratio(TOY, v.QKV)),
        Verdict("small: everything ÷ untraced", 1.03, ratio(SMALL, v.FULL)),
        Verdict("small: everything ÷ TransformerBridge, same fields", 1.0, over(SMALL, v.FULL, BRIDGE)),
        Verdict("long: everything ÷ eager output_attentions", 1.15, over(LONG, v.FULL, v.OUTPUT_ATTENTIONS)),
        Verdict("long: weights ÷ eager output_attentions", 1.0, over(LONG, v.WEIGHTS, v.OUTPUT_ATTENTIONS)),
        Verdict("µs a call: q k v, one trace()", 40, per_call(TOY, v.QKV)),
        Verdict("µs a call: q k v, inside one tracing() block", 40, per_call(TOY, v.QKV_BLOCK)),
        *both,
    ]
