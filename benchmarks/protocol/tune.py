"""A small tuner: a geometric grid of one number, widened until the best value has a worse one on either side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.config import ConfigError, compose_run
from benchmarks.progress import RunProgress
from benchmarks.protocol.train import execute


@dataclass
class Search:
    """A finished search.

    Attributes:
        scores: value -> median over seeds of the final train loss; infinite where a run diverged.
        best: the value with the lowest score.
        bracketed: worse values were tried on both sides of it.
    """

    key: str
    scores: dict[float, float] = field(default_factory=dict)

    @property
    def best(self) -> float:
        """The value with the lowest score."""
        return min(self.scores, key=lambda v: self.scores[v])

    @property
    def bracketed(self) -> bool:
        """Whether the best value is not at the edge of the grid."""
        return min(self.scores) < self.best < max(self.scores)


def bracket(score: Callable[[float], float], start: float, factor: float, limit: int, key: str = "value") -> Search:
    """Walk a geometric grid from ``start`` until its best value is inside it, or ``limit`` values were tried.

    Args:
        score: the smaller the better; infinite for a failure.
        start: first value, above 0.
        factor: ratio of neighbours, above 1.
        limit: number of values at most, at least 3.

    Raises:
        ConfigError: an argument is out of range.
    """
    if not start > 0:
        raise ConfigError(f"the first value of {key} must be above 0 for a geometric grid, got {start}")
    if not factor > 1 or limit < 3:
        raise ConfigError(f"factor must be above 1 and the budget at least 3 values, got {factor} and {limit}")
    found = Search(key)
    place = {0: start}

    def value(i: int) -> float:
        return place.setdefault(i, float(f"{start * factor**i:.3g}"))

    tried: dict[int, float] = {}

    def visit(i: int) -> None:
        tried[i] = found.scores[value(i)] = score(value(i))

    for i in (0, 1, -1):
        visit(i)
    while len(tried) < limit:
        best = min(tried, key=lambda i: tried[i])
        if math.isinf(tried[best]):  # everything diverged so far: go down
            visit(min(tried) - 1)
        elif best == max(tried):
            visit(best + 1)
        elif best == min(tried):
            visit(best - 1)
        else:
            break
    return found


def tune(
    task: str,
    optimizer: str,
    overrides: Sequence[str],
    seeds: Sequence[int],
    progress: RunProgress,
    key: str = "lr",
    factor: float = 2.0,
    limit: int = 12,
    say: Callable[[str], None] = lambda text: None,
) -> Search:
    """Tune one argument of an optimizer on a task, by the median of the final train loss over ``seeds``.

    The seeds should be others than those that results are reported for.
    """
    quiet = ["measure_every=0", "energy_every=0", "eval_every=0", "wandb.mode=disabled", *overrides]
    given = compose_run(task, optimizer, quiet).optimizer
    if not isinstance(given.get(key), (int, float)):
        raise ConfigError(f"optimizer.{key} has no number to start from: give one, as optimizer.{key}=0.1")

    def score(value: float) -> float:
        losses = []
        for seed in seeds:
            outcome = execute(
                compose_run(task, optimizer, [*quiet, f"optimizer.{key}={value!r}", f"seed={seed}"]), progress
            )
            loss = outcome.record.get("train_loss", math.inf)
            losses.append(float(loss) if outcome.status == "done" else math.inf)
            progress.finish_run()
        middle = statistics.median(losses)
        say(f"{key}={value:g}: final train loss {middle:.4g}")
        return middle

    return bracket(score, float(given[key]), factor, limit, key)
