"""The batches of one matrix: what ``data`` may be, when it is read, and how it reaches the parameters' device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from curvopt._errors import EmptyDataError
from curvopt.curvature.quiet import forked_rng, mixed_seed

FORMS = "one (inputs, targets) pair, a list of batches, a DataLoader, or a function that returns a batch"


@dataclasses.dataclass(eq=False)
class Batch:
    """One kept batch.

    Attributes:
        raw: the batch as it was given (``placed`` ones: on the parameters' device).
        number: its place among the batches; part of the seed of its dropout masks.
        weight: what its own mean loss divides by (see ``curvopt.curvature.reduction``).
        share: factor on its loss, so that the sum over batches is the loss of the concatenated data.
    """

    raw: Any
    number: int = 0
    weight: float = 1.0
    share: float = 1.0

    @property
    def is_pair(self) -> bool:
        """Whether it is (inputs, targets)."""
        return isinstance(self.raw, (tuple, list)) and len(self.raw) == 2

    @property
    def inputs(self) -> Any:
        """First half of a pair, else the whole batch."""
        return self.raw[0] if self.is_pair else self.raw

    @property
    def targets(self) -> Any:
        """Second half of a pair, else the whole batch."""
        return self.raw[1] if self.is_pair else self.raw


# ---- tensors inside a batch
def tensors_in(item: Any) -> Iterator[Tensor]:
    """Tensors of a nest of tuples, lists, mappings and dataclasses, in order."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from tensors_in(value)
    elif isinstance(item, (tuple, list)):
        for value in item:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(item) and not isinstance(item, type):
        for field in dataclasses.fields(item):
            yield from tensors_in(getattr(item, field.name))


def map_tensors(item: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with ``function`` applied to its tensors; what holds none is passed on as it is."""
    if isinstance(item, Tensor):
        return function(item)
    if isinstance(item, torch.nn.utils.rnn.PackedSequence):
        if item.data.is_floating_point():
            return item._replace(data=function(item.data))
        return item
    if isinstance(item, Mapping):
        values = {key: map_tensors(value, function) for key, value in item.items()}
        if type(item) is dict or all(values[k] is item[k] for k in values):
            return values if type(item) is dict else item
        twin = copy.copy(item)  # BatchEncoding and the like keep their type
        for key, value in values.items():
            twin[key] = value  # type: ignore[index]
        return twin
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(map_tensors(value, function) for value in item))
    if isinstance(item, (tuple, list)):
        return type(item)(map_tensors(value, function) for value in item)
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        twin = copy.copy(item)  # type: ignore[arg-type]
        for field in dataclasses.fields(item):
            object.__setattr__(twin, field.name, map_tensors(getattr(item, field.name), function))
        return twin
    return item


def place(item: Any, device: torch.device) -> Any:
    """The batch on ``device``; the same object where nothing has to move."""
    if isinstance(item, torch.nn.utils.rnn.PackedSequence):
        return item.to(device)  # type: ignore[arg-type]
    if all(t.device == device for t in tensors_in(item)):
        found = next(tensors_in(item), None)
        if found is not None or not hasattr(item, "to"):
            return item
        return copy.copy(item).to(device)  # an object of a library's own: its .to may write to itself
    return map_tensors(item, lambda t: t.to(device))


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that hold its numbers: itself, or indices and values of a sparse one."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def nbytes(item: Any) -> int:
    """Bytes of the tensors of a batch."""
    return sum(t.numel() * t.element_size() for t in tensors_in(item))


def example_count(item: Any) -> int | None:
    """Length of the first tensor of a batch (1 for a 0-dimensional one); None where there is no tensor."""
    first = next(tensors_in(item), None)
    if first is None:
        return None
    return first.shape[0] if first.dim() else 1


# ---- where batches come from
def is_one_batch(data: Any) -> bool:
    """Whether ``data`` is a single batch: a tuple, a mapping, a tensor, a list with a tensor in it, another object."""
    if isinstance(data, (tuple, Mapping, Tensor)):
        return True
    if isinstance(data, list):
        return any(isinstance(entry, Tensor) for entry in data)
    return not isinstance(data, Iterable) and not callable(data)


@contextmanager
def untouched(loader: Any, seed: int) -> Iterator[None]:
    """Put a DataLoader's own generators and persistent workers aside while it is read."""
    if not isinstance(loader, DataLoader):
        yield
        return
    owners = [loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    generators = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    states = [(g, g.get_state()) for g in generators.values()]
    running = loader._iterator  # iterating a loader with persistent workers would reset a loop that is under way
    loader._iterator = None
    try:
        for g in generators.values():
            g.manual_seed(seed)
        yield
    finally:
        loader._iterator = running
        for g, state in states:
            g.set_state(state)


class DataSource:
    """Reads ``data`` once a generation.

    A list of tensors is one batch, a tuple, a mapping or an object that can't be iterated is one batch; a list of
    these is several. A DataLoader, or any other iterable that can be read again, and a function without arguments are
    read once a generation, with torch's, Python's and numpy's global generators and the loader's own seeded from
    (seed, generation) and put back afterwards: the same generation gives the same order, and nothing global moves.
    (An iterable batch object, PyTorch Geometric's for one, goes in as a list of one.)

    Args:
        data: see above.

    Raises:
        TypeError: a bare Dataset or an iterator.
        EmptyDataError: a list with nothing in it.
    """

    def __init__(self, data: Any) -> None:
        if data is None:
            raise TypeError(f"data is None; give {FORMS}")
        if isinstance(data, Dataset):
            raise TypeError(f"data is a bare {type(data).__name__}, which yields single examples: use a DataLoader")
        if isinstance(data, Iterator):
            raise TypeError(f"data is an iterator ({type(data).__name__}), which can be read only once; give {FORMS}")
        if isinstance(data, list) and not data:
            raise EmptyDataError("data is an empty list: curvature needs at least one batch")
        self.data = data

    @property
    def renewable(self) -> bool:
        """Whether a new generation may bring other data."""
        return not is_one_batch(self.data) and not isinstance(self.data, list)

    def read(self, seed: int, device: torch.device) -> list[Any]:
        """Batches, under generators seeded with ``seed``.

        Raises:
            EmptyDataError: no batch, or a batch without examples.
        """
        if is_one_batch(self.data):
            batches = [self.data]
        elif isinstance(self.data, list):
            batches = list(self.data)
        else:
            with forked_rng(device, seed, everything=True), untouched(self.data, mixed_seed(seed, "loader")):
                if callable(self.data) and not isinstance(self.data, Iterable):
                    answer = self.data()
                    batches = [answer] if is_one_batch(answer) else list(answer)
                else:
                    batches = list(self.data)
        if not batches:
            raise EmptyDataError(f"data ({type(self.data).__name__}) gave no batch; give {FORMS}")
        for number, batch in enumerate(batches):
            if batch is None:
                raise TypeError(f"data gave None as batch {number}; give {FORMS}")
            if example_count(batch) == 0:
                raise EmptyDataError(f"data: batch {number} holds no example (its first tensor has length 0)")
        return batches
