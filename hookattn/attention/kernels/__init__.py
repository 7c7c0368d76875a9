"""Scores, weights, certificates and sums over weights by GPU kernels, in Triton.

The functions of :mod:`hookattn.attention.functional` and :mod:`hookattn.statistics.engine` say what is right; what is
computed here is the same, and what no kernel takes is left to them.
"""

from .launch import check, derive

__all__ = ["check", "derive"]
