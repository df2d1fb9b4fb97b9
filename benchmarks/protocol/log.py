"""The record of a run: plain JSON Lines first, W&B beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.config import RunConfig, to_dict
from benchmarks.sinks import JsonlSink, MultiSink, WandbSink, read_jsonl

RECORDS = "log.jsonl"  # the name that JsonlSink gives its file


class RunLog:
    """The sinks of one run; use as a context manager.

    Args:
        folder: of the run.
        config: of the run.
        environment: versions, commit and machine; stored with the configuration, because a record names what it
            takes to repeat it.
        checkpoint_step: first step that the resumed run will do; its records and later ones are taken out. None
            starts anew.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        environment: Mapping[str, Any] | None = None,
        checkpoint_step: int | None = None,
    ) -> None:
        # A process that was killed before its first checkpoint left records, and all of them come again.
        last_kept = -1 if checkpoint_step is None else checkpoint_step - 1
        records = folder / RECORDS
        plain = JsonlSink(folder, resume_step=last_kept)  # what reports are made from: a run can't do without
        self._sinks = MultiSink(
            [
                plain,
                WandbSink(
                    folder,
                    mode=None if config.wandb.mode == "auto" else config.wandb.mode,
                    project=config.wandb.project,
                    name=f"{config.task['file']}-{config.optimizer['file']}-seed{config.seed}",
                    group=config.wandb.group,
                    tags=config.wandb.tags,
                    resume_step=checkpoint_step,
                    # Asked for once the plain file is open, and cut.
                    earlier=lambda: read_jsonl(records) if records.exists() else [],
                ),
            ],
            essential=[plain],
        )
        self._config = {**to_dict(config), "environment": dict(environment or {})}
        self._status = "failed"

    def __enter__(self) -> RunLog:
        self._sinks.start(self._config)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sinks.finish(self._status)

    @property
    def note(self) -> str:
        """What a user should know of the sinks."""
        return self._sinks.note

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Append the record of a step."""
        self._sinks.log(record, step)

    def sync(self) -> None:
        """Bring everything to disk: a checkpoint must not be ahead of the record."""
        self._sinks.sync()

    def finish(self, result: dict[str, Any]) -> None:
        """Close the record with the run's outcome."""
        self._sinks.summary(result)
        self._status = "finished" if result["status"] == "done" else str(result["status"])
