"""The same fields, or what comes nearest, as other libraries hand them out: each as its own documentation says.

A library that is not installed gives no row. That of nnsight is written for its 0.8; attnread asks for other versions
of torch, transformers and nnsight than it needs: ``pip install --no-deps attnread`` takes it without them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from .clock import Variant
from .models import sibling

OUTPUT_ATTENTIONS = "eager, output_attentions=True (weights)"
BRIDGE = "TransformerBridge.run_with_cache (same fields)"
NNSIGHT = "nnsight (q, k, v, masked scores, weights)"
HOOKS = ("hook_q", "hook_k", "hook_v", "hook_attn_scores", "hook_pattern")


def peers(fused: nn.Module, eager: nn.Module, x: Tensor) -> Iterator[Variant]:
    """Every peer that is installed, on the weights of a causal model of transformers.

    Args:
        fused, eager: the model in sdpa and in eager, which nobody else runs.
        x: token ids.
    """
    yield from same_fields(eager, x)
    if find_spec("torchlens") is not None:
        yield _torchlens(eager, x)
    if find_spec("attnread") is not None:
        yield _attnread(fused, x)


def same_fields(eager: nn.Module, x: Tensor) -> Iterator[Variant]:
    """The peers that hand out what an eager model makes in its own forward."""
    yield Variant(OUTPUT_ATTENTIONS, lambda: eager(x, output_attentions=True), peer=True)
    for library, makes in (("transformer_lens", _bridge), ("nnsight", _nnsight)):
        if find_spec(library) is not None:
            yield makes(eager, x)


def generating_peer(generate: Callable[..., Any]) -> Variant:
    """A whole generation of a model that runs in eager, with the weights of its steps.

    Args:
        generate: takes further arguments of ``generate()``.
    """
    return Variant(OUTPUT_ATTENTIONS, lambda: generate(output_attentions=True, return_dict_in_generate=True), peer=True)


def _bridge(eager: nn.Module, x: Tensor) -> Variant:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = sibling(eager)
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config).eval()

    def wanted(name: str) -> bool:
        return name.endswith(HOOKS)

    return Variant(BRIDGE, lambda: bridge.run_with_cache(x, names_filter=wanted), peer=True)


def _nnsight(eager: nn.Module, x: Tensor) -> Variant:
    import nnsight

    model = nnsight.NNsight(sibling(eager))
    layers = model.transformer.h if hasattr(eager, "transformer") else model.model.layers
    sites = [layer.attn if hasattr(eager, "transformer") else layer.self_attn for layer in layers]
    operation = re.findall(r"attention_interface_\d+", str(sites[0].source))[-1]

    def run() -> Any:
        with model.trace(x):
            kept = nnsight.save([])
            for site in sites:
                call = getattr(site.source, operation)
                given = call.inputs[0]
                scores = call.source.nn_functional_softmax_0.inputs[0][0]
                kept.append((given[1], given[2], given[3], scores, call.output[1]))
        return kept

    return Variant(NNSIGHT, run, peer=True)


def _torchlens(eager: nn.Module, x: Tensor) -> Variant:
    import torchlens

    model, wanted = sibling(eager), torchlens.func("matmul") | torchlens.func("softmax")
    return Variant(
        "torchlens (products and softmax)", lambda: torchlens.trace(model, x, save=wanted), _wrapped, peer=True
    )


def _attnread(fused: nn.Module, x: Tensor) -> Variant:
    """It has the kernel multiply its weights by the identity, as many keys at a time as a value has numbers."""
    from attnread import extract_attention

    config: Any = fused.config
    heads = [(0, 0), (config.num_hidden_layers - 1, 0)]
    width = config.hidden_size // config.num_attention_heads
    return Variant(
        "attnread (weights of two heads)",
        lambda: extract_attention(fused, {"input_ids": x}, heads=heads),
        peer=True,
        forwards=len(heads) * (1 + math.ceil(x.shape[1] / width)),
    )


@contextmanager
def _wrapped() -> Iterator[None]:
    """Every function of torch as torchlens wraps it, and leaves it after its first trace: all that follow would pay."""
    from torchlens.backends.torch.wrappers import unwrap_torch, wrap_torch

    wrap_torch()
    try:
        yield
    finally:
        unwrap_torch()
