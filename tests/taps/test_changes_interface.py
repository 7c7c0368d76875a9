"""Implementations of the transformers interface whose kernel no tap sees: changed by the interface's own arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hookattn.errors import EditError, ModelError
from hookattn.taps import Change
from hookattn.testing import check_clean
from tests.reference import causal, draw, same_bits
from tests.standins import Flash2, Give, give
from tests.taps.test_changes import EXACT, Edit, Editor, attend, cut, listening, louder, slope

__all__ = ["give"]  # a fixture

transformers = pytest.importorskip("transformers")

from transformers import modeling_utils  # noqa: E402

KNOWN = modeling_utils.ALL_ATTENTION_FUNCTIONS
T, S = 5, 7


def unseen(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, dropout: float = 0.0, **given: Any
) -> tuple[Tensor, None]:
    """Attention of which no operation can be watched."""
    runs.append(1)
    with torch._C.DisableTorchFunction():
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * scaling
        bias = given.get("position_bias")
        scores = scores if bias is None else scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return (F.dropout(scores.softmax(-1), dropout) @ v).transpose(1, 2), None


def alone(*args: Any, **kwargs: Any) -> Tensor:
    """The same, that returns no tuple."""
    return unseen(*args, **kwargs)[0]


runs: list[int] = []


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    functions: dict[str, Callable[..., Any]] = {"unseen": unseen, "alone": alone, "flash_unseen": unseen}
    for name, function in functions.items():
        transformers.AttentionInterface.register(name, function)
    yield
    for name in functions:
        del transformers.AttentionInterface._global_mapping[name]


class Asks(nn.Module):
    """Grouped attention by an implementation of the interface, over more keys than queries."""

    def __init__(self, name: str, mask: Tensor | None = None, groups: int = 4, **given: Any):
        super().__init__()
        torch.manual_seed(1)
        self.name, self.mask, self.given, self.groups = name, mask, given, groups
        self.query, self.pair, self.out = nn.Linear(16, 32), nn.Linear(16, 2 * groups * 8), nn.Linear(32, 16)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.query(x[:, :T]).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = self.pair(x).unflatten(-1, (2, self.groups, 8)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def finish(self, z: Tensor) -> Tensor:
        return self.out(z.flatten(2)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        function = KNOWN.get_interface(self.name, unseen)
        out = function(self, *self.operands(x), self.mask, scaling=0.4, is_causal=False, **self.given)
        return self.finish(out[0] if isinstance(out, tuple) else out)


HIDES = torch.ones(2, 1, T, S, dtype=torch.bool)
HIDES[1, :, :, 0] = False
ADDED = draw(1, 4, T, S, seed=8, dtype=torch.float64)
LOWEST = torch.finfo(torch.float64).min
MASKS: dict[str, tuple[Tensor | None, Tensor | None, Tensor | None]] = {
    "none": (None, None, None),
    "bool": (HIDES, HIDES, None),
    "added": (ADDED, None, ADDED),
    "added, hides": (torch.where(HIDES, ADDED, LOWEST), HIDES, ADDED),
}
EDITS = [
    Edit("q", lambda c: Change(q=louder(c.q)), lambda q, k, v, m, b: (louder(q), k, v, m, b)),
    Edit("k", lambda c: Change(k=louder(c.k)), lambda q, k, v, m, b: (q, louder(k), v, m, b)),
    Edit("v", lambda c: Change(v=louder(c.v)), lambda q, k, v, m, b: (q, k, louder(v), m, b)),
    Edit(
        "mask",
        lambda c: Change(mask=cut(T, S) if c.mask is None else c.mask & cut(T, S)),
        lambda q, k, v, m, b: (q, k, v, cut(T, S) if m is None else m & cut(T, S), b),
    ),
    Edit("bias", lambda c: Change(bias=slope(T, S)), lambda q, k, v, m, b: (q, k, v, m, slope(T, S))),
    Edit(
        "k and mask",
        lambda c: Change(k=louder(c.k), mask=cut(T, S) if c.mask is None else c.mask & cut(T, S)),
        lambda q, k, v, m, b: (q, louder(k), v, cut(T, S) if m is None else m & cut(T, S), b),
    ),
]
CHANGEABLE = {
    "none": {"q", "k", "v"},
    "bool": {"q", "k", "v", "mask"},
    "added": {"q", "k", "v", "mask", "bias"},
    "added, hides": {"q", "k", "v", "mask", "bias"},
}


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.name)
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["unseen", "alone"])
def test_the_implementation_gets_what_it_is_to_get(name: str, mask: str, groups: int, edit: Edit) -> None:
    own, hides, bias = MASKS[mask]
    model, x = Asks(name, own, groups).double(), draw(2, S, 16, seed=4, dtype=torch.float64)
    editor = Editor(edit.change)
    needs = set(edit.name.split(" and "))
    if not needs <= CHANGEABLE[mask]:
        with (
            pytest.raises(ModelError, match=r"cannot be handed to its kernel \(tap interface:"),
            listening(model, editor),
        ):
            model(x)
        check_clean(model)
        return
    with torch.no_grad():
        plain = model(x)
        with listening(model, editor) as trace:
            got = model(x)
        q, k, v, hides, bias = edit.by_hand(*model.operands(x), hides, bias)
        expected = model.finish(attend(q, k, v, hides, bias, 0.4).transpose(1, 2))
    assert float((got - expected).abs().max()) < EXACT and float((plain - expected).abs().max()) > 1e-3
    (call,) = trace.calls
    assert call.certificate.faithful and call.tap == f"interface:{name}" and torch.equal(call.k, k)
    assert len(editor.asked) == len(editor.told) == 1 and not editor.unasked
    assert editor.asked[0][2] == CHANGEABLE[mask]
    check_clean(model)


@pytest.mark.parametrize("same", [lambda c: None, lambda c: Change()], ids=["nothing", "a change of nothing"])
@pytest.mark.parametrize("name", ["unseen", "alone", "flash_unseen"])
def test_a_listener_that_changes_nothing(name: str, same: Any) -> None:
    model, x, editor = Asks(name), draw(2, S, 16, seed=4), Editor(same)
    expected = model(x)
    runs.clear()
    with listening(model, editor):
        got = model(x)
    assert same_bits(got, expected) and len(runs) == len(editor.asked) == len(editor.told) == 1 and not editor.unasked


@pytest.mark.parametrize("name", ["unseen", "alone", "flash_unseen"])
def test_an_output_in_place_of_the_kernels(name: str) -> None:
    model, x = Asks(name, groups=2).double(), draw(2, S, 16, seed=4, dtype=torch.float64)
    with torch.no_grad():
        with listening(model, Editor(answer=lambda c: louder(c.output))) as trace:  # type: ignore[arg-type]
            got = model(x)
        z = attend(*model.operands(x), scale=0.4)
        assert float((got - model.finish(louder(z).transpose(1, 2))).abs().max()) < EXACT
    assert trace.calls[0].certificate.faithful and torch.allclose(trace.calls[0].output, z, atol=EXACT)
    with (
        pytest.raises(EditError, match="a changed output of shape"),
        listening(model, Editor(answer=lambda c: c.q[:1])),
    ):
        model(x)
    check_clean(model)


@pytest.mark.parametrize("heads", [None, (2,)])
@pytest.mark.parametrize("queries", [None, (1, 4)])
def test_a_mask_for_some_heads_and_rows(heads: Any, queries: Any) -> None:
    """All others are as the implementation had them, to the bit."""
    model, x = Asks("unseen", HIDES).double(), draw(2, S, 16, seed=4, dtype=torch.float64)
    kept: list[Tensor] = []
    with torch.no_grad():
        model(x)
        q, k, v = model.operands(x)
        plain = unseen(model, q, k, v, HIDES, 0.4)[0]
        touched = torch.zeros(4, T, dtype=torch.bool)
        touched[torch.tensor(heads or range(4))[:, None], torch.tensor(queries or range(T))] = True
        mask = HIDES & (cut(T, S) & (torch.arange(S) != 2) | ~touched[None, :, :, None])
        change = Change(mask=mask, heads=heads, queries=queries)
        with listening(model, Editor(lambda c: change, lambda c: kept.append(c.output.clone()))) as trace:  # type: ignore[func-returns-value, union-attr]
            model(x)
        changed = attend(q, k, v, mask, None, 0.4)
    got = kept[0]
    assert same_bits(got[:, ~touched], plain.transpose(1, 2)[:, ~touched])
    assert float((got - changed)[:, touched].abs().max()) < EXACT
    assert float((got - plain.transpose(1, 2))[:, touched].abs().max()) > 1e-3
    assert len(trace.calls) == 1


@pytest.mark.filterwarnings("ignore::hookattn.UnfaithfulWarning")
def test_dropout_draws_what_it_drew() -> None:
    """The second run drops what the first one dropped, and what is drawn afterwards is what would have been."""
    model, x = Asks("unseen", dropout=0.4).double(), draw(2, S, 16, seed=4, dtype=torch.float64)
    with torch.no_grad():
        for change in (lambda c: Change(v=louder(c.v)), lambda c: None):
            torch.manual_seed(0)
            q, k, v = model.operands(x)
            z = unseen(model, q, k, louder(v) if change(KEPT) else v, None, 0.4, 0.4)[0]
            expected = model.finish(z), torch.rand(1)
            torch.manual_seed(0)
            # What its kernel returned without dropout nobody knows.
            with listening(model, Editor(change), strict=False):
                got = model(x), torch.rand(1)
            assert same_bits(got, expected)


class _Kept:
    v = torch.zeros(1, 2, 1, 1)


KEPT: Any = _Kept()


@pytest.mark.parametrize("of", ["q", "k", "v", "mask", "output"])
def test_gradients_go_through_what_was_changed(of: str) -> None:
    bias = nn.Parameter(draw(1, 4, T, S, seed=8, dtype=torch.float64))
    gate = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    model = Asks("unseen", torch.where(HIDES, bias, LOWEST)).double()
    x = draw(2, S, 16, seed=4, dtype=torch.float64)

    def gated(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], gate * x[:, 1:2], x[:, 2:]], 1)

    editor = Editor()
    if of == "output":
        editor.answer = lambda c: gated(c.output)  # type: ignore[arg-type]
    elif of == "mask":
        editor.change = lambda c: Change(q=gated(c.q), mask=c.mask & cut(T, S))  # type: ignore[operator]
    else:
        editor.change = lambda c: Change(**{of: gated(getattr(c, of))})
    leaves = [gate, bias, *model.parameters()]
    with listening(model, editor):
        got = torch.autograd.grad(model(x).square().sum(), leaves, retain_graph=True)
    given = dict(zip("qkv", model.operands(x), strict=True))
    if of in given:
        given[of] = gated(given[of])
    if of == "mask":
        given["q"] = gated(given["q"])
    z = attend(**given, mask=HIDES & cut(T, S) if of == "mask" else HIDES, bias=bias, scale=0.4)
    z = gated(z) if of == "output" else z
    expected = torch.autograd.grad(model.finish(z.transpose(1, 2)).square().sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).abs().max()) < EXACT * 100 and float(b.abs().max()) > 1e-3


def test_explicit_math_on_the_call_has_the_gradient_of_a_learned_bias() -> None:
    """Weights that are changed are computed anew of what ``after`` is told."""
    bias = nn.Parameter(draw(1, 4, T, S, seed=8, dtype=torch.float64))
    for given in ({"mask": bias}, {"position_bias": bias}):
        model = Asks("unseen", **given).double()  # type: ignore[arg-type]
        x = draw(2, S, 16, seed=4, dtype=torch.float64)
        editor = Editor(answer=lambda c: attend(c.q, c.k, c.v, c.mask, c.bias, 0.4))  # type: ignore[arg-type]
        leaves = [bias, *model.parameters()]
        with listening(model, editor):
            got = torch.autograd.grad(model(x).square().sum(), leaves)
        expected = torch.autograd.grad(model(x).square().sum(), leaves)
        for a, b in zip(got, expected, strict=True):
            assert float((a - b).abs().max()) < EXACT * 100 and float(b.abs().max()) > 1e-3
        assert ("bias" in editor.asked[0][2]) == ("mask" in given)


@pytest.mark.parametrize("how", ["alone", "mode open"])
@pytest.mark.parametrize("of", ["q", "k", "v", "mask", "output"])
def test_one_token_with_grouped_heads_in_the_rows_of_a_query(how: str, of: str) -> None:
    """What sdpa is given there is not what the model has: the interface's own arguments are changed."""
    from tests import tiny_models as tiny

    model = tiny.llama().double()
    host: nn.Module = model if how == "alone" else nn.Sequential(model, nn.MultiheadAttention(8, 2))
    forward = (lambda **given: host[0](**given)) if how == "mode open" else host
    given = tiny.padded("left")
    keep = given["attention_mask"]

    def cut_last(mask: Tensor) -> Tensor:
        mask = mask.clone()
        mask[..., -1:, 3] = False
        return mask

    def edit(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            louder(q) if of == "q" else q,
            louder(k) if of == "k" else k,
            louder(v) if of == "v" else v,
            cut_last(m) if of == "mask" else m,
        )

    def by_hand(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any) -> Any:
        mask = mask if mask is not None else causal(q.shape[2])[None, None]
        mask = mask if mask.dtype == torch.bool else mask == 0
        if q.shape[2] == 1 and module.layer_idx == 1:
            q, k, v, mask = edit(q, k, v, mask)
        z = attend(q, k, v, mask, None, more["scaling"])
        if q.shape[2] == 1 and module.layer_idx == 1 and of == "output":
            z = louder(z)
        return z.nan_to_num().transpose(1, 2), None

    def run() -> Tensor:
        first = forward(**given, use_cache=True)
        mask = torch.cat([keep, keep.new_ones(len(keep), 1)], 1)
        token = torch.full((len(keep), 1), 7)
        return forward(input_ids=token, attention_mask=mask, past_key_values=first.past_key_values).logits  # type: ignore[no-any-return]

    def change(call: Any) -> Change | None:
        if call.q.shape[2] > 1 or of == "output":
            return None
        return Change(mask=cut_last(call.mask)) if of == "mask" else Change(**{of: louder(getattr(call, of))})

    editor = Editor(change, layer=1)
    if of == "output":
        editor.answer = lambda c: louder(c.output) if c.q.shape[2] == 1 else None  # type: ignore[arg-type]
    with torch.no_grad():
        plain = run()
        with listening(host, editor) as trace:
            got = run()
        transformers.AttentionInterface.register("by_hand", by_hand)
        transformers.AttentionMaskInterface.register("by_hand", transformers.masking_utils.sdpa_mask)
        try:
            model.set_attn_implementation("by_hand")
            expected = run()
        finally:
            model.set_attn_implementation("sdpa")
            del transformers.AttentionInterface._global_mapping["by_hand"]
            del transformers.AttentionMaskInterface._global_mapping["by_hand"]
    assert float((got - expected).abs().max()) < 1e-10 * float(expected.abs().max())
    assert float((plain - expected).abs().max()) > 1e-5
    assert not editor.unasked and len(editor.asked) == len(editor.told) == 4
    last = [(tap, fields) for (_, tap, fields) in editor.asked][2:]
    if how == "alone":
        assert last == [("interface:sdpa", frozenset({"q", "k", "v", "mask"}))] * 2
    assert all(c.certificate.faithful for c in trace.calls)


