"""A suite's report on disk: Markdown, the HTML page made from it, figures, and a line a run as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.files import atomic_write_text
from benchmarks.protocol.clock import CLOCKS
from benchmarks.protocol.comparison import SuiteConfig
from benchmarks.protocol.statistics import LEAST_PAIRS
from benchmarks.report.html import write_html
from benchmarks.report.leaderboard import markdown, profile_table, repetition, seconds_table, task_table, tuning_table
from benchmarks.report.records import AXES
from benchmarks.report.standings import Standing, standings
from benchmarks.report.suite_plots import profile_figure, task_figures
from benchmarks.report.verdicts import in_short

_IN_SHORT = (
    "Settings beside the best tuned baseline of each task, baselines left out: better or worse by the exact paired test over "
    "seeds, open where it shows neither. The tables below have the intervals."
)
_PROFILES = (
    "The score is the area under the performance profile, 1 for the fastest on every task. The ratios are to the fastest on "
    "each task, in ascending order."
)


def write_leaderboard(config: SuiteConfig, out: Path, command: str) -> Path:
    """Write ``report.md``, ``report.html``, ``leaderboard.csv`` and the figures with their data to the suite's folder.

    Raises:
        ConfigError: the suite is not finished.
    """
    found = standings(config, out)
    places = {label: i for i, label in enumerate(dict.fromkeys(r.label for r in found))}
    parts = [f"# {config.title}", _facts(config, out, found)]
    short = in_short(found, config)
    if short.body:
        said = ["\n".join(f"- {line}" for line in short.sentences)] if short.sentences else []
        parts.append("\n\n".join(["## In short", _IN_SHORT, *said, markdown(short.header, short.body)]))
    header, body = profile_table(found, AXES)
    if header:
        parts += ["## Over all tasks, to target", _PROFILES, markdown(header, body)]
    profiles = profile_figure(found, out)
    parts += [] if profiles is None else [profiles.markdown(command)]
    rows_by_task = {task: [r for r in found if r.task == task] for task in config.tasks}
    for task, rows in rows_by_task.items():
        target = rows[0].records[0].config.task["target"]
        words = "no target is set, so the final train loss decides" if target is None else f"target {target:g}"
        parts.append(f"## {task}: {words}\n\n" + markdown(*task_table(rows, config)))
        parts.append(f"Tuning on {task}:\n\n" + markdown(*tuning_table(rows)))
        parts.append(f"Seconds of a run on {task}, medians:\n\n" + markdown(*seconds_table(rows)))
        if target is not None and all(math.isinf(step) for r in rows for step in r.to_target["step"]):
            parts.append("No run reached this target: it is a miss for all of them, and the task is in no profile.")
        lost = [f"- {r.label}: {reason}" for r in rows for reason in r.reasons]
        parts += ["Runs that did not end well:\n\n" + "\n".join(lost)] if lost else []
        parts += [figure.markdown(command) for figure in task_figures(rows, places, target, out)]
    parts.append(f"Made by `{command}`.")
    atomic_write_text(out / "leaderboard.csv", _csv(found))
    path = atomic_write_text(out / "report.md", "\n\n".join(parts) + "\n")
    write_html(path)
    return path


def _facts(config: SuiteConfig, out: Path, found: Sequence[Standing]) -> str:
    metas = [json.loads(p.read_text()) for p in sorted((out / "runs").rglob("meta.json"))]
    places = sorted({(m.get("processor", "?"), m.get("torch", "?"), m.get("commit", "?")) for m in metas})
    dates = sorted(str(m.get("date", "?"))[:10] for m in metas)
    names = ", ".join(config.baselines)
    return "\n\n".join(
        [
            f"Each optimizer was tuned with {config.trials} trials of {config.tuning_seeds} run(s) by the final train loss, "
            f"never looking at the test set, then run with {config.seeds} seeds that the tuning had not seen. Medians over "
            "seeds with 95 % bootstrap intervals; a miss counts as infinite. Claims are against the better of "
            f"{names}, by an exact paired signed-rank test over seeds; they are not corrected for their number.",
            _clock_facts(config, found) + " Mean log10 loss is the area under the curve of the train loss.",
            repetition(found),
            *(f"Measured on {cpu}, torch {version}, commit {commit}." for cpu, version, commit in places),
            f"Dates: {dates[0]} to {dates[-1]}." if dates else "",
        ]
    ).strip()


def _clock_facts(config: SuiteConfig, found: Sequence[Standing]) -> str:
    clocks = " or ".join(CLOCKS.get(c, c) for c in sorted({r.clock for r in found if r.clock})) or "of training"
    if not config.retime:
        return f"Seconds ({clocks}) are of runs with others at work beside them, the wall clock is given with them."
    seeds = "the first seed" if config.retime == 1 else f"the first {config.retime} seeds"
    return (
        f"Seconds ({clocks}) are of each setting's runs of {seeds}, done once more after all others with nothing of the "
        "suite beside them: to the target, what the seed's re-timed run (the median of all, where it has none) had spent at "
        f"the step at which its first run reached it. A claim about seconds needs {LEAST_PAIRS} re-timed seeds."
    )


def _csv(found: Sequence[Standing]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    head = ["task", "optimizer", "seed", *AXES, "train_loss", "test_accuracy", "mean_log10_loss"]
    table.writerow([*head, "run_seconds", "run_wall_seconds", "settings"])
    for r in found:
        for i, loss in enumerate(r.train_loss):
            axes = [r.to_target[a][i] if r.to_target else "" for a in AXES]
            table.writerow(
                [r.task, r.label, i, *axes, loss, r.accuracy[i], r.area[i], r.seconds[i], r.wall_seconds[i], r.settings]
            )
    return text.getvalue()
