"""Statistics of attention that need no T×S matrix: one a file, all in one pass."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..attention.positions import query_positions
from ..attention.score_inputs import ScoreInputs
from .base import Statistic
from .engine import compute
from .entropy import Entropy
from .far_mass import FarMass
from .first_mass import FirstMass
from .local_mass import LocalMass
from .lse import LogSumExp
from .max_score import MaxScore
from .mean_distance import MeanDistance
from .offset_mass import OffsetMass
from .previous_mass import PreviousMass
from .received import Received
from .registry import STATISTICS, named, resolve
from .segment_mass import SegmentMass
from .top_k import TopK

# The name that users of the statistics know; the same class.
Problem = ScoreInputs

__all__ = [
    "STATISTICS",
    "Entropy",
    "FarMass",
    "FirstMass",
    "LocalMass",
    "LogSumExp",
    "MaxScore",
    "MeanDistance",
    "OffsetMass",
    "PreviousMass",
    "Problem",
    "Received",
    "SegmentMass",
    "Statistic",
    "TopK",
    "compute",
    "merge",
    "named",
    "query_positions",
    "resolve",
]


def __getattr__(name: str) -> Any:
    """``merge`` puts whole traces together, so it stands with the generation's steps, above this package. Users find it
    here, beside what it merges: it is looked up when it is asked for, as an import here would point the wrong way."""
    if name == "merge":
        return import_module("hookattn.generation.merge_statistics").merge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; there are {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return __all__
