"""What the viewer finds of the heads when it opens a trace, against `hookattn.analyze.report` of the same one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hookattn
from hookattn import analyze
from hookattn.demo.induction import example_tokens, load_pretrained
from tests import tiny_models
from tests.browser.conftest import Layers, causal, show

pytestmark = pytest.mark.browser
Open = Callable[..., Any]

MEASURES = (
    "induction", "duplicate_token", "previous_token", "next_token", "self_token", "local_mass(window=2)", "first_token",
    "learned_sink", "normalised_entropy", "entropy", "mean_distance",
)  # fmt: skip
HERE = {
    "induction", "duplicate token", "previous token", "next token", "itself", "neighbours", "first token",
    "learned sink", "uniform",
}  # fmt: skip


class Sinks(nn.Module):
    """Grouped heads with learned sinks, causal, over the same tokens twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.view(1, x.shape[1], 4, 8).transpose(1, 2)
        k = v = q[:, ::2]
        scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5
        scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), float("-inf"))
        sink = torch.tensor([0.0, 1.0, 3.0, 6.0]).view(1, 4, 1, 1).expand(1, 4, x.shape[1], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        return (weights @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2)


def traced(name: str) -> hookattn.Trace:
    torch.manual_seed(0)
    if name == "induction":
        ids = example_tokens(0, length=20)
        return hookattn.trace(load_pretrained(), ids, tokens=[[f"t{i}" for i in ids[0].tolist()]])
    if name == "encoder":
        model = tiny_models.bert()
        ids = torch.tensor([[2, 5, 6, 5, 3], [2, 7, 3, 0, 0]])
        mask = (ids != 0).long()
        return hookattn.trace(model, {"input_ids": ids, "attention_mask": mask}, tokens=[list("abcbd"), list("aedpp")])
    if name == "cross":
        model = Layers(2, 4).eval()
        return hookattn.trace(model, (torch.randn(1, 5, 24), torch.randn(1, 9, 24)))
    if name == "queries":
        model = Layers(4).eval()
        return hookattn.trace(
            model, (torch.randn(1, 9, 24), None, causal(9)), queries=[3, 7, 8], tokens=list("abcabcabc")
        )
    if name == "ragged":
        return hookattn.trace(Layers(1, 6, 3).eval(), (torch.randn(2, 7, 24), None, causal(7)), tokens=list("abababa"))
    if name == "window":
        band = causal(12) | torch.ones(12, 12, dtype=torch.bool).tril(-4)
        return hookattn.trace(Layers(4).eval(), (torch.randn(1, 12, 24), None, band), tokens=list("abcdabcdabcd"))
    if name == "sinks":
        x = torch.randn(1, 6, 32).repeat(1, 2, 1)
        return hookattn.trace(Sinks(), x, tokens=list("abcdef") * 2)
    if name == "stitched":
        model = tiny_models.gpt2()
        with hookattn.tracing(model) as trace:
            model.generate(torch.tensor([[5, 6, 7, 5, 6]]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        trace.tokens = [list("abcab" + "xyzxyz")]
        return trace.stitch()
    if name == "no tokens":
        return hookattn.trace(Layers(4).eval(), (torch.randn(1, 6, 24), None, causal(6)))
    assert name == "weights alone"
    return hookattn.trace(Layers(4).eval(), (torch.randn(1, 6, 24),), capture=("weights",), tokens=list("ababab"))


KINDS = (
    "induction", "encoder", "cross", "queries", "ragged", "window", "sinks", "stitched", "no tokens", "weights alone",
)  # fmt: skip


def found(page: Any) -> dict[str, Any]:
    page.wait_for_function("viewer.findings.total > 0 && viewer.findings.done === viewer.findings.total")
    return dict(page.evaluate("viewer.findings"))


def assert_same(made: dict[str, Any], trace: hookattn.Trace, tolerance: float = 2e-6) -> None:
    table = analyze.report(trace)
    for row in table.to_dict("records"):
        call = trace[row["call"]]
        place = list(call.heads or range(100)).index(row["head"])
        head = made["heads"][row["call"]][place]
        for name in MEASURES:
            expected = row.get(name, math.nan)
            value = made["scores"].get(name, {"values": None})["values"]
            value = None if value is None else value[row["call"]][place]
            if math.isnan(expected):
                assert value is None, (name, row["path"], row["head"], value)
            else:
                assert value == pytest.approx(expected, abs=tolerance * max(1, abs(expected))), (name, row["head"])
        names = [role for role in row["role"].split("; ") if role in HERE]
        assert [r["role"] for r in head["roles"]] == names
        for role in head["roles"]:
            pair = role["pair"]
            where = (pair["batch"], place, pair["query"], pair["key"])
            assert pair["weight"] == pytest.approx(float(call.weights[where]), abs=max(tolerance, 1e-6))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_is_what_a_report_says(open_page: Open, tmp_path: Path, kind: str) -> None:
    trace = traced(kind)
    made = found(show(open_page(), Path(trace.save(tmp_path / "t.safetensors"))))
    assert_same(made, trace)


def test_the_striking_head_is_the_induction_head(open_page: Open, tmp_path: Path) -> None:
    trace = traced("induction")
    made = found(show(open_page(), Path(trace.save(tmp_path / "t.safetensors"))))
    table = analyze.report(trace)
    best = table.loc[table["induction"].idxmax()]
    assert (made["striking"]["call"], made["striking"]["head"]) == (best["call"], best["head"])
    role = made["heads"][best["call"]][best["head"]]["roles"][0]
    tokens = trace.tokens[0] if trace.tokens else []
    query, key = role["pair"]["query"], role["pair"]["key"]
    assert role["role"] == "induction" and tokens[key - 1] == tokens[query] and key - 1 < query


def test_without_workers_the_page_measures_itself(open_page: Open, tmp_path: Path) -> None:
    trace = traced("ragged")
    page = open_page()
    page.add_init_script("delete globalThis.Worker")
    assert_same(found(show(page, Path(trace.save(tmp_path / "t.safetensors")))), trace)


def test_a_worker_that_may_not_start_is_done_without(open_page: Open, tmp_path: Path) -> None:
    trace = traced("ragged")
    page = open_page()
    page.add_init_script(
        "Worker = class { postMessage() { setTimeout(() => this.onerror(new Event('error'))) } terminate() {} }"
    )
    assert_same(found(show(page, Path(trace.save(tmp_path / "t.safetensors")))), trace)


def test_scores_that_were_handed_in_count(open_page: Open, tmp_path: Path) -> None:
    trace = traced("induction")
    values = "[[1,2,3,4],[5,6,7,8]]"
    roles = "[[[],[],[],['separators']],[[],[],[],[]]]"
    given = f"{{induction: {{unit: 'share', description: 'mine', values: {values}}}, roles: {roles}}}"
    page = show(open_page(), Path(trace.save(tmp_path / "t.safetensors")), f"{{scores: {given}}}")
    made = found(page)
    assert made["scores"]["induction"]["values"][1] == [5, 6, 7, 8] and "entropy" in made["scores"]
    assert "separators" in [r["role"] for r in made["heads"][0][3]["roles"]]


def test_what_cannot_be_measured_is_said(open_page: Open, tmp_path: Path) -> None:
    made = hookattn.trace(Layers(2).eval(), (torch.randn(1, 6, 24),), capture=("entropy",))
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")))
    told = found(page)
    assert "capture=" in told["missing"] and told["striking"] is None
    one = hookattn.trace(Layers(2).eval(), (torch.randn(1, 1, 24),), tokens=["a"])
    assert_same(found(show(open_page(), Path(one.save(tmp_path / "u.safetensors")))), one)


def test_a_large_head_is_read_in_part(open_page: Open, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trace = hookattn.trace(
        Layers(2).eval(), (torch.randn(1, 1400, 24), None, causal(1400)), capture=("weights", "mask")
    )
    made = found(show(open_page(), Path(trace.save(tmp_path / "t.safetensors"))))
    exact = analyze.report(trace)
    for row in exact.to_dict("records"):
        for name in ("entropy", "previous_token", "first_token"):
            value = made["scores"][name]["values"][row["call"]][row["head"]]
            assert value == pytest.approx(row[name], rel=0.15, abs=0.01)
            assert value != row[name]
