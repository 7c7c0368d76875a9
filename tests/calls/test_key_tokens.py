"""Whose tokens the keys are: tables, figures and the viewer say the same of the same traces, and what is true.

Each case is a trace and, for each of its calls, the name of each key of each batch entry; None for a key that nothing
names. Tables are read with ``hookattn.analyze``, figures with ``hookattn.render``, and the viewer's module runs in node
on the trace file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import analyze
from hookattn.analyze.frame import views
from hookattn.analyze.labels import key_labels, named_keys
from hookattn.calls.key_tokens import stitching_note
from hookattn.calls.part import parts_of
from hookattn.calls.site import Site
from hookattn.errors import InputError, MeasureError

BUNDLE = Path(hookattn.__file__).parent / "render" / "viewer" / "hookattn-viewer.js"
Names = Sequence[str | None]
Expected = Sequence[Sequence[Names]]


def words(n: int, letter: str = "w") -> list[str]:
    return [f"{letter}{letter}{'abcdefghijklmnopqrstuvwxyz'[i]}" for i in range(n)]


def none(n: int) -> list[None]:
    return [None] * n


def call(
    t: int,
    s: int | None = None,
    *,
    path: str = "layers.0.attn",
    stack: str = "main",
    kind: str = "self",
    axes: str = "tokens",
    step: int = 0,
    b: int = 1,
    rows: tuple[int, ...] | None = None,
    keep: Sequence[str] = ("q", "k", "mask", "weights"),
    notes: tuple[str, ...] = (),
) -> hookattn.Call:
    """A call of T queries and S keys, which may attend to all keys up to their own."""
    s = t if s is None else s
    at = torch.arange(t) + max(0, s - t)
    mask = (at[:, None] >= torch.arange(s)).view(1, 1, t, s)
    weights = mask / mask.sum(-1, keepdim=True)
    fields = {
        "q": torch.ones(b, 1, t, 2),
        "k": torch.ones(b, 1, s, 2),
        "mask": mask,
        "weights": weights.expand(b, 1, t, s).clone(),
        "entropy": torch.zeros(b, 1, t),
    }
    if rows is not None:
        fields |= {n: fields[n][:, :, list(rows)] for n in ("q", "mask", "weights", "entropy")}
    made = hookattn.Call(
        Site(path, 0, stack, kind, "Attention", axes), step, 0, "test", torch.float32, 1.0, queries=rows, notes=notes,
        of_queries=None if rows is None else t, fields={n: fields[n] for n in keep},
        keys=s if "entropy" in keep else None,
    )  # fmt: skip
    return made


def trace(calls: Sequence[hookattn.Call], tokens: Any) -> hookattn.Trace:
    lists = [tokens] if isinstance(tokens[0], str) else tokens
    return hookattn.Trace([replace(c, index=i) for i, c in enumerate(calls)], tokens=lists)


def steps(sizes: Sequence[tuple[int, int]], tokens: Any, first: int = 0, **options: Any) -> hookattn.Trace:
    """The steps of one site: T and S of each."""
    return trace([call(t, s, step=first + i, **options) for i, (t, s) in enumerate(sizes)], tokens)


CASES: dict[str, Callable[[], tuple[hookattn.Trace, Expected]]] = {}


def case(made: Callable[[], tuple[hookattn.Trace, Expected]]) -> Callable[[], tuple[hookattn.Trace, Expected]]:
    CASES[made.__name__] = made
    return made


# ---------------------------------------------------------------------------------------------- towers and decoders


class Attend(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        q, k = (z.view(*z.shape[:2], 2, -1).transpose(1, 2) for z in (x, x if y is None else y))
        return nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


class Towers(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        for name in names:
            setattr(self, name, nn.ModuleDict({"attn": Attend()}))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [getattr(self, name)["attn"](x) for name, x in zip(self.names, inputs, strict=True)]


def towers(first: str, patches: int, second: str = "text_model") -> hookattn.Trace:
    """A model of two towers that no adapter knows: the first sees patches, the second six tokens."""
    inputs = (torch.randn(1, patches, 8), torch.randn(1, 6, 8))
    return hookattn.trace(Towers(first, second), inputs, tokens=words(6))


@case
def fewer_patches_than_tokens() -> tuple[hookattn.Trace, Expected]:
    return towers("vision_model", 4), [[none(4)], [words(6)]]


@case
def as_many_patches_as_tokens() -> tuple[hookattn.Trace, Expected]:
    return towers("vision_model", 6), [[none(6)], [words(6)]]


@case
def more_patches_than_tokens() -> tuple[hookattn.Trace, Expected]:
    return towers("vision_model", 9), [[none(9)], [words(6)]]


@case
def a_tower_of_any_name_beside_a_text_tower() -> tuple[hookattn.Trace, Expected]:
    return towers("left", 6), [[none(6)], [words(6)]]


@case
def an_audio_tower() -> tuple[hookattn.Trace, Expected]:
    return towers("audio_tower", 6, "layers"), [[none(6)], [words(6)]]


@case
def axes_that_are_no_tokens() -> tuple[hookattn.Trace, Expected]:
    return trace([call(4, axes="windows"), call(4, path="x")], words(4)), [[none(4)], [words(4)]]


@case
def patches_alone() -> tuple[hookattn.Trace, Expected]:
    """The vision stack of a trace, selected: its tokens are still the text's."""
    return towers("vision_model", 6).select(stack="vision"), [[none(6)]]


