"""Readers of the public file formats, checked byte by byte: numbers in, arrays or lists out, nothing assumed.

A reader raises `DataFormatError` naming the file and the fault, and never returns part of a broken file.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from .errors import DataFormatError

__all__ = ["read_cifar10_batch", "read_idx", "read_idx_pair", "read_sentences", "read_text"]

_GZIP_MAGIC = b"\x1f\x8b"
_IDX_UINT8 = 0x08
_CIFAR_ROW = 1 + 3 * 32 * 32  # one label byte, then the red, green and blue planes of 32x32 pixels


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """An idx file of unsigned bytes (the format of MNIST), gzipped or plain.

    Args:
        path: The file.
        ndim: How many dimensions it must have: 3 for images, 1 for labels.

    Returns:
        A uint8 array of the shape in the header.

    Raises:
        DataFormatError: If the compression, the magic number, the element type or the size is wrong.
    """
    raw = _decompress(path)
    if len(raw) < 4 or raw[0] != 0 or raw[1] != 0:
        raise DataFormatError(
            f"{path}: no idx file: it starts with {raw[:4].hex(' ') or 'nothing'}, "
            f"expected 00 00 {_IDX_UINT8:02x} {ndim:02x}"
        )
    if raw[2] != _IDX_UINT8 or raw[3] != ndim:
        raise DataFormatError(
            f"{path}: idx element type 0x{raw[2]:02x} with {raw[3]} dimensions, "
            f"expected unsigned bytes (0x{_IDX_UINT8:02x}) with {ndim}"
        )
    start = 4 + 4 * ndim
    if len(raw) < start:
        raise DataFormatError(f"{path}: truncated in its header: {len(raw)} bytes, the header alone takes {start}")
    shape = struct.unpack(f">{ndim}I", raw[4:start])
    expected = start + math.prod(shape)
    if len(raw) != expected:
        what = "truncated" if len(raw) < expected else "too long"
        shape_text = "x".join(map(str, shape))
        raise DataFormatError(
            f"{path}: {what}: {len(raw)} bytes unpacked, its header (shape {shape_text}) says {expected}"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)


def read_idx_pair(images: Path, labels: Path, *, side: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, side, side) and labels (N,) as uint8 from two idx files that belong together.

    Raises:
        DataFormatError: If the size of an image, a label or the number of rows does not fit.
    """
    x, y = read_idx(images, 3), read_idx(labels, 1)
    if x.shape[1:] != (side, side):
        raise DataFormatError(f"{images}: images of {x.shape[1]}x{x.shape[2]} pixels, expected {side}x{side}")
    if len(x) != len(y):
        raise DataFormatError(f"{labels}: {len(y)} labels for the {len(x)} images of {images.name}")
    _check_rows(images, len(x))
    _check_labels(labels, y, classes)
    return x, y


def read_cifar10_batch(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """One file of CIFAR-10's binary version: images (N, 3, 32, 32) and labels (N,), both uint8.

    Args:
        path: The file.
        count: How many rows it must have: the format has no header that would tell a file cut off between two rows.

    Raises:
        DataFormatError: If the file has not that number of 3,073-byte rows or a label is above 9.
    """
    raw = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    if raw.size % _CIFAR_ROW:
        raise DataFormatError(
            f"{path}: truncated or no CIFAR-10 binary file: {raw.size} bytes are no whole number "
            f"of {_CIFAR_ROW}-byte rows ({raw.size % _CIFAR_ROW} left over)"
        )
    rows = raw.reshape(-1, _CIFAR_ROW)
    _check_rows(path, len(rows))
    _check_count(path, len(rows), count, "rows")
    _check_labels(path, rows[:, 0], 10)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].copy()


def read_sentences(path: Path) -> tuple[list[str], list[int]]:
    """Sentences and labels (0 or 1) of SST-2, in either public layout.

    The layouts are "sentence TAB label" without a header, and GLUE's with the header line "sentence TAB label".
    GLUE's test.tsv ("index TAB sentence") has no labels and is refused.

    Raises:
        DataFormatError: If the encoding, a line or a label is wrong; the text names the line.
    """
    lines = _decode(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    lines = [line.removesuffix("\r") for line in lines]
    first = 0
    if lines:
        header = tuple(lines[0].split("\t"))
        if header == ("index", "sentence"):
            raise DataFormatError(f"{path}: has no labels (GLUE's test set: index TAB sentence); use the dev set")
        first = 1 if header == ("sentence", "label") else 0
    sentences: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(lines[first:], start=first + 1):
        fields = line.split("\t")
        if len(fields) != 2 or not fields[0].strip():
            raise DataFormatError(
                f"{path}, line {number}: expected 'sentence TAB label', found {len(fields)} field(s): {line[:60]!r}"
            )
        if fields[1].strip() not in ("0", "1"):
            raise DataFormatError(f"{path}, line {number}: label {fields[1][:20]!r}, expected 0 or 1")
        sentences.append(fields[0].strip())
        labels.append(int(fields[1]))
    _check_rows(path, len(sentences))
    return sentences, labels


def read_text(path: Path, count: int) -> str:
    """A UTF-8 text, characters as they are (no newline translation).

    Args:
        path: The file.
        count: How many characters it must have: a text that was cut off looks like any other.

    Raises:
        DataFormatError: If the file is empty, not UTF-8 or of another length.
    """
    text = _decode(path)
    if not text:
        raise DataFormatError(f"{path}: empty file")
    _check_count(path, len(text), count, "characters")
    return text


def _decompress(path: Path) -> bytes:
    raw = path.read_bytes()
    if not raw.startswith(_GZIP_MAGIC):
        if path.suffix == ".gz":
            raise DataFormatError(
                f"{path}: no gzip file: it starts with {raw[:2].hex(' ') or 'nothing'}, expected 1f 8b"
            )
        return raw
    try:
        return gzip.decompress(raw)
    except EOFError:
        raise DataFormatError(f"{path}: truncated gzip file ({len(raw)} bytes): its end is missing") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataFormatError(f"{path}: corrupt gzip file: {error}") from error


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataFormatError(
            f"{path}: not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}"
        ) from error


def _check_rows(path: Path, rows: int) -> None:
    if rows == 0:
        raise DataFormatError(f"{path}: holds no rows")


def _check_count(path: Path, found: int, expected: int, what: str) -> None:
    if found != expected:
        fault = "truncated" if found < expected else "too long"
        raise DataFormatError(f"{path}: {fault}: {found:,} {what}, expected {expected:,}")


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    wrong = np.flatnonzero(labels >= classes)
    if wrong.size:
        row = int(wrong[0])
        raise DataFormatError(f"{path}: label {int(labels[row])} in row {row}, expected 0 to {classes - 1}")
