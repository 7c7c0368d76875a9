"""``check_adapter``: the whole contract in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..attention.kernel_call import FIELDS
from ..errors import AdapterCheckError, AdapterError
from ..models.adapter import Adapter
from . import edited, structure, untouched, variants, witness
from .case import Case, NotApplicable
from .failure import Failure, listing, of_check

CHECKS: Mapping[str, Callable[[Case], Iterator[Failure]]] = {
    "sites": structure.sites,
    "layers": structure.layers,
    "covered": structure.covered,
    "far from uniform": witness.telling,
    "nothing changed": untouched.outputs,
    "gradients": untouched.gradients,
    "nothing left behind": untouched.raising,
    "invariants": variants.invariants,
    "formed by the model": witness.witness,
    "nothing missing": structure.missing,
    "as without the adapter": structure.generic,
    "grouped heads": variants.grouped,
    "padding": variants.padding,
    "cache": variants.cache,
    "half precision": variants.half,
    "edits": edited.edits,
    "gradients of weights": edited.weight_gradients,
    "weights": witness.expected_weights,
    "more inputs": variants.more_inputs,
}


def check_adapter(
    adapter: Adapter,
    make_model: Callable[[], nn.Module],
    make_inputs: Callable[[], Any],
    *,
    beside: Iterable[Adapter] = (),
    complete: bool = True,
    every_layer: bool = True,
    padding: bool = True,
    skipped: Iterable[str] = (),
    formed: Iterable[str] = ("q", "k", "v", "output"),
    weights: Callable[[nn.Module, Any], Mapping[str, Tensor]] | None = None,
    more_inputs: Mapping[str, Callable[[], Any]] | None = None,
    only: Iterable[str] | None = None,
) -> dict[str, str]:
    """Run everything that this library promises of a trace on a model of yours, with your adapter.

    The references know nothing of the taps: attention as explicit math in float64 from the recorded q, k, bias, mask
    and sinks; the tensors that reach torch's kernels in an untraced run; the model's own outputs and gradients,
    bit for bit; the same trace without the adapter; one forward without a cache for steps with one.

    Args:
        adapter: the adapter under test.
        make_model: returns a small model; called often, after seeding, in eval mode unless a check says otherwise. Its
            weights have to be large enough that attention is far from uniform.
        make_inputs: returns what :func:`hookattn.trace` takes as inputs. With ``input_ids`` by name (or one tensor of
            ids) the model is also run with padding and with a cache, where it takes them; that is found by trying.
        beside: further adapters that the model needs, for classes that it shares with other families.
        complete: whether these cover every class of the model, so that it is watched at its sites alone.
        every_layer: whether every layer of a stack has a site of each kind.
        padding: whether a token that ``attention_mask`` leaves out is hidden from every self-attention.
        skipped: class names of sites whose attention can't be read (no softmax), and is listed in ``trace.skipped``.
        formed: the fields that have to be tensors that the model itself forms. Leave out what a kernel packs, or never
            hands out.
        weights: a reference of your own: ``(model, inputs) -> {module path: B H T S}``.
        more_inputs: name -> function, further inputs to run everything on.
        only: names of :data:`CHECKS` to run; None: all.

    Returns:
        For each check ``"passed"``, or why it does not apply: of a cache or a mask that the model does not take, what
        was tried and what came back.

    Raises:
        InputError, SelectionError: an argument is none there is.
        AdapterCheckError: all that was found, with the path of the call, what was expected, what there is, how to mend
            it; also an AssertionError. ``failures`` has each as a :class:`Failure`.
    """
    case = Case(
        checks.one_of("adapter", adapter, Adapter, "an Adapter, which is an object and no class"),
        checks.function("make_model", make_model, "a function that returns a model"),
        checks.function("make_inputs", make_inputs, "a function that returns inputs"),
        tuple(checks.several("beside", beside, Adapter, "adapters")),
        checks.flag("complete", complete),
        checks.flag("every_layer", every_layer),
        tuple(checks.word("formed", name, FIELDS) for name in _names("formed", formed)),
        None if weights is None else checks.function("weights", weights, "a function of a model and its inputs"),
        checks.flag("padding", padding),
        _names("skipped", skipped),
        _functions("more_inputs", {} if more_inputs is None else more_inputs),
    )
    chosen = list(CHECKS) if only is None else [checks.word("only", name, CHECKS) for name in _names("only", only)]
    failures: list[Failure] = []
    told: dict[str, str] = {}
    for name in chosen:
        found = list(run_check(name, case, told))
        failures += found
    if failures:
        kind = "failure" if len(failures) == 1 else "failures"
        title = f"the adapter {adapter.name!r} does not hold to the contract: {len(failures)} {kind}"
        raise AdapterCheckError(listing(title, failures), failures)
    return told


def _names(argument: str, given: Iterable[str]) -> tuple[str, ...]:
    return tuple(checks.several(argument, given, str, "several names"))


def _functions(argument: str, given: Any) -> dict[str, Callable[[], Any]]:
    checks.one_of(argument, given, Mapping, "names of inputs with a function for each that returns them")
    return {checks.text(argument, name): checks.function(f"{argument}[{name!r}]", make) for name, make in given.items()}


def run_check(name: str, case: Case, told: dict[str, str]) -> list[Failure]:
    """One check; what it raises is a failure too, so that the others are still run."""
    found: list[Failure] = []
    try:
        found, reason = apply(CHECKS[name], case)
        told[name] = "failed" if found else reason
    except Exception as error:  # noqa: BLE001 - reported with the others
        told[name] = "failed"
        found.append(Failure(case.adapter.name, "the check could not be finished", "no error", _said(error)))
    return of_check(found, name)


def apply(check: Callable[[Case], Iterator[Failure]], case: Case) -> tuple[list[Failure], str]:
    """What one check finds; and ``passed``, or why it does not apply."""
    found: list[Failure] = []
    try:
        for failure in check(case):
            found.append(failure)
    except NotApplicable as reason:
        return found, f"not run: {reason}"
    except AdapterError as error:  # names the adapter and the module itself
        found.append(Failure(case.adapter.name, type(error).__name__, got=str(error)))
    return found, "passed"


def _said(error: Exception) -> str:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = "" if place is None else f" ({place.tb_frame.f_code.co_filename}:{place.tb_lineno})"
    return f"{type(error).__name__}: {error}{where}"
