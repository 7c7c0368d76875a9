"""What a measure gives for a head that looks at all keys alike: the level that a score has to be held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..attention.normalizers import SOFTMAX
from ..calls.fields import Field
from .call_view import View
from .measures.base import Measure
from .table import readings


class Chance:
    """Measures of uniform attention under the mask of each call; computed once for calls of one kind that share a mask.

    Args:
        measures: which ones.
    """

    def __init__(self, measures: Sequence[Measure]):
        self.measures = measures
        self._mask: Tensor | None = None
        self._place: object = None
        self._found: dict[str, float] = {}

    def of(self, view: View) -> dict[str, float]:
        """Each measure's chance level by its key; nothing for one that is not defined, or where no mask was kept."""
        call = view.call
        if not call.has("mask"):
            return {}
        b, _, t, s = view.shape
        mask = view.mask[:, :1].expand(b, 1, t, s)  # where heads have masks of their own, the first stands for all
        place = (call.site.stack, call.site.kind, call.site.axes, call.step, call.queries)
        same = self._place == place and self._mask is not None and self._mask.shape == mask.shape
        # Layers of a model share one mask as a rule, and comparing masks is far cheaper than measuring again.
        if same and torch.equal(self._mask, mask):  # type: ignore[arg-type]
            return self._found
        # Uniform attention, as a call like any other: a measure needs no formula of its own for its chance level.
        weights = mask / mask.sum(-1, keepdim=True).clamp_min(1)
        fields: dict[str, Field] = {"weights": weights, "mask": mask, "bias": None, "sinks": None}
        plain = replace(
            call, fields=fields, beside={}, heads=None, kv_heads=None, derivable=(), normalizer=SOFTMAX, edits=()
        )
        even = View(plain, view.trace, view.keys)
        found = readings(even, self.measures, missing=True)
        levels = {key: float(reading.heads[0]) for key, reading in found.items() if reading is not None}
        self._mask, self._place = mask, place
        self._found = {key: level for key, level in levels.items() if level == level}
        return self._found
