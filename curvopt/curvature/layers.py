"""Parameters grouped by the layer that owns them."""

from __future__ import annotations

from torch import Tensor

from curvopt._params import ParameterLayout


def group_by_layer(layout: ParameterLayout) -> dict[str, list[Tensor]]:
    """Parameters by the dotted name of the owning module, in the layout's order.

    A tied parameter belongs to its first owner; the root module's own parameters are under ``""``; the parts of a
    parametrized weight belong to the layer that it parametrizes.
    """
    groups: dict[str, list[Tensor]] = {}
    for name, p in zip(layout.names, layout.params, strict=True):
        owner = name.rpartition(".")[0].split(".parametrizations.")[0]
        groups.setdefault("" if owner.startswith("parametrizations.") else owner, []).append(p)
    return groups
