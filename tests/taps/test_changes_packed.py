"""What a listener changes reaches kernels that take B T H D, packed sequences or a cache, laid out as they have it."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookattn.attention.kernel_call import KernelCall
from hookattn.errors import EditError, ModelError
from hookattn.taps import Change
from hookattn.testing import check_clean
from tests.reference import draw, same_bits
from tests.standins import Flash2, Flash3, Give, dense, ends, give
from tests.taps.test_changes import Editor, attend, listening, louder
from tests.taps.test_varlen import Varlen
from tests.taps.test_xformers import LowerTriangularMask, Xformers

__all__ = ["give"]  # a fixture

B, H, G, T, S, D, E = 2, 4, 2, 3, 5, 8, 6
N_Q, N_K = (2, 0, 3), (4, 1, 5)


def loud(x: Tensor, dim: int = -2) -> Tensor:
    """Head 1 three times as large, in the kernel's own layout."""
    factor = torch.ones(x.shape[dim])
    factor[1] = 3
    return x * factor.view(-1, *(1,) * (-1 - dim))


@dataclass
class Site:
    """One way of calling one function.

    Attributes:
        function: the stand-in's holder, the module that it is in, and its name.
        given: its arguments by name.
        edits: what can be changed -> the same done by hand to the arguments.
    """

    function: tuple[type, str, str]
    given: dict[str, Any]
    edits: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)


def own(*names: str) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
    """q, k and v, each an argument by itself."""
    return {x: lambda given, n=n: {**given, n: loud(given[n])} for x, n in zip("qkv", names, strict=False)}  # type: ignore[misc]


def stacked(name: str, fields: str) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
    """Operands one beside the other, on the axis before the heads."""

    def one(given: dict[str, Any], i: int) -> dict[str, Any]:
        parts = list(given[name].unbind(-3))
        parts[i] = loud(parts[i])
        return {**given, name: torch.stack(parts, -3)}

    return {x: lambda given, i=i: one(given, i) for i, x in enumerate(fields)}  # type: ignore[misc]


def beside(given: dict[str, Any], start: int) -> dict[str, Any]:
    """Heads of q, k and v on one axis: H, G and G of them."""
    factor = torch.ones(H + 2 * G, 1)
    factor[start + 1] = 3
    return {**given, "qkv": given["qkv"] * factor}


def batched(g: int = G, s: int = S) -> dict[str, Any]:
    return {"q": draw(B, T, H, D, seed=1), "k": draw(B, s, g, D, seed=2), "v": draw(B, s, g, E, seed=3)}


def packed(n_q: tuple[int, ...] = N_Q, n_k: tuple[int, ...] = N_K, g: int = G) -> dict[str, Any]:
    return {"q": draw(sum(n_q), H, D, seed=1), "k": draw(sum(n_k), g, D, seed=2), "v": draw(sum(n_k), g, D, seed=3)}


