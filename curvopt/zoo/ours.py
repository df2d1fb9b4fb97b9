"""curvopt's own optimizers, as data."""

from __future__ import annotations

from curvopt.zoo.registry import Choice, Entry, Range, SearchSpace, register

_PAPER = "arXiv 2505.11972, 2405.16002"
_SPACE: SearchSpace = {"lr": Range(1e-4, 10.0), "momentum": Choice((0.0, 0.9))}


_COEFFICIENTS = ("dominant", "bulk")


def _entry(name: str, cls: str, search: SearchSpace = _SPACE, remarks: str = "", omits: tuple[str, ...] = ()) -> Entry:
    return Entry(
        name,
        f"curvopt.optim.sgd:{cls}",
        "subspace",
        needs_curvature=True,
        memory=None,
        omits=omits,
        paper=_PAPER,
        licence="MIT",
        search=search,
        remarks=("Memory: the base's plus rank numbers a parameter. " + remarks).strip(),
    )


register(
    _entry("bulk-sgd", "BulkSGD", omits=_COEFFICIENTS),
    _entry(
        "dom-sgd",
        "DomSGD",
        remarks="Expected to stall: it shows what the dominant part alone can do.",
        omits=_COEFFICIENTS,
    ),
    _entry(
        "interpolated-sgd",
        "InterpolatedSGD",
        search={**_SPACE, "dominant": Range(0.0, 1.0, log=False), "bulk": Range(0.5, 4.0)},
    ),
    _entry("ggn-projected-sgd", "GGNProjectedSGD", remarks="Eigenvectors of the GGN: no double backward needed."),
)
