"""The keys and values of a generation are kept once, and each step reads as the model had it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn.calls.fields import Place
from hookattn.calls.key_history import Continued
from hookattn.calls.mask_rule import MaskRule
from tests import tiny_models as tiny

transformers = pytest.importorskip("transformers")


def held(trace: hookattn.Trace) -> int:
    """Bytes of all storages that a trace holds."""
    found: dict[int, int] = {}

    def look(place: Place | Any) -> None:
        if isinstance(place, Tensor):
            found[place.untyped_storage()._cdata] = place.untyped_storage().nbytes()
        elif isinstance(place, MaskRule):
            look(place.given)
        elif isinstance(place, Continued):
            look(place.history._run), look(place.history._rest)

    for call in trace:
        for place in (*call.fields.values(), *call.beside.values()):
            look(place)
    return sum(found.values())


@contextlib.contextmanager
def updates() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The keys and values that every cache layer of transformers hands to attention, copied as it does."""
    seen: list[tuple[Tensor, Tensor]] = []
    kinds = [c for c in vars(transformers.cache_utils).values() if isinstance(c, type) and "update" in vars(c)]
    kinds = [c for c in kinds if issubclass(c, transformers.cache_utils.CacheLayerMixin)]
    with pytest.MonkeyPatch.context() as patch:
        depth = [0]
        for kind in kinds:

            def update(self: Any, *args: Any, _own: Any = kind.update, **kwargs: Any) -> Any:
                depth[0] += 1
                try:
                    k, v = _own(self, *args, **kwargs)
                finally:
                    depth[0] -= 1
                if not depth[0]:
                    seen.append((k.detach().clone(), v.detach().clone()))
                return k, v

            patch.setattr(kind, "update", update)
        yield seen


WAYS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "growing": (tiny.llama, {}),
    "static": (tiny.llama, {"cache_implementation": "static", "disable_compile": True}),
    "sliding": (lambda: tiny.gemma2("eager"), {}),
    "sliding, static": (
        lambda: tiny.gemma2("eager"),
        {"cache_implementation": "hybrid", "disable_compile": True},
    ),
    "beams": (tiny.llama, {"num_beams": 3}),
    "eager": (lambda: tiny.llama("eager"), {}),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", WAYS)
def test_a_generation(way: str, mode: Any) -> None:
    make, options = WAYS[way]
    model, n = make(), 24
    with mode(), updates() as seen, hookattn.tracing(model) as trace:
        out = model.generate(
            tiny.ids(5), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, **options
        )
    with mode():
        plain = make().generate(
            tiny.ids(5), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, **options
        )
    assert torch.equal(out, plain), "the model's own answer"
    assert len(seen) == len(trace) and trace.faithful
    for call, (k, v) in zip(trace, seen, strict=True):
        keys = call.k.shape[2]
        assert torch.equal(call.k, k[:, :, :keys]) and torch.equal(call.v, v[:, :, :keys])
    gone_on = sum(isinstance(c.fields["k"], Continued) for c in trace)
    assert gone_on >= 0.9 * len(trace), f"{gone_on} of {len(trace)}"
    whole = sum(x.nbytes for call in trace for x in (call.k, call.v))
    others = sum(x.nbytes for call in trace for x in (call.q, call.output))
    assert held(trace) < others * 2.5 + whole / 4


def test_cross_attention_keeps_the_other_sequence_once() -> None:
    model = tiny.t5()
    with torch.no_grad(), hookattn.tracing(model) as trace:
        model.generate(tiny.ids(9), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    cross = trace.select(kind="cross").calls
    assert all(isinstance(c.fields["k"], Continued) for c in cross)
    for site in {c.site.path for c in cross}:
        histories = {id(c.fields["k"].history) for c in cross if c.site.path == site}  # type: ignore[union-attr]
        assert len(histories) == 1


def test_forwards_that_are_no_generation_are_left_alone() -> None:
    model = tiny.gpt2()
    with hookattn.tracing(model) as trace:
        model(tiny.ids(7)), model(tiny.ids(7)), model(tiny.ids(8))
    assert not any(isinstance(c.fields["k"], Continued) for c in trace)


def test_what_was_dropped_in_between_is_not_gone_on_from() -> None:
    model, x = tiny.gpt2(), tiny.ids(6)
    with torch.no_grad(), hookattn.tracing(model) as trace:
        past = model(x[:, :4], use_cache=True).past_key_values
        trace.calls.clear()
        model(x[:, 4:5], past_key_values=past, use_cache=True)
        model(x[:, 5:], past_key_values=past, use_cache=True)
    assert [c.k.shape[2] for c in trace] == [5, 5, 6, 6] and trace.faithful
    assert all(isinstance(c.fields["k"], Continued) for c in trace)
