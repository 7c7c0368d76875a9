"""Measures over many prompts, in constant memory, into one Parquet table."""

from .corpus import Corpus
from .run import Batch, survey

__all__ = ["Batch", "Corpus", "survey"]
