"""What heads are called: roles, each with the measure that is its evidence and how much of it is clear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ... import checks
from ..measures.base import Measure
from ..measures.entropy import NormalisedEntropy
from ..measures.lexical import SameWord
from ..measures.local import LocalMass
from ..measures.offset import NextToken, PreviousToken, SelfToken
from ..measures.repeats import DuplicateToken, Induction
from ..measures.separator import Separators
from ..measures.sink import FirstToken, LearnedSink

# Thresholds are high, and a head may have no role: a name that is missing misleads nobody, and a wrong one does. Half
# of the attention is the bound by which Clark et al. (2019, section 3.1) count heads for the previous and the next
# token; it serves all roles of one key. Roles whose keys not every query has (a word that was there before) have it
# lower. The literature has no bound for these; ours stand here, and each score is printed beside its role.
LIFT = 2.0
"""How many times the level of uniform attention a share has to be."""


@dataclass(frozen=True)
class Role:
    """A name for heads that do one recognizable thing.

    Attributes:
        name: what it is called.
        measure: the evidence.
        least: from where on it is clear.
        lift: how many times the level of uniform attention it has to be; None: that says nothing.
        unless: roles that say the same more closely.
    """

    name: str
    measure: Measure
    least: float
    lift: float | None = LIFT
    unless: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks.text("Role: name", self.name)
        checks.one_of("Role: measure", self.measure, Measure, "a measure of hookattn.analyze")
        checks.number("Role: least", self.least, "a number", lambda x: True)
        if self.lift is not None:
            checks.number("Role: lift", self.lift, "a number, or None", lambda x: True)
        unless = checks.several("Role: unless", self.unless, str, "the names of roles")
        object.__setattr__(self, "unless", tuple(unless))

    def evidence(self, scores: Mapping[str, float], chance: Mapping[str, float]) -> str | None:
        """Why a head has the role: the score, and the level of uniform attention; None: it hasn't.

        Args:
            scores: of the head, by the measures' keys; NaN is no evidence.
            chance: the same of uniform attention.
        """
        score, level = scores.get(self.measure.key, float("nan")), chance.get(self.measure.key)
        if not score >= self.least or (self.lift is not None and level is not None and score < self.lift * level):
            return None
        beside = "" if level is None or self.lift is None else f" (uniform {level:.2f})"
        return f"{self.measure.key} {score:.2f}{beside}"


ROLES: tuple[Role, ...] = (
    Role("induction", Induction(), 0.4),
    Role("duplicate token", DuplicateToken(), 0.4),
    Role("same word in the other sentence", SameWord(across=True), 0.3),
    Role("previous token", PreviousToken(), 0.5),
    Role("next token", NextToken(), 0.5),
    Role("itself", SelfToken(), 0.5),
    Role("neighbours", LocalMass(2), 0.6, unless=("previous token", "next token", "itself")),
    Role("separators", Separators(), 0.2, lift=2.5),
    Role("first token", FirstToken(), 0.5),
    Role("learned sink", LearnedSink(), 0.5, lift=None),
    Role("uniform", NormalisedEntropy(), 0.9, lift=None),
)
"""All roles, the most telling first."""


class NamedRole(NamedTuple):
    """A role that a head has.

    Attributes:
        role: the role.
        evidence: the score, and that of uniform attention, as text.
    """

    role: Role
    evidence: str


def roles_of(scores: Mapping[str, float], chance: Mapping[str, float]) -> list[NamedRole]:
    """The roles of a head with their evidence, the most telling first.

    Args:
        scores, chance: see :meth:`Role.evidence`.
    """
    found = [NamedRole(role, why) for role in ROLES if (why := role.evidence(scores, chance)) is not None]
    names = {own.role.name for own in found}
    return [own for own in found if not names & set(own.role.unless)]


def evidence_measures() -> Iterable[Measure]:
    """The measures that roles are read off."""
    return (role.measure for role in ROLES)
