"""All statistics, in one place, and what ``capture=`` may say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .. import checks
from ..attention.kernel_call import FieldSpec
from .base import Statistic
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
from .segment_mass import SegmentMass
from .top_k import TopK

STATISTICS: dict[str, type[Statistic]] = {
    kind.name: kind
    for kind in (
        Entropy,
        LogSumExp,
        MaxScore,
        FirstMass,
        LocalMass,
        FarMass,
        PreviousMass,
        OffsetMass,
        SegmentMass,
        MeanDistance,
        TopK,
        Received,
    )
}


def named(name: str) -> Statistic | None:
    """A statistic with its defaults, by its plain name; None: there is none, or it has no defaults (segments).

    Raises:
        InputError: ``name`` is no text.
    """
    kind = STATISTICS.get(checks.text("name", name))
    return None if kind is None or kind is SegmentMass else kind()


def resolve(name: str, fields: Iterable[str]) -> list[str]:
    """The fields that a plain name such as ``first_mass`` or ``top_k_keys`` may mean.

    Raises:
        InputError: ``name`` is no text, or ``fields`` are no names.
    """
    checks.text("name", name)
    given = list(fields) if isinstance(fields, Mapping) else fields
    fields = checks.several("fields", given, str, "names of fields")
    return [field for field in fields if field.partition("(")[0] == name]


def spec_of(field: str) -> FieldSpec | None:
    """What a field of a statistic is like, such as ``first_mass(4)``; None: it is of none of these."""
    plain = field.partition("(")[0]
    of = STATISTICS.get(plain) or next((kind for kind in STATISTICS.values() if plain in kind.integers), None)
    return None if of is None else FieldSpec(field, of.axes, integer=plain in of.integers)
