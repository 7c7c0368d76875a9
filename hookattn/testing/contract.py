"""``AdapterContract``: the test class that an adapter's author subclasses; each check is a test."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..models.adapter import Adapter
from .case import Case
from .check import CHECKS, apply
from .failure import require


class AdapterContract:
    """What an adapter has to hold to: subclass it, give it an adapter, a model and inputs.

    The checks are those of :func:`hookattn.testing.check_adapter`, a test for each.

    Attributes:
        adapter: the adapter under test.
        beside: further adapters that the model needs (for the classes that it shares with other families).
        complete: whether these cover every class of the model, so that it is watched at its sites alone.
        every_layer: whether every layer of a stack has a site of each kind, so that they are numbered without gaps.
        padding: whether a token that ``attention_mask`` leaves out is hidden from every self-attention.
        skipped: class names of sites whose attention can't be read (no softmax), and is listed in ``trace.skipped``.
        formed: the fields that have to be tensors that the model itself forms.
    """

    adapter: ClassVar[Adapter]
    beside: ClassVar[tuple[Adapter, ...]] = ()
    complete: ClassVar[bool] = True
    every_layer: ClassVar[bool] = True
    padding: ClassVar[bool] = True
    skipped: ClassVar[tuple[str, ...]] = ()
    formed: ClassVar[tuple[str, ...]] = ("q", "k", "v", "output")

    def model(self) -> nn.Module:
        """A small model, with weights large enough that its attention is not uniform."""
        raise NotImplementedError

    def inputs(self) -> Any:
        """Inputs of the model, as :func:`hookattn.trace` takes them."""
        raise NotImplementedError

    def test_the_adapter_finds_its_sites(self) -> None:
        self._check("sites")

    def test_layers_are_numbered(self) -> None:
        self._check("layers")

    def test_every_class_is_covered(self) -> None:
        self._check("covered")

    def test_the_attention_is_far_from_uniform(self) -> None:
        self._check("far from uniform")

    def test_tracing_changes_nothing(self) -> None:
        self._check("nothing changed")

    def test_gradients_are_the_same(self) -> None:
        self._check("gradients")

    def test_nothing_is_left_when_the_forward_raises(self) -> None:
        self._check("nothing left behind")

    def test_the_invariants_hold(self) -> None:
        self._check("invariants")

    def test_the_model_forms_what_is_recorded(self) -> None:
        self._check("formed by the model")

    def test_no_attention_is_missing(self) -> None:
        self._check("nothing missing")

    def test_the_generic_way_sees_the_same(self) -> None:
        self._check("as without the adapter")

    def test_heads_are_not_repeated(self) -> None:
        self._check("grouped heads")

    def test_padding_is_hidden(self) -> None:
        self._check("padding")

    def test_a_cache_changes_nothing(self) -> None:
        self._check("cache")

    def test_half_precision(self) -> None:
        self._check("half precision")

    def _check(self, name: str) -> None:
        require(apply(CHECKS[name], self._case())[0])

    def _case(self) -> Case:
        return Case(
            self.adapter,
            self.model,
            self.inputs,
            self.beside,
            self.complete,
            self.every_layer,
            self.formed,
            padding=self.padding,
            skipped=self.skipped,
        )
