"""Helper modules of transformers that many families are built of, and that hold no attention."""

from __future__ import annotations

from hookattn import Adapter


class Shared(Adapter):
    """Activation functions and GPT-2's ``Conv1D``.

    A model is watched outside its attention sites only if some class in it is covered by no adapter. These classes
    occur in all families, and two adapters may not claim one Python module; so they have an adapter of their own.
    """

    name = "transformers-shared"
    covers = ("transformers.activations", "transformers.pytorch_utils")
