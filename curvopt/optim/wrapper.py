"""SubspaceScaled: the split around any torch optimizer, without touching its rule."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from curvopt._errors import CurvatureError
from curvopt._params import ParameterLayout
from curvopt.curvature.operator import SymmetricOperator
from curvopt.optim import rules
from curvopt.optim.base import Closure, SubspaceOptimizer, describe
from curvopt.optim.config import SubspaceConfig
from curvopt.optim.engine import SubspaceEngine
from curvopt.optim.guards import refuse_sparse
from curvopt.optim.saving import SAVED, blocks_of, check_saved, restore, restore_blocks, saved_index


class _Refused(Exception):
    """The gradients that a closure left behind are not finite: the base must not see them."""


class SubspaceScaled(SubspaceOptimizer, Optimizer):
    """Split the displacement u of any base optimizer: ``u' = dominant * P_k u + bulk * (I - P_k) u``.

    The base takes its whole step first, with raw gradients in its buffers; then its displacement over all groups
    together is split with the basis at the weights before the step (Song et al. 2024; IRE, BSFA). ``param_groups``
    and ``state`` are the base's own, so schedulers, GradScaler and trainers reach it.

    For Adam-like bases take ``metric="preconditioner"``: the basis is then that of ``D^{-1/2} H D^{-1/2}``,
    ``D = sqrt(v_hat) + eps``, refreshed from the base's 10th step on, and the projector ``D^{-1/2} Q Q^T D^{1/2}``
    uses the present D; decoupled weight decay stays outside.

    Args:
        base: the optimizer to wrap; used through the wrapper from now on.
        check_finite: refuse a step whose gradients hold NaN or Inf before the base sees them (one host read a step).

    The other keyword arguments are those of ``SubspaceSGD``.

    Raises:
        TypeError: ``base`` is no torch optimizer, or splits its own updates; an option is unknown.
        ValueError: an argument is out of range; the text names it.
    """

    _laid_out = False

    def __init__(
        self,
        base: Optimizer,
        *,
        curvature: SymmetricOperator | str | None = None,
        rank: int | str | None = None,
        dominant: rules.Dominant = 1.0,
        bulk: float = 1.0,
        check_finite: bool = True,
        curvature_closure: Closure | None = None,
        **options: Any,
    ) -> None:
        # No super().__init__: it would make groups and state of its own, which part ways with the base's.
        if not isinstance(base, Optimizer):
            raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
        if isinstance(base, SubspaceOptimizer):
            raise TypeError(f"base is a {type(base).__name__}, which splits its updates itself; wrap a plain optimizer")
        _check_names_of(options)
        self.base = base
        self.__setstate__({"defaults": base.defaults})
        self.check_finite = check_finite
        config = SubspaceConfig(rank=rank, dominant=dominant, bulk=bulk, **options)
        if isinstance(config.dominant, str) or config.rank == "edge":
            self._check_names(config)
        self._engine = SubspaceEngine(
            self._live_groups,
            curvature,
            config,
            curvature_closure=curvature_closure,
            border=self._border,
            metric_root=self._metric_root,
        )

    def _check_names(self, config: SubspaceConfig) -> None:
        if config.metric == "euclidean" and not isinstance(self.base, torch.optim.SGD):
            raise ValueError(
                f"dominant={config.dominant!r}, rank={config.rank!r}: the stability border of "
                f"{type(self.base).__name__} is known only in its own metric: give metric='preconditioner'"
            )

    def _live_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @staticmethod
    def _border(group: dict[str, Any]) -> float:
        if "betas" in group:
            return rules.averaged_border(float(group["betas"][0]))
        momentum, dampening = float(group.get("momentum", 0.0)), float(group.get("dampening", 0.0))
        return rules.momentum_border(momentum, dampening, bool(group.get("nesterov", False)))

    # ---- the base's, seen through
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's own list."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's own state; the basis is kept apart until it is saved."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; its parameters take the base's update."""
        self.base.add_param_group(param_group)
        self._engine.export()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base does."""
        self.base.zero_grad(set_to_none=set_to_none)

    def __repr__(self) -> str:
        """As torch's, with the base's name and the subspace's settings, without saved state."""
        c = self._engine.config
        settings = describe(self.base.param_groups, dominant=c.dominant, bulk=c.bulk, rank=c.rank)
        return f"SubspaceScaled ({type(self.base).__name__}, {settings}\n)"

    def _metric_root(self, layout: ParameterLayout) -> list[Tensor | None]:
        """``D^{1/2}`` per parameter, D = sqrt(v_hat) + eps; None for a parameter without state yet."""
        group_of = {id(p): g for g in self.base.param_groups for p in g["params"]}
        roots: list[Tensor | None] = []
        seen = False
        for p in layout.params:
            state = self.base.state.get(p, {})
            second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
            if second is None:
                seen = seen or bool(state)
                roots.append(None)
                continue
            roots.append(self._root(second, state, group_of[id(p)]))
        if all(r is None for r in roots):
            why = f"its state has no exp_avg_sq ({type(self.base).__name__})" if seen else "it has no state yet"
            raise ValueError(f"metric='preconditioner' needs exp_avg_sq in the base optimizer's state, but {why}")
        return roots

    def _root(self, second: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """``D^{1/2}`` of one parameter; other libraries count steps in the group, or name things in their own way."""
        found: dict[str, Any] = {key: group.get(key) for key in ("betas", "eps", "step")}
        found["step"] = state.get("step", found["step"])
        missing = [key for key, value in found.items() if value is None]
        if missing:
            raise ValueError(
                f"metric='preconditioner' needs {' and '.join(missing)} beside exp_avg_sq in state or groups of the base "
                f"optimizer, which {type(self.base).__name__} keeps elsewhere; use torch.optim's Adam family, or "
                "metric='euclidean'"
            )
        correction = 1.0 - float(found["betas"][1]) ** float(found["step"])
        return (second / correction).sqrt().add_(found["eps"]).sqrt_()

    # ---- the step
    def step(self, closure: Closure | None = None) -> Any:
        """One step of the base, then the split; the closure is called as often as the base calls it.

        Raises:
            NonFiniteError: the fifth step in a row with NaN or Inf gradients.
            ValueError: a refresh is due, ``curvature="closure"``, and there is no closure.
            RuntimeError: the base never called the closure, so it moved without a split; a sparse gradient.
        """
        if torch.is_inference_mode_enabled():
            raise CurvatureError("step() ran inside torch.inference_mode(), where curvature can't be computed")
        with torch.no_grad():
            return self._step(closure)

    def _step(self, closure: Closure | None) -> Any:
        engine = self._engine
        self._take_blocks_away()
        watch = _GradientWatch(self, closure)
        moved = self._may_move()
        old = [p.detach().clone() for p in moved]
        try:
            if closure is None:
                watch.look()
                loss = self.base.step()
            else:
                loss = self.base.step(watch)
        except _Refused:
            engine.refuse()
            return watch.loss
        finally:
            watch.restore()
        if not watch.looked:
            raise RuntimeError(
                f"{type(self.base).__name__} did not call the closure given to step(), so its step could not be split; "
                "call the closure yourself and then step() without one"
            )
        if moved:
            self._split(moved, old, watch.present)
        if engine.at_rest:
            self._lay_blocks_out()
        engine.after_step()
        return loss

    # torch.distributed.checkpoint builds empty state by a step at lr 0, and restores flattened checkpoints by the keys
    # that it then finds in ``state``. So they lie there until the next step, which takes them away before the base looks.
    def _lay_blocks_out(self) -> None:
        self._laid_out = True
        for p, entry in blocks_of(self._engine):
            self.base.state[p].update({SAVED + key: block for key, block in entry.items()})

    def _take_blocks_away(self) -> None:
        if not self._laid_out:
            return
        self._laid_out = False
        for p, _ in blocks_of(self._engine):
            left = {key: value for key, value in self.base.state.pop(p, {}).items() if not str(key).startswith(SAVED)}
            if left:
                self.base.state[p] = left

    def _may_move(self) -> list[Tensor]:
        """The parameters whose displacement must be known after the base's step."""
        engine = self._engine
        if engine.subspace is None:
            scaled = engine.config.bulk != 1.0
            return [p for g in self.base.param_groups for p in g["params"]] if scaled else []
        wanted = engine.history is not None or engine.config.project == "update"
        return list(engine.subspace.parameters.params) if wanted else []

    def _split(self, params: list[Tensor], old: list[Tensor], present: set[int]) -> None:
        """Turn the base's displacement into the split one; ``old`` becomes the displacement in place."""
        engine = self._engine
        update: list[Tensor | None] = []
        for p, before in zip(params, old, strict=True):
            update.append(before.neg_().add_(p) if id(p) in present else None)
        if engine.subspace is None:
            for p, u in zip(params, update, strict=True):
                if u is not None:
                    p.add_(u, alpha=engine.config.bulk - 1.0)
            return
        engine.remember(update)
        if not engine.active or engine.config.project != "update":
            return
        roots = None
        if engine.config.metric == "preconditioner":
            self._take_out_decay(params, update)
            roots = self._metric_root(engine.subspace.parameters)
        engine.correct_([None if u is None else p for p, u in zip(params, update, strict=True)], update, 1.0, roots)

    def _take_out_decay(self, params: list[Tensor], update: list[Tensor | None]) -> None:
        """Decoupled weight decay moved p by -lr * wd * p_old; the preconditioner never saw that part."""
        group_of = {id(p): g for g in self.base.param_groups for p in g["params"]}
        for p, u in zip(params, update, strict=True):
            group = group_of[id(p)]
            decay = float(group["lr"]) * float(group.get("weight_decay", 0.0))
            if u is None or not decay:
                continue
            torchs = group.get("decoupled_weight_decay", isinstance(self.base, torch.optim.AdamW))
            if torchs or (group.get("weight_decouple") and not group.get("fixed_decay")):  # as other libraries name it
                u.mul_(1.0 - decay).add_(p, alpha=decay)  # u + lr wd (p - u), p - u being the weights before

    # ---- saving
    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, with the basis merged in per parameter and small data in flat keys of the groups."""
        self._engine.export()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        whole = dict(self.base.state_dict())
        state = dict(whole["state"])
        index = saved_index(whole, self.base.param_groups)
        for p, entry in blocks_of(self._engine):
            i = index[id(p)]
            state[i] = {**state.get(i, {}), **{SAVED + key: block for key, block in entry.items()}}
        whole["state"] = state
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, whole)
            whole = whole if changed is None else changed
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore base and basis; the base sees nothing of the basis.

        Raises:
            ValueError: a saved basis has another shape; the parameter is named and nothing is loaded.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        check_saved(self._engine, state_dict, SAVED)
        self._laid_out = False  # the base is about to replace its state
        own = {}
        for i, entry in state_dict["state"].items():
            left = {key: value for key, value in entry.items() if not str(key).startswith(SAVED)}
            if left:  # an empty entry would tell the base that it has been initialised
                own[i] = left
        self.base.load_state_dict({**state_dict, "state": own})
        restore_blocks(self._engine, state_dict, SAVED)
        restore(self._engine)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle take along; pickling drops the operator, see ``curvature``."""
        self._engine.export()
        self._take_blocks_away()
        return {
            "defaults": self.defaults,
            "base": self.base,
            "check_finite": self.check_finite,
            "_engine": self._engine,
        }


def _check_names_of(options: dict[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(SubspaceConfig)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"SubspaceScaled got an unexpected keyword argument {name!r}{hint}")


class _GradientWatch:
    """What happens once the gradients are there: before the base's step, or inside the closure it calls.

    Attributes:
        loss: the closure's last answer.
        present: ids of the parameters that had a gradient (a base may clear them, and a None gradient moves nothing).
        looked: whether it happened at all.
    """

    def __init__(self, owner: SubspaceScaled, closure: Closure | None) -> None:
        self.owner = owner
        self.closure = closure
        self.loss: Any = None
        self.present: set[int] = set()
        self._replaced: list[tuple[Tensor, Tensor, Tensor]] = []
        self.looked = False

    def __call__(self) -> Any:
        """The closure that the base sees."""
        assert self.closure is not None
        self.restore()
        with torch.enable_grad():
            self.loss = self.closure()
        with torch.no_grad():
            self.look()
        return self.loss

    def look(self) -> None:
        """Check the gradients; the first time refresh and align; split them where the gradient is what is split.

        Raises:
            _Refused: NaN or Inf before the base has done anything.
        """
        owner, engine = self.owner, self.owner._engine
        groups = owner.base.param_groups
        holders = [p for g in groups for p in g["params"] if p.grad is not None]
        still = {id(p) for g in groups if not float(g["lr"]) for p in g["params"]}
        self.present |= {id(p) for p in holders} - still
        refuse_sparse(holders, engine.names)
        first, self.looked = not self.looked, True
        if first:
            if owner.check_finite and not bool(engine.check_finite([p.grad for p in holders])):
                raise _Refused
            engine.before_step(self.closure)
        if engine.subspace is None:
            return
        gradient = engine.gather({id(p): p.grad for p in holders})
        dual = self._dual_roots()
        if first:
            engine.align(gradient if dual is None else _scaled(gradient, dual))
        if engine.active and engine.config.project == "gradient":
            for p, new in zip(engine.subspace.parameters.params, engine.projected(gradient, dual), strict=True):
                if new is not None and p.grad is not None:
                    self._replaced.append((p, p.grad, new))
                    p.grad = new

    def _dual_roots(self) -> list[Tensor | None] | None:
        """``D^{-1/2}`` where the metric is the preconditioner's: gradients are measured and split in the dual metric."""
        engine = self.owner._engine
        if engine.config.metric != "preconditioner" or engine.subspace is None or not engine.subspace.ready:
            return None
        roots = self.owner._metric_root(engine.subspace.parameters)
        return [None if r is None else r.reciprocal_() for r in roots]

    def restore(self) -> None:
        """Give the parameters their raw gradients back, unless the base has taken them away."""
        for p, raw, new in self._replaced:
            if p.grad is new:
                p.grad = raw
        self._replaced.clear()


def _scaled(tensors: list[Tensor | None], scales: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None or s is None else t * s for t, s in zip(tensors, scales, strict=True)]
