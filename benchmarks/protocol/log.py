"""The record of a run: JSON Lines first, W&B beside it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any


class RunLog:
    """Append-only ``log.jsonl``, and further sinks that may fail without harm.

    Args:
        folder: of the run.
        config: the resolved configuration, for the sinks.
        resume_bytes: what a checkpoint says of the file's length: later lines are of steps that will be redone.
    """

    def __init__(self, folder: Path, config: dict[str, Any], resume_bytes: int | None = None) -> None:
        path = folder / "log.jsonl"
        path.touch()
        os.truncate(path, resume_bytes or 0)
        self._file = open(path, "ab")  # noqa: SIM115
        self._config = config

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Append the record of a step."""
        line = {"step": step, **{k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Bring everything to disk; the file's length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def finish(self, result: dict[str, Any]) -> None:
        """Close the record with the run's outcome."""
        self.sync()
