"""``hookattn survey``."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import torch

from ..analyze.registry import MEASURES, resolve
from ..analyze.survey import Batch, Corpus, survey
from ..console.screen import Screen, counted, decimal_size
from ..errors import InputError
from .command import Command
from .inputs import encoded_texts, to_device, tokenizer_of
from .models import Loaded, load_model
from .options import names
from .trace import check_target

Encode = Callable[[Sequence[Any]], Iterator[Batch]]


@click.command(
    "survey",
    cls=Command,
    short_help="Measure every head on many prompts, into one Parquet table.",
    examples=(
        "hookattn survey gpt2 prompts.txt -o heads.parquet",
        "hookattn survey ./my-bert news.jsonl --field body --batch 32 --max-tokens 256 -o heads.parquet",
        "hookattn survey mypackage.models:build ids.parquet --field input_ids --measures entropy,sink -o heads.parquet",
    ),
)
@click.argument("model")
@click.argument("prompts", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="The table; its parts are beside it meanwhile.")
@click.option("--measures", callback=names, metavar="NAME,…", help=f"Of {', '.join(MEASURES)}; all by default.")
@click.option("--field", help="The key of JSON lines, or the column of Parquet: texts or lists of token ids.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Examples at a time.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Cut longer examples.")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda", help="Where the model runs.")
@click.option("--attn", metavar="eager|sdpa|flex_attention", help="The attention kernel of a transformers model.")
@click.option("--trust-remote-code", is_flag=True, help="Allow a model to run code from its repository.")
@click.pass_obj
def command(
    screen: Screen,
    model: str,
    prompts: tuple[str, ...],
    out: str,
    measures: tuple[str, ...] | None,
    field: str | None,
    batch: int,
    max_tokens: int | None,
    device: str,
    attn: str | None,
    trust_remote_code: bool,
) -> None:
    """Run MODEL on every example of PROMPTS and write what each head did: one row for each example, head and measure.

    PROMPTS are files: a text in each line, .jsonl, or .parquet. The memory is that of one batch. Killed at any moment,
    the same command goes on where it stopped.
    """
    check_target(out)
    chosen = resolve(measures or list(MEASURES))
    corpus = Corpus(prompts, field)
    about = {"prompts": corpus.about(), "field": field, "of": model, "max_tokens": max_tokens, "attn": attn}
    with screen.working("reading the prompts"):
        total = sum(1 for _ in corpus)  # what cannot be read is found before the model runs
    if total == 0:
        raise InputError(f"{', '.join(prompts)}: no example in it.")
    loaded = load_model(model, screen, attn=attn, device=device, trust=trust_remote_code)
    done = 0
    with screen.working("measuring", total=total) as advance:

        def progress(n: int) -> None:
            nonlocal done
            for _ in range(n - done):
                advance()
            done = n

        try:
            survey(
                loaded.model, corpus, _encoder(loaded, device, max_tokens), out, measures=chosen, batch=batch,
                about=about, progress=progress,
            )  # fmt: skip
        except KeyboardInterrupt:
            screen.say(f"stopped after {done} of {counted(total, 'example')}; the same command goes on from there.")
            raise
    measured, size = [m.key for m in chosen], os.path.getsize(out)
    if screen.as_json:
        screen.json({"file": out, "examples": total, "measures": measured, "bytes": size})
        return
    screen.out.print(f"wrote {out} ({decimal_size(size)}): {counted(total, 'example')}", markup=False)


def _encoder(loaded: Loaded, device: str, limit: int | None) -> Encode:
    """Texts through the model's tokenizer, padded on the right; token ids as they are, equal lengths together."""
    tokenizer: list[Any] = []

    def of_texts(texts: Sequence[str]) -> Batch:
        if not tokenizer:
            tokenizer.append(tokenizer_of(loaded))
            tokenizer[0].padding_side = "right"
        given = encoded_texts(loaded, tokenizer[0], texts, limit=limit)
        return Batch(to_device(given.args, device), len(texts), given.tokens, given.args.get("attention_mask"))

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