@case
def a_text_stack_that_reads_an_image() -> tuple[hookattn.Trace, Expected]:
    """Cross-attention to as many patches as there are tokens."""
    calls = [
        call(6, path="vision.attn", stack="vision"),
        call(6, 6, path="text.0.cross_attn", stack="text", kind="cross"),
    ]
    return trace(calls, words(6)), [[none(6)], [none(6)]]


def encoder_decoder(t: int, *, s: int = 5, tokens: int = 5) -> hookattn.Trace:
    calls = [
        call(s, path="encoder.attn", stack="encoder"),
        call(t, path="decoder.attn", stack="decoder"),
        call(t, s, path="decoder.cross", stack="decoder", kind="cross"),
    ]
    return trace(calls, words(tokens))


@case
def an_encoder_and_its_decoder() -> tuple[hookattn.Trace, Expected]:
    return encoder_decoder(3), [[words(5)], [none(3)], [words(5)]]


@case
def a_decoder_of_as_many_tokens() -> tuple[hookattn.Trace, Expected]:
    return encoder_decoder(5), [[words(5)], [none(5)], [words(5)]]


@case
def a_decoder_without_its_encoder() -> tuple[hookattn.Trace, Expected]:
    """The cross-attention says that the tokens are those of the sequence that it reads."""
    return encoder_decoder(5).select(stack="decoder"), [[none(5)], [words(5)]]


@case
def a_decoder_with_tokens_of_its_own() -> tuple[hookattn.Trace, Expected]:
    own = encoder_decoder(5).select(stack="decoder", kind="self")
    own.tokens = [words(5, "d")]
    return own, [[words(5, "d")]]


@case
def more_tokens_than_the_encoder_has_keys() -> tuple[hookattn.Trace, Expected]:
    """They are of something else, though the decoder runs several times."""
    calls = [call(5, path="encoder.attn", stack="encoder")]
    for i in range(3):
        calls.append(call(1, i + 1, path="decoder.attn", stack="decoder", step=i))
        calls.append(call(1, 5, path="decoder.cross", stack="decoder", kind="cross", step=i))
    return trace(calls, words(8)), [[none(5)], [none(1)], [none(5)], [none(2)], [none(5)], [none(3)], [none(5)]]


@case
def latents_that_read_the_tokens() -> tuple[hookattn.Trace, Expected]:
    """As many latents as tokens, in the encoder: only what they read are the tokens."""
    calls = [
        call(6, 6, path="encoder.cross_attention", stack="encoder", kind="cross"),
        call(6, path="encoder.0", stack="encoder"),
    ]
    return trace(calls, words(6)), [[words(6)], [none(6)]]


@case
def one_learned_query() -> tuple[hookattn.Trace, Expected]:
    return trace([call(6), call(1, 6, path="pool")], words(6)), [[words(6)], [words(6)]]


@case
def learned_queries_and_other_keys() -> tuple[hookattn.Trace, Expected]:
    return trace([call(3, 6, path="pool"), call(3, path="mixer")], words(6)), [[words(6)], [none(3)]]


