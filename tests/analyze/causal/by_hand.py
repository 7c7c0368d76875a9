"""Models that write attention out by hand, where edits of them are."""

from __future__ import annotations

import pytest
import torch

import hookattn
from hookattn import edit
from hookattn.errors import EditError
from tests import tiny_models


def skip_unless_edited(implementation: str) -> None:
    """Skip a test of a model whose attention nobody can edit yet."""
    if implementation == "eager":
        try:
            hookattn.edited(tiny_models.gpt2("eager"), torch.arange(4)[None] + 3, edit.scale("output", 2.0))
        except EditError as error:
            pytest.skip(str(error))
