"""Where history, basis and counters of SubspaceLBFGS live in its saved state.

Blocks are saved per parameter in ``state`` (``basis``, ``steps``, ``changes``: one row a vector), counters and the
spectrum in flat ``curvopt_`` keys of every parameter group, the small matrix of inner products with the first parameter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from curvopt.optim.saving import SAVED, _plain, saved_index, saved_scalars

if TYPE_CHECKING:
    from curvopt.optim.lbfgs import SubspaceLBFGS


@dataclass
class Counts:
    """What a run did so far.

    Attributes:
        steps, iterations: calls of ``step`` that were not refused, and iterations in them.
        closure_calls: of ``step``'s closure, without those that curvature took.
        skipped: pairs without positive curvature.
        failures, in_row: line searches that failed, and how many since the last that did not.
        dropped: directions that did not descend.
        stalled_at: the loss at which ten searches in a row had failed; NaN otherwise.
    """

    steps: int = 0
    iterations: int = 0
    closure_calls: int = 0
    skipped: int = 0
    failures: int = 0
    in_row: int = 0
    dropped: int = 0
    stalled_at: float = math.nan


def export(opt: SubspaceLBFGS) -> None:
    """Write the small state into flat keys of every parameter group."""
    engine, history = opt._engine, opt._quasi.history
    small: dict[str, Any] = {
        **dataclasses.asdict(opt._quasi.counts),
        "refused": opt.refusals.row,
        "reason": opt.reason,
        "next_refresh": engine.next_refresh,
        "curvature_calls": engine.calls,
        "head": 0 if history is None else history.head,
        "pairs": 0 if history is None else history.count,
        "route": getattr(engine.source.operator, "route", None) or "",
    }
    if engine.subspace is not None:
        small.update(engine.subspace.scalars())
    keys = {SAVED + key: _plain(value) for key, value in small.items()}
    for g in opt.param_groups:
        g.update(keys)


def blocks_of(opt: SubspaceLBFGS) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Per parameter: (p, its blocks), live views; without history and basis, nothing."""
    layout, subspace, history = opt._quasi.layout, opt._engine.subspace, opt._quasi.history
    entries: dict[int, dict[str, Tensor]] = {id(p): {} for p in layout.params}
    if subspace is not None:
        for p, block in zip(subspace.parameters.params, subspace.blocks, strict=True):
            entries[id(p)]["basis"] = block
    if history is not None:
        for name, rows in (("steps", history.steps), ("changes", history.changes)):
            for p, block in zip(layout.params, layout.blocks(rows), strict=True):
                entries[id(p)][name] = block.view(history.size, *p.shape)
        entries[id(layout.params[0])]["products"] = history.products
    return [(p, entries[id(p)]) for p in layout.params]


def _expected(opt: SubspaceLBFGS, m: int) -> list[tuple[str, Tensor, dict[str, tuple[int, ...]]]]:
    """Per parameter: name, itself, and the shapes that its saved blocks must have."""
    subspace = opt._engine.subspace
    inside = {} if subspace is None else subspace.parameters.index()
    out = []
    for i, (name, p) in enumerate(zip(opt._quasi.layout.names, opt._quasi.layout.params, strict=True)):
        shapes: dict[str, tuple[int, ...]] = {"steps": (m, *p.shape), "changes": (m, *p.shape)}
        if i == 0:
            shapes["products"] = (m, m)
        if subspace is not None and id(p) in inside:
            shapes["basis"] = (subspace.rank, *p.shape)
        out.append((name, p, shapes))
    return out


def check_saved(opt: SubspaceLBFGS, state_dict: Mapping[str, Any]) -> None:
    """Check a state dict before anything is loaded.

    Raises:
        ValueError: a block is missing or has the wrong shape; the parameter is named.
    """
    if not state_dict["param_groups"]:
        return
    scalars = saved_scalars(state_dict["param_groups"][0])
    if "iterations" not in scalars:
        return  # another optimizer's
    index = saved_index(state_dict, opt.param_groups)
    needed = {"basis": scalars.get("refreshes"), "steps": scalars["pairs"]}
    needed["changes"] = needed["products"] = scalars["pairs"]
    for name, p, shapes in _expected(opt, opt._quasi.history_size):
        saved = state_dict["state"].get(index.get(id(p)), {})
        for key, shape in shapes.items():
            if key in saved and tuple(saved[key].shape) != shape:
                raise ValueError(
                    f"saved {key} of parameter {name!r} has shape {tuple(saved[key].shape)}, expected {shape} (rank or "
                    "history_size, then the parameter's shape): was it saved with another rank, history_size or model?"
                )
            if key not in saved and needed[key]:
                raise ValueError(f"the state dict holds no {key} of parameter {name!r}: it is incomplete")


def restore(opt: SubspaceLBFGS, state_dict: Mapping[str, Any]) -> None:
    """Take everything from a checked state dict; without our keys, start anew."""
    saved = saved_scalars(opt.param_groups[0])
    engine = opt._engine
    if "iterations" not in saved:
        opt._rebuild()
        opt.refusals.row = 0
        return
    for f in dataclasses.fields(Counts):
        setattr(opt._quasi.counts, f.name, saved[f.name])
    opt.refusals.row, opt.reason = int(saved["refused"]), str(saved["reason"])
    engine.next_refresh, engine.calls = int(saved["next_refresh"]), int(saved["curvature_calls"])
    if saved.get("route") and hasattr(engine.source.operator, "route"):
        setattr(engine.source.operator, "route", saved["route"])  # noqa: B010
    index = saved_index(state_dict, opt.param_groups)
    opt._quasi.history = None
    if saved["pairs"]:
        history = opt._quasi.pairs()
        history.head, history.count = int(saved["head"]), int(saved["pairs"])
    for p, entry in blocks_of(opt):
        blocks = state_dict["state"].get(index.get(id(p)), {})
        for key, live in entry.items():
            if key in blocks:
                live.copy_(blocks[key])
    if engine.subspace is not None and "eigenvalues" in saved:
        engine.subspace.load_scalars(saved)
    engine.look()
    export(opt)
