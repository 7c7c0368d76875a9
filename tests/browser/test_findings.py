"""What the viewer finds of the heads when it opens a trace, against `hookattn.analyze.report` of the same one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
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
            if pair is None:
                assert role["role"] in ("learned sink", "uniform"), "no pair of a query and a key shows it"
                continue
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


GONE = """const before = fetch; window.asked = 0;
window.fetch = (url, how) =>
  how?.headers?.Range && ++asked > 6 ? Promise.reject(new TypeError("gone")) : before(url, how);
"""


def test_a_trace_that_is_gone_is_not_asked_for_again(open_page: Open, tmp_path: Path) -> None:
    made = hookattn.trace(Layers(*[2] * 16).eval(), torch.randn(1, 6, 24), capture=("weights",))
    page = open_page()
    page.add_init_script(GONE)
    show(page, Path(made.save(tmp_path / "t.safetensors")), "{state: {layer: 0}}")
    found(page)
    assert 6 < page.evaluate("asked") < 16  # each of the 16 layers asked on its own


def said(page: Any) -> dict[str, Any]:
    """The line of a trace, and the sentence of each of its heads."""
    return dict(
        page.evaluate(
            """async () => {
              const { Trace, served, headline, headSentence } = await import("/hookattn-viewer.js");
              const trace = await Trace.open(await served("/trace.safetensors"));
              const found = viewer.findings;
              const line = headline(trace, found, viewer.state.step);
              const heads = trace.calls.map((c) => c.headNumbers.map((_, h) => headSentence(trace, found, c, h)));
              return { line, text: line.map((part) => part.text).join(" "), heads };
            }"""
        )
    )


def test_the_line_and_the_sentence_of_the_induction_model(open_page: Open, tmp_path: Path) -> None:
    trace = traced("induction")
    page = show(open_page(), Path(trace.save(tmp_path / "t.safetensors")))
    made = found(page)
    told = said(page)
    table = analyze.report(trace)
    n = int(table["role"].str.startswith("induction").sum())
    best = table.loc[table["induction"].idxmax()]
    name = f"L{best['layer']}H{best['head']}"
    assert told["text"].startswith(f"2 layers × 4 heads, {trace[0].weights.shape[-1]} tokens. {n} induction heads")
    assert f"(strongest {name}, {best['induction']:.2f})" in told["text"]
    assert told["line"][-1] == {"tone": "good", "text": "✓ all 2 calls faithful."}
    pair = made["heads"][best["call"]][best["head"]]["roles"][0]["pair"]
    tokens = trace.tokens[0] if trace.tokens else []
    word = tokens[pair["query"]]
    assert word == tokens[pair["key"] - 1]
    where = {i: n for n, i in enumerate((i for i, t in enumerate(tokens) if t == word), 1)}
    ends = {1: "1st", 2: "2nd", 3: "3rd"}
    q, k = ends[where[pair["query"]]], ends[where[pair["key"] - 1]]
    assert told["heads"][best["call"]][best["head"]] == (
        f"{name} · induction · from the {q} “{word}” it looks at what followed the {k} “{word}”, {pair['weight']:.2f}"
    )


class Fixed(nn.Module):
    """Heads whose weights are given, T S each: as their logarithms are scores."""

    def __init__(self, *weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = torch.stack(weights)[None]

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        t = self.weights.shape[-1]
        eye = torch.eye(t).expand(1, self.weights.shape[1], t, t) * t**0.5
        k = self.weights.clamp(min=1e-9).log().mT
        return nn.functional.scaled_dot_product_attention(eye, k, v)


def test_every_role_has_a_sentence_that_its_pair_bears_out(open_page: Open, tmp_path: Path) -> None:
    words = list("abcdabcd")
    n = len(words)
    eye = torch.eye(n)
    before, after = eye.roll(-1, 1), eye.roll(1, 1)  # rows that have none look across the edge
    duplicate, induction = torch.zeros(n, n), torch.zeros(n, n)
    for t in range(n):
        duplicate[t, t - 4 if t >= 4 else t] = 1
        induction[t, t - 3 if t >= 4 else 0] = 1
    first, level = torch.zeros(n, n), torch.full((n, n), 1 / n)
    first[:, 0] = 1
    near = (eye + before + after) / 3
    some = torch.softmax(3 * torch.randn(n, n, generator=torch.Generator().manual_seed(4)), -1)
    kinds = (induction, duplicate, before, after, eye, near, first, level, some)
    trace = hookattn.trace(Fixed(*kinds), torch.randn(1, len(kinds), n, 4), tokens=words)
    page = show(open_page(), Path(trace.save(tmp_path / "t.safetensors")))
    made = found(page)
    heads = said(page)["heads"][0]
    role = [head["roles"][0]["role"] if head["roles"] else None for head in made["heads"][0]]
    assert role[:4] == ["induction", "duplicate token", "previous token", "next token"]
    assert role[4:8] == ["itself", "neighbours", "first token", "uniform"]
    ways = (
        r"from the 2nd “(.)” it looks at what followed the 1st “\1”, 1\.00",
        r"from the 2nd “(.)” it looks back at the 1st “\1”, 1\.00",
        r"from the (1st|2nd) “.” it looks at the token before, the (1st|2nd) “.”, 1\.00",
        r"from the (1st|2nd) “.” it looks at the token after, the (1st|2nd) “.”, 1\.00",
        r"the (1st|2nd) “.” looks at itself, 1\.00",
        r"(from )?the (1st|2nd) “.” (looks at itself|it looks at the token (before|after), the (1st|2nd) “.”), 0\.33",
        r"from the (1st|2nd) “.” it looks at the first token, the 1st “a”, 1\.00",
        r"looks at all the keys that it may look at nearly alike: its entropy is 1\.00 of the most there can be",
    )
    for h, (name, way) in enumerate(zip(role, ways, strict=False)):
        assert re.fullmatch(rf".*H{h} · {name} · {way}", heads[h]), heads[h]
    if role[8] is None:
        assert re.search(r"H8 · no clear role · its entropy is 0\.\d\d of that of even attention, its keys", heads[8])


def test_the_line_says_what_is_not_to_be_trusted(open_page: Open, tmp_path: Path) -> None:
    trace = hookattn.trace(Layers(2, 3, 2).eval(), (torch.randn(2, 6, 24),))
    bad = replace(trace[1].certificate, status="unfaithful", output_error=1.0)
    assert not bad.faithful
    calls = [
        replace(trace[0], basis=dict.fromkeys("BHTSG", "guessed")),
        replace(trace[1], certificate=bad),
        replace(trace[2], certificate=replace(trace[2].certificate, status="unverified")),
    ]
    skipped = [hookattn.Skipped(path=f"mixer.{i}", reason="linear attention") for i in range(4)]
    made = replace(trace, calls=calls, skipped=skipped)
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")))
    found(page)
    told = said(page)
    assert "3 layers × 2 to 3 heads, 6 tokens, a batch of 2." in told["text"]
    assert not any(part["tone"] == "good" for part in told["line"])
    wrong = [part["text"] for part in told["line"] if part["tone"] == "wrong"]
    doubt = [part["text"] for part in told["line"] if part["tone"] == "doubt"]
    assert wrong == [f"✗ 1 of 3 calls unfaithful: {trace[1].site.path}."]
    assert doubt == [
        "? 1 of 3 calls unverified.",
        "? Which axis is which (B, H, T, S, G) was guessed in 1 of 3 calls.",
        "4 sites skipped: mixer.0 (linear attention); mixer.1 (linear attention); and 2 more.",
    ]
    assert "(batch entry " in str(told["heads"]) or "no clear role" in str(told["heads"])


def test_the_line_of_several_stacks_and_of_what_cannot_be_measured(open_page: Open, tmp_path: Path) -> None:
    trace = traced("cross")
    page = show(open_page(), Path(trace.save(tmp_path / "t.safetensors")))
    found(page)
    assert "5 queries on 9 keys" in said(page)["text"]
    made = hookattn.trace(Layers(2).eval(), (torch.randn(1, 6, 24),), capture=("entropy",))
    page = show(open_page(), Path(made.save(tmp_path / "u.safetensors")))
    found(page)
    assert "What heads do is not known: " in said(page)["text"] and "capture=" in said(page)["heads"][0][0]
