"""What the tests of recognised runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hookattn.models.registry import using


@pytest.fixture(params=["whole", "sites"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whether a model is watched as a whole, or at the sites that the adapter `Ours` of the test's file names alone."""
    with using(*([request.module.Ours()] if request.param == "sites" else [])):
        yield request.param
