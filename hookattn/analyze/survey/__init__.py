"""Measures over many prompts, in constant memory, into one Parquet table."""

from .batches import Batch
from .chunking import Chunk, CorpusShard, chunks
from .corpus import Corpus
from .jobs import survey_on_processes
from .measurer import Failure, Measurer, failures_of
from .on_ray import survey_on_ray
from .parts import read_table
from .run import survey

__all__ = [
    "Batch",
    "Chunk",
    "Corpus",
    "CorpusShard",
    "Failure",
    "Measurer",
    "chunks",
    "failures_of",
    "read_table",
    "survey",
    "survey_on_processes",
    "survey_on_ray",
]