# ----------------------------------------------------------------------------------------------- lengths and batches


@case
def more_tokens_than_keys() -> tuple[hookattn.Trace, Expected]:
    return trace([call(5)], words(6)), [[none(5)]]


@case
def fewer_tokens_than_keys() -> tuple[hookattn.Trace, Expected]:
    return trace([call(5)], words(4)), [[none(5)]]


@case
def virtual_tokens_before_the_prompt() -> tuple[hookattn.Trace, Expected]:
    """Prefix tuning: three keys that no token is of stand first, and which keys these are is not in the extents."""
    return trace([call(5, 8)], words(5)), [[none(8)]]


@case
def virtual_tokens_before_a_generation() -> tuple[hookattn.Trace, Expected]:
    return steps([(5, 8), (1, 9), (1, 10)], words(8)), [[none(8)], [none(9)], [none(10)]]


@case
def a_key_that_the_module_adds() -> tuple[hookattn.Trace, Expected]:
    return trace([call(5, 6)], words(5)), [[none(6)]]


@case
def padded_batches() -> tuple[hookattn.Trace, Expected]:
    """Padding has tokens, on either side."""
    left, right = ["<pad>", "<pad>", *words(3)], [*words(3, "r"), "<pad>", "<pad>"]
    return trace([call(5, b=2)], [left, right]), [[left, right]]


@case
def batches_without_their_padding() -> tuple[hookattn.Trace, Expected]:
    return trace([call(5, b=2)], [words(5), words(3)]), [[none(5), none(5)]]


@case
def prompts_without_their_padding() -> tuple[hookattn.Trace, Expected]:
    """Padded on the left, the tokens of the shorter row would all be two places off."""
    made = steps([(5, 5), (1, 6)], [words(8), words(6)], b=2)
    return made, [[none(5), none(5)], [none(6), none(6)]]


@case
def one_list_for_all() -> tuple[hookattn.Trace, Expected]:
    return trace([call(4, b=3)], words(4)), [[words(4)] * 3]


@case
def lists_that_are_not_as_many_as_the_batch() -> tuple[hookattn.Trace, Expected]:
    return trace([call(4, b=3)], [words(4), words(4, "x")]), [[none(4)] * 3]


@case
def selected_queries() -> tuple[hookattn.Trace, Expected]:
    return trace([call(6, rows=(4, 1))], words(6)), [[words(6)]]


@case
def without_weights() -> tuple[hookattn.Trace, Expected]:
    return trace([call(6, keep=("q", "k", "mask"))], words(6)), [[words(6)]]


@case
def modules_that_run_twice() -> tuple[hookattn.Trace, Expected]:
    calls = [call(t, s, step=i) for i, (t, s) in enumerate([(3, 3), (1, 4), (1, 5)]) for _ in range(2)]
    return trace(calls, words(6)), [[words(n)] for n in (3, 3, 4, 4, 5, 5)]


# -------------------------------------------------------------------------------------------------------- generations


@case
def a_cache_that_grows() -> tuple[hookattn.Trace, Expected]:
    return steps([(3, 3), (1, 4), (1, 5)], words(6)), [[words(n)] for n in (3, 4, 5)]


@case
def the_tokens_of_the_prompt() -> tuple[hookattn.Trace, Expected]:
    return steps([(3, 3), (1, 4), (1, 5)], words(3)), [[[*words(3), *none(n)]] for n in (0, 1, 2)]


@case
def fewer_tokens_than_the_prompt() -> tuple[hookattn.Trace, Expected]:
    return steps([(3, 3), (1, 4)], words(2)), [[none(3)], [none(4)]]


@case
def no_cache() -> tuple[hookattn.Trace, Expected]:
    return steps([(3, 3), (4, 4), (5, 5)], words(6)), [[words(n)] for n in (3, 4, 5)]


@case
def a_static_cache() -> tuple[hookattn.Trace, Expected]:
    return steps([(3, 8), (1, 8), (1, 8)], words(6)), [[[*words(6), None, None]]] * 3


@case
def a_window_that_drops_the_oldest_keys() -> tuple[hookattn.Trace, Expected]:
    made = steps([(5, 5), (1, 3), (1, 3)], words(8))
    return made, [[words(5)], [words(8)[3:6]], [words(8)[4:7]]]


