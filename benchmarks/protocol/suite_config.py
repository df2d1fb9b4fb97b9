"""What a suite is: its file in ``configs/suite``, checked before the first run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from benchmarks.config import CONFIGS, ConfigError, _check_choice, _nearest, compose_run
from benchmarks.protocol.search import as_overrides, space_of
from benchmarks.protocol.statistics import METRICS

TUNING_SEED = 1000  # of the first tuning run; seeds 0, 1, 2 ... are for the results


@dataclass
class SuiteConfig:
    """A file in ``configs/suite``.

    Attributes:
        title: of the report.
        tasks, optimizers: files in ``configs/task`` and ``configs/optimizer``.
        baselines: of the optimizers, those that a claim is made against.
        trials: of each optimizer's search, the same number for all.
        tuning_seeds: runs a trial; their seeds are never those of the results.
        seeds: runs of the best setting, at least 6 for a test that can reach .05.
        retime: of those runs, as many seeds are done once more with nothing of the suite beside them, for their seconds;
            0 for none.
        metric: what the tables of the tasks are ordered by, a name of ``statistics.METRICS``; the final train loss stands
            in where a task has no target.
        scaled: optimizer -> factors: controls that take its tuned setting with the learning rate simply scaled.
        grid: optimizer -> settings to try in the place of a search, ``trials`` of them, all with the same keys.
        targets: column of the evaluation -> values that a run is to come down to, ``train_loss`` among the columns; it ends
            once all are reached, a tuning run at the lowest train loss. The report is then about the seconds to each.
        targets_by_task: task -> the same, in their place.
        ours: of the optimizers, those that this report sets against the best of the others.
        ablate: optimizer -> key -> values: its tuned setting with this one thing changed, an argument of the optimizer, or
            of the task (``task.curvature_examples``).
        overrides: ``key=value`` for every run; by_task: task -> ``key=value`` for its runs.
        final_overrides: ``key=value`` for the runs of the best setting alone, more seconds than a trial had for one.
    """

    title: str = "comparison"
    tasks: list[str] = field(default_factory=list)
    optimizers: list[str] = field(default_factory=list)
    baselines: list[str] = field(default_factory=lambda: ["sgd_momentum", "adamw"])
    trials: int = 12
    tuning_seeds: int = 1
    seeds: int = 6
    retime: int = 1
    metric: str = "step"
    scaled: dict[str, list[float]] = field(default_factory=dict)
    grid: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    targets: dict[str, list[float]] = field(default_factory=dict)
    targets_by_task: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    ours: list[str] = field(default_factory=list)
    ablate: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    by_task: dict[str, list[str]] = field(default_factory=dict)
    final_overrides: list[str] = field(default_factory=list)


def load_comparison(name: str, overrides: Sequence[str] = ()) -> SuiteConfig:
    """Read ``configs/suite/NAME.yaml``; ``overrides``: ``trials=4``, ``tasks=[digits_mlp]``.

    Raises:
        ConfigError: an unknown suite, key, task or optimizer (the nearest one is named), or an impossible budget.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _check_choice("suite", name)
    known = [f.name for f in fields(SuiteConfig)]
    given = OmegaConf.load(CONFIGS / "suite" / f"{name}.yaml")
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals:
            raise ConfigError(f"expected KEY=VALUE, got {text!r} (for one: trials=6)")
        if key not in known:
            raise ConfigError(f"unknown key {key!r} of a suite: {_nearest(key, known)}")
    for key in given:
        if key not in known:
            raise ConfigError(f"configs/suite/{name}.yaml: unknown key {key!r}: {_nearest(str(key), known)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(SuiteConfig), given, OmegaConf.from_dotlist(list(overrides)))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"suite {name}: {error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, SuiteConfig)
    _check(config, name)
    return config


def _check(config: SuiteConfig, name: str) -> None:
    if not config.tasks or not config.optimizers:
        raise ConfigError(f"suite {name}: tasks and optimizers must not be empty")
    for task in (*config.tasks, *config.by_task):
        _check_choice("task", task)
    for optimizer in (*config.optimizers, *config.scaled, *config.grid, *config.ours):
        _check_choice("optimizer", optimizer)
    for key, least in (("trials", 3), ("tuning_seeds", 1), ("seeds", 1), ("retime", 0)):
        if getattr(config, key) < least:
            raise ConfigError(f"suite {name}: {key} must be at least {least}, got {getattr(config, key)}")
    if config.seeds > TUNING_SEED:
        raise ConfigError(f"suite {name}: seeds must be at most {TUNING_SEED}, where those of the tuning begin")
    if config.metric not in METRICS:
        raise ConfigError(f"suite {name}: unknown metric {config.metric!r}: {_nearest(config.metric, METRICS)}")
    if config.retime > config.seeds:
        raise ConfigError(f"suite {name}: retime must be at most seeds, {config.seeds}, got {config.retime}")
    for optimizer in (*config.scaled, *config.baselines, *config.ablate):
        if optimizer not in config.optimizers:
            raise ConfigError(
                f"suite {name}: {optimizer} is a baseline, scaled or ablated, but not among its optimizers"
            )
    # Every mistake in a key comes before the first run; keys of tasks and of optimizers don't depend on each other.
    for task in config.tasks:
        given = [*config.overrides, *config.by_task.get(task, []), *config.final_overrides]
        compose_run(task, config.optimizers[0], given)
    for optimizer in config.optimizers:
        if optimizer not in config.grid:
            space_of(config.tasks[0], optimizer, config.overrides)
            continue
        _check_grid(config, optimizer, name)
    for targets in (config.targets, *config.targets_by_task.values()):
        if targets and not targets.get("train_loss"):
            raise ConfigError(f"suite {name}: targets must hold values of train_loss, got {targets}")
    for optimizer, changes in config.ablate.items():
        for change in changes_of(changes):
            compose_run(config.tasks[0], optimizer, [*config.overrides, change])


def _check_grid(config: SuiteConfig, optimizer: str, name: str) -> None:
    grid = config.grid[optimizer]
    if len(grid) != config.trials:
        raise ConfigError(
            f"suite {name}: trials={config.trials}, but the grid of {optimizer} has {len(grid)} settings: the number "
            "must be the same for all"
        )
    if not grid[0] or any(set(settings) != set(grid[0]) for settings in grid):
        raise ConfigError(f"suite {name}: all settings in the grid of {optimizer} must have the same keys, got {grid}")
    compose_run(config.tasks[0], optimizer, [*config.overrides, *as_overrides(grid[0])])


def changes_of(values: Mapping[str, Sequence[Any]]) -> list[str]:
    """``optimizer.rank=3``, ``task.curvature_examples=100``: overrides that each change one thing."""
    return [
        f"{key if key.startswith('task.') else f'optimizer.{key}'}={json.dumps(value)}"
        for key, listed in values.items()
        for value in listed
    ]
