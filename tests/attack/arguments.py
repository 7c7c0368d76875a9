"""Wrong arguments for every public function: each is refused by a clean error, and none is accepted in silence.

Every function that public_api.json lists is called with each of its arguments exchanged for each of some fifty values,
the others right. What is right for an argument stands in :mod:`.argument_values`, what each argument is in
:mod:`.argument_targets`, and both are held against public_api.json: an argument that stands nowhere is a figure too.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import random
import re
import warnings
import webbrowser
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import hookattn
from tests.project.public_api import FILE

from . import Figure
from .argument_targets import Stage, Target, stage, targets
from .argument_values import TAKES, VALUES

# What takes no argument of a user's, or is held to its arguments elsewhere, and why.
_RECORDS = "a record: the library fills it in"
_CALLED = "the library calls it, with objects of its own"
_MATH = "the math of a record, tensor by tensor: what runs for each call of each trace checks nothing"
_ELSEWHERE = "it is attacked elsewhere: see server"
_FOREIGN = "it needs another library, and passes the rest on to it"
EXCUSED = {
    **dict.fromkeys(
        "hookattn.Call hookattn.Certificate hookattn.KernelCall hookattn.KernelCall.of_weights hookattn.MemoryPlan "
        "hookattn.PlannedCall hookattn.Site hookattn.Skipped hookattn.Trace hookattn.Call.of hookattn.analyze.Circuit "
        "hookattn.analyze.Projection hookattn.analyze.Reading hookattn.analyze.Reading.joined "
        "hookattn.interop.transformer_lens.Hook hookattn.statistics.Problem hookattn.statistics.Problem.of "
        "hookattn.statistics.Problem.of_scores hookattn.statistics.Problem.of_weights hookattn.analyze.Relevance "
        "hookattn.testing.Failure hookattn.demo.induction.InductionConfig".split(),
        _RECORDS,
    ),
    **dict.fromkeys(
        "hookattn.Adapter.check hookattn.Adapter.kind hookattn.Adapter.knows hookattn.Adapter.site "
        "hookattn.analyze.Role.evidence hookattn.statistics.query_positions hookattn.edit.Edit.begin "
        "hookattn.edit.Edit.check hookattn.edit.Edit.new".split(),
        _CALLED,
    ),
    **dict.fromkeys("hookattn.render.serve hookattn.render.server.serve hookattn.render.server.application "
                    "hookattn.render.server.listen hookattn.render.Widget.read".split(), _ELSEWHERE),
    **dict.fromkeys("hookattn.interop.bertviz.head_view hookattn.interop.bertviz.model_view "
                    "hookattn.interop.circuitsvis.attention_heads "
                    "hookattn.interop.transformer_lens.to_transformer_lens hookattn.Trace.to_transformer_lens".split(),
                    _FOREIGN),
    "hookattn.analyze.survey.survey_on_ray": "attacked in tests/analyze/test_survey_on_ray, as it needs Ray",
    "hookattn.analyze.PairMass": "a base of measures, which those that are made of it are",
    "hookattn.analyze.WordRelation": "likewise",
    "hookattn.edit.Edit": "a base of edits, which those that are made of it are",
    "hookattn.edit.Where": "the options of edits, which are attacked with each of them",
    "hookattn.analyze.survey.Chunk": "what chunks gives",
    "hookattn.analyze.survey.Failure": "what a table of a survey says",
    "hookattn.analyze.survey.failures_of": "it reads the metadata of a table that a Measurer made",
    "hookattn.analyze.survey.CorpusShard.has": "arithmetic with the numbers of chunks",
    "hookattn.analyze.survey.CorpusShard.size": "likewise",
    "hookattn.render.Widget.save_page": "it is hookattn.render.save_page",
    "hookattn.demo.induction.InductionTransformer": "a model of the demo, which is no part of the library",
    "hookattn.demo.induction.InductionTransformer.forward": "likewise",
    "hookattn.demo.induction.example_tokens": "likewise",
}  # fmt: skip
# Methods of measures, statistics and views: a subclass writes them, and the library calls them. And what trainers call.
_PROTOCOL = {
    *("counted", "of", "problem", "read", "rows", "pairs", "places", "related", "chosen", "labelled"),
    *("allocate", "columns", "fill", "write", "mean", "of_query", "once", "part", "parts", "per_head", "prepare"),
    *("stat", "tensor"),
    *("on_train_begin", "on_step_end", "on_evaluate", "on_train_start", "on_train_batch_end", "on_train_end"),
    "on_validation_end",
}
# Below these all is excused: the math of calls, what a checker of adapters does, and a call as an edit is given it.
_BELOW = ("hookattn.attention.", "hookattn.testing.AdapterContract", "hookattn.edit.EditedCall")
# Of these kinds the model may refuse what it is given; all else it does not get to see.
_MET_BY_MODEL = ("inputs", "model", "function", "anything")
_NOTES = ("raised by the model", "raised while the forward ran on shapes")


def attack(rounds: int, seed: int = 0) -> Sequence[Figure]:
    """``rounds`` of all calls that can be made, drawn by chance; all of them if there are fewer, and then slow right
    calls as well, which have to go through."""
    found = targets()
    calls = [
        (target, name, label)
        for target in found
        for name, kind in target.kinds.items()
        for label in VALUES
        if kind == "inputs" or label not in TAKES[kind] or not (target.costly or kind.startswith("path"))
    ]
    random.Random(seed).shuffle(calls)
    chosen = calls[:rounds]
    told: dict[str, list[str]] = {"clean": [], "fine": [], "bare": [], "silent": [], "model": []}
    with _quiet():
        whole = rounds >= len(calls)
        right = [target for target in found if whole or not target.costly]
        broken = [f"{target.name}: {said}" for target in right if (said := _said_of_right(target)) is not None]
        for target, name, label in chosen:
            what, said = _outcome(stage(), target, name, label)
            told[what].append(f"{target.name}({name}={label}): {said}")
    missing = sorted(_not_attacked(found))
    return [
        Figure("wrong calls that end in a bare error", len(told["bare"]), 0, tuple(sorted(told["bare"]))),
        Figure("wrong calls that are accepted in silence", len(told["silent"]), 0, tuple(sorted(told["silent"]))),
        Figure("right calls that are refused", len(broken), 0, tuple(broken)),
        Figure("public arguments that are neither attacked nor excused", len(missing), 0, tuple(missing)),
        Figure("wrong calls that are refused in words", len(told["clean"])),
        Figure("calls that the model refused", len(told["model"])),
        Figure("right values tried", len(told["fine"])),
        Figure("functions", len(found)),
        Figure("arguments", sum(len(target.kinds) for target in found)),
        Figure("calls", len(chosen)),
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No browser opens, nothing is printed, and what is written to a relative path is written to the stage."""
    opened, webbrowser.open = webbrowser.open, lambda *given, **more: True
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(stage().folder / "out"):
            yield
    finally:
        webbrowser.open = opened


