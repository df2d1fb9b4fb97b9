"""The keyword arguments that every optimizer of ours shares, checked in one place."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvopt.optim import rules
from curvopt.subspace import refresh

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class SubspaceConfig:
    """How an optimizer splits its updates; the fields are the keyword arguments of DESIGN's constructors.

    Raises:
        ValueError, TypeError: a field is out of range or of the wrong type; the text names it.
    """

    rank: int | str | None = None
    dominant: rules.Dominant = 1.0
    bulk: float = 1.0
    refresh_every: int | str = "auto"
    overhead: float = 0.1
    start: int | str = 0
    start_threshold: float = 0.95
    start_timeout: int | None = 2000
    project: str = "update"
    metric: str = "euclidean"
    source: str = "curvature"
    layout: str = "whole"
    max_matvecs: int | None = None
    tol: float = 1e-2
    basis_dtype: torch.dtype | None = None
    max_rank: int = 32
    edge: float = 1.5
    damping: float = 1e-3
    costs: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        _one_of("project", self.project, ("update", "gradient"))
        _one_of("metric", self.metric, ("euclidean", "preconditioner"))
        _one_of("source", self.source, ("curvature", "history"))
        _one_of("layout", self.layout, ("whole", "layer"))
        self._check_rank()
        self._check_coefficients()
        if isinstance(self.start, str):
            _one_of("start", self.start, ("aligned",))
        elif isinstance(self.start, bool) or not isinstance(self.start, int) or self.start < 0:
            raise ValueError(f"start must be a step >= 0 or 'aligned', got {self.start!r}")
        for name in ("start_threshold", "tol", "edge", "overhead", "damping", "costs"):
            self._check_kind(name, numbers.Real, "a number")
        for name in ("start_timeout", "max_matvecs", "max_rank", "seed"):
            self._check_kind(name, numbers.Integral, "an int")
        if not 0 < self.start_threshold <= 1:
            raise ValueError(f"start_threshold must lie in (0, 1], got {self.start_threshold}")
        if self.start_timeout is not None and self.start_timeout < 0:
            raise ValueError(f"start_timeout must be a step >= 0 or None, got {self.start_timeout}")
        refresh.policy(self.refresh_every, self.overhead)
        for name in ("tol", "edge", "overhead"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.damping >= 0:
            raise ValueError(f"damping must be at least 0 (relative to the largest eigenvalue), got {self.damping}")
        if self.max_rank < 1:
            raise ValueError(f"max_rank must be at least 1, got {self.max_rank}")
        if self.basis_dtype is not None and self.basis_dtype not in _DTYPES:
            raise ValueError(f"basis_dtype must be a floating-point dtype or None, got {self.basis_dtype}")
        if self.costs is not None and not self.costs > 0:
            raise ValueError(f"costs, seconds of a product over seconds of a step, must be above 0, got {self.costs}")
        if self.source == "history" and self.layout != "whole":
            raise ValueError("source='history' keeps one basis over all parameters: layout='layer' needs curvature")
        if self.source == "history" and (self.metric != "euclidean" or self.rank == "edge" or self.by_eigenvalue):
            raise ValueError(
                "source='history' gives directions without curvature, so it can't serve metric='preconditioner', "
                "rank='edge' or a dominant that depends on eigenvalues"
            )

    def _check_kind(self, name: str, kind: type, words: str) -> None:
        value = getattr(self, name)
        optional = name in ("costs", "start_timeout", "max_matvecs")
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"{name} must be {words}{' or None' if optional else ''}, got {value!r}")

    def _check_rank(self) -> None:
        if self.rank is None or self.rank == "edge":
            return
        if isinstance(self.rank, bool) or not isinstance(self.rank, int):
            raise TypeError(f"rank must be an int, None or 'edge', got {self.rank!r}")
        if self.rank < 0:
            raise ValueError(f"rank must be at least 0, got {self.rank}")

    def _check_coefficients(self) -> None:
        if self.rank == 0 and self.bulk == 0:
            raise ValueError("rank=0 with bulk=0 leaves no direction to move in: give rank >= 1, or bulk above 0")
        if isinstance(self.dominant, str):
            _one_of("dominant", self.dominant, ("newton", "edge"))
        elif not callable(self.dominant):
            _finite("dominant", self.dominant)
        _finite("bulk", self.bulk)

    @property
    def by_eigenvalue(self) -> bool:
        """Whether the dominant coefficient depends on the eigenvalues."""
        return isinstance(self.dominant, str) or callable(self.dominant)

    def dominant_coefficients(self, eigenvalues: Tensor, lr: Tensor, limit: float) -> Tensor:
        """``a_i`` (k,) for Ritz values and learning rates (k,), all float64 on the CPU.

        Args:
            eigenvalues: (k,).
            lr: learning rate of each direction (k,), above 0.
            limit: for ``"edge"``, the largest ``lr * eigenvalue`` that is left alone.
        """
        if isinstance(self.dominant, str):
            rule: Callable[..., Tensor] = rules.newton if self.dominant == "newton" else rules.edge
            return rule(eigenvalues, lr, self.damping if self.dominant == "newton" else limit)
        if callable(self.dominant):
            a = torch.as_tensor(self.dominant(eigenvalues, lr), dtype=torch.float64, device="cpu")
            if a.shape not in (torch.Size([]), eigenvalues.shape):
                raise ValueError(
                    f"dominant(eigenvalues, lr) must return a number or shape {tuple(eigenvalues.shape)}, "
                    f"got {tuple(a.shape)}"
                )
            if not torch.isfinite(a).all():
                raise ValueError(f"dominant(eigenvalues, lr) returned {a.tolist()}: its numbers must be finite")
            return a.expand(eigenvalues.shape)
        return torch.full_like(eigenvalues, float(self.dominant))


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _finite(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not -1e300 < value < 1e300:
        raise ValueError(f"{name} must be a finite number, got {value!r}")
