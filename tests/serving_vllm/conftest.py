"""vLLM on a CPU. Its settings have to stand in the environment before it is imported."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving_vllm.engines import SETTINGS

if importlib.util.find_spec("vllm") is not None:
    os.environ.update(SETTINGS)


@pytest.fixture(autouse=True)
def vllm() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-serving does that")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(a class of transformers, its configuration) -> a folder with random weights of it, the same each time."""
    made: dict[str, Path] = {}

    def make(kind: str, **config: Any) -> Path:
        key = f"{kind}{sorted(config.items())}"
        if key not in made:
            import transformers

            torch.manual_seed(0)
            model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config))
            # Larger than they are drawn: attention that is the same everywhere would tell nothing.
            with torch.no_grad():
                for name, x in model.named_parameters():
                    if x.dim() > 1 and "embed" not in name:
                        x.mul_(4)
            made[key] = tmp_path_factory.mktemp(kind.lower())
            model.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def llama(model_folder: Callable[..., Path]) -> Path:
    """Two layers, four heads of two key heads."""
    return model_folder(
        "Llama",
        vocab_size=64,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
