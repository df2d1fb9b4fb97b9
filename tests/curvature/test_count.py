"""What operators spend in a block: products counted exactly, their seconds inside the block's own."""

import time

import pytest
import torch

from curvopt.curvature.count import ProductCount
from curvopt.curvature.dense import DenseOperator


class Slow(DenseOperator):
    """A product takes 20 ms at least."""

    def _multiply(self, rows):
        time.sleep(0.02)
        return super()._multiply(rows)


def test_products_and_their_seconds_are_those_of_the_block():
    first, second = Slow(torch.eye(3)), Slow(torch.eye(3))
    first @ torch.ones(3)
    began = time.perf_counter()
    with ProductCount([first, second]) as spent:
        first @ torch.ones(3, 2)
        second @ torch.ones(3)
        time.sleep(0.1)
    whole = time.perf_counter() - began
    assert spent.matvecs == 3
    assert 0.04 <= spent.seconds <= whole - 0.1
    first @ torch.ones(3)  # no longer watched
    assert spent.matvecs == 3 and first.count is None


def test_a_product_that_raises_ends_the_count():
    op = Slow(torch.eye(3))
    with pytest.raises(ValueError, match="operand has shape"), ProductCount([op]) as spent:
        op @ torch.ones(3)
        op @ torch.ones(4)
    assert spent.matvecs == 1 and op.count is None
