"""The experiments with hookattn, on the model in sdpa, as transformers loads it by default."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hookattn
from hookattn import edit

from .given import HEADS, LAYERS, NEW, PROMPT


def zero_pattern(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    trace = hookattn.edited(model, ids, edit.zero("weights", layer=1, heads=2))
    return trace.output.logits


def mean_ablation(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    trace = hookattn.edited(model, ids, edit.mean("output", over="positions", layer=1, heads=2))
    return trace.output.logits


def knockout(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    trace = hookattn.edited(model, ids, edit.knockout(layer=1, queries=-1, keys=2))
    return trace.output.logits


def patch_pattern(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    source = hookattn.trace(model, other)
    trace = hookattn.edited(model, ids, edit.patch("weights", source, layer=1, heads=2))
    return trace.output.logits


def freeze_patterns(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    clean = hookattn.trace(model, ids)
    return hookattn.edited(model, other, edit.freeze(clean)).output.logits


def steer(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    vector = torch.linspace(-1, 1, 8)
    trace = hookattn.edited(model, ids, edit.add("output", vector, layer=1, heads=2, queries=-1))
    return trace.output.logits


def gates(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    gates = torch.ones(LAYERS, HEADS, requires_grad=True)
    with hookattn.editing(model, edit.scale("output", gates)):
        model(ids, labels=ids).loss.backward()
    return gates.grad


def weight_gradients(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    trace = hookattn.trace(model, {"input_ids": ids, "labels": ids}, gradients=True)
    trace.output.loss.backward()
    return torch.stack([call.grad("weights") for call in trace])


def fused(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    trace = hookattn.edited(model, ids, edit.zero("weights", layer=1, heads=2))
    return trace.output.logits


def generation(model: Any, ids: Tensor, other: Tensor) -> Tensor:
    with hookattn.editing(model, edit.knockout(queries=slice(PROMPT, None), keys=2)):
        made = model.generate(
            ids, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return torch.stack(made.logits, 1)
