"""Whether a run that was done again gave the same numbers bit for bit, and what stands in the way where it did not."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.config import RunConfig
from benchmarks.protocol.checkpoint import RunFolder
from benchmarks.protocol.clock import MEASURED
from benchmarks.protocol.train import execute
from benchmarks.sinks import read_jsonl

_NAMED = re.compile(r"(\S+) does not have a deterministic implementation")
_LONGEST = 50  # steps that the search for an operation takes


def difference(first: Path, again: Path, timed: bool = False) -> str:
    """Where the records of two runs part, measured columns apart; empty for the same numbers bit for bit.

    Args:
        first, again: folders of two finished runs.
        timed: they ended by the clock, so that only the steps that both did are compared, but for the last ones.
    """
    one, other = ({r["step"]: r for r in _rows(folder)} for folder in (first, again))
    if timed:
        end = min(max(rows, default=0) for rows in (one, other))
        one, other = ({s: r for s, r in rows.items() if s < end} for rows in (one, other))
    for step in sorted({*one, *other}):
        if step not in one or step not in other:
            return f"a record at step {step} only {'there' if step in one else 'in the repetition'}"
        for name in {**one[step], **other[step]}:
            left, right = one[step].get(name), other[step].get(name)
            # repr tells every bit of a float, and NaN is like NaN.
            if name not in MEASURED and repr(left) != repr(right):
                return f"{name} at step {step}: {left!r}, then {right!r}"
    ends = [_end(folder) for folder in (first, again)]
    return "" if ends[0] == ends[1] else f"{ends[0]}, then {ends[1]}"


def _rows(folder: Path) -> list[dict[str, Any]]:
    log = RunFolder(folder).log
    return read_jsonl(log) if log.exists() else []


def _end(folder: Path) -> str:
    result: Mapping[str, Any] = json.loads(RunFolder(folder).result.read_text())
    return f"{result['status']} {result['reason']}".strip()


def surroundings(first: Path, again: Path) -> list[str]:
    """What of versions, commit and machine differs between two runs."""
    one, other = (json.loads(RunFolder(folder).meta.read_text()) for folder in (first, again))
    names = [n for n in {**one, **other} if n not in ("date", "resumed") and one.get(n) != other.get(n)]
    return [f"{n}: {one.get(n)}, then {other.get(n)}" for n in names]


@contextmanager
def _told_of_operations() -> Iterator[None]:
    """Let torch warn of each operation without a deterministic implementation."""
    before, only_warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)


def operations(config: RunConfig) -> list[str]:
    """Operations of a run that torch has no deterministic implementation of, from its first steps done once more."""
    with tempfile.TemporaryDirectory() as folder, _told_of_operations():
        quiet = replace(config.wandb, mode="disabled")
        short = replace(config, steps=min(config.steps, _LONGEST), run_dir=f"{folder}/run", wandb=quiet)
        try:
            said = execute(short).record["warnings"]
        except Exception:  # a run that raises does so before it can part from another
            return []
    return list(dict.fromkeys(m.group(1) for text in said if (m := _NAMED.search(text))))


def verdict(config: RunConfig, first: Path, again: Path) -> dict[str, Any]:
    """``same``, and where it is False ``difference``, ``operations`` and ``surroundings``, see there.

    Args:
        config: of both runs.
        first, again: their folders.
    """
    found = difference(first, again, timed=config.max_seconds is not None)
    if not found:
        return {"same": True}
    return {
        "same": False,
        "difference": found,
        "operations": operations(config),
        "surroundings": surroundings(first, again),
    }


def in_words(found: Mapping[str, Any]) -> str:
    """A verdict as a clause: that it repeats bit for bit, or where not and what stands in the way."""
    if found["same"]:
        return "the same losses bit for bit"
    named = ", ".join(found["operations"])
    causes = (
        [f"non-deterministic operation: {named}"] if named else ["no operation that torch knows as non-deterministic"]
    )
    causes += [f"other surroundings ({'; '.join(found['surroundings'])})"] if found["surroundings"] else []
    return f"NOT the same: {found['difference']}; {'; '.join(causes)}"
