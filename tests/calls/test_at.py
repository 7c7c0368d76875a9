"""``call.at``: a part of a call has the numbers of that part, in its time and memory, wherever the fields are."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn import FieldNotCaptured, SelectionError
from hookattn.calls import deriving
from hookattn.calls.call import Call
from tests.reference import draw

B, H, G, T, S, D = 2, 6, 3, 7, 9, 4


class Attends(nn.Module):
    """Grouped heads, a bias of each head and a mask of each batch entry."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)


class Eager(nn.Module):
    """The same by hand, so that scores and weights are the model's own."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
        return (q @ k.mT * D**-0.5 + bias).softmax(-1) @ v


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = draw(1, H, T, S, seed=4).repeat(B, 1, 1, 1)
    bias[1, :, :, -2:] = -math.inf
    return draw(B, H, T, D, seed=1), draw(B, G, S, D, seed=2), draw(B, G, S, D, seed=3), bias


def reference() -> dict[str, Tensor]:
    """Every field in float64, by arithmetic of this test's own."""
    q, k, v, bias = (x.double() for x in inputs())
    products = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(H // G, 1)) / math.sqrt(D)
    weights = (products + bias).softmax(-1)
    return {
        "q": q,
        "k": k,
        "v": v,
        "bias": bias.masked_fill(bias == -math.inf, 0.0),
        "scores": products + bias.masked_fill(bias == -math.inf, 0.0),
        "mask": (bias > -math.inf)[:, :1],
        "weights": weights,
        "output": torch.einsum("bhts,bhse->bhte", weights, v.repeat_interleave(H // G, 1)),
    }


def in_memory(model: nn.Module, path: Path) -> Call:
    return hookattn.trace(model, inputs())[0]


def loaded(model: nn.Module, path: Path) -> Call:
    return hookattn.load(hookattn.trace(model, inputs()).save(path))[0]


def compact(model: nn.Module, path: Path) -> Call:
    return hookattn.load(hookattn.trace(model, inputs()).save(path, compact=True))[0]


def streamed(model: nn.Module, path: Path) -> Call:
    return hookattn.trace(model, inputs(), to=path)[0]


def part_of_a_part(model: nn.Module, path: Path) -> Call:
    return hookattn.trace(model, inputs())[0].at()


WHERE: dict[str, Callable[[nn.Module, Path], Call]] = {
    f.__name__: f for f in (in_memory, loaded, compact, streamed, part_of_a_part)
}
PARTS: list[tuple[Any, Any, Any]] = [  # heads, queries, batch
    (None, None, None),
    (3, None, None),
    (-1, -1, 0),
    ([4, 1], None, None),
    ([5, 4, 0], [6, 2], 1),
    (range(0, 6, 2), slice(-3, None), None),
    (slice(2, 4), slice(None, None, 3), -1),
    (None, [3], [1, 0]),
]


def positions(wanted: Any, n: int) -> list[int]:
    if wanted is None:
        return list(range(n))
    if isinstance(wanted, slice):
        return list(range(n))[wanted]
    return [i % n for i in ([wanted] if isinstance(wanted, int) else wanted)]


@pytest.mark.parametrize("model", [Attends, Eager])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("part", PARTS, ids=str)
def test_a_part_has_the_numbers_of_that_part(part: Any, where: str, model: type[nn.Module], tmp_path: Path) -> None:
    call = WHERE[where](model(), tmp_path / "x.safetensors")
    heads, queries, batch = part
    found = call.at(heads=heads, queries=queries, batch=batch)
    h, t, b = positions(heads, H), positions(queries, T), positions(batch, B)
    groups = sorted({i // (H // G) for i in h})
    for name, whole in reference().items():
        got = found.get(name)
        assert got is not None, name
        axis = groups if name in ("k", "v") else h
        want = whole[b][:, axis if whole.shape[1] > 1 else [0]]
        want = want if name in ("k", "v") else want[:, :, t]
        if name == "mask":
            got = got.expand(len(b), 1, len(t), S) if got.shape[1] == 1 else got[:, :1]
        torch.testing.assert_close(got.double(), want.double(), atol=1e-5, rtol=0)
    assert found.certificate == call.certificate and found.certificate.faithful
    assert (found.site, found.step, found.index) == (call.site, call.step, call.index)
    assert list(found.heads or range(H)) == h and list(found.queries or range(T)) == t
    assert (found.of_queries or T) == T
    again = found.at(heads=h[-1], queries=t[0], batch=0)  # by the numbers of the model, not by those of the part
    want = reference()["weights"][b[:1]][:, h[-1:]][:, :, t[:1]]
    torch.testing.assert_close(again.weights.double(), want, atol=1e-5, rtol=0)


def test_what_was_selected_is_cut_further() -> None:
    call = hookattn.trace(Attends(), inputs(), heads=[5, 2, 0], queries=[6, 1, 3])[0]
    weights = reference()["weights"]
    part = call.at(heads=[0, 5], queries=3)
    torch.testing.assert_close(part.weights.double(), weights[:, [0, 5]][:, :, [3]], atol=1e-5, rtol=0)
    assert part.heads == (0, 5) and part.queries == (3,) and part.of_queries == T
    for bad, text in (({"heads": 1}, "kept heads 5, 2, 0, so there is none at 1"), ({"queries": 2}, "queries 6, 1, 3")):
        with pytest.raises(SelectionError, match=text):
            call.at(**bad)


def test_a_part_is_derived_as_that_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    derive = deriving.derive

    def counted(q: Tensor, k: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return derive(q, k, *args, **options)

    monkeypatch.setattr(deriving, "derive", counted)
    call = hookattn.trace(Attends(), inputs())[0]
    part = call.at(heads=2, queries=slice(-1, None), batch=1)
    assert not sizes and part.shape == f"B1 H1 T1 S{S}" and not sizes
    _ = part.weights, part.scores, part.weights
    assert sizes == [S, S], "once each, of one row"
    _ = call.weights
    assert sizes[2:] == [B * H * T * S]


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"heads": H}, "has heads 0, 1, 2, 3, 4, 5, so there is none at 6"),
        ({"heads": []}, "and none is selected"),
        ({"heads": [1, 1]}, "each of the heads once"),
        ({"queries": -8}, "there is none at -8"),
        ({"queries": slice(7, None)}, "and none is selected"),
        ({"batch": 2}, "has batch entries 0, 1, so there is none at 2"),
        ({"heads": "1"}, "expected an int, a slice or several ints"),
        ({"batch": 0.5}, "expected an int, a slice or several ints"),
    ],
)
def test_what_is_not_there(part: dict[str, Any], text: str) -> None:
    call = hookattn.trace(Attends(), inputs())[0]
    with pytest.raises(SelectionError, match=text):
        call.at(**part)


def test_what_nobody_knows_the_extents_of() -> None:
    call = hookattn.trace(Attends(), inputs(), capture=("k",))[0]
    assert torch.equal(call.at(batch=1).k, inputs()[1][1:])
    with pytest.raises(FieldNotCaptured, match="tells how many queries it has"):
        call.at(queries=0)


def test_statistics_of_a_part() -> None:
    call = hookattn.trace(Attends(), inputs(), capture=("entropy", "received", "top_k"))[0]
    part = call.at(heads=[4, 0], queries=slice(2, 5), batch=1)
    for name, x in ((n, call.get(n)) for n in call.fields):
        assert x is not None
        want = x[1:, [4, 0]]
        assert torch.equal(part.get(name), want if name == "received" else want[:, :, 2:5]), name  # type: ignore[arg-type]


def test_a_scale_of_each_head_and_sinks() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(0.2, 0.7, H).view(1, H, 1, 1))
            self.sinks = nn.Parameter(torch.linspace(-1, 1, H))

        def forward(self, x: Tensor) -> Tensor:
            scores = x @ x.mT * self.scale
            sinks = self.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ x

    model, x = Scaled(), draw(B, H, T, D, seed=1)
    call = hookattn.trace(model, x)[0]
    wide = x.double()
    scores = wide @ wide.mT * model.scale.double()
    sinks = model.sinks.double().view(1, -1, 1, 1)
    weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + sinks.exp())
    part = call.at(heads=[5, 1], queries=[0, 6])
    torch.testing.assert_close(part.weights.double(), weights[:, [5, 1]][:, :, [0, 6]].detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(part.scores.double(), scores[:, [5, 1]][:, :, [0, 6]].detach(), atol=1e-5, rtol=0)


def test_a_part_of_a_file_reads_that_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hookattn.store import reader

    call = loaded(Eager(), tmp_path / "x.safetensors")
    read: list[int] = []
    slices = reader.LazyFile.slice

    def counted(self: Any, name: str, index: Any) -> Tensor:
        found = slices(self, name, index)
        read.append(found.numel())
        return found

    monkeypatch.setattr(reader.LazyFile, "slice", counted)
    assert call.at(heads=3, batch=1).weights.shape == (1, 1, T, S)
    assert read == [T * S]
