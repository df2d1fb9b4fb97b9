"""A suite's report: where each optimizer wins and loses against the tuned baselines, with intervals and tests."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.config import ConfigError, RunConfig, run_directory
from benchmarks.files import atomic_write_text
from benchmarks.progress import RunProgress
from benchmarks.protocol.clock import CLOCKS
from benchmarks.protocol.comparison import Comparison, SuiteConfig, Unit, units
from benchmarks.protocol.repeat import in_words
from benchmarks.protocol.search import Tuned
from benchmarks.protocol.statistics import (
    LEAST_PAIRS,
    area_under_curve,
    median,
    paired_test,
    profile,
    profile_score,
    summary,
)
from benchmarks.report.records import AXES, RunRecord, load_record

_NUMBER = re.compile(r"[-+]?[0-9.]|missed|-$")
_FORMS = {"step": ".0f", "gradient_equivalents": ".0f", "seconds": ".2f"}


@dataclass(frozen=True)
class Standing:
    """One optimizer on one task; values are a seed each, in the order of the seeds.

    Attributes:
        label, optimizer: name in tables, and its file.
        to_target: axis -> where it stood at the target; infinite for a miss.
        train_loss: at the end; infinite for a run that did not end well. accuracy: NaN where there is none.
        area: mean log10 of the train loss over the run.
        lost: share of runs that diverged or failed.
        reasons: of those.
        tuned: its search; None for a control that took another's setting.
        records: the runs, a seed each.
        seconds, wall_seconds: of each whole run, on its clock and by the wall clock; NaN for a run that left no record.
        clock: see ``benchmarks.protocol.clock.CLOCKS``; empty where no run says.
        retimed: runs of the first seeds done once more with nothing beside them; where there are any, seconds to the
            target are what these had spent at the step at which the seed's own run reached it, their median.
        repeats: of those, whether the numbers were the same bit for bit, see ``benchmarks.protocol.repeat.verdict``.
    """

    task: str
    label: str
    optimizer: str
    to_target: dict[str, list[float]]
    train_loss: list[float]
    accuracy: list[float]
    area: list[float]
    lost: float
    reasons: list[str]
    settings: str
    tuned: Tuned | None = field(compare=False)
    records: list[RunRecord] = field(default_factory=list, compare=False, repr=False)
    seconds: list[float] = field(default_factory=list, compare=False)
    wall_seconds: list[float] = field(default_factory=list, compare=False)
    clock: str = ""
    retimed: list[RunRecord] = field(default_factory=list, compare=False)
    repeats: list[Mapping[str, Any]] = field(default_factory=list, compare=False)


def standings(config: SuiteConfig, out: Path) -> list[Standing]:
    """Every optimizer on every task, from the run folders.

    Raises:
        ConfigError: a run is missing; the suite is not finished.
    """
    suite, found = Comparison(config, out), []
    for unit in units(config):
        found += _unit(suite, unit)
    return found


def _unit(suite: Comparison, unit: Unit) -> list[Standing]:
    path = suite.out / "tuning" / unit.task / f"{unit.optimizer}.json"
    if not path.exists():
        raise ConfigError(f"{suite.out}: {unit.optimizer} is not tuned on {unit.task} yet: run the suite to its end")
    tuned = suite.tune(unit, RunProgress(enabled=False))  # reads the file
    runs = suite.finals(unit, tuned)
    first = _by_label(suite, runs, "result.json")
    again = _by_label(suite, suite.retimed(runs), "repeat.json")
    target = runs[0].task["target"]
    found = []
    for i, (label, folders) in enumerate(first.items()):
        alone = again.get(label, [])
        notes = [json.loads((folder / "repeat.json").read_text()) for folder in alone]
        records = [load_record(folder) for folder in folders]
        twice = [load_record(folder) for folder in alone]
        found.append(_standing(unit, label, records, target, tuned if i == 0 else None, twice, notes))
    return found


def _by_label(suite: Comparison, runs: Sequence[RunConfig], last: str) -> dict[str, list[Path]]:
    """Folders of runs by their label; ``last``: the file whose presence tells that a run is finished."""
    groups: dict[str, list[Path]] = {}
    for run in runs:
        folder = run_directory(run)
        if not (folder / last).exists():
            raise ConfigError(f"{suite.out}: {folder.relative_to(suite.out)} is missing: run the suite to its end")
        groups.setdefault(str(run.optimizer["label"]), []).append(folder)
    return groups


def _standing(
    unit: Unit,
    label: str,
    records: Sequence[RunRecord],
    target: float | None,
    tuned: Tuned | None,
    retimed: Sequence[RunRecord] = (),
    repeats: Sequence[Mapping[str, Any]] = (),
) -> Standing:
    def end(record: RunRecord, name: str, lost: float) -> float:
        return record.last(name) if record.status == "done" else lost

    curves = [r.column("train_loss") for r in records]
    reached = {} if target is None else {a: [r.to_target(target, a) for r in records] for a in AXES}
    if reached and any(len(r.column("seconds")) for r in retimed):
        reached["seconds"] = [_alone(step, retimed) for step in reached["step"]]
    given = {k: v for k, v in records[0].config.optimizer.items() if k not in ("file", "zoo", "label")}
    return Standing(
        task=unit.task,
        label=label,
        optimizer=unit.optimizer,
        to_target=reached,
        train_loss=[end(r, "train_loss", math.inf) for r in records],
        accuracy=[end(r, "test_accuracy", math.nan) for r in records],
        area=[
            area_under_curve([float(i) for i in c.index], [float(v) for v in c]) if r.status == "done" else math.inf
            for r, c in zip(records, curves, strict=True)
        ],
        lost=sum(r.status != "done" for r in records) / len(records),
        reasons=sorted({str(r.result.get("reason", "")) for r in records if r.status != "done"}),
        settings=", ".join(f"{k}={v}" for k, v in given.items()),
        tuned=tuned,
        records=list(records),
        seconds=[r.last("seconds") for r in records],
        wall_seconds=[r.last("wall_seconds") for r in records],
        clock=next((str(r.result["clock"]) for r in (*retimed, *records) if "clock" in r.result), ""),
        retimed=list(retimed),
        repeats=list(repeats),
    )


def _alone(step: float, retimed: Sequence[RunRecord]) -> float:
    """Seconds that the re-timed runs had spent at a step, their median; infinite for a miss."""
    if math.isinf(step):
        return math.inf
    spent = [r.spent(step, "seconds") for r in retimed]
    return median([s for s in spent if not math.isnan(s)])


def criterion(standing: Standing) -> list[float]:
    """What a claim is about: steps to the task's target where it has one, else the final train loss."""
    values = standing.to_target.get("step", standing.train_loss)
    return [max(v, 1e-300) for v in values]


