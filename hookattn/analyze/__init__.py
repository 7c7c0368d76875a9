"""What the heads of a trace do: measures, one a file, and the tables that are made of them."""

from ..tokens.pieces import SEPARATORS
from .call_view import View
from .causal.ablation import head_ablation
from .causal.activation_patching import activation_patching
from .causal.atp_star import atp_star
from .causal.attribution import attribution_patching
from .causal.edge_attribution import edge_attribution
from .causal.edge_effects import edge_effects
from .causal.gates import head_importance
from .causal.integrated import integrated_gradients
from .causal.metric import log_probability, logit_difference
from .causal.path_patching import path_patching
from .causal.relevance import Relevance, relevance
from .circuits.circuit import Circuit, Projection
from .circuits.composition import composition
from .circuits.copying import copying, vocabulary
from .circuits.find_weights import circuit
from .circuits.neurons import neuron_contributions, neuron_decay
from .measures.acronym import Acronyms
from .measures.base import Measure
from .measures.confidence import Confidence
from .measures.detection import Detection
from .measures.entropy import Entropy, NormalisedEntropy
from .measures.label_mass import LabelMass, between_labels
from .measures.lexical import Brackets, SameWord
from .measures.list_items import ListItems
from .measures.local import GlobalSpread, LocalMass
from .measures.mean_distance import MeanDistance
from .measures.offset import AtOffset, NextToken, PreviousToken, SelfToken
from .measures.positional import Positional, best_offset
from .measures.rank import DistanceCorrelation
from .measures.repeats import DuplicateToken, Induction
from .measures.segment_repeats import RepeatedSegment, repeated_segment
from .measures.segments import BetweenSegments, between_segments
from .measures.separator import Punctuation, Separators
from .measures.sink import FirstToken, LearnedSink, Sink
from .measures.values import OutputNorm, ValueNorm, as_distribution, norm_based, value_weighted
from .measures.word_relation import Coreference, Dependency, WordRelation
from .pairs import KeyMass, PairMass
from .reading import Reading
from .registry import MEASURES, capture, measure
from .tables.aggregate import aggregate, aggregate_layers
from .tables.cluster import cluster_heads
from .tables.compare import compare
from .tables.decay import distance_decay
from .tables.divergence import head_divergence
from .tables.explain import explain
from .tables.flow import flow
from .tables.low_rank import score_rank, singular_values
from .tables.normalisation import normalisation
from .tables.pool import pool_words
from .tables.received import received
from .tables.report import report
from .tables.roles import ROLES, Role
from .tables.rollout import rollout
from .tables.top_targets import top_targets
from .tables.variability import variability

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
    "Relevance",
    "RepeatedSegment",
    "Role",
    "SameWord",
    "SelfToken",
    "Separators",
    "Sink",
    "ValueNorm",
    "View",
    "WordRelation",
    "activation_patching",
    "aggregate",
    "aggregate_layers",
    "as_distribution",
    "atp_star",
    "attribution_patching",
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
    "edge_attribution",
    "edge_effects",
    "explain",
    "flow",
    "head_ablation",
    "head_divergence",
    "head_importance",
    "integrated_gradients",
    "log_probability",
    "logit_difference",
    "measure",
    "neuron_contributions",
    "neuron_decay",
    "norm_based",
    "normalisation",
    "path_patching",
    "pool_words",
    "received",
    "relevance",
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


def __dir__() -> list[str]:
    return __all__
