"""What a study is: independent parts that are run once each, metrics of their results, claims about the metrics."""

from __future__ import annotations

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One unit of work: an arm with a seed. What is finished is never done again.

    Attributes:
        arm: name of the set-up, unique within a seed; letters, digits, "-", "_" and ".".
        seed: of weights, data order and probes.
        needs: arms of the same seed whose results this part starts from; they come earlier in ``Study.parts``.
    """

    arm: str
    seed: int
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the part's folder."""
        return f"seed-{self.seed}-{self.arm}"


@dataclass(frozen=True)
class Outcome:
    """What ``Study.run`` returns for a part.

    Attributes:
        values: numbers, lists and words, stored as JSON with every bit.
        tensors: for parts that need this one, and for ``metrics`` and ``figures``.
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PartResult:
    """A finished part, as read back from disk.

    Attributes:
        values: as in ``Outcome``.
        rows: what ``Lab.log`` was given, one dict a step with its ``step``.
        load: reads the tensors.
    """

    values: dict[str, Any]
    rows: list[dict[str, Any]]
    load: Callable[[], dict[str, Tensor]]

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a logged column, where it was logged."""
        kept = [(int(r["step"]), float(r[name])) for r in self.rows if r.get(name) is not None]
        return [s for s, _ in kept], [v for _, v in kept]

    def last(self, name: str) -> float:
        """Last logged value of a column, NaN if there is none."""
        values = self.column(name)[1]
        return values[-1] if values else math.nan

    def tail(self, name: str, share: float = 0.25) -> float:
        """Mean of the last ``share`` of a column's values, at least one; NaN if there is none."""
        values = self.column(name)[1]
        count = max(1, round(share * len(values)))
        return sum(values[-count:]) / count if values else math.nan


@dataclass(frozen=True)
class Value:
    """A metric of one seed, and what its null model or baseline has; NaN: could not be measured."""

    value: float
    null: float = math.nan


class Lab:
    """What a part finds at its place of work.

    Attributes:
        device: to run on.
        dataset: the data set that was found.
        needs: results of the arms that the part asked for.
    """

    def __init__(
        self,
        device: torch.device,
        dataset: str,
        needs: Mapping[str, PartResult],
        log: Callable[[int, dict[str, Any]], None] = lambda step, record: None,
        progress: Callable[[int, str], None] = lambda done, note: None,
    ) -> None:
        self.device = device
        self.dataset = dataset
        self.needs = needs
        self.rows: list[dict[str, Any]] = []
        self._log = log
        self._progress = progress

    def log(self, step: int, **columns: Any) -> None:
        """Keep a record of a step: in the part's result, its JSON Lines and W&B. Steps never fall."""
        row = {"step": step, **columns}
        self.rows.append(row)
        self._log(step, row)

    def advance(self, done: int, note: str = "") -> None:
        """Tell the progress bar how much of ``Study.length`` is done."""
        self._progress(done, note)


class Study(ABC):
    """A study: subclass it, register it, and write ``configs/study/NAME.yaml`` with its settings and claims.

    Args:
        settings: an instance of ``Settings``, from the file, the size, the data set and the command line.
        dataset: the data set at hand, the first one of the file's list that is.

    Attributes:
        Settings: dataclass of everything that determines the parts' numbers but for the seed.
    """

    name: ClassVar[str] = ""
    Settings: ClassVar[type[Any]]

    def __init__(self, settings: Any, dataset: str) -> None:
        self.settings = settings
        self.dataset = dataset

    @abstractmethod
    def parts(self, seed: int) -> Sequence[Part]:
        """The parts of one seed, those that others need first."""

    @abstractmethod
    def run(self, part: Part, lab: Lab) -> Outcome:
        """Do one part. A function of the settings, the part and ``lab.needs`` alone; divergence is a result."""

    @abstractmethod
    def metrics(self, arms: Mapping[str, PartResult]) -> dict[str, Value]:
        """The numbers that claims are about, from all arms of one seed; every ``metric`` of the file is a key."""

    @abstractmethod
    def figures(self, seeds: Mapping[int, Mapping[str, PartResult]]) -> dict[str, tuple[Any, Any]]:
        """By file name, a figure and its data (rows of dicts) as ``curvopt.diagnostics.plots`` makes them."""

    def length(self, part: Part) -> int:
        """What ``Lab.advance`` counts up to, for the bar."""
        return int(getattr(self.settings, "steps", 1))

    def check(self) -> None:  # noqa: B027 - most settings need no check of their own
        """Refuse settings that can't be run, before any work.

        Raises:
            ConfigError: names the setting.
        """

    def describe_data(self) -> str:
        """In words, which data the parts use."""
        return self.dataset


_STUDIES: dict[str, type[Study]] = {}
T = TypeVar("T", bound=type[Study])


def register(name: str) -> Callable[[T], T]:
    """Class decorator: the study's name on the command line and of its file in ``configs/study``."""

    def add(cls: T) -> T:
        if name in _STUDIES and _STUDIES[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"there is already a study named {name!r}")
        cls.name = name
        _STUDIES[name] = cls
        return cls

    return add


def all_studies() -> dict[str, type[Study]]:
    """Every study by name; imports the modules of this folder first."""
    package = importlib.import_module("benchmarks.studies")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"benchmarks.studies.{module.name}")
    return dict(sorted(_STUDIES.items()))
