"""The tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hookattn.torch_internals.devices import size_of

from .bars import Verdict
from .measure import Row


def case_table(name: str, rows: Sequence[Row]) -> str:
    """One line for each variant of a case."""
    width = max(len(row.name) for row in rows)
    lines = [
        "",
        name,
        f"{'variant':<{width}}{'median ms':>11}{'ratio':>9}   {'quartiles':<15}"
        f"{'µs a call':>10}{'peak':>11}{'kept':>11}",
    ]
    for row in rows:
        if row.left_out is not None:
            lines.append(f"{row.name:<{width}}   {row.left_out}")
            continue
        spread = f"{row.low:.3f} – {row.high:.3f}"
        sizes = ["–" if x is None else size_of(x) for x in (row.peak, row.kept)]
        lines.append(
            f"{row.name:<{width}}{row.milliseconds:>11.2f}{row.ratio:>9.3f}   {spread:<15}{row.per_call:>10.1f}"
            f"{sizes[0]:>11}{sizes[1]:>11}"
        )
    return "\n".join(lines)


def bar_table(verdicts: Sequence[Verdict], beside: Mapping[str, float | None] | None = None, name: str = "") -> str:
    """What was to be reached, and what was.

    Args:
        verdicts: the bars.
        beside: of the same bars by their names, what was measured in another way; ``name`` says which.
        name: the column's.
    """
    width = max(len(v.name) for v in verdicts)
    column = "" if beside is None else f"{name:>{len(name) + 3}}"
    lines = ["", f"{'what has to be reached':<{width}}{'bar':>10}{'measured':>10}{'':10}{column}".rstrip()]
    for v in verdicts:
        said = "" if v.measured is None else "   reached" if v.reached else "   missed"
        also = "" if beside is None or (other := beside.get(v.name)) is None else f"{other:>{len(column)}.3g}"
        line = f"{v.name:<{width}}{v.sign + ' ' + format(v.limit, 'g'):>10}{_measured(v.measured):>10}{said:10}{also}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _measured(value: float | None) -> str:
    return "not run" if value is None else f"{value:.3g}"
