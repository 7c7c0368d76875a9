"""What a model computes while its weights are read: its logits, beside those of the model as it is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cases import CASES

_GPT2 = CASES[0]


def logits(tool: str) -> Tensor:
    """Of GPT-2, while a tool has its weights."""
    inputs = _GPT2.inputs()
    with torch.no_grad():
        if tool == "hookattn":
            import hookattn

            model = _GPT2.model()
            with hookattn.tracing(model) as trace:
                found = model(**inputs).logits
            assert trace[-1].weights.numel()
        elif tool == "output_attentions":
            found = _GPT2.model("eager")(**inputs, output_attentions=True).logits
        elif tool == "transformer_lens":
            from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

            model = _GPT2.model("eager")
            bridge: Any = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
            found, _ = bridge.eval().run_with_cache(inputs["input_ids"])
        else:
            import nnsight

            model = nnsight.NNsight(_GPT2.model("eager"))
            with model.trace(**inputs):
                nnsight.save(model.transformer.h[1].attn.source.attention_interface_1.output[1])
                found = nnsight.save(model.output.logits)
    return found


def as_loaded() -> Tensor:
    """Of the same model, in the kernel that it is loaded with, with nobody looking."""
    with torch.no_grad():
        found: Tensor = _GPT2.model()(**_GPT2.inputs()).logits
    return found


def attentions_of_the_fused_model() -> int:
    """How many tensors ``output_attentions=True`` returns of that model, which has two layers."""
    with torch.no_grad():
        return len(_GPT2.model()(**_GPT2.inputs(), output_attentions=True).attentions or ())
