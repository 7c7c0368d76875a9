"""Columns told by their values: what matches, and what must not."""

from __future__ import annotations

import pytest
import torch

from hookattn.analyze.circuits.circuit import triangular_factor
from hookattn.analyze.circuits.match_values import affine, equal, norms
from tests.reference import draw


def test_equal_takes_columns_that_are_the_same_only_with_weights_that_are() -> None:
    y, w = draw(9, 5, seed=1), draw(4, 5, seed=2)
    y[:, 3] = y[:, 1]
    assert equal(y[:, [4, 1]], y, w) is None
    w[:, 3] = w[:, 1]
    match = equal(y[:, [4, 1]], y, w)
    assert match is not None and match.columns.tolist() == [4, 1]
    assert equal(torch.where(y == y[0, 0], y + 1e-6, y)[:, :1], y, w) is None


def test_affine_says_factor_and_offset() -> None:
    y, w = draw(12, 6, seed=1), draw(4, 6, seed=2)
    match = affine(y[:, [5, 2]] * torch.tensor([-3.0, 0.5]) + torch.tensor([0.0, 7.0]), y, w, torch.float32)
    assert match is not None and match.columns.tolist() == [5, 2]
    torch.testing.assert_close(match.factor, torch.tensor([-3.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(match.offset, torch.tensor([0.0, 7.0], dtype=torch.float64))
    bent = y[:, [5]].clone()
    bent[3] += 1e-2
    assert affine(bent, y, w, torch.float32) is None
    assert affine(torch.full((12, 1), 2.0), y, w, torch.float32) is None  # one value tells nothing


def test_norms_needs_every_token() -> None:
    y = draw(12, 24, seed=3)
    turn, _ = torch.linalg.qr(draw(6, 6, seed=4))
    turned = 0.25 * y[:, [*range(12, 18), *range(6)]].view(12, 2, 6) @ turn
    match = norms(turned.flatten(1), y, 2, torch.float32)
    assert match is not None and match.columns.tolist() == [*range(12, 18), *range(6)]
    torch.testing.assert_close(match.factor, torch.full((12,), 0.25, dtype=torch.float64))
    drifting = turned * torch.linspace(1, 1.01, 12).view(12, 1, 1)  # still far nearer to its own columns than to others
    assert norms(drifting[:, 0], y, 1, torch.float32) is None
    assert norms(turned[:, 0], y, 1, torch.float32) is not None
    turned[7, 1] *= 1.01
    assert norms(turned.flatten(1), y, 2, torch.float32) is None


@pytest.mark.parametrize("shape", [(3, 9, 4), (3, 4, 9)])
def test_the_triangle_has_the_norms_of_the_whole(shape: tuple[int, int, int]) -> None:
    m, x = draw(*shape, seed=1).double(), draw(shape[2], 5, seed=2).double()
    small = triangular_factor(m)
    assert small.shape == (3, min(shape[1:]), shape[2])
    torch.testing.assert_close((small @ x).norm(dim=1), (m @ x).norm(dim=1))
