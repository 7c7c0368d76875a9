"""Plain calls of a covered model: only their tensors are copied while it runs, and the rest is done when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hookattn
from hookattn import Adapter
from hookattn.models.discovery import make_watch_plan
from hookattn.models.registry import using
from hookattn.recording.recorder import CallRecorder
from hookattn.torch_internals.code_patching import exchanged
from tests.reference import assert_untouched, draw

pytest.importorskip("transformers")

from transformers import modeling_utils

KNOWN = modeling_utils.ALL_ATTENTION_FUNCTIONS
X = draw(2, 5, 16, seed=3)
pytestmark = pytest.mark.skipif(
    not hasattr(modeling_utils.AttentionInterface, "get_interface"), reason="transformers before 5.1"
)


def by_hand(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> tuple[Tensor, None]:
    return ((q @ k.mT * given["scaling"]).softmax(-1) @ v).transpose(1, 2), None


class Attention(nn.Module):
    """Asks the interface of transformers, as the models there do."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.qkv = config, nn.Linear(16, 48)
        self.mask: Tensor | None = None
        self.passes, self.scaling = False, 0.4
        self.after: Callable[[Tensor, Tensor], Any] = lambda qkv, out: None

    def forward(self, x: Tensor) -> Tensor:
        if self.passes:
            return x * 2
        qkv = self.qkv(x)
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in qkv.chunk(3, -1))
        run = KNOWN.get_interface(self.config._attn_implementation, by_hand)
        out: Tensor = run(self, q, k, v, self.mask, scaling=self.scaling, dropout=0.0, is_causal=False)[0]
        self.after(qkv, out)
        return out.flatten(2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.layers = nn.ModuleList(Attention(self.config) for _ in range(3))
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x))
        return x


class Mine(Adapter):
    name = "held"
    covers = (__name__,)
    attention = {"Attention": "self"}


PATHS = ["layers.0", "layers.1", "layers.2"]