def _said_of_right(target: Target) -> str | None:
    """What a call says that is right in everything; None: nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.run(stage(), {})
    except hookattn.DuplicateAdapterError:
        return None
    except Exception as error:  # noqa: BLE001 - it is told
        return f"{type(error).__name__}: {error}"
    return None


def _outcome(on: Stage, target: Target, name: str, label: str) -> tuple[str, str]:
    right = label in TAKES[target.kinds[name]]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            target.run(on, {name: VALUES[label](on)})
        except hookattn.HookattnError as error:
            return "fine" if right else "clean", _text(error)
        except Exception as error:  # noqa: BLE001 - what it is decides
            said = f"{type(error).__name__}: {_text(error)[:100]!r}"
            if target.kinds[name] in _MET_BY_MODEL and any(
                note in line for line in getattr(error, "__notes__", ()) for note in _NOTES
            ):
                return "model", said
            names_it = isinstance(error, (TypeError, ValueError)) and name in _text(error)
            return "fine" if right and names_it else "clean" if names_it else "bare", said
    told = any(issubclass(w.category, hookattn.UnfitTokensWarning) for w in seen)
    return "fine" if right else "clean" if told else "silent", "accepted"


def _text(error: Exception) -> str:
    """What an error says; nothing, where it shows a value that cannot be shown."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - then it says nothing
        return ""


# ------------------------------------------------------------------------------------ held against the public API


def _not_attacked(found: Sequence[Target]) -> Iterator[str]:
    kinds = {target.name: target.kinds for target in found}
    for name, function in _public_functions():
        last = name.rpartition(".")[2]
        excused = name in EXCUSED or name.startswith(_BELOW)
        method_of_record = name.count(".") > 2 and last in _PROTOCOL
        if excused or method_of_record:
            continue
        for argument in _arguments(function):
            if argument not in kinds.get(name, {}):
                yield f"{name}({argument})"


def _arguments(function: Any) -> Iterator[str]:
    """The names of all arguments of a function; of options that are passed on, those that it says it takes."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            if parameter.name not in ("self", "cls"):
                yield parameter.name
        elif found := re.fullmatch(r"Unpack\[(\w+)\]", str(parameter.annotation)):
            yield from getattr(import_module(function.__module__), found[1]).__annotations__


def _public_functions() -> Iterator[tuple[str, Any]]:
    """Every public function, constructor and method that takes anything, by its name with the module."""
    listed = json.loads(FILE.read_text())
    for module, names in listed.items():
        if module == "command line":
            continue
        for name, described in names.items():
            value = getattr(import_module(module), name)
            if not isinstance(described, dict):
                if callable(value):
                    yield f"{module}.{name}", value
                continue
            if described["bases"]:  # an exception
                continue
            if described["class"] != "()":
                yield f"{module}.{name}", value
            for member, signature in described["members"].items():
                if signature not in ("value", "property", "(self)"):
                    yield f"{module}.{name}.{member}", getattr(value, member)
