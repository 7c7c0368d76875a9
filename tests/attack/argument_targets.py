"""The public functions that take arguments of users: how each is called, and what kind each argument is of."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hookattn
from hookattn import analyze, edit, render, statistics, training
from hookattn.analyze import survey
from hookattn.attention.score_inputs import ScoreInputs
from hookattn.interop import bertviz, circuitsvis, transformer_lens
from hookattn.serving import requests_of_batch
from hookattn.testing import check_adapter, check_clean, check_trace
from tests import tiny_models

WORDS = ["the", "cat", "sat", "on", "the", "cat", "sat"]
_KEEP: list[Any] = []


@dataclass
class Stage:
    """What the calls are made on; made once.

    Attributes:
        model, inputs: a small GPT-2, and ids B 7.
        gpt2: its trace, with tokens.
        bert: the trace of an encoder.
        counted: a trace with statistics and nothing else.
        steps: the trace of a generation.
        empty: a trace without calls.
        circuits: of the model.
        folder: an empty one.
        file: a trace file.
        text: a file that is none.
    """

    model: Any
    inputs: torch.Tensor
    gpt2: hookattn.Trace
    bert: hookattn.Trace
    counted: hookattn.Trace
    steps: hookattn.Trace
    empty: hookattn.Trace
    circuits: list[analyze.Circuit]
    folder: Path
    file: str
    text: Path

    @functools.cached_property
    def view(self) -> analyze.View:
        """Of the first call."""
        return analyze.View(self.gpt2[0], self.gpt2)

    @functools.cached_property
    def divergence(self) -> Any:
        """A table of heads by heads."""
        return analyze.head_divergence(self.gpt2)

    @functools.cached_property
    def graded(self) -> hookattn.Trace:
        """A trace with gradients, after a backward."""
        with torch.enable_grad():
            trace = hookattn.trace(self.model, self.inputs, gradients=True)
            trace.output.logits.sum().backward()
        self.model.zero_grad()
        return trace

    @functools.cached_property
    def trainer(self) -> Any:
        """Of transformers, of the model."""
        from transformers import Trainer, TrainingArguments

        return Trainer(self.model, TrainingArguments(str(self.folder / "out"), report_to="none", use_cpu=True))

    @functools.cached_property
    def served(self) -> hookattn.Trace:
        """A trace of a batch of requests."""
        with hookattn.tracing(self.model) as trace, requests_of_batch([str(i) for i in range(len(self.inputs))]):
            self.model(self.inputs)
        return trace

    @functools.cached_property
    def problem(self) -> ScoreInputs:
        """What statistics are computed of."""
        x = torch.rand(1, 2, 3, 4)
        return ScoreInputs(x, x)


@functools.cache
def stage() -> Stage:
    """The one stage."""
    temporary = tempfile.TemporaryDirectory(prefix="hookattn-attack-")
    _KEEP.append(temporary)  # as long as the process lives
    folder = Path(temporary.name)
    model, inputs = tiny_models.gpt2(), tiny_models.ids()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gpt2 = hookattn.trace(model, inputs, tokens=WORDS)
        bert = hookattn.trace(tiny_models.bert(), inputs)
        counted = hookattn.trace(model, inputs, capture=("entropy", "top_k", "received"))
        with hookattn.tracing(model) as steps, torch.no_grad():
            model.generate(inputs[:1], max_new_tokens=2, do_sample=False)
        circuits = analyze.circuit(model, inputs)
    file = gpt2.save(folder / "trace.safetensors")
    (folder / "text.txt").write_text("no trace")
    (folder / "out").mkdir()
    return Stage(
        model, inputs, gpt2, bert, counted, steps, hookattn.Trace(), circuits, folder, file, folder / "text.txt"
    )


@dataclass(frozen=True)
class Target:
    """A public function, with right arguments to begin with.

    Attributes:
        name: as in public_api.json, below its module, with the module.
        run: calls it with some arguments exchanged; consumes what it yields.
        kinds: argument → its kind, a key of :data:`.argument_values.TAKES`.
        costly: whether a call that goes through takes long; then right values are not tried.
    """

    name: str
    run: Callable[[Stage, Mapping[str, Any]], Any]
    kinds: Mapping[str, str]
    costly: bool = False


def _target(
    name: str,
    function: Callable[..., Any],
    right: Callable[[Stage], dict[str, Any]] = lambda s: {},
    costly: bool = False,
    /,
    **kinds: str,
) -> Target:
    def run(s: Stage, given: Mapping[str, Any]) -> Any:
        made = function(**{**right(s), **given})
        return list(made) if isinstance(made, Iterator) else made

    return Target(name, run, kinds, costly)


def _method(
    name: str,
    of: Callable[[Stage], Any],
    right: Callable[[Stage], dict[str, Any]] = lambda s: {},
    /,
    **kinds: str,
) -> Target:
    method = name.rpartition(".")[2]

    def run(s: Stage, given: Mapping[str, Any]) -> Any:
        made = getattr(of(s), method)(**{**right(s), **given})
        return list(made) if isinstance(made, Iterator) else made

    return Target(name, run, kinds)


class _Letters:
    """A tokenizer of ids below 8."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 8 for c in text]

    def decode(self, ids: list[int]) -> str:
        return str(ids)


