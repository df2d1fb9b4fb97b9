"""`load`: one call for every data set, from whichever place holds it."""

from __future__ import annotations

import os
import re
from typing import Any, TypeVar

import numpy as np
import torch

from . import formats
from .catalog import Spec, spec_of
from .datasets import CharData, Dataset, ImageData, SentenceData
from .errors import DataError, DataFormatError
from .prepare import standardize
from .store import Place, find

__all__ = ["load", "load_chars", "load_images", "load_sentences"]

Kind = TypeVar("Kind", bound=Dataset)

_DIGITS_TEST = 360  # of 1,797, a fifth
_SST_SENTENCES = 6_920  # training rows of the headerless layout: full sentences only
_CHARS_TRAIN = 0.9  # the customary split: the last tenth of the text is for validation


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    train: bool = True,
    limit: int | None = None,
    normalize: bool = False,
    split_seed: int = 0,
) -> Dataset:
    """Loads a split of a data set: `ImageData`, `SentenceData` or `CharData`.

    Args:
        name: "mnist", "fashion-mnist", "cifar-10", "sst-2", "tinyshakespeare" or "digits".
        root: The only folder to look in; None looks in the folder named by CURVOPT_DATA, then in the user's cache.
        train: The training split, else the test split (SST-2: the dev set; tinyshakespeare: the last tenth).
        limit: Keep the first `limit` rows (characters for a text); None keeps all.
        normalize: For images: float32, scaled to [0, 1] and standardised with the public set's mean and deviation of
            each channel, rather than uint8 as stored.
        split_seed: Which random split of the bundled digits; other sets have a fixed one.

    Raises:
        DataMissingError: If the files are in no place; the text says how to get them.
        DataFormatError: If a file is truncated, corrupt or of another format. (SST-2 cut off between two lines can't be
            told from its smaller layout: the note of the result then says how many rows there are.)
        DataError: If there is no data set of that name, or an argument does not fit it.
    """
    spec = spec_of(name)
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit!r} for {spec.name}: expected None or at least 1")
    if normalize and not spec.mean:
        raise DataError(f"normalize=True for {spec.name}, which holds text: only images can be normalised")
    if spec.name == "digits":
        return _digits(spec, train=train, limit=limit, normalize=normalize, seed=split_seed)
    place = find(spec, train=train, root=root)
    try:
        if spec.name == "cifar-10":
            return _cifar(spec, place, train=train, limit=limit, normalize=normalize)
        if spec.name == "sst-2":
            return _sentences(spec, place, train=train, limit=limit)
        if spec.name == "tinyshakespeare":
            return _chars(spec, place, train=train, limit=limit)
        return _idx(spec, place, train=train, limit=limit, normalize=normalize)
    except DataFormatError as error:
        if not place.source.startswith("cache"):
            raise
        raise DataFormatError(f"{error}. Fetch it again: python -m benchmarks fetch {spec.name}") from error


def load_images(name: str, **options: Any) -> ImageData:
    """`load` for a set of images; another set is an error."""
    return _typed(name, load(name, **options), ImageData)


def load_sentences(name: str, **options: Any) -> SentenceData:
    """`load` for a set of sentences; another set is an error."""
    return _typed(name, load(name, **options), SentenceData)


def load_chars(name: str, **options: Any) -> CharData:
    """`load` for a text of characters; another set is an error."""
    return _typed(name, load(name, **options), CharData)


def _typed(name: str, data: Dataset, kind: type[Kind]) -> Kind:
    if not isinstance(data, kind):
        raise DataError(f"{name} is {type(data).__name__}, not {kind.__name__}")
    return data


def _images(
    spec: Spec, x: np.ndarray, y: np.ndarray, *, train: bool, limit: int | None, normalize: bool, source: str, note: str
) -> ImageData:
    if limit is not None and limit > len(y):
        raise DataError(f"limit={limit} for {spec.name}: only {len(y):,} {_split(train)} rows are there ({source})")
    inputs = torch.from_numpy(np.array(x[:limit]))  # a copy: the buffer of a file is read-only
    targets = torch.from_numpy(y[:limit].astype(np.int64))
    if normalize:
        inputs = standardize(inputs, spec.mean, spec.std, top=16 if spec.name == "digits" else 255)
    return ImageData(spec.name, _split(train), source, note, inputs, targets, spec.classes)


