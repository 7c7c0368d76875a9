"""Edits while a sequence goes on from step to step, with a cache: by positions in the sequence, and by steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import EditError, edit
from hookattn.testing import check_clean
from tests import tiny_models as tiny
from tests.reference import causal

transformers = pytest.importorskip("transformers")
PROMPT = torch.tensor([[5, 9, 2, 7]])
NEW = 5


def generated(model: nn.Module, *edits: edit.Edit, **options: Any) -> tuple[Tensor, Tensor, hookattn.Trace]:
    """The ids, the logits of every new token, and the trace."""
    with torch.no_grad(), hookattn.editing(model, *edits, strict=True) as trace:
        made = model.generate(  # type: ignore[operator]
            PROMPT, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
        )
    check_clean(model)
    return made.sequences, torch.stack(made.logits, 1), trace


def with_mask(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of one forward of the whole sequence, with a 4-D mask."""
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    with torch.no_grad():
        return model(ids, attention_mask=bias).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("keys", [[1], [5], [0, 6]])
def test_a_knockout_by_position_is_a_rerun_with_the_mask(name: str, keys: list[int], cache: str) -> None:
    """In every layer, from position 4 on: of the prompt, and of tokens that were generated on the way."""
    if cache == "static" and name == "gpt2":
        pytest.skip("a static cache of gpt2 is not what this is about")
    model = getattr(tiny, name)().double().eval()
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    ids, logits, trace = generated(model, edit.knockout(queries=slice(6, None), keys=keys), **options)
    n = ids.shape[1] - 1
    mask = causal(n)[None, None].clone()
    mask[..., 6:, keys] = False
    expected = with_mask(model, ids[:, :-1], mask)[:, PROMPT.shape[1] - 1 :]
    assert float((logits - expected).abs().max()) < 1e-5  # generate() hands out float32
    plain = with_mask(model, ids[:, :-1], causal(n)[None, None])[:, PROMPT.shape[1] - 1 :]
    assert float((logits - plain).abs().max()) > 1e-4
    assert {c.step for c in trace if c.edits} == {c.step for c in trace if c.step >= 3}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_patch_by_step_and_by_position(name: str) -> None:
    """Patterns of a whole forward go into the steps of a generation, by where the queries are."""
    model = getattr(tiny, name)().double().eval()
    ids, logits, _ = generated(model)
    with torch.no_grad():
        whole = hookattn.trace(model, ids[:, :-1])
    again, same, trace = generated(model, edit.patch("weights", whole.select(layer=1)[0], layer=1))
    assert torch.equal(ids, again) and float((logits - same).abs().max()) < 1e-5
    _, other, trace = generated(model, edit.zero("output", layer=1, heads=0, step=2))
    assert [(c.step, c.site.layer) for c in trace if c.edits] == [(2, 1)]
    assert torch.equal(other[:, :2], logits[:, :2]) and not torch.equal(other[:, 2], logits[:, 2])


def test_freezing_a_generation_by_itself() -> None:
    model = tiny.llama().double().eval()
    ids, logits, trace = generated(model)
    again, same, edited = generated(model, edit.freeze(trace))
    assert torch.equal(ids, again) and float((logits - same).abs().max()) < 1e-12
    assert not any(c.edits for c in edited), "every pattern was what it is"


def test_steps_and_positions_that_never_come() -> None:
    model = tiny.gpt2().double().eval()
    for one, said in (
        (edit.zero(step=9), "met no attention call"),
        (edit.zero(step=[0, 9]), "step 9 was in no call"),
        (edit.zero("weights", queries=[2, 50]), "queries 50 was in no call"),
        (edit.knockout(queries=[2], keys=[1, 60]), "keys 60 was in no call"),
    ):
        with pytest.raises(EditError, match=said):
            generated(model, one)
        check_clean(model)
        generated(model)


def test_keys_that_are_gone_from_the_cache() -> None:
    """A window that has moved on: positions from the front cannot be told any more, from the end they can."""
    options = {"num_key_value_heads": 2, "sliding_window": 4, **tiny.SMALL, **tiny.WORDS}
    model = tiny.build("MistralForCausalLM", "MistralConfig", **options).double()
    _, _, trace = generated(model)
    assert trace[-1].k.shape[2] == 4, "so the window has moved"
    with pytest.raises(EditError, match="count queries from the end"):
        generated(model, edit.knockout(queries=slice(5, None), keys=[3]))
    _, _, trace = generated(model, edit.knockout(keys=[-2], queries=-1, step=4))
    assert [c.step for c in trace if c.edits] == [4] * (len(trace) // NEW)
