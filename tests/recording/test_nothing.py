"""A block in which nothing is recorded: the edits are done as ever, and no call is made."""

from __future__ import annotations

import pytest
import torch

import hookattn
from hookattn import api, edit
from hookattn.errors import EditError
from tests import tiny_models


@pytest.mark.parametrize("make", [tiny_models.gpt2, tiny_models.llama, tiny_models.bert])
def test_the_output_is_that_of_the_recorded_run(make: object) -> None:
    model = make()  # type: ignore[operator]
    inputs = tiny_models.padded("right")
    edits = [
        edit.knockout(layer=0, heads=[1], queries=[-1], keys=[0]),
        edit.zero("output", layer=1, heads=[0]),
        edit.scale("scores", 0.5, layer=1, heads=[2]),
    ]
    wanted = hookattn.edited(model, inputs, edits)
    with torch.no_grad(), api.unrecorded(model, edits) as trace:
        found = model(**inputs)
    assert torch.equal(found[0], wanted.output[0])
    assert not torch.equal(found[0], model(**inputs)[0])
    assert len(trace) == 0 < len(wanted)


def test_an_edit_that_meets_nothing_is_an_error_all_the_same() -> None:
    model = tiny_models.gpt2()
    with pytest.raises(EditError, match="met no attention call"), api.unrecorded(model, edit.zero(path="nowhere")):
        model(**tiny_models.padded("right"))
    assert not any(module._forward_hooks for module in model.modules())
