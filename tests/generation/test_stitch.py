"""``trace.stitch()``: a generation's steps put together are what one forward over the final sequence makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hookattn_adapters
import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import FieldNotCaptured, StitchError
from hookattn.calls.key_history import KeyHistory
from hookattn.generation import stitch as stitching
from hookattn.models.registry import using
from hookattn.testing import check_trace
from tests import tiny_models as tiny
from tests.derivations import Derived, derivations
from tests.tiny_models import SMALL, WORDS, ids, padded

transformers = pytest.importorskip("transformers")

NEW = 6
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with using(*hookattn_adapters.ADAPTERS):
        yield
    torch.set_num_threads(threads)


def mistral(how: str = "sdpa") -> Any:
    options = {**SMALL, **WORDS, "num_key_value_heads": 2, "sliding_window": 4}
    return tiny.build("MistralForCausalLM", "MistralConfig", how, **options)


def gemma3(how: str = "sdpa") -> Any:
    return tiny.build(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        how,
        **SMALL,
        **WORDS,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    )


def gpt_oss(how: str = "eager") -> Any:
    return tiny.gpt_oss("eager")


def bloom(how: str = "sdpa") -> Any:
    return tiny.bloom("eager")


def bart(how: str = "sdpa") -> Any:
    return tiny.build(
        "BartForConditionalGeneration",
        "BartConfig",
        how,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_position_embeddings=64,
        init_std=0.4,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **WORDS,
    )


def whisper(how: str = "sdpa") -> Any:
    return tiny.build(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        how,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=40,
        init_std=0.4,
        decoder_start_token_id=3,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        **WORDS,
    )


CAUSAL = {
    "gpt2": tiny.gpt2,
    "llama": tiny.llama,
    "mistral": mistral,
    "gemma3": gemma3,
    "bloom": bloom,
    "gpt_oss": gpt_oss,
}
MIXED = {"t5": tiny.t5, "bart": bart, "whisper": whisper}


def prompt(model: Any) -> dict[str, Tensor]:
    if model.config.model_type == "whisper":
        return {"input_features": torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": ids(6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Any, hookattn.Trace]:
    """What is generated, the same tokens with and without a trace, and the trace: faithful throughout."""
    options = {**GREEDY, **options}
    capture = options.pop("capture", None)
    torch.manual_seed(5)
    plain = model.generate(**inputs, **options)
    torch.manual_seed(5)
    with hookattn.tracing(model, verify="full", capture=capture) as trace:
        made = model.generate(**inputs, **options)
    a, b = (x if isinstance(x, Tensor) else x.sequences for x in (plain, made))
    assert torch.equal(a, b), "generation is another one when traced"
    assert trace.faithful and not trace.skipped, [c for c in trace if not c.certificate.faithful]
    check_trace(trace)
    return made, trace


def forward(model: Any, **inputs: Any) -> hookattn.Trace:
    """One forward over everything, without a cache."""
    with torch.no_grad():
        made = hookattn.trace(model, {**inputs, "use_cache": False}, verify="full")
    assert made.faithful and not made.skipped
    return made


def compare(
    stitched: hookattn.Trace, whole: hookattn.Trace, tol: float = 1e-5, live: Tensor | None = None, rows: int = 0
) -> None:
    """Field by field; ``live``: B T, the queries that are no padding."""
    sites = [(c.site.path, c.site.kind) for c in whole]
    assert sorted((c.site.path, c.site.kind) for c in stitched) == sorted(sites)
    for want in whole:
        got = next(c for c in stitched if (c.site.path, c.site.kind) == (want.site.path, want.site.kind))
        queries = torch.ones(want.q.shape[0], want.q.shape[2], dtype=torch.bool)
        if live is not None and want.site.kind != "cross" and want.site.stack != "encoder":
            queries = live
        at = queries[:, None, :, None]
        hidden = want.mask.expand_as(want.weights)
        assert got.weights.shape == want.weights.shape, f"{got}, not {want}"
        for name in ("q", "output", "weights"):
            a, b = getattr(got, name), getattr(want, name)
            size = max(1.0, (b * at).abs().max().item())
            error = ((a - b) * at).abs().max().item() / size
            assert error <= tol, f"{got}: {name} is off by {error:.3g}"
        for name in ("k", "v"):
            a, b = getattr(got, name), getattr(want, name)
            keys = at if want.site.kind != "cross" and want.site.stack != "encoder" else torch.ones(1)
            error = ((a - b) * keys).abs().max().item() / max(1.0, b.abs().max().item())
            assert error <= tol, f"{got}: {name} is off by {error:.3g}"
        assert torch.equal(got.mask.expand_as(want.weights) & at, hidden & at), f"{got}: another mask"
        gap = torch.where(hidden & at, got.scores - want.scores, 0.0).abs().max().item()
        assert gap <= tol * max(1.0, want.scores[hidden].abs().max().item()), f"{got}: scores are off by {gap:.3g}"


def decoding(trace: hookattn.Trace) -> hookattn.Trace:
    """Without an encoder."""
    return trace[[c.site.stack for c in trace].count("encoder") :]


def over(model: Any, tokens: Tensor, **more: Any) -> hookattn.Trace:
    """The forward over everything that was fed: all tokens but the last."""
    if model.config.model_type == "whisper":  # which leaves the start token out of what it returns
        tokens = torch.cat([torch.full((len(tokens), 1), model.config.decoder_start_token_id), tokens], 1)
    if model.config.is_encoder_decoder:
        return forward(model, **prompt(model), **more, decoder_input_ids=tokens[:, :-1])
    return forward(model, input_ids=tokens[:, :-1], **more)


@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*CAUSAL, *MIXED])
def test_greedy_with_a_dynamic_cache(family: str, how: str) -> None:
    model = {**CAUSAL, **MIXED}[family](how)
    tokens, trace = generate(model, prompt(model))
    stitched = trace.stitch()
    check_trace(stitched)
    compare(stitched, over(model, tokens))
    assert {c.step for c in stitched} == {0} and stitched.faithful
    assert len({id(c) for c in stitched} & {id(c) for c in trace}) == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma3", "t5", "bart", "whisper"])
def test_a_static_cache(family: str) -> None:
    model = {**CAUSAL, **MIXED}[family]()
    tokens, trace = generate(model, prompt(model), cache_implementation="static")
    compare(trace.stitch(), over(model, tokens))
    widths = {c.k.shape[2] for c in trace.select(step=[1, 2, 3], kind="self")}
    assert len(widths) == (2 if family == "gemma3" else 1), "no static cache ran"


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_without_a_cache(family: str) -> None:
    model = {**CAUSAL, **MIXED}[family]()
    tokens, trace = generate(model, prompt(model), use_cache=False)
    compare(trace.stitch(), over(model, tokens))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_a_prompt_in_pieces(family: str) -> None:
    model = CAUSAL[family]()
    tokens, trace = generate(model, prompt(model), prefill_chunk_size=2)
    assert [c.q.shape[2] for c in trace if c.site.layer == 0][:4] == [2, 2, 2, 1]
    compare(trace.stitch(), over(model, tokens))


class Rounded(transformers.cache_utils.QuantizedLayer):
    """Keys and values in 8 bits, but for the newest two."""

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        size = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / size).round().to(torch.int8), size

    def _dequantize(self, q_tensor: tuple[Tensor, Tensor]) -> Tensor:
        return q_tensor[0] * q_tensor[1]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_quantized_cache(family: str, beams: int) -> None:
    model = CAUSAL[family]()

    def cache() -> Any:
        return transformers.Cache(layers=[Rounded(residual_length=3) for _ in range(2)])

    plain = model.generate(**prompt(model), **GREEDY, past_key_values=cache(), num_beams=beams)
    with hookattn.tracing(model, verify="full") as trace:
        tokens = model.generate(**prompt(model), **GREEDY, past_key_values=cache(), num_beams=beams)
    assert torch.equal(plain, tokens) and trace.faithful
    check_trace(trace)
    stitched = trace.stitch()
    assert stitched[0].derivable == (), "the keys of each step were other ones"
    if beams == 1:
        compare(stitched, over(model, tokens), tol=0.1)
        for call in stitched:  # each row is its own step's
            for one in trace.select(path=call.site.path):
                start = 0 if one.step == 0 else 5 + one.step
                n = one.k.shape[2]
                assert torch.equal(call.weights[:, :, start:n, :n], one.weights)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma3"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_prompts_padded_on_the_left(family: str, cache: str | None) -> None:
    model = CAUSAL[family]()
    inputs = padded("left", 6, 2)
    tokens, trace = generate(model, inputs, **({"cache_implementation": cache} if cache else {}))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW - 1, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    stitched = trace.stitch()
    compare(stitched, over(model, tokens, attention_mask=mask, position_ids=positions), live=mask.bool())
    for call in stitched:
        assert not call.mask[1, :, 2:, :2].any() and not call.weights[1, :, 2:, :2].any()


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "t5", "bart"])
def test_beam_search(family: str, cache: str | None) -> None:
    model = {**CAUSAL, **MIXED}[family]()
    made, trace = generate(
        model,
        prompt(model),
        num_beams=3,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_scores=True,
        **({"cache_implementation": cache} if cache else {}),
    )
    order = made.beam_indices
    assert any(order[n, i] != order[n, i + 1] for n in range(4) for i in range(NEW - 1)), "no beam was ever moved"
    followed = decoding(trace.stitch(beams=order))
    if model.config.is_encoder_decoder:
        more = {k: v.repeat_interleave(2, 0) for k, v in prompt(model).items()}
        want = forward(model, **more, decoder_input_ids=made.sequences[:, :-1])
    else:
        want = forward(model, input_ids=made.sequences[:, :-1])
    compare(followed, decoding(want))
    # What the keys tell is the same: every sequence that ends in a row of the last step is that row's.
    found = decoding(trace.stitch())
    for n, row in enumerate(order[:, -1].tolist()):
        for a, b in zip(found, followed, strict=True):
            for name in ("q", "k", "v", "weights", "output", "mask"):
                x, y = (one[at if len(one) > 1 else 0] for one, at in ((getattr(a, name), row), (getattr(b, name), n)))
                # Weights are derived of all rows at once here, and there step by step: of the same numbers, not in the
                # same order.
                close = name == "weights" and torch.allclose(x, y, rtol=1e-4, atol=1e-6)
                assert close or torch.equal(x, y), (a, name)


def test_a_beam_that_ends_early() -> None:
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight[2] *= 3
    made, trace = generate(
        model,
        {"input_ids": ids(6), "attention_mask": torch.ones(2, 6, dtype=torch.long)},
        num_beams=4,
        num_return_sequences=4,
        min_new_tokens=0,
        max_new_tokens=8,
        return_dict_in_generate=True,
        output_scores=True,
    )
    order, tokens = made.beam_indices, made.sequences
    ended = [int((row >= 0).sum()) for row in order]
    assert min(ended) < max(ended), "all beams were of one length"
    followed = trace.stitch(beams=order)
    for n, steps in enumerate(ended):
        t = 6 + steps - 1
        want = forward(model, input_ids=tokens[n : n + 1, :t])
        for a, b in zip(followed, want, strict=True):
            assert (a.weights[n, :, :t, :t] - b.weights[0]).abs().max() < 1e-5
            assert not a.weights[n, :, t:].any() and not a.mask[n, :, t:].any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])
@pytest.mark.parametrize("by", ["assistant", "lookup"])
def test_assisted_decoding(family: str, by: str) -> None:
    model = CAUSAL[family]()
    tokens = ids(6, 1)
    tokens = torch.cat([tokens, tokens], 1)  # so that there is something to look up
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if by == "assistant":
        helper = CAUSAL[family]()
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in helper.parameters():
                weight += 0.3 * weight.std() * torch.randn_like(weight)
        helper.generation_config.num_assistant_tokens = 3
        helper.generation_config.num_assistant_tokens_schedule = "constant"
        options = {"assistant_model": helper}
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    made, trace = generate(model, inputs, max_new_tokens=10, min_new_tokens=0, **options)
    fed = sum(c.q.shape[2] for c in trace if c.site.layer == 0)
    agreed = family == "gemma3" and by == "assistant"  # both say the last token again, and so agree on everything
    assert agreed or fed > made.shape[1] - 1, "no candidate was rejected"
    stitched = trace.stitch(length=made.shape[1] - 1)
    compare(stitched, forward(model, input_ids=made[:, :-1]))
    check_trace(stitched)


def test_another_model_that_runs_beside_the_traced_one_is_not_recorded() -> None:
    model, other = tiny.llama(), tiny.llama()
    with hookattn.tracing(model) as trace:
        model(ids(6))
        other(ids(6))
    assert [c.site.layer for c in trace] == [0, 1]


# --------------------------------------------------------------------------------------------- what was captured


def test_a_trace_from_a_file_is_stitched_the_same(tmp_path: Path) -> None:
    model = tiny.llama()
    _, trace = generate(model, prompt(model))
    for compact in (False, True):
        loaded = hookattn.load(trace.save(tmp_path / "run.safetensors", compact=compact))
        stitched = loaded.stitch()
        again = hookattn.load(stitched.save(tmp_path / "whole.safetensors", compact=compact))
        for a, b, c in zip(trace.stitch(), stitched, again, strict=True):
            for name in hookattn.FIELDS:
                x, y, z = a.get(name), b.get(name), c.get(name)
                assert x is y is z is None or max((x.float() - t.float()).abs().max() for t in (y, z)) < 1e-5, name


@pytest.mark.parametrize(
    ("capture", "kept"), [(("weights", "k"), "weights"), (("q", "k", "mask"), "q"), (("output", "k"), "output")]
)
def test_what_was_not_captured_is_not_there(capture: tuple[str, ...], kept: str) -> None:
    model = tiny.llama()
    tokens, trace = generate(model, prompt(model), capture=capture)
    stitched = trace.stitch()
    for a, b in zip(stitched, over(model, tokens), strict=True):
        assert (getattr(a, kept) - getattr(b, kept)).abs().max() < 1e-5
        with pytest.raises(FieldNotCaptured, match="capture="):
            _ = a.v


def test_heads_and_layers_that_were_selected() -> None:
    model = tiny.llama()
    with hookattn.tracing(model, heads=[3, 0], layers=[-1]) as trace:
        tokens = model.generate(**prompt(model), **GREEDY)
    (call,) = trace.stitch()
    want = over(model, tokens)[-1]
    assert (call.weights - want.weights[:, [3, 0]]).abs().max() < 1e-5
    assert call.heads == (3, 0) and call.kv_heads == (1, 0)
    check_trace(trace.stitch())


def test_one_row_of_weights_alone_needs_no_keys() -> None:
    model = tiny.gpt2()
    inputs = {"input_ids": ids(6, 1), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    tokens, trace = generate(model, inputs, capture="weights")
    for a, b in zip(trace.stitch(), over(model, tokens), strict=True):
        assert (a.weights - b.weights).abs().max() < 1e-5
    two, trace = generate(model, prompt(model), capture="weights")
    with pytest.raises(FieldNotCaptured, match=r"capture=\('weights', 'k'\).*beams=False"):
        trace.stitch()
    for a, b in zip(trace.stitch(beams=False), over(model, two), strict=True):
        assert (a.weights - b.weights).abs().max() < 1e-5


def test_cross_attention_alone() -> None:
    model = tiny.t5()
    tokens, trace = generate(model, prompt(model))
    cross = trace.select(kind="cross")
    with pytest.raises(StitchError, match="beams=False"):
        cross.stitch()
    compare(cross.stitch(beams=False), over(model, tokens).select(kind="cross"))
    assert len(trace.select(stack="encoder").stitch()) == 2


# ------------------------------------------------------------------------------------------- what can't be stitched


@pytest.fixture(scope="module")
def llama_trace() -> hookattn.Trace:
    with using(*hookattn_adapters.ADAPTERS):
        return generate(tiny.llama(), prompt(tiny.llama()))[1]


def test_a_missing_step_or_layer_is_said(llama_trace: hookattn.Trace) -> None:
    with pytest.raises(StitchError, match=r"layers\.0.*step 2.*7 earlier positions.*6 of them"):
        llama_trace.select(step=[0, 2, 3]).stitch()
    with pytest.raises(StitchError, match=r"6 earlier positions.*0 of them"):
        llama_trace.select(step=[1, 2]).stitch()
    with pytest.raises(StitchError, match=r"layers\.1\.self_attn is there in steps \[0, 1, 3"):
        llama_trace._with(c for c in llama_trace if (c.step, c.site.layer) != (2, 1)).stitch()
    with pytest.raises(StitchError, match="no calls"):
        hookattn.Trace().stitch()


def test_bad_arguments_are_said(llama_trace: hookattn.Trace) -> None:
    for length in (0, 99, -1):
        with pytest.raises(StitchError, match="11 positions"):
            llama_trace.stitch(length=length)
    with pytest.raises(StitchError, match="beam_indices"):
        llama_trace.stitch(beams=torch.zeros(3))
    with pytest.raises(StitchError, match="row 7"):
        llama_trace.stitch(beams=[[7, 7]])
    with pytest.raises(StitchError, match="9 steps"):
        llama_trace.stitch(beams=torch.zeros(1, 9, dtype=torch.long))


def test_forwards_of_different_sequences_are_not_one_generation() -> None:
    model = tiny.llama()
    with hookattn.tracing(model) as trace:
        model(ids(6))
        model(ids(7))
    with pytest.raises(StitchError, match="continues no row"):
        trace.stitch()
    with hookattn.tracing(model) as trace:
        model(ids(6))
        model(ids(6, 4))
    with pytest.raises(StitchError, match="continues no row"):
        trace.stitch()


def test_two_generations_from_one_prompt_are_not_one() -> None:
    model = tiny.llama()
    with hookattn.tracing(model) as trace:
        for seed in (0, 1):
            torch.manual_seed(seed)
            tokens = model.generate(**prompt(model), max_new_tokens=4, min_new_tokens=4, do_sample=True)
    for beams in (None, False):
        with pytest.raises(StitchError, match=r"step 4 .* begins again with 6 positions, after 9"):
            trace.stitch(beams=beams)
    compare(trace.select(step=[4, 5, 6, 7]).stitch(), over(model, tokens))


def test_selected_queries_leave_gaps() -> None:
    model = tiny.llama()
    with hookattn.tracing(model, queries=slice(-1, None)) as trace:
        model.generate(**prompt(model), **GREEDY)
    with pytest.raises(StitchError, match="without queries="):
        trace.stitch()


def test_a_static_cache_without_its_mask_is_not_guessed_at() -> None:
    model = tiny.llama()
    with hookattn.tracing(model, capture=("q", "k")) as trace:
        model.generate(**prompt(model), **GREEDY, cache_implementation="static")
    with pytest.raises(FieldNotCaptured, match=r"capture=\('q', 'k', 'mask'\)"):
        trace.stitch()


def test_one_forward_stays_what_it_is() -> None:
    model = tiny.llama()
    trace = forward(model, **prompt(model))
    compare(trace.stitch(), trace)


def test_a_module_that_is_run_twice_in_a_forward() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.att = nn.MultiheadAttention(8, 2, batch_first=True)
            self.past: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            for i in range(2):
                keys = torch.cat([*self.past[i : i + 1], x], 1)
                self.past[i : i + 1] = [keys]
                hidden = torch.ones(x.shape[1], keys.shape[1]).triu(1 + keys.shape[1] - x.shape[1]).bool()
                x = x + self.att(x, keys, keys, attn_mask=hidden)[0]
            return x

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(1, 5, 8)
    with hookattn.tracing(model) as trace, torch.no_grad():
        for part in (x[:, :3], x[:, 3:4], x[:, 4:]):
            model(part)
    model.past.clear()
    with torch.no_grad():
        whole = hookattn.trace(model, x)
    stitched = trace.stitch()
    assert len(stitched) == 2
    for a, b in zip(stitched, whole, strict=True):
        assert (a.weights - b.weights).abs().max() < 1e-6


def test_the_page_on_generation(capsys: pytest.CaptureFixture[str]) -> None:
    """Its code, run in one go, prints what it says."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "generation.md").read_text()
    code = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    told = [part.split("```")[0] for part in page.split("```text\n")[1:]]
    names: dict[str, Any] = {}
    for source, said in zip(code, told, strict=True):
        exec(compile(source, "generation.md", "exec"), names)
        assert capsys.readouterr().out == said