@case
def a_window_that_leaves_the_prompt() -> tuple[hookattn.Trace, Expected]:
    made = steps([(5, 5), (1, 3), (1, 3), (1, 3), (1, 3)], words(5))
    rest: list[Names] = [[*words(5)[3:], None], [words(5)[4], None, None], none(3), none(3)]
    return made, [[words(5)], *[[x] for x in rest]]


@case
def a_window_of_as_many_keys_as_the_prompt() -> tuple[hookattn.Trace, Expected]:
    """Two keys on, the prompt's tokens are as many as the keys, and not theirs."""
    made = steps([(4, 4), (1, 4), (1, 4)], words(4))
    return made, [[words(4)], [[*words(4)[1:], None]], [[*words(4)[2:], None, None]]]


@case
def chunks_of_a_prompt() -> tuple[hookattn.Trace, Expected]:
    return steps([(2, 2), (2, 4), (1, 5), (1, 6)], words(5)), [
        [words(2)], [words(4)], [words(5)], [[*words(5), None]],
    ]  # fmt: skip


@case
def candidates_that_were_taken_back() -> tuple[hookattn.Trace, Expected]:
    return steps([(3, 3), (3, 6), (3, 7), (2, 8)], words(9)), [[words(n)] for n in (3, 6, 7, 8)]


@case
def selected_queries_of_a_generation() -> tuple[hookattn.Trace, Expected]:
    calls = [call(5, 5, rows=(4,)), call(1, 3, step=1, rows=(0,))]
    return trace(calls, words(7)), [[words(5)], [words(7)[3:6]]]


@case
def steps_from_a_later_one_on() -> tuple[hookattn.Trace, Expected]:
    """A cache that grows has dropped nothing."""
    made = steps([(3, 3), (1, 4), (1, 5), (1, 6)], words(7)).select(step=[2, 3])
    return made, [[words(5)], [words(6)]]


@case
def one_step_alone() -> tuple[hookattn.Trace, Expected]:
    """Nothing tells a cache of all that was fed from a window of the last tokens."""
    return steps([(3, 3), (1, 4), (1, 5)], words(6)).select(step=2), [[none(5)]]


@case
def one_step_alone_with_tokens_of_its_own() -> tuple[hookattn.Trace, Expected]:
    return steps([(1, 5)], words(5), first=2), [[words(5)]]


@case
def a_window_from_a_later_step_on() -> tuple[hookattn.Trace, Expected]:
    return steps([(5, 5), (1, 3), (1, 3), (1, 3)], words(8)).select(step=[2, 3]), [[none(3)], [none(3)]]


@case
def two_generations() -> tuple[hookattn.Trace, Expected]:
    """Of one of which the tokens are; it is not known of which."""
    made = steps([(3, 3), (1, 4), (3, 3), (1, 4)], words(5))
    return made, [[none(3)], [none(4)], [none(3)], [none(4)]]


@case
def two_generations_of_as_many_keys_as_tokens() -> tuple[hookattn.Trace, Expected]:
    """By chance a step has as many keys as there are tokens."""
    made = steps([(3, 3), (1, 4), (2, 2), (1, 3), (1, 4)], words(4))
    return made, [[none(3)], [none(4)], [none(2)], [none(3)], [none(4)]]


@case
def two_forwards_of_the_same_tokens() -> tuple[hookattn.Trace, Expected]:
    return steps([(4, 4), (4, 4)], words(4)), [[words(4)], [words(4)]]


@case
def two_forwards_of_other_lengths() -> tuple[hookattn.Trace, Expected]:
    return steps([(4, 4), (3, 3)], words(4)), [[words(4)], [none(3)]]


@case
def put_together() -> tuple[hookattn.Trace, Expected]:
    """The last token never was a key."""
    return trace([call(6, notes=(stitching_note(3),))], words(7)), [[words(6)]]


@case
def a_model_that_generates() -> tuple[hookattn.Trace, Expected]:
    made = _generated("llama")
    return made, [[words(9)[: c.k.shape[2]]] for c in made]


