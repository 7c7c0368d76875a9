"""Scores and weights on a GPU at the speed of its memory: Triton, beside the plain functions that say what is right."""

from .launch import derive

__all__ = ["derive"]
