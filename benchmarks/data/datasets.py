"""The typed objects that `load` returns: tensors, where they came from, and what a reader of results must know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

__all__ = ["CharData", "Dataset", "ImageData", "SentenceData"]


@dataclass(frozen=True)
class Dataset(ABC):
    """What every data set tells.

    Attributes:
        name: The catalogue's name.
        split: "train" or "test".
        source: Where it was read: "folder PATH", "cache PATH" or "bundled with scikit-learn".
        note: What differs from the public set ("" if nothing), to be shown beside results.
    """

    name: str
    split: str
    source: str
    note: str

    def describe(self) -> str:
        """One line for logs and reports."""
        return f"{self.name} {self.split}: {len(self):,} rows from {self.source}" + (f"; {self.note}" * bool(self.note))

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows, or of characters for a text."""


@dataclass(frozen=True)
class ImageData(Dataset):
    """Labelled images.

    Attributes:
        inputs: (N, C, H, W), uint8 as stored, or float32 standardised per channel.
        targets: (N,) int64 class numbers.
        classes: Number of classes.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class SentenceData(Dataset):
    """Labelled sentences, words separated by blanks.

    Attributes:
        sentences: N texts.
        targets: (N,) int64 class numbers.
        classes: Number of classes.
    """

    sentences: tuple[str, ...]
    targets: torch.Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.sentences)


@dataclass(frozen=True)
class CharData(Dataset):
    """A text as character numbers.

    Attributes:
        ids: (N,) int64 positions in `alphabet`.
        alphabet: The distinct characters of the whole text (both splits), sorted by code point.
    """

    ids: torch.Tensor
    alphabet: str

    def __len__(self) -> int:
        return len(self.ids)

    def decode(self, ids: torch.Tensor) -> str:
        """The text of character numbers."""
        return "".join(self.alphabet[int(i)] for i in ids.reshape(-1))
