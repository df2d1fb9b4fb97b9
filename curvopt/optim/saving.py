"""Where the basis lives in an optimizer's saved state, and how it comes back in its own dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from curvopt.optim.engine import SubspaceEngine
from curvopt.subspace.dominant import check_block


def blocks_of(engine: SubspaceEngine) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Per parameter of the subspace: (parameter, {"basis": (k, \\*shape), "probe": (\\*shape), ...}), live tensors."""
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
    saved_groups: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]
) -> Iterator[tuple[Any, Tensor]]:
    """(saved index, parameter) in the order in which torch matches them."""
    for saved, mine in zip(saved_groups, groups, strict=False):
        yield from zip(saved["params"], mine["params"], strict=False)


def check_saved(engine: SubspaceEngine, saved_state: dict[Any, dict[str, Any]], index: dict[int, Any], prefix: str) -> None:
    """Check every saved block against the subspace before anything is loaded.

    Raises:
        ValueError: a block has the wrong shape (the parameter is named).
    """
    s = engine.subspace
    if s is None:
        return
    names = dict(zip(map(id, s.parameters.params), s.parameters.names, strict=True))
    for p, entry in blocks_of(engine):
        saved = saved_state.get(index.get(id(p)), {})
        for key, block in entry.items():
            if prefix + key in saved:
                check_block(names[id(p)], saved[prefix + key], tuple(block.shape))


def restore_blocks(
    engine: SubspaceEngine, saved_state: dict[Any, dict[str, Any]], index: dict[int, Any], prefix: str
) -> None:
    """Copy saved blocks into the live ones, in their own dtype: torch would have cast them to the parameter's."""
    for p, entry in blocks_of(engine):
        saved = saved_state.get(index.get(id(p)), {})
        for key, block in entry.items():
            if prefix + key in saved:
                block.copy_(saved[prefix + key])