def _run_text(s: Stage) -> dict[str, Any]:
    return {"model": s.model, "text": "the cat", "tokenizer": _Letters()}


def _one_batch(values: Any) -> list[survey.Batch]:
    return [survey.Batch(tiny_models.ids(), len(values))]


def _built() -> Any:
    return tiny_models.gpt2(), _one_batch


def _surveyed(s: Stage) -> Path:
    out = s.folder / "read.parquet"
    survey.survey(s.model, ["a", "b"], _one_batch, out, measures="sink")
    return out


def _in_block(**given: Any) -> Any:
    with hookattn.tracing(**given) as trace:
        stage().model(stage().inputs)
    return trace


def _named(**given: Any) -> None:
    with requests_of_batch(**given):
        pass


def _checked(trace: Any) -> None:
    with contextlib.suppress(AssertionError):  # what it found
        check_trace(trace)


def _ends(s: Stage) -> dict[str, Any]:
    return dict(zip(("embed", "unembed"), analyze.vocabulary(s.model), strict=True))


class _Known(hookattn.Adapter):
    name, covers, attention = "attacked", ("tests.attack.nothing",), {"Nothing": "self"}


def _trace(s: Stage) -> dict[str, Any]:
    return {"trace": s.gpt2}


def _run(s: Stage) -> dict[str, Any]:
    return {"model": s.model, "inputs": s.inputs}


SELECTED = {
    "capture": "names of fields or none",
    "layers": "indices or none",
    "heads": "indices or none",
    "queries": "indices or a slice or none",
    "dtype": "nothing or none",
    "device": "nothing or none",
    "to": "path or none",
    "layout": "empty mapping or none",
}
TRACED = {
    **SELECTED,
    "shard": "empty mapping or none",
    "tokens": "nothing or none",
    "verify": "nothing",
    **dict.fromkeys(("strict", "copy", "gradients", "attached"), "flag"),
}
WHERE = {
    "layer": "indices or none",
    "stack": "text or none",
    "kind": "text or none",
    "step": "indices or none",
    "path": "text or none",
    "batch": "index",
    "heads": "indices or none",
    "queries": "indices or a slice or none",
    "keys": "indices or a slice or none",
    "tokens": "nothing or none",
    "key_tokens": "nothing or none",
}
EDITED = {
    **dict.fromkeys(("layer", "heads", "queries", "keys", "batch"), "indices or a slice or none"),
    **dict.fromkeys(("stack", "kind", "path"), "text or none"),
    "step": "indices or none",
}
DRAWN = {"trace": "trace", "field": "nothing", "scale": "nothing", "sink": "nothing"}
VIEWER = {
    "trace": "trace with or without calls",
    "compare": "trace with or without calls or none",
    "state": "mapping or none",
    "scores": "empty mapping or none",
    "images": "nothing or none",
    "theme": "nothing",
}
TABLE = {"trace": "trace", "real": "nothing or none"}


def _one_row(s: Stage) -> dict[str, Any]:
    return {"trace": s.gpt2, "layer": 0, "heads": 0}


