"""``resample``: an ablation that stays among values that the model has: those of another input."""

from __future__ import annotations

import zlib
from typing import Unpack

import torch
from torch import Tensor

from .. import checks
from ..calls.trace_data import TraceData
from ..errors import EditError
from ..traces import TraceLike
from .base import Edit, field_of
from .edited_call import EditedCall
from .samples import check_whole, named, over_of, renormalised, samples_of
from .where import Where


class Resample(Edit):
    """See :func:`resample`."""

    name = "resample"
    by_position = True

    def __init__(self, field: str, over: TraceLike | TraceData | str, seed: int, **where: Unpack[Where]):
        super().__init__(field, **where)
        self.over, self.seed = over_of(over), checks.whole("seed", seed, 0)

    def new(self, call: EditedCall) -> Tensor:
        value = call.value
        if isinstance(self.over, str):
            check_whole(call, self, self.over)
        if isinstance(self.over, TraceData):
            several = samples_of(self.over, call, self)
            pool = torch.cat([x.to(value.device, value.dtype) for x in several])
            made = pool[torch.randint(len(pool), (len(value),), generator=self._random(call)).to(pool.device)]
        elif self.over == "batch":
            if len(value) < 2:
                raise EditError(
                    f"{call.where(self)}: over='batch' takes the values of other batch entries, and there is one; use "
                    "over='positions' or a trace."
                )
            by = torch.randint(1, len(value), (), generator=self._random(call))
            made = value.roll(int(by), 0)  # another's, never its own
        else:
            made = value[:, :, torch.randperm(value.shape[2], generator=self._random(call)).to(value.device)]
        return renormalised(call, made) if self.field == "weights" else made

    def _random(self, call: EditedCall) -> torch.Generator:
        """Draws by the seed and by where the call is: a checkpoint that runs it again in a backward draws the same."""
        site, place = call.site, call.place
        key = self.seed, site.path, site.kind, call.step, place.batch.first, place.heads.first, place.rows.first
        return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))

    @property
    def note(self) -> str:
        return f"over {named(self.over)}, seed {self.seed}"


def resample(field: str = "output", over: TraceLike = "batch", *, seed: int = 0, **where: Unpack[Where]) -> Edit:
    """Put values of other inputs in the place of entries of a field (Chan et al. 2022, "Causal scrubbing").

    Weights are, afterwards, made 0 where the mask hides a key, and to sum to 1.

    Args:
        field: ``q``, ``k``, ``v``, ``scores``, ``weights`` or ``output``.
        over: ``"batch"``: those of another batch entry; ``"positions"``: those of the same one in another order; or a
            trace (or the path of its file): those of a batch entry of it, drawn for each.
        seed: of the draws, which are the same whenever a site and step are the same.
        where: see :class:`~hookattn.edit.where.Where`.

    Raises:
        SelectionError, InputError: there is no such field, the selection is none, or ``over`` is none of these.
        EditError: as the model runs, if there is nothing to draw from, or the shapes do not fit.
    """
    return Resample(field_of("resample", field), over, seed, **where)
