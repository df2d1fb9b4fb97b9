"""InitialMatrix: H0 of L-BFGS from cached eigenpairs, when they are refreshed, and what that cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvopt._errors import NonFiniteError, RankWarning, RefreshWarning, warn
from curvopt._params import ParameterLayout
from curvopt.curvature.closure import ClosureHessian
from curvopt.curvature.operator import SymmetricOperator
from curvopt.curvature.parallel import averaged
from curvopt.optim.build import make_subspace
from curvopt.optim.config import SubspaceConfig
from curvopt.optim.source import CurvatureSource
from curvopt.subspace.block import refresh_block

Closure = Callable[[], Any]


@dataclass(frozen=True)
class Schedule:
    """When the basis is refreshed, counted in iterations, and how.

    Attributes:
        at: iterations of the first refreshes, rising.
        every: period after the last of them; None for never again.
        rounds: block products of a refresh that starts from a basis.
        cold_rounds: of one that starts from noise.
        floor: smallest eigenvalue kept, relative to the largest.
        reach: largest gamma, in units of 1/lambda_k.

    Raises:
        ValueError, TypeError: a field is out of range; the text names it.
    """

    at: tuple[int, ...]
    every: int | None
    rounds: int
    cold_rounds: int
    floor: float
    reach: float

    def __post_init__(self) -> None:
        """Check every field."""
        if any(isinstance(i, bool) or not isinstance(i, int) for i in self.at):
            raise TypeError(f"refresh_at must hold iteration numbers, got {self.at!r}")
        if any(i < 0 for i in self.at) or any(a >= b for a, b in zip(self.at, self.at[1:], strict=False)):
            raise ValueError(f"refresh_at must hold iterations >= 0 in rising order, got {self.at!r}")
        if not self.at and self.every is None:
            raise ValueError("refresh_at=() with refresh_every='frozen' never computes a basis: use rank=0 for that")
        if self.every is not None and self.every < 1:
            raise ValueError(f"refresh_every must be at least 1 iteration, got {self.every}")
        for name, value in (("rounds", self.rounds), ("cold_rounds", self.cold_rounds)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < self.floor < 1:
            raise ValueError(f"floor must lie between 0 and 1, got {self.floor}")
        if not self.reach >= 1:
            raise ValueError(f"gamma_limit must be at least 1, got {self.reach}")

    def after(self, iteration: int) -> int:
        """The iteration of the refresh that follows one at ``iteration``; -1 for none."""
        later = [i for i in self.at if i > iteration]
        if later:
            return later[0]
        return -1 if self.every is None else iteration + self.every

    @property
    def first(self) -> int:
        """The iteration of the first refresh."""
        return self.at[0] if self.at else self.every or 0


class InitialMatrix:
    """``H0 = V diag(1/(lambda + 1/gamma)) V^T + gamma (I - V V^T)``, over a flat vector of length P.

    gamma is ``s.y / y.y`` of the newest pair with V projected out, held in [1/lambda_1, reach/lambda_k], lambda_k
    being the smallest eigenvalue kept; without a basis it is the plain ``s.y / y.y``, without a pair 1/lambda_k. Where V
    spans the whole space there is no bulk, and ``H0 = V diag(1/lambda) V^T``. H0 is positive definite but for
    rounding; a direction that does not descend is dropped.

    Args:
        curvature: an operator, or ``"closure"``.
        config: rank and seed.
        layout: the optimizer's flat index.
        schedule: when and how.
        closure: for ``"closure"``, the one to differentiate in place of ``step``'s.

    Attributes:
        source: where curvature comes from.
        subspace: the cached DominantSubspace, None at rank 0.
        next_refresh: the iteration of the next refresh, -1 for none.
        calls: calls of closures that curvature took.
        seconds: that refreshes took.
    """

    def __init__(
        self,
        curvature: SymmetricOperator | str | None,
        config: SubspaceConfig,
        layout: ParameterLayout,
        schedule: Schedule,
        closure: Closure | None,
    ) -> None:
        self.config = config
        self.layout = layout
        self.schedule = schedule
        self.source = CurvatureSource(curvature, config, layout.params, closure)
        self.subspace = make_subspace(self.source.operator, config, layout.params)
        self.next_refresh = schedule.first if self.subspace is not None else -1
        self.calls = 0
        self.seconds = 0.0
        self._warned_of_none = False
        self._rows: Tensor | None = None
        self._pieces: list[tuple[int, int, int]] | None = None
        self._values: Tensor | None = None
        self._tie()

    def _tie(self) -> None:
        """Make the subspace's blocks views of one flat (k, P_s) tensor, so that products need no copy of it."""
        s = self.subspace
        if s is None:
            return
        rows = torch.cat([b.reshape(s.rank, -1) for b in s.blocks], dim=1)
        s.blocks = [
            block.view(s.rank, *shape)
            for block, shape in zip(s.parameters.blocks(rows), s.parameters.shapes, strict=True)
        ]
        self._rows = rows
        mine, theirs = self.layout.index(), s.parameters
        places = [
            (mine[id(p)], start, size)
            for p, start, size in zip(theirs.params, theirs.offsets, theirs.sizes, strict=True)
        ]
        same = [i for i, _, _ in places] == list(range(len(self.layout)))
        self._pieces = None if same else [(self.layout.offsets[i], start, size) for i, start, size in places]
        self.look()

    def look(self) -> None:
        """Take over the subspace's eigenvalues, after a refresh or a load."""
        s = self.subspace
        live = 0 if s is None or not s.ready else s.live
        self._values = s.eigenvalues[:live].to(s.blocks[0]) if s is not None and live else None

    # ---- copies
    def __getstate__(self) -> dict[str, Any]:
        """Pickle each number once: the blocks are views of one tensor, which pickle would write with each of them."""
        kept = {**self.__dict__, "_rows": None, "_values": None}
        if self.subspace is not None:
            twin = object.__new__(type(self.subspace))
            twin.__dict__.update(self.subspace.__dict__, blocks=[b.clone() for b in self.subspace.blocks])
            kept["subspace"] = twin
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Tie the blocks together again."""
        self.__dict__.update(state)
        self._tie()

    def __deepcopy__(self, memo: dict[int, Any]) -> InitialMatrix:
        """Copy with the operator."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for key, value in self.__dict__.items():
            twin.__dict__[key] = copy.deepcopy(value, memo)
        twin._tie()
        return twin

    # ---- the matrix
    @property
    def kept(self) -> int:
        """Eigenpairs in use."""
        return 0 if self._values is None else len(self._values)

    @property
    def whole(self) -> bool:
        """Whether the basis spans every direction, so that there is no bulk."""
        return self.kept == self.layout.total

    def _inside(self, vectors: Tensor) -> Tensor:
        """The part of (P,) or (m, P) that lies in the subspace's parameters."""
        if self._pieces is None:
            return vectors
        return torch.cat([vectors[..., i : i + size] for i, _, size in self._pieces], dim=-1)

    def _live_rows(self) -> Tensor:
        assert self._rows is not None
        return self._rows[: self.kept]

    def _add(self, vectors: Tensor, weights: Tensor) -> None:
        """``vectors += weights V^T`` in place: vectors (m, P), weights (m, kept)."""
        part = weights @ self._live_rows()
        if self._pieces is None:
            vectors.add_(part)
            return
        for i, start, size in self._pieces:
            vectors[:, i : i + size] += part[:, start : start + size]

    def gamma(self, pair: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """The bulk's inverse curvature as a 0-d tensor; None where nothing is known of it.

        Args:
            pair: the newest (s, y), or None.
        """
        if self._values is None:
            return None if pair is None else torch.dot(*pair) / torch.dot(pair[1], pair[1])
        unit = 1.0 / self._values[-1]
        if pair is None or self.whole:
            return unit
        bulk = torch.stack(pair)
        self._add(bulk, -(self._inside(bulk) @ self._live_rows().T))
        step, change = bulk
        found = torch.dot(step, change) / torch.dot(change, change)
        # Not held above 1/lambda_k: once the basis has turned away, the bulk holds larger curvature than lambda_k.
        found = torch.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)
        return found.clamp(1.0 / self._values[0], self.schedule.reach * unit)

    def apply(self, vector: Tensor, gamma: Tensor | None) -> Tensor:
        """``H0 q`` for a vector (P,), as a new tensor."""
        out = vector.clone() if gamma is None else vector * gamma
        if self._values is None:
            return out
        assert gamma is not None
        if self.whole:
            weights = 1.0 / self._values
            out.zero_()
        else:
            weights = 1.0 / (self._values + 1.0 / gamma) - gamma
        inside = torch.mv(self._live_rows(), self._inside(vector))
        self._add(out[None], (weights * inside)[None])
        return out

    # ---- refreshing
    def due(self, iteration: int) -> bool:
        """Whether a refresh is due before this iteration."""
        return self.subspace is not None and 0 <= self.next_refresh <= iteration

    def refresh(self, closure: Closure | None, iteration: int | None = None) -> None:
        """Refresh now; a failure keeps the basis and warns.

        Args:
            closure: the one passed to ``step`` or ``refresh``.
            iteration: that the schedule asked for; None leaves the schedule as it is.

        Raises:
            ValueError: rank is 0, or operator or closure is missing.
            Exception: what curvature raised, where there is no basis yet (but not NaN curvature, which warns).
        """
        s = self.subspace
        if s is None:
            raise ValueError("rank=0 has no subspace to refresh")
        began = time.perf_counter()
        operator = self.source.now(closure, s.parameters)
        if self.source.from_closure and isinstance(operator, ClosureHessian):
            # One-sided differences cost half; in float32 their noise would lie above the floor.
            operator.scheme = "forward" if operator.dtype == torch.float64 else "central"
        before = operator.closure_calls if isinstance(operator, ClosureHessian) else 0
        how = self.schedule
        try:
            s.operator = averaged(operator)
            with self.source.gradients_aside(self.layout.params, s.parameters):
                refresh_block(s, rounds=how.rounds, cold_rounds=how.cold_rounds, floor=how.floor)
        except Exception as error:  # data that raise may raise anything
            if not s.ready and not isinstance(error, NonFiniteError):
                raise
            state = f"the basis of {s.age} iterations ago stays in use" if s.ready else "there is no basis yet"
            warn(f"a refresh failed, {state}: {type(error).__name__}: {error}", RefreshWarning)
        finally:
            if isinstance(operator, ClosureHessian):
                self.calls += operator.closure_calls - before
            self.seconds += time.perf_counter() - began
            if iteration is not None:
                self.next_refresh = how.after(iteration)
        self.look()
        if s.ready and not self.kept and not self._warned_of_none:
            self._warned_of_none = True
            warn(
                f"no curvature eigenvalue is positive ({s.reason}): until the next refresh this is plain L-BFGS. "
                "A GGN has no negative eigenvalue",
                RankWarning,
            )

    def attach(self, operator: SymmetricOperator) -> None:
        """Put an operator over the same parameters in the place of a dropped or an old one.

        Raises:
            ValueError: rank is 0, or its parameters are not the subspace's.
            TypeError: it is no operator.
        """
        if self.subspace is None:
            raise ValueError("rank=0 uses no operator")
        self.source.attach(operator, self.subspace.parameters)
        self.subspace.attach(operator)


def make_schedule(
    at: Sequence[int], every: int | str, rounds: int, cold_rounds: int, floor: float, reach: float
) -> Schedule:
    """A checked Schedule from the optimizer's arguments.

    Raises:
        ValueError, TypeError: see ``Schedule``.
    """
    if isinstance(every, str) and every != "frozen":
        raise ValueError(f"refresh_every must be a number of iterations or 'frozen', got {every!r}")
    if isinstance(every, bool) or not isinstance(every, (int, str)):
        raise TypeError(f"refresh_every must be an int or 'frozen', got {every!r}")
    return Schedule(tuple(at), None if isinstance(every, str) else every, rounds, cold_rounds, floor, reach)