def _analyzers() -> Iterator[Target]:
    a = "hookattn.analyze."
    for name in ("best_offset", "between_labels", "between_segments", "distance_decay", "head_divergence", "received"):
        given = {"between_labels": {"labels": list("ababaab")}, "between_segments": {"segments": [0, 0, 0, 1, 1, 1, 1]}}
        right = given.get(name, {})
        kinds = {**TABLE, **{"labels": {"labels": "labels"}, "segments": {"segments": "labels or none"}}.get(
            name.removeprefix("between_"), {})}  # fmt: skip
        yield _target(a + name, getattr(analyze, name), lambda s, right=right: {"trace": s.gpt2, **right}, **kinds)
    yield _target(a + "aggregate", analyze.aggregate, _trace, trace="trace", how="nothing")
    yield _target(a + "aggregate_layers", analyze.aggregate_layers, _trace, trace="trace", how="nothing")
    yield _target(a + "as_distribution", analyze.as_distribution, _trace, trace="trace", field="nothing")
    yield _target(a + "capture", lambda measures: analyze.capture(measures), lambda s: {"measures": "sink"},
                  measures="nothing")  # fmt: skip
    yield _target(a + "circuit", analyze.circuit, _run, model="model", inputs="inputs")
    yield _target(a + "cluster_heads", analyze.cluster_heads, lambda s: {"divergence": s.divergence, "clusters": 2},
                  divergence="nothing", clusters="count", method="nothing")  # fmt: skip
    yield _target(a + "compare", analyze.compare, lambda s: {"a": s.gpt2, "b": s.gpt2}, a="trace", b="trace",
                  real="nothing or none")  # fmt: skip
    yield _target(a + "composition", analyze.composition, lambda s: {"circuits": s.circuits},
                  circuits="nothing", kinds="nothing", baseline="flag")  # fmt: skip
    yield _target(a + "copying", analyze.copying,
                  lambda s: {"circuits": s.circuits, **_ends(s)},
                  circuits="nothing", embed="nothing", unembed="nothing")  # fmt: skip
    yield _target(a + "vocabulary", analyze.vocabulary, lambda s: {"model": s.model}, model="model")
    yield _target(a + "explain", analyze.explain, _one_row, True, trace="trace", **WHERE)
    flow = {**TABLE, "heads": "nothing", "residual": "share", "start_layer": "index"}
    yield _target(a + "flow", analyze.flow, _trace, True, queries="indices or none", **flow)
    yield _target(a + "rollout", analyze.rollout, _trace, **flow)
    yield _target(a + "measure", analyze.measure, lambda s: {"trace": s.gpt2, "measures": "sink"}, **TABLE,
                  measures="nothing", by="nothing", missing="flag")  # fmt: skip
    yield _target(a + "report", analyze.report, _trace, True, **TABLE, measures="no names or none")
    yield _target(a + "neuron_contributions", analyze.neuron_contributions,
                  lambda s: {"trace": s.gpt2, "query": 2}, **TABLE, query="index or none",
                  key="index or none")  # fmt: skip
    yield _target(a + "neuron_decay", analyze.neuron_decay, _trace, **TABLE, longest="count from 0")
    yield _target(a + "norm_based", analyze.norm_based, lambda s: {"trace": s.gpt2, "circuits": s.circuits},
                  trace="trace", circuits="nothing", normalise="flag")  # fmt: skip
    yield _target(a + "value_weighted", analyze.value_weighted, _trace, trace="trace", normalise="flag")
    yield _target(a + "normalisation", analyze.normalisation, _trace, trace="trace", tolerance="number from 0 or none")
    yield _target(a + "pool_words", analyze.pool_words, _trace, trace="trace", words="nothing or none")
    yield _target(a + "repeated_segment", analyze.repeated_segment, lambda s: {"trace": s.gpt2, "period": 4}, **TABLE,
                  period="count or none", tokens="nothing or none")  # fmt: skip
    yield _target(a + "score_rank", analyze.score_rank, _trace, **TABLE, masked="flag", energy="share to 1")
    yield _target(a + "singular_values", analyze.singular_values, _trace, **TABLE, masked="flag")
    yield _target(a + "top_targets", analyze.top_targets, lambda s: {"trace": s.gpt2, "of": 3}, trace="trace",
                  of="position or text", k="count", example="index")  # fmt: skip
    yield _target(a + "variability", analyze.variability, lambda s: {"traces": s.gpt2}, traces="trace",
                  tokens="count or none", real="nothing or none")  # fmt: skip
    yield _method(a + "Measure.__call__", lambda s: analyze.Sink(), _trace, trace="trace", by="nothing",
                  real="nothing or none")  # fmt: skip
    yield _method(a + "Circuit.projection", lambda s: s.circuits[0], lambda s: {"name": "q"}, name="nothing")
    yield _target(a + "View", analyze.View, lambda s: {"call": s.gpt2[0], "trace": s.gpt2}, call="call",
                  trace="trace in memory", real="real or none", whole="nothing or none")  # fmt: skip
    yield from _measures(a)
    v = a + "survey."
    batches = lambda values: [survey.Batch(stage().inputs, len(values))]  # noqa: E731
    yield _target(v + "survey", survey.survey,
                  lambda s: {"model": s.model, "examples": ["a", "b"], "encode": batches,
                             "out": s.folder / "survey.parquet", "measures": "sink"},
                  True, model="model", examples="examples", encode="function", out="path",
                  measures="nothing", batch="count", about="mapping or none", progress="function or none",
                  shard="nothing or none", on_error="nothing")  # fmt: skip
    yield _target(v + "survey_on_processes", survey.survey_on_processes,
                  lambda s: {"build": _built, "examples": ["a", "b"], "out": s.folder / "many.parquet",
                             "measures": "sink", "jobs": 1},
                  True, build="function", examples="examples", out="path", jobs="count", measures="nothing",
                  batch="count", about="mapping or none", progress="function or none", shard="nothing or none",
                  on_error="nothing", say="function or none")  # fmt: skip
    yield _target(v + "Measurer", survey.Measurer, lambda s: {"build": _built, "measures": "sink"}, build="function",
                  measures="nothing", on_error="nothing")  # fmt: skip
    yield _target(v + "CorpusShard", survey.CorpusShard, lambda s: {"index": 0, "of": 4}, index="index", of="count")
    yield _target(v + "chunks", survey.chunks, lambda s: {"examples": ["a", "b"], "batch": 2}, examples="examples",
                  batch="count", wanted="function or none")  # fmt: skip
    yield _target(v + "read_table", survey.read_table, lambda s: {"out": _surveyed(s)}, out="path")
    yield _target(v + "Corpus", survey.Corpus, lambda s: {"paths": (str(s.text),)}, paths="paths", field="text or none")
    yield _target(v + "Batch", survey.Batch, lambda s: {"inputs": s.inputs, "count": 2}, inputs="anything",
                  count="count", tokens="token lists or none", real="real or none")  # fmt: skip


