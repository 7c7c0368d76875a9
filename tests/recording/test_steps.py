"""Which step a call is in, and what was called for it, whoever calls what of a model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.errors import ModelError
from hookattn.models.registry import using
from tests.tiny_models import ids, llama

X = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_adapters() -> Any:
    with using():
        yield


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = Attention(), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


class Model(nn.Module):
    """Two towers and a decoder, called in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.decoder = nn.Sequential(Block(), Block()), Block(), Block()

    def forward(self, x: Tensor, again: bool = False, fails: type[BaseException] | None = None) -> Tensor:
        x = self.text(self.image(x))
        if fails is not None:
            raise fails
        return self.decoder(self(x) if again else x)

    def encode_image(self, x: Tensor) -> Tensor:
        return self.image(x)

    def encode(self, x: Tensor, tower: str) -> Tensor:
        return self.get_submodule(tower)(x)

    @torch.no_grad()
    def generate(self, x: Tensor) -> None:
        x = self.encode_image(x)
        for _ in range(3):
            x = self.decoder(self.decoder.norm(x))

    def encodes_and_runs(self, x: Tensor) -> None:
        self(self.image(x))

    def by_hand(self, x: Tensor) -> None:
        for block in self.image:
            x = self.decoder.norm(block(x))

    def training_step(self, x: Tensor) -> Tensor:
        return self(x).sum()


WHOLE = ["image.0", "image.1", "text", "decoder"]
IMAGE = WHOLE[:2]
Entries = list[tuple[int, str, list[str]]]


def entries(trace: hookattn.Trace) -> Entries:
    """Step, entry and sites of what was called, one after the other."""
    found: Entries = []
    for call in trace:
        path = call.site.path.removesuffix(".attn")
        if not found or found[-1][:2] != (call.step, call.entry) or path in found[-1][2]:
            found.append((call.step, call.entry, []))
        found[-1][2].append(path)
    return found


def run(*calls: Callable[[Any], Any], trace_it: Callable[[Any], nn.Module] = lambda model: model) -> Entries:
    model = Model()
    with hookattn.tracing(trace_it(model)) as trace:
        for call in calls:
            call(model)
    return entries(trace)


def test_every_forward_of_the_model_is_a_step() -> None:
    whole = [(0, "", WHOLE), (1, "", WHOLE)]
    assert run(lambda m: m(X), lambda m: m(X)) == whole
    assert run(lambda m: m.forward(X), lambda m: m.forward(X)) == whole, "nobody went through __call__"
    assert run(lambda m: m.training_step(X), lambda m: m.training_step(X)) == whole
    assert run(lambda m: m(X), lambda m: m.forward(X), lambda m: m(X)) == [*whole, (2, "", WHOLE)]


def test_a_forward_that_runs_the_model_again_is_one_step() -> None:
    model = Model()
    with hookattn.tracing(model) as trace:
        model(X, again=True)
        model(X)
    assert [(c.step, c.entry) for c in trace] == [(0, "")] * 8 + [(1, "")] * 4


@pytest.mark.parametrize("forward", ["__call__", "forward"])
def test_a_part_that_is_called_alone_is_a_step(forward: str) -> None:
    found = run(
        lambda m: getattr(m.image, forward)(X),
        lambda m: getattr(m.text, forward)(X),  # two towers in turn
        lambda m: getattr(m.text, forward)(X),
        lambda m: m(X),
        lambda m: getattr(m.image[1].attn, forward)(X),
    )
    assert found == [
        (0, "image", IMAGE),
        (1, "text", ["text"]),
        (2, "text", ["text"]),
        (3, "", WHOLE),
        (4, "image.1.attn", ["image.1"]),
    ]


def test_what_one_method_of_the_model_runs_is_one_step_until_it_runs_again() -> None:
    first = [(0, "image", IMAGE), (0, "decoder", ["decoder"]), (1, "decoder", ["decoder"]), (2, "decoder", ["decoder"])]
    assert run(lambda m: m.generate(X)) == first
    twice = [(step + 3, *rest) for step, *rest in first]
    assert run(lambda m: m.generate(X), lambda m: m.generate(X)) == [*first, *twice]
    by_hand = [
        (0, "image.0", IMAGE[:1]),
        (0, "image.1", IMAGE[1:]),
        (1, "image.0", IMAGE[:1]),
        (1, "image.1", IMAGE[1:]),
    ]
    assert run(lambda m: m.by_hand(X), lambda m: m.by_hand(X)) == by_hand


def test_a_method_that_is_called_again_begins_a_step() -> None:
    found = run(lambda m: m.encode(X, "image"), lambda m: m.encode(X, "text"), lambda m: m.encode(X, "decoder"))
    assert [step for step, *_ in found] == [0, 1, 2], "another execution of the same code"


def test_a_function_of_the_same_name_is_no_method() -> None:
    def encode(model: Any, x: Tensor) -> None:
        model.image(x)
        model.text(x)

    assert run(lambda m: encode(m, X)) == [(0, "image", IMAGE), (1, "text", ["text"])]


def test_the_whole_model_goes_on_from_its_encoder_unless_it_runs_that_again() -> None:
    assert run(lambda m: m.encodes_and_runs(X)) == [(0, "image", IMAGE), (1, "", WHOLE)]
    model = Model()
    model.forward = lambda x: model.decoder(model.text(x))  # type: ignore[method-assign]
    with hookattn.tracing(model) as trace:
        model.encodes_and_runs(X)
        model.encodes_and_runs(X)
    assert entries(trace) == [
        (step, entry, sites) for step in (0, 1) for entry, sites in (("image", IMAGE), ("", WHOLE[2:]))
    ]


