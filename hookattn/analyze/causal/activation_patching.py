"""Activation patching: what of one run, put into another, brings the metric of the one with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ... import checks, edit
from ...calls.call import Call
from ...edit.base import Edit
from ...edit.where import Where
from ...errors import SelectionError
from .metric import Metric
from .running import Entries, Job, Runner, check_same, field_of, of_entries, plain_trace
from .selecting import check_options, chosen_calls, chosen_numbers, effects_table, wanted_numbers

if TYPE_CHECKING:
    from pandas import DataFrame

FIELDS = ("q", "k", "v", "scores", "weights", "output")
"""What can be patched."""
INTO = ("corrupted", "clean")


def activation_patching(
    model: nn.Module,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    field: str = "output",
    into: str = "corrupted",
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    positions: bool | int | Sequence[int] = False,
    stack: str | None = None,
    kind: str | None = None,
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> DataFrame:
    """The effect of each head's activation: it is taken of the run on one input and put into the run on the other, all
    else being computed as ever (Vig et al. 2020, "Investigating gender bias in language models using causal mediation
    analysis"; Meng et al. 2022, "Locating and editing factual associations in GPT").

    With m(x) the metric of a run and m(x ← h) that of a run into which head h is patched::

        effect   = m(base ← h of the other run) − m(base)
        restored = effect / (m(other run) − m(base))

    ``into="corrupted"`` patches values of the clean run into the corrupted one: which heads are enough (denoising).
    ``into="clean"`` patches values of the corrupted run into the clean one: which are needed (noising; Heimersheim &
    Nanda 2024, "How to use and interpret activation patching"). ``restored`` is the normalised difference of Zhang &
    Nanda 2024, "Towards best practices of activation patching".

    Nothing is recorded of the patched runs. Several are one forward where the model takes the input repeated, and what
    it does before the patched layer is not done again where it can be left out; both are tried on the model first, and
    ``attrs["runs"]`` says what was done and why.

    Args:
        model: any; it is run without gradients, in the mode that it is in.
        clean, corrupted: inputs as :func:`hookattn.trace` takes them, of the same shape.
        metric: function of what the model returns; a scalar. One that is of the whole batch is given each run's own.
        field: ``output``, ``q``, ``k``, ``v``, ``weights`` or ``scores``. Of ``k`` and ``v`` the heads are key heads.
        into: the run that is patched.
        layers, heads: numbers, negative ones from the end; None: all.
        positions: False: a head at all positions at once; True: each position alone; or numbers, negative ones from the
            end. Of ``k`` and ``v`` these are keys, else queries.
        stack, kind: of the sites; None: all.
        batch: how many runs are one forward at most; None: as many as pay on its device.
        progress: called with the number of runs done.

    Returns:
        A pandas DataFrame with ``call``, ``step``, ``layer``, ``stack``, ``kind``, ``path``, ``head`` (and
        ``position``), ``value`` (the metric of the patched run), ``effect`` and ``restored`` (NaN where the two runs
        have the same metric). ``attrs`` has the metric of both runs, ``units``, ``descriptions`` and ``runs``.

    Raises:
        InputError: the inputs do not run alike, or the metric returns no scalar.
        SelectionError: a layer, head or position that there isn't, or an unknown field.
        EditError: the field cannot be exchanged in some attention; names it, and why.
    """
    checks.word("field", field, FIELDS)
    checks.word("into", into, INTO)
    check_options(stack, kind, progress)
    layers, heads = wanted_numbers("layers", layers), wanted_numbers("heads", heads)
    positions = _checked_positions(positions)
    base_inputs, other_inputs = (corrupted, clean) if into == "corrupted" else (clean, corrupted)
    runner = Runner(model, base_inputs, metric, batch=batch)
    other = plain_trace(model, other_inputs, field)
    check_same(runner.trace, other)
    other_value = runner.value_of(other.output)
    axis = "keys" if field in ("k", "v") else "queries"
    jobs: list[Job] = []
    rows: list[tuple[Call, int, int | None]] = []
    for i in chosen_calls(runner.trace, layers, stack, kind):
        x = field_of(other.calls[i], field)
        call, where = runner.trace.calls[i], runner.where(i)
        numbers = _positions(call, positions, x.shape[2])
        for head in chosen_numbers("heads", heads, x.shape[1], call):
            for position in numbers:
                of: Where = {**where, "heads": [head]}
                values = x[:, [head]]
                if position is not None:
                    of[axis] = [position]  # type: ignore[literal-required]
                    values = values[:, :, [position]]
                jobs.append(Job((i,), _patches(field, values, of)))
                rows.append((call, head, position))
    found = runner.values(jobs, progress=progress)
    columns = {"head": [head for _, head, _ in rows]}
    if positions is not False:
        columns["position"] = [position for _, _, position in rows if position is not None]
    both = {into: runner.value, "clean" if into == "corrupted" else "corrupted": other_value}
    return effects_table([call for call, _, _ in rows], columns, found, runner, other_value - runner.value, both)


def _patches(field: str, values: Tensor, where: Where) -> Callable[[Entries], list[Edit]]:
    def edits(entries: Entries) -> list[Edit]:
        return [edit.patch(field, values, **of_entries(where, entries))]

    return edits


def _checked_positions(positions: Any) -> bool | list[int]:
    what = "True (each position), False (all at once), or ints"
    if not isinstance(positions, Iterable):
        try:
            return checks.flag("positions", positions, SelectionError)
        except SelectionError:
            pass
    found = checks.several_ints("positions", positions, what)
    if not found:
        raise checks.wrong("positions", positions, what, SelectionError)
    return found


def _positions(call: Call, positions: bool | list[int], there: int) -> list[int | None]:
    if positions is False:
        return [None]
    return list(range(there)) if positions is True else list(chosen_numbers("positions", positions, there, call))