def _measures(a: str) -> Iterator[Target]:
    words = ["the", "cat", "sat"]
    for name in ("Acronyms", "DuplicateToken", "Induction", "PairMass"):
        if name != "PairMass":
            yield _target(a + name, getattr(analyze, name), tokens="labels or none")
    for name in ("AtOffset", "NextToken", "PreviousToken", "SelfToken"):
        yield _target(a + name, getattr(analyze, name), offset="any int")
    for name in ("LocalMass", "GlobalSpread"):
        yield _target(a + name, getattr(analyze, name), window="count")
    yield _target(a + "Positional", analyze.Positional, offset="any int or none")
    yield _target(a + "Sink", analyze.Sink, epsilon="share")
    yield _target(a + "ListItems", analyze.ListItems, tokens="labels or none", longest="count")
    yield _target(a + "Brackets", analyze.Brackets, tokens="labels or none", direction="nothing")
    yield _target(a + "SameWord", analyze.SameWord, tokens="labels or none", across="flag")
    yield _target(a + "Detection", analyze.Detection, tokens="labels or none", pattern="nothing",
                  error="nothing", exclude_bos="flag", exclude_current_token="flag")  # fmt: skip
    yield _target(a + "RepeatedSegment", analyze.RepeatedSegment, score="nothing", period="count or none",
                  tokens="labels or none")  # fmt: skip
    yield _target(a + "LabelMass", analyze.LabelMass, lambda s: {"labels": words, "target": "cat"}, labels="labels",
                  target="label", source="label or none")  # fmt: skip
    yield _target(a + "BetweenSegments", analyze.BetweenSegments, labels="labels or none", target="label",
                  source="label or none")  # fmt: skip
    yield _target(a + "Separators", analyze.Separators, separators="words", punctuation="flag")
    yield _target(a + "Dependency", analyze.Dependency, lambda s: {"heads": [1, 2, -1], "relations": words,
                  "relation": "the"}, how="nothing", words="labels or none", heads="numbers of words",
                  relations="labels", relation="text", direction="nothing")  # fmt: skip
    yield _target(a + "Coreference", analyze.Coreference, lambda s: {"clusters": [[[0, (1, 3)]]]},
                  how="nothing", words="labels or none", clusters="clusters")  # fmt: skip
    yield _target(a + "OutputNorm", analyze.OutputNorm, lambda s: {"circuits": s.circuits}, circuits="no items")
    yield _target(a + "Role", analyze.Role, lambda s: {"name": "x", "measure": analyze.Sink(), "least": 0.5},
                  name="text", measure="nothing", least="number", lift="number or none", unless="names")  # fmt: skip


