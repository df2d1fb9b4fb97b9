"""Where warm chains begin."""

import pytest
import torch

from curvopt.linalg.orthogonal import seeded_generator
from curvopt.linalg.warm_start import count_chains, mix_rows

CPU = torch.device("cpu")


def start(rows, seed=0, k=None, cap=100, room=100):
    wanted = len(rows) if k is None else k
    return mix_rows(rows, wanted, wanted, cap, room, seeded_generator(seed, CPU))


def rows_of(count, size=300, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(size, count, generator=torch.Generator().manual_seed(1), dtype=dtype))[0].T


@pytest.mark.parametrize(("wanted", "cap", "expected"), [(1, 9, 1), (4, 20, 2), (5, 20, 3), (11, 26, 4), (11, 12, 11)])
def test_about_a_root_of_the_rows_start_a_chain(wanted, cap, expected):
    assert count_chains(wanted, min(wanted, 10), cap) == expected


def test_every_row_counts_alike_and_the_last_chain_has_a_tenth_of_noise():
    rows = rows_of(9)
    mixed = start(rows)
    assert mixed.shape == (3, 300)
    assert torch.allclose(mixed @ mixed.T, torch.eye(3).double(), atol=1e-12)
    parts = (mixed @ rows.T).abs()
    for i in range(3):
        scale = 1.0 if i < 2 else (1 + 0.1**2) ** -0.5
        assert torch.allclose(parts[i, i::3], torch.full((3,), scale * 3**-0.5).double(), atol=1e-12)
        assert parts[i, [j for j in range(9) if j % 3 != i]].max() < 1e-12
    outside = torch.linalg.vector_norm(mixed - mixed @ rows.T @ rows, dim=1)
    assert torch.allclose(outside, torch.tensor([0.0, 0.0, 0.1 * 1.01**-0.5]).double(), atol=1e-12)


@pytest.mark.parametrize("flipped", [[0], [1, 4], list(range(7))])
def test_an_eigenvector_and_its_negative_start_alike(flipped):
    # Antisymmetric rows too, as two classes have them: no entry of theirs is the largest.
    half = rows_of(7, 150)
    rows = torch.cat([half, -half], 1) / 2**0.5
    other = rows.clone()
    other[flipped] *= -1
    assert torch.allclose(start(rows), start(other), atol=1e-13)
    assert not torch.allclose(start(rows), start(rows, seed=1), atol=0.1)


def test_dependent_rows_and_zeros():
    rows = rows_of(4)
    assert start(torch.cat([rows, rows[:2]])).shape == (2, 300)  # four rows are independent
    assert start(torch.zeros(3, 300)).shape == (0, 300)
    assert start(rows, room=2).shape == (1, 300)
