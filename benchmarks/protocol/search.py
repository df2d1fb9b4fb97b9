"""Tuning by a search library, with the same number of trials for every optimizer, repeatable and safe against kills.

The search library (optuna's TPE, seeded) only proposes points, in memory. What a trial came to is read from its run's
folder: a search that was killed proposes the same points again, finds the finished trials done, and goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.config import ConfigError, RunConfig, compose_run
from benchmarks.protocol.statistics import median, sensitivity
from curvopt import zoo
from curvopt.zoo import Choice, Range

_FAILED = 1e30  # what the search library is told of a trial that diverged: it has no use for infinity
_EDGE = 0.1  # of the range: a best value this close to an end is taken as lying at it
_BRACKETS = 2  # of the trials, at the end: kept for values beyond the best one, where one side has none


@dataclass(frozen=True)
class Trial:
    """One setting: the arguments, the median over tuning seeds of the final train loss (infinite: failed), and its cost.

    Attributes:
        stage: ``"search"``, or ``"bracket"`` for one beyond the end of what was tried.
        gradients: gradient-equivalents spent on it.
        seconds: of training spent on it.
    """

    settings: Mapping[str, Any]
    score: float
    stage: str
    gradients: float
    seconds: float


@dataclass
class Tuned:
    """A finished search.

    Attributes:
        trials: in the order they were made; the same number for every optimizer.
        key: the argument that is bracketed, the first of the search space.
    """

    key: str
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial:
        """The trial with the lowest score; the first of several."""
        return min(self.trials, key=lambda t: t.score)

    @property
    def bracketed(self) -> bool:
        """Whether worse values of ``key`` were tried on both sides of the best one (always, where it is no number)."""
        best = self.best
        value = best.settings[self.key]
        if isinstance(value, str | bool) or math.isinf(best.score):
            return not math.isinf(best.score)
        others = [t for t in self.trials if t.score > best.score]
        below = any(t.settings[self.key] < value for t in others)
        return below and any(t.settings[self.key] > value for t in others)

    @property
    def sensitivity(self) -> float:
        """Decades of ``key`` around the best over which the train loss stays within twice the best, as far as was tried."""
        scores: dict[float, float] = {}
        for t in self.trials:
            value = t.settings[self.key]
            if not isinstance(value, str | bool):
                scores[float(value)] = min(t.score, scores.get(float(value), math.inf))
        return sensitivity(scores)


def space_of(task: str, optimizer: str, overrides: Sequence[str] = ()) -> dict[str, Range | Choice]:
    """What is tuned: the zoo's search space, less the arguments that the optimizer's file sets to a rule's name.

    Raises:
        ConfigError: unknown names, or an entry with nothing to tune.
    """
    given = compose_run(task, optimizer, overrides).optimizer
    space = {k: v for k, v in zoo.search_space(given["zoo"]).items() if not isinstance(given.get(k), str)}
    if not space:
        raise ConfigError(f"{optimizer}: {given['zoo']} has no search space")
    return space


def search(
    space: Mapping[str, Range | Choice],
    score: Callable[[dict[str, Any]], tuple[float, float, float]],
    trials: int,
    seed: int = 0,
) -> Tuned:
    """Spend exactly ``trials`` trials on a search space.

    The last two are for the bracketing rule: as long as the best value of the first argument has nothing worse on one
    side, the next trial goes there, a factor of 10^(1/2) beyond; what the rule does not need, the search gets.

    Args:
        space: argument -> range.
        score: of settings; returns score (smaller is better, infinite for a failure), gradient-equivalents and seconds.
        trials: at least 3.
        seed: of the proposals.

    Raises:
        ConfigError: too few trials, or an empty space.
        MissingExtraError: optuna is not installed.
    """
    if trials < 3:
        raise ConfigError(f"trials must be at least 3, got {trials}: fewer cannot bracket a best value")
    if not space:
        raise ConfigError("the search space is empty")
    optuna = _optuna()
    found = Tuned(next(iter(space)))
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(3, trials // 2), multivariate=False)
    study = optuna.create_study(direction="minimize", sampler=sampler)

    def run(settings: dict[str, Any], stage: str) -> float:
        value, gradients, seconds = score(settings)
        found.trials.append(Trial(settings, value, stage, gradients, seconds))
        return value

    while len(found.trials) < trials:
        left = trials - len(found.trials)
        beyond = _beyond(found, space) if left <= _BRACKETS and found.trials else None
        if beyond is not None:
            run(beyond, "bracket")
            continue
        trial = study.ask()
        value = run({key: _suggest(trial, key, how) for key, how in space.items()}, "search")
        study.tell(trial, value if math.isfinite(value) else _FAILED)
    return found


def along(grid: Sequence[Mapping[str, Any]], score: Callable[[dict[str, Any]], tuple[float, float, float]]) -> Tuned:
    """Try the settings of a grid, all with the same keys, in their order.

    Args:
        grid: at least one setting; its first key is the one that the bracketing is told of.
        score: see ``search``.
    """
    found = Tuned(next(iter(grid[0])))
    for settings in grid:
        value, gradients, seconds = score(dict(settings))
        found.trials.append(Trial(dict(settings), value, "grid", gradients, seconds))
    return found


def _suggest(trial: Any, key: str, how: Range | Choice) -> Any:
    if isinstance(how, Choice):
        return trial.suggest_categorical(key, how.values)
    # Three figures: what a configuration shows, a run's folder is named after, and a reader can type.
    return float(f"{trial.suggest_float(key, how.low, how.high, log=how.log):.3g}")


def _beyond(found: Tuned, space: Mapping[str, Range | Choice]) -> dict[str, Any] | None:
    """Settings on the side of the best value where nothing worse was tried; None where there is such on both."""
    how, best = space[found.key], found.best
    if isinstance(how, Choice) or found.bracketed:
        return None
    value = float(best.settings[found.key])
    tried = [float(t.settings[found.key]) for t in found.trials if t.score > best.score]
    up = not any(v > value for v in tried)
    if math.isinf(best.score):  # everything failed: the smallest steps have the best chance
        value, up = min(float(t.settings[found.key]) for t in found.trials), False
    step = 10**0.5 if how.log else (how.high - how.low) * _EDGE
    new = value * step if up and how.log else value / step if how.log else value + step if up else value - step
    return {**best.settings, found.key: float(f"{new:.3g}")}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        from curvopt._errors import MissingExtraError

        raise MissingExtraError('tuning needs optuna: pip install "curvopt-torch[bench]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """``optimizer.KEY=VALUE`` for the command line, quoted as YAML wants it."""
    return [f"optimizer.{key}={json.dumps(value)}" for key, value in settings.items()]


def tuning_runs(
    task: str, optimizer: str, settings: Mapping[str, Any], overrides: Sequence[str], seeds: Sequence[int]
) -> list[RunConfig]:
    """The runs of one trial: nothing of them is measured but the train loss, and nobody looks at the test set."""
    quiet = ["measure_every=0", "energy_every=0", "eval_every=0", "wandb.mode=disabled", "stop_hopeless=true"]
    first = compose_run(task, optimizer, [*quiet, *overrides, *as_overrides(settings)])
    return [replace(first, seed=seed) for seed in seeds]


def judge(records: Sequence[Mapping[str, Any]], goal: float | None = None) -> tuple[float, float, float]:
    """Score, gradient-equivalents and seconds of a trial, from the results of its runs.

    Args:
        records: results.
        goal: train loss at which a run ends; those that reached it score below it, by their seconds t: goal t / (1 + t).
    """
    losses = []
    for record in records:
        loss = float(record.get("train_loss", math.inf))
        if goal is not None and record.get("ended") == "stop_at":
            seconds = float(record["seconds"])
            loss = goal * seconds / (1.0 + seconds)
        losses.append(loss if record["status"] == "done" and math.isfinite(loss) else math.inf)
    cost = sum(float(r.get("gradient_equivalents", 0.0)) for r in records)
    return median(losses), cost, sum(float(r.get("seconds", 0.0)) for r in records)
