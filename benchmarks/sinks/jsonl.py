"""The plain files of a run: JSON Lines first, because everything else can be rebuilt from them.

A run's folder holds

- `config.json`: what it takes to repeat the run;
- `log.jsonl`: one record a line, `{"step": 12, "loss": 0.3, ...}`, appended and never rewritten but on resume;
- `summary.json`: the status ("running" until it ends), the summary values, the figures;
- `tables/NAME.json`: tables.

Every line is strict JSON. NaN and infinities, which JSON lacks, are the strings "NaN", "Infinity" and "-Infinity"
(`float()` of Python and `Number()` of JavaScript both take them); a real string that reads like one of these carries
one "~" in front, so that `decode` gives back exactly what was logged.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..files import atomic_write_bytes, atomic_write_json, fsync_folder, remove_leftovers
from .base import check_record, plain

__all__ = ["JsonlRun", "JsonlSink", "decode", "encode", "read_jsonl", "read_run"]

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LOOKS_SPECIAL = re.compile(r"~*(NaN|-?Infinity)")


def encode(value: Any) -> Any:
    """`value` as what strict JSON can hold (see the module's text)."""
    return _encode(plain(value))


def decode(value: Any) -> Any:
    """The inverse of `encode` on parsed JSON."""
    if isinstance(value, str):
        if value in _SPECIAL:
            return _SPECIAL[value]
        return value[1:] if value.startswith("~") and _LOOKS_SPECIAL.fullmatch(value) else value
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    return value


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, str):
        return f"~{value}" if _LOOKS_SPECIAL.fullmatch(value) else value
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    return value


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a JSON Lines file, NaN and infinities as floats again.

    The last line may be torn, as a kill in the middle of a write leaves it: it is left out.

    Raises:
        ValueError: If any other line is no JSON object; names the line.
    """
    return [record for record, _ in _records(Path(path))]


def _records(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    lines = path.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    found: list[tuple[dict[str, Any], bytes]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"a {type(record).__name__}, not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: {error}") from error
        found.append((decode(record), line))
    return found


@dataclass(frozen=True)
class JsonlRun:
    """A run read back from its folder.

    Attributes:
        config, summary: As given to the sink, in plain values.
        records: One dict a record, each with its "step".
        status: "running" (also of a killed run), or what `finish` was told.
        figures: Paths of the pictures, relative to the folder where they lie below it.
        tables: Columns and rows by name.
    """

    config: dict[str, Any]
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    status: str
    figures: list[str]
    tables: dict[str, dict[str, Any]]


def read_run(folder: str | os.PathLike[str]) -> JsonlRun:
    """Everything that a `JsonlSink` wrote to a folder, finished or not.

    Raises:
        FileNotFoundError: If the folder holds no run.
    """
    folder = Path(folder)
    config = decode(json.loads((folder / "config.json").read_bytes()))
    head = decode(json.loads((folder / "summary.json").read_bytes()))
    records = read_jsonl(folder / "log.jsonl")
    tables = {p.stem: decode(json.loads(p.read_bytes())) for p in sorted((folder / "tables").glob("*.json"))}
    return JsonlRun(config, records, head["summary"], head["status"], head["figures"], tables)


class JsonlSink:
    """Writes a run to plain files.

    Args:
        folder: The run's folder; made if it is missing.
        resume_step: The step of the checkpoint that the run continues from: records of later steps, which the run
            will produce again, are taken out, so that no row is there twice. None starts a new run.

    Raises:
        FileExistsError: If the folder holds records already and `resume_step` is None.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "log.jsonl"
        self.note = ""
        self._resume_step = resume_step
        self._file: BinaryIO | None = None
        self._head: dict[str, Any] = {"status": "running", "summary": {}, "figures": []}
        if resume_step is None and self.path.exists() and self.path.stat().st_size:
            raise FileExistsError(
                f"{self.path} holds the records of a run: give resume_step= to continue it, or another folder"
            )

    def start(self, config: Mapping[str, Any]) -> None:
        """Writes the config and opens the records, those beyond `resume_step` taken out."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for target in (self.folder / "config.json", self.folder / "summary.json", self.path):
            remove_leftovers(target)
        atomic_write_json(self.folder / "config.json", encode(config))
        if self._resume_step is not None:
            self._cut(self._resume_step)
        self._write_head()
        # Unbuffered: a record is with the operating system once `log` returns, and survives a kill of this process.
        self._file = open(self.path, "ab", buffering=0)
        self.sync()
        fsync_folder(self.folder)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Appends one line.

        Raises:
            OSError: If it can't be written whole; the file then ends with the line before.
        """
        check_record(record, step)
        file = self._opened()
        line = json.dumps({"step": step, **encode(record)}, allow_nan=False, ensure_ascii=False).encode() + b"\n"
        before = file.seek(0, os.SEEK_END)
        written = 0
        try:
            while written < len(line):
                written += file.write(line[written:])
        except OSError as error:
            file.truncate(before)
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def summary(self, values: Mapping[str, Any]) -> None:
        """Merges into the summary and rewrites `summary.json`, all or nothing."""
        self._head["summary"].update(plain(values))
        self._write_head()

    def figure(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Notes the path; the file itself stays where it is."""
        given = Path(path).resolve()
        inside = given.is_relative_to(self.folder.resolve())
        text = str(given.relative_to(self.folder.resolve()) if inside else given)
        if text not in self._head["figures"]:
            self._head["figures"].append(text)
        self._write_head()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes `tables/NAME.json`.

        Raises:
            ValueError: If the name is no plain file name.
        """
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise ValueError(f"table name {name!r}: expected letters, digits, '-', '_' and '.'")
        atomic_write_json(self.folder / "tables" / f"{name}.json", encode({"columns": columns, "rows": rows}))

    def sync(self) -> None:
        """Brings the records to disk."""
        os.fsync(self._opened().fileno())

    def finish(self, status: str = "finished") -> None:
        """Brings everything to disk, notes the status and closes the file; a second call does nothing."""
        if self._file is None:
            return
        try:
            self.sync()
            self._head["status"] = status
            self._write_head()
        finally:
            self._file.close()
            self._file = None

    def _cut(self, step: int) -> None:
        if self.path.exists():
            kept = [line for record, line in _records(self.path) if record["step"] <= step]
            atomic_write_bytes(self.path, b"".join(line + b"\n" for line in kept))
        head = self.folder / "summary.json"
        if head.exists():
            self._head = {**decode(json.loads(head.read_bytes())), "status": "running"}

    def _write_head(self) -> None:
        atomic_write_json(self.folder / "summary.json", encode(self._head))

    def _opened(self) -> BinaryIO:
        if self._file is None:
            raise RuntimeError(f"{self.path} is not open: call start() first, and nothing after finish()")
        return self._file
