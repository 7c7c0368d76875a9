"""Texts to ids, through any tokenizer: one of transformers, or whatever encodes a text to ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..errors import InputError
from ..printable import first_line


@dataclass
class Encoded:
    """A batch of texts.

    Attributes:
        args: what the tokenizer made, tensors by name.
        ids: B S.
        real: bool, B S: True = no padding.
        tokens: B lists of S strings.
        segments: for each token the number of the text of a pair that it is of, −1 for padding; None: no pair, or the
            tokenizer does not tell.
    """

    args: dict[str, Any]
    ids: Tensor
    real: Tensor
    tokens: list[list[str]]
    segments: list[list[int]] | None = None

    @property
    def lengths(self) -> str:
        """How many tokens each text has."""
        return ", ".join(map(str, self.real.sum(1).tolist()))


def encode(
    tokenizer: Any,
    texts: Sequence[Any],
    pairs: Sequence[str] | None = None,
    *,
    limit: int | None = None,
    side: str | None = None,
    name: str = "the model",
) -> Encoded:
    """Texts as one padded batch. The tokenizer is left as it was.

    Args:
        tokenizer: one of transformers; or anything with ``encode(text)``, which returns ids, or an object with ``ids``
            and ``tokens``, and with ``decode([id])``, which returns text.
        texts: texts, or conversations: lists of ``{"role", "content"}``, through the chat template.
        pairs: for each text the second one of the pair.
        limit: how many tokens are kept of each text.
        side: where padding goes, ``"left"`` or ``"right"``; None: where the tokenizer has it.
        name: of the model, in errors.

    Raises:
        InputError: it is no tokenizer, or there is no padding for texts of different lengths.
    """
    if callable(tokenizer) and hasattr(tokenizer, "convert_ids_to_tokens"):
        return _by_transformers(tokenizer, texts, pairs, limit, side, name)
    if callable(getattr(tokenizer, "encode", None)) and not isinstance(tokenizer, (str, type)):
        return _by_encode(tokenizer, texts, pairs, limit)
    raise InputError(
        f"tokenizer: expected one of transformers, or an object with encode(text) and decode(ids); got "
        f"{checks.printed(tokenizer)}."
    )


def _by_transformers(
    tokenizer: Any, texts: Sequence[Any], pairs: Sequence[str] | None, limit: int | None, side: str | None, name: str
) -> Encoded:
    several = len(texts) > 1
    # Without padding where there is one text: some tokenizers have no padding token, and need none for it.
    options: dict[str, Any] = {"return_tensors": "pt", "padding": several}
    if several and side is not None:
        options["padding_side"] = side
    if limit is not None:
        options |= {"truncation": True, "max_length": limit}
    chat = [not isinstance(text, str) for text in texts]
    with _padding(tokenizer, several, name):
        try:
            if any(chat):
                if pairs is not None or not all(chat):
                    raise InputError("text: conversations are no pairs, and do not go into one batch with plain texts.")
                made = tokenizer.apply_chat_template(
                    list(texts), add_generation_prompt=True, return_dict=True, tokenize=True, **options
                )
            else:
                made = tokenizer(list(texts), None if pairs is None else list(pairs), **options)
        except (ValueError, TypeError) as error:
            raise InputError(f"the tokenizer of {name} does not take this: {first_line(error)}") from error
    ids = made["input_ids"]
    real = made["attention_mask"].bool() if "attention_mask" in made else torch.ones_like(ids, dtype=torch.bool)
    return Encoded(
        dict(made),
        ids,
        real,
        [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()],
        None if pairs is None else _segments(made, real),
    )


@contextmanager
def _padding(tokenizer: Any, needed: bool, name: str) -> Iterator[None]:
    """A padding token for the block, where one is needed and there is none."""
    if not needed or tokenizer.pad_token is not None:
        yield
        return
    stand_in = tokenizer.eos_token or tokenizer.unk_token
    if stand_in is None:
        raise InputError(f"{name}: the tokenizer has no padding token, so several texts are no batch.")
    tokenizer.pad_token = stand_in
    try:
        yield
    finally:
        tokenizer.pad_token = None


def _segments(made: Any, real: Tensor) -> list[list[int]] | None:
    """The text of the pair that each token is of; special tokens are of the text that they follow, or begin."""
    if getattr(made, "encodings", None):
        rows = [made.sequence_ids(i) for i in range(len(real))]
    elif "token_type_ids" in made:
        return torch.where(real, made["token_type_ids"], -1).tolist()
    else:
        return None
    found = []
    for row, own in zip(rows, real.tolist(), strict=True):
        now, segments = 0, []
        for text, there in zip(row, own, strict=True):
            now = now if text is None else text
            segments.append(now if there else -1)
        found.append(segments)
    return found


def _by_encode(tokenizer: Any, texts: Sequence[Any], pairs: Sequence[str] | None, limit: int | None) -> Encoded:
    if pairs is not None or any(not isinstance(text, str) for text in texts):
        raise InputError("pairs and conversations need a tokenizer of transformers; this one has encode(text) alone.")
    made = [_of_encode(tokenizer, text, limit) for text in texts]
    lengths = [len(ids) for ids, _ in made]
    if len({*lengths}) > 1:
        raise InputError(
            f"this tokenizer pads nothing, and the texts have {', '.join(map(str, lengths))} tokens: give texts of one "
            "length, or one after the other."
        )
    ids = torch.tensor([ids for ids, _ in made], dtype=torch.long).reshape(len(made), lengths[0])
    return Encoded({"input_ids": ids}, ids, torch.ones_like(ids, dtype=torch.bool), [tokens for _, tokens in made])


def _of_encode(tokenizer: Any, text: str, limit: int | None) -> tuple[list[int], list[str]]:
    made = tokenizer.encode(text)
    ids = getattr(made, "ids", made)
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids) if isinstance(ids, Sequence) else None
    if ids is None or any(not isinstance(i, int) for i in ids):
        raise InputError(f"tokenizer: expected encode(text) to return ids, and got {checks.printed(made)}.")
    ids = ids[:limit]
    tokens = getattr(made, "tokens", None)
    if isinstance(tokens, Sequence) and len(tokens) >= len(ids):
        return ids, [str(token) for token in tokens[: len(ids)]]
    return ids, [_decoded(tokenizer, i) for i in ids]


def _decoded(tokenizer: Any, i: int) -> str:
    decode = getattr(tokenizer, "decode", None)
    return str(decode([i])) if callable(decode) else str(i)


def token_strings(tokenizer: Any, ids: Tensor) -> list[list[str]] | None:
    """B lists of S strings of ids, B S; None: the tokenizer has none."""
    rows: list[list[int]] = ids.tolist()
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return [tokenizer.convert_ids_to_tokens(row) for row in rows]
    return None if tokenizer is None else [[_decoded(tokenizer, i) for i in row] for row in rows]
