"""What goes into the model: text and images through the model's own processors, or tensors from a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .command import first_line
from .models import Loaded

SUFFIXES = (".safetensors", ".pt", ".pth", ".json", ".npz")
_MADE = "{name} is made by a factory and has no {what}: give --inputs, or let the factory return (model, inputs)."
_TOKENIZERS = ("*token*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.bpe")


@dataclass
class Given:
    """The inputs of one forward.

    Attributes:
        args: as :func:`hookattn.trace` takes them.
        tokens: one list of strings for each batch entry, where there is text.
        tokenizer: what made them.
        notes: what a user has to know about them.
    """

    args: Any
    tokens: list[list[str]] | None = None
    tokenizer: Any = None
    notes: list[str] = field(default_factory=list)


def inputs_asked_for(
    loaded: Loaded, *, texts: Sequence[str], pair: tuple[str, str] | None, images: Sequence[str], generate: bool
) -> Given:
    """The inputs that the options ask for, through the model's own processors.

    Raises:
        InputError: the model has no tokenizer or image processor, or a file cannot be read.
    """
    if images:
        return _from_images(loaded, images, texts)
    if texts or pair:
        return _from_text(loaded, texts, pair, generate)
    if loaded.inputs is None:
        raise InputError(f"{loaded.name} gives no inputs: give --inputs, or let the factory return (model, inputs).")
    return Given(loaded.inputs)


def _from_text(loaded: Loaded, texts: Sequence[str], pair: tuple[str, str] | None, generate: bool) -> Given:
    tokenizer = tokenizer_of(loaded)
    config = getattr(loaded.model, "config", None)
    if generate and not getattr(config, "is_encoder_decoder", False):
        tokenizer.padding_side = "left"
    return encoded_texts(loaded, tokenizer, texts, pair=pair, decode=not generate)


def encoded_texts(
    loaded: Loaded,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    pair: tuple[str, str] | None = None,
    decode: bool = True,
    limit: int | None = None,
) -> Given:
    """Texts, as one padded batch, or a pair of sentences.

    Args:
        decode: whether the decoder of an encoder-decoder gets its start token.
        limit: how many tokens are kept of each text.

    Raises:
        InputError: a text has no token, or there is no padding token for several.
    """
    if len(texts) > 1 and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise InputError(f"{loaded.name}: the tokenizer has no padding token, so several texts are no batch.")
    # Without padding where there is one text: some tokenizers have no padding token, and need none for it.
    cut = {} if limit is None else {"truncation": True, "max_length": limit}
    encoded = (
        tokenizer(*pair, return_tensors="pt", **cut)
        if pair
        else tokenizer(list(texts), return_tensors="pt", padding=len(texts) > 1, **cut)
    )
    ids = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise InputError(f"the tokenizer of {loaded.name} makes no token of {texts[0]!r}.")
    given = Given(dict(encoded), [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()], tokenizer)
    config = getattr(loaded.model, "config", None)
    start = getattr(config, "decoder_start_token_id", None)
    if getattr(config, "is_encoder_decoder", False) and decode and start is not None:
        given.args["decoder_input_ids"] = torch.full((ids.shape[0], 1), start)
        given.notes.append("the decoder gets its start token alone; --generate N lets it write")
    return given


def tokenizer_of(loaded: Loaded) -> Any:
    """The model's own tokenizer.

    Raises:
        InputError: there is none.
    """
    if loaded.source is None:
        raise InputError(_MADE.format(name=loaded.name, what="tokenizer"))
    missing = (
        f"{loaded.name} has no tokenizer: put its files (tokenizer.json and tokenizer_config.json) there, or "
        "give token ids with --inputs."
    )
    folder = Path(loaded.source)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        raise InputError(missing)  # transformers would make one with an empty vocabulary
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(loaded.source, trust_remote_code=loaded.trust)
    except Exception as error:
        raise InputError(f"{missing} ({first_line(error)})") from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise InputError(missing)
    return tokenizer


def _from_images(loaded: Loaded, images: Sequence[str], texts: Sequence[str]) -> Given:
    if loaded.source is None:
        raise InputError(_MADE.format(name=loaded.name, what="image processor"))
    pictures = [_read_image(path) for path in images]
    import transformers

    auto = transformers.AutoProcessor if texts else transformers.AutoImageProcessor
    try:
        processor = auto.from_pretrained(loaded.source, trust_remote_code=loaded.trust)
    except Exception as error:
        folder = Path(loaded.source)
        bare = folder.is_dir() and not any(folder.glob("*processor_config.json"))
        raise InputError(
            f"{loaded.name} has no image processor (preprocessor_config.json), so --image cannot be used"
            f"{'.' if bare else ': ' + first_line(error)}"
        ) from error
    try:
        made = (
            processor(text=list(texts), images=pictures, return_tensors="pt", padding=True)
            if texts
            else processor(images=pictures, return_tensors="pt")
        )
    except Exception as error:
        who = f"{type(processor).__name__} of {loaded.name}"
        raise InputError(f"{who} does not take this: {first_line(error)}") from error
    tokenizer = getattr(processor, "tokenizer", None)
    tokens = None
    if texts and tokenizer is not None and "input_ids" in made:
        tokens = [tokenizer.convert_ids_to_tokens(row) for row in made["input_ids"].tolist()]
    return Given(_in_model_dtype(dict(made), loaded.model), tokens, tokenizer)


def _read_image(path: str) -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise InputError('--image needs the package pillow: pip install "hookattn[image]"') from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise InputError(f"{path}: cannot be read as an image: {first_line(error)}") from error


def _in_model_dtype(args: dict[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """Floating inputs in the dtype of the model's weights."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}


def read_tensors(path: str) -> Any:
    """Named tensors from a file: safetensors, .pt (tensors only, no pickled code), .json or .npz.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: inputs are read from {', '.join(SUFFIXES)}, not {suffix or 'a bare name'}.")
    if not os.path.isfile(path):
        raise InputError(f"{path}: there is no such file.")
    try:
        return _READERS[suffix](path)
    except InputError:
        raise
    except Exception as error:
        hint = (
            " Only tensors, and lists and dicts of them, are read: save a dict of tensors with torch.save."
            if suffix in (".pt", ".pth")
            else ""
        )
        raise InputError(f"{path}: cannot be read as {suffix}: {first_line(error)}{hint}") from error


def _read_safetensors(path: str) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _read_torch(path: str) -> Any:
    found = torch.load(path, map_location="cpu", weights_only=True)
    return tuple(found) if isinstance(found, list) else found


def _read_npz(path: str) -> Any:
    import numpy

    with numpy.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _read_json(path: str) -> Any:
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if isinstance(found, list):
        return torch.tensor(found)
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected an object of named, nested lists of numbers, got {type(found).__name__}.")
    made: dict[str, Any] = {}
    for name, value in found.items():
        try:
            made[name] = torch.tensor(value) if isinstance(value, list) else value
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: {name!r} is no even, nested list of numbers: {first_line(error)}") from error
    return made


_READERS = {
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".json": _read_json,
    ".npz": _read_npz,
}


def to_device(x: Any, device: str) -> Any:
    """Tensors, in whatever they are nested, on a device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Mapping):
        return {k: to_device(v, device) for k, v in x.items()}
    if isinstance(x, (tuple, list)):
        moved = [to_device(v, device) for v in x]
        return tuple(moved) if isinstance(x, tuple) else moved
    return x
