"""What the heads of a trace do: measures, one a file, and the tables that are made of them."""

from .confidence import Confidence
from .distance import MeanDistance
from .entropy import Entropy, NormalisedEntropy
from .local import GlobalSpread, LocalMass
from .measure import Measure, Reading
from .offset import AtOffset, NextToken, PreviousToken, SelfToken
from .registry import MEASURES, capture
from .sink import FirstToken, LearnedSink, Sink
from .table import measure
from .view import View

__all__ = [
    "MEASURES",
    "AtOffset",
    "Confidence",
    "Entropy",
    "FirstToken",
    "GlobalSpread",
    "LearnedSink",
    "LocalMass",
    "MeanDistance",
    "Measure",
    "NextToken",
    "NormalisedEntropy",
    "PreviousToken",
    "Reading",
    "SelfToken",
    "Sink",
    "View",
    "capture",
    "measure",
]