# ------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "bloom", "t5"])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_part_is_that_part_of_the_whole(family: str, cache: str | None, where: str, tmp_path: Path) -> None:
    model = {**CAUSAL, **MIXED}[family]()
    _, trace = generate(model, prompt(model), **({"cache_implementation": cache} if cache else {}))
    if where == "file":
        trace = hookattn.load(trace.save(tmp_path / "x.safetensors"))
    for call in trace.stitch():
        b, h, t, _ = call.q.shape
        for heads, queries, batch in (([3, 1], slice(t - 3, None), 1), (2, [0, t - 1], None), (None, 1, [0])):
            part = call.at(heads=heads, queries=queries, batch=batch)
            for name in ("q", "bias", "scores", "mask", "weights", "output"):
                whole, found = call.get(name), part.get(name)
                assert (whole is None) == (found is None)
                if whole is not None and found is not None:
                    cut = whole.expand(b, h, t, -1)[chosen(b, batch)][:, chosen(h, heads)][:, :, chosen(t, queries)]
                    torch.testing.assert_close(found.expand(cut.shape), cut, rtol=1e-5, atol=1e-6)


def chosen(n: int, wanted: Any) -> list[int]:
    if isinstance(wanted, (list, int)):
        return [wanted] if isinstance(wanted, int) else wanted
    return list(range(n))[slice(None) if wanted is None else wanted]