LENGTHS = {"cu_seqlens_q": ends(N_Q), "cu_seqlens_k": ends(N_K), "max_seqlen_q": 3, "max_seqlen_k": 5, "causal": True}
PAGES = draw(7, 2, G, D, seed=5), draw(7, 2, G, D, seed=6)
TABLE = torch.tensor([[4, 0, 6], [1, 5, 2], [3, 3, 3]], dtype=torch.int32)
ANGLE = draw(9, D // 4, seed=6)
CACHE = {"q": draw(B, 2, H, D, seed=1), "k_cache": draw(4, 7, G, D, seed=2), "v_cache": draw(4, 7, G, D, seed=3)}
APPENDED = {
    **CACHE,
    "k": draw(B, 2, G, D, seed=4),
    "v": draw(B, 2, G, D, seed=5),
    "cache_seqlens": torch.tensor([3, 1], dtype=torch.int32),
    "causal": True,
}
FLASH2, FLASH3 = (Flash2, "flash_attn.flash_attn_interface"), (Flash3, "flash_attn_interface")
VARLEN, XFORMERS = (Varlen, "torch.nn.attention.varlen"), (Xformers, "xformers.ops.fmha")


class Writing:
    """A package whose function writes to a tensor of the caller's."""

    @staticmethod
    def flash_attn_func(q: Any, k: Any, v: Any, out: Any = None, return_lse: bool = False) -> Any:
        out.copy_(dense(q, k, v, None, False, None))
        return (out, torch.zeros(1)) if return_lse else out


def _varlen(n_q: tuple[int, ...] = N_Q, n_k: tuple[int, ...] = N_K) -> dict[str, Any]:
    names, tensors = ("query", "key", "value"), packed(n_q, n_k).values()
    return dict(zip(names, tensors, strict=True)) | {
        "cu_seq_q": ends(n_q),
        "cu_seq_k": ends(n_k),
        "max_q": max(n_q),
        "max_k": max(n_k),
    }


def _grouped_queries(groups: int, **more: Any) -> dict[str, Any]:
    k, v = (draw(B, S, 2, groups, D, seed=n).expand(-1, -1, -1, 3, -1) for n in (2, 3))
    return {"query": draw(B, T, 2, 3, D, seed=1), "key": k, "value": v, **more}


def _five(name: str, size: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Head 1 of groups of ``size``: of B L G R D."""
    return lambda given: {**given, name: loud(given[name].flatten(2, 3)).unflatten(2, (2, size))}


FIVE = {
    "q": _five("query", 3),
    # One key head stands for the three of its group.
    "k": lambda given: {**given, "key": loud(given["key"], -3)},
    "v": lambda given: {**given, "value": loud(given["value"], -3)},
}


SITES: dict[str, Site] = {
    "batched": Site((*FLASH2, "flash_attn_func"), batched() | {"causal": True, "softcap": 4.0}, own("q", "k", "v")),
    "batched, lse beside it": Site(
        (*FLASH2, "flash_attn_func"), batched() | {"return_attn_probs": True}, own("q", "k", "v")
    ),
    "stacked": Site(
        (*FLASH2, "flash_attn_qkvpacked_func"), {"qkv": draw(B, T, 3, H, D, seed=1)}, stacked("qkv", "qkv")
    ),
    "keys stacked": Site(
        (*FLASH2, "flash_attn_kvpacked_func"),
        {"q": draw(B, T, H, D, seed=1), "kv": draw(B, S, 2, G, D, seed=2)},
        own("q") | stacked("kv", "kv"),
    ),
    "packed": Site((*FLASH2, "flash_attn_varlen_func"), packed() | LENGTHS, own("q", "k", "v")),
    "packed and stacked": Site(
        (*FLASH2, "flash_attn_varlen_qkvpacked_func"),
        {"qkv": draw(5, 3, H, D, seed=1), "cu_seqlens": ends(N_Q), "max_seqlen": 3},
        stacked("qkv", "qkv"),
    ),
    "packed, keys stacked": Site(
        (*FLASH2, "flash_attn_varlen_kvpacked_func"),
        {"q": packed()["q"], "kv": draw(10, 2, G, D, seed=2)} | LENGTHS,
        own("q") | stacked("kv", "kv"),
    ),
    "packed, of which a part is used": Site(
        (*FLASH3, "flash_attn_varlen_func"),
        packed((3, 4), (4, 5))
        | {"cu_seqlens_q": ends((3, 4)), "cu_seqlens_k": ends((4, 5)), "max_seqlen_q": 4, "max_seqlen_k": 5}
        | {"seqused_q": torch.tensor((2, 3)), "seqused_k": torch.tensor((4, 2)), "causal": True},
        own("q", "k", "v"),
    ),
    "heads beside one another": Site(
        (*FLASH3, "flash_attn_qkvpacked_func"),
        {"qkv": draw(B, T, H + 2 * G, D, seed=1), "num_heads_q": H, "causal": True},
        {x: lambda given, n=n: beside(given, n) for x, n in zip("qkv", (0, H, H + G), strict=True)},  # type: ignore[misc]
    ),
    "pages": Site(
        (*FLASH2, "flash_attn_varlen_func"),
        packed() | LENGTHS | {"k": PAGES[0], "v": PAGES[1], "block_table": TABLE},
        own("q"),
    ),
    "a cache": Site((*FLASH2, "flash_attn_with_kvcache"), CACHE | {"cache_seqlens": 4, "causal": True}, own("q")),
    "a cache that is appended to": Site((*FLASH2, "flash_attn_with_kvcache"), APPENDED, own("q")),
    "a cache, rows in another order": Site(
        (*FLASH2, "flash_attn_with_kvcache"),
        APPENDED | {"cache_batch_idx": torch.tensor([3, 0]), "cache_leftpad": torch.tensor([2, 1])},
        own("q"),
    ),
    "a cache in pages": Site(
        (*FLASH2, "flash_attn_with_kvcache"),
        APPENDED | {"k_cache": PAGES[0], "v_cache": PAGES[1], "block_table": TABLE[:2], "return_softmax_lse": True},
        own("q"),
    ),
    "a cache that rotates": Site(
        (*FLASH2, "flash_attn_with_kvcache"), APPENDED | {"rotary_cos": ANGLE.cos(), "rotary_sin": ANGLE.sin()}
    ),
    "an output of the caller's": Site(
        (Writing, "writing.flash_attn_interface", "flash_attn_func"),
        batched() | {"out": torch.zeros(B, T, H, E)},
        own("q", "k", "v"),
    ),
    "an output of the caller's, lse beside it": Site(
        (Writing, "writing.flash_attn_interface", "flash_attn_func"),
        batched() | {"out": torch.zeros(B, T, H, E), "return_lse": True},
        own("q", "k", "v"),
    ),
    "varlen": Site((*VARLEN, "varlen_attn"), _varlen() | {"window_size": (-1, 0)}, own("query", "key", "value")),
    "varlen, pages": Site(
        (*VARLEN, "varlen_attn"),
        _varlen() | {"key": PAGES[0], "value": PAGES[1], "block_table": TABLE, "seqused_k": torch.tensor(N_K)},
        own("query"),
    ),
    "varlen, an output of the caller's": Site(
        (*VARLEN, "varlen_attn_out"), {"out": torch.zeros(5, H, D)} | _varlen(), own("query", "key", "value")
    ),
    "xformers": Site(
        (*XFORMERS, "memory_efficient_attention"),
        {"query": draw(B, T, H, D, seed=1), "key": draw(B, S, H, D, seed=2), "value": draw(B, S, H, E, seed=3)}
        | {"attn_bias": draw(B, H, T, S, seed=7)},
        own("query", "key", "value"),
    ),
    "xformers, hidden": Site(
        (*XFORMERS, "memory_efficient_attention_forward_requires_grad"),
        {"query": draw(B, T, H, D, seed=1), "key": draw(B, S, H, D, seed=2), "value": draw(B, S, H, E, seed=3)}
        | {"attn_bias": LowerTriangularMask()},
        own("query", "key", "value"),
    ),
    "xformers, groups": Site((*XFORMERS, "memory_efficient_attention"), _grouped_queries(1), FIVE),
    "xformers, groups with keys of their own": Site(
        (*XFORMERS, "memory_efficient_attention"),
        _grouped_queries(3),
        {x: _five(n, 3) for x, n in zip("qkv", ("query", "key", "value"), strict=True)},
    ),
}
FIELDS = [(name, x) for name, site in SITES.items() for x in site.edits]


class Model(nn.Module):
    """Calls a function with its arguments, which are the model's parameters where they are operands."""

    def __init__(self, function: Callable[..., Any], site: Site, train: bool = False):
        super().__init__()
        self.function = function
        self.given = dict(site.given)
        for name, x in self.given.items() if train else ():
            if type(x) is Tensor and x.is_floating_point() and name not in ("out", "k_cache", "v_cache"):
                self.given[name] = x.clone().requires_grad_()
        self.result: Any = None

    def leaves(self) -> list[Tensor]:
        return [x for x in self.given.values() if type(x) is Tensor and x.requires_grad]

    def forward(self, given: dict[str, Any] | None = None) -> Tensor:
        given = self.given if given is None else given
        # Written to in place: neither a leaf, nor the same for two runs.
        self.used = {n: x.clone() if n in ("out", "k_cache", "v_cache") else x for n, x in given.items()}
        self.result = self.function(**self.used)
        return self.result[0] if isinstance(self.result, tuple) else self.result


def make(give: Give, name: str, train: bool = False) -> Model:
    holder, module, function = SITES[name].function
    return Model(getattr(give(module, holder), function), SITES[name], train)


def check_same(model: Model, got: Tensor, expected: Tensor, used: dict[str, Any]) -> None:
    """Bit for bit: what is returned, and what is written to."""
    assert same_bits(got.nan_to_num(), expected.nan_to_num()) and got.shape == expected.shape
    for name in ("out", "k_cache", "v_cache"):
        if name in used:
            assert same_bits(model.used[name], used[name])


@pytest.mark.parametrize("name", SITES)
def test_a_listener_that_changes_nothing(give: Give, name: str) -> None:
    model, editor = make(give, name), Editor()
    expected, used = model(), model.used
    with listening(model, editor) as trace:
        got = model()
    check_same(model, got, expected, used)
    assert len(editor.asked) == len(editor.told) == len(trace.calls) == 1 and not editor.unasked
    assert editor.asked[0][2] == frozenset(SITES[name].edits)


@pytest.mark.parametrize(("name", "of"), FIELDS)
def test_the_kernel_gets_what_it_is_to_get(give: Give, name: str, of: str) -> None:
    """The same bits as with the argument changed by hand, so that the other heads are as they were, too."""
    model, site = make(give, name), SITES[name]
    plain, expected = model(), model(site.edits[of](model.given))
    used = model.used
    kept: list[KernelCall] = []

    def change(call: KernelCall) -> Change:
        kept.append(call)
        return Change(**{of: louder(getattr(call, of))})

    editor = Editor(change)
    with listening(model, editor) as trace:
        got = model()
    check_same(model, got, expected, used)
    assert not same_bits(got.nan_to_num(), plain.nan_to_num())
    (call,) = trace.calls
    assert call.certificate.faithful and not editor.unasked
    assert same_bits(getattr(call, of), louder(getattr(kept[0], of)))
    for other in {"q", "k", "v"} - {of}:
        assert same_bits(getattr(call, other), getattr(kept[0], other)), "what was asked about is what ran"
    check_clean(model)


def test_all_of_a_stacked_argument(give: Give) -> None:
    model = make(give, "stacked")
    with listening(model, Editor(lambda c: Change(louder(c.q), louder(c.k), louder(c.v)))):
        got = model()
    assert same_bits(got, model({"qkv": loud(model.given["qkv"])}))


@pytest.mark.parametrize("name", SITES)
def test_an_output_in_place_of_the_kernels(give: Give, name: str) -> None:
    """The model gets it, in what is returned and in what was to be written to; the record keeps the kernel's own."""
    model = make(give, name)
    plain, used, beside = model(), model.used, model.result
    five = plain.dim() == 5
    expected = loud(plain.flatten(2, 3)).view(plain.shape) if five else loud(plain)
    if "out" in used:
        used["out"] = expected
    editor = Editor(answer=lambda c: louder(c.output))  # type: ignore[arg-type]
    with listening(model, editor) as trace:
        got = model()
    check_same(model, got, expected, used)
    assert type(model.result) is type(beside)
    if isinstance(beside, tuple):
        assert len(model.result) == len(beside)
    if "out" in used:
        assert got is model.used["out"]
    (call,) = trace.calls
    assert call.certificate.faithful and len(editor.told) == 1 and not editor.unasked
    k, v = (x.double() for x in (call.k, call.v))
    if call.bias is None and call.softcap is None:
        mask = call.mask
        rows = (
            torch.ones(call.output.shape[:3], dtype=torch.bool)
            if mask is None
            else mask.any(-1).expand(call.output.shape[:3])
        )
        assert float((attend(call.q.double(), k, v, mask) - call.output)[rows].abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["pages", "a cache", "varlen, pages", "a cache that is appended to"])
def test_a_models_cache_is_not_written_to(give: Give, name: str) -> None:
    model = make(give, name)
    for of in ("k", "v"):
        with (
            pytest.raises(ModelError, match=f"a changed {of} cannot be handed to its kernel"),
            listening(model, Editor(lambda c, of=of: Change(**{of: getattr(c, of)}))),  # type: ignore[misc]
        ):
            model()
    check_clean(model)


def test_a_rotated_query_cannot_be_exchanged(give: Give) -> None:
    model = make(give, "a cache that rotates")
    with (
        pytest.raises(ModelError, match="a changed q cannot be handed"),
        listening(model, Editor(lambda c: Change(q=c.q))),
    ):
        model()


@pytest.mark.parametrize("name", ["packed", "batched", "xformers"])
def test_another_shape_is_an_error(give: Give, name: str) -> None:
    model = make(give, name)
    for listener in (
        Editor(lambda c: Change(q=c.q[:, :1])),
        Editor(lambda c: Change(k=c.k[:, :, :1])),
        Editor(answer=lambda c: c.output[..., :1]),  # type: ignore[index]
    ):
        with pytest.raises(EditError, match="of shape"), listening(model, listener):
            model()
    check_clean(model)


@pytest.mark.parametrize(
    "name",
    [
        "batched",
        "stacked",
        "keys stacked",
        "packed",
        "heads beside one another",
        "varlen",
        "xformers",
        "xformers, groups with keys of their own",
    ],
)
@pytest.mark.parametrize("of", ["q", "k", "v", "output"])
def test_gradients_go_through_what_was_changed(give: Give, name: str, of: str) -> None:
    """To the model's operands, and to a gate of the listener's, as with the argument changed by hand."""
    model, site = make(give, name, train=True), SITES[name]
    gate = torch.tensor(3.0, requires_grad=True)

    def gated(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], gate * x[:, 1:2], x[:, 2:]], 1)

    editor = Editor()
    if of == "output":
        editor.answer = lambda c: gated(c.output)  # type: ignore[arg-type]
    else:
        editor.change = lambda c: Change(**{of: gated(getattr(c, of))})
    with listening(model, editor):
        got = torch.autograd.grad(model().square().sum(), [gate, *model.leaves()])
    if of == "output":
        out = model()
        hand = loud(out.flatten(2, 3) if out.dim() == 5 else out)
    else:
        hand = model(site.edits[of](model.given))
    expected = torch.autograd.grad(hand.square().sum(), model.leaves())
    for a, b in zip(got[1:], expected, strict=True):
        assert float((a - b).abs().max()) < 1e-5 and float(b.abs().max()) > 1e-3
    step = 1e-2
    with torch.no_grad():
        ends_at = []
        for value in (3 + step, 3 - step):
            gate.fill_(value)
            with listening(model, editor):
                ends_at.append(float(model().double().square().sum()))
    assert float(got[0]) == pytest.approx((ends_at[0] - ends_at[1]) / (2 * step), rel=1e-2)


