"""The tables."""

from __future__ import annotations

from collections.abc import Sequence

from hookattn.planning.memory_plan import size_of

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


def bar_table(verdicts: Sequence[Verdict]) -> str:
    """What was to be reached, and what was."""
    width = max(len(v.name) for v in verdicts)
    lines = ["", f"{'what has to be reached':<{width}}{'bar':>10}{'measured':>10}"]
    for v in verdicts:
        measured = "not run" if v.measured is None else f"{v.measured:.3g}"
        said = "" if v.measured is None else "   reached" if v.reached else "   missed"
        lines.append(f"{v.name:<{width}}{v.sign + ' ' + format(v.limit, 'g'):>10}{measured:>10}{said}")
    return "\n".join(lines)
