"""``hookattn ablate``."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.table import Table
from torch import Tensor

from ..analyze.causal.ablation import BY, OVER, Ablation
from ..analyze.causal.metric import Metric, logits_of
from ..analyze.survey.parts import Parts
from ..console.screen import Screen, counted, decimal_size, plain
from ..errors import InputError, TraceWriteError
from ..pretrained.inputs import Given, to_device
from ..pretrained.model import Loaded
from ..printable import first_line
from ..recording.forward_inputs import arguments
from .command import Command
from .models import inputs_asked_for, is_factory, load_model, named_in_module
from .options import ints
from .tensor_files import read_tensors
from .trace import check_target

if TYPE_CHECKING:
    from pandas import DataFrame

NEXT = "next-token"


@click.command(
    "ablate",
    cls=Command,
    short_help="Rank the heads of a model by what their removal does.",
    examples=(
        'hookattn ablate gpt2 --text "The Eiffel Tower is in the city of"',
        'hookattn ablate gpt2 --text "When Mary and John went to the store, John gave a drink to" --target " Mary"',
        'hookattn ablate ./my-bert --text "A cat." --metric mypackage.metrics:loss --by mean -o heads.parquet',
        "hookattn ablate mypackage.models:build --inputs batch.safetensors --layers 0,-1 -o heads.csv",
    ),
)
@click.argument("model")
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="A text; several are one padded batch.")
@click.option("--pair", nargs=2, metavar="A B", help="A pair of sentences, as one input.")
@click.option("--inputs", "file", type=click.Path(), help="Named tensors: .safetensors, .pt, .json or .npz.")
@click.option(
    "--metric",
    default=NEXT,
    show_default=True,
    metavar="module:function",
    help="A function of what the model returns, a scalar; by default the log-probability of the next token.",
)
@click.option("--target", metavar="TOKEN", help="The next token (text or an id); by default the one that is likeliest.")
@click.option("--by", type=click.Choice(BY), default=BY[0], show_default=True, help="What replaces a head's output.")
@click.option(
    "--over",
    type=click.Choice(OVER),
    default=OVER[0],
    show_default=True,
    help="Of mean and resample: what is drawn on.",
)
@click.option("--layers", callback=ints, metavar="INT,…", help="Layers whose heads are removed, such as 0,-1.")
@click.option("--heads", callback=ints, metavar="INT,…", help="Heads that are removed.")
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="So many heads are shown.")
@click.option("-o", "--out", type=click.Path(), help="All heads, as Parquet, or as CSV if it ends in .csv.")
@click.option("--batch", type=click.IntRange(min=1), help="Heads in one forward at most; by default as many as pay.")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda", help="Where the model runs.")
@click.option("--attn", metavar="eager|sdpa|flex_attention", help="The attention kernel of a transformers model.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the draws of --by resample.")
@click.option("--trust-remote-code", is_flag=True, help="Allow a model to run code from its repository.")
@click.pass_obj
def command(
    screen: Screen,
    model: str,
    texts: tuple[str, ...],
    pair: tuple[str, str] | None,
    file: str | None,
    metric: str,
    target: str | None,
    by: str,
    over: str,
    layers: list[int] | None,
    heads: list[int] | None,
    top: int,
    out: str | None,
    batch: int | None,
    device: str,
    attn: str | None,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Remove each head of MODEL in turn and rank them by what that does to a metric.

    MODEL is what `hookattn trace` takes. The effect of a head is the metric without it less that with all heads, so
    that the most negative ones help most. With -o, killed at any moment, the same command goes on where it stopped.
    """
    _check_options(model, texts, pair, file, metric, target)
    if out is not None:
        check_target(out)
        if out.lower().endswith(".csv") and os.path.exists(out):
            raise TraceWriteError(f"{out}: it is there already; remove it, or choose another name.")
    own = None if metric == NEXT else _metric(metric)
    read = None if file is None else Given(read_tensors(file))
    loaded = load_model(model, screen, attn=attn, device=device, trust=trust_remote_code)
    given = read or inputs_asked_for(loaded, texts=texts, pair=pair, images=(), generate=False)
    given.args = to_device(given.args, device)
    for note in given.notes:
        screen.say(f"note: {note}", "dim")
    said, measured = (metric, own) if own is not None else _next_token(loaded, given, target)
    with screen.working("running the model"):
        ablation = Ablation(loaded.model, given.args, measured, by=by, over=over, seed=seed, batch=batch)
    places = ablation.places(layers, heads)
    about = {
        "of": model, "inputs": _digest(given.args), "metric": said, "by": by, "over": over, "layers": layers,
        "heads": heads, "seed": seed, "attn": attn, "plain": f"{ablation.runner.value:.3g}",
    }  # fmt: skip
    table = _ablated(screen, ablation, places, out, about)
    if ablation.runner.why:
        screen.say(f"note: {ablation.runner.why}", "dim")
    _print(screen, table, top, said, ablation.runner.value, by, out)