@pytest.fixture(autouse=True)
def adapter() -> Iterator[None]:
    with using(Mine()):
        yield


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each plain call was held."""
    found: list[bool] = []
    hold = CallRecorder.hold

    def noted(self: CallRecorder, call: Any) -> bool:
        found.append(hold(self, call))
        return found[-1]

    monkeypatch.setattr(CallRecorder, "hold", noted)
    return found


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def places(trace: hookattn.Trace) -> list[tuple[int, int, str]]:
    return [(call.index, call.step, call.site.path) for call in trace]


def alike(a: hookattn.Trace, b: hookattn.Trace) -> None:
    """Whether two traces say the same, to the bit."""
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        plain = [
            {k: v for k, v in vars(x).items() if k not in ("_certificate", "fields", "made")} for x in (one, other)
        ]
        assert plain[0] == plain[1] and list(one.fields) == list(other.fields)
        for name in ("q", "k", "v", "scores", "mask", "weights", "output"):
            assert torch.equal(one.get(name), other.get(name)) and not one.get(name).requires_grad
        assert one.bias is one.sinks is one.applied is None
        assert one.certificate == other.certificate and one.certificate.faithful


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_held_is_what_would_have_been_kept_at_once(
    held: list[bool], grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    with torch.set_grad_enabled(grad):
        found = hookattn.trace(model, X, strict=True)
        assert held == [True] * 3 and [c.site.path for c in found] == PATHS
        monkeypatch.setattr(CallRecorder, "hold", lambda self, call: False)
        at_once = hookattn.trace(model, X, strict=True)
        alike(found, at_once)
        monkeypatch.setattr("hookattn.recording.recorder.is_plain", lambda call: False)
        alike(found, hookattn.trace(model, X, strict=True))  # and by the way of calls that are not plain
    found[0].basis["H"] = "guessed"  # type: ignore[index]
    assert found[1].basis["H"] == "kernel" and hookattn.trace(model, X)[0].basis["H"] == "kernel"


@pytest.mark.parametrize("given", [{"capture": ("q", "weights")}, {"heads": 0}, {"dtype": torch.float64}])
def test_what_is_not_kept_as_it_is_is_not_held(held: list[bool], given: dict[str, Any]) -> None:
    found = hookattn.trace(net(), X, strict=True, **given)
    assert not any(held) and [c.site.path for c in found] == PATHS


def test_selected_layers_are_kept_at_once(held: list[bool]) -> None:
    assert [c.site.path for c in hookattn.trace(net(), X, layers=[-1])] == PATHS[2:] and not held


def test_the_model_may_write_to_its_tensors_before_it_ends(held: list[bool]) -> None:
    model = net()
    with torch.no_grad():
        plain = hookattn.trace(model, X, strict=True)
        seen: list[Tensor] = []

        def overwrite(qkv: Tensor, out: Tensor) -> None:
            seen.append(out.clone())
            qkv.zero_()

        model.layers[1].after = overwrite
        found = hookattn.trace(model, X, strict=True)
    assert torch.equal(found[1].q, plain[1].q) and torch.equal(found[1].output.transpose(1, 2), seen[0]) and all(held)


def test_calls_stay_in_their_order_where_some_can_not_be_held(held: list[bool]) -> None:
    model = net()
    model.layers[1].mask = torch.ones(5, 5).tril().bool()[None, None]
    with hookattn.tracing(model, strict=True) as found:
        model(X)
        assert places(found) == [(0, 0, "layers.0"), (1, 0, "layers.1"), (2, 0, "layers.2")]
        model(X)
    assert held == [True, False, True] * 2
    assert [c.step for c in found] == [0, 0, 0, 1, 1, 1] and [c.index for c in found] == list(range(6))
    assert not bool(found[1].mask.all()) and bool(found[2].mask.all())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_raises(error: type[BaseException], held: list[bool]) -> None:
    model = net()

    def stop(qkv: Tensor, out: Tensor) -> None:
        raise error("in the middle")

    model.layers[1].after = stop
    with hookattn.tracing(model) as found:
        with pytest.raises(error):
            model(X)
        model.layers[1].after = lambda qkv, out: None
        model(X)
        model.layers[2](X)
    assert [(c.step, c.site.path) for c in found] == [(0, p) for p in PATHS[:2]] + [(1, p) for p in PATHS] + [
        (2, "layers.2")
    ]
    assert [c.index for c in found] == list(range(6)) and held == [True] * 5
    assert_untouched(model)


def test_a_forward_that_raises_out_of_the_block() -> None:
    model = net()

    def stop(qkv: Tensor, out: Tensor) -> None:
        raise RuntimeError("in the middle")

    model.layers[2].after = stop
    with pytest.raises(RuntimeError, match="in the middle"), hookattn.tracing(model) as found:
        model(X)
    assert [c.site.path for c in found.calls] == PATHS


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_recomputed_parts_and_transforms(held: list[bool]) -> None:
    model = net()
    model.recompute = True
    with hookattn.tracing(model, strict=True) as found:
        model(X.clone().requires_grad_()).sum().backward()
    assert [c.site.path for c in found] == PATHS and held == [True] * 3
    held.clear()
    model.recompute = False
    with hookattn.tracing(model) as mapped:
        torch.vmap(model)(X[:, None])
    assert [c.site.path for c in mapped] == PATHS and not held
    assert torch.allclose(mapped[0].q, found[0].q, atol=1e-6)


def test_the_implementation_is_changed_between_traces(held: list[bool]) -> None:
    model = net()
    fused = hookattn.trace(model, X, strict=True)
    model.config._attn_implementation = "eager"
    assert not make_watch_plan(model).sealed
    eager = hookattn.trace(model, X, strict=True)
    assert [c.tap for c in fused] == ["sdpa"] * 3 and [c.tap for c in eager] == ["eager"] * 3
    model.layers[1].config = SimpleNamespace(_attn_implementation="sdpa")  # one module alone
    assert [c.tap for c in hookattn.trace(model, X, strict=True)] == ["eager", "sdpa", "eager"]
    assert held == [True] * 3 + [True] and torch.allclose(fused[2].weights, eager[2].weights, atol=1e-6)


def test_a_model_that_was_changed_between_traces(held: list[bool]) -> None:
    model = net()
    hookattn.trace(model, X)
    model.double()  # its parameters are others
    found = hookattn.trace(model, X.double(), strict=True)
    assert [c.dtype for c in found] == [torch.float64] * 3 and found[0].q.dtype == torch.float64
    ran: list[nn.Module] = []
    with model.layers[1].register_forward_pre_hook(lambda module, args: ran.append(module)):
        assert len(hookattn.trace(model, X.double(), strict=True)) == 3 and ran == [model.layers[1]]
    model.layers[1] = Attention(SimpleNamespace(_attn_implementation="sdpa")).double()  # a submodule is another
    found = hookattn.trace(model, X.double(), strict=True)
    assert [c.site.path for c in found] == PATHS
    q = model.layers[1].qkv(X.double() + model.layers[0](X.double()))[..., :16].unflatten(-1, (2, 8)).transpose(1, 2)
    assert torch.equal(found[1].q, q)
    model.layers[1] = nn.Identity()
    assert [c.site.path for c in hookattn.trace(model, X.double(), strict=True)] == ["layers.0", "layers.2"]
    assert all(held)


def test_the_factor_of_each_call_is_its_own() -> None:
    model = net()
    model.layers[1].scaling, model.layers[2].scaling = 1.0, 0.5
    found = hookattn.trace(model, X, strict=True)
    assert [c.scale for c in found] == [0.4, 1.0, 0.5]


# ------------------------------------------------------------------------------------------------ what tells of runs


def test_a_hook_that_tells_that_a_module_runs_goes_after_its_first_run() -> None:
    model = net()
    counts: list[int] = []
    model.layers[0].after = lambda qkv, out: counts.append(len(model.layers[0]._forward_pre_hooks))
    with hookattn.tracing(model) as found:
        assert [len(layer._forward_pre_hooks) for layer in model.layers] == [1, 1, 1]
        model(X)
        model(X)
    assert counts == [0, 0] and len(found) == 6
    assert_untouched(model)


def test_a_site_that_ran_and_did_not_attend_is_listed_whenever_it_ran() -> None:
    model = net()
    hookattn.trace(model, X)  # the model is known by now, and all of its sites have attended
    model.layers[1].passes = True
    with pytest.warns(hookattn.SkippedWarning), hookattn.tracing(model) as found:
        for _ in range(2):
            model(X)
    assert [s.path for s in found.skipped] == ["layers.1"] and len(found) == 4
    model.layers[1].passes = False
    assert not hookattn.trace(model, X).skipped


def test_what_only_the_mode_needs_is_exchanged_when_it_opens() -> None:
    names: list[set[str]] = []
    model = net()
    model.layers[0].after = lambda qkv, out: names.append(set(exchanged()))
    hookattn.trace(model, X)
    assert "scaled_dot_product_attention" in names[0] and "has_torch_function" not in names[0]
    model.config._attn_implementation = "eager"
    hookattn.trace(model, X)
    assert {"scaled_dot_product_attention", "has_torch_function", "__call__"} <= names[1] and not exchanged()
    with using():  # nothing covers it: the mode is open from the start
        hookattn.trace(model, X)
    assert "has_torch_function" in names[2] and not exchanged()


def test_what_a_trace_says_was_selected_is_its_own() -> None:
    model = net()
    first = hookattn.trace(model, X)
    first.selection["capture"].append("nonsense")
    first.selection["layers"] = 7
    assert "nonsense" not in hookattn.trace(model, X).selection["capture"]
    assert hookattn.trace(model, X).selection["layers"] is None
