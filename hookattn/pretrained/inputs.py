"""What goes into a model: texts, pictures and sounds through the model's own tokenizer or processor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import InputError
from ..printable import first_line
from .model import Loaded
from .tokenizers import Encoded, encode

_TOKENIZERS = ("*token*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.bpe")
_NO_SOURCE = (
    "{name} has no {what} of its own: give {argument}= in Python; on the command line give --inputs, or let the "
    "factory return (model, inputs)."
)


@dataclass
class Given:
    """The inputs of one forward.

    Attributes:
        args: as :func:`hookattn.trace` takes them.
        tokens: token strings, as :func:`hookattn.trace` takes them, where there is text.
        segments: for each of the tokens the number of the text of a pair that it is of, −1 for padding; None: no pair.
        tokenizer: what made them.
        notes: what a user has to know about them.
    """

    args: Any
    tokens: list[list[str]] | dict[str, list[list[str]]] | None = None
    segments: list[list[int]] | None = None
    tokenizer: Any = None
    notes: list[str] = field(default_factory=list)


def inputs_of(
    loaded: Loaded,
    *,
    texts: Sequence[Any] = (),
    pairs: Sequence[str] | None = None,
    images: Sequence[Any] = (),
    audio: Sequence[Any] = (),
    generate: bool = False,
) -> Given:
    """The inputs of a model, through its own tokenizer or processor.

    Args:
        loaded: the model.
        texts: texts, or conversations: lists of ``{"role", "content"}``.
        pairs: for each text the second one of the pair.
        images: pictures: paths of files, or what the processor takes.
        audio: sounds: paths of WAV files, or pairs of samples and their rate, or samples at the processor's rate.
        generate: whether the model is to go on writing.

    Raises:
        InputError: the model has no tokenizer or processor, or it does not take these.
    """
    if images or audio:
        return _through_processor(loaded, texts, images, audio, decode=not generate)
    side = "left" if generate and not _of_config(loaded.model, "is_encoder_decoder") else "right"
    return encoded_texts(loaded, tokenizer_of(loaded), texts, pairs=pairs, decode=not generate, side=side)


def encoded_texts(
    loaded: Loaded,
    tokenizer: Any,
    texts: Sequence[Any],
    *,
    pairs: Sequence[str] | None = None,
    decode: bool = True,
    limit: int | None = None,
    side: str | None = None,
) -> Given:
    """Texts, as one padded batch, or pairs of them.

    Args:
        loaded: the model.
        tokenizer: see :func:`hookattn.pretrained.tokenizers.encode`.
        texts, pairs: see :func:`inputs_of`.
        decode: whether the decoder of an encoder-decoder gets its start token.
        limit: how many tokens are kept of each text.
        side: where padding goes; None: where the tokenizer has it.

    Raises:
        InputError: a text has no token, or there is no padding for several of different lengths.
    """
    encoded = encode(tokenizer, texts, pairs, limit=limit, side=side, name=loaded.name)
    if encoded.ids.shape[1] == 0:
        raise InputError(f"the tokenizer of {loaded.name} makes no token of {checks.printed(texts[0])}.")
    given = Given(encoded.args, encoded.tokens, encoded.segments, tokenizer)
    if decode:
        _start_decoder(loaded.model, given, len(encoded.ids), tokenizer)
    given.args = _fitting(loaded.model, given.args, encoded)
    return given


def _start_decoder(model: nn.Module, given: Given, count: int, tokenizer: Any) -> None:
    """The start token for the decoder of an encoder-decoder, which else has nothing to run on."""
    start = _of_config(model, "decoder_start_token_id")
    if not _of_config(model, "is_encoder_decoder") or start is None:
        return
    given.args["decoder_input_ids"] = torch.full((count, 1), start)
    given.notes.append("the decoder gets its start token alone; generate (--generate N) lets it write")
    if tokenizer is not None:
        named: dict[str, list[list[str]]] = {"decoder": [tokenizer.convert_ids_to_tokens([start])] * count}
        given.tokens = named if given.tokens is None else {"encoder": given.tokens, **named}  # type: ignore[dict-item]


def _fitting(model: nn.Module, args: dict[str, Any], encoded: Encoded) -> Any:
    """Those of the arguments that a forward takes; the ids alone, in the first place, of one that names them otherwise.

    Raises:
        InputError: there is padding, and the forward takes no mask.
    """
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return args
    names = {p.name for p in parameters}
    if callable(getattr(model, "tokenize", None)) and "input_ids" not in names:
        return (args,)  # a pipeline of modules that hands a dictionary of features on
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return args
    if "attention_mask" not in names and not bool(encoded.real.all()):
        raise InputError(
            f"{type(model).__name__}.forward takes no attention_mask, so that it would read the padding of texts of "
            f"different lengths ({encoded.lengths}) as text: give one text, or texts of one length."
        )
    if "input_ids" in names:
        return {name: value for name, value in args.items() if name in names}
    return (encoded.ids,)


def tokenizer_of(loaded: Loaded) -> Any:
    """The model's own tokenizer.

    Raises:
        InputError: there is none.
    """
    for own in (loaded.tokenizer, getattr(loaded.processor, "tokenizer", None)):
        if own is not None:
            return own
    if loaded.source is None:
        raise InputError(_NO_SOURCE.format(name=loaded.name, what="tokenizer", argument="tokenizer"))
    missing = (
        f"{loaded.name} has no tokenizer: put its files (tokenizer.json and tokenizer_config.json) there, or "
        "give token ids with --inputs, in Python with hookattn.trace."
    )
    folder = Path(loaded.source)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        raise InputError(missing)  # transformers would make one with an empty vocabulary
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(loaded.source, **loaded.options)
    except Exception as error:
        raise InputError(f"{missing} ({first_line(error)})") from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise InputError(missing)
    return tokenizer


def _through_processor(
    loaded: Loaded, texts: Sequence[Any], images: Sequence[Any], audio: Sequence[Any], decode: bool
) -> Given:
    what = "image" if images else "audio"
    processor = _processor_of(loaded, bool(texts) or bool(images and audio), what)
    rate = getattr(getattr(processor, "feature_extractor", processor), "sampling_rate", None)
    first: list[Any] = []
    given: dict[str, Any] = {}
    if texts:
        given |= {"text": list(texts), "padding": True}
    if images:
        given["images"] = [_picture(x) for x in images]
    if audio:
        sounds = [_samples(x, rate) for x in audio]
        if texts or images:
            given["audio"] = sounds
        else:
            first = [sounds]  # what is for sounds alone calls them by one name or another
        if rate is not None:
            given["sampling_rate"] = rate
    try:
        made = processor(*first, **given, return_tensors="pt")
    except Exception as error:
        who = f"{type(processor).__name__} of {loaded.name}"
        raise InputError(f"{who} does not take this: {first_line(error)}") from error
    tokenizer = getattr(processor, "tokenizer", None) or loaded.tokenizer
    found = Given(_in_model_dtype(dict(made), loaded.model), tokenizer=tokenizer)
    if texts and tokenizer is not None and "input_ids" in made:
        found.tokens = [tokenizer.convert_ids_to_tokens(row) for row in made["input_ids"].tolist()]
    if decode and "input_ids" not in made:
        if tokenizer is None and _of_config(loaded.model, "is_encoder_decoder") and loaded.source is not None:
            with suppress(InputError):  # its start token goes in all the same, without a name
                found.tokenizer = tokenizer = tokenizer_of(loaded)
        _start_decoder(loaded.model, found, len(images or audio), tokenizer)
    return found


def _processor_of(loaded: Loaded, several: bool, what: str) -> Any:
    """What makes inputs of pictures or sounds; ``several``: and of text besides.

    Raises:
        InputError: there is none.
    """
    if loaded.processor is not None:
        return loaded.processor
    if loaded.source is None:
        raise InputError(_NO_SOURCE.format(name=loaded.name, what=f"{what} processor", argument="processor"))
    import transformers

    auto = (
        transformers.AutoProcessor
        if several
        else (transformers.AutoImageProcessor if what == "image" else transformers.AutoFeatureExtractor)
    )
    try:
        return auto.from_pretrained(loaded.source, **loaded.options)
    except Exception as error:
        folder = Path(loaded.source)
        bare = folder.is_dir() and not any(folder.glob("*processor_config.json"))
        raise InputError(
            f"{loaded.name} has no {what} processor (preprocessor_config.json), so --{what} cannot be used"
            f"{'.' if bare else ': ' + first_line(error)}"
        ) from error


def _picture(given: Any) -> Any:
    """A picture of a file, in RGB; anything else as it is."""
    if not isinstance(given, (str, PathLike)):
        return given
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise InputError('pictures need the package pillow: pip install "hookattn[image]"') from error
    try:
        with Image.open(given) as image:
            return image.convert("RGB")
    except OSError as error:
        raise InputError(f"{given}: cannot be read as an image: {first_line(error)}") from error


def _samples(given: Any, rate: int | None) -> Any:
    """Samples of one sound, mono, float32 in [−1, 1] where they come of a file, N.

    Raises:
        InputError: no WAV file, or at another rate than the processor's.
    """
    samples, own = given, rate
    if isinstance(given, (str, PathLike)):
        own, samples = _wav(given)
    elif isinstance(given, tuple) and len(given) == 2:
        samples, own = given
    if own is not None and rate is not None and own != rate:
        raise InputError(
            f"audio: its rate is {own} samples a second, and the model's processor takes {rate}: resample it, with "
            "torchaudio.functional.resample or scipy.signal.resample_poly, say."
        )
    made = torch.as_tensor(samples)
    if made.ndim != 1 or not made.numel():
        raise InputError(f"audio: expected the samples of one channel, and got {checks.printed(samples)}.")
    return made.numpy()


def _wav(path: Any) -> tuple[int, Any]:
    try:
        from scipy.io import wavfile
    except ModuleNotFoundError as error:
        raise InputError('WAV files are read by scipy: pip install "hookattn[analyze]", or give the samples') from error
    try:
        rate, samples = wavfile.read(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a WAV file: {first_line(error)}") from error
    if samples.dtype.kind in "iu":
        # Whole numbers of a WAV file span their type; those of 8 bits begin at 0.
        half = 2.0 ** (8 * samples.dtype.itemsize - 1)
        samples = samples / half - (samples.dtype.kind == "u")
    return int(rate), (samples.mean(1) if samples.ndim == 2 else samples).astype("float32")


def _of_config(model: nn.Module, name: str) -> Any:
    return getattr(getattr(model, "config", None), name, None)


def _in_model_dtype(args: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Floating inputs in the dtype of the model's weights."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}


def to_device(x: Any, device: torch.device | str) -> Any:
    """Tensors, in whatever they are nested, on a device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Mapping):
        return {k: to_device(v, device) for k, v in x.items()}
    if isinstance(x, (tuple, list)):
        moved = [to_device(v, device) for v in x]
        return tuple(moved) if isinstance(x, tuple) else moved
    return x
