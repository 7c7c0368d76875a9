"""A trace as transformer-lens names and lays out its activations, and its hook names as calls and fields of a trace.

Nothing here is formed anew: ``hook_z`` is the kernel's own output, ``hook_pattern`` the weights before dropout, and
``hook_attn_scores`` the finite scores with −inf where the mask hides, as transformer-lens has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from ..calls.call import Call
from ..calls.trace_data import TraceData, check_trace
from ..errors import SelectionError

if TYPE_CHECKING:
    from transformer_lens import ActivationCache  # type: ignore[import-not-found,unused-ignore]

_HOOKS = {"q": "q", "k": "k", "v": "v", "scores": "attn_scores", "weights": "pattern", "output": "z"}
_FIELDS = {hook: field for field, hook in _HOOKS.items()} | {"rot_q": "q", "rot_k": "k"}
_BLOCKS = {
    ("encoder_blocks", "attn"): ("encoder", "self"),
    ("decoder_blocks", "self_attn"): ("decoder", "self"),
    ("decoder_blocks", "cross_attn"): ("decoder", "cross"),
    ("blocks", "attn"): (None, "self"),
}
_NAMES = {place: names for names, place in _BLOCKS.items()}
_NAME = re.compile(r"(\w*blocks)\.(\d+)\.(\w*attn)\.hook_(\w+)")
_ROTARY = re.compile(r"rope_theta|rope_parameters|rope_scaling|rotary")


@dataclass(frozen=True, slots=True)
class Hook:
    """What a hook name means.

    Attributes:
        layer: the layer.
        field: the field of a call that it holds.
        stack: ``encoder`` or ``decoder``; None: the only stack there is.
        kind: ``self`` or ``cross``.
        rotated: the name says that q or k has its rotary positions.
    """

    layer: int
    field: str
    stack: str | None = None
    kind: str = "self"
    rotated: bool = False

    @classmethod
    def of(cls, name: str) -> Hook:
        """A name in full, ``blocks.0.attn.hook_pattern``.

        Raises:
            SelectionError: no name of an attention activation.
        """
        found = _NAME.fullmatch(checks.text("name", name, "a hook name"))
        place = _BLOCKS.get((found[1], found[3])) if found else None
        if found is None or place is None or found[4] not in _FIELDS:
            raise SelectionError(
                f"{name!r} names no activation that a trace holds; expected (encoder_, decoder_)blocks.N.(self_, "
                f"cross_)attn.hook_ and one of {', '.join(_FIELDS)}."
            )
        return cls(int(found[2]), _FIELDS[found[4]], *place, rotated=found[4].startswith("rot_"))

    @property
    def name(self) -> str:
        """The name in full."""
        blocks, attention = _NAMES[self.stack, self.kind]
        return f"{blocks}.{self.layer}.{attention}.hook_{'rot_' if self.rotated else ''}{_HOOKS[self.field]}"


def hooks(trace: TraceData, *, model: Any = None, rotary: bool | None = None) -> Iterator[tuple[Hook, Call]]:
    """Every activation that a trace of one step holds, with the call it is in.

    Args:
        trace: of a decoder, an encoder, or an encoder with a decoder.
        model: the bridge, if it is at hand; tells whether q and k are rotated where the trace does not.
        rotary: whether they are.

    Raises:
        SelectionError: several steps, or two calls that would have one name, or stacks without names here: select
            first; or nothing tells whether q and k are rotated.
    """
    check_trace(trace)
    rotated = _rotary(trace, model) if rotary is None else checks.flag("rotary", rotary)
    stacks = {call.site.stack for call in trace}
    both = {"encoder", "decoder"} <= stacks or any(call.site.kind == "cross" for call in trace)
    taken: dict[str, Call] = {}
    for call in trace:
        site = call.site
        stack = _stack(call) if both else None
        if (stack, site.kind) not in _NAMES or site.layer is None or (not both and len(stacks) > 1):
            raise SelectionError(
                f"transformer-lens has no name for {site.stack} {site.kind}-attention ({site.label}) beside "
                f"{', '.join(sorted(stacks))}; take one stack with trace.select(stack=…)."
            )
        for field in _HOOKS:
            if not call.has(field) or (field == "scores" and not call.has("mask")):
                continue
            if rotated is None and field in "qk":
                raise SelectionError(
                    "whether q and k have rotary positions (hook_rot_q) or none (hook_q) is not told by the trace; "
                    "pass model= (the bridge) or rotary=True or False."
                )
            hook = Hook(site.layer, field, stack, site.kind, bool(rotated) and field in "qk")
            other = taken.setdefault(hook.name, call)
            if other is not call:
                steps = sorted({c.step for c in trace})
                raise SelectionError(
                    f"{hook.name} would be both {other.site.label} (step {other.step}) and {site.label} (step "
                    f"{call.step}); take one with trace.select(step=…) of {steps}, or select(stack=…)."
                )
            yield hook, call


def activation(call: Call, field: str) -> Tensor:
    """A field of a call in the layout of transformer-lens.

    Returns:
        q and output: B T H D; k and v: B S G D; scores (−inf where masked) and weights: B H T S.

    Raises:
        FieldNotCaptured: the field (for scores: or the mask) was not kept.
        SelectionError: transformer-lens has no name for the field.
    """
    checks.one_of("call", call, Call, "a Call of a trace")
    checks.word("field", field, _HOOKS)
    call = call.at()  # what is derived of it is held by nobody but the caller
    if field == "scores":
        return torch.where(call.mask, call.scores, -torch.inf)
    value: Tensor = getattr(call, field)
    return value if field == "weights" else value.transpose(1, 2)


def find(trace: TraceData, name: str) -> Tensor:
    """The activation of a hook name in full.

    Raises:
        SelectionError: no such name, or no one call for it.
        FieldNotCaptured: its field was not kept.
    """
    check_trace(trace)
    hook = Hook.of(name)
    found = [
        call
        for call in trace
        if call.site.layer == hook.layer and call.site.kind == hook.kind and hook.stack in (None, _stack(call))
    ]
    if len(found) != 1:
        raise SelectionError(
            f"{name!r} is {hook.kind}-attention of layer {hook.layer}, and {len(found)} calls are: "
            f"{[f'{c.site.label} (step {c.step})' for c in found]}; take one stack and step with trace.select()."
        )
    return activation(found[0], hook.field)


def to_transformer_lens(trace: TraceData, model: Any = None, *, rotary: bool | None = None) -> ActivationCache:
    """The attention of a trace as an ``ActivationCache`` with its hook names.

    q and k are what entered the dot product: ``hook_rot_q`` and ``hook_rot_k`` in a model with rotary positions, where
    ``hook_q`` means something earlier and is left out; ``hook_q`` and ``hook_k`` in any other (a model that scales q
    by itself has it scaled there). What was not captured is left out, and so is all that is not attention.

    Args:
        trace: one step of a decoder, an encoder, or both.
        model: the bridge; the cache asks it for negative layers and for weights.
        rotary: whether q and k have rotary positions; None: by the model, or the configuration in the trace.

    Raises:
        ModuleNotFoundError: transformer-lens is not installed.
        SelectionError: as :func:`hooks`.
    """
    try:
        from transformer_lens import ActivationCache
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "transformer_lens":
            error.add_note('pip install "hookattn[transformer-lens]"')
        raise
    found = {hook.name: activation(call, hook.field) for hook, call in hooks(trace, model=model, rotary=rotary)}
    return ActivationCache(found, model)


def _stack(call: Call) -> str:
    """A stack without a name that attends to another one is a decoder."""
    return "decoder" if call.site.stack == "main" else call.site.stack


def _rotary(trace: TraceData, model: Any) -> bool | None:
    kind = getattr(getattr(model, "cfg", None), "positional_embedding_type", None)
    if kind is not None:
        return bool(kind == "rotary")
    config = trace.model.get("config")
    return _says_rotary(config) if isinstance(config, Mapping) else None


def _says_rotary(config: Mapping[str, Any]) -> bool:
    for name, value in config.items():
        if _ROTARY.match(str(name)):
            if value is not None and value is not False:
                return True
        elif isinstance(value, Mapping) and _says_rotary(value):
            return True
    return False
