"""Targets: what the tuned baselines reach, set before anything else is compared (as AlgoPerf does)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.config import CONFIGS, ConfigError, _check_choice
from benchmarks.files import atomic_write_text
from benchmarks.progress import RunProgress
from benchmarks.protocol.comparison import Comparison, load_comparison, units
from benchmarks.protocol.statistics import median


def find_target(
    task: str,
    overrides: Sequence[str],
    out: Path,
    progress: RunProgress,
    jobs: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> float:
    """The median over the baselines of the median over seeds of the final train loss, rounded up to two figures.

    Half of the tuned baselines reach it, each with half of its seeds: neither out of reach nor reached by everything.

    Args:
        task: a file in ``configs/task``.
        overrides: of ``configs/suite/target.yaml``.
        out: parent of the folder of the runs.
        progress, jobs, say: see ``Comparison``.

    Raises:
        ConfigError: unknown names, or half of the baselines diverged.
    """
    _check_choice("task", task)
    config = load_comparison("target", [f"tasks=[{task}]", "baselines=[]", *overrides])
    suite = Comparison(config, out / f"target-{task}", say)
    suite.perform(progress, jobs)
    quiet = RunProgress(enabled=False)
    reached = []
    for unit in units(config):
        results = [suite.run(run, quiet) for run in suite.finals(unit, suite.tune(unit, quiet))]
        reached.append(median([float(r["train_loss"]) if r["status"] == "done" else math.inf for r in results]))
    value = median(reached)
    if not math.isfinite(value):
        raise ConfigError(f"{task}: half of the tuned baselines did not end well, so that there is no target")
    return round_up(value)


def round_up(value: float, figures: int = 2) -> float:
    """The next number of two figures at or above a positive one; 0 stays 0."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - figures + 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.{figures}g}")


def write_target(task: str, value: float, command: str) -> Path:
    """Put the target into the task's file, with the command that found it; other lines stay as they are."""
    path = CONFIGS / "task" / f"{task}.yaml"
    text = re.sub(
        r"(?m)^(# Set by `python -m benchmarks target .*`\.\n)?target:.*\n", "", path.read_text(encoding="utf-8")
    )
    lines = f"# Set by `{command}`.\ntarget: {value:g}\n"
    before, tuned, after = text.partition("# Learning rates:")
    return atomic_write_text(path, before + lines + tuned + after)
