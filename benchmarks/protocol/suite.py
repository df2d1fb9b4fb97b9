"""Several runs in a row: optimizers times seeds on one task; a run that fails is a row, not the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.config import CONFIGS, ConfigError, RunConfig, compose_run, run_directory
from benchmarks.files import atomic_write_json
from benchmarks.progress import RunProgress
from benchmarks.protocol.checkpoint import RunFolder
from benchmarks.protocol.train import execute


@dataclass(frozen=True)
class Suite:
    """``tasks`` in order of preference, ``optimizers`` and common ``overrides``: files and key=value."""

    tasks: list[str]
    optimizers: list[str]
    overrides: list[str]


def load_suite(name: str) -> Suite:
    """Read ``configs/NAME.yaml``.

    Raises:
        ConfigError: no such file, or an unknown or missing key in it.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = CONFIGS / f"{name}.yaml"
    if not path.exists():
        raise ConfigError(f"no suite {name!r}: {path} does not exist")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Suite), OmegaConf.load(path))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error


def fresh(config: RunConfig) -> None:
    """Delete what earlier calls left in this run's folder; a folder that is no run's is left alone."""
    folder = run_directory(config)
    if folder.exists():
        if not (folder / "config.yaml").exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} holds files but no run: it is left alone")
        shutil.rmtree(folder)


def plan(task: str, optimizers: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]) -> list[RunConfig]:
    """The configurations of a comparison: every optimizer with every seed, seeds outermost."""
    return [compose_run(task, name, [*overrides, f"seed={seed}"]) for seed in seeds for name in optimizers]


def perform(
    configs: Sequence[RunConfig], progress: RunProgress, say: Callable[[str], None] = lambda text: None
) -> list[Path]:
    """Do all runs; what is finished is taken as it is, what was interrupted goes on.

    The cost of a product is measured by the first run and then used for all of them: one number a comparison.

    Returns:
        their folders.
    """
    folders = []
    cost: float | None = None
    route: str | None = None
    progress.overall(len(configs))
    for config in configs:
        folder = RunFolder(run_directory(config))
        folders.append(folder.path)
        there = folder.done.exists()
        try:
            outcome = execute(
                replace(config, product_cost=config.product_cost or cost, route=config.route or route), progress
            )
            found = outcome.record.get("product_cost")
            if cost is None and isinstance(found, float) and found == found:
                cost, route = found, outcome.record.get("route")
            words = f"{outcome.status}{' (' + outcome.reason + ')' if outcome.reason else ''}"
            words += ", by an earlier call" if there else ""
        except (ConfigError, OSError, MemoryError):
            raise
        except Exception as error:  # any optimizer may raise anything: the others still run
            words = f"failed ({type(error).__name__}: {error})"
            atomic_write_json(folder.result, {"status": "failed", "reason": f"{type(error).__name__}: {error}"})
        progress.finish_run()
        say(f"{config.optimizer['label']}, seed {config.seed}: {words}")
    return folders
