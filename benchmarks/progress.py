"""Live progress in a terminal: what runs, in which phase, how far; silent when the output is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class RunProgress:
    """One bar a run; use as a context manager.

    Args:
        enabled: None shows bars only in a terminal.
    """

    def __init__(self, enabled: bool | None = None) -> None:
        console = Console(stderr=True)
        shown = sys.stderr.isatty() if enabled is None else enabled
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[phase]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not shown,
        )
        self._task: int | None = None
        self._all: int | None = None

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def overall(self, runs: int) -> None:
        """Start a bar over several runs, above that of the one at work."""
        self._all = self._bar.add_task("all runs", total=runs, phase="")

    def finish_run(self) -> None:
        """Take the run's bar away and count it."""
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        if self._all is not None:
            self._bar.advance(self._all)

    def print(self, text: str) -> None:
        """A line above the bars; shown outside a terminal too."""
        self._bar.console.print(text, soft_wrap=True, highlight=False)

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """Start the bar of a run."""
        self._task = self._bar.add_task(title, total=total, completed=done, phase="")

    def advance(self, done: int, note: str = "") -> None:
        """Set the number of steps done, and a short note such as the loss."""
        if self._task is not None:
            self._bar.update(self._task, completed=done, phase=note or "training")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what happens inside the block."""
        if self._task is not None:
            self._bar.update(self._task, phase=name)
        yield
        if self._task is not None:
            self._bar.update(self._task, phase="training")