def test_what_nobody_has_said_of_a_mask_cannot_be_changed() -> None:
    """Flash kernels hide by themselves; and a bias that is the sum of two arguments is no one argument's."""
    x, bias = draw(2, S, 16, seed=4, dtype=torch.float64), draw(1, 4, T, S, seed=9, dtype=torch.float64)
    for model, expected in (
        (Asks("flash_unseen", ADDED), {"q", "k", "v"}),
        (Asks("unseen", ADDED[:, 0, :1]), {"q", "k", "v"}),
        (Asks("unseen", ADDED, position_bias=bias), {"q", "k", "v", "mask"}),
    ):
        editor = Editor()
        with listening(model.double(), editor, strict=False):
            model(x)
        assert editor.asked[0][2] == expected
    model = Asks("unseen", ADDED, position_bias=bias).double()
    with torch.no_grad(), listening(model, Editor(lambda c: Change(mask=cut(T, S)))):
        got = model(x)
    expected_output = model.finish(attend(*model.operands(x), cut(T, S), ADDED + bias, 0.4).transpose(1, 2))
    assert float((got - expected_output).detach().abs().max()) < EXACT


def test_the_second_run_is_seen_by_nobody(give: Give) -> None:
    """Whatever kernel it finds for what is changed: the one call has been asked about."""
    flash = give("flash_attn.flash_attn_interface", Flash2).flash_attn_func

    def either(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> Any:
        if float(q[0, 1].abs().max()) < 100:
            return unseen(module, q, k, v, mask, **given)
        return flash(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=given["scaling"]), None

    transformers.AttentionInterface.register("either", either)
    try:
        model, x = Asks("either").double(), draw(2, S, 16, seed=4, dtype=torch.float64)
        editor = Editor(lambda c: Change(q=c.q * 1e4))
        with torch.no_grad(), listening(model, editor, strict=False) as trace:
            model(x)
    finally:
        del transformers.AttentionInterface._global_mapping["either"]
    assert len(editor.asked) == len(editor.told) == len(trace.calls) == 1 and not editor.unasked
