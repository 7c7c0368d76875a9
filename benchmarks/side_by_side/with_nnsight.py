"""The experiments with nnsight 0.8, on the same model in eager, whose source it names, and in sdpa."""

from __future__ import annotations

from typing import Any

import nnsight
import torch
from torch import Tensor

from .given import HEADS, LAYERS, NEW, WIDTH


def zero_pattern(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    with model.trace(ids):
        attention = model.transformer.h[1].attn.source.attention_interface_1.source
        attention.nn_functional_softmax_0.output[:, 2] = 0
        logits = nnsight.save(model.output.logits)
    return logits


def mean_ablation(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    with model.trace(ids):
        z = model.transformer.h[1].attn.c_proj.input
        z[:, :, 16:24] = z[:, :, 16:24].mean(1, keepdim=True)
        logits = nnsight.save(model.output.logits)
    return logits


def knockout(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    with model.trace(ids):
        attention = model.transformer.h[1].attn.source.attention_interface_1.source
        scores = attention.nn_functional_softmax_0.inputs[0][0]
        scores[:, :, -1, 2] = -torch.inf
        logits = nnsight.save(model.output.logits)
    return logits


def patch_pattern(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    with model.trace(other):
        attention = model.transformer.h[1].attn.source.attention_interface_1.source
        pattern = nnsight.save(attention.nn_functional_softmax_0.output)
    with model.trace(ids):
        attention = model.transformer.h[1].attn.source.attention_interface_1.source
        attention.nn_functional_softmax_0.output[:, 2] = pattern[:, 2]
        logits = nnsight.save(model.output.logits)
    return logits


def freeze_patterns(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    with model.trace(ids):
        patterns = nnsight.save([])
        for block in model.transformer.h:
            attention = block.attn.source.attention_interface_1.source
            patterns.append(attention.nn_functional_softmax_0.output)
    with model.trace(other):
        for block, pattern in zip(model.transformer.h, patterns, strict=True):
            attention = block.attn.source.attention_interface_1.source
            attention.nn_functional_softmax_0.output = pattern
        logits = nnsight.save(model.output.logits)
    return logits


def steer(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    vector = torch.linspace(-1, 1, 8)
    with model.trace(ids):
        model.transformer.h[1].attn.c_proj.input[:, -1, 16:24] += vector
        logits = nnsight.save(model.output.logits)
    return logits


def gates(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    gates = torch.ones(LAYERS, HEADS, requires_grad=True)
    with model.trace(ids, labels=ids):
        for layer, block in enumerate(model.transformer.h):
            block.attn.c_proj.input = block.attn.c_proj.input * gates[layer].repeat_interleave(WIDTH)
        loss = nnsight.save(model.output.loss)
    loss.backward()
    return gates.grad


def weight_gradients(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    with model.trace(ids, labels=ids):
        patterns = nnsight.save([])
        for block in model.transformer.h:
            attention = block.attn.source.attention_interface_1.source
            patterns.append(attention.nn_functional_softmax_0.output)
        loss = nnsight.save(model.output.loss)
    return torch.stack(torch.autograd.grad(loss, patterns))


def fused(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    with model.trace(ids):  # there is no pattern to write to; without one, the head returns 0
        model.transformer.h[1].attn.c_proj.input[:, :, 16:24] = 0
        logits = nnsight.save(model.output.logits)
    return logits


def generation(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with model.trace(ids, fn=model.generate, **options) as tracer:
        for step in tracer.iter[:NEW]:
            for block in model.transformer.h:
                attention = block.attn.source.attention_interface_1.source
                scores = attention.nn_functional_softmax_0.inputs[0][0]
                if step > 0:
                    scores[..., 2] = -torch.inf
        made = nnsight.save(tracer.result)
    return torch.stack(made.logits, 1)
