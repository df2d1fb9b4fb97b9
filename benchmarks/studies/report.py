"""What a study came to, as JSON and as a Markdown page; the page of all studies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.files import atomic_write_json, atomic_write_text
from benchmarks.sinks.jsonl import encode
from benchmarks.studies.claims import Claim, markdown, tally
from benchmarks.studies.config import StudyConfig


@dataclass(frozen=True)
class StudyReport:
    """A study that was run.

    Attributes:
        config: of it.
        claims: the table's rows.
        figures: PNG files, each with PDF, CSV and its command beside it.
        data: in words.
        seconds: of all parts together, measured by the clock.
        cpu_seconds: the same as process time, all threads added.
        warnings: by name, how many parts gave it.
        commits: of the code that ran the parts.
        place: versions and machine of the last process.
        command: that made it.
        folder: all its files.
    """

    config: StudyConfig
    claims: list[Claim]
    figures: list[Path]
    data: str
    seconds: float
    cpu_seconds: float
    warnings: dict[str, int]
    commits: list[str]
    place: dict[str, Any]
    command: str
    folder: Path

    def as_dict(self) -> dict[str, Any]:
        """Plain values; all that can't repeat is under ``measured``."""
        c = self.config
        return {
            "study": c.name,
            "title": c.file.title,
            "paper": c.file.paper,
            "question": c.file.question,
            "size": c.size,
            "data": self.data,
            "seeds": list(c.seeds),
            "settings": c.settings,
            "overrides": list(c.overrides),
            "verdicts": tally(self.claims),
            "claims": [claim.as_dict() for claim in self.claims],
            "warnings": self.warnings,
            "figures": [p.name for p in self.figures],
            "measured": {
                "seconds": self.seconds,
                "cpu_seconds": self.cpu_seconds,
                "commits": self.commits,
                "command": self.command,
                **self.place,
            },
        }


def section(report: StudyReport, figures: str) -> str:
    """A study as a section; ``figures`` is the path to its pictures from the page."""
    c, place = report.config, report.place
    changed = f" Changed for this run: `{' '.join(c.overrides)}`." if c.overrides else ""
    facts = (
        f"{c.file.paper}. Size: {c.size}. Data: {report.data}. Seeds: {', '.join(map(str, c.seeds))}.{changed} "
        f"All parts together took {report.seconds:.0f} s by the clock, {report.cpu_seconds:.0f} s of process time "
        f"(measured) on {place.get('processor', 'unknown')}, "
        f"{place.get('cores', '?')} cores, GPU: {place.get('gpu', '?')}, torch {place.get('torch', '?')}; commit "
        f"{', '.join(report.commits)}, {str(place.get('date', '?'))[:10]}."
    )
    pictures = "\n\n".join(f"![{p.stem.replace('_', ' ')}]({figures}/{p.name})" for p in report.figures)
    if report.warnings:
        facts += f" Warnings: {', '.join(f'{name} in {n} parts' for name, n in report.warnings.items())}."
    parts = [f"## {c.name}: {c.file.title}", c.file.question, facts, f"Verdicts: {tally(report.claims)}."]
    made = f"Made by `{report.command}`." if report.command else ""
    return "\n\n".join(t for t in (*parts, markdown(report.claims).rstrip(), pictures, made) if t) + "\n"


_READING = (
    "A claim is reproduced if every seed meets its threshold, not reproduced if none does, and undecided otherwise, or "
    "with fewer than three seeds. Thresholds were fixed in `configs/study/*.yaml` before the first run and are never "
    "changed after seeing a result. Thresholds are ours; sources name whose statement is tested."
)


def page(reports: Sequence[StudyReport], figures: str | None = None) -> str:
    """A Markdown page of one or several studies; ``figures`` is the folder of the pictures from the page."""
    parts = ["# Studies", _READING] if len(reports) > 1 else [_READING]
    for report in reports:
        parts.append(section(report, figures or "figures"))
    return "\n\n".join(parts).rstrip() + "\n"


def publish(reports: Sequence[StudyReport], target: Path) -> Path:
    """Write the page of all studies to ``target``, with their JSON and pictures in the folder of its stem beside it."""
    beside = target.parent / target.stem
    for report in reports:
        values = report.as_dict()
        atomic_write_json(beside / f"{report.config.name}.json", encode(values))
        for picture in report.figures:
            shutil.copyfile(picture, beside / picture.name)
    return atomic_write_text(target, page(reports, os.path.relpath(beside, target.parent)))
