"""The model of a survey, as each of its processes builds it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..analyze.survey import Batch
from ..console.screen import Screen
from ..errors import InputError, ModelError
from ..pretrained.inputs import encoded_texts, to_device, tokenizer_of
from ..pretrained.model import Loaded
from .models import load_model

Encode = Callable[[Sequence[Any]], Iterator[Batch]]


@dataclass(frozen=True)
class SurveyModel:
    """How to build a model and what encodes its examples: what the options say, which can be sent to any process.

    Attributes:
        name: MODEL, as the user wrote it.
        attn: the kernel of a transformers model.
        device: where it runs.
        trust: whether code from its repository may run.
        limit: how many tokens of an example are kept.
    """

    name: str
    attn: str | None = None
    device: str = "cpu"
    trust: bool = False
    limit: int | None = None

    def __call__(self) -> tuple[nn.Module, Encode]:
        """The model, and from examples to batches.

        Raises:
            ModelError: it cannot be loaded.
        """
        return self.load(Screen())

    def load(self, screen: Screen) -> tuple[nn.Module, Encode]:
        """The same, telling a screen how it goes."""
        loaded = load_model(self.name, screen, attn=self.attn, device=self.device, trust=self.trust)
        return loaded.model, _encoder(loaded, self.device, self.limit)


def _encoder(loaded: Loaded, device: str, limit: int | None) -> Encode:
    """Texts through the model's tokenizer, padded on the right; token ids as they are, equal lengths together."""
    tokenizer: list[Any] = []

    def of_texts(texts: Sequence[str]) -> Batch:
        if not tokenizer:
            try:
                tokenizer.append(tokenizer_of(loaded))
            except InputError as error:  # the fault of no example
                raise ModelError(str(error)) from error
        given = encoded_texts(loaded, tokenizer[0], texts, limit=limit, side="right")
        # Those of the encoder, where a decoder has its start token.
        tokens = given.tokens["encoder"] if isinstance(given.tokens, dict) else given.tokens
        return Batch(to_device(given.args, device), len(texts), tokens, given.args.get("attention_mask"))

    def of_ids(ids: Sequence[list[int]]) -> Batch:
        made = torch.tensor(ids)
        inputs: Any = {"input_ids": made} if loaded.source is not None else made
        return Batch(to_device(inputs, device), len(ids), [[str(i) for i in row] for row in ids])

    def encoded(values: Sequence[Any]) -> Iterator[Batch]:
        # Neighbours alone are put together, because examples have to come out in the order they went in.
        for kind, group in itertools.groupby(values, type):
            if kind is str:
                yield of_texts(list(group))
                continue
            for _, alike in itertools.groupby([ids[:limit] for ids in group], len):
                yield of_ids(list(alike))

    return encoded
