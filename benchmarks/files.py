"""Files that are whole at every moment: written beside their target, brought to disk, then renamed over it.

A process killed at any point leaves either the old file or the new one, never a mixture: `os.replace` within one
folder is atomic, and the new bytes reach the disk (fsync) before the name points to them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "atomic_torch_save",
    "atomic_write_bytes",
    "atomic_write_json",
    "atomic_write_text",
    "fsync_folder",
    "no_room",
    "remove_leftovers",
]

_SUFFIX = ".tmp"


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Writes `data` to `path`, all or nothing; missing folders are made.

    Returns:
        The path written (a symbolic link is followed, so that the link itself stays).

    Raises:
        OSError: If the folder can't be written; the old file is then untouched.
    """
    return _replace(path, lambda handle: handle.write(data))


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes `text` as UTF-8 with the line ends it has, all or nothing; see `atomic_write_bytes`."""
    return atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> Path:
    """Writes `value` as strict JSON, all or nothing.

    Raises:
        ValueError: If a number is NaN or infinite; `benchmarks.sinks.jsonl.encode` prepares such values.
        TypeError: If a value has no JSON form.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return atomic_write_text(path, text + "\n")


def atomic_torch_save(obj: Any, path: str | os.PathLike[str]) -> Path:
    """`torch.save(obj, path)`, all or nothing: a kill at any moment leaves a checkpoint that loads."""
    import torch  # here, so that reading plain logs doesn't import torch

    def write(handle: BinaryIO) -> None:
        try:
            torch.save(obj, handle)
        except RuntimeError as error:  # torch's own words for whatever its writer met; a full disk must be told from it
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    return _replace(path, write)


def fsync_folder(folder: str | os.PathLike[str]) -> None:
    """Brings a folder's list of names to disk; where a file system offers no such thing it does nothing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(path: str | os.PathLike[str]) -> list[Path]:
    """Removes the temporary files that killed writers of `path` left behind.

    Only for callers that own the file alone (a run that resumes): another process's unfinished write would go too.

    Returns:
        The files removed.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        return []
    prefix = f".{target.name}."
    found = [p for p in target.parent.iterdir() if p.name.startswith(prefix) and p.name.endswith(_SUFFIX)]
    for leftover in found:
        leftover.unlink(missing_ok=True)
    return found


def _replace(path: str | os.PathLike[str], write: Callable[[BinaryIO], Any]) -> Path:
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_beside(target) as temporary:
        # Mode "x" and the default permissions: the file that appears is as readable as one from open().
        try:
            with open(temporary, "xb") as handle:
                write(handle)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, target)
        except OSError as error:
            raise _named(error, target) from error
    fsync_folder(target.parent)
    return target


def no_room(error: BaseException) -> bool:
    """Whether an error says that the disk is full, the quota spent, or the file larger than is allowed."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _named(error: OSError, target: Path) -> OSError:
    """The error with the file's name in it: a failed write has none."""
    return OSError(error.errno, error.strerror, str(target)) if error.errno is not None else error


@contextlib.contextmanager
def _temporary_beside(target: Path) -> Iterator[Path]:
    temporary = target.parent / f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}{_SUFFIX}"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
