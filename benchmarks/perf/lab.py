"""What the rows share: trained problems, judges, the gradient that is the unit, and the peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import Peers
from benchmarks.perf.bound import Rates, explain
from benchmarks.perf.problems import PROBLEMS, Pair, Problem, Trained
from benchmarks.perf.record import Figure
from benchmarks.perf.timing import Timing, Work, alternate, multiplications, nothing
from benchmarks.perf.verify import Judge

EXACT_STEP = 200


class Lab:
    """Problems, references and settings of one call of the benchmark.

    Args:
        device: where everything runs.
        rounds: of a timing.
        say: takes a line about progress.
        problems: what the names that rows ask for stand for.
    """

    def __init__(
        self,
        device: torch.device,
        rounds: int,
        say: Callable[[str], None],
        problems: Mapping[str, Problem] = PROBLEMS,
    ) -> None:
        self.device = device
        self.rounds = rounds
        self.say = say
        self.problems = problems
        self._trained: dict[str, Trained] = {}
        self._judges: dict[str, Judge] = {}

    @cached_property
    def peers(self) -> Peers:
        """What could be imported."""
        return Peers()

    def trained(self, name: str) -> Trained:
        """A problem, trained once."""
        if name not in self._trained:
            self._trained[name] = Trained(self.problems[name], self.device)
        return self._trained[name]

    def judge(self, name: str) -> Judge:
        """Its references."""
        if name not in self._judges:
            self._judges[name] = Judge(self.trained(name))
        return self._judges[name]

    def vectors(self, size: int, count: int) -> Tensor:
        """Random rows (count, P)."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(count, size, generator=generator).to(self.device)

    def times(
        self, reference: Work, sides: Mapping[str, Work], rounds: int | None = None, prepare: Work = nothing
    ) -> dict[str, Timing]:
        """``timing.alternate`` with this call's settings."""
        return alternate(reference, sides, rounds or self.rounds, self.device, prepare)

    @cached_property
    def rates(self) -> Rates:
        """What the machine reaches."""
        return Rates.measured(self.device)

    def explain(self, work: Work, unit: Work, taken: float, share: int = 1, prepare: Work = nothing) -> str:
        """``bound.explain`` with this machine's rates."""
        return explain(work, unit, taken, self.rates, self.device, share, prepare)


def gradient(model: nn.Module, loss_fn: nn.Module, batch: Pair) -> Work:
    """The unit: forward and backward of the same batch."""
    params = list(model.parameters())
    x, y = batch

    def work() -> Any:
        return torch.autograd.grad(loss_fn(model(x), y), params)

    return work


def relative_flops(work: Work, reference: Work) -> float | None:
    """Multiplications of ``work`` in units of the reference's; None where they can't be counted."""
    try:
        return multiplications(work) / multiplications(reference)
    except Exception:  # peers with transforms of their own may refuse the counter in any way they like
        return None


def figure(
    side: str, timing: Timing, right: bool | None = None, evidence: str = "", flops: float | None = None
) -> Figure:
    """A timed side."""
    return Figure(side, timing.ratio, (timing.low, timing.high), right, evidence, flops)
