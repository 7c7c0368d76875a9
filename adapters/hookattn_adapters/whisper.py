"""Whisper: an encoder over frames of speech, and a decoder over tokens."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from torch import nn

from hookattn import Adapter, Site


class Whisper(Adapter):
    """Whisper.

    There is no option to refuse: the scale has been applied to q when the kernel gets it, and masked frames
    (``apply_spec_augment``) are zeros in the input.
    """

    name = "whisper"
    covers = ("transformers.models.whisper.modeling_whisper",)
    attention = MappingProxyType({"WhisperAttention": "auto"})

    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        """The stack by the module's own flag, so that one traced on its own is named the same."""
        site = super().site(path, module, root)
        if getattr(module, "is_decoder", False):
            return replace(site, stack="decoder")
        return replace(site, stack="encoder", axes="frames")
