"""The experiments with TransformerLens 4, on its bridge to the same model, which computes attention in its own math."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .given import HEADS, LAYERS, NEW, PROMPT


def zero_pattern(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    def zero(pattern: Tensor, hook: Any) -> Tensor:
        pattern[:, 2] = 0
        return pattern

    return model.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_pattern", zero)])


def mean_ablation(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    def mean(z: Tensor, hook: Any) -> Tensor:
        z[:, :, 2] = z[:, :, 2].mean(1, keepdim=True)
        return z

    return model.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_z", mean)])


def knockout(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    def hide(scores: Tensor, hook: Any) -> Tensor:
        scores[:, :, -1, 2] = -torch.inf
        return scores

    return model.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_attn_scores", hide)])


def patch_pattern(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    _, cache = model.run_with_cache(other)

    def patch(pattern: Tensor, hook: Any) -> Tensor:
        pattern[:, 2] = cache[hook.name][:, 2]
        return pattern

    return model.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_pattern", patch)])


def freeze_patterns(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    _, cache = model.run_with_cache(ids)

    def freeze(pattern: Tensor, hook: Any) -> Tensor:
        return cache[hook.name]

    hooks = [(f"blocks.{layer}.attn.hook_pattern", freeze) for layer in range(LAYERS)]
    return model.run_with_hooks(other, fwd_hooks=hooks)


def steer(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    vector = torch.linspace(-1, 1, 8)

    def add(z: Tensor, hook: Any) -> Tensor:
        z[:, -1, 2] += vector
        return z

    return model.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_z", add)])


def gates(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    gates = torch.ones(LAYERS, HEADS, requires_grad=True)

    def scale(z: Tensor, hook: Any) -> Tensor:
        return z * gates[int(hook.name.split(".")[1])][:, None]

    hooks = [(f"blocks.{layer}.attn.hook_z", scale) for layer in range(LAYERS)]
    model.run_with_hooks(ids, return_type="loss", fwd_hooks=hooks).backward()
    return gates.grad


def weight_gradients(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    found = {}

    def keep(gradient: Tensor, hook: Any) -> None:
        found[hook.name] = gradient

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(LAYERS)]
    with model.hooks(bwd_hooks=[(name, keep) for name in names]):
        model(ids, return_type="loss").backward()
    return torch.stack([found[name] for name in names])


def generation(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    def hide(scores: Tensor, hook: Any) -> Tensor:
        scores[:, :, PROMPT:, 2] = -torch.inf
        return scores

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", hide) for layer in range(LAYERS)]
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "use_past_kv_cache": False}
    with model.hooks(fwd_hooks=hooks):
        made = model.generate(ids, max_new_tokens=NEW, output_logits=True, **options)
    return torch.stack(made.logits, 1)
