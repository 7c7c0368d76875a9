"""Run as a program: the attention weights of a model of transformers, for sequences of tokens, into a file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main(folder: str, asked: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    made = []
    with torch.no_grad():
        for tokens in torch.load(Path(asked)):
            layers = model(torch.tensor([tokens]), output_attentions=True, use_cache=False).attentions
            made.append([x[0] for x in layers])
    torch.save(made, f"{asked}.weights")


if __name__ == "__main__":
    main(*sys.argv[1:])