@case
def a_model_that_generates_in_a_window() -> tuple[hookattn.Trace, Expected]:
    made = _generated("mistral")
    ends = {0: 5, 1: 6, 2: 7, 3: 8}
    expected = [[words(9)[ends[c.step] - c.k.shape[2] : ends[c.step]]] for c in made]
    assert any(c.step and c.k.shape[2] < ends[c.step] for c in made), "nothing was dropped"
    return made, expected


@case
def a_stitched_generation() -> tuple[hookattn.Trace, Expected]:
    made = _generated("llama").stitch()
    return made, [[words(9)[:8]] for _ in made]


def _generated(name: str) -> hookattn.Trace:
    pytest.importorskip("transformers")
    from tests import tiny_models
    from tests.generation.test_stitch import mistral

    model = mistral() if name == "mistral" else getattr(tiny_models, name)()
    ids = tiny_models.ids(5, batch=1)
    with hookattn.tracing(model, tokens=words(9)) as made, torch.no_grad():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False
        )  # fmt: skip
    return made


# -------------------------------------------------------------------------------------------- tokens given by stack


def translation(sizes: Sequence[tuple[int, int]] = ((6, 6),), s: int = 4, **named: list[list[str]]) -> hookattn.Trace:
    """An encoder of S tokens and a decoder, whose steps have T queries and as many keys as said, one layer of each."""
    calls = [call(s, path="encoder.attn", stack="encoder")]
    for step, (t, keys) in enumerate(sizes):
        calls.append(call(t, keys, path="decoder.attn", stack="decoder", step=step))
        calls.append(call(t, s, path="decoder.cross", stack="decoder", kind="cross", step=step))
    made = trace(calls, words(s))
    made.stack_tokens = named
    return made


@case
def a_decoder_without_tokens_of_its_own() -> tuple[hookattn.Trace, Expected]:
    return translation(), [[words(4)], [none(6)], [words(4)]]


@case
def a_decoder_that_was_given_tokens() -> tuple[hookattn.Trace, Expected]:
    made = translation(encoder=[words(4)], decoder=[words(6, "d")])
    return made, [[words(4)], [words(6, "d")], [words(4)]]


@case
def a_decoder_alone_with_tokens() -> tuple[hookattn.Trace, Expected]:
    return translation(decoder=[words(6, "d")]), [[words(4)], [words(6, "d")], [words(4)]]


@case
def a_decoder_that_generates() -> tuple[hookattn.Trace, Expected]:
    made = translation([(2, 2), (1, 3), (1, 4)], encoder=[words(4)], decoder=[words(3, "d")])
    own = [*words(3, "d"), None]
    return made, [[words(4)], *([each] for n in (2, 3, 4) for each in (own[:n], words(4)))]


@case
def a_vision_tower_whose_patches_have_names() -> tuple[hookattn.Trace, Expected]:
    made = towers("vision_model", 4)
    made.stack_tokens = {"vision": [words(4, "p")]}
    return made, [[words(4, "p")], [words(6)]]


QUERIES: dict[str, Callable[[], tuple[hookattn.Trace, list[list[str | None]]]]] = {
    # Of each call of cross-attention the names of its queries.
    "whole": lambda: (translation(decoder=[words(6, "d")]), [words(6, "d")]),
    "too few": lambda: (translation(decoder=[words(5, "d")]), [none(6)]),
    "none": lambda: (translation(encoder=[words(4)]), [none(6)]),
    "steps": lambda: (
        translation([(2, 2), (1, 3), (1, 4)], decoder=[words(3, "d")]),
        [words(2, "d"), words(3, "d")[2:], [None]],
    ),
    "steps without a cache": lambda: (
        translation([(2, 2), (3, 3), (4, 4)], decoder=[words(4, "d")]),
        [words(n, "d") for n in (2, 3, 4)],
    ),
}


@pytest.mark.parametrize("name", QUERIES)
def test_queries_of_cross_attention_have_the_tokens_of_their_stack(name: str, tmp_path: Path) -> None:
    made, expected = QUERIES[name]()
    crossing = [i for i, c in enumerate(made) if c.site.crosses]
    drawn = parts_of(made)
    assert [[None if x.isdigit() else x for x in drawn[i].queries] for i in crossing] == expected
    # A measure of cross-attention by query has a token for each.
    table = analyze.measure(made, "entropy", by="query")
    told = [table[table["call"] == i]["token"].tolist() for i in crossing]
    assert [[None if x is None or x != x else x for x in row] for row in told] == expected
    (viewed,) = in_node([made], tmp_path, "queries")
    assert [[None if x.isdigit() else x for x in viewed[i][0][1]] for i in crossing] == expected


