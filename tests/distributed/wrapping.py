"""Ways to put something around a model, or into its classes, that leaves what it computes as it is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

CPU = torch.device("cpu")


class Engine(nn.Module):
    """What training libraries put around a model: it hands on what it is given, and answers for the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model
        self.steps = 0

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def compiled_layers(model: Any) -> Any:
    layers = model.model.layers
    for i, layer in enumerate(layers):
        if i:  # one of them is left as it was: the layers are of two classes then
            layers[i] = torch.compile(layer, backend="eager")
    return model


def checkpointed_layers(model: Any) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    return model


def fsdp1(model: Any, by_layer: bool = True, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(model.model.layers[0])}) if by_layer else None
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=CPU, **options)


def fsdp2(model: Any, part: str = "", **options: Any) -> Any:
    """Sharded layer by layer, or a part of each layer by itself."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer.get_submodule(part), **options)
    return fully_shard(model, **options)


def replicated(model: nn.Module) -> nn.Module:
    from torch.distributed._composable.replicate import replicate

    return replicate(model)  # type: ignore[no-any-return]


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPED: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "DDP": (ddp, ["DistributedDataParallel"]),
    "DataParallel": (nn.DataParallel, ["DataParallel"]),
    "compiled": (compiled, ["OptimizedModule"]),
    "DDP of compiled": (lambda m: ddp(compiled(m)), ["DistributedDataParallel", "OptimizedModule"]),
    "compiled DDP": (lambda m: compiled(ddp(m)), ["OptimizedModule", "DistributedDataParallel"]),
    "compiled layers": (compiled_layers, ["OptimizedModule"]),
    "checkpointed layers": (checkpointed_layers, ["CheckpointWrapper"]),
    "FSDP1": (lambda m: fsdp1(m, by_layer=False), ["FullyShardedDataParallel"]),
    "FSDP1 by layer": (fsdp1, ["FullyShardedDataParallel"]),
    "FSDP1, own parameters": (lambda m: fsdp1(m, use_orig_params=True), ["FullyShardedDataParallel"]),
    "FSDP2": (fsdp2, ["FSDPModule"]),
    "FSDP2 of attention": (lambda m: fsdp2(m, "self_attn"), ["FSDPModule"]),
    "FSDP2 of checkpointed": (lambda m: fsdp2(checkpointed_layers(m)), ["FSDPModule", "CheckpointWrapper"]),
    "replicate": (replicated, ["DDP"]),
    "engine": (Engine, ["Engine"]),
    "engine of DDP": (lambda m: Engine(ddp(m)), ["Engine", "DistributedDataParallel"]),
    "averaged": (torch.optim.swa_utils.AveragedModel, ["AveragedModel"]),
}


def devices(model: Any, last: str) -> dict[str, str]:
    """A map for ``dispatch_model``: the last layer is somewhere else."""
    *layers, end = range(len(model.model.layers))
    places = {f"model.layers.{i}": "cpu" for i in layers} | {f"model.layers.{end}": last}
    return {"model.embed_tokens": "cpu", **places, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


def dispatched(model: Any, last: str) -> Any:
    from accelerate import dispatch_model

    folder = tempfile.mkdtemp()
    return dispatch_model(model, devices(model, last), main_device="cpu", offload_dir=folder, force_hooks=True)


def offloaded(model: Any, how: str) -> Any:
    import accelerate

    if how == "disk":
        return accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device=CPU)
    if how == "by hook":
        return accelerate.cpu_offload_with_hook(model, execution_device=CPU)[0]
    return accelerate.cpu_offload(model, execution_device=CPU)


def prepared(model: Any, precision: str = "no") -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state()
    PartialState._reset_state()
    try:
        return Accelerator(cpu=True, mixed_precision=precision).prepare(model)
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()


ACCELERATED: dict[str, Callable[[Any], Any]] = {
    "cpu_offload": lambda m: offloaded(m, "cpu"),
    "disk_offload": lambda m: offloaded(m, "disk"),
    "cpu_offload_with_hook": lambda m: offloaded(m, "by hook"),
    "dispatch_model": lambda m: dispatched(m, "cpu"),
    "dispatch_model to disk": lambda m: dispatched(m, "disk"),
    "prepare": prepared,
}