def _figures() -> Iterator[Target]:
    r = "hookattn.render."
    where = {**WHERE, "width": "width or none", "title": "title"}
    yield _target(r + "distance", render.distance, _trace, True, trace="trace", scale="nothing", **where)
    yield _target(r + "heads", render.heads, _one_row, True, trace="trace", least="share to 1 or none",
                  field="nothing", sink="nothing", **where)  # fmt: skip
    yield _target(r + "heatmap", render.heatmap, _one_row, True, **DRAWN, columns="count or none", **where)
    yield _target(r + "layers", render.layers, _trace, True, **DRAWN, **where)
    yield _target(r + "lens", render.lens, _one_row, True, trace="trace", **where)
    yield _target(r + "neuron", render.neuron, _one_row, True, trace="trace", **where)
    yield _target(r + "atlas", render.atlas, lambda s: {"table": analyze.measure(s.gpt2, "entropy")}, table="trace",
                  measures="nothing or none", title="title", width="width or none",
                  largest="empty mapping or none")  # fmt: skip
    yield _target(r + "plotly", render.plotly, _one_row, True, **DRAWN, view="nothing", **WHERE)
    yield _target(
        r + "page", render.page, _trace, True, **VIEWER, title="text or none", fields="names of fields or none"
    )
    yield _target(r + "save_page", render.save_page, lambda s: {"trace": s.gpt2, "path": s.folder / "out" / "p.html"},
                  True, path="path", **VIEWER)  # fmt: skip
    yield _target(r + "show", render.show, _trace, True, **VIEWER)
    yield _target(r + "Widget", render.Widget, _trace, True, **VIEWER, page="flag")


def _core() -> Iterator[Target]:
    h = "hookattn."
    yield _target(h + "trace", hookattn.trace, _run, model="model", inputs="inputs", **TRACED)
    yield _target(h + "tracing", _in_block, lambda s: {"model": s.model}, model="model", **TRACED)
    yield _target(h + "trace_text", hookattn.trace_text, _run_text, model="model", text="texts",
                  pair="nothing or none", images="nothing or none", audio="nothing or none", tokenizer="nothing",
                  processor="nothing or none", generate="new tokens", load="empty mapping or none",
                  **TRACED)  # fmt: skip
    yield _target(h + "plan", hookattn.plan, _run, True, model="model", inputs="inputs", **SELECTED)
    yield _target(h + "load", hookattn.load, lambda s: {"path": s.file}, path="trace file")
    yield _target(h + "merge", hookattn.merge, lambda s: {"traces": s.gpt2, "steps": "batches"}, traces="trace",
                  steps="text or none")  # fmt: skip
    yield _target(h + "concat", hookattn.concat, lambda s: {"traces": [s.gpt2], "dim": "step"}, traces="nothing",
                  dim="nothing")  # fmt: skip
    numbers = {"of": "count or none", "groups_of": "count or none", "count": "count", "index": "count from 0"}
    starts = dict.fromkeys(("start", "group_start"), "count from 0 or none")
    yield _target(h + "Shard", hookattn.Shard, lambda s: {"axis": "H", "start": 0, "of": 4}, axis="nothing",
                  mesh="text", **numbers, **starts)  # fmt: skip
    yield _target(h + "register", hookattn.register, lambda s: {"adapter": _Known()}, adapter="nothing")
    t = h + "Trace."
    yield _method(t + "select", lambda s: s.gpt2, layer="indices or none", stack="text or none", kind="text or none",
                  step="indices or none", path="text or none", tap="text or none", heads="indices or none",
                  queries="indices or none", batch="indices or none")  # fmt: skip
    yield _method(t + "to_pandas", lambda s: s.gpt2, field="nothing", masked="flag")
    yield _method(t + "to_xarray", lambda s: s.gpt2, field="nothing")
    yield _method(t + "save", lambda s: s.gpt2, lambda s: {"path": s.folder / "out" / "t.safetensors"},
                  path="path", compact="flag")  # fmt: skip
    yield _method(t + "to", lambda s: s.gpt2, lambda s: {"device": "cpu"}, device="nothing", dtype="nothing or none")
    yield _method(t + "stitch", lambda s: s.steps, beams="beams", length="count or none")
    yield _method(t + "split", lambda s: s.served, by="nothing")
    yield _target("hookattn.serving.requests_of_batch", _named, lambda s: {"ids": ["a"]},
                  ids="names of requests", only="names or none")  # fmt: skip
    yield Target(t + "__getitem__", lambda s, given: s.gpt2[given.get("key", 0)], {"key": "index, a slice or a path"})
    c = h + "Call."
    yield _method(c + "get", lambda s: s.gpt2[0], lambda s: {"name": "weights"}, name="nothing")
    yield _method(c + "derived", lambda s: s.gpt2[0], lambda s: {"name": "weights"}, name="nothing")
    yield _method(c + "grad", lambda s: s.graded[0], lambda s: {"name": "weights"}, name="nothing")
    yield _method(c + "has", lambda s: s.gpt2[0], lambda s: {"name": "weights"}, name="text")
    yield _method(c + "place", lambda s: s.gpt2[0], lambda s: {"name": "q"}, name="nothing")
    part = dict.fromkeys(("heads", "queries", "batch"), "indices or a slice or none")
    yield _method(c + "at", lambda s: s.gpt2[0], **part)


