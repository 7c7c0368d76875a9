"""What can be changed of attention while a model runs: each edit is a function here, for :func:`hookattn.editing`.

>>> from hookattn import edit
>>> with hookattn.editing(model, edit.zero("weights", layer=3, heads=[1])) as trace:      # doctest: +SKIP
...     model(**inputs)
"""

from __future__ import annotations

from .add_edit import add
from .base import FIELDS, Edit
from .call_edit import call
from .edited_call import EditedCall
from .knockout_edit import knockout
from .mean_edit import mean
from .patch_edit import freeze, patch
from .resample_edit import resample
from .scale_edit import scale
from .set_edit import set
from .where import Where
from .zero_edit import zero

__all__ = [
    "FIELDS",
    "Edit",
    "EditedCall",
    "Where",
    "add",
    "call",
    "freeze",
    "knockout",
    "mean",
    "patch",
    "resample",
    "scale",
    "set",
    "zero",
]


def __dir__() -> list[str]:
    return __all__
