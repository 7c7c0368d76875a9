"""Scores, weights, certificates and sums over weights as fast as a GPU allows: Triton, beside plain functions that say
what is right."""

from .launch import check, derive

__all__ = ["check", "derive"]
