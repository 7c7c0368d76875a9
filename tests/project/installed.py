"""Tries an installed hookattn that has nothing beside its core dependencies: ``python -I installed.py``."""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import metadata, version
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import hookattn


class Layer(nn.Module):
    """A model of nobody's library."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


def main() -> None:
    """Raise where something of the installed package does not do what it has to."""
    place = Path(hookattn.__file__).resolve()
    assert "site-packages" in place.parts, f"this is no installed one: {place}"
    assert version("hookattn") == hookattn.__version__
    assert "](docs/" not in str(metadata("hookattn").get_payload()) + str(metadata("hookattn")["description"] or "")
    assert files("hookattn").joinpath("py.typed").is_file()
    x = torch.randn(1, 5, 16)
    trace = hookattn.trace(Layer(), x, tokens=list("abcde"), strict=True)
    with tempfile.TemporaryDirectory() as folder:
        again = hookattn.load(trace.save(Path(folder) / "a.safetensors"))
        assert torch.equal(again[0].weights, trace[0].weights)
    assert "<img" in trace._repr_html_()
    from hookattn.demo.induction import example_tokens, load_pretrained
    from hookattn.render import page

    assert "data-codec" in page(hookattn.trace(load_pretrained(), example_tokens(0)))
    assert len(hookattn.adapters()) > 5, "the built-in adapters are not found"
    extra = {"click", "pandas", "matplotlib", "transformers"} & {*sys.modules}
    assert not extra, f"the core imports {extra}"
    print(f"hookattn {hookattn.__version__} works in {sys.prefix}")


if __name__ == "__main__":
    main()
