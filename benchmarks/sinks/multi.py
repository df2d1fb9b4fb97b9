"""Several sinks as one: plain files first, and a sink that fails is switched off while training goes on."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .base import Sink, SinkWarning, check_record, plain
from .jsonl import JsonlSink

__all__ = ["MultiSink"]


class MultiSink:
    """Hands everything to each sink in turn, `JsonlSink`s before all others.

    A sink that raises is switched off for the rest of the run with a `SinkWarning` that names it, the call and the
    cause. A record that the calling code got wrong (a step that is no number) still raises.

    Args:
        sinks: The sinks; none at all is fine.
        essential: Those whose failure is raised, once the others have been served.
    """

    def __init__(self, sinks: Iterable[Sink], essential: Iterable[Sink] = ()) -> None:
        self._essential = list(essential)
        self.sinks: list[Sink] = sorted(sinks, key=lambda sink: not isinstance(sink, JsonlSink))
        self._off: list[Sink] = []

    @property
    def note(self) -> str:
        """The notes of the sinks, one a line."""
        return "\n".join(sink.note for sink in self.sinks if sink.note)

    def start(self, config: Mapping[str, Any]) -> None:
        """Opens the run in every sink."""
        values = plain(config)
        self._each("start", lambda sink: sink.start(values))

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Appends one record to every sink."""
        check_record(record, step)
        values = plain(record)
        self._each("log", lambda sink: sink.log(values, step))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Adds to the summary of every sink."""
        given = plain(values)
        self._each("summary", lambda sink: sink.summary(given))

    def figure(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Names a picture to every sink."""
        self._each("figure", lambda sink: sink.figure(path, name))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Hands a table to every sink."""
        cells = plain(rows)
        self._each("table", lambda sink: sink.table(name, columns, cells))

    def sync(self) -> None:
        """Brings every sink's records to disk."""
        self._each("sync", lambda sink: sink.sync())

    def finish(self, status: str = "finished") -> None:
        """Closes every sink, those switched off too, as far as they can be."""
        off, self._off = self._off, []
        self._each("finish", lambda sink: sink.finish(status))
        for sink in off:
            with contextlib.suppress(Exception):
                sink.finish("failed")

    def _each(self, what: str, call: Callable[[Sink], None]) -> None:
        failure: Exception | None = None
        for sink in list(self.sinks):
            try:
                call(sink)
            except Exception as error:  # whatever it is: a log must not end a run, unless the run is nothing without it
                if sink in self._essential:
                    failure = error
                    continue
                self.sinks.remove(sink)
                self._off.append(sink)
                warnings.warn(
                    f"{type(sink).__name__} is switched off for the rest of the run: "
                    f"{what}() failed: {type(error).__name__}: {error}",
                    SinkWarning,
                    stacklevel=3,
                )
        if failure is not None:
            raise failure
