"""What is remembered of a model between traces, and when it must not be."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn import Adapter
from hookattn.errors import ModelError, UnsupportedConfigError
from hookattn.models import discovery
from hookattn.models.discovery import make_watch_plan
from hookattn.models.layer_numbers import sounds_like_attention
from hookattn.models.registry import using
from hookattn.taps.eager.follower import Follower
from hookattn.taps.eager.operations import name_of


class Attention(nn.Module):
    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        self.scale, self.config = scale, SimpleNamespace(odd=False)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(x, x, x, scale=self.scale))


class Other(Attention):
    pass


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


class Model(nn.Module):
    def __init__(self, n: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Mine(Adapter):
    name = "mine"
    covers = (__name__,)
    attention = {"Attention": "self", "Other": "cross"}

    def check(self, module: nn.Module) -> None:
        if module.config.odd:
            raise UnsupportedConfigError("odd")


X = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["adapter", "none"])
def adapters(request: Any) -> Any:
    with using(*([Mine()] if request.param == "adapter" else [])):
        yield request.param == "adapter"


def paths(model: nn.Module) -> list[tuple[str, str]]:
    return [(call.site.path, call.site.kind) for call in hookattn.trace(model, X, verify="full", strict=True)]


def looked(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were looked at module by module."""
    seen: list[nn.Module] = []
    look = discovery._look

    def counted(model: nn.Module, *rest: Any) -> Any:
        seen.append(model)
        return look(model, *rest)

    monkeypatch.setattr(discovery, "_look", counted)
    return seen


def test_the_second_time_nothing_is_looked_for(monkeypatch: pytest.MonkeyPatch, adapters: bool) -> None:
    model, seen = Model(), looked(monkeypatch)
    first = paths(model)
    assert [paths(model) for _ in range(3)] == [first] * 3 and seen == [model]
    assert first == [("layers.0.attn", "self"), ("layers.1.attn", "self")]


def change_class(model: Model) -> None:
    model.layers[1].attn.__class__ = Other


def put_in(model: Model) -> None:
    model.layers.append(Block())


def take_out(model: Model) -> None:
    del model.layers[0]


def rename(model: Model) -> None:
    model.blocks = model.layers
    del model.layers
    model.forward = lambda x: model.blocks[1](model.blocks[0](x))  # type: ignore[method-assign]


def wrap(model: Model) -> None:
    model.layers[0].attn = nn.Sequential(model.layers[0].attn)  # type: ignore[assignment]


def share(model: Model) -> None:
    model.layers[1].attn = model.layers[0].attn


def below_what_had_no_children(model: Model) -> None:
    model.layers[0].norm = nn.Sequential(nn.LayerNorm(8), Attention())  # type: ignore[assignment]


@pytest.mark.parametrize(
    "change",
    [change_class, put_in, take_out, rename, wrap, share, below_what_had_no_children],
    ids=lambda f: f.__name__,
)
def test_a_model_that_was_changed_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, adapters: bool, change: Any
) -> None:
    model, seen = Model(), looked(monkeypatch)
    paths(model)
    change(model)
    found = paths(model)
    fresh = Model()
    change(fresh)
    assert found == paths(fresh) and seen == [model, model, fresh]


def test_a_module_with_several_places_and_a_circle(adapters: bool) -> None:
    model = Model()
    model.layers.append(model.layers[0])
    model.register_module("nothing", None)
    assert [p for p, _ in paths(model)] == ["layers.0.attn", "layers.1.attn", "layers.0.attn"]
    model.layers[1].outer = model  # a circle
    for _ in range(3):
        assert [p for p, _ in paths(model)] == ["layers.0.attn", "layers.1.attn", "layers.0.attn"]


def test_what_is_configured_is_asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with using(Mine()):
        model, seen = Model(), looked(monkeypatch)
        paths(model)
        model.layers[1].attn.config.odd = True
        with pytest.raises(UnsupportedConfigError):
            hookattn.trace(model, X)
        model.layers[1].attn.config.odd = False
        assert len(paths(model)) == 2 and seen == [model]


