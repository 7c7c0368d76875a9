"""Attention modules in many hands, each with what plain code says about it."""

from __future__ import annotations

from tests.zoo import biases, einsums, folded, gpt, grouped, masks, others, softmaxes
from tests.zoo.base import CASES, Case, Entry, Expected, Host

__all__ = [
    "CASES",
    "Case",
    "Entry",
    "Expected",
    "Host",
    "biases",
    "einsums",
    "folded",
    "gpt",
    "grouped",
    "masks",
    "others",
    "softmaxes",
]