def claim(standing: Standing, baseline: Standing) -> str:
    """``better``, ``worse`` or ``no difference shown``, with the exact p; no word below six seeds."""
    mine, theirs = criterion(standing), criterion(baseline)
    if len(mine) < LEAST_PAIRS:
        return f"too few seeds ({len(mine)})"
    p = paired_test(mine, theirs)
    ratio = median(mine) / median(theirs) if math.isfinite(median(theirs)) else math.nan
    shown = f", x{ratio:.2f}" if math.isfinite(ratio) else ""
    if p < 0.05 and median(mine) != median(theirs):
        return f"{'better' if median(mine) < median(theirs) else 'worse'} (p {p:.3f}{shown})"
    return f"no difference shown (p {p:.2f}{shown})"


def _best_baseline(rows: Sequence[Standing], baselines: Sequence[str]) -> Standing | None:
    plain = [r for r in rows if r.optimizer in baselines and r.tuned is not None]
    return min(plain, key=lambda r: median(criterion(r)), default=None)


def task_table(rows: Sequence[Standing], config: SuiteConfig) -> tuple[list[str], list[list[str]]]:
    """Header and lines of one task's leaderboard, best first."""
    timed = bool(rows[0].to_target)
    scored = any(not math.isnan(v) for r in rows for v in r.accuracy)
    baseline = _best_baseline(rows, config.baselines)
    header = ["optimizer", *(list(AXES.values()) if timed else []), "train loss", *(["accuracy, %"] if scored else [])]
    header += ["mean log10 loss", "lost runs", "against the best baseline"]
    body = []
    for r in sorted(rows, key=lambda r: (median(criterion(r)), median(r.train_loss), r.label)):
        line = [r.label, *(summary(r.to_target[a], _FORMS[a]) for a in AXES if timed), summary(r.train_loss, ".4g")]
        line += [summary([100 * v for v in r.accuracy], ".2f")] if scored else []
        word = "-" if baseline is None else "the baseline" if r is baseline else claim(r, baseline)
        body.append([*line, summary(r.area, ".3f"), f"{100 * r.lost:.0f} %", word])
    return header, body


def tuning_table(rows: Sequence[Standing]) -> tuple[list[str], list[list[str]]]:
    """Settings found, what finding them cost, whether they are bracketed, how wide the good learning rates lie."""
    header = [
        "optimizer",
        "settings",
        "trials",
        "failed",
        "gradient-equivalents",
        "seconds",
        "bracketed",
        "decades within x2",
    ]
    body = []
    for r in rows:
        if r.tuned is not None:
            t = r.tuned.trials
            body.append(
                [
                    r.label,
                    r.settings,
                    str(len(t)),
                    str(sum(math.isinf(x.score) for x in t)),
                    f"{sum(x.gradients for x in t):.0f}",
                    f"{sum(x.seconds for x in t):.1f}",
                    "yes" if r.tuned.bracketed else f"NO: {r.tuned.key} at the edge of what was tried",
                    f"{r.tuned.sensitivity:.1f}",
                ]
            )
    return header, body


