"""``trace_text``: from a model's name and a text to a trace with its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, pairwise
from os import PathLike
from typing import Any, Unpack

import torch
from torch import nn

from .. import checks
from ..api import TracingOptions, tracing
from ..calls.extents import extents_of
from ..errors import InputError, ModelError
from ..recording.forward_inputs import arguments, run_forward
from ..traces import Trace
from .inputs import Given, inputs_of, to_device
from .model import Loaded, load_pretrained
from .tokenizers import token_strings


def trace_text(
    model: Any,
    text: Any = None,
    *,
    pair: str | Sequence[str] | None = None,
    images: Any = None,
    audio: Any = None,
    tokenizer: Any = None,
    processor: Any = None,
    generate: int | None = None,
    load: Mapping[str, Any] | None = None,
    **options: Unpack[TracingOptions],
) -> Trace:
    """Run a model on a text and return what its attention did, with tokens, sentences of a pair and padding.

    ::

        hookattn.trace_text("name-on-the-hub", "The cat sat on the mat.")
        hookattn.trace_text("path/to/encoder", "The cat sat.", pair="The cat lay.")
        hookattn.trace_text(model, ["One.", "Another one."], tokenizer=tokenizer, generate=20)
        hookattn.trace_text(transformers.pipeline("fill-mask"), "The [MASK] sat.")
        hookattn.trace_text("path/to/model-of-pictures", images="cat.png")

    Args:
        model: a name on the hub, or a directory that transformers saved, which is loaded in eval mode; a loaded model,
            whose mode is left alone; or a pipeline of transformers.
        text: a text; several, which become one padded batch; or a conversation, a list of ``{"role", "content"}``,
            through the chat template.
        pair: the second sentence of a pair; one for each text, where there are several. ``trace.segments`` then says
            which token is of which.
        images: a picture or several, through the model's processor: paths, or what that takes.
        audio: likewise sounds: the path of a WAV file, the samples at the processor's rate, or a pair of samples and
            their rate.
        tokenizer: of a loaded model; by default the one that it names. One of transformers, or anything with
            ``encode(text)`` and ``decode(ids)``.
        processor: likewise, of pictures and sounds.
        generate: trace ``model.generate``: so many new tokens, the likeliest each time; every one is a step.
        load: what ``from_pretrained`` takes beside the name: ``{"attn_implementation": "eager", "dtype": …,
            "device_map": "cuda", "revision": …, "trust_remote_code": True}``.
        options: those of :func:`hookattn.tracing`. ``tokens`` is found here, where it is not given.

    Returns:
        A Trace. Inputs are brought to where the model is. Gradients are off, but for ``gradients=True`` and
        ``attached=True``.

    Raises:
        ModelError: there is no such model, it cannot be loaded, or cannot generate.
        InputError: there is nothing to run it on; the model has no tokenizer or processor, or it does not take this;
            texts and pairs are not as many; or an argument is of another kind. And the errors of
            :func:`hookattn.trace`.
    """
    texts, pairs = _texts(text, pair)
    pictures, sounds = _several(images, "images"), _sounds(audio)
    if not (texts or pictures or sounds):
        raise InputError("there is nothing to run the model on: give text, images= or audio=.")
    if generate is not None:
        checks.number(
            "generate", generate, "a number of new tokens, at least 1", lambda x: x >= 1 and x.is_integer(), InputError
        )
    if processor is not None and not callable(processor):
        raise checks.wrong("processor", processor, "a processor, which makes inputs of pictures, sounds and text")
    if processor is not None and not (pictures or sounds or hasattr(processor, "tokenizer")):
        raise InputError(
            "processor: it is for images= and audio=, of which there are none; texts go through tokenizer=."
        )
    unknown = options.keys() - TracingOptions.__annotations__.keys()
    if unknown:
        raise checks.wrong("options", min(unknown), f"options among {', '.join(TracingOptions.__annotations__)}")
    if load is not None and not isinstance(load, Mapping):
        raise checks.wrong("load", load, "a mapping of options of from_pretrained")
    loaded = _loaded(model, tokenizer, processor, load)
    given = inputs_of(loaded, texts=texts, pairs=pairs, images=pictures, audio=sounds, generate=generate is not None)
    return run(loaded, given, generate, options)


def run(
    loaded: Loaded,
    given: Given,
    generate: int | None,
    options: TracingOptions,
    watch: Callable[[Trace], None] | None = None,
) -> Trace:
    """Trace one forward of a model, or a generation.

    Args:
        loaded: the model.
        given: its inputs, on any device.
        generate: how many new tokens; None: a forward.
        options: those of :func:`hookattn.tracing`.
        watch: is called with the trace before the model runs.

    Raises:
        ModelError: it cannot generate; InputError: the inputs do not fit its forward.
    """
    model = loaded.model
    if generate is not None and not callable(getattr(model, "generate", None)):
        raise ModelError(f"{type(model).__name__} has no generate(); it is no generating model.")
    with_graph = options.get("gradients") is True or options.get("attached") is True
    inputs = to_device(given.args, _device_of(model))
    if options.get("tokens") is None and given.tokens is not None:
        options = {**options, "tokens": given.tokens}
    with nullcontext() if with_graph else torch.no_grad(), tracing(model, **options) as made:
        made.segments = given.segments
        made.notes += [*loaded.notes, *given.notes]
        if watch is not None:
            watch(made)
        if generate is None:
            made.output = run_forward(model, *arguments(inputs))
        else:
            _generate(model, made, given, inputs, generate)
    return made


def _generate(model: Any, made: Trace, given: Given, inputs: Any, count: int) -> None:
    """``model.generate``, and the tokens that it wrote."""
    tokenizer = given.tokenizer
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = getattr(tokenizer, "eos_token_id", None) if pad is None else pad
    named = inputs if isinstance(inputs, Mapping) else {"inputs": inputs[0] if isinstance(inputs, tuple) else inputs}
    written = model.generate(
        **named, max_new_tokens=count, do_sample=False, **({} if pad is None else {"pad_token_id": pad})
    )
    made.output = written
    tokens = token_strings(tokenizer, getattr(written, "sequences", written))
    if tokens is None:
        return
    both = getattr(model.config, "is_encoder_decoder", False)
    start = getattr(model.config, "decoder_start_token_id", None)
    prompt = given.tokens if isinstance(given.tokens, list) else None
    if both:
        prompt = None if start is None else [tokenizer.convert_ids_to_tokens([start])] * len(tokens)
    tokens = _with_prompt(tokens, prompt, _positions_read(made))
    if tokens is None:
        made.notes.append("what generate() returned is not the whole text that was read, so that it names no token")
        return
    if both:
        made.stack_tokens = {**made.stack_tokens, "decoder": tokens}
        return
    made.tokens = tokens
    if made.segments is not None:
        # What is written goes on after the second sentence.
        made.segments = [
            [*own, *([max(own)] * (len(row) - len(own)))] for own, row in zip(made.segments, tokens, strict=True)
        ]


def _with_prompt(written: list[list[str]], prompt: list[list[str]] | None, read: int | None) -> list[list[str]] | None:
    """The whole texts of a generation, whose last token was never read: some models return only what they wrote.

    Args:
        written: what ``generate`` returned, B lists.
        prompt: what it went on from, likewise.
        read: how many positions the model has read; None: not known.
    """
    lacking = 0 if read is None else read + 1 - len(written[0])
    if lacking <= 0:
        return written
    if prompt is None or len(prompt) != len(written) or len(prompt[0]) != lacking:
        return None
    return [[*before, *row] for before, row in zip(prompt, written, strict=True)]


def _positions_read(made: Trace) -> int | None:
    """How many positions of its own text a generating model has read in all steps; None: nothing tells."""
    # What runs last is what writes: encoders and towers run before it.
    own = [c for c in made.calls if not c.site.crosses]
    fed = [c.of_queries or extents_of(c, "T").t for c in own if c.site == own[-1].site]
    known = [t for t in fed if t is not None]
    if not known or len(known) < len(fed):
        return None
    # Without a cache, each step reads all of the text anew.
    grows = all(a < b for a, b in pairwise(known))
    return known[-1] if grows else sum(known)


def _loaded(model: Any, tokenizer: Any, processor: Any, load: Mapping[str, Any] | None) -> Loaded:
    """The model with what is beside it."""
    if isinstance(model, (str, PathLike)):
        loaded = load_pretrained(str(model), load)
    else:
        if load:
            raise InputError("load: these options are for a model that is loaded by its name; this one is loaded.")
        of_pipeline = not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module)
        inner = model.model if of_pipeline else model
        if not isinstance(inner, nn.Module):
            raise InputError(
                "model: expected a name, a directory, an nn.Module or a pipeline of transformers; got "
                f"{checks.printed(model)}."
            )
        name = getattr(inner, "name_or_path", None) or None
        loaded = Loaded(inner, name or type(inner).__name__, name)
        loaded.tokenizer = getattr(model, "tokenizer", None)
        if of_pipeline:
            kinds = ("processor", "image_processor", "feature_extractor")
            loaded.processor = next((p for kind in kinds if (p := getattr(model, kind, None)) is not None), None)
    loaded.tokenizer = loaded.tokenizer if tokenizer is None else tokenizer
    loaded.processor = loaded.processor if processor is None else processor
    return loaded


def _texts(text: Any, pair: Any) -> tuple[list[Any], list[str] | None]:
    """Texts as a list, and for each the second of its pair.

    Raises:
        InputError: they are no texts, or not as many.
    """
    if text is None:
        if pair is not None:
            raise InputError("pair: it is the second sentence of a pair; give the first as text.")
        return [], None
    texts = [text] if isinstance(text, str) else checks.ordered_items(text)
    if texts and isinstance(texts[0], Mapping):  # one conversation
        texts = [texts]
    good = bool(texts) and all(isinstance(t, str) or _is_chat(t) for t in texts or ())
    if texts is None or not good:
        raise checks.wrong("text", text, 'a text, a list of texts, or a list of {"role": …, "content": …}')
    if pair is None:
        return list(texts), None
    pairs = [pair] if isinstance(pair, str) else checks.ordered_items(pair)
    if not pairs or any(not isinstance(p, str) for p in pairs):
        raise checks.wrong("pair", pair, "a text, or a list of texts")
    if len(pairs) != len(texts):
        raise InputError(f"pair: expected one for each text, {len(texts)}, and got {len(pairs)}.")
    return list(texts), list(pairs)


def _is_chat(text: Any) -> bool:
    messages = checks.items_of(text)
    return bool(messages) and all(isinstance(m, Mapping) and "role" in m for m in messages or ())


def _several(given: Any, what: str) -> list[Any]:
    if given is None:
        return []
    found = list(given) if isinstance(given, (list, tuple)) else [given]
    if not found:
        raise checks.wrong(what, given, "one, or a list of some")
    return found


def _sounds(audio: Any) -> list[Any]:
    """Sounds as a list: a pair of samples and their rate is one, and so is a list of numbers."""
    if isinstance(audio, tuple) and len(audio) == 2 and isinstance(audio[1], int):
        return [audio]
    if isinstance(audio, list) and audio and isinstance(audio[0], (int, float)):
        return [audio]
    return _several(audio, "audio")


def _device_of(model: nn.Module) -> torch.device:
    """Where the first of a model's weights is."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device
