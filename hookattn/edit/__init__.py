"""What can be changed of attention while a model runs: each edit is a function here, for :func:`hookattn.editing`.

>>> from hookattn import edit
>>> with hookattn.editing(model, edit.zero("weights", layer=3, heads=[1])) as trace:      # doctest: +SKIP
...     model(**inputs)
"""

from __future__ import annotations

from .add import add
from .base import FIELDS, Edit
from .call import call
from .edited_call import EditedCall
from .knockout import knockout
from .mean import mean
from .patch import freeze, patch
from .resample import resample
from .scale import scale
from .set import set
from .where import Where
from .zero import zero

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
