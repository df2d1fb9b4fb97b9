"""From stored data to a network's inputs: standardised images, windows of characters, numbered words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .errors import DataError

__all__ = ["Vocabulary", "channel_statistics", "char_windows", "standardize"]


def standardize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float], *, top: int = 255) -> torch.Tensor:
    """(images / top - mean) / std for each channel, in float32.

    Args:
        images: (N, C, H, W) uint8.
        mean, std: C numbers, of images scaled to [0, 1].
        top: The stored value of full brightness (255; 16 for scikit-learn's digits).
    """
    if images.dim() != 4 or len(mean) != images.shape[1] or len(std) != images.shape[1]:
        raise DataError(
            f"images of shape {tuple(images.shape)} with {len(mean)} means and {len(std)} deviations: "
            "expected (N, C, H, W) and C of each"
        )
    shape = (1, -1, 1, 1)
    scaled = images.to(torch.float32) / top
    return (scaled - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(shape)


def channel_statistics(images: torch.Tensor, *, top: int = 255) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of (N, C, H, W) uint8 images scaled to [0, 1], in float64."""
    scaled = images.to(torch.float64) / top
    mean, std = scaled.mean((0, 2, 3)), scaled.std((0, 2, 3), correction=0)
    return tuple(mean.tolist()), tuple(std.tolist())


def char_windows(ids: torch.Tensor, length: int = 64, *, limit: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cuts a text into windows that do not overlap; the target of each character is the next one.

    Args:
        ids: (N,) character numbers.
        length: Characters in a window.
        limit: Keep the first `limit` windows.

    Returns:
        Inputs and targets, both (windows, length) int64; a rest shorter than a window is left out.

    Raises:
        DataError: If the text is too short for one window, or for `limit` of them.
    """
    count = (len(ids) - 1) // length if len(ids) else 0
    if count < 1 or (limit is not None and not 1 <= limit <= count):
        wanted = f"{limit} windows" if limit is not None else "a window"
        raise DataError(f"{len(ids)} characters give {max(count, 0)} windows of {length}, asked for {wanted}")
    count = limit or count
    inputs = ids[: count * length].reshape(count, length)
    return inputs, ids[1 : count * length + 1].reshape(count, length)


@dataclass(frozen=True)
class Vocabulary:
    """Words and their numbers: 0 is padding, 1 any unknown word.

    Attributes:
        words: The known words; `words[i]` has number i + 2.
    """

    words: tuple[str, ...]

    PAD = 0
    UNKNOWN = 1

    @classmethod
    def build(cls, sentences: Iterable[str], *, min_count: int = 2, max_words: int | None = None) -> Vocabulary:
        """The words (split at blanks) that occur at least `min_count` times, the most frequent first.

        Words of equal frequency come in alphabetical order, so the numbers depend on the sentences alone.
        """
        counts = Counter(word for sentence in sentences for word in sentence.split())
        ranked = sorted((-count, word) for word, count in counts.items() if count >= min_count)
        return cls(tuple(word for _, word in ranked[:max_words]))

    def __len__(self) -> int:
        """The number of distinct numbers, padding and unknown included: the rows that an embedding needs."""
        return len(self.words) + 2

    def encode(self, sentences: Sequence[str], *, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of the words of each sentence, cut or padded at its end.

        Returns:
            ids (N, length) int64, and lengths (N,) int64 with the words that are no padding (at least 1).
        """
        if length < 1:
            raise DataError(f"length={length!r}: expected at least 1")
        number = {word: i + 2 for i, word in enumerate(self.words)}
        ids = torch.zeros(len(sentences), length, dtype=torch.int64)
        lengths = torch.ones(len(sentences), dtype=torch.int64)
        for row, sentence in enumerate(sentences):
            known = [number.get(word, self.UNKNOWN) for word in sentence.split()[:length]] or [self.UNKNOWN]
            ids[row, : len(known)] = torch.tensor(known)
            lengths[row] = len(known)
        return ids, lengths