def test_what_is_configured_is_asked_once_for_each_site(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr(Mine, "check", lambda self, module: asked.append(module))
    model = Model()
    with using(Mine()):
        for n in (1, 2):  # the model is looked at, and then known
            assert make_watch_plan(model).adapters == {"mine"}
            assert asked == [layer.attn for layer in model.layers] * n


def test_more_modules_than_are_followed_place_by_place(monkeypatch: pytest.MonkeyPatch, adapters: bool) -> None:
    monkeypatch.setattr(discovery, "_MANY", 6)
    model = Model(4)
    first = paths(model)
    assert paths(model) == first and [p for p, _ in first] == [f"layers.{i}.attn" for i in range(4)]
    model.layers[3].norm = nn.Sequential(nn.LayerNorm(8), Attention())  # type: ignore[assignment]
    assert len(paths(model)) == 5


def test_other_adapters_are_asked_anew() -> None:
    model = Model()
    with using():
        assert make_watch_plan(model).watch_all and not make_watch_plan(model).sites
    with using(Mine()):
        assert not make_watch_plan(model).watch_all and len(make_watch_plan(model).sites) == 2
    with using():
        assert make_watch_plan(model).watch_all


class Pooled(nn.Module):
    """A covered class with attention of torch's own beside the sites, in one, and in a decoder layer of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = Model(), Other()
        self.last.pool = nn.MultiheadAttention(8, 2, batch_first=True)
        self.beside = nn.MultiheadAttention(8, 2, batch_first=True)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.body(x))[0]
        y = self.beside(y, y, y)[0].exp().log()
        return self.decoder(y, y + 1)


def pool_before(self: Any, x: Tensor) -> Tensor:
    y = x[0] if "pool" not in self._modules else self.pool(x[0], x[0].flip(1), x[0])[0]
    return self.out(F.scaled_dot_product_attention(y, y, y))[None]


@pytest.mark.parametrize("training", [False, True])
def test_attention_of_torch_in_covered_classes_is_watched_by_itself(
    monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    monkeypatch.setattr(Other, "forward", pool_before)
    model = Pooled().train(training)
    with using():
        torch.manual_seed(0)
        watched = hookattn.trace(model, X, verify="full", strict=True)
    torch.manual_seed(0)
    plain = model(X)
    names: list[str] = []
    follow = Follower.operation
    monkeypatch.setattr(Follower, "operation", lambda self, func: names.append(name_of(func)) or follow(self, func))
    with using(Mine()):
        plan = make_watch_plan(model)
        assert not plan.watch_all and len(plan.torch_modules) == 6
        torch.manual_seed(0)
        found = hookattn.trace(model, X, verify="full", strict=True)
    assert torch.equal(found.output, plain) and not found.skipped
    assert "exp" not in names and "softmax" in names
    assert [c.site.path for c in found] == [
        "body.layers.0.attn",
        "body.layers.1.attn",
        "last",
        "last",
        "beside",
        *(f"decoder.layers.{i}.{name}" for i in range(2) for name in ("self_attn", "multihead_attn")),
    ]
    assert [c.site for c in watched][5:] == [c.site for c in found][5:]
    for mine, other in zip(found, watched, strict=True):
        assert mine.tap == other.tap and torch.equal(mine.weights, other.weights) and torch.equal(mine.q, other.q)


def test_an_encoder_layer_of_torch_keeps_its_fused_path() -> None:
    model = Pooled()
    model.decoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    model.decoder.forward = lambda x, _: model.decoder.layers[0](x)
    model.eval()
    with using(Mine()), torch.no_grad():
        plan = make_watch_plan(model)
        assert plan.watch_all and not plan.torch_modules
        assert hookattn.trace(model, X)[-1].tap == "mha_fast_path"


def test_weights_that_lost_their_values_since(adapters: bool) -> None:
    model = Model()
    paths(model)
    model.to("meta")
    for inputs in (X, X.to("meta")):
        with pytest.raises(ModelError, match=r"layers\.0\.\w+\.\w+ is on the meta device.*load the weights"):
            hookattn.trace(model, inputs)


def test_a_model_is_not_kept_alive(adapters: bool) -> None:
    gc.collect()
    model = Model()
    paths(model)
    gone = weakref.ref(model), weakref.ref(model.layers[1].attn)
    known = len(discovery._known)
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None] and len(discovery._known) == known - 1


def test_the_description_is_of_the_model_as_it_was() -> None:
    class Config:
        def __init__(self, **values: Any) -> None:
            vars(self).update(values)

        def to_dict(self) -> dict[str, Any]:
            return {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in vars(self).items()}

    model = Model()
    model.config = Config(width=8, text=Config(layers=2))
    found = hookattn.trace(model, X)
    model.config.width = 9
    model.config.text.layers = 3
    assert found.model["config"] == {"width": 8, "text": {"layers": 2}}
    assert dict(found.model) == {**found.model} and found.model["class"] == "Model" and len(found.model) == 4
    assert found.model == dict(found.model) and "Model" in repr(found.model)


@pytest.mark.parametrize(
    ("name", "attends"),
    [
        ("SelfAttention", True),
        ("CrossAttn", True),
        ("MambaMixer", True),
        ("DeformableAttention", True),
        ("SelfAttentionOutput", False),
        ("DeformableFrozenBatchNorm2d", False),
        ("RwkvFeedForward", False),
        ("MambaConv1d", False),
        ("AttnAdapterLayer", False),
        ("DeformableDetrConvEncoder", False),
        ("WindowAttentionBackbone", False),
        ("DeformableDetrSinePositionEmbedding", False),
        ("LearnedPositionEmbeddingForAttention", True),
        ("FactorAttnConvRelPosEnc", False),
        ("AttentionPosEmbed2D", False),
        ("AttentionRope", False),
        ("MambaRMSNormGated", False),
        ("DeformableDetrMLPPredictionHead", False),
        ("RelPositionMultiHeadedAttention", True),
        ("RelPosEncAttention", True),
        ("AttentionPoolingHead", True),
        ("DeformableDetrEncoder", True),
        ("Convolution", False),
    ],
)
def test_what_sounds_like_attention(name: str, attends: bool) -> None:
    assert sounds_like_attention(name) is attends


def test_a_child_that_moved_to_the_module_beside_is_noticed(monkeypatch: pytest.MonkeyPatch, adapters: bool) -> None:
    model, seen = Model(), looked(monkeypatch)
    assert paths(model)[0] == ("layers.0.attn", "self")
    model.layers[1].add_module("last", model.layers[1].attn)
    del model.layers[1].attn
    model.layers[1].forward = lambda x: model.layers[1].last(x)  # type: ignore[method-assign]
    paths(model)
    first, second = model.layers[0], model.layers[1]
    moved = first.attn
    del first.attn
    children = dict(second.named_children())
    for name in children:
        delattr(second, name)
    for name, child in {"attn": moved, **children}.items():
        second.add_module(name, child)
    first.forward = first.norm.forward  # type: ignore[method-assign]
    second.forward = lambda x: second.last(second.attn(x))  # type: ignore[method-assign]
    assert paths(model) == [("layers.1.attn", "self"), ("layers.1.last", "self")] and seen == [model] * 3


def test_paths_are_of_the_model_as_it_is_when_they_are_asked_for(adapters: bool) -> None:
    model = Model()
    known = make_watch_plan(model).paths
    assert known[id(model.layers[1].attn)] == "layers.1.attn"
    assert make_watch_plan(model).paths is known  # of one shape, put together once
    later = make_watch_plan(model)
    model.layers.append(Block())  # the block of a trace changes the model
    assert later.paths[id(model.layers[2].attn)] == "layers.2.attn"
    del model.layers[2]
    assert id(model) in make_watch_plan(model).paths and "layers.2.attn" not in make_watch_plan(model).paths.values()
    with using():  # where no adapter covers it, calls are placed by these paths
        with hookattn.tracing(model) as found:
            model.layers.append(Block())
            model(X)
        assert [c.site.path for c in found] == [f"layers.{i}.attn" for i in range(3)]
