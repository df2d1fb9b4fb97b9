"""BulkSGD, DomSGD, InterpolatedSGD, GGNProjectedSGD: torch.optim.SGD whose displacement is split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from curvopt._errors import CurvatureError
from curvopt.curvature.operator import SymmetricOperator
from curvopt.optim import rules
from curvopt.optim.base import Closure, SubspaceOptimizer, describe
from curvopt.optim.build import as_ggn
from curvopt.optim.config import SubspaceConfig
from curvopt.optim.engine import SubspaceEngine
from curvopt.optim.guards import refuse_sparse
from curvopt.optim.saving import BLOCKS, blocks_of, check_saved, load_with, restore, restore_blocks

Curvature = SymmetricOperator | str | None


def _border(group: dict[str, Any]) -> float:
    """Largest stable lr * eigenvalue of a group's own rule, on the full batch."""
    return rules.momentum_border(float(group["momentum"]), float(group["dampening"]), bool(group["nesterov"]))


@dataclass
class _Part:
    """What one group brings to a step: parameters with a gradient, and their buffers."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor | None]


class SubspaceSGD(SubspaceOptimizer, torch.optim.SGD):
    """SGD whose displacement u becomes ``dominant * P_k u + bulk * (I - P_k) u``.

    P_k projects onto the k leading eigenvectors of ``curvature`` at the weights before the step. Everything that
    torch.optim.SGD does (momentum, dampening, weight decay, Nesterov, maximize) happens first and enters u.

    The positional arguments are those of torch.optim.SGD. Keyword-only:

    Args:
        curvature: an operator over a subset of the parameters (``curvopt.Hessian(model, loss_fn, data)``), or
            ``"closure"``: differences of the gradients of the closure passed to ``step``.
        rank: k; None takes C (squared loss) or C - 1 (softmax cross-entropy) for C outputs; ``"edge"`` takes every
            eigenvalue above ``edge / lr``, at most ``max_rank``; 0 is plain SGD.
        refresh_every: a period in steps, ``"frozen"``, or ``"auto"`` (by staleness, within ``overhead``).
        overhead: share of the training time that refreshes may take after the first one.
        start: first step with a basis, or ``"aligned"``: once the running mean (weight .9 on the past) of the
            gradient's dominant share reaches ``start_threshold``, at the latest at step ``start_timeout``.
        project: ``"update"`` splits the displacement, ``"gradient"`` the gradient before it enters the rule.
        maximize: as torch's. ``"closure"`` then differentiates what is maximised and turns the sign; an operator is
            taken as it is, so give that of the function that falls (``-curvopt.Hessian(...)`` of one that rises).
        source: ``"curvature"``, or ``"history"``: principal directions of past displacements, no products.
        layout: ``"whole"``, or ``"layer"`` for one basis a layer.
        max_matvecs: cap on the products of a refresh; 4k + 20 by default.
        tol: relative residual that a Lanczos refresh aims at.
        basis_dtype: dtype of the k x P basis; that of the parameters by default.
        edge: c of ``rank="edge"`` and ``dominant="edge"``; 2 is the stability border.
        damping: of ``dominant="newton"``, relative to the largest eigenvalue.
        curvature_closure: for ``curvature="closure"``, a fixed, larger batch to differentiate.
        costs: seconds of a product over seconds of a step; pins what ``"auto"`` would measure.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type; the text names it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        curvature: Curvature = None,
        rank: int | str | None = None,
        dominant: rules.Dominant = 1.0,
        bulk: float = 1.0,
        refresh_every: int | str = "auto",
        overhead: float = 0.1,
        start: int | str = 0,
        start_threshold: float = 0.95,
        start_timeout: int | None = 2000,
        project: str = "update",
        metric: str = "euclidean",
        source: str = "curvature",
        layout: str = "whole",
        max_matvecs: int | None = None,
        tol: float = 1e-2,
        basis_dtype: torch.dtype | None = None,
        max_rank: int = 32,
        edge: float = 1.5,
        damping: float = 1e-3,
        curvature_closure: Closure | None = None,
        costs: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        # GradScaler would hand found_inf to a fused step; ours refuses non-finite gradients itself.
        self._step_supports_amp_scaling = False
        if metric == "preconditioner":
            raise ValueError(
                "metric='preconditioner' needs exp_avg_sq in the base optimizer's state, which SGD has not: "
                "use SubspaceScaled(torch.optim.AdamW(...), metric='preconditioner')"
            )
        config = SubspaceConfig(
            rank=rank,
            dominant=dominant,
            bulk=bulk,
            refresh_every=refresh_every,
            overhead=overhead,
            start=start,
            start_threshold=start_threshold,
            start_timeout=start_timeout,
            project=project,
            metric=metric,
            source=source,
            layout=layout,
            max_matvecs=max_matvecs,
            tol=tol,
            basis_dtype=basis_dtype,
            max_rank=max_rank,
            edge=edge,
            damping=damping,
            costs=costs,
            seed=seed,
        )
        self._engine = SubspaceEngine(
            self._live_groups, curvature, config, curvature_closure=curvature_closure, border=_border
        )

    def _live_groups(self) -> list[dict[str, Any]]:
        return self.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the new parameters take the base's update."""
        super().add_param_group(param_group)
        if "_engine" in self.__dict__:
            self._engine.export()

    def __repr__(self) -> str:
        """As torch's, with the subspace's settings and without saved state."""
        c = self._engine.config
        settings = describe(self.param_groups, dominant=c.dominant, bulk=c.bulk, rank=c.rank)
        return f"{type(self).__name__} ({settings}\n)"

    # ---- the step
    def step(self, closure: Closure | None = None) -> Any:
        """One step; a closure is called once (curvature from a closure calls it more often, at a refresh).

        Raises:
            NonFiniteError: the fifth step in a row with NaN or Inf gradients.
            ValueError: a refresh is due, ``curvature="closure"``, and there is no closure.
        """
        if torch.is_inference_mode_enabled():
            raise CurvatureError("step() ran inside torch.inference_mode(), where curvature can't be computed")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step(closure)
        return loss

    def _gather(self) -> list[_Part]:
        parts = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            refuse_sparse(params, self._engine.names)
            buffers = [self.state[p].get("momentum_buffer") if group["momentum"] else None for p in params]
            parts.append(_Part(group, params, [p.grad for p in params], buffers))
        return parts

    def _step(self, closure: Closure | None) -> None:
        engine = self._engine
        self._allocate()
        parts = self._gather()
        finite = engine.check_finite([g for part in parts for g in part.grads])
        # Off the CPU the step must not wait for the answer, save where a buffer is born: it can't be put back to None.
        born = any(b is None for part in parts if part.group["momentum"] for b in part.buffers)
        deferred = engine.deferred(finite) and not born
        if not deferred and not bool(finite):
            engine.refuse()
            return
        engine.before_step(closure)
        if engine.subspace is not None and not engine.started:
            engine.align(engine.gather(_gradients(parts)))
        if deferred:
            touched = [t for part in parts for t in (*part.params, *part.buffers) if t is not None]
            kept = [t.detach().clone() for t in touched]
            self._move(parts, finite)
            for tensor, old in zip(touched, kept, strict=True):
                tensor.copy_(torch.where(finite, tensor, old))
            engine.count_on_device(finite)
        else:
            self._move(parts)
        engine.after_step()

    def _move(self, parts: list[_Part], finite: Tensor | None = None) -> None:
        engine, config = self._engine, self._engine.config
        plain = engine.config.bulk == 1.0 if engine.subspace is None else not engine.active
        if engine.active and config.project == "gradient":
            self._project_gradients(parts)
            plain = True
        if plain and engine.history is None:
            for part in parts:
                self._apply_sgd(part, part.params, part.grads, part.group["weight_decay"], part.group["maximize"])
            return
        moved: dict[int, Tensor] = {}
        for part in parts:
            displacement = self._displacement(part)
            if float(part.group["lr"]):  # a group at lr 0 stays where it is
                moved.update((id(p), u) for p, u in zip(part.params, displacement, strict=True))
        if engine.subspace is None:
            for part in parts:
                for p in part.params:
                    if id(p) in moved:
                        p.add_(moved[id(p)], alpha=config.bulk)
            return
        update = engine.gather(moved)
        engine.remember(update, finite)
        split = engine.active and config.project == "update"
        inside = {id(p) for p in engine.subspace.parameters.params} if split else set()
        for part in parts:
            for p in part.params:
                if id(p) not in inside and id(p) in moved:
                    p.add_(moved[id(p)])
        if split:
            params = [None if u is None else p for p, u in zip(engine.subspace.parameters.params, update, strict=True)]
            engine.correct_(params, update, already=0.0)

    def _project_gradients(self, parts: list[_Part]) -> None:
        engine = self._engine
        assert engine.subspace is not None
        new = engine.projected(engine.gather(_gradients(parts)))
        replaced = {id(p): g for p, g in zip(engine.subspace.parameters.params, new, strict=True) if g is not None}
        for part in parts:
            part.grads = [replaced.get(id(p), g) for p, g in zip(part.params, part.grads, strict=True)]

    def _apply_sgd(self, part: _Part, params: list[Tensor], grads: list[Tensor], decay: float, maximize: bool) -> None:
        group = part.group
        if not params:
            return
        sgd(
            params,
            grads,
            part.buffers,
            has_sparse_grad=False,
            foreach=group["foreach"],
            fused=group["fused"],
            weight_decay=decay,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=maximize,
        )
        if group["momentum"]:
            for p, buffer in zip(part.params, part.buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer

    def _displacement(self, part: _Part) -> list[Tensor]:
        """What torch.optim.SGD would add to each parameter: its own rule, run on zeros."""
        group = part.group
        grads = part.grads
        if group["maximize"]:
            grads = [-g for g in grads]
        if group["weight_decay"]:
            grads = [g.add(p, alpha=group["weight_decay"]) for g, p in zip(grads, part.params, strict=True)]
        moved = [torch.zeros_like(p) for p in part.params]
        self._apply_sgd(part, moved, grads, 0.0, False)
        return moved

    # ---- saving
    def _allocate(self) -> None:
        for p, entry in blocks_of(self._engine):
            state = self.state[p]
            if state.get("basis") is not entry["basis"]:
                state.update(entry)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the basis in ``state[p]["basis"]`` and small data in flat keys of the groups."""
        self._engine.export()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the basis comes back in its own dtype.

        Raises:
            ValueError: a saved basis has another shape; the parameter is named and nothing is loaded.
        """

        def put_back(given: dict[str, Any]) -> None:
            restore_blocks(self._engine, given, "")
            for p in self.state:
                if isinstance(p, Tensor):  # a rank of 0 has no use for a saved basis
                    self.state[p] = {key: value for key, value in self.state[p].items() if key not in BLOCKS}
            restore(self._engine)
            self._allocate()

        load_with(
            self, super().load_state_dict, state_dict, lambda given: check_saved(self._engine, given, ""), put_back
        )

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle take along; pickling drops the operator, see ``curvature``."""
        self._engine.export()
        return {**super().__getstate__(), "_engine": self._engine, "_step_supports_amp_scaling": False}


def _gradients(parts: list[_Part]) -> dict[int, Tensor]:
    return {id(p): g for part in parts for p, g in zip(part.params, part.grads, strict=True)}


class BulkSGD(SubspaceSGD):
    """SGD confined to the bulk: the displacement's dominant part is removed, ``u' = (I - P_k) u``.

    Zakarin & Singh 2025 (arXiv 2505.11972), Song et al. 2024 (arXiv 2405.16002). On a quadratic it is stable iff
    ``lr * lambda_(k+1) < 2``. ``rank=0`` is torch.optim.SGD, bit for bit. Arguments: see ``SubspaceSGD``.
    """

    def __init__(self, params: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        _reserve(self, kwargs)
        super().__init__(params, *args, dominant=0.0, bulk=1.0, **kwargs)


class DomSGD(SubspaceSGD):
    """SGD confined to the dominant subspace: ``u' = P_k u``. It stalls; that is its point.

    Song et al. 2024 (arXiv 2405.16002). Arguments: see ``SubspaceSGD``.

    Raises:
        ValueError: ``rank=0``, with which nothing would ever move.
    """

    def __init__(self, params: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        _reserve(self, kwargs)
        if kwargs.get("rank") == 0:
            raise ValueError("rank=0 leaves DomSGD no direction to move in; give rank >= 1, or use torch.optim.SGD")
        super().__init__(params, *args, dominant=1.0, bulk=0.0, **kwargs)


class InterpolatedSGD(SubspaceSGD):
    """The family between Dom-SGD, SGD and Bulk-SGD: ``u' = dominant * P_k u + bulk * (I - P_k) u``.

    Give the two coefficients, or a named path and ``alpha``: ``"convex"`` (1 - a, a), ``"centered"`` (Dom at 0, SGD
    at 1/2, Bulk at 1), ``"damped"`` (a, 1), ``"amplified"`` (1, a). ``dominant`` may also be ``"newton"``, ``"edge"``
    or a function of (eigenvalues, lr). Other arguments: see ``SubspaceSGD``.

    Raises:
        ValueError: both or neither of the two forms, or alpha outside its path's range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *args: Any,
        dominant: rules.Dominant | None = None,
        bulk: float | None = None,
        path: str | None = None,
        alpha: float | None = None,
        **kwargs: Any,
    ) -> None:
        if (path is None) != (alpha is None):
            raise ValueError("path and alpha belong together: give both, or dominant= and bulk=")
        if path is not None and alpha is not None:
            if dominant is not None or bulk is not None:
                raise ValueError("give either path= and alpha=, or dominant= and bulk=, not both")
            dominant, bulk = rules.path_coefficients(path, alpha)
        elif dominant is None and bulk is None:
            raise ValueError("InterpolatedSGD needs dominant= and bulk=, or path= and alpha=")
        super().__init__(
            params, *args, dominant=1.0 if dominant is None else dominant, bulk=1.0 if bulk is None else bulk, **kwargs
        )


class GGNProjectedSGD(SubspaceSGD):
    """The same family with the eigenvectors of the generalized Gauss-Newton matrix; Bulk by default.

    The GGN is positive semi-definite, and its products cost less than the Hessian's.

    Args:
        curvature: a ``curvopt.GGN``, or a ``curvopt.Hessian``, which is turned into one by ``.ggn()``.

    Other arguments: see ``SubspaceSGD``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *args: Any,
        curvature: Curvature = None,
        dominant: rules.Dominant = 0.0,
        bulk: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            params,
            *args,
            curvature=as_ggn(curvature),
            dominant=dominant,
            bulk=bulk,
            **kwargs,
        )


def _reserve(optimizer: SubspaceSGD, kwargs: dict[str, Any]) -> None:
    taken = [name for name in ("dominant", "bulk") if name in kwargs]
    if taken:
        raise TypeError(f"{type(optimizer).__name__} fixes {taken[0]}; use InterpolatedSGD(..., dominant=, bulk=)")