def test_a_file_keeps_the_tokens_of_stacks(tmp_path: Path) -> None:
    made = translation(encoder=[words(4)], decoder=[words(6, "d")])
    again = hookattn.load(made.save(tmp_path / "t.safetensors"))
    assert again.stack_tokens == made.stack_tokens and again.tokens == made.tokens
    assert again.select(stack="decoder").stack_tokens == made.stack_tokens
    assert hookattn.load(translation().save(tmp_path / "u.safetensors")).stack_tokens == {}


def test_a_translation_is_traced_with_both(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests import tiny_models

    ids = {"input_ids": tiny_models.ids(5, batch=1), "decoder_input_ids": tiny_models.ids(3, batch=1)}
    tokens = {"encoder": words(5), "decoder": [words(3, "d")]}
    made = hookattn.trace(tiny_models.t5(), ids, tokens=tokens, to=tmp_path / "t.safetensors")
    assert made.tokens == [words(5)] and made.stack_tokens == {"encoder": [words(5)], "decoder": [words(3, "d")]}
    part = parts_of(hookattn.load(tmp_path / "t.safetensors"), kind="cross", layer=0)[0]
    assert (list(part.queries), list(part.keys)) == (words(3, "d"), words(5))
    wrong = hookattn.trace(tiny_models.t5(), ids, tokens={"decodr": words(3)})
    assert any("names decodr, and the stacks that attended are encoder, decoder" in note for note in wrong.notes)
    for bad in ({"decoder": "text"}, {3: words(3)}, {"decoder": [1, 2]}):
        with pytest.raises(InputError, match="tokens"):
            hookattn.trace(tiny_models.t5(), ids, tokens=bad)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- the three


def of_tables(made: hookattn.Trace) -> Expected:
    found: list[Sequence[Names]] = []
    for view in views(made):
        names = named_keys(view)
        found.append([none(view.shape[3])] * view.shape[0] if isinstance(names, str) else list(map(list, names)))
    return found


def of_figures(made: hookattn.Trace) -> Expected:
    """What is no number is a name."""
    batches = [view.shape[0] for view in views(made)]
    drawn = [parts_of(made, batch=i) if i < min(batches) else [] for i in range(max(batches))]
    assert min(batches) == max(batches)
    return [[[None if k.isdigit() else k for k in drawn[i][n].keys] for i in range(b)] for n, b in enumerate(batches)]


SCRIPT = """
import { open } from "node:fs/promises";
const [bundle, side, ...paths] = process.argv.slice(2);
const { Trace, axesOf } = await import(bundle);
const found = [];
for (const path of paths) {
  const file = await open(path);
  const { size } = await file.stat();
  const read = async (start, end) => {
    const { buffer } = await file.read(new Uint8Array(end - start), 0, end - start, start);
    return buffer.buffer;
  };
  const trace = await Trace.open({ name: path, size, read });
  const batches = (call) => Array.from({ length: call.extents.B }, (_, batch) => axesOf(trace, call, batch));
  const told = ({ named, labels }) => [named, labels.map((l) => l.raw)];
  found.push(trace.calls.map((call) => batches(call).map((axes) => told(axes[side]))));
  await file.close();
}
console.log(JSON.stringify(found));
"""


def in_node(
    traces: Sequence[hookattn.Trace], folder: Path, side: str = "keys"
) -> list[list[list[tuple[bool, list[str]]]]]:
    """Of each trace, call and batch entry: whether the viewer names its keys (or queries), and what it calls each."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node: the viewer's module runs in it")
    paths = [made.save(folder / f"{i}.safetensors") for i, made in enumerate(traces)]
    (folder / "keys.mjs").write_text(SCRIPT)
    (folder / "viewer.mjs").write_bytes(BUNDLE.read_bytes())
    ran = subprocess.run(
        [node, folder / "keys.mjs", folder / "viewer.mjs", side, *paths], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    found: list[list[list[tuple[bool, list[str]]]]] = json.loads(ran.stdout)
    return found


@pytest.fixture(scope="module")
def viewed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Expected]:
    """Of each case what the viewer says: one run of node for all."""
    traces = {name: made()[0] for name, made in CASES.items()}
    found = in_node(list(traces.values()), tmp_path_factory.mktemp("traces"))
    return {
        name: [[[None if x.isdigit() else x for x in raw] if named else none(len(raw)) for named, raw in each]
               for each in calls]
        for name, calls in zip(traces, found, strict=True)
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_tables(name: str) -> None:
    made, expected = CASES[name]()
    assert of_tables(made) == expected


@pytest.mark.parametrize("name", CASES)
def test_figures(name: str) -> None:
    made, expected = CASES[name]()
    assert of_figures(made) == expected


@pytest.mark.parametrize("name", CASES)
def test_the_viewer(name: str, viewed: dict[str, Expected]) -> None:
    assert viewed[name] == CASES[name]()[1]


# ------------------------------------------------------------------------------------------- what else follows the rule


WINDOW = [(5, 5), (1, 3), (1, 3)]


def test_tables_of_keys_have_the_tokens_of_a_window() -> None:
    table = analyze.received(steps(WINDOW, words(8)))
    assert table[table["step"] == 1]["token"].tolist() == words(8)[3:6]
    found = analyze.top_targets(steps(WINDOW, words(6)), words(6)[5])
    assert found["step"].tolist() == [1] * 3 and set(found["target"]) == set(words(6)[3:])
    late = analyze.top_targets(steps(WINDOW, words(6)), 2, k=3)
    targets = late[late["step"] == 2].sort_values("key")["target"]
    assert targets.tolist()[:2] == words(6)[4:] and targets.isna().tolist() == [False, False, True]


def test_tokens_of_queries_are_those_of_their_keys() -> None:
    table = analyze.measure(steps(WINDOW, words(6)), "entropy", by="query")
    assert table[table["step"] == 1]["token"].tolist() == [words(6)[5]]
    assert table[table["step"] == 2]["token"].tolist() == [None]
    table = analyze.measure(towers("vision_model", 6), "entropy", by="query")
    assert table[table["stack"] == "vision"]["token"].isna().all()
    drawn = parts_of(steps(WINDOW, words(6)))
    assert [part.queries for part in drawn[1:]] == [(words(6)[5],), ("6",)]


def test_measures_of_tokens_need_one_for_every_key() -> None:
    made = list(views(steps(WINDOW, words(5))))
    assert key_labels(made[0]) == [tuple(words(5))]
    assert key_labels(made[1]) == "the tokens don't fit: lists of 5 for 3 keys, which end at token 5"
    with pytest.raises(MeasureError, match="the vision stack reads none"):
        analyze.SameWord()(towers("vision_model", 6))


def test_labels_that_a_caller_gives_follow_the_window_too() -> None:
    tags = tuple("NVDNVDNV")
    made = list(views(steps(WINDOW, words(8))))
    assert key_labels(made[1], (tags,), "tags") == [tags[3:6]] and key_labels(made[2], (tags,), "tags") == [tags[4:7]]
    assert key_labels(next(iter(views(towers("vision_model", 4)))), (tags[:4],)) == [tags[:4]]


def test_padding_follows_the_same_rule() -> None:
    real = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    made = steps(WINDOW, words(8))
    assert [view.keys[0].int().tolist() for view in views(made, real)] == [[0, 0, 0, 0, 1], [0, 1, 1], [1, 1, 1]]
    both, own = towers("vision_model", 6), torch.tensor([[1, 1, 1, 1, 0, 0]])
    with pytest.raises(MeasureError, match="expected B S = 1 6 of the vision stack alone"):
        analyze.measure(both, "entropy", real=own)
    for stack in ("text", "vision"):
        assert [view.keys.tolist() for view in views(both.select(stack=stack), own)] == [own.bool().tolist()]


def test_statistics_tell_how_long_the_steps_are() -> None:
    made = steps(WINDOW, words(8), keep=("entropy",))
    assert of_tables(made) == [[words(8)[a:b]] for a, b in ((0, 5), (3, 6), (4, 7))]
