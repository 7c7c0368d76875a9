"""``plan``: the bytes it tells are those a trace keeps; nothing runs on real data, and nothing is left on the model."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn.calls.mask_rule import MaskRule
from hookattn.planning import plan
from hookattn.testing import check_clean
from hookattn.testing.clean import state_of
from hookattn.torch_internals.devices import size_of
from tests import tiny_models as tiny
from tests.routed import Routed
from tests.zoo import CASES

transformers = pytest.importorskip("transformers")

WORDS_AND_IMAGE = {"input_ids": tiny.ids(), "pixel_values": tiny.image(8)}
FAMILIES: dict[str, tuple[Callable[..., Any], Callable[[], Any], tuple[str, ...]]] = {
    "gpt2": (tiny.gpt2, tiny.ids, ("sdpa", "eager")),
    "gpt2-padded": (tiny.gpt2, lambda: tiny.padded("left"), ("sdpa", "eager")),
    "bert-padded": (tiny.bert, lambda: tiny.padded("right"), ("sdpa", "eager")),
    "llama": (tiny.llama, tiny.ids, ("sdpa", "eager")),
    "llama-padded": (tiny.llama, lambda: tiny.padded("left"), ("sdpa", "eager")),
    "t5": (tiny.t5, lambda: {**tiny.padded("right"), "decoder_input_ids": tiny.ids(5)}, ("sdpa", "eager")),
    "vit": (tiny.vit, lambda: tiny.image(16), ("sdpa", "eager")),
    "clip": (tiny.clip, lambda: WORDS_AND_IMAGE, ("sdpa", "eager")),
    "gpt-oss": (tiny.gpt_oss, tiny.ids, ("eager",)),
    "gemma2": (tiny.gemma2, tiny.ids, ("eager",)),
    "bloom-padded": (tiny.bloom, lambda: tiny.padded("left"), ("eager",)),
}
EACH = [pytest.param(*f[:2], how, id=f"{name}-{how}") for name, f in FAMILIES.items() for how in f[2]]
SELECTIONS: list[dict[str, Any]] = [
    {"capture": ("q", "weights")},
    {"capture": "mask"},
    {"layers": [-1]},
    {"layers": 0, "heads": [0, 1], "queries": [1]},
    {"heads": [0, 3]},
    {"heads": [2]},
    {"queries": slice(-1, None)},
    {"queries": [0, 2]},
    {"dtype": torch.float16},
    {"capture": ("q", "entropy", "top_k", "received", "first_mass")},
    {
        "capture": ("mean_distance", "weights", "lse"),
        "heads": [1, 2],
        "queries": slice(2, None),
        "dtype": torch.float16,
    },
]


def kept_bytes(trace: hookattn.Trace) -> int:
    """Every tensor that a trace holds, once; for this alone the tests look at where fields are."""
    found = {}
    for call in trace:
        for x in call.fields.values():
            x = x.given if isinstance(x, MaskRule) else x
            if isinstance(x, Tensor):
                found[id(x)] = x.nbytes
    return sum(found.values())


def check(model: nn.Module, inputs: Any, **options: Any) -> hookattn.MemoryPlan:
    before = state_of(model)
    told = hookattn.plan(model, inputs, **options)
    assert state_of(model) == before
    check_clean(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hookattn.UnfaithfulWarning)
        trace = hookattn.trace(model, inputs, **options)
    assert [(c.site.path, c.step, c.tap) for c in told.calls] == [(c.site.path, c.step, c.tap) for c in trace]
    for planned_call, call in zip(told.calls, trace, strict=True):
        kept = {n: tuple(x.shape) for n in call.fields if (x := call.get(n)) is not None}
        assert planned_call.shapes == kept
    assert told.total == sum(c.total for c in told.calls)
    # Without values nobody can tell a mask from a bias that was added; then what is told is enough.
    assert told.total >= kept_bytes(trace) if told.notes else told.total == kept_bytes(trace)
    return told


@pytest.mark.parametrize(("make", "inputs", "how"), EACH)
def test_what_transformers_keep(make: Callable[..., Any], inputs: Callable[[], Any], how: str) -> None:
    told = check(make(how), inputs())
    assert told.fits and told.in_memory == told.total and not told.advice and not told.notes


@pytest.mark.parametrize("options", SELECTIONS, ids=str)
@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_selections(options: dict[str, Any], how: str) -> None:
    check(tiny.llama(how), tiny.padded("left"), **options)


# A mask that was summed with a bias is told by its values, which a plan does not have: it counts the sum as a bias.
TOLD_BY_VALUES = {"swin_windows_table_and_shift_mask"}
BY_SHAPES = [case for case in CASES if case.name not in TOLD_BY_VALUES]


@pytest.mark.parametrize("case", BY_SHAPES, ids=[case.name for case in BY_SHAPES])
def test_attention_in_many_hands(case: Any) -> None:
    check(case.model(), case.inputs())


@pytest.mark.parametrize("train", [False, True])
def test_modules_of_torch(train: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    check(nn.TransformerEncoder(layer, 2).train(train), torch.randn(2, 5, 32))


def test_statistics_that_a_call_does_not_have() -> None:
    told = check(
        tiny.t5(), {"input_ids": tiny.ids(), "decoder_input_ids": tiny.ids(5)}, capture=("entropy", "mean_distance")
    )
    assert {(c.site.kind, *c.bytes) for c in told.calls} == {("self", "entropy", "mean_distance"), ("cross", "entropy")}


def test_half_precision_and_experts() -> None:
    config = transformers.MixtralConfig(**tiny.SMALL, **tiny.WORDS, num_key_value_heads=2, num_local_experts=2)
    check(tiny.from_config("MixtralForCausalLM", config), tiny.ids())
    check(tiny.llama().bfloat16(), tiny.ids())


class Recorded(nn.Module):
    """Attention that keeps and counts things, whose values must never become fake."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.norm = nn.BatchNorm1d(16)
        self.last: Any = None
        self.ran: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        """B T C -> B T C."""
        self.count += 1
        self.ran.append(x)
        self.last = q, k, v = self.qkv(x).chunk(3, -1)
        y = nn.functional.scaled_dot_product_attention(*(z[:, None] for z in (q, k, v)))[:, 0]
        return self.norm(y.transpose(1, 2)).transpose(1, 2)


