"""What vLLM's engine knows of the batch that runs: whose requests it is of, and which layer attends.

vLLM gathers the attention of a layer in one operator, behind which a backend picks a kernel. The kernels are read by
other taps; here it is said which layer they run in, and of a layer in which none reports itself with which backend it
ran. That is seen in compiled models, too, as long as the operator itself is called. A CUDA graph calls nothing, which
is said of the batch that it ran.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from functools import partial
from types import FunctionType
from typing import Any

from ..torch_internals.code_patching import Patch
from .active import current
from .base import ActiveTrace, Tap
from .batch import requests_of_batch, running_batch
from .packed_kernels import running_layer

_LAYERS = {
    "vllm.model_executor.layers.attention.attention": "unified_attention_with_output",
    "vllm.model_executor.layers.attention.mla_attention": "unified_mla_attention_with_output",
}
_CONTEXT = "vllm.forward_context"
_RUNNER = "GPUModelRunner"
# The runner that keeps its batch, and the one that makes it anew for each step.
_KEEPS, _MAKES = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"
_READ = "CPU_ATTN, FLASH_ATTN and TRITON_ATTN"

_made: ContextVar[Sequence[str]] = ContextVar("hookattn_vllm_requests", default=())


def in_layer(name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the operator of a layer, and say which layer it is, and what no kernel has said."""
    tracing = current()
    if tracing is None:
        return original(*args, **kwargs)
    layer, attends = _layer_of(args, kwargs)
    token = running_layer.set(layer)
    heard, refused = tracing.heard, tracing.refused
    try:
        out = original(*args, **kwargs)
    finally:
        running_layer.reset(token)
    if attends and tracing.refused == refused:
        path = tracing.path_of(layer)
        if tracing.heard == heard:
            tracing.skip(_unknown(layer, name), path)
        elif tracing.heard > heard + 1:
            tracing.skip(
                f"its attention was computed in {tracing.heard - heard} parts that were merged: each is recorded as a "
                "call of its own, whose weights are of its own keys alone",
                path,
            )
    return out


def _layer_of(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """The layer that an operator was called for, None: it is not known; and whether it attends, which it does not while
    vLLM measures how much memory a batch needs."""
    context = getattr(sys.modules.get(_CONTEXT), "get_forward_context", None)
    if context is None:
        return None, True
    known, metadata = context().no_compile_layers, context().attn_metadata
    for given in (*args, *kwargs.values()):
        name = getattr(given, "value", given)
        if isinstance(name, str) and name in known:
            metadata = metadata[0] if isinstance(metadata, list) and metadata else metadata
            return known[name], (metadata.get(name) if isinstance(metadata, dict) else metadata) is not None
    return None, True


def _unknown(layer: Any, operator: str) -> str:
    """Why a layer was not read in which no kernel has reported itself."""
    name = getattr(getattr(layer, "attn_backend", None), "get_name", lambda: "unknown")()
    kind = "an attention layer" if layer is None else type(layer).__name__
    return (
        f"vLLM ran {kind} by its attention backend {name} ({operator}), and no tap knows the kernel of that; read are "
        f"the backends {_READ}: start vLLM with one of these as attention_backend"
    )


def run_batch(names: Callable[[Any], Sequence[str]], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run one batch, and say whose it is where nobody has, and whether attention was out of sight in it."""
    tracing = current()
    if tracing is None:
        return original(*args, **kwargs)
    runner = args[0]
    before = tracing.heard, tracing.refused
    with nullcontext() if running_batch() is not None else requests_of_batch(lambda: names(runner)):
        out = original(*args, **kwargs)
    if (tracing.heard, tracing.refused) == before:
        _say_hidden(tracing, runner, args[1] if len(args) > 1 else kwargs.get("scheduler_output"))
    return out


def _say_hidden(tracing: ActiveTrace, runner: Any, scheduled: Any) -> None:
    """What may have run where no kernel is called by its name."""
    config = getattr(getattr(runner, "vllm_config", None), "compilation_config", None)
    graphs = getattr(getattr(config, "cudagraph_mode", None), "name", "NONE")
    mode = getattr(getattr(config, "mode", None), "name", "NONE")
    if not getattr(scheduled, "total_num_scheduled_tokens", 0) or (graphs, mode) == ("NONE", "NONE"):
        return
    tracing.skip(
        f"vLLM ran a batch and no attention of it was seen (compilation {mode}, CUDA graphs {graphs}): what is "
        "captured in a graph calls no kernel by its name; start vLLM with enforce_eager=True",
        path="",
    )


def prepare(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Keep whose requests the batch is of that was made."""
    batch = original(*args, **kwargs)
    _made.set(tuple(batch.req_ids))
    return batch


def _kept(runner: Any) -> Sequence[str]:
    names: Sequence[str] = runner.input_batch.req_ids
    return names


def _prepared(runner: Any) -> Sequence[str]:
    return _made.get()


_IN_LAYER = {name: partial(in_layer, name) for name in _LAYERS.values()}
_METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    _KEEPS: {"execute_model": partial(run_batch, _kept)},
    _MAKES: {"execute_model": partial(run_batch, _prepared), "prepare_inputs": prepare},
}


def patches() -> Iterable[Patch]:
    """The operators of layers and the methods of runners, of the modules of vLLM that are loaded."""
    for home, name in _LAYERS.items():
        module = sys.modules.get(home)
        if module is not None and isinstance(vars(module).get(name), FunctionType):
            yield Patch(module, name, _IN_LAYER[name])
    for home, methods in _METHODS.items():
        runner = getattr(sys.modules.get(home), _RUNNER, None)
        for name, body in methods.items():
            if runner is not None and name in vars(runner):
                yield Patch(runner, name, body)


TAP = Tap("vllm_engine", patches=patches)