def seconds_table(rows: Sequence[Standing]) -> tuple[list[str], list[list[str]]]:
    """What a whole run and a step took: beside the others of the suite, and alone; nothing where no run was timed."""
    header = ["optimizer", "seconds, all runs", "wall clock", "alone: seconds", "wall clock", "ms a step", "repeated"]
    body = []
    for r in rows:
        alone = [(x.last("seconds"), x.last("wall_seconds"), float(x.result.get("step", 0))) for x in r.retimed]
        steps = [1e3 * s / n for s, _, n in alone if n and not math.isnan(s)]
        same = sum(bool(x["same"]) for x in r.repeats)
        line = [r.label, _middle(r.seconds), _middle(r.wall_seconds)]
        line += [_middle([s for s, _, _ in alone]), _middle([w for _, w, _ in alone])]
        body.append([*line, f"{median(steps):.3f}" if steps else "-", f"{same} of {len(r.repeats)}" if alone else "-"])
    return header, body


def _middle(values: Sequence[float]) -> str:
    known = [v for v in values if not math.isnan(v)]
    return f"{median(known):.2f}" if known else "-"


def repetition(found: Sequence[Standing]) -> str:
    """Whether the re-timed runs gave the first runs' losses bit for bit; those that did not, and what stands in the way."""
    runs = [(r, x, v) for r in found for x, v in zip(r.retimed, r.repeats, strict=True)]
    other = [(r, x, v) for r, x, v in runs if not v["same"]]
    if not runs:
        return "No run was done twice, so seconds are of runs beside others, and nothing is said of repetition."
    if not other:
        return f"All {len(runs)} re-timed runs gave the same losses bit for bit."
    lines = [f"- {r.task}, {r.label}, seed {x.config.seed}: {in_words(v)}" for r, x, v in other]
    return f"Of {len(runs)} re-timed runs {len(other)} did not give the same losses bit for bit:\n\n" + "\n".join(lines)


def profile_table(found: Sequence[Standing], axis: str) -> tuple[list[str], list[list[str]]]:
    """Scores of the performance profiles over the tasks that have a target, best first."""
    times: dict[str, dict[str, float]] = {}
    for r in found:
        if r.to_target:
            times.setdefault(r.label, {})[r.task] = median(r.to_target[axis])
    if not times:
        return [], []
    ratios = profile(times)
    if not any(ratios.values()):  # nobody reached any target
        return [], []
    body = [
        [name, f"{profile_score(values):.3f}", *(f"{r:.2f}" if math.isfinite(r) else "missed" for r in values)]
        for name, values in ratios.items()
    ]
    count = max(len(line) for line in body) - 2
    header = ["optimizer", "score", *(f"ratio {i}" for i in range(1, count + 1))]
    return header, sorted(body, key=lambda line: (-float(line[1]), line[0]))


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns of numbers to the right."""
    columns = list(zip(*body, strict=True))[1:]
    sides = ["---", *("---:" if all(_NUMBER.match(cell) for cell in column) else "---" for column in columns)]
    lines = [header, *body]
    rows = ["| " + " | ".join(map(_cell, line)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join(sides) + "|", *rows[1:]])


def _cell(text: str) -> str:
    return re.sub(r"([|<*`\\])", r"\\\1", " ".join(text.split()))


def write_leaderboard(config: SuiteConfig, out: Path, command: str) -> Path:
    """Write ``report.md``, ``report.html``, ``leaderboard.csv`` and the figures with their data to the suite's folder.

    Raises:
        ConfigError: the suite is not finished.
    """
    from benchmarks.report.html import write_html
    from benchmarks.report.suite_plots import profile_figure, task_figures

    found = standings(config, out)
    places = {label: i for i, label in enumerate(dict.fromkeys(r.label for r in found))}
    parts = [f"# {config.title}", _facts(config, out, found)]
    for axis, name in AXES.items():
        header, body = profile_table(found, axis)
        if header:
            parts.append(f"## Over all tasks, {name} to target\n\n" + markdown(header, body))
    profiles = profile_figure(found, out)
    parts += [] if profiles is None else [profiles.markdown(command)]
    rows_by_task = {task: [r for r in found if r.task == task] for task in config.tasks}
    for task, rows in rows_by_task.items():
        target = rows[0].records[0].config.task["target"]
        words = "no target is set, so the final train loss decides" if target is None else f"target {target:g}"
        parts.append(f"## {task}: {words}\n\n" + markdown(*task_table(rows, config)))
        parts.append(f"Tuning on {task}:\n\n" + markdown(*tuning_table(rows)))
        parts.append(f"Seconds of a run on {task}, medians:\n\n" + markdown(*seconds_table(rows)))
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
        "suite beside them: to the target, what these had spent at the step at which the seed's own run reached it."
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
