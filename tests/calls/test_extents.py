"""How large a call is, from whatever was kept of it, and which key head each query head reads."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn import Call, Site
from hookattn.attention.kernel_call import FIELD_SPECS, FIELDS
from hookattn.calls.extents import Extents, evenly_grouped, extents_of, kernel_queries, key_heads, per_query_head
from hookattn.calls.fields import Field, Later
from hookattn.store import LazyFile

B, H, G, T, S, D, E = 2, 4, 2, 3, 5, 8, 6
SIZES = {"B": B, "H": H, "G": G, "T": T, "S": S, "D": D, "E": E, "1": 1}
WHOLE = {
    name: torch.zeros([SIZES[x] for x in spec.axes], dtype=torch.bool if spec.boolean else None)
    for name, spec in FIELD_SPECS.items()
}


def call(**given: Any) -> Call:
    fields: dict[str, Field] = {n: x for n, x in given.items() if x is None or isinstance(x, (Tensor, Later))}
    rest = {name: x for name, x in given.items() if name not in fields}
    return Call(Site("a"), 0, 0, "tap", torch.float32, 1.0, fields=fields, **rest)


@pytest.mark.parametrize("names", [names for n in (1, 2, 3) for names in combinations(FIELDS, n)], ids="-".join)
def test_every_letter_that_a_field_has_is_known_from_it(names: tuple[str, ...]) -> None:
    expected = {x: SIZES[x] for x in "BHGTSDE" if any(x in FIELD_SPECS[name].axes for name in names)}
    found = extents_of(call(**{name: WHOLE[name] for name in names}))
    assert found.known() == expected
    assert Extents(*(expected.get(x) for x in "BHGTSDE")) == found


@pytest.mark.parametrize("name", [name for name, spec in FIELD_SPECS.items() if spec.broadcast])
def test_an_axis_of_size_one_of_a_field_that_may_be_broadcast_says_nothing(name: str) -> None:
    one = torch.zeros(1, 1, 1, 1)
    assert extents_of(call(**{name: one})).known() == {}
    known = extents_of(call(**{name: one, "q": WHOLE["q"], "k": WHOLE["k"]})).known("BHTS")
    assert known == {"B": B, "H": H, "T": T, "S": S}


def test_fewer_axes_are_the_last_ones_but_one_number_a_head() -> None:
    assert extents_of(call(mask=torch.zeros(T, S))).known() == {"T": T, "S": S}
    assert extents_of(call(bias=torch.zeros(S))).known() == {"S": S}
    assert extents_of(call(sinks=torch.zeros(H))).known() == {"H": H}


def test_learned_queries_that_all_batch_entries_share_hide_no_batch() -> None:
    assert extents_of(call(q=torch.zeros(1, H, T, D), k=WHOLE["k"])).b == B


def test_statistics_and_what_was_selected_tell_too() -> None:
    known = extents_of(call(entropy=torch.zeros(B, H, T), keys=S)).known()
    assert known == {"B": B, "H": H, "T": T, "S": S}
    assert extents_of(call(received=torch.zeros(B, H, S))).known() == {"B": B, "H": H, "S": S}
    assert extents_of(call(top_k_keys=torch.zeros(B, H, T, 7))).known() == {"B": B, "H": H, "T": T}
    assert extents_of(call(heads=(1, 3), queries=(0, 2, 4), of_queries=9)).known() == {"H": 2, "T": 3}
    assert extents_of(call(bias=None)).known() == {}


def test_what_would_have_to_be_derived_is_derived_for_what_is_asked_alone() -> None:
    made: list[str] = []

    def make(name: str) -> Tensor:
        made.append(name)
        return WHOLE[name]

    lazy = call(q=WHOLE["q"], **{name: Later(make, name) for name in ("k", "v", "weights")})
    assert extents_of(lazy, "BHT").known("BHT") == {"B": B, "H": H, "T": T} and made == []
    assert extents_of(lazy, "BHTS").s == S and len(made) == 1 and made != ["weights"]
    assert extents_of(lazy).known() == {x: SIZES[x] for x in "BHGTSDE"}


def test_a_file_is_not_read_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = call(**WHOLE)
    trace = hookattn.load(hookattn.Trace(calls=[given]).save(tmp_path / "run.safetensors"))
    monkeypatch.setattr(LazyFile, "slice", lambda *_: pytest.fail("the file was read"))
    assert extents_of(trace[0]) == extents_of(given) == (B, H, G, T, S, D, E)


def test_how_many_queries_the_kernel_had() -> None:
    assert kernel_queries(call(q=WHOLE["q"])) == T
    assert kernel_queries(call(q=WHOLE["q"], queries=(0, 4, 6), of_queries=9)) == 9
    assert kernel_queries(call(q=WHOLE["q"], queries=(0, 4, 6))) is None  # a file of format 1.1
    assert kernel_queries(call()) is None


@pytest.mark.parametrize("kv_heads", [None, (0, 0, 1, 1), (1, 0, 0, 1)])
def test_which_key_head_a_query_head_reads(kv_heads: tuple[int, ...] | None) -> None:
    k = torch.arange(G).view(1, G, 1, 1).expand(B, G, S, D)
    given = call(k=k, kv_heads=kv_heads)
    wanted = list(kv_heads or (0, 0, 1, 1))
    assert key_heads(given, H, G) == wanted
    assert per_query_head(given, k, H)[0, :, 0, 0].tolist() == wanted
    assert per_query_head(given, k, H).shape == (B, H, S, D)
    even = evenly_grouped(given, k)
    assert [int(even[0, h // (H // even.shape[1]), 0, 0]) for h in range(H)] == wanted


def test_a_call_of_statistics_says_how_large_it_is() -> None:
    assert "B2 H4 T3 S5" in repr(call(entropy=torch.zeros(B, H, T), keys=S))
    assert call(q=WHOLE["q"], k=WHOLE["k"]).shape == "B2 H4 T3 D8"
    assert call(bias=None).shape == "?"