def _idx(spec: Spec, place: Place, *, train: bool, limit: int | None, normalize: bool) -> ImageData:
    images, labels = (place.file(alternatives) for alternatives in (spec.train if train else spec.test))
    x, y = formats.read_idx_pair(images, labels, side=28, classes=spec.classes)
    note = _fewer(spec, train, len(y), "images")
    return _images(spec, x[:, None], y, train=train, limit=limit, normalize=normalize, source=place.source, note=note)


def _cifar(spec: Spec, place: Place, *, train: bool, limit: int | None, normalize: bool) -> ImageData:
    if train:
        names = [name for name in spec.train[0] if (place.folder / name).is_file()]
        note = "" if len(names) == 5 else f"{len(names)} of the 5 training batches ({_numbers(names)})"
    else:
        names, note = list(spec.test[0]), ""
    count = spec.rows[0] // 5 if train else spec.rows[1]
    batches = [formats.read_cifar10_batch(place.folder / name, count) for name in names]
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    note = "; ".join(part for part in (note, _fewer(spec, train, len(y), "images")) if part)
    return _images(spec, x, y, train=train, limit=limit, normalize=normalize, source=place.source, note=note)


def _sentences(spec: Spec, place: Place, *, train: bool, limit: int | None) -> SentenceData:
    path = place.file((spec.train if train else spec.test)[0])
    sentences, labels = formats.read_sentences(path)
    if limit is not None and limit > len(labels):
        raise DataError(f"limit={limit} for {spec.name}: only {len(labels):,} rows are there ({place.source})")
    if train and len(labels) == _SST_SENTENCES:
        note = f"the {len(labels):,} full sentences, not GLUE's {spec.rows[0]:,} phrases"
    else:
        note = _fewer(spec, train, len(labels), "rows")
    targets = torch.tensor(labels[:limit], dtype=torch.int64)
    return SentenceData(spec.name, _split(train), place.source, note, tuple(sentences[:limit]), targets, spec.classes)


def _chars(spec: Spec, place: Place, *, train: bool, limit: int | None) -> CharData:
    text = formats.read_text(place.file(spec.train[0]), spec.rows[0])
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    alphabet, ids = np.unique(codes, return_inverse=True)
    border = int(_CHARS_TRAIN * len(ids))
    part = ids[:border] if train else ids[border:]
    if limit is not None and limit > len(part):
        raise DataError(f"limit={limit} for {spec.name}: only {len(part):,} {_split(train)} characters are there")
    tensor = torch.from_numpy(part[:limit].astype(np.int64))
    return CharData(spec.name, _split(train), place.source, "", tensor, "".join(map(chr, alphabet)))


def _digits(spec: Spec, *, train: bool, limit: int | None, normalize: bool, seed: int) -> ImageData:
    from sklearn.datasets import load_digits  # heavy, and only this set needs it

    bundle = load_digits()
    # RandomState's stream is frozen by numpy, so the split is the same under every version.
    order = np.random.RandomState(seed).permutation(len(bundle.target))
    rows = order[_DIGITS_TEST:] if train else order[:_DIGITS_TEST]
    x, y = bundle.images[rows].astype(np.uint8)[:, None], bundle.target[rows]
    source, note = "bundled with scikit-learn", f"own split, seed {seed}"
    return _images(spec, x, y, train=train, limit=limit, normalize=normalize, source=source, note=note)


def _split(train: bool) -> str:
    return "train" if train else "test"


def _fewer(spec: Spec, train: bool, rows: int, what: str) -> str:
    public = spec.rows[0 if train else 1]
    return "" if rows == public else f"{rows:,} {what} where the public {_split(train)} split has {public:,}"


def _numbers(names: list[str]) -> str:
    return ", ".join(number for name in names for number in re.findall(r"\d+", name))
