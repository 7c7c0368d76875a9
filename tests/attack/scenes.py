"""Small models for the attacks, one for each way in which a trace is attached, and what a trace can leave behind."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.taps.active import current
from hookattn.taps.eager.recogniser import Recogniser
from hookattn.torch_internals.code_patching import exchanged
from hookattn.torch_internals.function_modes import open_modes

IDS = torch.tensor([[1, 2, 3, 4, 5]])


class PlainBlock(nn.Module):
    """Attention in plain operations, which no adapter knows."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.maps, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.maps(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = F.softmax(scores.masked_fill(later, -torch.inf), -1)
        made: Tensor = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return made


class PlainModel(nn.Module):
    """Two such blocks on token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(20, 16), nn.ModuleList(PlainBlock() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


class Encoder(nn.Module):
    """torch's own layers, on their fast path where no gradients are wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.layers(self.embed(ids))
        return made


def gpt2(attention: str) -> nn.Module:
    """Two layers of GPT-2, which has an adapter."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 20, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1, attn_implementation=attention))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "fused": lambda: gpt2("sdpa"),
    "eager": lambda: gpt2("eager"),
    "plain": PlainModel,
    "encoder": Encoder,
}


@dataclass
class Scene:
    """A model, how it is traced, and what a whole trace of it holds.

    Attributes:
        name: of the model and of the way.
        model: what is traced.
        run: traces it once.
        right: the weights of each call of an undisturbed trace.
    """

    name: str
    model: nn.Module
    run: Callable[[], hookattn.Trace]
    right: list[Tensor]

    def is_right(self, trace: hookattn.Trace) -> bool:
        """Whether a trace holds what it should."""
        made = [call.weights for call in trace.calls]
        return len(made) == len(self.right) and all(map(torch.equal, made, self.right)) and not trace.skipped


def scenes(folder: Path) -> list[Scene]:
    """Every model in a way of its own: with gradients and without, in memory and to a file, as one call and a block."""

    def plain_trace(model: nn.Module, **options: Any) -> hookattn.Trace:
        return hookattn.trace(model, IDS, **options)

    def without_gradients(model: nn.Module) -> hookattn.Trace:
        # Not torch.no_grad(), which an interrupt in its own last line leaves on.
        return hookattn.trace(model.requires_grad_(False), IDS)

    def block(model: nn.Module) -> hookattn.Trace:
        with hookattn.tracing(model, strict=True) as trace:
            model(IDS)
        return trace

    def to_file(model: nn.Module) -> hookattn.Trace:
        path = folder / f"{os.getpid()}-{threading.get_ident()}.safetensors"
        path.unlink(missing_ok=True)
        return hookattn.trace(model, IDS, to=path)

    ways: dict[str, Callable[[nn.Module], hookattn.Trace]] = {
        "trace": plain_trace,
        "frozen": without_gradients,
        "block": block,
        "to": to_file,
        "statistics": lambda model: plain_trace(model, capture=("weights", "entropy")),
    }
    found = []
    for name, way in (
        ("fused", "trace"),
        ("fused", "to"),
        ("eager", "trace"),
        ("eager", "block"),
        ("plain", "trace"),
        ("plain", "statistics"),
        ("encoder", "frozen"),
        ("encoder", "to"),
    ):
        torch.manual_seed(0)
        model = MODELS[name]().eval()

        def run(model: nn.Module = model, way: str = way) -> hookattn.Trace:
            return ways[way](model)

        run()
        found.append(Scene(f"{name}, {way}", model, run, [call.weights for call in run().calls]))
    return found


def left(model: nn.Module, folder: Path, settled: bool = True) -> list[str]:
    """What of a trace is left in this thread, in the process, on the model and in the folder.

    Args:
        model: that was traced.
        folder: that it was traced to.
        settled: whether a trace has run since to its end.
    """
    found = []
    if not torch.is_grad_enabled():
        found.append("gradients are off")
    if torch.is_inference_mode_enabled():
        found.append("inference mode is on")
    if torch.is_autocast_enabled("cpu"):
        found.append("autocast is on")
    if not torch._C._is_torch_function_all_disabled() and torch._C._is_torch_function_enabled() is False:
        found.append("torch functions do not dispatch")
    if torch._C._is_torch_function_all_disabled():
        found.append("torch functions do not dispatch to modes")
    # torch takes a mode off its stack as it is called, and puts it back in the last lines of a block of its own. Hit
    # there, it does so once the exception is let go, when the trace is over. Such a mode does nothing, and the next
    # trace takes it off: that is what `settled` asks.
    if modes := [m for m in open_modes() if settled or not isinstance(m, Recogniser) or getattr(m.trace, "thread", 0)]:
        found.append(f"{len(modes)} function modes are open")
    if torch._C._len_torch_dispatch_stack():
        found.append("a dispatch mode is open")
    if current() is not None:
        found.append("a trace is running")
    if names := exchanged():
        found.append(f"{len(names)} functions are exchanged")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    if hooks or nn.modules.module._global_forward_pre_hooks:
        found.append("hooks are left")
    if partial := [p.name for p in folder.iterdir() if not p.name.endswith(".safetensors")]:
        found.append(f"files are left: {partial}")
    return found
