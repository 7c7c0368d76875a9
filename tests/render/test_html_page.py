"""The self-contained page: what is in it is read back by other means, and compared with the trace."""

from __future__ import annotations

import base64
import gzip
import html
import html.parser
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import hookattn
from hookattn import Skipped, Trace
from hookattn.calls import deriving
from hookattn.calls.site import Site
from hookattn.errors import (
    FieldNotCaptured,
    ForeignFileError,
    InputError,
    PageTooLargeError,
    RenderError,
    SelectionError,
    TraceFileError,
    TraceWriteError,
)
from hookattn.render import page_size
from hookattn.render.html_page import page, save_page
from hookattn.render.options import script_json, viewer_options
from hookattn.render.page_codes import from_steps8, half_floats, sqrt8, steps8
from hookattn.render.page_size import narrowed

HOSTILE = ["</script><img src=x onerror=alert(1)>", "<!--", "<script>", "]]>", "&lt;", "\u2028", "é\ud800"]


class Net(nn.Module):
    """Random attention far from uniform: 12 layers of 12 heads by default."""

    def __init__(self, layers: int = 12, heads: int = 12, width: int = 64, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.layers = nn.ModuleList(nn.Linear(heads * width, 3 * heads * width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        for layer in self.layers:
            q, k, v = layer(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(4 * q, k, v, is_causal=self.causal)
            x = x + y.transpose(1, 2).reshape(b, t, c)
        return x


def made(tokens: Sequence[str] | int = 6, *, model: Net | None = None, **options: Any) -> Trace:
    words = [f"w{i}" for i in range(tokens)] if isinstance(tokens, int) else list(tokens)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = model or Net(2, 3, 8)
        x = torch.randn(1, len(words), model.layers[0].in_features)  # type: ignore[arg-type]
    with torch.no_grad():
        return hookattn.trace(model, x, tokens=[words], **options)


def small(**options: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net(**options)


class Reader(html.parser.HTMLParser):
    """The scripts of a page, as a browser cuts them, and every address that it names."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.title = ""
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data
        elif self.inside == "title":
            self.title += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def contents(text: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors in a page, by what safetensors and gzip make of its blocks."""
    blocks = [(a, t) for a, t in Reader(text).scripts if a.get("type") == "application/x-hookattn"]
    raw = b""
    for attributes, packed in blocks:
        assert attributes["data-codec"] == "gzip" and attributes["data-start"] == str(len(raw))
        raw += gzip.decompress(base64.b64decode(packed, validate=True))
        assert attributes["data-end"] == str(len(raw))
    length = int.from_bytes(raw[:8], "little")
    assert blocks[0][0]["data-end"] == str(8 + length), "block 0 is the header"
    document = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["hookattn"])
    return document, safetensors.torch.load(raw)


def test_a_small_trace_is_in_its_page_bit_for_bit() -> None:
    trace = made()
    document, tensors = contents(page(trace))
    assert "coding" not in document and document["tokens"] == trace.tokens and document["notes"] == trace.notes
    for call, entry in zip(trace, document["calls"], strict=True):
        assert entry["fields"].keys() == call.fields.keys()
        for field, name in entry["fields"].items():
            value = call.get(field)
            assert (name is None) == (value is None)
            if name is not None:
                assert torch.equal(tensors[name], value), field  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["file", "loaded", "compact", "part"])
def test_every_form_of_a_trace(tmp_path: Path, form: str) -> None:
    trace = made()
    path = trace.save(tmp_path / "run.safetensors", compact=form == "compact")
    given: Any = path if form == "file" else hookattn.load(path)
    if form == "part":
        given = given[1:]
    document, tensors = contents(page(given))
    assert len(document["calls"]) == (1 if form == "part" else 2)
    last = document["calls"][-1]
    if form == "compact":
        assert "weights" not in last["fields"] and "weights" in last["derivable"]
    else:
        assert torch.equal(tensors[last["fields"]["weights"]], trace[-1].weights)


def decoded(document: dict[str, Any], tensors: dict[str, Tensor], place: int) -> dict[str, Tensor]:
    """q, k and weights of a call as docs/viewer.md says that they are to be read, float64."""
    entry = document["calls"][place]
    made: dict[str, Tensor] = {}
    for name in ("q", "k"):
        codes, coding = tensors[entry["fields"][name]], document["coding"][entry["fields"][name]]
        assert coding["kind"] == "steps8" and codes.dtype == torch.int8
        made[name] = torch.stack([codes[:, h].double() * step for h, step in enumerate(coding["step"])], 1)
        for head, column, times in coding["doubled"]:
            made[name][:, head, :, column] *= 2**times
    scores = made["q"] @ made["k"].mT * entry["scale"]
    open_scores = scores.masked_fill(~tensors[entry["fields"]["mask"]], -torch.inf)
    weights = open_scores.softmax(-1)
    if entry["fields"].get("sinks") is not None:
        sinks = tensors[entry["fields"]["sinks"]].double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([open_scores, sinks], -1).softmax(-1)[..., :-1]
    name = entry["fields"]["weights"]
    assert document["coding"][name]["kind"] == "sqrt8-less-qk" and tensors[name].dtype == torch.uint8
    codes = (tensors[name].double() + (255 * weights.sqrt()).round()) % 256
    return made | {"scores": scores, "weights": (codes / 255).square()}


@pytest.mark.parametrize("causal", [True, False])
def test_12_by_12_heads_of_128_tokens_are_a_page_with_q_and_k(causal: bool) -> None:
    trace = made(128, model=small(causal=causal))
    text = page(trace)
    assert len(text.encode()) <= (3_000_000 if causal else 3_300_000)
    document, tensors = contents(text)
    said = " ".join(document["notes"])
    for place, (call, entry) in enumerate(zip(trace, document["calls"], strict=True)):
        found = decoded(document, tensors, place)
        for name, most in (("q", None), ("k", None), ("weights", 1 / 255)):
            worst = float((found[name] - call.get(name)).abs().max())  # type: ignore[operator]
            assert document["coding"][entry["fields"][name]]["error"] == pytest.approx(worst, rel=1e-9)
            assert 0 < worst < (most or 0.05 * float(call.get(name).abs().max()))  # type: ignore[union-attr]
        assert bool((found["weights"][~call.mask.expand(call.weights.shape)] == 0).all())
        assert torch.equal(tensors[entry["fields"]["mask"]], call.mask)
        assert entry["derivable"] == ["scores", "weights"]
        off = (found["scores"] - call.scores)[call.mask.expand(call.weights.shape)]
        stated = re.search(r"off by (\S+) \(root mean square\), (\S+) at the most", said)
        assert stated is not None and float(off.abs().max()) <= 1.05 * float(stated[2])
        assert float(off.square().mean().sqrt()) < 0.05 * float(call.scores.std())
    assert "holds the weights as 8-bit" in said and "leaves out v, output for its size" in said


def test_without_q_and_k_weights_are_codes_alone() -> None:
    trace = made(128, model=small(), capture=("weights", "mask"))
    document, tensors = contents(page(replace(trace, calls=[*trace, *trace])))
    for call, entry in zip([*trace, *trace], document["calls"], strict=True):
        name = entry["fields"]["weights"]
        coding = document["coding"][name]
        assert tensors[name].dtype == torch.uint8 and coding["kind"] == "sqrt8"
        back = (tensors[name].to(torch.float64) / 255) ** 2
        worst = float((back - call.weights).abs().max())
        assert coding["error"] == pytest.approx(worst, rel=1e-9) and 0 < worst < 1 / 255


def test_codes_of_steps_reach_columns_that_are_far_larger() -> None:
    x = torch.randn(2, 3, 50, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1, :, 5] = 300 + x[:, 1, :, 5]
    x[:, 2] = 0
    found = steps8(x)
    assert found is not None
    codes, coding = found
    back = from_steps8(codes, coding)
    assert coding["doubled"] and all((h, d) == (1, 5) for h, d, _ in coding["doubled"]) and coding["step"][2] == 1
    off = (back - x).abs().amax((0, 2))
    steps = torch.tensor(coding["step"], dtype=torch.float64)[:, None].expand(3, 400).clone()
    for h, d, times in coding["doubled"]:
        steps[h, d] *= 2**times
    assert bool((off <= steps / 2 * (1 + 1e-9)).all()) and int(codes.abs().max()) <= 127
    assert bool((back[:, 2] == 0).all())
    assert steps8(torch.tensor([[[[1.0, float("inf")]]]])) is None


@pytest.mark.parametrize("kind", ["inf", "relu", "scale"])
def test_weights_that_do_not_follow_are_codes_alone(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    trace = made(40)
    call = trace[0]
    stored = {**call.fields, "weights": call.weights, "mask": call.mask}
    if kind == "inf":
        q = call.q.clone()
        q[0, 0, 0, 0] = float("inf")
        trace.calls[0] = replace(call, fields={**stored, "q": q})
    elif kind == "relu":
        trace.calls[0] = replace(call, fields=stored, normalizer="relu")
    else:
        trace.calls[0] = replace(call, fields=stored, scale=torch.full((1, 1, 40, 40), 0.3))
    weights, mask, one = 2 * 3 * 40 * 40, 2 * 40 * 40 // 8, 2 * 3 * 40 * 8 * 2
    monkeypatch.setattr(page_size, "ROOM", weights + mask + one // 2)
    made_of = narrowed(trace)
    found = made_of.trace[0]
    values = {name: found.get(name) for name in found.fields if name in ("q", "k", "weights")}
    assert values["weights"].dtype == torch.uint8  # type: ignore[union-attr]
    assert made_of.coding[0, "weights"]["kind"] == "sqrt8"
    assert ("q" in values) == (kind == "inf") and (0, "q") not in made_of.coding


def test_512_tokens_take_80_megabytes_at_the_most(tmp_path: Path) -> None:
    """One layer of twelve, which is a twelfth of the whole: all have the same kind of numbers."""
    path = save_page(made(512, model=small(layers=1, causal=False)), tmp_path / "a.html")
    assert Path(path).stat().st_size <= 80e6 / 12


def test_blocks_are_compressed_as_it_takes_least() -> None:
    """Noise does not repeat: naming what it has of repetitions by chance takes more than leaving them alone."""
    noise = torch.randn(1, 8, 256, 64, generator=torch.Generator().manual_seed(0)).mul(12).round()
    trace = made(200, model=small(layers=1))
    trace = replace(trace, calls=[replace(trace[0], fields={**trace[0].fields, "noise": noise.to(torch.int8)})])
    text = page(trace)
    found = [tensor for name, tensor in contents(text)[1].items() if "noise" in name]
    assert len(found) == 1 and torch.equal(found[0], noise.to(torch.int8))
    packed = [t for a, t in Reader(text).scripts if a.get("type") == "application/x-hookattn"]
    ours = [len(base64.b64decode(t)) for t in packed]
    plain = [len(gzip.compress(gzip.decompress(base64.b64decode(t)), 6)) for t in packed]
    shares = [a / b for a, b in zip(ours, plain, strict=True)]
    assert max(shares) <= 1 and min(shares) < 0.97


def test_fields_can_be_asked_for() -> None:
    trace = made(200, model=small(layers=1))
    document, tensors = contents(page(trace, fields=("q", "k", "v", "mask", "weights")))
    fields = document["calls"][0]["fields"]
    assert list(fields) == ["q", "k", "v", "bias", "mask", "sinks", "weights", "applied"]
    assert fields["bias"] is fields["sinks"] is None
    for name in ("q", "k", "v"):
        value, stored = getattr(trace[0], name), tensors[fields[name]]
        assert stored.dtype == torch.float16 and torch.allclose(stored.float(), value, atol=2**-25, rtol=2**-11)
    assert any("16-bit" in note for note in document["notes"])
    assert document["calls"][0]["derivable"] == ["scores", "weights"]
    document, _ = contents(page(trace, fields=("q", "k")))
    assert document["calls"][0]["derivable"] == ["scores"], "weights do not follow without the mask"
    assert "This page leaves out v, mask, weights, output for its size" in " ".join(document["notes"])


def test_fields_that_are_not_there() -> None:
    trace = made(capture=("q", "k"))
    with pytest.raises(FieldNotCaptured, match=r"'v' was captured of no call.*capture="):
        page(trace, fields=("v",))
    for wrong in (("colour",), "weights", ()):
        with pytest.raises(SelectionError, match=r"fields=.*expected a tuple of some of q, k"):
            page(trace, fields=wrong)


def test_what_does_not_fit_8_or_16_bits_stays() -> None:
    assert sqrt8(torch.tensor([0.5, 1.2])) is None
    assert sqrt8(torch.tensor([-0.1, 0.5])) is None
    assert sqrt8(torch.tensor([float("nan"), 0.5])) is None
    codes = sqrt8(torch.tensor([0.0, 1.0, 1.0 + 1e-6, 0.25], dtype=torch.float64))
    assert codes is not None and codes.tolist() == [0, 255, 255, 128]
    large = torch.tensor([1e6, 1.0])
    assert half_floats(large) == (large, 0.0)
    half, error = half_floats(torch.tensor([1 / 3, float("inf")]))
    assert half.dtype == torch.float16 and half[1] == float("inf")
    assert error == pytest.approx(abs(float(torch.tensor(1 / 3).half()) - 1 / 3), rel=1e-3)
    whole = torch.arange(4)
    assert half_floats(whole)[0] is whole


def test_statistics_stay_as_they_are() -> None:
    trace = made(300, model=small(layers=1), capture=("weights", "mask", "entropy"))
    document, tensors = contents(page(trace))
    assert torch.equal(tensors[document["calls"][0]["fields"]["entropy"]], trace[0].get("entropy"))  # type: ignore[arg-type]
    wide: Any = {"entropy": torch.zeros(1).expand(1, 100, 10**6)}
    with pytest.raises(PageTooLargeError, match="533 MB for entropy, and"):
        page(replace(trace, calls=[replace(trace[0], fields=wide)]))


def test_room_is_given_in_the_order_of_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = made(40)  # 2 layers, 3 heads, width 8
    weights, mask, one = 2 * 3 * 40 * 40, 2 * 40 * 40 // 8, 2 * 3 * 40 * 8 * 2
    for room, kept in (
        (1, {"weights", "mask", "sinks"}),
        (weights + mask + one // 2, {"weights", "mask", "sinks", "applied", "q", "k", "bias"}),
        (weights + mask + 2 * one, {"weights", "mask", "sinks", "applied", "q", "k", "bias"}),
        (weights + mask + 3 * one, {"weights", "mask", "sinks", "applied", "q", "k", "bias", "v"}),
        (weights + mask + 4 * one, {"weights", "mask", "sinks", "applied", "q", "k", "bias", "v", "output"}),
    ):
        monkeypatch.setattr(page_size, "ROOM", room)
        made_of = narrowed(trace)
        call = made_of.trace[0]
        assert set(call.fields) == kept
        assert call.derivable == (("scores", "weights") if "q" in kept else ()), "what follows, follows from the page"
        if "q" in kept:
            coded = room < weights + mask + 2 * one
            assert made_of.in_steps == coded
            if not coded:
                assert torch.allclose(call.scores, trace[0].scores, atol=0.02)
        follows = {"scores"} if "q" in kept else set()
        assert set(made_of.left_out) == {"q", "k", "v", "scores", "output"} - kept - follows


def test_a_trace_too_large_says_its_size_before_anything_is_derived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = 20_000
    trace = made(4, capture=("q", "k", "mask"))
    call = trace[0]
    wide = torch.zeros(1, 3, 1, 64).expand(1, 3, t, 64)
    fields: Any = {"q": wide, "k": wide, "mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
    trace = replace(trace, calls=[replace(call, fields=fields, derivable=("scores", "weights"))])
    monkeypatch.setattr(deriving, "derive", lambda *given, **more: pytest.fail("derived a matrix of 5 GB"))
    with pytest.raises(PageTooLargeError, match=r"1,600 MB .*hookattn view.*trace\.select"):
        page(trace)
    target = tmp_path / "a.html"
    with pytest.raises(PageTooLargeError):
        save_page(trace, target)
    assert list(tmp_path.iterdir()) == []


def test_hostile_tokens_are_data() -> None:
    for title in (None, HOSTILE[0]):
        text = page(made(HOSTILE), title=title, scores={HOSTILE[0]: {"values": [[1.0] * 3] * 2}})
        reader = Reader(text)
        plain = Reader(page(made(len(HOSTILE)), scores={"a": {"values": [[1.0] * 3] * 2}}))
        assert reader.tags == plain.tags, "a token or a name has become an element"
        assert contents(text)[0]["tokens"] == [HOSTILE]
    assert reader.title == HOSTILE[0]


def hostile(word: str) -> Trace:
    """A trace that says a word wherever it has text."""
    trace = made([word] * 4).certify()
    for call in trace:
        layer = call.site.layer
        path = f"{layer}{word}".replace("\ud800", "")  # it is in names of tensors
        call.site, call.notes = Site(path, layer, word, word, word, word), (word,)
        call.tap, call.entry = word, word
    return replace(
        trace,
        model={"class": word, "module": word, "versions": {word: word}, "config": {word: word}},
        notes=[word],
        skipped=[Skipped(word, word)],
        stack_tokens={word: [[word] * 4]},
    )


WORDS = [*HOSTILE, '" onload="alert(1)', "' onload='alert(1)", "javascript:alert(1)", "\x00\x1b\u202e"]


@pytest.mark.parametrize("word", WORDS)
def test_a_hostile_trace_is_data(word: str) -> None:
    """Wherever a word is in a file, the page has the elements and attributes of any other, and no address."""
    scores = {"a": {"values": [[1.0] * 3] * 2, "description": word, "unit": word}, "roles": [[[word]] * 3] * 2}
    text = page(hostile(word), compare=hostile(word), scores=scores, state={"stack": word})
    reader, plain = Reader(text), Reader(page(made(4), compare=made(4), scores={"a": {"values": [[1.0] * 3] * 2}}))
    assert reader.tags == plain.tags and reader.addresses == []
    assert [sorted(a) for a, _ in reader.scripts] == [sorted(a) for a, _ in plain.scripts]
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e\ud800]", re.sub("<script.*?</script>", "", text, flags=re.S)
    )
    found = contents(text.split('<div id="compare"')[0])[0]
    assert found["tokens"] == [[word] * 4] and found["skipped"][0]["reason"] == word


def test_the_page_names_no_other_place() -> None:
    text = page(made())
    reader = Reader(text)
    assert reader.addresses == []
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and "http" not in policy[1]
    said = html.unescape(policy[1])
    assert "default-src 'none'" in said and "connect-src 'none'" in said


def test_a_hostile_file_name_is_data(tmp_path: Path) -> None:
    path = made().save(tmp_path / '"><img src=x onerror=alert(1)>.safetensors')
    reader = Reader(page(path))
    assert reader.tags == Reader(page(made())).tags
    names = [a["data-name"] for a, _ in reader.scripts if "data-name" in a]
    assert names == ['"><img src=x onerror=alert(1)>.safetensors']


def test_the_same_trace_gives_the_same_page(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = made()
    first = page(trace)
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert page(trace) == first


def test_two_traces_in_one_page() -> None:
    first, second = made(5), made(7)
    text = page(first, compare=second)
    one, rest = text.split('<div id="compare" hidden>')
    assert contents(one)[0]["tokens"] == first.tokens and contents(rest)[0]["tokens"] == second.tokens


def test_saving(tmp_path: Path) -> None:
    trace = made()
    path = save_page(trace, tmp_path / "a.html", theme="dark")
    assert Path(path).read_text("utf-8") == page(trace, theme="dark")
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]
    with pytest.raises(TraceWriteError, match="could not create the file"):
        save_page(trace, tmp_path / "none" / "a.html")
    with pytest.raises(RenderError):
        save_page(trace, tmp_path / "a.html", theme="pink")
    assert Path(path).read_text("utf-8") == page(trace, theme="dark"), "the older page is intact"


def test_wrong_inputs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trace=3: expected a Trace, or the path of a trace file"):
        page(3)  # type: ignore[arg-type]
    with pytest.raises(TraceFileError, match="cannot open"):
        page(tmp_path / "none.safetensors")
    other = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, other)
    with pytest.raises(ForeignFileError):
        page(other)


def test_options() -> None:
    values = torch.tensor([[1.0, float("nan")]])
    got = viewer_options(
        scores={"entropy": {"unit": "nats", "values": values}, "roles": [[["sink"], []]]}, trace=made()[:1]
    )
    assert got["scores"]["entropy"] == {"unit": "nats", "description": "", "values": [[1.0, None]]}
    assert got["theme"] == "auto" and "state" not in got
    for wrong, said in (
        ({"theme": "pink"}, "one of light, dark, auto"),
        ({"state": 3}, "state: expected a mapping"),
        ({"state": {"a": object()}}, r"state\['a'\]: JSON has no form for object"),
        ({"scores": {"a": [1]}}, "values"),
        ({"scores": {"a": {"values": [[1]]}}, "trace": made()}, "expected 2 rows, one for each call, and got 1"),
        ({"scores": [1]}, "a table of heads or a mapping of measures"),
        ({"images": {"grid": (2, 2)}}, '"urls"'),
        ({"images": {"urls": ["a.png"], "grid": (2, 0)}}, '"grid"'),
        ({"images": {"urls": ["a.png"], "prefix": -1}}, '"prefix"'),
        ({"images": {"urls": ["a.png"], "grids": (2, 2)}}, '"grid"'),
        ({"images": {"urls": ["javascript:1"], "grid": (2, 2)}}, "neither a data:image/ URL nor"),
        ({"images": {"urls": ["none.png"], "grid": (2, 2)}}, "cannot be read"),
    ):
        with pytest.raises(RenderError, match=said):
            viewer_options(**wrong)  # type: ignore[arg-type]


def test_a_table_of_heads_becomes_scores() -> None:
    """By hand: two calls, of which one kept the heads 2 and 0, in this order; rows in any order, one missing."""
    pandas = pytest.importorskip("pandas")
    trace = made(6)[:2]
    trace = replace(trace, calls=[replace(trace[0], index=4), replace(trace[1], index=9, heads=(2, 0))])
    table = pandas.DataFrame(
        {
            "call": [9, 4, 4, 9, 4],
            "head": [0, 1, 0, 2, 2],
            "layer": 0,
            "role": ["", "sink; local", "", "previous token", ""],
            "entropy": [0.5, 1.5, float("nan"), 2.5, 3.5],
            "evidence": "",
        }
    )
    table.attrs["units"] = {"entropy": "nats"}
    got = viewer_options(scores=table, trace=trace)["scores"]
    assert got["entropy"]["values"] == [[None, 1.5, 3.5], [2.5, 0.5]]
    assert got["entropy"]["unit"] == "nats" and "in nats" in got["entropy"]["description"]
    assert got["roles"] == [[[], ["sink", "local"], []], [["previous token"], []]]
    table.attrs.clear()
    assert set(viewer_options(scores=table, trace=trace)["scores"]) == {"entropy", "roles"}
    for wrong in (table.drop(columns="head"), pandas.concat([table, table])):
        with pytest.raises(RenderError, match="a row for each call and head"):
            viewer_options(scores=wrong, trace=trace)


def test_the_report_of_a_trace_is_taken_as_it_is() -> None:
    pytest.importorskip("pandas")
    from hookattn.analyze import report

    trace = made(8)
    table = report(trace)
    options = json.loads(Reader(page(trace, scores=table)).scripts[0][1])
    for name, entry in options["scores"].items():
        if name != "roles":
            assert len(entry["values"]) == 2 and entry["description"] and entry["unit"]
            flat = [x for row in entry["values"] for x in row]
            assert flat == [None if x != x else x for x in table[name].tolist()]


def test_pictures_become_data(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    got = viewer_options(images={"urls": [tmp_path / "a.png", "data:image/gif;base64,AA"], "grid": (2, 3), "prefix": 1})
    assert got["images"] == {
        "urls": ["data:image/png;base64,cG5n", "data:image/gif;base64,AA"],
        "grid": [2, 3],
        "prefix": 1,
    }


def test_json_in_a_script_closes_nothing() -> None:
    text = script_json({"a": HOSTILE, "b": "</ScRiPt >"})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {"a": HOSTILE, "b": "</ScRiPt >"}
