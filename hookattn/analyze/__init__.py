"""What the heads of a trace do: measures, one a file, and the tables that are made of them."""

from ..tokens.pieces import SEPARATORS
from .acronym import Acronyms
from .aggregate import aggregate, aggregate_layers
from .circuits import Circuit, Projection
from .cluster import cluster_heads
from .compare import compare
from .composition import composition
from .confidence import Confidence
from .copying import copying, vocabulary
from .decay import distance_decay
from .detection import Detection
from .distance import MeanDistance
from .divergence import head_divergence
from .entropy import Entropy, NormalisedEntropy
from .finding import circuit
from .flow import flow
from .label_mass import LabelMass, between_labels
from .lexical import Brackets, SameWord
from .list_items import ListItems
from .local import GlobalSpread, LocalMass
from .low_rank import score_rank, singular_values
from .measure import Measure
from .neurons import neuron_contributions, neuron_decay
from .normalisation import normalisation
from .offset import AtOffset, NextToken, PreviousToken, SelfToken
from .pairs import KeyMass, PairMass
from .pool import pool_words
from .positional import Positional, best_offset
from .rank import DistanceCorrelation
from .reading import Reading
from .received import received
from .registry import MEASURES, capture, measure
from .repeats import DuplicateToken, Induction
from .report import report
from .roles import ROLES, Role
from .rollout import rollout
from .segment_repeats import RepeatedSegment, repeated_segment
from .segments import BetweenSegments, between_segments
from .separator import Punctuation, Separators
from .sink import FirstToken, LearnedSink, Sink
from .top_targets import top_targets
from .values import OutputNorm, ValueNorm, norm_based, value_weighted
from .variability import variability
from .view import View
from .word_relation import Coreference, Dependency, WordRelation

__all__ = [
    "MEASURES",
    "ROLES",
    "SEPARATORS",
    "Acronyms",
    "AtOffset",
    "BetweenSegments",
    "Brackets",
    "Circuit",
    "Confidence",
    "Coreference",
    "Dependency",
    "Detection",
    "DistanceCorrelation",
    "DuplicateToken",
    "Entropy",
    "FirstToken",
    "GlobalSpread",
    "Induction",
    "KeyMass",
    "LabelMass",
    "LearnedSink",
    "ListItems",
    "LocalMass",
    "MeanDistance",
    "Measure",
    "NextToken",
    "NormalisedEntropy",
    "OutputNorm",
    "PairMass",
    "Positional",
    "PreviousToken",
    "Projection",
    "Punctuation",
    "Reading",
    "RepeatedSegment",
    "Role",
    "SameWord",
    "SelfToken",
    "Separators",
    "Sink",
    "ValueNorm",
    "View",
    "WordRelation",
    "aggregate",
    "aggregate_layers",
    "best_offset",
    "between_labels",
    "between_segments",
    "capture",
    "circuit",
    "cluster_heads",
    "compare",
    "composition",
    "copying",
    "distance_decay",
    "flow",
    "head_divergence",
    "measure",
    "neuron_contributions",
    "neuron_decay",
    "norm_based",
    "normalisation",
    "pool_words",
    "received",
    "repeated_segment",
    "report",
    "rollout",
    "score_rank",
    "singular_values",
    "top_targets",
    "value_weighted",
    "variability",
    "vocabulary",
]
