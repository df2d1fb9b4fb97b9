"""A study's file: its settings by size and data set, and its claims with their thresholds, fixed before any run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from benchmarks import data
from benchmarks.config import CONFIGS, ConfigError
from benchmarks.studies.base import Study, all_studies

SIZES = ("small", "paper")
LEAST_SEEDS = 3


@dataclass
class ClaimSpec:
    """A claim as its study's file has it.

    Attributes:
        id: short and unique.
        text: the claim.
        metric: a key of ``Study.metrics``.
        at_least, at_most: the threshold; both together are a range.
        source: who claims it.
        baseline: what the null model or baseline is, in words; its values come with the metric.
        sizes: where it can be decided; elsewhere it is listed as not run.
        note: what a reader of the verdict must know, an expected failure for one.
    """

    id: str
    text: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    source: str = ""
    baseline: str = ""
    sizes: list[str] = field(default_factory=lambda: list(SIZES))
    note: str = ""

    def threshold(self) -> str:
        """In words."""
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} to {self.at_most:g}"
        return f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"

    def met(self, value: float) -> bool:
        """Whether one seed's value is on the claim's side."""
        return not (
            (self.at_least is not None and value < self.at_least) or (self.at_most is not None and value > self.at_most)
        )


@dataclass
class StudyFile:
    """``configs/study/NAME.yaml``: what all studies have; later wins: settings, sizes, per_data (by data set), overrides."""

    title: str = ""
    paper: str = ""
    question: str = ""
    data: list[str] = field(default_factory=lambda: ["mnist", "digits"])
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    per_data: dict[str, Any] = field(default_factory=dict)
    claims: list[ClaimSpec] = field(default_factory=list)


@dataclass(frozen=True)
class StudyConfig:
    """A study that can be run: its class, its resolved settings, seeds and claims."""

    name: str
    size: str
    file: StudyFile
    study: Study
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings as plain values."""
        return dataclasses.asdict(self.study.settings)

    def hash(self) -> str:
        """Eight hexadecimal digits that stand for all that determines a part's numbers but for its seed."""
        text = json.dumps([self.name, self.study.dataset, self.settings], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def folder(self, out: str | Path) -> Path:
        """Where its parts and tables are kept."""
        return Path(out) / f"{self.name}-{self.size}-{self.hash()}"


def study_names() -> list[str]:
    """Names of all studies."""
    return list(all_studies())


def load_study(
    name: str,
    size: str = "small",
    seeds: int = LEAST_SEEDS,
    overrides: Sequence[str] = (),
    path: Path | None = None,
    at_hand: Callable[[str], bool] = data.available,
) -> StudyConfig:
    """Read a study's file and resolve its settings.

    Args:
        name: of the study.
        size: small or paper.
        seeds: how many, from 0.
        overrides: ``key=value`` of its settings.
        path: of the file; ``configs/study/NAME.yaml`` by default.
        at_hand: tells whether a data set is there.

    Raises:
        ConfigError: an unknown study, size or key, a value of the wrong type or out of range, or no data.
    """
    known = all_studies()
    if name not in known:
        raise ConfigError(f"unknown study {name!r}: available: {', '.join(known)}")
    if size not in SIZES:
        raise ConfigError(f"size must be small or paper, got {size!r}")
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {seeds}")
    where = path or CONFIGS / "study" / f"{name}.yaml"
    file = read_file(where)
    dataset = next((d for d in file.data if at_hand(d)), None)
    if dataset is None:
        raise ConfigError(
            f"study {name} needs one of {', '.join(file.data)}: python -m benchmarks fetch {file.data[0]}"
        )
    cls = known[name]
    layers = [file.settings, file.sizes.get(size) or {}, file.per_data.get(dataset) or {}]
    settings = resolve(cls, layers, overrides, where)
    study = cls(settings, dataset)
    study.check()
    return StudyConfig(name, size, file, study, tuple(range(seeds)), tuple(overrides))


def read_file(path: Path) -> StudyFile:
    """A study's file.

    Raises:
        ConfigError: there is none, an unknown key, or a claim without a threshold or an id of its own.
    """
    if not path.exists():
        raise ConfigError(f"no study at {path}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(StudyFile), OmegaConf.load(path))
        file: StudyFile = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or ''}: {str(error).splitlines()[0]}") from error
    ids = [c.id for c in file.claims]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"{path}: claims need ids of their own, got {ids}")
    for claim in file.claims:
        if claim.at_least is None and claim.at_most is None:
            raise ConfigError(f"{path}: claim {claim.id} has no threshold (at_least or at_most)")
        wrong = [s for s in claim.sizes if s not in SIZES]
        if wrong:
            raise ConfigError(f"{path}: claim {claim.id}: sizes are {' and '.join(SIZES)}, got {wrong[0]!r}")
    return file


def resolve(cls: type[Study], layers: Sequence[Any], overrides: Sequence[str], path: Path) -> Any:
    """The settings that layers and ``key=value`` give, later ones first in force.

    Raises:
        ConfigError: an unknown setting, or a value of the wrong type.
    """
    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"expected KEY=VALUE, got {word!r}")
    fields = sorted(f.name for f in dataclasses.fields(cls.Settings))
    try:
        node = OmegaConf.structured(cls.Settings)
        for layer in (*layers, OmegaConf.from_dotlist(list(overrides))):
            unknown = [str(k) for k in layer if str(k) not in fields]
            if unknown:
                raise ConfigError(f"unknown setting {unknown[0]!r} of study {cls.name}: known: {', '.join(fields)}")
            node = OmegaConf.merge(node, layer)
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path.name}: {error.full_key}: {str(error).splitlines()[0]}") from error