def test_what_is_not_understood_is_missed(give: Give) -> None:
    class Strange:
        @staticmethod
        def flash_attn_func(q: Any, k: Any, v: Any, tree: Any = None) -> Any:
            return dense(q, k, v, None, False, None)

    function, editor = give("strange.flash_attn_interface", Strange).flash_attn_func, Editor()
    model = Model(function, Site((Strange, "", ""), batched() | {"tree": torch.ones(1)}))
    with listening(model, editor):
        model()
    ((_, reason),) = editor.unasked
    assert "argument tree is not known" in reason and not editor.asked and not editor.told


def test_dropout_is_of_the_changed_arguments(give: Give) -> None:
    """What the certificate is measured against is run with the changed q, too."""
    module = give("flash_attn.flash_attn_interface", Flash2)
    model = Model(module.flash_attn_func, Site((Flash2, "", ""), batched() | {"dropout_p": 0.4}))
    torch.manual_seed(0)
    with listening(model, Editor(lambda c: Change(q=louder(c.q)))) as trace:
        got = model()
    torch.manual_seed(0)
    assert same_bits(got, model({**model.given, "q": loud(model.given["q"])}))
    assert trace.calls[0].certificate.faithful and "without dropout" in trace.calls[0].certificate.basis


def test_functions_made_of_each_other_are_asked_about_once(give: Give) -> None:
    inner: types.ModuleType = give("flash_attn.flash_attn_interface", Flash2)

    class Outer:
        @staticmethod
        def flash_attn_func(q: Any, k: Any, v: Any, causal: bool = False) -> Any:
            import sys

            return sys.modules["flash_attn.flash_attn_interface"].flash_attn_func(q, k, v, causal=causal)

    function = give("outer.flash_attn_interface", Outer).flash_attn_func
    model, editor = Model(function, Site((Outer, "", ""), batched())), Editor(lambda c: Change(q=louder(c.q)))
    with listening(model, editor):
        got = model()
    given = {**model.given, "q": loud(model.given["q"])}
    assert same_bits(got, inner.flash_attn_func(**given)) and len(editor.asked) == len(editor.told) == 1
