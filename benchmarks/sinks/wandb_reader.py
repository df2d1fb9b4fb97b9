"""Reads wandb's offline files from disk; wandb 0.30 and later have no public way to do so.

A `.wandb` file is a 7-byte header (":W&B", little-endian 0xBEE1, version 0) followed by records in the framing of
LevelDB's log: blocks of 32 KiB counted from the start of the file, in each chunks of (crc32 u32, length u16, type u8)
and payload; type 1 is a whole record, 2, 3 and 4 are the first, middle and last part of one. The crc32 is zlib's, over
type and payload. A killed writer leaves a torn tail, which ends the reading and is told in `WandbRun.torn`.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curvopt._errors import MissingExtraError

from .jsonl import decode

__all__ = ["WandbRun", "holds_exit", "read_run"]

_HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_BLOCK = 32 * 1024
_CHUNK = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class WandbRun:
    """One run, merged from all the files that carry its id.

    Attributes:
        run_id, project, name: As wandb knows it.
        config: Nested as it was given.
        history: One dict a step in order of steps: "step" and the values, nested names joined by dots. Values are
            exact, but wandb writes a whole float without its point (2.0 as 2), so it may come back as an int.
        media: The newest reference of each picture and table (path, size, checksum), by its key.
        summary: Final values; wandb adds the last value of every history key itself.
        exit_code: None if the run was killed.
        torn: Whether a file ended in the middle of a record.
        files: The files read, oldest first.
    """

    run_id: str
    project: str = ""
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    media: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    torn: bool = False
    files: list[Path] = field(default_factory=list)


def read_run(path: str | os.PathLike[str], run_id: str | None = None) -> WandbRun:
    """Reads a `.wandb` file, or all those of one run below a folder.

    A resumed run has several files. Where a later one starts again at a step, the rows that an earlier one had beyond
    that step are dropped: the killed part that was computed again.

    Args:
        path: A file, or a folder searched in depth.
        run_id: Which run, if the folder holds several.

    Raises:
        FileNotFoundError: If there is no such file or run.
        ValueError: If a file is no wandb file, or a folder holds several runs and none was named.
        MissingExtraError: If wandb, whose message classes are needed, is not installed.
    """
    path = Path(path)
    files = sorted(path.rglob("*.wandb")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path}: no .wandb file below this folder")
    # Folder names carry the start time, so sorting by name is sorting by age; a header-only file has no id.
    parts = [part for file in files if (part := _read_file(file)).run_id]
    runs = sorted({part.run_id for part in parts})
    if run_id is None and len(runs) > 1:
        raise ValueError(f"{path} holds {len(runs)} runs, name one as run_id: {', '.join(runs)}")
    parts = [part for part in parts if part.run_id == (run_id or part.run_id)]
    if not parts:
        raise FileNotFoundError(f"{path}: no run" + (f" {run_id!r}; there are: {', '.join(runs)}" if run_id else ""))
    parts.sort(key=lambda part: part.files[0].parent.name.split("run-", 1)[-1])
    return _merge(parts)


def holds_exit(path: str | os.PathLike[str]) -> bool:
    """Whether a `.wandb` file holds the record that its writer ends with, so that nothing more is to come."""
    messages = _messages()
    last: deque[bytes] = deque(maxlen=8)  # the exit and the few that may follow it
    data = Path(path).read_bytes()
    last.extend(payload for payload in _payloads(data) if payload is not None)
    return any(messages.Record.FromString(payload).WhichOneof("record_type") == "exit" for payload in last)


def _merge(parts: list[WandbRun]) -> WandbRun:
    merged = WandbRun(parts[0].run_id)
    for part in parts:
        merged.project, merged.name = part.project or merged.project, part.name or merged.name
        merged.config.update(part.config)
        merged.summary.update(part.summary)
        merged.media.update(part.media)
        merged.exit_code = part.exit_code
        merged.torn = merged.torn or part.torn
        merged.files += part.files
        if part.history:
            start = part.history[0]["step"]
            rows = {row["step"]: row for row in merged.history if row["step"] <= start}
            for row in part.history:
                rows[row["step"]] = {**rows.get(row["step"], {}), **row}
            merged.history = [rows[step] for step in sorted(rows)]
    return merged


def _messages() -> Any:
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError as error:
        raise MissingExtraError('reading wandb\'s files needs wandb: pip install "curvopt-torch[wandb]"') from error
    return wandb_internal_pb2


def _read_file(path: Path) -> WandbRun:
    messages = _messages()
    data = path.read_bytes()
    if data[: len(_HEADER)] != _HEADER:
        raise ValueError(f"{path}: no wandb file: it starts with {data[:7].hex(' ') or 'nothing'}")
    run = WandbRun("", files=[path], torn=True)  # until the end of the file is seen
    for payload in _payloads(data):
        if payload is None:
            run.torn = False
            break
        _take(run, messages.Record.FromString(payload))
    run.summary = decode(run.summary)  # NaN and infinities are text there, see WandbSink.summary
    return run


def _take(run: WandbRun, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        run.run_id, run.project, run.name = record.run.run_id, record.run.project, record.run.display_name
        _update(run.config, record.run.config)
    elif kind == "config":
        _update(run.config, record.config)
    elif kind == "summary":
        _update(run.summary, record.summary)
    elif kind == "exit":
        run.exit_code = record.exit.exit_code
    elif kind == "history":
        row = {_key(item): json.loads(item.value_json) for item in record.history.item}
        step = int(row.pop("_step", record.history.step.num))
        media = {key.removesuffix("._type") for key in row if key.endswith("._type")}
        values = {"step": step}
        for key, value in row.items():
            owner = next((name for name in media if key.startswith(f"{name}.")), None)
            if owner is not None:
                run.media.setdefault(owner, {})[key.removeprefix(f"{owner}.")] = value
            elif isinstance(value, dict) and "_type" in value:
                run.media[key] = value
            elif not key.startswith("_"):
                values[key] = value
        if len(values) > 1:
            run.history.append(values)


def _update(target: dict[str, Any], change: Any) -> None:
    """Applies a config or summary record: values by name, or by a path of names for nested ones; and removals."""
    for item in change.update:
        names = list(item.nested_key) or [item.key]
        if not names[0].startswith("_"):
            inner = target
            for name in names[:-1]:
                inner = inner.setdefault(name, {})
            inner[names[-1]] = json.loads(item.value_json)
    for item in change.remove:
        names = list(item.nested_key) or [item.key]
        inner = target
        for name in names[:-1]:
            inner = inner.get(name, {})
        inner.pop(names[-1], None)


def _key(item: Any) -> str:
    return ".".join(item.nested_key) if item.nested_key else item.key


def _payloads(data: bytes) -> Iterator[bytes | None]:
    """The records, then None if the file ends where a record ends; a torn or damaged tail ends without the None."""
    position, parts = len(_HEADER), bytearray()
    inside = False
    while True:
        left = _BLOCK - position % _BLOCK
        if left < _CHUNK.size:
            position += left  # padding: a chunk's head never crosses a border
        if position >= len(data):
            if not inside:
                yield None
            return
        if position + _CHUNK.size > len(data):
            return
        crc, length, kind = _CHUNK.unpack_from(data, position)
        end = position + _CHUNK.size + length
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or end > len(data) or length > left - _CHUNK.size > 0:
            return
        if zlib.crc32(data[position + 6 : end]) != crc or (kind in (_MIDDLE, _LAST)) != inside:
            return
        parts += data[position + _CHUNK.size : end]
        inside = kind in (_FIRST, _MIDDLE)
        position = end
        if not inside:
            yield bytes(parts)
            parts.clear()
