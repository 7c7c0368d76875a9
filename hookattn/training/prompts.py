"""The fixed prompts of a monitor: what the model is given at every measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..calls.token_lists import token_lists
from ..errors import InputError
from ..recording.forward_inputs import tokens_of


@dataclass(frozen=True)
class Prompts:
    """Prompts that go through the model together.

    Attributes:
        inputs: as :func:`hookattn.trace` takes them.
        tokens: a list of strings for each, where it is known what they are.
    """

    inputs: Any
    tokens: list[list[str]] | None

    def on(self, device: torch.device | None) -> Any:
        """The inputs, on a device."""
        return self.inputs if device is None else moved(self.inputs, device)


def prompts_of(given: Any, tokenizer: Callable[..., Any] | None, tokens: Any) -> list[Prompts]:
    """Prompts in the batches in which they are measured.

    Args:
        given: texts, which need a tokenizer; or what :func:`hookattn.trace` takes as inputs.
        tokenizer: of the model.
        tokens: of inputs, as :func:`hookattn.trace` takes them; None: those that the inputs have, or their ids.

    Raises:
        InputError: there is none, texts have no tokenizer or tokens of their own, or the tokenizer does not take them.
    """
    if tokenizer is not None:
        checks.function("tokenizer", tokenizer, "a tokenizer of the transformers library")
    texts = [given] if isinstance(given, str) else given
    if isinstance(texts, (list, tuple)) and any(isinstance(text, str) for text in texts):
        several = checks.several("prompts", texts, str, "texts")
        if tokens is not None:
            raise InputError("tokens= are of inputs; of texts the tokenizer makes them.")
        return _of_texts(several, tokenizer)
    if isinstance(given, (list, tuple, Mapping)) and not given:
        raise checks.wrong("prompts", given, "texts, or inputs as hookattn.trace takes them; at least one")
    return [Prompts(given, token_lists(tokens) if tokens is not None else tokens_of(given) or _ids_of(given))]


def _of_texts(texts: Sequence[str], tokenizer: Callable[..., Any] | None) -> list[Prompts]:
    # Texts of one length go through together, so that none is padded: not every model takes padding, nor every
    # tokenizer makes it.
    if tokenizer is None:
        raise InputError("prompts that are texts need the model's tokenizer=.")
    by_length: dict[int, list[tuple[list[int], list[str]]]] = {}
    for text in texts:
        try:
            ids = list(tokenizer(text)["input_ids"])
        except Exception as error:
            raise InputError(f"the tokenizer does not take the prompt {text[:40]!r}: {error}") from error
        if not ids:
            raise InputError(f"the prompt {text[:40]!r} has no tokens.")
        names = getattr(tokenizer, "convert_ids_to_tokens", None)
        by_length.setdefault(len(ids), []).append((ids, list(names(ids)) if names else list(map(str, ids))))
    return [
        Prompts({"input_ids": torch.tensor([ids for ids, _ in several])}, [words for _, words in several])
        for several in by_length.values()
    ]


def _ids_of(inputs: Any) -> list[list[str]] | None:
    """Token ids as tokens: what tells whether a token was there before."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if isinstance(ids, tuple) and len(ids) == 1:
        ids = ids[0]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        return None
    return [list(map(str, row)) for row in ids.tolist()]


def moved(inputs: Any, device: torch.device) -> Any:
    """Inputs with all their tensors on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: moved(x, device) for name, x in inputs.items()}
    if type(inputs) in (list, tuple):
        return type(inputs)(moved(x, device) for x in inputs)
    return inputs


def repeated_tokens(
    vocabulary: int, *, length: int = 24, batch: int = 8, first: int | None = None, seed: int = 0
) -> Tensor:
    """Random tokens, and the same tokens again: the prompts on which induction heads are told from others.

    Args:
        vocabulary: ids are drawn from 0 to below it; all of a prompt are different.
        length: tokens in the part that comes twice.
        batch: how many prompts.
        first: an id that each prompt begins with (that of the start of a text), and that is not drawn.
        seed: the same seed gives the same prompts, whatever random numbers were drawn before.

    Returns:
        int64, B T with T = 2 · length, and one more with ``first``.

    Raises:
        SelectionError: one of these is no such number, or there are fewer ids than ``length``.
    """
    length, batch = checks.whole("length", length, 1), checks.whole("batch", batch, 1)
    first = None if first is None else checks.whole("first", first, 0)
    least = length + (first is not None)
    vocabulary = checks.whole("vocabulary", vocabulary, least, f"an int from {least}, as all ids differ")
    generator = torch.Generator().manual_seed(checks.whole("seed", seed, 0))
    prompts = []
    for _ in range(batch):
        ids = torch.randperm(vocabulary, generator=generator)
        part = ids[ids != first][:length] if first is not None else ids[:length]
        prompts.append(torch.cat([part.new_tensor([] if first is None else [first]), part, part]))
    return torch.stack(prompts)
