"""The allowed distance of a dtype has one owner, also of a dtype that it does not list."""

from __future__ import annotations

import pytest
import torch

from hookattn import Call, Site, Trace
from hookattn.analyze import normalisation
from hookattn.calls.certificate import TOLERANCE, tolerance
from hookattn.testing.recheck import recheck

EIGHT_BITS = [getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)]


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_a_dtype_without_a_bound_is_taken_for_the_coarsest(dtype: torch.dtype) -> None:
    assert tolerance(dtype) == max(TOLERANCE.values())
    # Rows that are off by 2 %: less than what bfloat16 may be, and more than float16 may.
    weights = torch.full((1, 1, 2, 2), 0.51)
    mask, sinks, scores = torch.ones(1, 1, 1, 1, dtype=torch.bool), None, torch.zeros(1, 1, 2, 2)
    fields = {"weights": weights, "mask": mask, "sinks": sinks, "scores": scores}
    call = Call(Site("a"), 0, 0, "tap", dtype, 1.0, fields=dict(fields))
    found = recheck(call)
    assert found["rows"].passed and found["weights"].passed
    assert normalisation(Trace(calls=[call])).empty
    call.dtype = torch.float16
    found = recheck(call)
    assert not found["weights"].passed
    assert not normalisation(Trace(calls=[call])).empty