def _edits() -> Iterator[Target]:
    """Edits are run, too: whether values fit is told then."""
    e = "hookattn.edit."
    weights, where = {"field": "weights"}, {"field": "nothing", **EDITED}
    yield _edit(e + "zero", edit.zero, weights, **where)
    yield _edit(e + "mean", edit.mean, weights, over="trace with or without calls", **where)
    yield _edit(
        e + "resample", edit.resample, weights, over="trace with or without calls", seed="count from 0", **where
    )
    yield _edit(e + "knockout", edit.knockout, {"layer": 0, "queries": [2], "keys": [1]}, **EDITED)
    yield _target(e + "knockout (of a query)", lambda **given: _run_with(edit.knockout(**given)),
                  lambda s: {"queries": [2]}, **{**EDITED, "queries": "indices or a slice"})  # fmt: skip
    yield _target(e + "patch", lambda **given: _run_with(edit.patch(**given)),
                  lambda s: {"field": "weights", "of": s.gpt2}, of="trace, call or values", **where)  # fmt: skip
    yield _target(e + "freeze", lambda **given: _run_with(edit.freeze(**given)), lambda s: {"of": s.gpt2},
                  of="trace with or without calls", **EDITED)  # fmt: skip
    for name, function in (("add", edit.add), ("set", edit.set)):
        yield _edit(e + name, function, {**weights, "values": 0.5}, values="values", **where)
    yield _edit(e + "scale", edit.scale, {**weights, "gates": 0.5}, gates="values", **where)
    yield _edit(e + "call", edit.call, {**weights, "function": lambda call: 2 * call.value}, function="function",
                **where)  # fmt: skip
    for name in edit.FIELDS:
        yield _edit(f"{e}call (what it returns for {name})", _returning, {"field": name, "value": 0.5}, value="values")
        yield _edit(f"{e}scale (of {name})", edit.scale, {"field": name, "gates": 0.5}, gates="values")
        yield _target(f"{e}patch (of {name})", lambda **given: _run_with(edit.patch(**given)),
                      lambda s, name=name: {"field": name, "of": 0 * s.gpt2[0].get(name)},
                      of="trace, call or values")  # fmt: skip
    one = {"edits": edit.zero(layer=0)}
    yield _target("hookattn.edited", lambda edits, **given: hookattn.edited(given.pop("model"), given.pop("inputs"),
                  edits, **given), lambda s: {**_run(s), **one}, model="model", inputs="inputs", edits="no items",
                  **TRACED)  # fmt: skip
    yield _target("hookattn.editing", _in_edited_block, lambda s: {"model": s.model, **one}, model="model",
                  edits="no items", **TRACED)  # fmt: skip


def _edit(name: str, function: Callable[..., edit.Edit], right: dict[str, Any], /, **kinds: str) -> Target:
    return _target(name, lambda **given: _run_with(function(**given)), lambda s: right, **kinds)


def _run_with(change: edit.Edit) -> Any:
    return hookattn.edited(stage().model, stage().inputs, change)


def _returning(field: str, value: Any) -> edit.Edit:
    return edit.call(lambda call: value, field)


def _in_edited_block(edits: Any, model: Any, **options: Any) -> Any:
    with hookattn.editing(model, edits, **options) as trace:
        stage().model(stage().inputs)
    return trace


