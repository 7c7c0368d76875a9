"""The command group."""

from __future__ import annotations

import click

from ..version import __version__
from .ablate import command as ablate
from .adapters import adapters
from .command import Group
from .compare import command as compare
from .demo import demo
from .heads import command as heads
from .info import info
from .merge import command as merge
from .render import render
from .survey import command as survey
from .trace import trace
from .verify import verify
from .view import view


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="hookattn")
def app() -> None:
    """Trace the attention of any PyTorch model, exactly as its own kernels computed it.

    \b
    hookattn demo                                    two real trained models, offline
    hookattn trace gpt2 --text "Hello" -o run.safetensors
    hookattn info run.safetensors
    """


for command in (trace, info, merge, heads, compare, view, render, survey, ablate, verify, adapters, demo):
    app.add_command(command)
