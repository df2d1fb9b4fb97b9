"""What a sink is, and the plain values that all of them store."""

from __future__ import annotations

import dataclasses
import enum
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from curvopt._errors import CurvoptWarning

__all__ = ["Sink", "SinkWarning", "check_record", "plain"]


class SinkWarning(CurvoptWarning):
    """A place that records go to failed or was switched off; training goes on."""


class Sink(Protocol):
    """A place that the records of one run go to.

    Attributes:
        note: What a user should know about it ("" if nothing), for the head of a run's display.
    """

    note: str

    def start(self, config: Mapping[str, Any]) -> None:
        """Opens the run; `config` is everything that it takes to repeat it."""

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Appends one record; steps never fall."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Adds to the values that stand for the whole run; a name given again replaces its value."""

    def figure(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Names a picture file that belongs to the run."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Stores a table."""

    def sync(self) -> None:
        """Brings to disk what was logged; called with each checkpoint, so that a resumed run finds its records."""

    def finish(self, status: str = "finished") -> None:
        """Closes the run; every status but "finished" marks it as failed."""


def check_record(record: Mapping[str, Any], step: int) -> None:
    """Refuses what would be a fault of the calling code.

    Raises:
        TypeError: If the step is no whole number.
        ValueError: If the step is negative, or the record has an own "step" that differs.
    """
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step={step!r} ({type(step).__name__}): expected a whole number")
    if step < 0:
        raise ValueError(f"step={step}: expected at least 0")
    if "step" in record and record["step"] != step:
        raise ValueError(f"the record has step={record['step']!r}, but was logged at step={step}")


def plain(value: Any, key: str = "") -> Any:
    """`value` as None, bool, int, float, str, lists and dicts of them; floats keep every bit, NaN and Inf included.

    Tensors and arrays become numbers or nested lists, tuples and sets lists, dataclasses dicts, paths and the like
    text. Anything else becomes its repr with a `SinkWarning` that names the key, because a record that can't be
    stored must not end a run.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return [plain(item, key) for item in items]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, key)
    if hasattr(value, "tolist"):  # torch.Tensor, numpy arrays and scalars, without importing either
        return plain(value.detach().tolist() if hasattr(value, "detach") else value.tolist(), key)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ != "torch" or type(value).__name__ not in ("dtype", "device", "Size"):
        warnings.warn(f"{key or 'a value'}: {type(value).__name__} is stored as its text", SinkWarning, stacklevel=2)
    return str(value)
