"""What the heads of a trace do: measures, one a file, and the tables that are made of them."""

from .aggregate import aggregate, aggregate_layers
from .confidence import Confidence
from .decay import distance_decay
from .distance import MeanDistance
from .divergence import cluster_heads, head_divergence
from .entropy import Entropy, NormalisedEntropy
from .flow import flow
from .local import GlobalSpread, LocalMass
from .low_rank import score_rank, singular_values
from .measure import Measure, Reading
from .neurons import neuron_contributions, neuron_decay
from .normalisation import normalisation
from .offset import AtOffset, NextToken, PreviousToken, SelfToken
from .rank import DistanceCorrelation
from .received import received
from .registry import MEASURES, capture
from .report import report
from .roles import ROLES, Role
from .rollout import rollout
from .sink import FirstToken, LearnedSink, Sink
from .table import measure
from .variability import variability
from .view import View

__all__ = [
    "MEASURES",
    "ROLES",
    "AtOffset",
    "Confidence",
    "DistanceCorrelation",
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
    "Role",
    "SelfToken",
    "Sink",
    "View",
    "aggregate",
    "aggregate_layers",
    "capture",
    "cluster_heads",
    "distance_decay",
    "flow",
    "head_divergence",
    "measure",
    "neuron_contributions",
    "neuron_decay",
    "normalisation",
    "received",
    "report",
    "rollout",
    "score_rank",
    "singular_values",
    "variability",
]
