"""Fixtures of the operator tests: every problem of the registry, and its explicit matrix once."""

import functools

import pytest
import torch

from curvopt.curvature.quiet import mixed_seed
from tests.problems import BY_NAME, CASES, Case
from tests.reference import dense_hessian


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    """One problem of the registry."""
    return request.param


@functools.cache
def explicit(name: str) -> torch.Tensor:
    """Explicit float64 Hessian of a problem, with the masks of seed 0, generation 0, batch 0."""
    model, loss_fn, data, forward = BY_NAME[name].make()
    return dense_hessian(model, loss_fn, data, forward, mask_seed=mixed_seed(0, 0, 0))


@pytest.fixture
def exact(case) -> torch.Tensor:
    """Explicit Hessian of ``case``."""
    return explicit(case.name)
