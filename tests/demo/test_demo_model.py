"""The demo model that ships: its weights load, it copies, its two heads are there, and training it is reproducible.

The heads are measured here in explicit float64 math on the module's weights alone, so that this file is evidence about
the model independent of its own forward, of the training script, and of the rest of the package.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hookattn.demo import induction
from hookattn.demo.induction import BOS, InductionTransformer, example_tokens, load_pretrained

ROOT = Path(__file__).resolve().parents[2]
FRESH = range(500, 516)  # the training script evaluates on other seeds


@pytest.fixture(scope="module")
def model() -> InductionTransformer:
    return load_pretrained()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sequences(length: int) -> Tensor:
    return torch.cat([example_tokens(seed, length=length) for seed in FRESH])


def reference(model: InductionTransformer, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """Each layer's attention weights (B H T T) and the logits (B T V), from the state dict, in float64."""
    weight = {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads, base = model.config.n_heads, model.config.rope_base
    batch, length = tokens.shape
    width = model.config.d_model // heads

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        y: Tensor = x * weight[f"{name}.weight"] + weight[f"{name}.bias"]
        return y

    def linear(x: Tensor, name: str) -> Tensor:
        y: Tensor = x @ weight[f"{name}.weight"].T + weight[f"{name}.bias"]
        return y

    def split(x: Tensor) -> Tensor:
        return x.reshape(batch, length, heads, width).transpose(1, 2)

    # Rotation as multiplication by a complex number of modulus 1: another formula than the model's.
    exponent = torch.arange(width // 2, dtype=torch.float64) / (width // 2)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * base**-exponent
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    visible = torch.ones(length, length, dtype=torch.bool).tril()
    layers = []
    x = weight["embed.weight"][tokens]
    for n in range(model.config.n_layers):
        q, k, v = linear(norm(x, f"blocks.{n}.norm"), f"blocks.{n}.attn.qkv").chunk(3, dim=-1)
        scores = rotate(split(q)) @ rotate(split(k)).mT / math.sqrt(width)
        layers.append(scores.masked_fill(~visible, -math.inf).softmax(dim=-1))
        merged = (layers[-1] @ split(v)).transpose(1, 2).reshape(batch, length, -1)
        x = x + linear(merged, f"blocks.{n}.attn.out")
    return layers, norm(x, "norm") @ weight["unembed.weight"].T


def test_the_weights_are_small_float32_and_load_in_eval_mode(model: InductionTransformer) -> None:
    size = len(files("hookattn.demo").joinpath(induction.WEIGHTS_FILE).read_bytes())
    assert size < 3_000_000
    assert not model.training
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_missing_weights_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(induction, "WEIGHTS_FILE", "absent.safetensors")
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors.*train_induction\.py"):
        load_pretrained()


def test_example_tokens_are_bos_and_a_segment_of_distinct_tokens_twice() -> None:
    tokens = example_tokens(3, length=10)
    assert tokens.shape == (1, 21)
    assert tokens.dtype == torch.int64
    assert tokens[0, 0] == BOS
    assert torch.equal(tokens[0, 1:11], tokens[0, 11:])
    assert len({BOS, *tokens[0, 1:11].tolist()}) == 11
    assert torch.equal(tokens, example_tokens(3, length=10))
    assert not torch.equal(tokens, example_tokens(4, length=10))


@pytest.mark.parametrize("length", [0, 32])
def test_example_tokens_refuses_a_length_that_does_not_fit(length: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 31"):
        example_tokens(0, length=length)


def test_more_tokens_than_the_context_are_refused(model: InductionTransformer) -> None:
    with pytest.raises(ValueError, match="context of 64"):
        model(torch.ones(1, 65, dtype=torch.long))


@torch.no_grad()
def test_the_forward_agrees_with_explicit_math(model: InductionTransformer) -> None:
    tokens = sequences(24)
    torch.testing.assert_close(model(tokens).double(), reference(model, tokens)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [8, 16, 24, 31])
@torch.no_grad()
def test_the_second_copy_is_predicted(model: InductionTransformer, length: int) -> None:
    tokens = sequences(length)
    guesses = model(tokens).argmax(dim=-1)
    right = guesses[:, length + 1 : -1] == tokens[:, length + 2 :]
    assert right.float().mean() > 0.95
    # The first copy is random: whoever predicts it has seen what it should not.
    assert (guesses[:, :length] == tokens[:, 1 : length + 1]).float().mean() < 0.1


@pytest.mark.parametrize("length", [16, 24, 31])
@torch.no_grad()
def test_the_first_layer_has_a_previous_token_head(model: InductionTransformer, length: int) -> None:
    layers, _ = reference(model, sequences(length))
    query = torch.arange(2, 2 * length + 1)
    assert layers[0][:, :, query, query - 1].mean(dim=(0, 2)).max() > 0.9


@pytest.mark.parametrize("length", [16, 24, 31])
@torch.no_grad()
def test_a_later_layer_has_an_induction_head(model: InductionTransformer, length: int) -> None:
    layers, _ = reference(model, sequences(length))
    query = torch.arange(length + 1, 2 * length + 1)
    after_earlier = query - length + 1
    scores = [layer[:, :, query, after_earlier].mean(dim=(0, 2)).max().item() for layer in layers]
    assert max(scores[1:]) > 0.8
    # One layer of attention cannot match on the token before: that takes the previous-token head below.
    assert scores[0] < 0.2


@torch.no_grad()
def test_the_induction_head_rests_on_bos_where_nothing_repeats(model: InductionTransformer) -> None:
    length = 24
    layers, _ = reference(model, sequences(length))
    second = torch.arange(length + 1, 2 * length + 1)
    head = layers[1][:, :, second, second - length + 1].mean(dim=(0, 2)).argmax()
    assert layers[1][:, head, 2 : length + 1, BOS].mean() > 0.8


@pytest.mark.slow
def test_training_is_reproducible(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    script = str(ROOT / "examples" / "train_induction.py")
    outs = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    runs = [  # side by side: most of the time goes into importing torch
        subprocess.Popen(
            [sys.executable, script, "--steps", "3", "--seed", "5", "--out", str(out)],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for out in outs
    ]
    for run in runs:
        printed, _ = run.communicate(timeout=120)
        assert run.returncode == 0, printed
        assert "loss" in printed
        assert "train for more steps" in printed
    first, second = (out.read_bytes() for out in outs)
    assert first == second