def _check_options(model: str, texts: Any, pair: Any, file: str | None, metric: str, target: str | None) -> None:
    asked = [name for name, given in {"--text": texts, "--pair": pair, "--inputs": file}.items() if given]
    if len(asked) > 1:
        raise click.UsageError(f"{' and '.join(asked)} exclude each other.")
    if not asked and not is_factory(model):
        raise click.UsageError("there is nothing to run the model on: give --text, --pair or --inputs.")
    if metric != NEXT and target is not None:
        raise click.UsageError(f"--target is the token of --metric {NEXT}; {metric} has its own.")
    if metric != NEXT and not is_factory(metric):
        raise click.UsageError(f"--metric {metric}: expected {NEXT}, or module:function.")


def _metric(name: str) -> Metric:
    """The function of ``module:function``.

    Raises:
        ModelError: there is no such module or member; InputError: it is no function.
    """
    found = named_in_module(name)
    if not callable(found):
        raise InputError(f"--metric {name}: expected a function of what the model returns, got {type(found).__name__}.")

    def metric(output: Any) -> Tensor:
        try:
            return found(output)  # type: ignore[no-any-return]
        except Exception as error:
            raise InputError(f"--metric {name} failed: {type(error).__name__}: {first_line(error)}") from error

    metric.__qualname__ = name
    return metric


def _next_token(loaded: Loaded, given: Given, target: str | None) -> tuple[str, Metric]:
    """The log-probability of the next token, the mean over the texts, and what it is called.

    Raises:
        InputError: the model returns no logits, or the target is no token.
    """
    args, kwargs = arguments(given.args)
    with torch.no_grad():
        logits = logits_of(loaded.model(*args, **kwargs))
    rows = _last(logits, given)
    if target is None:
        tokens = _at(logits, rows).argmax(-1)
    else:
        tokens = _at(logits, rows).argmax(-1).fill_(_token(target, given, logits.shape[-1]))
    named = tokens.tolist()
    if given.tokenizer is not None:
        named = given.tokenizer.convert_ids_to_tokens(named)
    words = ", ".join(repr(word) if isinstance(word, str) else str(word) for word in dict.fromkeys(named))

    def metric(output: Any) -> Tensor:
        chosen = _at(logits_of(output), rows)
        wide = chosen if chosen.dtype == torch.float64 else chosen.float()
        return wide.log_softmax(-1).gather(-1, tokens[:, None]).mean()

    return f"log-probability of {words}", metric


def _last(logits: Tensor, given: Given) -> Tensor | None:
    """B: the position of the last token of each text that is no padding; None: the last of all."""
    mask = given.args.get("attention_mask") if isinstance(given.args, dict) else None
    if logits.dim() != 3 or not isinstance(mask, Tensor) or mask.shape != logits.shape[:2]:
        return None
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask.bool() * positions).argmax(-1)


def _at(logits: Tensor, rows: Tensor | None) -> Tensor:
    """B V."""
    if logits.dim() < 3:
        return logits if logits.dim() == 2 else logits[None]
    if rows is None:
        return logits[:, -1]
    return logits[torch.arange(len(rows), device=logits.device), rows]


