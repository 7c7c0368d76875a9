"""The table of fields: what a tap hands over and what a call shows are the fields that it lists."""

from __future__ import annotations

import dataclasses

import pytest

import hookattn
from hookattn.attention.kernel_call import DERIVED, FIELD_SPECS, FIELDS, SOURCES, STORED, TENSOR_SPECS, FieldSpec


def test_what_the_table_says_of_the_fields_there_are() -> None:
    assert (
        FIELDS == ("q", "k", "v", "bias", "scores", "mask", "sinks", "weights", "applied", "output") == hookattn.FIELDS
    )
    assert DERIVED == ("scores", "weights") and SOURCES == ("q", "k", "bias", "mask", "sinks")
    assert STORED == ("q", "k", "v", "bias", "mask", "sinks", "output")
    assert [name for name, spec in FIELD_SPECS.items() if spec.is_vectors] == ["q", "k", "v", "output"]
    assert [name for name, spec in FIELD_SPECS.items() if spec.per_key_head] == ["k", "v"]
    assert [name for name, spec in FIELD_SPECS.items() if not spec.per_query] == ["k", "v"]


@pytest.mark.parametrize("spec", TENSOR_SPECS.values(), ids=lambda spec: spec.name)
def test_a_kernel_call_has_each_tensor_and_says_its_axes(spec: FieldSpec) -> None:
    assert spec.name in {field.name for field in dataclasses.fields(hookattn.KernelCall)}
    assert set(spec.axes) <= set("BHGTSDE1")
    assert set(spec.derived_from) <= set(FIELDS)


@pytest.mark.parametrize("spec", FIELD_SPECS.values(), ids=lambda spec: spec.name)
def test_a_call_shows_each_field_and_says_its_axes(spec: FieldSpec) -> None:
    shown = getattr(hookattn.Call, spec.name)
    assert isinstance(shown, property) and shown.fget is not None
    assert " ".join(spec.axes) in str(shown.__doc__)
    assert ("None" in str(shown.fget.__annotations__["return"])) is spec.optional


@pytest.mark.parametrize("name", DERIVED)
def test_a_derived_field_follows_from_what_stands_before_it(name: str) -> None:
    derived = [source for source in FIELD_SPECS[name].derived_from if source in DERIVED]
    assert all(DERIVED.index(source) < DERIVED.index(name) for source in derived)