def test_one_head_of_a_generation_is_derived_alone() -> None:
    _, trace = generate(tiny.llama(), {"input_ids": ids(5)})
    stitched = trace.stitch()
    with derivations() as found:
        one = stitched[1].at(heads=2, batch=0).weights
    assert found == [Derived(1, 1, 5 + NEW - 1, 5 + NEW - 1)] and one.shape == (1, 1, 10, 10)


def test_what_the_steps_formed_is_read_of_the_rows_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that has none of them, nothing."""
    _, trace = generate(tiny.gpt2("eager"), {"input_ids": ids(5)})
    call, read = trace.stitch()[0], Counter[int]()
    of_step = stitching._Site._of_step

    def watched(self: Any, i: int, *given: Any) -> Any:
        read[i] += 1
        return of_step(self, i, *given)

    monkeypatch.setattr(stitching._Site, "_of_step", watched)
    assert torch.equal(call.at(queries=-1).weights, trace[-2].weights) and read == {NEW - 1: 1}


def test_the_keys_of_a_growing_cache_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, trace = generate(tiny.llama(), {"input_ids": ids(5)})
    call, read = trace.stitch()[0], 0
    keys = KeyHistory.keys

    def watched(self: KeyHistory, step: int) -> Tensor:
        nonlocal read
        read += 1
        return keys(self, step)

    monkeypatch.setattr(KeyHistory, "keys", watched)
    assert torch.equal(call.k, trace[-2].k) and read == 2, "once for the stitched ones, and once for the last step's"


# ------------------------------------------------------------------------------------------------ caches that drop keys


class Turned(nn.Module):
    """One layer that attends by rotary positions over a cache, which a test may do to what it likes."""

    def __init__(self, rotary: bool = True, layers: int = 2, heads: int = 2, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, heads * width)
        self.layers = nn.ModuleList(TurnedLayer(rotary, heads, width) for _ in range(layers))

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None, upto: int | None = None) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers[:upto]:
            x = x + layer(x, positions, mask)
        return x

    def empty(self) -> None:
        for layer in self.layers:
            layer.keys = layer.values = None


class TurnedLayer(nn.Module):
    keys: Tensor | None = None
    values: Tensor | None = None
    arrange: list[int] | None = None

    def __init__(self, rotary: bool, heads: int, width: int) -> None:
        super().__init__()
        self.rotary, self.heads = rotary, heads
        self.qkv = nn.Linear(heads * width, 3 * heads * width)

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        if not self.rotary:
            return x
        half = x.shape[-1] // 2
        angles = positions[:, None] * 0.5 ** torch.arange(half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        q, k = self.turn(q, positions), self.turn(k, positions)
        if self.keys is not None:
            k, v = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        if self.arrange is not None:
            k, v = k[:, :, self.arrange], v[:, :, self.arrange]
        self.keys, self.values = k, v
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=causal if mask is None else mask)
        return out.transpose(1, 2).flatten(2)


TOKENS = torch.tensor([[3, 4, 5, 3, 6, 7, 8, 3, 9, 10, 11, 12], [5, 4, 3, 3, 8, 7, 2, 3, 1, 10, 13, 12]])


def with_evictions(
    model: Any, drops: dict[int, Any], capture: Any = None, rows: int = 2, prompt: int = 8
) -> tuple[hookattn.Trace, dict[int, list[int]]]:
    """One token a step after a prompt; before some, every layer's cache is cut by ``drops``.

    Returns:
        The trace, and for each query the positions of the keys that it had.
    """
    model.empty()
    there: list[int] = []
    seen: dict[int, list[int]] = {}
    with torch.no_grad(), hookattn.tracing(model, capture=capture, verify="full") as trace:
        for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, TOKENS.shape[1]))]:
            if start in drops:
                kept = drops[start](len(there))
                there = [there[i] for i in kept]
                for layer in model.layers:
                    layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
            for i in range(start, stop):
                there.append(i)
                seen[i] = list(there)
            model(TOKENS[:rows, start:stop], torch.arange(start, stop))
    return trace, seen


def check_positions(trace: hookattn.Trace, whole: hookattn.Trace, seen: dict[int, list[int]]) -> None:
    """Every weight of every step is where its key was, and nothing else is anywhere."""
    n = len(seen)
    for site in whole:
        assert site.weights.shape[-2:] == (n, n)
        wanted = torch.zeros_like(site.weights)
        masks = torch.zeros(n, n, dtype=torch.bool)
        for step in trace.select(path=site.site.path):
            t = step.q.shape[2] if step.has("q") else step.weights.shape[2]
            first = 0 if step.step == 0 else 7 + step.step
            for row in range(t):
                at = seen[first + row]
                wanted[:, :, first + row, at] = step.weights[:, :, row, : len(at)]
                masks[first + row, at] = True
        assert torch.allclose(site.weights, wanted, atol=1e-6)
        if site.has("mask"):
            assert torch.equal(site.mask.expand(1, 1, n, n)[0, 0], masks)
        if site.has("k") and site.has("v"):
            assert site.k.shape[2] == site.v.shape[2] == n
            assert torch.allclose(site.weights @ site.v, site.output, atol=1e-5)


SINKS = {
    "sinks and a window": {8: lambda n: [0, 1, *range(n - 3, n)]},
    "twice": {8: lambda n: [0, 1, *range(n - 3, n)], 10: lambda n: [0, *range(n - 2, n)]},
    "at every step": {i: lambda n: [0, *range(n - 4, n)] for i in range(8, 12)},
    "here and there": {9: lambda n: [1, 2, 5, 8]},
    "a window alone": {8: lambda n: range(n - 4, n)},
}


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("drops", SINKS.values(), ids=SINKS)
@pytest.mark.parametrize("beams", [None, False])
def test_dropped_keys_stand_where_they_were(drops: Any, beams: Any, rotary: bool) -> None:
    """Without positions two tokens that are the same have the same key in the first layer: the second tells them."""
    trace, seen = with_evictions(Turned(rotary), {i: lambda n, f=f: list(f(n)) for i, f in drops.items()})
    check_positions(trace, trace.stitch(beams=beams), seen)


def test_keys_that_a_cache_turns_are_told_by_their_values() -> None:
    model = Turned()

    def drop(n: int) -> list[int]:
        kept = [0, 1, *range(n - 3, n)]
        for layer in model.layers:  # each stands where its place in the cache is, from now on
            turned = layer.turn(layer.keys.clone(), torch.zeros(n) - torch.arange(n) + torch.arange(n) * 0.5)
            layer.keys = turned
        return kept

    trace, seen = with_evictions(model, {8: drop})
    check_positions(trace, trace.stitch(beams=False), seen)


@pytest.mark.parametrize("capture", [("weights",), ("q", "weights", "mask")])
def test_without_keys_and_values_dropped_keys_are_nowhere(capture: Any) -> None:
    trace, _ = with_evictions(Turned(), {8: lambda n: [0, 1, *range(n - 3, n)]}, capture=capture)
    for beams in (None, False):
        with pytest.raises(FieldNotCaptured, match=r"capture=\(.*'k'\)"):
            trace.stitch(beams=beams)
    trace, seen = with_evictions(Turned(), {8: lambda n: [0, 1, *range(n - 3, n)]}, capture=("weights", "v"), rows=1)
    check_positions(trace, trace.stitch(), seen)


def test_heads_that_keep_other_keys_are_refused() -> None:
    model = Turned()

    def drop(n: int) -> list[int]:
        for layer in model.layers:
            layer.keys[:, 1] = layer.keys[:, 1].roll(1, 1)
            layer.values[:, 1] = layer.values[:, 1].roll(1, 1)
        return [0, 1, *range(n - 3, n)]

    trace, _ = with_evictions(model, {8: drop})
    for beams in (None, False):
        with pytest.raises(StitchError, match=r"has dropped keys before step 1, and which ones"):
            trace.stitch(beams=beams)


def test_keys_whose_last_are_gone_are_taken_as_taken_back_and_it_is_said() -> None:
    trace, _ = with_evictions(Turned(), {8: lambda n: list(range(5))})
    whole = trace.stitch()
    assert whole[0].weights.shape[-1] == 9
    assert any("positions 5 to 7 are taken as fed in vain" in note for note in whole[0].notes)
    trace, _ = with_evictions(Turned(), {8: lambda n: [0, 1, 4]})
    with pytest.raises(StitchError, match="which ones can't be told"):
        trace.stitch(beams=False)


def test_layers_that_drop_different_keys() -> None:
    model = Turned()
    model.empty()
    keep = {0: [0, 5, 6, 7], 1: [0, 1, 2, 3, 4, 5, 6, 7]}
    with torch.no_grad(), hookattn.tracing(model) as trace:
        model(TOKENS[:, :8], torch.arange(8))
        for i, layer in enumerate(model.layers):
            layer.keys, layer.values = layer.keys[:, :, keep[i]], layer.values[:, :, keep[i]]
        model(TOKENS[:, 8:9], torch.arange(8, 9))
    for beams in (None, False):
        for i, call in enumerate(trace.stitch(beams=beams)):
            assert call.mask.expand(1, 1, 9, 9)[0, 0, 8].nonzero().flatten().tolist() == [*keep[i], 8]
            last = trace.select(step=1)[i].weights[:, :, 0]
            assert torch.allclose(call.weights[:, :, 8][..., [*keep[i], 8]], last, atol=1e-6)


# ------------------------------------------------------------------------------------------------ packed; early exits


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("beams", [None, False])
def test_packed_sequences(between: bool, beams: Any) -> None:
    """Two sequences in one row, each goes on by a token a step; new keys stand behind all others, or behind theirs."""
    model = Turned()
    tokens = TOKENS[:1]
    sequence = torch.tensor([0, 0, 0, 1, 1, 0, 1, 0, 1])
    positions = torch.tensor([0, 1, 2, 0, 1, 3, 2, 4, 3])
    with torch.no_grad():
        model.empty()
        order = list(range(5))
        with hookattn.tracing(model) as trace:
            for start, stop in ((0, 5), (5, 7), (7, 9)):
                new = list(range(start, stop))
                cached = order if start else []
                own = torch.tensor([*cached, *new])
                mask = (sequence[new][:, None] == sequence[own]) & (torch.tensor(new)[:, None] >= own)
                if between and start:  # the layer's cache holds the sequences one behind the other
                    sorted_order = sorted(range(len(own)), key=lambda i: (int(sequence[own[i]]), int(own[i])))
                    for layer in model.layers:
                        layer.arrange = sorted_order
                    mask = mask[:, sorted_order]
                model(tokens[:, new], positions[new], mask[None, None])
                order = [int(i) for i in own]
                if between and start:
                    order = [order[i] for i in sorted_order]
        model.empty()
        for layer in model.layers:
            layer.arrange = None
        mask = (sequence[:, None] == sequence) & torch.ones(9, 9, dtype=torch.bool).tril()
        once = hookattn.trace(model, (tokens[:, :9], positions, mask[None, None]))
    for mine, other in zip(trace.stitch(beams=beams), once, strict=True):
        assert torch.equal(mine.mask.expand(1, 1, 9, 9), other.mask.expand(1, 1, 9, 9))
        assert torch.allclose(mine.weights, other.weights, atol=1e-5)
        assert torch.allclose(mine.k, other.k, atol=1e-5)


@pytest.mark.parametrize("upto", [[None, 1, 1], [None, 1, None], [1, None, None], [1, 1, None]])
def test_layers_that_are_left_out_of_some_steps_are_refused(upto: list[int | None]) -> None:
    model = Turned()
    model.empty()
    with torch.no_grad(), hookattn.tracing(model) as trace:
        for start, stop, layers in zip((0, 8, 9), (8, 9, 10), upto, strict=True):
            model(TOKENS[:, start:stop], torch.arange(start, stop), upto=layers)
    for beams in (None, False):
        with pytest.raises(StitchError, match=r"layers\.1 .*is there in steps .*only now and then"):
            trace.stitch(beams=beams)
