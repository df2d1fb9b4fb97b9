"""Other people's curvature codes, each used as its documentation advises, behind one signature.

A peer's product is a function of a flat vector (P,) at the model's present weights. Peers that are not installed are
listed with the reason (``Peers.missing``): ``pip install "curvopt-torch[peers]"`` brings them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from torch import Tensor

Product = Callable[[Tensor], Tensor]

DISTRIBUTIONS = {
    "arpack": "scipy",
    "backpack": "backpack-for-pytorch",
    "curvlinops": "curvlinops-for-pytorch",
    "eigenthings": "hessian-eigenthings",
    "pyhessian": "PyHessian",
}


class Peers:
    """The peers that can be imported here.

    Attributes:
        found: {name: module of this package}.
        versions: {name: version}, for the found ones.
        missing: {name: why not}.
    """

    def __init__(self) -> None:
        self.found: dict[str, ModuleType] = {}
        self.versions: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        for name, distribution in DISTRIBUTIONS.items():
            try:
                self.found[name] = importlib.import_module(f"{__name__}.{name}")
                self.versions[name] = version(distribution)
            except (ImportError, PackageNotFoundError) as error:
                self.missing[name] = str(error).splitlines()[0]

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def __getitem__(self, name: str) -> ModuleType:
        return self.found[name]