class Wrapper(nn.Module):
    """Hands everything on to a model inside, as what tunes, compiles or replicates models does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


def test_a_wrapper_whose_inner_model_is_called() -> None:
    wrapped = Wrapper(Model())
    with hookattn.tracing(wrapped) as trace:
        wrapped.training_step(X)
        wrapped.inner(X)
        wrapped.generate(X)
    assert [(call.step, call.entry) for call in trace] == [
        *[(step, "inner") for step in (0, 1) for _ in range(4)],
        *[(2, "inner.image")] * 2,
        *[(step, "inner.decoder") for step in (2, 3, 4)],
    ]


@pytest.mark.parametrize("wrap", [Wrapper, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_generation_of_a_wrapped_model_is_stitched(wrap: Any) -> None:
    pytest.importorskip("transformers")
    model, prompt = llama(), ids(5)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with hookattn.tracing(model) as plain:
        model.generate(prompt, **options)
    outer = wrap(model)
    with hookattn.tracing(outer) as trace:
        (outer.module if isinstance(outer, nn.DataParallel) else outer).generate(prompt, **options)
    assert [c.step for c in trace] == [c.step for c in plain] and {c.entry for c in plain} == {""}
    assert len({c.entry for c in trace}) == 1
    for mine, other in zip(trace.stitch(), plain.stitch(), strict=True):
        assert torch.equal(mine.weights, other.weights)


def test_after_a_forward_that_failed() -> None:
    errors: list[BaseException] = []  # which hold the frames of what failed

    def fails(model: Any) -> None:
        for call, kind in ((model, ValueError), (model.forward, ValueError), (model, KeyboardInterrupt)):
            try:
                call(X, fails=kind)
            except (ValueError, KeyboardInterrupt) as error:
                errors.append(error)

    found = run(fails, lambda m: m(X), lambda m: m.image(X))
    whole = [(step, "", WHOLE[:3]) for step in range(3)]
    assert found == [*whole, (3, "", WHOLE), (4, "image", IMAGE)] and len(errors) == 3


def test_while_a_debugger_is_at_work() -> None:
    """It has its own mark on every frame."""
    seen: list[object] = []

    def watch(frame: Any, event: str, _: object) -> Any:
        seen.append(frame.f_code)
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        found = run(lambda m: m.encode(X, "image"), lambda m: m.encode(X, "text"), lambda m: m.generate(X))
    finally:
        sys.settrace(before)
    assert [(step, entry) for step, entry, _ in found] == [
        (0, "image"),
        (1, "text"),
        (2, "image"),
        (2, "decoder"),
        (3, "decoder"),
        (4, "decoder"),
    ]
    assert seen


def test_a_layer_that_would_lose_its_fused_path_by_a_hook() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with hookattn.tracing(layer) as trace, torch.no_grad():
        for call in (layer, layer, layer.forward, layer):
            call(X[0])
    assert [(c.step, c.entry, c.tap) for c in trace] == [
        (0, "", "mha_fast_path"),
        (1, "", "mha_fast_path"),
        (2, "", "mha_fast_path"),
        (3, "", "mha_fast_path"),
    ]


def test_the_stack_is_not_read_for_forwards_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hookattn.recording.steps.outermost", None)
    assert [step for step, *_ in run(lambda m: m(X), lambda m: m.training_step(X))] == [0, 1]


# ------------------------------------------------------------------------------------------------ by hand


def test_steps_by_hand() -> None:
    model, numbers = Model(), []
    with hookattn.tracing(model) as trace:
        model.text(X)
        for _ in range(2):
            with trace.step() as number:
                numbers.append(number)
                model.encode_image(X)
                model.encode_image(X)
                model(X)
        with trace.step() as number:
            numbers.append(number)
        model.encode_image(X)
        model(X)
    assert numbers == [1, 2, 3]
    by_hand = [("image", IMAGE), ("image", IMAGE), ("", WHOLE)]
    assert entries(trace) == [
        (0, "text", ["text"]),
        *[(step, *of) for step in (1, 2) for of in by_hand],
        (4, "image", IMAGE),
        (5, "", WHOLE),
    ]


def test_steps_by_hand_that_can_not_be() -> None:
    model, inside = Model(), []
    with hookattn.tracing(model) as trace:
        with trace.step(), pytest.raises(ModelError, match=r"inside trace\.step"), trace.step():
            pass
        with pytest.raises(ValueError, match="mine"), trace.step():
            raise ValueError("mine")

        def hook(*_: Any) -> None:
            with pytest.raises(ModelError, match="while the model runs"), trace.step():
                pass
            inside.append(True)

        handles = [module.register_forward_hook(hook) for module in (model.text, model.image)]
        model(X)
        model.image(X)
        for handle in handles:
            handle.remove()
        with pytest.raises(ModelError, match="in its own thread"), hookattn.Trace().step():
            pass
        model(X)
    assert [step for step, *_ in entries(trace)] == [2, 3, 4] and len(inside) == 3
    with pytest.raises(ModelError, match="in its own thread"), trace.step():
        pass
