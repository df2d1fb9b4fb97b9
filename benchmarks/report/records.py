"""Reading runs back: what a report is made from is on disk, nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.config import ConfigError, RunConfig, config_hash, load_run, settings
from benchmarks.protocol.clock import MEASURED
from benchmarks.protocol.log import RECORDS
from benchmarks.sinks import read_jsonl
from benchmarks.sinks.jsonl import decode

__all__ = ["AXES", "MEASURED", "RunRecord", "by_label", "differences", "distinguish", "find_records", "load_record"]
AXES = {"step": "steps", "gradient_equivalents": "gradient-equivalents", "seconds": "seconds"}


@dataclass
class RunRecord:
    """One run on disk.

    Attributes:
        config: as it was resolved.
        frame: a row a record, indexed by ``step``; a column that was not due at a step holds NaN.
        result: status, reason and the last account.
        meta: versions, commit and machine.
        distinction: what tells it from runs of the same optimizer with other settings, see ``distinguish``.
    """

    config: RunConfig
    frame: pd.DataFrame
    result: dict[str, Any]
    meta: dict[str, Any] = field(default_factory=dict)
    distinction: str = ""

    @property
    def label(self) -> str:
        """The optimizer's name for tables."""
        name = str(self.config.optimizer["label"])
        return f"{name} ({self.distinction})" if self.distinction else name

    @property
    def commits(self) -> list[str]:
        """The commits that worked on it: several where an interrupted run went on under another one."""
        places = [self.meta, *self.meta.get("resumed", [])]
        return list(dict.fromkeys(str(place.get("commit", "unknown")) for place in places))

    @property
    def status(self) -> str:
        """``done`` or ``diverged`` or ``failed``."""
        return str(self.result["status"])

    def column(self, name: str) -> pd.Series:
        """A column without the steps at which it was not due; empty where the run never had it."""
        if name not in self.frame:
            return pd.Series(dtype=float)
        return self.frame[name].dropna()

    def last(self, name: str) -> float:
        """The last value of a column; NaN where there is none."""
        column = self.column(name)
        return float(column.iloc[-1]) if len(column) else math.nan

    def to_target(self, target: float, axis: str, column: str = "train_loss") -> float:
        """Where ``axis`` stood at the first evaluation with ``column`` at most ``target``; infinite for a miss."""
        reached = self.frame[self.frame[column] <= target] if column in self.frame else self.frame.iloc[:0]
        if not len(reached):
            return math.inf
        return float(reached.index[0] if axis == "step" else reached[axis].iloc[0])

    def spent(self, step: float, axis: str) -> float:
        """Where ``axis`` stood at a step, in proportion beyond the last record; NaN where the run never had it."""
        column = self.column(axis)
        known = column[column.index <= step]
        if not len(known) or column.index[-1] == 0:
            return math.nan
        last = float(column.index[-1])
        return float(column.iloc[-1]) * step / last if step > last else float(known.iloc[-1])


def load_record(folder: str | Path) -> RunRecord:
    """Read a run's folder; a last line that a kill cut short is left out.

    Raises:
        ConfigError: the folder holds no run.
    """
    path = Path(folder)
    config = load_run(path / "config.yaml")
    log = path / RECORDS
    rows = read_jsonl(log) if log.exists() else []
    frame = pd.DataFrame(rows)
    frame = frame.set_index("step") if len(frame) else pd.DataFrame(index=pd.Index([], name="step"))
    result_file = path / "result.json"
    if result_file.exists():
        result = decode(json.loads(result_file.read_text()))
    else:
        result = {"status": "unfinished", "reason": f"last record at step {frame.index[-1] if len(frame) else 0}"}
    meta_file = path / "meta.json"
    meta = json.loads(meta_file.read_text()) if meta_file.exists() else {}
    return RunRecord(config, frame, result, meta)


def find_records(root: str | Path) -> list[RunRecord]:
    """Every run below a folder, sorted by optimizer and seed.

    Raises:
        ConfigError: there is none.
    """
    files = sorted(Path(root).rglob("config.yaml"))
    if not files:
        raise ConfigError(f"no runs below {root}")
    return [load_record(f.parent) for f in files]


def distinguish(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs of one optimizer with other settings get labels of their own: only seeds of one setting are pooled.

    A second copy of the same run (settings and seed) is left out.
    """
    once = {(config_hash(r.config), r.config.seed): r for r in reversed(records)}
    kept = [r for r in records if once[config_hash(r.config), r.config.seed] is r]
    for group in by_label(kept).values():
        differing = differences([r.config for r in group])
        for record in group:
            own = settings(record.config)
            record.distinction = ", ".join(f"{k.removeprefix('optimizer.')}={own.get(k)}" for k in differing)
    return kept


def differences(configs: Sequence[RunConfig]) -> list[str]:
    """Dotted names of the settings in which runs differ, seeds apart."""
    flat = [settings(c) for c in configs]
    keys = dict.fromkeys(k for values in flat for k in values)
    return [k for k in keys if len({repr(values.get(k)) for values in flat}) > 1]


def by_label(records: Iterable[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs of each optimizer, in the order of their first appearance."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(record.label, []).append(record)
    return groups
