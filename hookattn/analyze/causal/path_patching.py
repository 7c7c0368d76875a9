"""Path patching: what one head says to another directly, all heads between them being held as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ... import checks, edit
from ...attention.kernel_call import FIELD_SPECS
from ...edit.base import Edit
from ...edit.edited_call import EditedCall
from ...errors import InputError, SelectionError
from ...traces import Trace
from .metric import Metric
from .running import Entries, Job, Runner, check_same, field_of, of_entries, plain_trace
from .selecting import check_options, chosen_calls, chosen_numbers, effects_table, one_call, wanted_numbers

if TYPE_CHECKING:
    from pandas import DataFrame

OUTPUT = "output"
FROZEN = ("output", "weights")
INTO = ("q", "k", "v")


def path_patching(
    model: nn.Module,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    receivers: str | Iterable[tuple[int, int]] = OUTPUT,
    into: str | Sequence[str] = "q",
    frozen: str = "output",
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    stack: str | None = None,
    kind: str | None = None,
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> DataFrame:
    """The direct effect of each head (a sender) on some others (receivers), or on the model's output (Wang et al. 2022,
    "Interpretability in the wild", appendix B; Goldowsky-Dill et al. 2023, "Localizing model behavior with path
    patching").

    Of each sender:

    1. The model runs on the clean input, with the sender's output that of the corrupted run, and all heads after it
       frozen as they were in the clean run. What is not attention is computed as ever. So the queries, keys or values
       of the receivers differ by what comes straight from the sender.
    2. The model runs on the clean input, with these put into the receivers, and nothing frozen. Its metric is
       ``value``. If the receiver is the output, there is no second run: ``value`` is the metric of the first.

    ::

        effect   = value − m(clean)
        restored = effect / (m(corrupted) − m(clean))

    Args:
        model, clean, corrupted, metric, batch, progress: as in :func:`hookattn.analyze.activation_patching`; progress
            counts senders.
        receivers: ``"output"``, or layers and heads: ``[(9, 6), (9, 9)]``, all of them together.
        into: ``q``, ``k``, ``v``, or several of them; of ``k`` and ``v`` the key head that a receiver reads, which
            others may read with it. Not for the output.
        frozen: what is held of the heads between: their ``output``; or their ``weights`` alone, so that they pass on
            what they read of the sender by patterns that stay (Elhage et al. 2021): the sum of all paths through
            values.
        layers, heads: of the senders; those that no receiver comes after are left out.
        stack, kind: of senders and receivers.

    Returns:
        A pandas DataFrame as :func:`hookattn.analyze.activation_patching` returns it, a row for each sender.

    Raises:
        SelectionError: a layer or head that there isn't, or no sender before the receivers.
        InputError, EditError: as in :func:`hookattn.analyze.activation_patching`.
    """
    checks.word("frozen", frozen, FROZEN)
    fields = [checks.word("into", x, INTO) for x in ([into] if isinstance(into, str) else checks.items_of(into) or [])]
    if not fields:
        raise SelectionError("into=[]: expected some of q, k, v.")
    check_options(stack, kind, progress)
    layers, heads = wanted_numbers("layers", layers), wanted_numbers("heads", heads)
    pairs = None if isinstance(receivers, str) and receivers == OUTPUT else _pairs(receivers)
    runner = Runner(model, clean, metric, [frozen], batch)
    other = plain_trace(model, corrupted)
    check_same(runner.trace, other)
    calls = runner.trace.calls
    targets = None if pairs is None else _receivers(runner.trace, pairs, stack, kind)
    end = len(calls) if targets is None else max(targets)
    senders = [
        (i, head)
        for i in chosen_calls(runner.trace, layers, stack, kind)
        for head in chosen_numbers("heads", heads, field_of(calls[i], "output").shape[1], calls[i])
        if i < end
    ]
    if not senders:
        raise SelectionError("no sender comes before the receivers; choose other layers= or receivers=.")
    found: list[float] = []
    for i in dict.fromkeys(i for i, _ in senders):
        jobs = [Job((i,), _sends(runner, other, i, head)) for place, head in senders if place == i]
        after = range(i + 1, end)

        def freeze(n: int, after: range = after) -> list[Edit]:
            return [
                edit.patch(frozen, runner.repeated(field_of(calls[j], frozen), n), **runner.where(j)) for j in after
            ]

        def advance(n: int, before: int = len(found)) -> None:
            if progress is not None:
                progress(before + n)

        if targets is None:
            found += runner.values(jobs, freeze, after, advance)
        else:
            found += _through(runner, jobs, freeze, after, targets, fields, advance)
    whole = runner.value_of(other.output) - runner.value
    both = {"clean": runner.value, "corrupted": runner.value + whole}
    return effects_table([calls[i] for i, _ in senders], {"head": [h for _, h in senders]}, found, runner, whole, both)


def _pairs(given: Any) -> list[list[int]]:
    """Layers and heads as a caller gives them."""
    what = "pairs of a layer and a head, such as [(9, 6)], or 'output'"
    found = [checks.several_ints("receivers", pair, what) for pair in checks.items_of(given) or []]
    if not found or any(len(pair) != 2 for pair in found):
        raise checks.wrong("receivers", given, what, InputError)
    return found


def _receivers(
    trace: Trace, pairs: Sequence[Sequence[int]], stack: str | None, kind: str | None
) -> dict[int, list[int]]:
    """Place of a call -> its heads."""
    found: dict[int, list[int]] = {}
    for layer, head in pairs:
        i = one_call(trace, layer, stack, kind)
        call = trace.calls[i]
        found.setdefault(i, []).extend(chosen_numbers("heads", [head], field_of(call, "output").shape[1], call))
    return found


def _sends(runner: Runner, other: Trace, i: int, head: int) -> Callable[[Entries], list[Edit]]:
    """Of a sender, the edit that puts its output of the other run into this one."""
    values = field_of(other.calls[i], "output")[:, [head]]

    def edits(entries: Entries) -> list[Edit]:
        return [edit.patch("output", values, **of_entries(runner.where(i), entries, heads=[head]))]

    return edits


class _Read:
    """Keeps what a field is, and changes nothing."""

    value: Tensor

    def __call__(self, call: EditedCall) -> Tensor:
        self.value = call.value.detach().clone()
        return call.value


def _through(
    runner: Runner,
    jobs: Sequence[Job],
    freeze: Callable[[int], list[Edit]],
    after: Sequence[int],
    targets: dict[int, list[int]],
    fields: Sequence[str],
    progress: Callable[[int], None],
) -> list[float]:
    """The metric of each sender by way of the receivers."""
    found: list[float] = []
    reached = [i for i in targets if i > jobs[0].sites[0]]
    readers = {(i, name): _Read() for i in reached for name in fields}

    def read(n: int) -> list[Edit]:
        looks = [edit.call(reader, name, **runner.where(i)) for (i, name), reader in readers.items()]
        return [*looks, *freeze(n)]

    for several, _ in runner.outputs(jobs, read, after):
        second = []
        for place in range(len(several)):
            seen = {key: _of_run(reader.value, place, len(several)) for key, reader in readers.items()}
            second.append(Job(tuple(reached), _receives(runner, seen, targets)))
        found += runner.values(second)
        progress(len(found))
    return found


def _of_run(x: Tensor, place: int, n: int) -> Tensor:
    size = x.shape[0] // n
    return x[place * size : (place + 1) * size]


def _receives(
    runner: Runner, seen: dict[tuple[int, str], Tensor], targets: dict[int, list[int]]
) -> Callable[[Entries], list[Edit]]:
    """Of receivers, the edits that put in what was seen."""

    def edits(entries: Entries) -> list[Edit]:
        made: list[Edit] = []
        for (i, name), x in seen.items():
            heads = targets[i]
            if "G" in FIELD_SPECS[name].axes:
                groups = field_of(runner.trace.calls[i], "output").shape[1] // x.shape[1]
                heads = sorted({head // groups for head in heads})
            heads = sorted(set(heads))
            made.append(edit.patch(name, x[:, heads], **of_entries(runner.where(i), entries, heads=heads)))
        return made

    return edits