def _token(target: str, given: Given, vocabulary: int) -> int:
    if given.tokenizer is not None:
        ids: list[int] = given.tokenizer(target, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return ids[0]
        words = given.tokenizer.convert_ids_to_tokens(ids)
        raise InputError(f"--target {target!r}: expected one token, and the tokenizer makes {len(ids)} of it: {words}.")
    if not target.isdecimal() or int(target) >= vocabulary:
        raise InputError(
            f"--target {target!r}: without a tokenizer it is the id of a token, from 0 to {vocabulary - 1}."
        )
    return int(target)


def _digest(args: Any) -> str:
    """What inputs are, in a word."""
    made = hashlib.sha256()

    def add(x: Any) -> None:
        if isinstance(x, Tensor):
            made.update(json.dumps([str(x.dtype), list(x.shape)]).encode())
            made.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(x, dict):
            for key in sorted(x):
                made.update(str(key).encode())
                add(x[key])
        elif isinstance(x, (tuple, list)):
            for value in x:
                add(value)
        else:
            made.update(repr(x).encode())

    add(args)
    return made.hexdigest()[:16]


def _ablated(
    screen: Screen, ablation: Ablation, places: list[tuple[int, int]], out: str | None, about: dict[str, Any]
) -> DataFrame:
    """The table of all heads: what is in the file already, and the rest."""
    parts = None if out is None else Parts(out, about, "ablation")
    calls = list(dict.fromkeys(i for i, _ in places))
    skip = 0 if parts is None else len(calls) if parts.complete else min(parts.done, len(calls))
    number = skip
    left = [place for place in places if place[0] in calls[skip:]]
    values: list[float] = []
    total, before = len(places), len(places) - len(left)
    with screen.working("removing heads", total=total) as advance:
        done = 0

        def progress(n: int) -> None:
            nonlocal done
            for _ in range(n - done):
                advance()
            done = n

        progress(before)
        try:
            for part in ablation.values(left, lambda n: progress(before + n)):
                if parts is not None:
                    own = left[len(values) : len(values) + len(part)]
                    parts.write(number, _arrow(ablation.table(own, part)))
                    number += 1
                values += part
        except KeyboardInterrupt:
            if out is not None:
                screen.say(f"stopped after {done} of {counted(total, 'head')}; the same command goes on from there.")
            raise
    if parts is None:
        return ablation.table(places, values)
    if not parts.complete:
        parts.finish(len(calls))
    return parts.table()


def _arrow(table: DataFrame) -> Any:
    import pyarrow as pa

    made = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
    layer = made.schema.get_field_index("layer")  # of a site without a number it would be a column of nulls
    return made.set_column(layer, "layer", made["layer"].cast(pa.int64()))


def _print(screen: Screen, table: DataFrame, top: int, metric: str, value: float, by: str, out: str | None) -> None:
    """The heads of the largest effects, or all of them as JSON."""
    ranked = table.iloc[(-table["effect"].abs()).argsort(kind="stable")]
    if screen.as_json:
        rows = ranked.astype(object).where(ranked.notna(), None).to_dict("records")
        screen.json({"metric": metric, "plain": value, "by": by, "file": out, "heads": rows})
        return
    screen.out.print(plain(f"{metric}: {value:.4f} with all heads; by {by}"))
    where = [c for c in ("stack", "kind") if table[c].nunique() > 1] + ["layer", "head"]
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in (*where, "effect", "without it"):
        shown.add_column(name, justify="left" if name in ("stack", "kind") else "right")
    for row in ranked.head(top).to_dict("records"):
        places = ["?" if row[c] is None or row[c] != row[c] else f"{row[c]}" for c in where]
        shown.add_row(*map(plain, places), plain(f"{row['effect']:+.4f}"), plain(f"{row['value']:.4f}"))
    screen.out.print(shown)
    if len(table) > top:
        screen.say(f"the largest of {counted(len(table), 'head')}; --top N shows more", "dim")
    if out is not None:
        size = decimal_size(os.path.getsize(out))
        screen.out.print(f"wrote {out} ({size}): {counted(len(table), 'head')}", markup=False, soft_wrap=True)