def _causal() -> Iterator[Target]:
    """What runs a model on inputs and asks a metric."""
    a = "hookattn.analyze."
    metric = analyze.log_probability(3)
    one = lambda s: {"model": s.model, "inputs": s.inputs, "metric": metric}  # noqa: E731
    both = lambda s: {"model": s.model, "clean": s.inputs, "corrupted": s.inputs.flip(1), "metric": metric}  # noqa: E731
    pair = lambda s: {"model": s.model, "clean": s.inputs, "corrupt": s.inputs.flip(1), "metric": metric}  # noqa: E731
    of_one = {"model": "model", "inputs": "inputs", "metric": "function"}
    of_both = {"model": "model", "clean": "inputs", "corrupted": "inputs", "metric": "function"}
    of_pair = {"model": "model", "clean": "inputs", "corrupt": "inputs", "metric": "function"}
    site = {"stack": "text or none", "kind": "text or none"}
    runs = {**site, "batch": "count or none", "progress": "function or none"}
    heads = {"layers": "indices or none", "heads": "indices or none"}
    yield _target(a + "activation_patching", analyze.activation_patching, both, True, **of_both, field="nothing",
                  into="nothing", positions="flag or indices", **heads, **runs)  # fmt: skip
    yield _target(a + "path_patching", analyze.path_patching, both, True, **of_both, receivers="pairs", into="nothing",
                  frozen="nothing", **heads, **runs)  # fmt: skip
    yield _target(a + "path_patching (to a head)", analyze.path_patching, lambda s: {**both(s), "receivers": [(1, 0)]},
                  True, into="nothing", frozen="nothing", **heads, **site)  # fmt: skip
    yield _target(a + "head_ablation", analyze.head_ablation, one, True, **of_one, by="nothing", over="nothing",
                  seed="count from 0", **heads, **runs)  # fmt: skip
    yield _target(a + "edge_effects", analyze.edge_effects, lambda s: {**one(s), "edges": [(0, 1, 2, 1)]}, True,
                  **of_one, edges="nothing", **runs)  # fmt: skip
    yield _target(a + "edge_effects (one edge)", lambda edge: analyze.edge_effects(**one(stage()), edges=[edge]),
                  lambda s: {"edge": (0, 1, 2, 1)}, True, edge="nothing")  # fmt: skip
    yield _target(
        a + "atp_star", analyze.atp_star, pair, True, **of_pair, nodes="nothing", grad_drop="flag", by="nothing"
    )
    yield _target(a + "attribution_patching", analyze.attribution_patching, pair, True, **of_pair, nodes="nothing",
                  by="nothing")  # fmt: skip
    yield _target(a + "edge_attribution", analyze.edge_attribution, one, True, **of_one, by="nothing", top="count")
    yield _target(a + "head_importance", analyze.head_importance, one, True, **of_one)
    yield _target(a + "integrated_gradients", analyze.integrated_gradients, lambda s: {**one(s), "steps": 1}, True,
                  **of_one, layer="indices or none", heads="indices or none", steps="count", at_once="count or none",
                  by="nothing", top="count", **site)  # fmt: skip
    yield _target(a + "relevance", analyze.relevance, one, True, **of_one, keys="empty mapping or none")
    yield _target(a + "log_probability", analyze.log_probability, lambda s: {"token": 3}, token="numbers from 0",
                  position="any int")  # fmt: skip
    yield _target(a + "logit_difference", analyze.logit_difference, lambda s: {"right": 3, "wrong": 4},
                  right="numbers from 0", wrong="numbers from 0", position="any int")  # fmt: skip
    yield _target(a + "head_ablation (what the metric returns)",
                  lambda value: analyze.head_ablation(stage().model, stage().inputs, lambda output: value),
                  lambda s: {"value": 0.5}, True, value="one number")  # fmt: skip
    yield _target(a + "head_importance (what the metric returns)",
                  lambda value: analyze.head_importance(stage().model, stage().inputs,
                                                        lambda output: metric(output) if value is metric else value),
                  lambda s: {"value": metric}, True, value="nothing")  # fmt: skip


