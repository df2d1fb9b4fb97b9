"""Where basis and counters live in an optimizer's saved state, and how they come back in their own dtype.

Blocks of the basis are saved per parameter in ``state``, counters and spectra in flat ``curvopt_`` keys of every
parameter group: the places that every trainer saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from curvopt.subspace.checks import check_block

if TYPE_CHECKING:
    from curvopt.optim.engine import SubspaceEngine

SAVED = "curvopt_"
BLOCKS = ("basis", "probe", "history")


def load_with(
    optimizer: torch.optim.Optimizer,
    load: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    check: Callable[[dict[str, Any]], None],
    put_back: Callable[[dict[str, Any]], None],
) -> None:
    """``load(state_dict)``, torch's own, with ``check`` before it and ``put_back`` after it.

    As hooks, between the user's: those change what is loaded before, and see what was loaded after.
    """
    found: list[dict[str, Any]] = []

    def look(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
        check(given)
        found.append(given)

    before = optimizer.register_load_state_dict_pre_hook(look)
    after = optimizer.register_load_state_dict_post_hook(lambda _: put_back(found[0]), prepend=True)
    try:
        load(state_dict)
    finally:
        before.remove()
        after.remove()


# ---- small data in the parameter groups
def export(engine: SubspaceEngine) -> None:
    """Write the small state into flat keys of every parameter group."""
    small: dict[str, Any] = {
        "step": engine.state.step,
        "schedule_age": engine.state.age,
        "interval": engine.state.interval,
        "cost_ratio": engine.state.cost_ratio,
        "product_seconds": engine.clock.product,
        "started": engine.started,
        "alignment": engine.alignment,
        "refused": engine.refusals.row,
        "history_filled": engine.history_filled,
        # How blocks are multiplied was measured once; another route would change the last bits.
        "route": getattr(engine.source.operator, "route", None) or "",
    }
    if engine.subspace is not None:
        small.update(engine.subspace.scalars(), live=engine.subspace.live)
    keys = {SAVED + key: _plain(value) for key, value in small.items()}
    for g in engine.groups():
        # numpy scalars, which a scheduler may leave in lr, can't be loaded with weights_only=True.
        g.update({key: value.item() for key, value in g.items() if isinstance(value, np.generic)})
        g.update(keys)


def _plain(value: Any) -> Any:
    """Tensors as nested tuples: they print short, compare, and stay on no device."""
    if not isinstance(value, Tensor):
        return value
    return tuple(_plain(row) for row in value) if value.dim() else value.item()


def saved_scalars(group: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of a parameter group, without their prefix."""
    return {key.removeprefix(SAVED): value for key, value in group.items() if key.startswith(SAVED)}


def restore(engine: SubspaceEngine) -> None:
    """Take the small state from the first parameter group; without any, as from another optimizer, start anew."""
    saved = saved_scalars(engine.groups()[0])
    if "step" in saved:
        state = engine.state
        state.step, state.age = int(saved["step"]), int(saved["schedule_age"])
        state.interval, state.cost_ratio = int(saved["interval"]), float(saved["cost_ratio"])
        if math.isnan(engine.clock.product):  # this process has measured none yet
            engine.clock.product = float(saved.get("product_seconds", math.nan))
        engine.started, engine.alignment = bool(saved["started"]), float(saved["alignment"])
        engine.refusals.row, engine.history_filled = int(saved["refused"]), int(saved["history_filled"])
        if saved.get("route") and hasattr(engine.source.operator, "route"):
            setattr(engine.source.operator, "route", saved["route"])  # noqa: B010
    else:
        engine.forget()
    if engine.subspace is not None:
        if "eigenvalues" in saved:
            engine.subspace.load_scalars(saved)
        else:
            _empty(engine)
        engine.state.refreshes, engine.state.overlap = engine.subspace.refreshes, engine.subspace.overlap
    if engine.coefficients is not None:
        engine.coefficients.forget()
    export(engine)


def _empty(engine: SubspaceEngine) -> None:
    """No basis yet: the next step computes one."""
    s = engine.subspace
    assert s is not None
    for block in (*s.blocks, *s.probes, *(engine.history or ())):
        block.zero_()
    nothing = {
        key: torch.zeros_like(value) if isinstance(value, Tensor) else type(value)()
        for key, value in s.scalars().items()
    }
    s.load_scalars({**nothing, "overlap": math.nan})


# ---- the basis, per parameter
def blocks_of(engine: SubspaceEngine) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Per parameter p of the subspace: (p, {"basis": (k, *p.shape), "probe": (*p.shape), ...}), live tensors."""
    s = engine.subspace
    if s is None:
        return []
    out = []
    for i, p in enumerate(s.parameters.params):
        entry = {"basis": s.blocks[i], "probe": s.probes[i]}
        if engine.history is not None:
            entry["history"] = engine.history[i]
        out.append((p, entry))
    return out


def pair_saved(
    saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Any, Tensor]]:
    """(saved index, parameter) in the order in which torch matches them."""
    for saved, mine in zip(saved_groups, groups, strict=False):
        yield from zip(saved["params"], mine["params"], strict=False)


def saved_index(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[int, Any]:
    """Saved index of each parameter by ``id``."""
    return {id(p): i for i, p in pair_saved(state_dict["param_groups"], groups)}


def check_saved(engine: SubspaceEngine, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Check a state dict against the subspace before anything is loaded.

    Raises:
        ValueError: a block is missing or has the wrong shape (the parameter is named), or the spectrum's shape differs.
    """
    s = engine.subspace
    if s is None or not state_dict["param_groups"]:
        return
    scalars = saved_scalars(state_dict["param_groups"][0])
    index = saved_index(state_dict, engine.groups())
    names = dict(zip(map(id, s.parameters.params), s.parameters.names, strict=True))
    for p, entry in blocks_of(engine):
        saved = state_dict["state"].get(index.get(id(p)), {})
        for key, block in entry.items():
            if prefix + key in saved:
                check_block(names[id(p)], saved[prefix + key], tuple(block.shape))
            elif scalars.get("refreshes"):
                raise ValueError(
                    f"the state dict counts {scalars['refreshes']} refreshes but holds no {key} of parameter "
                    f"{names[id(p)]!r}: it is incomplete, or was saved with other parameters or another source="
                )
    expected = tuple(s.scalars()["eigenvalues"].shape)
    found = tuple(torch.as_tensor(scalars["eigenvalues"], device="cpu").shape) if "eigenvalues" in scalars else expected
    if found != expected:
        raise ValueError(
            f"saved eigenvalues have shape {found}, expected {expected} (bases, rank): "
            "was it saved with another layout=?"
        )


def restore_blocks(engine: SubspaceEngine, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Copy saved blocks into the live ones, in their own dtype: torch would have cast them to the parameter's."""
    index = saved_index(state_dict, engine.groups())
    for p, entry in blocks_of(engine):
        saved = state_dict["state"].get(index.get(id(p)), {})
        for key, block in entry.items():
            if prefix + key in saved:
                block.copy_(saved[prefix + key])
