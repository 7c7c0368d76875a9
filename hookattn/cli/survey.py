"""``hookattn survey``."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import click

from ..analyze.registry import MEASURES
from ..analyze.survey import Corpus, CorpusShard, Measurer, survey, survey_on_processes, survey_on_ray
from ..analyze.survey.chunking import as_shard
from ..analyze.survey.measurer import ON_ERROR, Failure
from ..analyze.survey.parts import Parts, failures_listed
from ..analyze.survey.run import settings
from ..console.screen import Screen, counted, decimal_size
from ..errors import HookattnError, InputError, MeasureError
from .command import Command
from .options import names
from .survey_model import SurveyModel
from .trace import check_target

_PERIOD = 30.0  # seconds between lines of progress, where there is no terminal
_TRIED = 64  # examples that are read before the model is loaded


def _shard(ctx: click.Context, param: click.Parameter, value: str | None) -> CorpusShard | None:
    try:
        return None if value is None else as_shard(value)
    except HookattnError as error:
        raise click.BadParameter(f"{error} I/N is I from 0 to N - 1.") from None


@click.command(
    "survey",
    cls=Command,
    short_help="Measure every head on many prompts, into one Parquet table.",
    examples=(
        "hookattn survey gpt2 prompts.txt -o heads.parquet",
        "hookattn survey ./my-bert news.jsonl.gz --field body --batch 32 --max-tokens 256 -o heads.parquet",
        "hookattn survey mypackage.models:build ids.parquet --field input_ids --measures entropy,sink -o heads.parquet",
        "hookattn survey gpt2 hub:Salesforce/wikitext/wikitext-2-raw-v1:test --jobs 4 -o heads.parquet",
        "hookattn survey gpt2 'data/*.jsonl.zst' --shard $SLURM_ARRAY_TASK_ID/64 -o /shared/heads.parquet",
        "hookattn survey gpt2 'data/*.jsonl.zst' --finish -o /shared/heads.parquet",
        "hookattn survey gpt2 's3://bucket/*.parquet' --engine ray --actors 16 --gpus-per-actor 1 -o s3://bucket/heads/",
    ),
)
@click.argument("model")
@click.argument("prompts", nargs=-1, required=True, type=click.Path())
@click.option(
    "-o", "--out", required=True, type=click.Path(),
    help="The table, a file; or, if it ends in /, a directory of Parquet files. Also in a store: s3://….",
)  # fmt: skip
@click.option("--measures", callback=names, metavar="NAME,…", help=f"Of {', '.join(MEASURES)}; all by default.")
@click.option("--field", help="The key of JSON lines, or the column of Parquet: texts or lists of token ids.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Examples at a time.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Cut longer examples.")
@click.option("--shard", callback=_shard, metavar="I/N", help="Only the I-th of N equal shares, I from 0 to N - 1.")
@click.option("--finish", is_flag=True, help="Put together the parts of all shards; no model is loaded.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes on this machine.")
@click.option("--engine", type=click.Choice(["ray"]), help="Measure in actors of Ray, on this machine or on a cluster.")
@click.option("--actors", type=click.IntRange(min=1), help="With --engine: how many.  [default: 1]")
@click.option("--gpus-per-actor", type=click.FloatRange(min=0), help="With --engine: GPUs of each.  [default: 0]")
@click.option(
    "--cpus-per-actor", type=click.FloatRange(min=0, min_open=True),
    help="With --engine: CPUs of each, and threads.  [default: 1]",
)  # fmt: skip
@click.option(
    "--address", metavar="auto|HOST:PORT",
    help="With --engine: the cluster to join; else $RAY_ADDRESS, else a Ray is started here.",
)  # fmt: skip
@click.option(
    "--on-error", type=click.Choice(ON_ERROR), default="record", show_default=True,
    help="Of an example that fails: record it beside the table, or stop.",
)  # fmt: skip
@click.option(
    "--device", metavar="cpu|cuda", help="Where the model runs.  [default: cpu; cuda with --gpus-per-actor]"
)  # fmt: skip
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
    shard: CorpusShard | None,
    finish: bool,
    jobs: int,
    engine: str | None,
    actors: int | None,
    gpus_per_actor: float | None,
    cpus_per_actor: float | None,
    address: str | None,
    on_error: str,
    device: str | None,
    attn: str | None,
    trust_remote_code: bool,
) -> None:
    """Run MODEL on every example of PROMPTS and write what each head did: one row for each example, head and measure.

    PROMPTS are files (a text in each line, .jsonl or .parquet; also .gz, .bz2, .xz, .zst), patterns, directories, any
    of these in a store (s3://…), or hub:NAME[/CONFIG][:SPLIT]. The memory is that of one batch. Killed at any moment,
    the same command goes on where it stopped. Processes that share a disk share a survey by --shard, and --finish
    ends it; --engine ray has a cluster do all of that.
    """
    if finish and (shard is not None or jobs > 1):
        raise click.UsageError("--finish puts together what shards have made; it excludes --shard and --jobs.")
    of_engine = {
        "actors": actors, "gpus_per_actor": gpus_per_actor, "cpus_per_actor": cpus_per_actor, "address": address
    }  # fmt: skip
    given = {name: value for name, value in of_engine.items() if value is not None}
    if engine is None and given:
        raise click.UsageError(f"--{next(iter(given)).replace('_', '-')} is for --engine ray.")
    if engine is not None and (finish or shard is not None or jobs > 1):
        raise click.UsageError("--engine divides the prompts by itself; it excludes --shard, --finish and --jobs.")
    device = device or ("cuda" if gpus_per_actor else "cpu")
    _check_out(out)
    build = SurveyModel(model, attn, device, trust_remote_code, max_tokens)
    measurer = Measurer(build, measures or list(MEASURES), on_error)
    corpus = Corpus(prompts, field)
    about = {"prompts": corpus.about(), "field": field, "of": model, "max_tokens": max_tokens, "attn": attn}
    if finish:
        parts = Parts(out, settings(measurer, batch, about), begin=False)
        with screen.working("counting the prompts"):
            total = corpus.count()
        parts.counted(-(-total // batch))
        with screen.working("putting the parts together"):
            parts.finish(-(-total // batch), strict=on_error == "raise")
        _say_table(screen, out, total, measurer)
        return
    with screen.working("reading the prompts"):
        _check_first(corpus, prompts, strict=on_error == "raise")
        expected = corpus.quick_count()
    if expected is not None and shard is not None:
        expected = shard.size(expected, batch)
    _say_present(screen, out, settings(measurer, batch, about))
    if engine is not None:
        options: Any = {"measures": measurer.measures, "batch": batch, "about": about, "on_error": on_error, **given}
        with _measuring(screen, expected) as progress, _stdout_kept(screen):
            total = survey_on_ray(build, corpus, out, progress=progress, say=screen.say, **options)
        _say_table(screen, out, total, measurer)
        return
    options = {"measures": measurer.measures, "batch": batch, "about": about, "shard": shard, "on_error": on_error}
    loaded = build.load(screen) if jobs == 1 else None
    with _measuring(screen, expected) as progress:
        if loaded is not None:
            total = survey(loaded[0], corpus, loaded[1], out, progress=progress, **options)
        else:
            total = survey_on_processes(build, corpus, out, jobs=jobs, progress=progress, say=screen.warn, **options)
    if shard is None:
        _say_table(screen, out, total, measurer)
    else:
        _say_shard(screen, Parts(out, settings(measurer, batch, about)), shard, total)


@contextmanager
def _stdout_kept(screen: Screen) -> Iterator[None]:
    """Ray writes what happens in its cluster to stdout, at length. A command's own words are all that belongs there;
    what is not repeated in them is shown with --debug."""
    if screen.debug:
        with redirect_stdout(sys.stderr):
            yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def _check_out(out: str) -> None:
    """Whether a table can be written, before the model is loaded and not after.

    Raises:
        TraceWriteError: it cannot.
    """
    if "://" not in out:
        check_target(out.rstrip("/") + "/." if os.path.isdir(out) and out.endswith("/") else out.rstrip("/"))


def _check_first(corpus: Corpus, prompts: tuple[str, ...], strict: bool) -> None:
    """What is wrong with all of a corpus is found before the model is loaded.

    Raises:
        InputError: there is no example; not one of the first can be read; or, ``strict``, one of them cannot.
    """
    first = list(itertools.islice(corpus.each(), _TRIED))
    if not first:
        raise InputError(f"{', '.join(prompts)}: no example in it.")
    bad = [value for value in first if isinstance(value, InputError)]
    if len(bad) == len(first) or (bad and strict):
        raise bad[0]


def _say_present(screen: Screen, out: str, about: dict[str, Any]) -> None:
    """What there is of an earlier run, from which this one goes on."""
    try:
        parts = Parts(out, about, begin=False)
    except MeasureError:
        return  # nobody has begun, or another survey has, which the run itself says
    there = 0 if parts.complete else len(parts.present())
    if there:
        screen.say(f"goes on with {out}: {counted(there, 'part')} of an earlier run stay")


@contextmanager
def _measuring(screen: Screen, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress line of examples, or a line now and then where no terminal is; interrupted, a word of what stays."""
    done, told, start = 0, time.monotonic(), time.monotonic()
    live = None if total is not None else lambda: counted(done, "example")
    try:
        with screen.working("measuring", total=total, live=live) as advance:

            def progress(n: int) -> None:
                nonlocal done, told
                for _ in range(n - done):
                    advance()
                done = n
                # A log has no line that moves.
                if not screen.err.is_terminal and time.monotonic() - told >= _PERIOD:
                    told = time.monotonic()
                    of = "" if total is None else f" of {total}"
                    screen.say(f"measured {done}{of} examples in {told - start:.0f} s")

            yield progress
    except KeyboardInterrupt:
        of = "" if total is None else f" of {total}"
        screen.say(f"stopped after {done}{of} examples; the same command goes on from there.")
        raise


def _say_table(screen: Screen, out: str, total: int, measurer: Measurer) -> None:
    failed, size = failures_listed(out), _size(out)
    if failed:
        screen.warn(_failed(out, failed, total))
    if screen.as_json:
        measured = [m.key for m in measurer.measures]
        screen.json({"file": out, "examples": total, "failed": len(failed), "measures": measured, "bytes": size})
        return
    shown = "" if size is None else f" ({decimal_size(size)})"
    screen.out.print(f"wrote {out}{shown}: {counted(total - len(failed), 'example')}", markup=False, soft_wrap=True)


def _failed(out: str, failed: list[Failure], total: int) -> str:
    where = f"{out}_failed.jsonl" if out.endswith("/") else f"{out}.failed.jsonl"
    return (
        f"{len(failed)} of {counted(total, 'example')} could not be measured; {where} lists which. "
        f"The first one, {failed[0].example}: {failed[0].error}"
    )


def _say_shard(screen: Screen, parts: Parts, shard: CorpusShard, total: int) -> None:
    count = parts.count or 0
    there = count if parts.complete else len(parts.present())
    if screen.as_json:
        screen.json({"shard": str(shard), "examples": total, "parts": there, "of": count})
        return
    line = f"shard {shard}: {counted(total, 'example')}; {there} of {counted(count, 'part')} are there"
    if parts.complete:
        line += ", and so is the table"
    elif there == count:
        line += "; --finish makes the table of them"
    screen.out.print(line, markup=False, soft_wrap=True)


def _size(out: str) -> int | None:
    """Bytes of a table on this disk."""
    if os.path.isdir(out):
        return sum(entry.stat().st_size for entry in os.scandir(out))
    return os.path.getsize(out) if os.path.exists(out) else None
