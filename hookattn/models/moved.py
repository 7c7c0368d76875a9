"""Where modules of hookattn went that adapter packages may still import, for one release.

The modules got a package for each stage of a trace. Nothing that is imported from ``hookattn`` itself moved or will
move, which is all that an adapter needs. Who imported a module all the same gets its new place in the error. There are
no modules under the old names: each would be a second place that its names seem to belong to.

This file goes in :data:`GOES_IN`, together with its call in :mod:`~hookattn.models.registry`.
"""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec

GOES_IN = "0.3"
"""The version that has this file no more."""

MOVED = {
    "hookattn.adapter": "hookattn.models.adapter",
    "hookattn.analyze.acronym": "hookattn.analyze.measures.acronym",
    "hookattn.analyze.aggregate": "hookattn.analyze.tables.aggregate",
    "hookattn.analyze.cluster": "hookattn.analyze.tables.cluster",
    "hookattn.analyze.compare": "hookattn.analyze.tables.compare",
    "hookattn.analyze.composition": "hookattn.analyze.circuits.composition",
    "hookattn.analyze.confidence": "hookattn.analyze.measures.confidence",
    "hookattn.analyze.copying": "hookattn.analyze.circuits.copying",
    "hookattn.analyze.decay": "hookattn.analyze.tables.decay",
    "hookattn.analyze.detection": "hookattn.analyze.measures.detection",
    "hookattn.analyze.distance": "hookattn.analyze.measures.mean_distance",
    "hookattn.analyze.divergence": "hookattn.analyze.tables.divergence",
    "hookattn.analyze.entropy": "hookattn.analyze.measures.entropy",
    "hookattn.analyze.finding": "hookattn.analyze.circuits.find_weights",
    "hookattn.analyze.flow": "hookattn.analyze.tables.flow",
    "hookattn.analyze.label_mass": "hookattn.analyze.measures.label_mass",
    "hookattn.analyze.lexical": "hookattn.analyze.measures.lexical",
    "hookattn.analyze.list_items": "hookattn.analyze.measures.list_items",
    "hookattn.analyze.local": "hookattn.analyze.measures.local",
    "hookattn.analyze.low_rank": "hookattn.analyze.tables.low_rank",
    "hookattn.analyze.matching": "hookattn.analyze.circuits.match_values",
    "hookattn.analyze.measure": "hookattn.analyze.measures.base",
    "hookattn.analyze.neurons": "hookattn.analyze.circuits.neurons",
    "hookattn.analyze.normalisation": "hookattn.analyze.tables.normalisation",
    "hookattn.analyze.offset": "hookattn.analyze.measures.offset",
    "hookattn.analyze.pool": "hookattn.analyze.tables.pool",
    "hookattn.analyze.positional": "hookattn.analyze.measures.positional",
    "hookattn.analyze.problem": "hookattn.analyze.score_inputs",
    "hookattn.analyze.products": "hookattn.analyze.circuits.record_products",
    "hookattn.analyze.rank": "hookattn.analyze.measures.rank",
    "hookattn.analyze.received": "hookattn.analyze.tables.received",
    "hookattn.analyze.repeats": "hookattn.analyze.measures.repeats",
    "hookattn.analyze.report": "hookattn.analyze.tables.report",
    "hookattn.analyze.roles": "hookattn.analyze.tables.roles",
    "hookattn.analyze.rollout": "hookattn.analyze.tables.rollout",
    "hookattn.analyze.segment_repeats": "hookattn.analyze.measures.segment_repeats",
    "hookattn.analyze.segments": "hookattn.analyze.measures.segments",
    "hookattn.analyze.separator": "hookattn.analyze.measures.separator",
    "hookattn.analyze.sink": "hookattn.analyze.measures.sink",
    "hookattn.analyze.top_targets": "hookattn.analyze.tables.top_targets",
    "hookattn.analyze.values": "hookattn.analyze.measures.values",
    "hookattn.analyze.variability": "hookattn.analyze.tables.variability",
    "hookattn.analyze.view": "hookattn.analyze.call_view",
    "hookattn.analyze.word_relation": "hookattn.analyze.measures.word_relation",
    "hookattn.analyze.words": "hookattn.tokens.words",
    "hookattn.beside": "hookattn.recording.call_statistics",
    "hookattn.byte_level": "hookattn.tokens.byte_level",
    "hookattn.call": "hookattn.calls.call",
    "hookattn.certificate": "hookattn.calls.certificate",
    "hookattn.cli.app": "hookattn.cli.commands",
    "hookattn.cli.recheck": "hookattn.testing.recheck",
    "hookattn.cli.screen": "hookattn.console.screen",
    "hookattn.cli.table": "hookattn.console.tables",
    "hookattn.describe": "hookattn.models.description",
    "hookattn.extras": "hookattn.optional",
    "hookattn.fresh": "hookattn.torch_internals.allocation",
    "hookattn.guard": "hookattn.planning.room",
    "hookattn.hollow": "hookattn.planning.fake_model",
    "hookattn.hooks": "hookattn.models.module_hooks",
    "hookattn.inspection": "hookattn.models.discovery",
    "hookattn.keeper": "hookattn.recording.recorder",
    "hookattn.kernels": "hookattn.attention.kernels",
    "hookattn.kernels.checking": "hookattn.attention.kernels.checking",
    "hookattn.kernels.launch": "hookattn.attention.kernels.launch",
    "hookattn.kernels.receiving": "hookattn.attention.kernels.receiving",
    "hookattn.kernels.rows": "hookattn.attention.kernels.rows",
    "hookattn.kernels.statistics": "hookattn.attention.kernels.statistics",
    "hookattn.kernels.summing": "hookattn.attention.kernels.summing",
    "hookattn.later": "hookattn.recording.certifying",
    "hookattn.layers": "hookattn.models.layer_numbers",
    "hookattn.lineage": "hookattn.generation.lineage",
    "hookattn.loading": "hookattn.traces",
    "hookattn.masks": "hookattn.attention.masks",
    "hookattn.memory": "hookattn.torch_internals.tensor_identity",
    "hookattn.modes": "hookattn.torch_internals.function_modes",
    "hookattn.numbering": "hookattn.models.running_numbers",
    "hookattn.once": "hookattn.torch_internals.tensor_memo",
    "hookattn.planned": "hookattn.planning.memory_plan",
    "hookattn.positions": "hookattn.calls.query_positions",
    "hookattn.quiet": "hookattn.torch_internals.isolation",
    "hookattn.record": "hookattn.attention.kernel_call",
    "hookattn.registry": "hookattn.models.registry",
    "hookattn.render.choose": "hookattn.calls.choose",
    "hookattn.render.figures.distance": "hookattn.render.figures.distance_figure",
    "hookattn.render.figures.heads": "hookattn.render.figures.heads_figure",
    "hookattn.render.figures.heatmap": "hookattn.render.figures.heatmap_figure",
    "hookattn.render.figures.layers": "hookattn.render.figures.layers_figure",
    "hookattn.render.figures.lens": "hookattn.render.figures.lens_figure",
    "hookattn.render.figures.neuron": "hookattn.render.figures.neuron_figure",
    "hookattn.render.labels": "hookattn.calls.labels",
    "hookattn.render.narrow": "hookattn.render.page_size",
    "hookattn.render.page": "hookattn.render.html_page",
    "hookattn.render.part": "hookattn.calls.part",
    "hookattn.render.plain": "hookattn.render.json_values",
    "hookattn.render.plotly": "hookattn.render.plotly_figures",
    "hookattn.render.scores": "hookattn.render.head_scores",
    "hookattn.render.shell": "hookattn.render.html_shell",
    "hookattn.render.show": "hookattn.render.notebook",
    "hookattn.render.stored": "hookattn.render.trace_files",
    "hookattn.render.tokens": "hookattn.tokens.display",
    "hookattn.selection": "hookattn.recording.selection",
    "hookattn.sequences": "hookattn.calls.key_tokens",
    "hookattn.session": "hookattn.recording.session",
    "hookattn.silent": "hookattn.models.unread",
    "hookattn.site": "hookattn.calls.site",
    "hookattn.sizes": "hookattn.planning.byte_counts",
    "hookattn.small": "hookattn.recording.certifying",
    "hookattn.statistics.merging": "hookattn.generation.merge_statistics",
    "hookattn.statistics.positions": "hookattn.attention.positions",
    "hookattn.statistics.problem": "hookattn.attention.score_inputs",
    "hookattn.stitch": "hookattn.generation.stitch",
    "hookattn.store.expect": "hookattn.store.schema",
    "hookattn.store.plain": "hookattn.store.json_values",
    "hookattn.taps.axes": "hookattn.taps.eager.axis_history",
    "hookattn.taps.context": "hookattn.taps.eager.operation",
    "hookattn.taps.current": "hookattn.taps.active",
    "hookattn.taps.dense": "hookattn.taps.eager.assemble_scattered",
    "hookattn.taps.entries": "hookattn.taps.eager.entries",
    "hookattn.taps.external": "hookattn.taps.packed_kernels",
    "hookattn.taps.flash": "hookattn.taps.flash_attn",
    "hookattn.taps.interface": "hookattn.taps.hf_interface",
    "hookattn.taps.joined": "hookattn.taps.eager.concat_rules",
    "hookattn.taps.meeting": "hookattn.taps.eager.value_products",
    "hookattn.taps.mha": "hookattn.taps.nn_attention",
    "hookattn.taps.operations": "hookattn.taps.eager.operations",
    "hookattn.taps.origins": "hookattn.taps.eager.origins",
    "hookattn.taps.patch": "hookattn.torch_internals.code_patching",
    "hookattn.taps.product": "hookattn.taps.eager.products",
    "hookattn.taps.scored": "hookattn.taps.eager.scattered_layout",
    "hookattn.taps.scoring": "hookattn.taps.eager.score_rules",
    "hookattn.taps.states": "hookattn.taps.eager.states",
    "hookattn.taps.steps": "hookattn.taps.eager.rules",
    "hookattn.taps.views": "hookattn.taps.eager.view_rules",
    "hookattn.taps.watch": "hookattn.taps.eager.follower",
    "hookattn.taps.weighing": "hookattn.taps.eager.weight_rules",
    "hookattn.testing.calls": "hookattn.testing.invariants",
    "hookattn.trace": "hookattn.calls.trace_data",
    "hookattn.transfer": "hookattn.recording.host_transfer",
}
"""Old module -> new module."""

