"""Live progress in a terminal: what runs, in which phase, how far; silent when the output is not a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

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
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[phase]}"),
            speed_estimate_period=600,  # runs of many kinds, short and long
            console=console,
            disable=not shown,
        )
        self._task: int | None = None
        self._all: int | None = None
        self._rows: dict[int, int] = {}

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

    def count(self, runs: int) -> None:
        """Count runs that were finished elsewhere, or by an earlier call."""
        if self._all is not None:
            self._bar.advance(self._all, runs)

    def row(self, key: int, title: str | None) -> None:
        """What the process ``key`` does, a line of its own; None takes the line away."""
        if key in self._rows:
            self._bar.remove_task(self._rows.pop(key))
        if title is not None:
            self._rows[key] = self._bar.add_task(title, total=None, phase="")

    def clear(self) -> None:
        """Take the lines of all processes away."""
        for key in list(self._rows):
            self.row(key, None)

    def note(self, text: str) -> None:
        """What to show beside the number of all runs, such as the best so far."""
        if self._all is not None:
            self._bar.update(self._all, phase=text)

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


class Sender(RunProgress):
    """The progress of a worker: told to ``put``, and shown by the process that started it.

    Args:
        put: takes ``(process id, what, value)``, what being one of ``"run"``, ``"count"``, ``"note"`` and ``"print"``.
    """

    def __init__(self, put: Callable[[tuple[int, str, Any]], None]) -> None:
        super().__init__(enabled=False)
        self._put = put

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """Tell what begins."""
        self._put((os.getpid(), "run", title))

    def finish_run(self) -> None:
        """Tell that a run is finished."""
        self._put((os.getpid(), "count", 1))

    def count(self, runs: int) -> None:
        """Tell of runs that were finished by an earlier call."""
        self._put((os.getpid(), "count", runs))

    def note(self, text: str) -> None:
        """Tell the note."""
        self._put((os.getpid(), "note", text))

    def print(self, text: str) -> None:
        """Tell the line."""
        self._put((os.getpid(), "print", text))


def show(progress: RunProgress, message: tuple[int, str, Any], say: Callable[[str], None]) -> None:
    """Do in this process what a ``Sender`` told; its lines go to ``say``."""
    process, what, value = message
    if what == "run":
        progress.row(process, value)
    elif what == "count":
        progress.count(value)
    elif what == "note":
        progress.note(value)
    else:
        say(value)
