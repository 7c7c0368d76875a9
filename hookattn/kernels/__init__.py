"""Scores, weights and certificates at the speed of a GPU's memory: Triton, beside plain functions that say what is
right."""

from .launch import check, derive

__all__ = ["check", "derive"]
