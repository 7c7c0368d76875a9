"""``hookattn trace``."""

from __future__ import annotations

import os
from typing import Any

import click
import torch

from ..attention.kernel_call import STORED
from ..console.screen import Screen, counted, decimal_size
from ..console.tables import print_calls, print_head, print_verdict, trace_as_json
from ..errors import TraceWriteError
from ..pretrained.inputs import Given
from ..pretrained.model import Loaded
from ..pretrained.text import run
from ..traces import Trace
from .command import Command
from .models import inputs_asked_for, is_factory, load_model
from .options import DTYPES, ints, names, pairs, positions
from .tensor_files import read_tensors


@click.command(
    cls=Command,
    short_help="Run a model once and write what its attention did.",
    examples=(
        'hookattn trace gpt2 --text "The cat sat on the mat." -o run.safetensors',
        'hookattn trace ./my-bert --pair "A cat." "A dog." -o pair.safetensors --capture weights',
        'hookattn trace ./my-llama --text "Once upon" --generate 20 --compact -o story.safetensors',
        "hookattn trace ./my-vit --image cat.png --layers -1 --verify full",
        "hookattn trace mypackage.models:build --inputs batch.safetensors -o run.safetensors",
        'hookattn trace mypackage.models:build --inputs batch.safetensors --layout "blocks.*.attn=BTHD"',
    ),
)
@click.argument("model")
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="A text; several are one padded batch.")
@click.option("--pair", nargs=2, metavar="A B", help="A pair of sentences, as one input.")
@click.option("--image", "images", multiple=True, type=click.Path(), help="An image file, through the image processor.")
@click.option("--audio", "sounds", multiple=True, type=click.Path(), help="A WAV file, through the audio processor.")
@click.option("--inputs", "file", type=click.Path(), help="Named tensors: .safetensors, .pt, .json or .npz.")
@click.option("-o", "--out", type=click.Path(), help="The trace file; without it, only the table is printed.")
@click.option(
    "--capture",
    callback=names,
    metavar="FIELD,…",
    help="Fields to keep, of q,k,v,bias,scores,mask,sinks,weights,applied,output; all by default.",
)
@click.option("--layers", callback=ints, metavar="INT,…", help="Layers to keep, such as 0,-1.")
@click.option("--heads", callback=ints, metavar="INT,…", help="Query heads to keep.")
@click.option("--queries", callback=positions, metavar="INT,…|A:B", help="Query positions to keep, such as -1 or -8:.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Store floating fields in this dtype.")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda", help="Where the model runs.")
@click.option("--attn", metavar="eager|sdpa|flex_attention", help="The attention kernel of a transformers model.")
@click.option(
    "--verify",
    type=click.Choice(["sample", "full", "off"]),
    default="sample",
    show_default=True,
    help="Which query rows are checked against the model's own kernel.",
)
@click.option("--strict", is_flag=True, help="Fail if a call is unfaithful.")
@click.option(
    "--layout",
    "layouts",
    callback=pairs,
    multiple=True,
    metavar="PATH=BTHD",
    help="The axes of q at a module, where they would be guessed; PATH may have *.",
)
@click.option("--compact", is_flag=True, help="Leave scores and weights out of the file; they are derived when read.")
@click.option("--generate", type=click.IntRange(min=1), metavar="N", help="Trace model.generate: N new tokens.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of torch's random numbers.")
@click.option("--trust-remote-code", is_flag=True, help="Allow a model to run code from its repository.")
@click.pass_obj
def trace(
    screen: Screen,
    model: str,
    texts: tuple[str, ...],
    pair: tuple[str, str] | None,
    images: tuple[str, ...],
    sounds: tuple[str, ...],
    file: str | None,
    out: str | None,
    capture: tuple[str, ...] | None,
    layers: list[int] | None,
    heads: list[int] | None,
    queries: list[int] | slice | None,
    dtype: str | None,
    device: str,
    attn: str | None,
    verify: str,
    strict: bool,
    layouts: dict[str, str] | None,
    compact: bool,
    generate: int | None,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Run MODEL once and keep what its attention did.

    MODEL is a directory that transformers saved, a name on the hub, or module:factory, where the factory is an
    nn.Module or a callable that returns one, or a pair of one and its inputs. It runs in eval mode, without gradients,
    with the kernels it has.
    """
    _check_options(model, texts, pair, images, sounds, file, out, compact)
    if out is not None:
        check_target(out)
    read = None if file is None else Given(read_tensors(file))
    torch.manual_seed(seed)
    loaded = load_model(model, screen, attn=attn, device=device, trust=trust_remote_code)
    given = read or inputs_asked_for(
        loaded, texts=texts, pair=pair, images=images, audio=sounds, generate=generate is not None
    )
    if capture is None and (out is None or compact):
        # What tells the extents of a call without q and k, too, and is linear in the tokens.
        capture = STORED if compact else ("q", "k", "v", "output")
    options = {
        "capture": capture,
        "layers": layers,
        "heads": heads,
        "queries": queries,
        "dtype": None if dtype is None else DTYPES[dtype],
        "verify": verify,
        "strict": strict,
        "layout": layouts,
        "to": None if compact else out,
    }
    for note in given.notes:
        screen.say(f"note: {note}", "dim")
    torch.manual_seed(seed)
    made = _traced(screen, loaded, given, options, generate)
    if compact and out is not None:
        with screen.working(f"writing {out}"):
            made.path = made.save(out, compact=True)
    _print_trace(screen, made)


def _traced(screen: Screen, loaded: Loaded, given: Given, options: dict[str, Any], generate: int | None) -> Trace:
    name = type(loaded.model).__name__
    running: list[Trace] = []

    def progress() -> str:
        steps = running[0].calls[-1].step + 1 if running and running[0].calls else 0
        return f"{steps} of {generate} tokens"

    with screen.working("generating", live=progress) if generate else screen.working(f"tracing {name}"):
        return run(loaded, given, generate, options, watch=running.append)  # type: ignore[arg-type]


def _print_trace(screen: Screen, made: Trace) -> None:
    data = trace_as_json(made)
    if screen.as_json:
        screen.json(data)
        return
    print_head(screen.out, data)
    print_calls(screen.out, made.calls)
    print_verdict(screen.out, made)
    if made.path is not None:
        screen.out.print(
            f"wrote {made.path}",
            f"({decimal_size(data['bytes'])}, {counted(data['tensors'], 'tensor')})",
            markup=False,
            soft_wrap=True,
        )


def _check_options(
    model: str,
    texts: tuple[str, ...],
    pair: tuple[str, str] | None,
    images: tuple[str, ...],
    sounds: tuple[str, ...],
    file: str | None,
    out: str | None,
    compact: bool,
) -> None:
    sources = {"--text": texts, "--pair": pair, "--image": images, "--audio": sounds, "--inputs": file}
    asked = [name for name, given in sources.items() if given]
    if len(asked) > 1 and not {*asked} <= {"--text", "--image", "--audio"}:
        raise click.UsageError(f"{' and '.join(asked)} exclude each other.")
    if not asked and not is_factory(model):
        raise click.UsageError(
            "there is nothing to run the model on: give --text, --pair, --image, --audio or --inputs."
        )
    if compact and out is None:
        raise click.UsageError("--compact says how the file is written: it needs -o FILE.")


def check_target(out: str) -> None:
    """Whether a file can be written, before the model is loaded and not after.

    Raises:
        TraceWriteError: it cannot.
    """
    folder = os.path.dirname(out) or "."
    if os.path.isdir(out):
        raise TraceWriteError(f"{out}: this is a directory; name a file in it.")
    if not os.path.isdir(folder):
        raise TraceWriteError(f"{out}: the directory {folder!r} does not exist; create it first.")
    if not os.access(folder, os.W_OK):
        raise TraceWriteError(f"{out}: the directory {folder!r} is not writable.")
