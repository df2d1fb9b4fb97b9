"""DominantSubspace: the cached eigenbasis, its evidence, and how it is brought up to date."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from curvopt._params import ParameterLayout
from curvopt.curvature.count import ProductCount
from curvopt.curvature.operator import SymmetricOperator
from curvopt.subspace import notices
from curvopt.subspace.checks import check_block, check_gain, check_start
from curvopt.subspace.solve import Cached, Plan, RefreshReport, Solution, Spectrum, solve, solve_above, solve_from

Cutoff = Callable[[Tensor, Sequence[int]], Tensor]


class DominantSubspace:
    """The k leading eigenvectors of a curvature operator, cached as one contiguous (k, ``p.shape``) block a parameter.

    One pair more than k is carried along: it shows whether the spectrum has a gap at k, and lets a new leader in
    that the old basis cannot see.

    Args:
        operator: what is multiplied; may be given later (``.operator = ...``) if ``parameters`` is.
        rank: k, or with ``adaptive`` the most rows that are kept.
        parameters: layout of the flat index; the operator's own by default.
        layout: ``"whole"``, one basis over all parameters, or ``"layer"``, one of rank k a layer.
        adaptive: keep only the eigenvalues above the cutoff given to ``refresh``; the other rows are zero.
        dtype: of the cached basis; the operator's by default.
        tol: relative residual that a Krylov refresh aims at.
        max_matvecs: cap on the products of one refresh and layer; 4k + 20 by default.
        seed: of start vectors.
        gain: share of the news that a power step takes, in (0, 1]; below 1 the basis averages over changing batches.

    Attributes:
        age: steps since the last refresh, counted by whoever takes the steps.
        refreshes: successful refreshes so far.
        matvecs, seconds_products: products spent so far, those of failed refreshes included, and their time here.
        overlap: of the last two bases, NaN before the second refresh.
        reason: the last refresh in words.

    Raises:
        ValueError: rank below 1 or above the number of parameters, an unknown layout, no layout to be had.
    """

    def __init__(
        self,
        operator: SymmetricOperator | None,
        rank: int,
        *,
        parameters: ParameterLayout | None = None,
        layout: str = "whole",
        adaptive: bool = False,
        dtype: torch.dtype | None = None,
        tol: float = 1e-2,
        max_matvecs: int | None = None,
        seed: int = 0,
        gain: float = 1.0,
    ) -> None:
        check_gain(gain)
        known = parameters if parameters is not None else operator.layout if operator is not None else None
        if known is None:
            raise ValueError("the operator has no parameter layout; give parameters=ParameterLayout([...])")
        if layout not in ("whole", "layer"):
            raise ValueError(f"layout must be 'whole' or 'layer', got {layout!r}")
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if rank > known.total:
            raise ValueError(f"rank={rank} is larger than the number of parameters under the operator, {known.total}")
        if max_matvecs is not None and max_matvecs < rank:
            raise ValueError(f"max_matvecs={max_matvecs} is below rank={rank}: each vector needs a product")
        self.operator = operator
        self.parameters = known
        self.rank = rank
        self.layout = layout
        self.adaptive = adaptive
        self.tol = tol
        self.max_matvecs = 4 * rank + 20 if max_matvecs is None else max_matvecs
        self.seed, self.gain = seed, gain
        self.age = self.refreshes = self.attempts = self.matvecs = 0
        self.seconds_products = 0.0
        self.overlap, self.reason = math.nan, "never refreshed"
        self.dtype = known.dtype if dtype is None else dtype
        self._groups: list[list[int]] | None = [list(range(len(known)))] if layout == "whole" else None
        self._layers: list[SymmetricOperator] | None = None
        if operator is not None:
            self._find_layers()
        self.blocks = [self._zeros((rank, *shape)) for shape in known.shapes]
        self.probes = [self._zeros(tuple(shape)) for shape in known.shapes]
        self._reset_spectrum()
        self._gap_warned = self._cap_warned = False
        self._first_matvecs = self._earlier_steps = 0

    def _zeros(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.parameters.device)

    def _reset_spectrum(self) -> None:
        shape = (len(self.groups), self.rank)
        self._values = torch.zeros(shape, dtype=torch.float64, device="cpu")
        self._residuals = torch.full(shape, math.inf, dtype=torch.float64, device="cpu")
        self._next, self._next_residuals = torch.zeros(2, shape[0], dtype=torch.float64, device="cpu")
        self._has_probe = [False] * shape[0]
        self._converged = torch.zeros(shape[0], dtype=torch.bool, device="cpu")
        self.mass = torch.zeros(len(self.parameters), self.rank, dtype=torch.float64, device="cpu")

    def _find_layers(self) -> None:
        if self.layout == "whole" or self.operator is None:
            return
        layers = getattr(self.operator, "layers", None)
        if layers is None:
            raise ValueError("layout='layer' needs an operator with layers() (Hessian, GGN); this one has none")
        index = self.parameters.index()
        self._layers = list(layers().values())
        self._groups = [[index[id(p)] for p in op.layout.params] for op in self._layers]  # type: ignore[union-attr]

    def attach(self, operator: SymmetricOperator) -> None:
        """Put an operator over the same parameters in the place of the present one."""
        self.operator = operator
        self._layers = None
        self._find_layers()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the operator: it holds the model and the data."""
        return {**self.__dict__, "operator": None, "_layers": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> DominantSubspace:
        """Copy with the operator."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for key, value in self.__dict__.items():
            setattr(twin, key, copy.deepcopy(value, memo))
        return twin

    # ---- what is cached
    @property
    def groups(self) -> list[list[int]]:
        """Positions of the parameters that share one basis: all of them, or one list a layer."""
        if self._groups is None:
            raise ValueError("layout='layer' needs its operator before it is used")
        return self._groups

    @property
    def ready(self) -> bool:
        """Whether there is a basis at all."""
        return self.refreshes > 0

    @property
    def eigenvalues(self) -> Tensor:
        """Ritz values (k,), or (layers, k); float64 on the CPU; zero where a row is not live."""
        return self._values[0] if self.layout == "whole" else self._values

    @property
    def residual_norms(self) -> Tensor:
        """``||A v_i - lambda_i v_i||`` as ``eigenvalues``; after an image, of the vectors it started from."""
        return self._residuals[0] if self.layout == "whole" else self._residuals

    @property
    def live(self) -> int:
        """Rows that hold an eigenvector; the others are zero (summed over layers)."""
        return int((self._values > 0).sum())

    @property
    def gap(self) -> float:
        """``lambda_k / lambda_{k+1}`` (the smallest over layers); infinite where the next value is not positive."""
        last, following = self._values[:, -1], self._next
        return float(torch.where(following > 0, last / following.clamp_min(1e-300), math.inf).min())

    @property
    def basis(self) -> Tensor:
        """(P, k), columns ordered as ``eigenvalues``; a copy. Per layer (P, layers * k), zero outside the layer."""
        pieces = []
        for group in self.groups:
            rows = torch.zeros(self.rank, self.parameters.total, dtype=self.dtype, device=self.parameters.device)
            for i in group:
                start = self.parameters.offsets[i]
                rows[:, start : start + self.parameters.sizes[i]] = self.blocks[i].reshape(self.rank, -1)
            pieces.append(rows)
        return torch.cat(pieces).T

    @property
    def later_matvecs(self) -> int:
        """Products spent since the first refresh, which a budget for refreshes must cover."""
        return self.matvecs - self._first_matvecs if self.ready else 0

    @property
    def later_steps(self) -> int:
        """Steps taken since the first refresh."""
        return self._earlier_steps + self.age if self.ready else 0

    def _rows(self, group: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.cat([self.blocks[i].reshape(self.rank, -1) for i in group], dim=1).to(dtype)

    def _size(self, g: int) -> int:
        return sum(self.parameters.sizes[i] for i in self.groups[g])

    # ---- projecting
    @overload
    def project(self, update: Tensor) -> Tensor: ...
    @overload
    def project(self, update: list[Tensor]) -> list[Tensor]: ...
    def project(self, update: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """``P_k u`` for a vector (P,) or a list of tensors shaped like the parameters, in the dtype of ``update``."""
        if isinstance(update, Tensor):
            return torch.cat([piece.reshape(-1) for piece in self.project(self.parameters.views(update))])
        out: list[Tensor] = [torch.zeros_like(u) for u in update]
        for group in self.groups:
            rows = [self.blocks[i].reshape(self.rank, -1).to(update[i].dtype) for i in group]
            c = torch.stack([r @ update[i].reshape(-1) for r, i in zip(rows, group, strict=True)]).sum(0)
            for r, i in zip(rows, group, strict=True):
                out[i] = (c @ r).view(update[i].shape)
        return out

    @overload
    def split(self, update: Tensor) -> tuple[Tensor, Tensor]: ...
    @overload
    def split(self, update: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]: ...
    def split(self, update: Any) -> Any:
        """(dominant, bulk) parts of a vector (P,) or of a list of tensors; their sum is ``update``."""
        dominant = self.project(update)
        if isinstance(update, Tensor):
            return dominant, update - dominant
        return dominant, [u - d for u, d in zip(update, dominant, strict=True)]

    # ---- refreshing
    def refresh(
        self, *, cold: bool = False, cutoff: Cutoff | None = None, start: Tensor | None = None
    ) -> RefreshReport:
        """Bring the basis up to date at the parameters' present values.

        If anything raises, nothing has changed but the counts of attempts and of products.

        Args:
            cold: start from noise even when a basis is cached.
            cutoff: for an adaptive rank, maps candidate rows (m, P_g) and the positions of their parameters to the
                smallest eigenvalue (m,) that is kept.
            start: (P, rank), a start in the place of the cached basis, such as ``class_directions(operator)``: one power
                step from there, and Lanczos where that was not near enough.

        Raises:
            ValueError: no operator; adaptive without ``cutoff``; ``start`` of a wrong shape or where it can't be used.
            NonFiniteError: the curvature is NaN or infinite.
            CurvatureError: a product can't be computed.
        """
        if self.operator is None:
            raise ValueError("no curvature operator is attached (pickling drops it): set .operator before refreshing")
        if self.adaptive and cutoff is None:
            raise ValueError("an adaptive rank needs cutoff")
        if start is not None:
            check_start(start, (self.parameters.total, self.rank), self.layout == "whole" and not self.adaptive)
        if self._layers is None and self.layout == "layer":
            self._find_layers()
        self.attempts += 1
        operators = [self.operator] if self._layers is None else self._layers
        solutions, spent = [], ProductCount(operators)
        try:
            self.operator.renew(self.attempts)
            with self.operator.hold(), spent:
                for g, operator in enumerate(operators):
                    solutions.append(self._solve(g, operator, cold, cutoff, start))
        finally:
            self.matvecs += spent.matvecs
            self.seconds_products += spent.seconds
        return self._commit(solutions, spent.matvecs)

    def _plan(self, g: int) -> Plan:
        return Plan(min(self.rank, self._size(g)), self.tol, self.max_matvecs, self.seed + self.attempts, self.gain)

    def _spectrum(self, g: int, cold: bool = False) -> Spectrum:
        live = 0 if cold or not self.ready else int((self._values[g] > 0).sum())
        following = float(self._next[g]), float(self._next_residuals[g])
        return Spectrum(self._values[g, :live], *following, self._has_probe[g], bool(self._converged[g]))

    def _cached(self, g: int, dtype: torch.dtype, cold: bool) -> Cached:
        spectrum, group = self._spectrum(g, cold), self.groups[g]
        if spectrum.live == 0:  # nothing to start from: no copy of nothing
            return Cached(spectrum, None)
        block = torch.empty(spectrum.live + 1, self._size(g), dtype=dtype, device=self.parameters.device)
        for i, piece in zip(group, block.split([self.parameters.sizes[i] for i in group], dim=1), strict=True):
            piece[:-1] = self.blocks[i].reshape(self.rank, -1)[: spectrum.live]
            piece[-1] = self.probes[i].reshape(-1)
        return Cached(spectrum, block)

    def _solve(
        self, g: int, operator: SymmetricOperator, cold: bool, cutoff: Cutoff | None, start: Tensor | None = None
    ) -> Solution:
        plan, cached = self._plan(g), self._cached(g, operator.dtype, cold or start is not None)
        if start is not None:
            solution = solve_from(operator, plan, start.T.to(operator.dtype))
        elif cutoff is None:
            solution = solve(operator, plan, cached)
        else:
            group = self.groups[g]
            solution = solve_above(operator, plan, cached, lambda v, values: values > cutoff(v, group).double().cpu())
        live = solution.drop_negative()
        if cutoff is None and live < plan.k:
            first = self.parameters.names[self.groups[g][0]]
            notices.too_few_positive(live, plan.k, None if self.layout == "whole" else first)
        solution.resize(self.rank)
        return solution

    @property
    def planned_matvecs(self) -> int:
        """Products that the next refresh may spend at most."""
        if not self.ready or self.adaptive:
            return self.max_matvecs * len(self.groups)
        return sum(self._spectrum(g).worst_matvecs(self._plan(g), self._size(g)) for g in range(len(self.groups)))

    @property
    def least_matvecs(self) -> int:
        """Products that a refresh which ``max_matvecs`` cuts short needs to be of use; with a basis a layer all of them."""
        simple = self.ready and not self.adaptive and self.layout == "whole"
        return self._spectrum(0).least_matvecs(self._plan(0), self._size(0)) if simple else self.planned_matvecs

    def _commit(self, solutions: list[Solution], matvecs: int) -> RefreshReport:
        overlaps = [self._overlap_with(g, s) for g, s in enumerate(solutions)]
        known = [x for x in overlaps if x is not None]
        # New tensors, so that a state_dict taken earlier keeps what it held.
        values, residuals = self._values.clone(), self._residuals.clone()
        for g, (group, s) in enumerate(zip(self.groups, solutions, strict=True)):
            start = 0
            for i in group:
                size = self.parameters.sizes[i]
                self.blocks[i].copy_(s.rows[:, start : start + size].reshape(self.blocks[i].shape))
                if s.probe is not None:
                    self.probes[i].copy_(s.probe[start : start + size].reshape(self.probes[i].shape))
                    self._has_probe[g] = True
                start += size
            values[g], residuals[g] = s.values, s.residuals
        self._values, self._residuals = values, residuals
        self._next = torch.tensor([s.next_value for s in solutions], dtype=torch.float64, device="cpu")
        self._next_residuals = torch.tensor([s.next_residual for s in solutions], dtype=torch.float64, device="cpu")
        self._converged = torch.tensor([s.converged for s in solutions], device="cpu")
        self.measure_mass()
        self.overlap = float(torch.stack(known).mean()) if known else math.nan
        if self.ready:
            self._earlier_steps += self.age
        else:
            self._first_matvecs, self._earlier_steps = self.matvecs, 0
        self.refreshes += 1
        self.age = 0
        self.reason = "; ".join(dict.fromkeys(s.reason for s in solutions))
        failed = [s for s in solutions if not s.converged]
        cold = any(s.kind == "cold" for s in failed)
        if failed and (cold or not self._cap_warned):
            self._cap_warned = self._cap_warned or not cold
            notices.unconverged(self.tol, self.reason, cold)
        # Values of a cold chain that was cut off are too low to tell a gap; the refresh that follows tells.
        if not (
            self._gap_warned or self.adaptive or self.layout == "layer" or self.live < self.rank or (failed and cold)
        ):
            self._gap_warned = self.gap < notices.NO_GAP
            if self._gap_warned:
                notices.no_gap(self._values[0], self.gap)
        guard = sum(s.guard_matvecs for s in solutions)
        return RefreshReport(solutions[0].kind, matvecs, guard, self.overlap, not failed, self.reason)

    def _overlap_with(self, g: int, solution: Solution) -> Tensor | None:
        """``||V_new^T V_old||_F^2 / k`` of a group, None where there is nothing to compare."""
        most = max(int((self._values[g] > 0).sum()), int((solution.values > 0).sum()))
        if not self.ready or not most:
            return None
        if solution.overlap is not None:
            return torch.tensor(solution.overlap, device="cpu")
        rows = solution.rows
        return torch.linalg.matrix_norm(self._rows(self.groups[g], rows.dtype) @ rows.T).square() / most

    def replace(
        self, rows: Tensor, values: Tensor, residuals: Tensor | None = None, reason: str = "given"
    ) -> RefreshReport:
        """Take a basis computed elsewhere: orthonormal rows (k, P) and what orders them (k,); counts as a refresh.

        Rows whose value is 0 must be zero. ``residuals`` (k,) are zero where they are not given.
        """
        if self.layout != "whole":
            raise ValueError("replace() is for layout='whole'")
        found = (
            torch.zeros(self.rank, dtype=torch.float64, device="cpu") if residuals is None else residuals.double().cpu()
        )
        return self._commit([Solution(rows, values.double().cpu(), found, None, 0.0, 0.0, "krylov", True, reason)], 0)

    def measure_mass(self) -> None:
        """Share of each row that lies in each parameter, (parameters, k): what a learning rate per group needs."""
        exact = torch.promote_types(self.dtype, torch.float32)
        rows = [torch.linalg.vector_norm(b.reshape(self.rank, -1), dim=1, dtype=exact) for b in self.blocks]
        self.mass = torch.stack(rows).cpu().double().square()

    # ---- saving
    def scalars(self) -> dict[str, Any]:
        """The small part of the state: counts, and (k,)-sized tensors on the CPU."""
        return {
            "age": self.age,
            "refreshes": self.refreshes,
            "attempts": self.attempts,
            "matvecs": self.matvecs,
            "overlap": self.overlap,
            "eigenvalues": self._values,
            "residual_norms": self._residuals,
            "next_eigenvalues": self._next,
            "next_residual_norms": self._next_residuals,
            "converged": self._converged,
            "gap_warned": self._gap_warned,
            "cap_warned": self._cap_warned,
            "first_matvecs": self._first_matvecs,
            "earlier_steps": self._earlier_steps,
        }

    def load_scalars(self, state: dict[str, Any]) -> None:
        """Restore what ``scalars`` gave; call after the blocks are in place."""
        expected = (len(self.groups), self.rank)
        values = torch.as_tensor(state["eigenvalues"], dtype=torch.float64, device="cpu")
        if tuple(values.shape) != expected:
            raise ValueError(
                f"saved eigenvalues have shape {tuple(values.shape)}, this subspace needs {expected}: rank differs"
            )
        self.age, self.refreshes = int(state["age"]), int(state["refreshes"])
        self.attempts, self.matvecs = int(state["attempts"]), int(state["matvecs"])
        self.overlap = float(state["overlap"])
        self._values = values.clone()
        self._residuals = torch.as_tensor(state["residual_norms"], dtype=torch.float64, device="cpu").clone()
        self._next = torch.as_tensor(state["next_eigenvalues"], dtype=torch.float64, device="cpu").clone()
        self._next_residuals = torch.as_tensor(state["next_residual_norms"], dtype=torch.float64, device="cpu").clone()
        self._converged = torch.as_tensor(state["converged"], dtype=torch.bool, device="cpu").clone()
        self._gap_warned, self._cap_warned = bool(state["gap_warned"]), bool(state["cap_warned"])
        self._first_matvecs, self._earlier_steps = int(state["first_matvecs"]), int(state["earlier_steps"])
        self._has_probe = [any(bool(self.probes[i].any()) for i in group) for group in self.groups]
        self.reason = "restored"
        self.measure_mass()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, bit for bit; tensors are references, as in torch."""
        return {**self.scalars(), "basis": list(self.blocks), "probe": list(self.probes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore ``state_dict``.

        Raises:
            ValueError: a block has another shape; the parameter is named.
        """
        for name, shape, block in zip(self.parameters.names, self.parameters.shapes, state_dict["basis"], strict=True):
            check_block(name, block, (self.rank, *shape))
        given = (*state_dict["basis"], *state_dict["probe"])
        for mine, saved in zip((*self.blocks, *self.probes), given, strict=True):
            mine.copy_(saved)
        self.load_scalars(state_dict)
