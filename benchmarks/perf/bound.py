"""Why a figure is what it is: a profile by kind of operation, and a bound from multiplications and bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from benchmarks.perf.timing import Work, multiplications, nothing, seconds

SIDE = 2048  # of the square product that a machine's rate is read from
READ = 2**26  # float32 numbers: beyond any cache
NAMED = 4  # operations of a profile that are named


@dataclass(frozen=True)
class Rates:
    """What a machine reaches in float32 with the threads in use.

    Attributes:
        flops: operations a second of a square matrix product.
        bytes: bytes a second that a sum over far more than the cache reads.
    """

    flops: float
    bytes: float

    @classmethod
    def measured(cls, device: torch.device) -> Rates:
        """The best of five."""
        a, far = torch.randn(SIDE, SIDE, device=device), torch.ones(READ, device=device)
        product = min(seconds(lambda: a @ a, device) for _ in range(5))
        reading = min(seconds(lambda: far.sum(), device) for _ in range(5))
        return cls(2 * SIDE**3 / product, READ * far.element_size() / reading)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations other than matrix products and convolutions read and write, once each.

    Views move nothing. What stays in a cache costs less than these bytes at the memory's rate, what an operation
    computes beside them (an exponential) costs more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            return out
        read = list(_tensors((args, kwargs)))
        known = {t.untyped_storage().data_ptr() for t in read}
        written = list(_tensors(out))
        if func._schema.is_mutable or any(t.untyped_storage().data_ptr() not in known for t in written):
            self.bytes += sum(_touched(t) for t in (*read, *written))
        return out


def _tensors(item: Any) -> Iterator[Tensor]:
    return (t for t in tree_iter(item) if isinstance(t, Tensor))


def _touched(t: Tensor) -> int:
    """Bytes of a tensor that lie apart in memory: an expanded one is as small as what it was expanded from."""
    distinct = 1
    for length, stride in zip(t.shape, t.stride(), strict=True):
        distinct *= length if stride else 1
    return distinct * t.element_size()


@dataclass(frozen=True)
class Profile:
    """Where a piece of work spends its time.

    Attributes:
        total: seconds.
        products: seconds of matrix products and convolutions.
        others: {operation: seconds} of the rest, longest first.
        flops: operations of the products.
        bytes: what the others read and write.
    """

    total: float
    products: float
    others: dict[str, float]
    flops: int
    bytes: int

    @property
    def outside(self) -> float:
        """Seconds outside of torch's operations."""
        return max(self.total - self.products - sum(self.others.values()), 0.0)

    @classmethod
    def of(cls, work: Work, device: torch.device, prepare: Work = nothing) -> Profile:
        """Run it four times, each after ``prepare``: plainly, under the profiler, and under the two counters."""
        prepare()
        work()
        prepare()
        cuda = device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as record:
            start = time.perf_counter()  # the profiler's own clock: shares of it, whatever else the machine does
            work()
            if cuda:
                torch.cuda.synchronize(device)
            total = time.perf_counter() - start
        products, others = 0.0, {}
        for event in record.key_averages():
            spent = (event.self_device_time_total if cuda else event.self_cpu_time_total) * 1e-6
            if _is_product(event.key):
                products += spent
            elif spent:
                others[event.key.removeprefix("aten::")] = spent
        ordered = dict(sorted(others.items(), key=lambda item: -item[1]))
        prepare()
        with Traffic() as traffic:
            work()
        prepare()
        return cls(total, products, ordered, multiplications(work), traffic.bytes)


def _is_product(name: str) -> bool:
    packet = name.removeprefix("aten::")
    return "conv" in packet or packet in {p.__name__ for p in flop_registry}


def explain(
    work: Work,
    unit: Work,
    taken: float,
    rates: Rates,
    device: torch.device,
    share: int = 1,
    prepare: Work = nothing,
) -> str:
    """A profile and a bound in words, in gradients.

    The bound is that of the multiplications at the rate that the gradient's own have, and of the other operations'
    bytes at the rate at which a long sum is read.

    Args:
        work: what took ``taken`` gradients a piece.
        unit: the gradient.
        taken: measured.
        rates: of the machine.
        device: where.
        share: pieces in ``work``.
        prepare: comes before ``work`` and is not part of it.
    """
    found, gradient = Profile.of(work, device, prepare), Profile.of(unit, device)
    scale = taken / found.total
    named = list(found.others.items())
    parts = [f"{name} {spent * scale:.2f}" for name, spent in named[:NAMED]]
    rest = sum(spent for _, spent in named[NAMED:]) * scale
    once = gradient.total
    pace = gradient.flops / gradient.products
    products = found.flops / pace / once / share
    moved = found.bytes / rates.bytes / once / share
    return (
        f"Profile: of {taken:.2f} gradients {found.products * scale:.2f} are matrix products and convolutions, "
        f"{', '.join(parts)}, other operations {rest:.2f}, outside of torch's operations {found.outside * scale:.2f}. "
        f"Bound: {found.flops / gradient.flops / share:.2f} times a gradient's multiplications at the rate that the "
        f"gradient's own reach ({pace / 1e9:.0f} GFLOP/s; a square product of {SIDE}: {rates.flops / 1e9:.0f}) take "
        f"{products:.2f} gradients, and {found.bytes / share / 2**20:.0f} MiB that the other operations read and write "
        f"at {rates.bytes / 1e9:.0f} GB/s take {moved:.2f}: {products + moved:.2f} together."
    )
