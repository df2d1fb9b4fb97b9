"""Suites: tasks x optimizers, tuned with equal budgets, re-run with new seeds; the run folders are all that counts.

Nothing but files connects one call with the next: the same command finds what is done, and goes on.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.config import (
    ConfigError,
    RunConfig,
    available,
    compose_run,
    run_directory,
)
from benchmarks.files import atomic_write_json, remove_leftovers
from benchmarks.progress import RunProgress
from benchmarks.protocol.checkpoint import BusyError, RunFolder
from benchmarks.protocol.repeat import in_words, verdict
from benchmarks.protocol.search import Trial, Tuned, along, as_overrides, judge, search, space_of, tuning_runs
from benchmarks.protocol.suite_config import TUNING_SEED, SuiteConfig, changes_of, load_comparison
from benchmarks.protocol.train import execute
from benchmarks.protocol.workers import sender, workers
from benchmarks.sinks.jsonl import decode, encode
from curvopt import zoo

VERSION = 2
_WARM_UP = 5  # steps before a re-timed run

__all__ = ["Comparison", "SuiteConfig", "Unit", "load_comparison", "load_folder", "suite_names", "units"]


def load_folder(out: Path) -> tuple[SuiteConfig, str]:
    """The suite that a folder holds, and the command that made it (empty where it was not kept).

    Raises:
        ConfigError: it was written by another version.
    """
    values = json.loads((out / "suite.json").read_text())
    version, command = values.pop("version", None), values.pop("command", "")
    if version != VERSION:
        raise ConfigError(f"{out} holds a suite of format {version}, this program reads {VERSION}")
    strange = sorted(set(values) - {f.name for f in fields(SuiteConfig)})
    if strange:
        raise ConfigError(f"{out} holds a suite with the unknown keys {', '.join(strange)}: another version wrote it")
    return SuiteConfig(**values), str(command)


@dataclass(frozen=True)
class Unit:
    """An optimizer on a task: its tuning, then the runs of its best setting (also with its rate scaled, or one change)."""

    task: str
    optimizer: str
    scales: tuple[float, ...] = ()
    changes: tuple[str, ...] = ()


def units(config: SuiteConfig) -> list[Unit]:
    """All of them; those of the first task first."""
    return [
        Unit(t, o, tuple(config.scaled.get(o, ())), tuple(changes_of(config.ablate.get(o, {}))))
        for t in config.tasks
        for o in config.optimizers
    ]


class Comparison:
    """A suite in a folder.

    Args:
        config: the suite.
        out: its folder.
        say: where a line about each finished run goes.
        command: that does it, kept for the report.
    """

    def __init__(
        self, config: SuiteConfig, out: Path, say: Callable[[str], None] = lambda text: None, command: str = ""
    ) -> None:
        self.config = config
        self.out = Path(out)
        self.say = say
        self.command = command

    # ---- what is common to all runs
    def overrides(self, task: str, change: str = "") -> list[str]:
        """For every run on a task (with an ablation's change): the suite's, the task's, what was timed once for all of them."""
        given = [*self.config.overrides, *self.config.by_task.get(task, []), f"out={self.out / 'runs'}"]
        costs = self._costs(task, change)
        pinned = json.loads(costs.read_text()) if costs.exists() else {}
        named = {text.partition("=")[0] for text in given}
        return [*given, *(f"{key}={value}" for key, value in pinned.items() if key not in named)]

    def _costs(self, task: str, change: str = "") -> Path:
        """A change of the task (its curvature batch) has costs of its own, one of the optimizer has not."""
        suffix = f"-{change.removeprefix('task.')}" if change.startswith("task.") else ""
        return self.out / "costs" / f"{task}{suffix}.json"

    def measure(self, progress: RunProgress) -> None:
        """Time a curvature product on each task, once for the whole suite: one number for all optimizers."""
        from benchmarks import tasks
        from benchmarks.protocol.measure import measure_costs, measure_jacobian

        changes = [c for values in self.config.ablate.values() for c in changes_of(values) if c.startswith("task.")]
        for name, change in product(self.config.tasks, dict.fromkeys(["", *changes])):
            costs = self._costs(name, change)
            if costs.exists():
                continue
            given = [*self.overrides(name, change), *([change] if change else [])]
            run = compose_run(name, self.config.optimizers[0], given)
            if run.product_cost is not None and run.route is not None:
                continue
            progress.begin(f"{name}: timing a product", 1)
            task = tasks.build(run.task, run.device)
            remove_leftovers(costs)
            threads = torch.get_num_threads()
            torch.set_num_threads(run.threads)  # as in the runs
            try:
                found = measure_costs(task, task.model(0), run.batch_size, route=run.route)
                measured: dict[str, Any] = {"product_cost": float(f"{found.product_cost:.3g}"), "route": found.route}
                for entry in self._on_residuals(name):
                    with suppress(ValueError):  # no residuals, or too many: its runs will say so, a row each
                        cost = measure_jacobian(task, task.model(0), run.batch_size, entry)
                        measured["jacobian_cost"] = float(f"{cost:.3g}")
            finally:
                torch.set_num_threads(threads)
            atomic_write_json(costs, measured)
            progress.finish_run()

    def _on_residuals(self, task: str) -> list[str]:
        """Zoo entries of the suite that take residuals; the first of them, whose Jacobians are all alike."""
        entries = [compose_run(task, o, self.overrides(task)).optimizer["zoo"] for o in self.config.optimizers]
        return [e for e in entries if zoo.describe(e).needs_residuals][:1]

    # ---- targets
    def targets(self, task: str) -> dict[str, list[float]]:
        """Column -> the values that a run on a task is to come down to, largest first."""
        found = self.config.targets_by_task.get(task, self.config.targets)
        return {column: sorted(values, reverse=True) for column, values in found.items()}

    def first(self, task: str, *, final: bool = False) -> RunConfig:
        """What the trials on a task have in common, or the runs after them: the configuration of the first optimizer's."""
        more = self.config.final_overrides if final else []
        return compose_run(task, self.config.optimizers[0], [*self.overrides(task), *more])

    def _stop(self, task: str, columns: Sequence[str] | None = None) -> list[str]:
        return [
            f"stop_at.{column}={min(values)!r}"
            for column, values in self.targets(task).items()
            if columns is None or column in columns
        ]

    # ---- one optimizer on one task
    def tune(self, unit: Unit, progress: RunProgress, *, reading: bool = False) -> Tuned:
        """The search, or what an earlier call found with the same settings of the suite.

        Args:
            unit: what is tuned.
            progress: the bar.
            reading: for a report, which takes what is there and runs nothing.

        Raises:
            ConfigError: ``reading``, and there is no finished search with these settings.
        """
        common = [*self.overrides(unit.task), *self._stop(unit.task, ["train_loss"])]
        seeds = range(TUNING_SEED, TUNING_SEED + self.config.tuning_seeds)
        grid = self.config.grid.get(unit.optimizer)
        space = {} if grid is not None else space_of(unit.task, unit.optimizer, common)
        told = [text for text in common if not text.startswith("out=")]  # the folder may be named in another way
        spec = [VERSION, self.config.trials, list(seeds), told, {k: repr(v) for k, v in space.items()}]
        spec += [] if grid is None else [grid]
        goal = min(self.targets(unit.task).get("train_loss", []), default=None)
        stamp = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
        path = self.out / "tuning" / unit.task / f"{unit.optimizer}.json"
        if path.exists():
            found = decode(json.loads(path.read_text()))
            if found.get("stamp") == stamp:
                progress.count(self.config.trials * len(seeds))
                return Tuned(found["key"], [Trial(**t) for t in found["trials"]])
        if reading:
            on = f"{unit.optimizer} is not tuned on {unit.task} yet"
            if path.exists():
                on = f"{unit.optimizer} was tuned with other settings or by another version on {unit.task}"
            raise ConfigError(f"{self.out}: {on}: run the suite to its end")

        scores: list[float] = []

        def score(settings: dict[str, Any]) -> tuple[float, float, float]:
            runs = tuning_runs(unit.task, unit.optimizer, settings, common, seeds)
            value = judge([self.run(run, progress) for run in runs], goal)
            shown = ", ".join(f"{k}={v}" for k, v in settings.items())
            scores.append(value[0])
            self.say(
                f"{unit.task}, {unit.optimizer}: {shown}: train loss {value[0]:.4g}, best so far {min(scores):.4g}"
            )
            progress.note(f"best so far {min(scores):.4g} ({unit.task}, {unit.optimizer})")
            return value

        tuned = search(space, score, self.config.trials) if grid is None else along(grid, score)
        trials = [asdict(t) for t in tuned.trials]
        remove_leftovers(path)
        atomic_write_json(path, encode({"stamp": stamp, "key": tuned.key, "trials": trials}))
        return tuned

    def finals(self, unit: Unit, tuned: Tuned) -> list[RunConfig]:
        """The runs of the best setting, then with its learning rate scaled, then with one thing changed."""
        best = [*as_overrides(tuned.best.settings), *self.config.final_overrides]
        stop = self._stop(unit.task)
        first = compose_run(unit.task, unit.optimizer, [*self.overrides(unit.task), *stop, *best])
        runs = [replace(first, seed=s) for s in range(self.config.seeds)]
        for scale in unit.scales:
            label = f"{runs[0].optimizer['label']}, lr x {scale:g}"
            rate = float(f"{scale * tuned.best.settings['lr']:.3g}")
            runs += [
                replace(r, optimizer={**r.optimizer, "lr": rate, "label": label}) for r in runs[: self.config.seeds]
            ]
        for change in unit.changes:
            run = compose_run(unit.task, unit.optimizer, [*self.overrides(unit.task, change), *stop, *best, change])
            label = f"{first.optimizer['label']}, {_words(change)}"
            run = replace(run, optimizer={**run.optimizer, "label": label})
            runs += [replace(run, seed=s) for s in range(self.config.seeds)]
        return [replace(r, wandb=replace(r.wandb, group=f"{self.config.title}: {unit.task}")) for r in runs]

    def retimed(self, runs: Sequence[RunConfig]) -> list[RunConfig]:
        """Of ``finals``, what is done once more alone: the first seeds, in a folder of their own, without W&B."""
        out = str(self.out / "retimed")
        return [
            replace(r, out=out, wandb=replace(r.wandb, mode="disabled")) for r in runs if r.seed < self.config.retime
        ]

    def retime(self, config: RunConfig) -> str:
        """Do a run of ``retimed`` and note beside it whether it gave the numbers of the first one; a line about it."""
        folder = run_directory(config)
        note = folder / "repeat.json"
        quiet = RunProgress(enabled=False)
        if not RunFolder(folder).done.exists():
            self._warm_up(config, quiet)
        record = self.run(config, quiet)
        remove_leftovers(note)
        if not note.exists():
            atomic_write_json(note, verdict(config, run_directory(replace(config, out=str(self.out / "runs"))), folder))
        spent = (
            f"{record['seconds']:.2f} s, wall clock {record['wall_seconds']:.2f} s" if "seconds" in record else "failed"
        )
        return f"{spent}, {in_words(json.loads(note.read_text()))}"

    def _warm_up(self, config: RunConfig, progress: RunProgress) -> None:
        """A few steps that count for nothing: what a process does only once must not go to its first run."""
        with tempfile.TemporaryDirectory() as folder:
            self.run(replace(config, steps=min(config.steps, _WARM_UP), run_dir=f"{folder}/run"), progress)

    def run(self, config: RunConfig, progress: RunProgress) -> Mapping[str, Any]:
        """One run; what it raises becomes its result, but for a full disk and the like, which end the suite."""
        folder = RunFolder(run_directory(config))
        try:
            return execute(config, progress).record
        except (OSError, MemoryError, BusyError):
            raise
        except Exception as error:  # any optimizer may raise anything: the others still run
            reason = f"{type(error).__name__}: {error}"
            atomic_write_json(folder.result, {"status": "failed", "reason": reason})
            return {"status": "failed", "reason": reason}
        finally:
            progress.finish_run()

    def runs_of(self, unit: Unit) -> int:
        """Number of its runs: the search, the results, the re-timed ones."""
        settings = 1 + len(unit.scales) + len(unit.changes)
        return self.config.trials * self.config.tuning_seeds + settings * (self.config.seeds + self.config.retime)

    def do(self, unit: Unit, progress: RunProgress) -> str:
        """Tune an optimizer on a task, then do its runs; a line about them."""
        tuned = self.tune(unit, progress)
        ends = [self.run(config, progress)["status"] for config in self.finals(unit, tuned)]
        edge = "" if tuned.bracketed else ", NOT bracketed"
        counts = ", ".join(f"{ends.count(s)} {s}" for s in dict.fromkeys(ends))
        best = ", ".join(f"{k}={v}" for k, v in tuned.best.settings.items())
        return f"{unit.task}, {unit.optimizer}: best {best}{edge}; {counts}"

    # ---- all of them
    def perform(self, progress: RunProgress, jobs: int = 1) -> None:
        """Do what is left, in ``jobs`` processes.

        Raises:
            OSError: the disk is full, or the like; the same command goes on.
        """
        self.claim()
        self.measure(progress)
        work = units(self.config)
        progress.overall(sum(map(self.runs_of, work)))
        done, started = 0, time.monotonic()
        for text in self._results(work, progress, jobs):
            done += 1
            spent = time.monotonic() - started
            left = (
                ""
                if done == len(work)
                else f"; {len(work) - done} left, about {spent / done * (len(work) - done) / 60:.0f} min"
            )
            self.say(f"[{done}/{len(work)}] {text}{left}")
        self._retime_all(work, progress)

    def _retime_all(self, work: Sequence[Unit], progress: RunProgress) -> None:
        quiet = RunProgress(enabled=False)
        runs = [r for unit in work for r in self.retimed(self.finals(unit, self.tune(unit, quiet)))]
        runs.sort(key=lambda r: r.seed)  # what else the machine does in a while goes to all optimizers alike
        left = [r for r in runs if not (run_directory(r) / "repeat.json").exists()]
        progress.count(len(runs) - len(left))
        if not left:
            return
        # One process, a new one for all of them: no bars and no other run take seconds from it.
        with workers(1, progress, self.say) as pool:
            for i, run in enumerate(left, len(runs) - len(left) + 1):
                name = f"alone: {run.task['file']}, {run.optimizer['label']}, seed {run.seed}"
                progress.row(0, name)
                text = pool.submit(_retime, self.config, self.out, run).result()
                progress.count(1)
                self.say(f"[{i}/{len(runs)}] {name}: {text}")

    def claim(self) -> None:
        """Write ``suite.json``; a folder that holds another version's results is refused."""
        path = self.out / "suite.json"
        if path.exists():
            version = json.loads(path.read_text()).get("version")
            if version != VERSION:
                raise ConfigError(
                    f"{self.out} holds a suite of format {version}, this program writes {VERSION}: move it away"
                )
        remove_leftovers(path)
        atomic_write_json(path, {"version": VERSION, "command": self.command, **asdict(self.config)})

    def _results(self, work: Sequence[Unit], progress: RunProgress, jobs: int) -> Iterator[str]:
        if jobs == 1:
            for unit in work:
                yield self.do(unit, progress)
            return
        with workers(jobs, progress, self.say) as pool:
            waiting = [pool.submit(_worker, self.config, self.out, unit) for unit in work]
            for future in as_completed(waiting):
                yield future.result()


def _worker(config: SuiteConfig, out: Path, unit: Unit) -> str:
    progress = sender()
    return Comparison(config, out, progress.print).do(unit, progress)


def _words(change: str) -> str:
    """``rank=3`` of ``optimizer.rank=3``: for labels."""
    return change.partition(".")[2].replace('"', "")


def _retime(config: SuiteConfig, out: Path, run: RunConfig) -> str:
    return Comparison(config, out).retime(run)


def suite_names() -> list[str]:
    """Files in ``configs/suite``."""
    return available("suite")
