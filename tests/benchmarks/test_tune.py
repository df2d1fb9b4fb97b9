"""The tuner: a grid that brackets its best value on both sides."""

import math

import pytest

from benchmarks.config import ConfigError
from benchmarks.progress import RunProgress
from benchmarks.protocol.tune import bracket, tune


@pytest.mark.parametrize("best", [0.013, 0.1, 0.9])
def test_best_value_ends_inside_the_grid(best):
    found = bracket(lambda v: abs(math.log(v / best)), start=0.1, factor=2.0, limit=12)
    assert found.bracketed
    assert abs(math.log(found.best / best)) <= math.log(2.0) / 2 + 1e-2  # the nearest point of a grid of factor 2
    assert len(found.scores) <= 8


def test_divergence_sends_it_down():
    found = bracket(lambda v: math.inf if v > 0.01 else abs(math.log(v / 0.004)), start=1.0, factor=2.0, limit=12)
    assert found.best == pytest.approx(0.00391, rel=1e-2) and found.bracketed


def test_a_grid_that_ran_out_says_so():
    found = bracket(lambda v: -v, start=1.0, factor=2.0, limit=4)
    assert found.best == 4.0 and not found.bracketed and len(found.scores) == 4


def test_bad_arguments():
    with pytest.raises(ConfigError, match="must be above 0 for a geometric grid, got 0"):
        bracket(lambda v: v, start=0.0, factor=2.0, limit=5)
    with pytest.raises(ConfigError, match="factor must be above 1 and the budget at least 3 values, got 1.0 and 5"):
        bracket(lambda v: v, start=1.0, factor=1.0, limit=5)
    with pytest.raises(ConfigError, match="optimizer.dampening has no number to start from: give one"):
        tune("digits_mlp", "sgd", [], [0], RunProgress(enabled=False), key="dampening")


def test_tunes_a_real_task(tmp_path):
    said = []
    found = tune(
        "digits_mlp",
        "sgd",
        ["steps=15", "task.hidden=[8]", f"out={tmp_path}", "optimizer.lr=0.5"],
        [7],
        RunProgress(enabled=False),
        factor=8.0,
        limit=5,
        say=said.append,
    )
    assert (
        found.best in found.scores and len(said) == len(found.scores) and said[0].startswith("lr=0.5: final train loss")
    )
    assert found.scores[found.best] == min(found.scores.values()) < 2.3
