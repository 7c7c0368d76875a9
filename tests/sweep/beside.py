"""One model type traced several times, with a second follower beside it: what is recognised is what following makes.

Hand-written attention is what is learned, so a type is built in its eager implementation where it has one.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tests.beside import trace_beside

from .cases import UnbuildableError, build, copy_of, inputs_of
from .classes import NoModelError
from .inputs import said
from .recipes import Recipe
from .table import RECIPES

IMPLEMENTATIONS = ("eager", "sdpa")


@dataclass
class BesideRow:
    """What came of one type.

    Attributes:
        model_type: the type.
        implementation: the one that it was built in.
        status: ``green``; ``red``: something differs, or a trace raised; ``unbuilt``: there is no case, for the reason
            in ``reason``.
        reason: why it was not built.
        model: the model class.
        problems: what differs.
        recognised: how many operations were recognised in the last trace.
        followed: how many were followed in it.
        calls: how many attention calls were compared.
        why: why runs could not be learned or used, with how many.
        seconds: how long it took.
    """

    model_type: str
    implementation: str = "eager"
    status: str = "green"
    reason: str = ""
    model: str = ""
    problems: list[str] = field(default_factory=list)
    recognised: int = 0
    followed: int = 0
    calls: int = 0
    why: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def check_beside(model_type: str) -> BesideRow:
    """Trace one type."""
    started = time.perf_counter()
    row = BesideRow(model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _check(row)
        except (UnbuildableError, NoModelError) as error:
            row.status, row.reason = "unbuilt", str(error)
        except Exception as error:  # noqa: BLE001 - building it, or running it without a trace
            row.status, row.reason = "unbuilt", said(error)
    if row.problems:
        row.status = "red"
    row.seconds = round(time.perf_counter() - started, 2)
    return row


def _check(row: BesideRow) -> None:
    reason = RECIPES.get(row.model_type, Recipe()).reason
    if reason:
        raise UnbuildableError(reason)
    for implementation in IMPLEMENTATIONS:
        try:
            model, config = build(row.model_type, implementation)
        except (ValueError, KeyError) as error:  # one that it does not offer
            row.reason = said(error)
            continue
        row.implementation, row.reason = implementation, ""
        break
    else:
        raise UnbuildableError(row.reason)
    row.model = type(model).__name__
    inputs = inputs_of(row.model_type, model, config)
    try:
        with torch.no_grad():
            found = trace_beside(model, lambda: copy_of(inputs))
    except Exception as error:  # noqa: BLE001 - whatever a trace raises is what this looks for
        row.problems.append(f"raises: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return
    if found.problem:
        row.problems.append(f"differs in {found.problem}"[:600])
    row.recognised, row.followed, row.calls, row.why = found.recognised, found.followed, found.calls, dict(found.why)


def little_recognised(rows: Iterable[dict[str, Any]], below: float = 0.9) -> str:
    """The types of which less than a share is recognised, with the reasons: those first that most types have."""
    few = []
    for row in rows:
        count = row.get("recognised", 0) + row.get("followed", 0)
        if row["status"] == "green" and count and row["recognised"] / count < below:
            few.append((row["recognised"] / count, row))
    reasons = Counter(why for _, row in few for why in row["why"])
    lines = [f"{n} types: {why}" for why, n in reasons.most_common()]
    for share, row in sorted(few, key=lambda one: one[0]):
        why = ", ".join(f"{n} × {why}" for why, n in Counter(row["why"]).most_common())
        lines.append(
            f"{share:4.0%} of {row['recognised'] + row['followed']} {row['model_type']}: {why or 'never begun'}"
        )
    return "\n".join(lines)
