"""What has to be reached, and which rows tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import variants as v
from .cases import (
    EDITED,
    GENERATION,
    GENERATION_EAGER,
    LARGE,
    LLAMA,
    LONG,
    SMALL,
    SMALL_EAGER,
    SMALL_EAGER_32,
    SMALL_EAGER_128,
    TOY,
    TOY_EAGER,
    TRAINING,
    plain_name,
)
from .hands import HANDS
from .libraries import library_models
from .measure import Row
from .peers import BRIDGE

Rows = Mapping[str, Sequence[Row]]


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
        a, b = ratio(case, name), ratio(case, other)
        return None if a is None or b is None else a / b

    def more(case: str, name: str, other: str) -> float | None:
        a, b = ratio(case, name), ratio(case, other)
        return None if a is None or b is None else a - b

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
        full, eager = row(LARGE, v.READ), row(LARGE, v.OUTPUT_ATTENTIONS)
        compared = None if full is None or eager is None else full.added / eager.added
        peak = None if full is None or not full.peak or not full.kept else full.peak / full.kept
        return [
            Verdict(
                "8B-shaped, 2k tokens, bfloat16: q k v and certificates ÷ untraced", 1.03, ratio(LARGE, v.QKV_READ)
            ),
            Verdict("the same: time added by a trace and all fields read ÷ by output_attentions", 0.5, compared),
            Verdict("the same: peak memory of that ÷ bytes held", 1.1, peak),
            Verdict("scores and weights written ÷ bandwidth of a copy", 0.8, extra.get("derive ÷ copy"), "≥"),
            Verdict("statistics at 131k tokens: time added ÷ flash forward", 3, extra.get("statistics ÷ forward")),
            *both,
        ]
    megabytes = {name: extra[name] / 1e6 for name in extra if name.startswith("generated, ")}
    sizes = ((SMALL_EAGER_32, "32", 1.08), (SMALL_EAGER_128, "128", 1.03), (SMALL_EAGER, "512", 1.02))
    return [
        Verdict("toy, eager: trace ÷ untraced", 1.35, ratio(TOY_EAGER, v.TRACE)),
        Verdict("toy, eager: trace ÷ untraced, in a block", 1.20, ratio(TOY_EAGER, v.BLOCK)),
        *(Verdict(f"small, eager, {n} tokens: trace ÷ untraced", most, ratio(of, v.TRACE)) for of, n, most in sizes),
        *(
            Verdict(
                f"plain GPT, {hand}, {size}: trace ÷ untraced", most, ratio(plain_name(hand, size == "toy"), v.TRACE)
            )
            for size, most in (("toy", 1.5), ("width 768", 1.05))
            for hand in HANDS
        ),
        Verdict("generation, eager: trace ÷ untraced", 1.25, ratio(GENERATION_EAGER, v.TRACE)),
        Verdict("small, eager: first trace of a new model ÷ later ones", 1.2, extra.get("first trace ÷ later ones")),
        *(
            Verdict(f"{model.name.partition(' (')[0]}: trace ÷ untraced", 1.10, ratio(model.name, v.TRACE))
            for model in library_models()
            if not model.toy
        ),
        Verdict("Llama: trace ÷ untraced", 1.03, ratio(LLAMA, v.TRACE)),
        Verdict("small: trace ÷ untraced", 1.02, ratio(SMALL, v.TRACE)),
        Verdict("long: trace ÷ untraced", 1.01, ratio(LONG, v.TRACE)),
        Verdict("edited: the pattern of one head of one layer is 0 ÷ untraced", 1.03, ratio(EDITED, v.ONE_PATTERN)),
        Verdict("training: trace with gradients ÷ untraced", 1.05, ratio(TRAINING, v.GRADIENTS)),
        Verdict("toy: trace ÷ untraced", 1.15, ratio(TOY, v.TRACE)),
        Verdict("toy: trace ÷ untraced, in a block", 1.08, ratio(TOY, v.BLOCK)),
        Verdict("toy: µs a call, one trace()", 45, per_call(TOY, v.TRACE)),
        Verdict("toy: µs a call, in a block", 20, per_call(TOY, v.BLOCK)),
        Verdict("small, eager: trace less q k v, in forwards", 0.03, more(SMALL_EAGER, v.TRACE, v.QKV)),
        Verdict("generation: trace ÷ untraced", 1.10, ratio(GENERATION, v.TRACE)),
        Verdict("Llama: trace + all weights ÷ output_attentions", 1.25, over(LLAMA, v.ALL, v.OUTPUT_ATTENTIONS)),
        Verdict("long: trace + all weights ÷ output_attentions", 1.05, over(LONG, v.ALL, v.OUTPUT_ATTENTIONS)),
        Verdict("long: weights alone ÷ output_attentions", 1.0, over(LONG, v.WEIGHTS_READ, v.OUTPUT_ATTENTIONS)),
        Verdict("small: trace + all fields ÷ TransformerBridge, same fields", 1.0, over(SMALL, v.READ, BRIDGE)),
        Verdict("Llama: held by a trace ÷ bytes of q k v output", 1.1, extra.get("held ÷ q k v output")),
        Verdict("300 generated tokens: megabytes of the file", 60, megabytes.get("generated, bytes of the file")),
        Verdict("300 generated tokens: megabytes in memory", 60, megabytes.get("generated, bytes in memory")),
        Verdict("one head's weights ÷ all 12, 4,096 tokens: time", 0.1, extra.get("one head ÷ all heads, time")),
        Verdict("one head's weights ÷ all 12, 4,096 tokens: memory", 0.1, extra.get("one head ÷ all heads, memory")),
        Verdict("report on 12 × 12 × 512: seconds", 0.6, extra.get("report, seconds")),
        Verdict("report on 12 × 12 × 512: peak in calls", 2, extra.get("report, peak in calls")),
        *both,
    ]