BECAME_PACKAGES = {
    "hookattn.analyze.circuits": "hookattn.analyze.circuits.circuit",
    "hookattn.attention": "hookattn.attention.functional",
    "hookattn.planning": "hookattn.planning.plan",
    "hookattn.taps.eager": "hookattn.taps.eager.assemble",
}
"""A module whose name is a package's now -> the module in it that has its content."""

_CANNOT_IMPORT = re.compile(r"cannot import name '(\w+)' from '([\w.]+)'")
_NO_ATTRIBUTE = re.compile(r"(?:partially initialized )?module '([\w.]+)' has no attribute '(\w+)'")


def moved_to(error: BaseException) -> str:
    """Where to find what could not be imported, as a sentence; "" where nothing of hookattn moved.

    Args:
        error: what was raised while an adapter package was imported.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:  # a package may raise an error of its own about it
        seen.add(id(cause))
        if sentence := _sentence(cause):
            return sentence
        cause = cause.__cause__ or cause.__context__
    return ""


def _sentence(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):  # import hookattn.registry
        return _module(error.name or "")
    text = str(error)
    if isinstance(error, ImportError) and (found := _CANNOT_IMPORT.match(text)):
        name, module = found.groups()
    elif isinstance(error, AttributeError) and (
        found := _NO_ATTRIBUTE.match(text)
    ):  # import hookattn; hookattn.registry
        module, name = found.groups()
    else:
        return ""
    new = BECAME_PACKAGES.get(module)
    if new is not None and find_spec(new) is not None:
        return f"{module} is a package now; what the module had is in {new}.{_PUBLIC}"
    return _module(f"{module}.{name}")


_PUBLIC = " Names of hookattn itself (from hookattn import Adapter, Site) do not move."


def _module(name: str) -> str:
    """The sentence for a module that is not there, or for one in it."""
    while name and name not in MOVED:
        name = name.rpartition(".")[0]
    if not name or name in sys.modules:
        return ""
    return f"{name} is {MOVED[name]} now.{_PUBLIC}"