def test_the_model_is_not_touched() -> None:
    model, heard = Recorded().train(), []
    model.register_forward_hook(lambda *_: heard.append(1))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 4, 16)
    hookattn.plan(model, x)
    assert model.last is None and not model.ran and not heard
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    check(Recorded(), x)


def test_a_cache_among_the_inputs_is_not_touched() -> None:
    model, cache = tiny.llama(), transformers.DynamicCache()
    with torch.no_grad():
        model(tiny.ids(5), past_key_values=cache)
    told = hookattn.plan(model, {"input_ids": tiny.ids(2), "past_key_values": cache})
    assert cache.get_seq_length() == 5
    assert told.calls[0].shapes["weights"] == (2, 4, 2, 7)


def test_no_attention_runs_on_values(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []

    class Spy(plan.ShapeRecorder):
        def keep(self, call: Any, *rest: Any) -> Any:
            kinds.append(type(call.q).__name__)
            return super().keep(call, *rest)

    monkeypatch.setattr(plan, "ShapeRecorder", Spy)
    hookattn.plan(tiny.gpt2(), tiny.ids())
    assert kinds == ["FakeTensor"] * 2


def test_a_model_that_never_had_weights() -> None:
    config = transformers.GPT2Config(n_layer=3, n_embd=64, n_head=4)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    told = hookattn.plan(model, torch.zeros(16, 1024, dtype=torch.long))
    assert told.total == 3 * (16 * 4 * 1024 * 4 * 16 * 4)
    assert sum(c.derived for c in told.calls) == 3 * (16 * 4 * 1024 * 2 * 1024 * 4 + 1024**2)
    assert (
        hookattn.plan(model, torch.zeros(16, 1024, dtype=torch.long), to="x").total
        == told.total + 3 * (16 * 4 * 1024 * 2 * 1024 * 4) + 1024**2
    ), "a file has it all, and a mask of all layers once"


def test_one_that_is_too_large_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.gpt2("eager"), tiny.ids(64)
    whole = hookattn.plan(model, inputs)
    lean = hookattn.plan(model, inputs, capture=[f for f in hookattn.FIELDS if f not in ("scores", "weights")])
    last = hookattn.plan(model, inputs, queries=slice(-1, None))
    room = lean.total + 1
    monkeypatch.setattr(plan, "free_memory", lambda device: room)
    monkeypatch.setattr(plan, "free_disk", lambda path: whole.total - 1)
    told = hookattn.plan(model, inputs)
    assert not told.fits
    assert [x.split(" ")[0].split("=")[0] for x in told.advice] == ["capture", "capture", "queries", "capture"]
    assert "does not fit" in repr(told) and size_of(last.total) in told.advice[-2]
    streamed = hookattn.plan(model, inputs, to="x.safetensors")
    assert not streamed.fits and streamed.free_disk == whole.total - 1
    monkeypatch.setattr(plan, "free_disk", lambda path: whole.total)
    monkeypatch.setattr(plan, "free_memory", lambda device: whole.total)
    assert hookattn.plan(model, inputs, to="x.safetensors").fits
    monkeypatch.setattr(plan, "free_memory", lambda device: 0)
    assert "none of the usual selections fits" in hookattn.plan(model, inputs).advice[0]


def test_what_a_file_takes(tmp_path: Path) -> None:
    model, path = tiny.gpt2(n_layer=6), tmp_path / "t.safetensors"
    told = hookattn.plan(model, tiny.ids(64), to=path)
    hookattn.trace(model, tiny.ids(64), to=path)
    assert told.total <= path.stat().st_size <= told.total + (1 << 20) + (1 << 16)  # and a header
    assert told.in_memory < told.total and told.free_disk is not None
    assert "free disk" in repr(told)


def test_the_table() -> None:
    text = repr(hookattn.plan(tiny.t5(), {"input_ids": tiny.ids(), "decoder_input_ids": tiny.ids(5)}))
    assert "encoder.block.0.layer.0.SelfAttention … encoder.block.1" in text
    assert "decoder cross" in text and "2×4×5×7" in text and text.splitlines()[-2].startswith("fits")
    assert text.splitlines()[-1].startswith("derived when read, and not held: ")


def test_bad_input() -> None:
    with pytest.raises(hookattn.ModelError, match="Routed cannot be planned: its forward needs values"):
        hookattn.plan(Routed().eval(), torch.randn(1, 3, 16))
    with pytest.raises(hookattn.NoAttentionError):
        hookattn.plan(nn.Linear(2, 2), torch.randn(1, 2))
    with pytest.raises(hookattn.SelectionError, match="there is no field"):
        hookattn.plan(tiny.gpt2(), tiny.ids(), capture="attention")
    with pytest.raises(hookattn.SelectionError, match="no layer 7"):
        hookattn.plan(tiny.gpt2(), tiny.ids(), layers=7)
    with pytest.raises(hookattn.SelectionError, match="no head 9"):
        hookattn.plan(tiny.gpt2(), tiny.ids(), heads=9)
    with pytest.raises(hookattn.InputError):
        hookattn.plan(Recorded(), {"wrong": 1})
    with pytest.raises(hookattn.ModelError, match=r"torch\.nn\.Module"):
        hookattn.plan("gpt2", tiny.ids())  # type: ignore[arg-type]
    locked = Recorded()
    locked.last = threading.Lock()
    with pytest.raises(hookattn.ModelError, match="cannot be copied"):
        hookattn.plan(locked, torch.randn(1, 3, 16))
    model = tiny.gpt2()
    with hookattn.tracing(model), pytest.raises(hookattn.ModelError, match="already running"):
        model(tiny.ids())
        hookattn.plan(model, tiny.ids())
    with pytest.raises(RuntimeError) as caught:
        hookattn.plan(Recorded(), torch.randn(1, 3, 17))
    assert "shapes alone" in caught.value.__notes__[0]
    check_clean(model)
