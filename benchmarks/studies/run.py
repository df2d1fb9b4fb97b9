"""Runs a study: its parts one after the other, what is finished taken as it is, then claims, figures and tables."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.config import ConfigError
from benchmarks.files import atomic_write_json, atomic_write_text
from benchmarks.progress import RunProgress
from benchmarks.protocol.environment import environment
from benchmarks.sinks import JsonlSink, MultiSink, WandbSink
from benchmarks.sinks.jsonl import encode
from benchmarks.studies.base import Lab, Outcome, Part, PartResult
from benchmarks.studies.claims import judge_all, tally
from benchmarks.studies.config import StudyConfig
from benchmarks.studies.folder import StudyFolder
from benchmarks.studies.report import StudyReport, page
from curvopt._errors import GapWarning, RefreshWarning
from curvopt.diagnostics.plots import save_figure


def perform(
    config: StudyConfig,
    out: str | Path,
    progress: RunProgress,
    say: Callable[[str], None] = lambda text: None,
    *,
    fresh: bool = False,
    wandb: str | None = None,
    command: str | None = None,
) -> StudyReport:
    """Run what is missing of a study, then judge its claims.

    Args:
        config: of the study.
        out: parent of its folder.
        progress: bars.
        say: takes a line a part.
        fresh: delete earlier results first.
        wandb: online, offline or disabled; None as the environment says.
        command: to be shown as what made it.

    Raises:
        ConfigError: the folder holds another study, another process works there, or parts that need unknown ones.
    """
    folder = StudyFolder(config.folder(out))
    parts = _checked_parts(config)
    device = torch.device("cuda" if config.size == "paper" and torch.cuda.is_available() else "cpu")
    if fresh:
        folder.clear()
    with folder.lock():
        folder.claim(config)
        place = environment()
        progress.overall(len(parts))
        results: dict[int, dict[str, PartResult]] = {seed: {} for seed in config.seeds}
        for part in parts:
            found = folder.finished(part)
            if found is None:
                needs = {arm: results[part.seed][arm] for arm in part.needs}
                seconds = _do(config, part, folder, Lab(device, config.study.dataset, needs), progress, place, wandb)
                found = folder.finished(part)
                assert found is not None
                say(f"{config.name}, {part.arm}, seed {part.seed}: {seconds:.1f} s")
            progress.finish_run()
            results[part.seed][part.arm] = found
        report = _judge(config, folder, parts, results, place, command)
    say(f"{config.name}: {tally(report.claims)}")
    return report


def _checked_parts(config: StudyConfig) -> list[Part]:
    parts = []
    for seed in config.seeds:
        earlier: set[str] = set()
        for part in config.study.parts(seed):
            missing = [arm for arm in part.needs if arm not in earlier]
            if missing or part.arm in earlier or part.seed != seed:
                why = f"needs {missing[0]!r}, which does not come before it" if missing else "is there twice"
                raise ConfigError(f"study {config.name}: part {part.name} {why}")
            earlier.add(part.arm)
            parts.append(part)
    return parts


def _do(
    config: StudyConfig,
    part: Part,
    folder: StudyFolder,
    lab: Lab,
    progress: RunProgress,
    place: dict[str, Any],
    wandb: str | None,
) -> float:
    path = folder.begin(part)
    group = folder.path.name
    sinks = MultiSink([JsonlSink(path), WandbSink(path, mode=wandb, name=f"{group}-{part.name}", group=group)])
    head = {"study": config.name, "size": config.size, "data": config.study.dataset, "arm": part.arm, "seed": part.seed}
    sinks.start({**head, "settings": config.settings, "environment": place})
    progress.begin(f"{config.name} {part.arm}, seed {part.seed}", config.study.length(part))
    lab._log = lambda step, record: sinks.log(record, step)
    lab._progress = progress.advance
    threads = torch.get_num_threads()
    status = "failed"
    start, cpu = time.perf_counter(), time.process_time()
    try:
        if lab.device.type == "cpu":
            torch.set_num_threads(1)  # sums split over threads round differently from machine to machine
        torch.manual_seed(1000 * part.seed + 7)
        with _collected() as notices:
            outcome: Outcome = config.study.run(part, lab)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        sinks.summary({k: v for k, v in outcome.values.items() if isinstance(v, (bool, int, float, str))})
        status = "finished"
    finally:
        torch.set_num_threads(threads)
        sinks.finish(status)
    folder.finish(part, outcome, lab.rows, sorted(set(notices)), {**place, "seconds": seconds, "cpu_seconds": cpu})
    return seconds


@contextmanager
def _collected() -> Iterator[list[str]]:
    """Names of the warnings about refreshes and gaps, to be counted on the page; all others are shown as they come."""
    names: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield names
    for w in caught:
        if issubclass(w.category, GapWarning | RefreshWarning):
            names.append(w.category.__name__)
        else:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


def _judge(
    config: StudyConfig,
    folder: StudyFolder,
    parts: list[Part],
    results: dict[int, dict[str, PartResult]],
    place: dict[str, Any],
    command: str | None,
) -> StudyReport:
    claims = judge_all(config.file.claims, [config.study.metrics(arms) for arms in results.values()], config.size)
    figures = []
    for name, (figure, data) in config.study.figures(results).items():
        figures.append(save_figure(figure, data, folder.figures, name, command=command)["png"])
    measured = [folder.measured(part) for part in parts]
    report = StudyReport(
        config=config,
        claims=claims,
        figures=figures,
        data=config.study.describe_data(),
        seconds=sum(float(m["seconds"]) for m in measured),
        cpu_seconds=sum(float(m.get("cpu_seconds", math.nan)) for m in measured),  # not kept by older versions
        warnings=dict(sorted(Counter(name for part in parts for name in folder.warnings(part)).items())),
        commits=sorted({str(m["commit"]) for m in measured}),
        place=place,
        command=command or "",
        folder=folder.path,
    )
    atomic_write_json(folder.claims_json, encode(report.as_dict()))
    atomic_write_text(folder.claims_md, page([report]))
    return report
