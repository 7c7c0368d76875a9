"""What is written to have the weights of a case, in each tool; an error of the tool is its answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cases import Case, generated, projected, weights_of


class Lacks(Exception):
    """A tool has no way to be asked."""


def hookattn(case: Case) -> Tensor:
    """In the model as it is loaded, with sdpa where it has it."""
    import hookattn

    model, inputs = case.model(), case.inputs()
    if case.new:
        with hookattn.tracing(model) as trace:
            model.generate(**inputs, max_new_tokens=case.new, do_sample=False)
    else:
        trace = hookattn.trace(model, inputs)
    return getattr(trace[-1], case.field)


def output_attentions(case: Case) -> Tensor:
    """In eager, as the argument asks for."""
    model, inputs = case.model("eager"), case.inputs()
    if case.new:
        return generated(model, inputs, case.new).attentions[-1][-1]
    if case.field != "weights":
        raise Lacks("it returns weights alone")
    return model(**inputs, output_attentions=True)[case.key][-1]


def transformer_lens(case: Case) -> Tensor:
    """On a bridge to the model."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = case.model("eager")
    if case.own is None:
        config: dict[str, Any] = {"hf_config": model.config}
    else:
        config = {
            "tl_config": TransformerBridgeConfig(d_model=32, d_head=8, n_layers=1, n_heads=4, n_ctx=64, d_vocab=60)
        }
    bridge: Any = build_bridge_from_module(model, type(model).__name__, **config)
    first, *others = case.inputs().values()
    if case.new:  # the whole sequence is run again, and its last row read
        first = case.model("eager").generate(first, max_new_tokens=case.new, do_sample=False)[:, :-1]
    _, cache = bridge.eval().run_with_cache(first, **({"decoder_input": others[0]} if others else {}))
    found = cache[f"{case.lens}.hook_{'pattern' if case.field == 'weights' else 'attn_scores'}"]
    return found[:, :, -1:] if case.new else found


def nnsight(case: Case) -> Tensor:
    """In eager, where its source forms them; of what goes into a kernel that forms none, by hand."""
    import nnsight

    model, inputs = nnsight.NNsight(case.model("eager")), case.inputs()
    if case.name == "fused":
        with model.trace(**inputs):
            given = nnsight.save(model.source.F_scaled_dot_product_attention_0.inputs)
        return weights_of(*given[0][:2])
    if case.name == "layer":
        with model.trace(**inputs):
            x = nnsight.save(model.input)  # in eval, its attention is no call of a module
        attention = model._module.self_attn
        return weights_of(*projected(x, attention.in_proj_weight, attention.in_proj_bias), causal=False)
    if case.name == "plain":
        with model.trace(**inputs):
            found = nnsight.save(model.source.softmax_0.output)
    elif case.new:
        how = {"max_new_tokens": case.new, "do_sample": False}
        with model.trace(*inputs.values(), fn=model.generate, **how) as tracer:
            found = nnsight.save([])
            for _ in tracer.iter[: case.new]:
                found.append(model.transformer.h[1].attn.source.attention_interface_1.output[1])
        return found[-1]
    else:
        with model.trace(**inputs):
            attention = model.get(case.path).source.attention_interface_1
            if case.field == "weights":
                found = nnsight.save(attention.output[1])
            else:
                found = nnsight.save(attention.source.nn_functional_softmax_0.inputs[0][0])
    return found


READERS = {
    "hookattn": hookattn,
    "output_attentions": output_attentions,
    "transformer_lens": transformer_lens,
    "nnsight": nnsight,
}
BY_HAND = {("nnsight", "fused"), ("nnsight", "layer")}


def read(tool: str, case: Case) -> Tensor | Exception:
    """What a tool answers: B H T S, or the error that it raises."""
    try:
        with torch.no_grad():
            return READERS[tool](case).detach()
    except Exception as error:  # noqa: BLE001 - whatever a tool says to a model that it does not know
        return error