def _others() -> Iterator[Target]:
    i = "hookattn.interop."
    yield _target(i + "bertviz.to_bertviz", bertviz.to_bertviz, _trace, trace="trace in memory", batch="index")
    yield _target(i + "circuitsvis.to_circuitsvis", circuitsvis.to_circuitsvis, _trace, trace="trace in memory",
                  **WHERE)  # fmt: skip
    lens = i + "transformer_lens."
    yield _target(lens + "activation", transformer_lens.activation, lambda s: {"call": s.gpt2[0], "field": "q"},
                  call="call", field="nothing")  # fmt: skip
    yield _target(lens + "find", transformer_lens.find,
                  lambda s: {"trace": s.gpt2, "name": "blocks.0.attn.hook_pattern"}, trace="trace in memory",
                  name="nothing")  # fmt: skip
    yield _target(lens + "hooks", transformer_lens.hooks, lambda s: {"trace": s.gpt2, "rotary": False},
                  trace="trace in memory", model="anything", rotary="flag or none")  # fmt: skip
    yield _target(lens + "Hook.of", transformer_lens.Hook.of, lambda s: {"name": "blocks.0.attn.hook_pattern"},
                  name="nothing")  # fmt: skip
    s_ = "hookattn.statistics."
    yield _target(s_ + "FirstMass", statistics.FirstMass, n="count")
    yield _target(s_ + "LocalMass", statistics.LocalMass, window="count")
    yield _target(s_ + "FarMass", statistics.FarMass, window="count")
    yield _target(s_ + "OffsetMass", statistics.OffsetMass, offset="any int")
    yield _target(s_ + "TopK", statistics.TopK, k="count")
    yield _target(s_ + "SegmentMass", statistics.SegmentMass, lambda s: {"sets": {"a": [1]}}, sets="nothing")
    yield _target(s_ + "SegmentMass (one set)", lambda keys: statistics.SegmentMass({"a": keys}),
                  lambda s: {"keys": [1]}, keys="key positions")  # fmt: skip
    yield _target(s_ + "compute", statistics.compute,
                  lambda s: {"problem": s.problem, "statistics": [statistics.Entropy()]},
                  problem="nothing", statistics="no names")  # fmt: skip
    yield _target(s_ + "merge", statistics.merge, lambda s: {"traces": s.counted}, traces="nothing",
                  over="nothing")  # fmt: skip
    yield _target(s_ + "named", statistics.named, lambda s: {"name": "lse"}, name="text")
    yield _target(s_ + "resolve", statistics.resolve, lambda s: {"name": "lse", "fields": ["lse"]}, name="text",
                  fields="names")  # fmt: skip
    t = "hookattn.testing."
    yield _target(t + "check_clean", check_clean, lambda s: {"model": s.model}, model="model")
    yield _target(t + "check_trace", _checked, _trace, trace="trace with or without calls")
    yield _target(t + "check_adapter", check_adapter,
                  lambda s: {"adapter": _Known(), "make_model": lambda: s.model, "make_inputs": lambda: s.inputs,
                             "only": ()},
                  True, adapter="nothing", make_model="function", make_inputs="function", beside="no names",
                  complete="flag", every_layer="flag", padding="flag", skipped="names", formed="no names",
                  weights="function or none", more_inputs="empty mapping or none", only="no names or none")  # fmt: skip


def _training() -> Iterator[Target]:
    t = "hookattn.training."

    def one(s: Stage) -> training.HeadMonitor:
        return training.HeadMonitor(s.inputs, measures="entropy")

    yield _target(t + "HeadMonitor", training.HeadMonitor, lambda s: {"prompts": s.inputs}, prompts="anything",
                  measures="nothing", every="count or none", tokenizer="function or none", tokens="token lists or none",
                  follow="pairs or no items", picture="flag", to="path or none", strict="flag")  # fmt: skip
    model = {"model": "model", "step": "count from 0", "device": "nothing or none"}
    for name in ("begin", "measure"):
        yield _method(f"{t}HeadMonitor.{name}", one, lambda s: {"model": s.model, "step": 0}, **model)
    yield _method(t + "HeadMonitor.due", one, lambda s: {"step": 0}, step="count from 0")
    yield _method(t + "HeadMonitor.save", one, lambda s: {"path": s.folder / "out" / "heads.csv"}, path="path")
    yield _method(t + "HeadMonitor.load", one, lambda s: {"path": one(s).save(s.folder / "heads.csv")}, path="nothing")
    yield _method(t + "HeadMonitor.restore", one, lambda s: {"state": one(s).state()}, state="nothing")
    yield _method(t + "HeadMonitor.scalars", one, lambda s: {"table": one(s).measure(s.model, 0)}, table="nothing")
    yield _target(t + "repeated_tokens", training.repeated_tokens, lambda s: {"vocabulary": 60}, vocabulary="nothing",
                  length="count", batch="count", first="count from 0 or none", seed="count from 0")  # fmt: skip
    yield _target(t + "TrainerHeadMonitor", training.TrainerHeadMonitor, lambda s: {"monitor": one(s)},
                  monitor="nothing")  # fmt: skip
    yield _method(t + "TrainerHeadMonitor.add_to", lambda s: training.TrainerHeadMonitor(one(s)),
                  lambda s: {"trainer": s.trainer}, trainer="nothing")  # fmt: skip
    yield _target(t + "LightningHeadMonitor", training.LightningHeadMonitor, lambda s: {"monitor": one(s)},
                  monitor="nothing", part="text or none")  # fmt: skip
    yield _method(t + "LightningHeadMonitor.load_state_dict", lambda s: training.LightningHeadMonitor(one(s)),
                  lambda s: {"state_dict": one(s).state()}, state_dict="nothing")  # fmt: skip


def targets() -> list[Target]:
    """All of them."""
    return [*_core(), *_analyzers(), *_causal(), *_edits(), *_figures(), *_training(), *_others()]
