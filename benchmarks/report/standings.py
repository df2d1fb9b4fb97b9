"""What a suite's run folders say of each optimizer on each task: a seed's numbers each, before any table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.config import ConfigError, RunConfig, run_directory
from benchmarks.progress import RunProgress
from benchmarks.protocol.comparison import Comparison, SuiteConfig, Unit, units
from benchmarks.protocol.search import Tuned
from benchmarks.protocol.statistics import area_under_curve, median
from benchmarks.report.records import AXES, RunRecord, load_record


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
            target are what the seed's one (else their median) had spent at the step at which the first run reached it.
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
    tuned = suite.tune(unit, RunProgress(enabled=False), reading=True)
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
        steps = zip(records, reached["step"], strict=True)
        reached["seconds"] = [_alone(step, r.config.seed, retimed) for r, step in steps]
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


def _alone(step: float, seed: int, retimed: Sequence[RunRecord]) -> float:
    """Seconds that the seed's re-timed run had spent at a step, else the median of all; infinite for a miss."""
    if math.isinf(step):
        return math.inf
    own = [r for r in retimed if r.config.seed == seed and len(r.column("seconds"))]
    spent = [r.spent(step, "seconds") for r in own or retimed]
    return median([s for s in spent if not math.isnan(s)])
