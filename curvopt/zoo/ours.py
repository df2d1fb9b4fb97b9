"""curvopt's own optimizers, and the rivals that are written here, as data."""

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


def _lbfgs(name: str, search: SearchSpace, remarks: str, fixed: dict[str, object] | None = None) -> Entry:
    return Entry(
        name,
        "curvopt.optim.lbfgs:SubspaceLBFGS",
        "subspace",
        fixed=fixed or {},
        needs_closure=True,
        param_groups=False,
        memory=None,
        paper="Liu and Nocedal 1989; initial matrix ours",
        licence="MIT",
        search=search,
        remarks=f"Up to max_iter=20 iterations a step; memory: 2 history_size + rank numbers a parameter. {remarks}",
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
    _lbfgs(
        "subspace-lbfgs",
        search={"rank": Choice((20, 10, 40)), "history_size": Choice((50, 20, 100))},
        remarks="Differentiates the closure's gradients; full-batch problems solved to high precision.",
    ),
    _lbfgs(
        "subspace-lbfgs-rank0",
        fixed={"rank": 0},
        search={"history_size": Choice((50, 20, 100)), "line_search_fn": Choice(("armijo", "strong_wolfe"))},
        remarks="The control: plain L-BFGS with the same line search.",
    ),
)


def _rival(name: str, target: str, family: str, paper: str, search: SearchSpace, **kw: object) -> Entry:
    return Entry(
        name,
        f"curvopt.zoo.rivals.{target}",
        family,
        needs_closure=True,
        param_groups=False,
        memory=None,
        paper=paper,
        licence="MIT",
        search=search,
        **kw,  # type: ignore[arg-type]
    )


_DENSE: SearchSpace = {"line_search_fn": Choice(("strong_wolfe", "armijo")), "initial_scale": Choice((True, False))}

register(
    _rival(
        "ssbroyden",
        "bfgs:BFGS",
        "quasi-newton",
        "Urban, Stefanou and Pons 2025",
        _DENSE,
        remarks="Dense inverse Hessian, P^2 numbers: at most 20,000 parameters. Up to max_iter=20 iterations a step.",
    ),
    _rival(
        "bfgs",
        "bfgs:BFGS",
        "quasi-newton",
        "Nocedal and Wright 2006",
        _DENSE,
        fixed={"update": "bfgs"},
        remarks="Dense inverse Hessian, P^2 numbers: at most 20,000 parameters. Up to max_iter=20 iterations a step.",
    ),
    _rival(
        "levenberg-marquardt",
        "levenberg:LevenbergMarquardt",
        "curvature",
        "Madsen, Nielsen and Tingleff 2004",
        {"damping": Range(1e-6, 1.0)},
        needs_residuals=True,
        remarks="Holds the Jacobian, residuals times parameters: at most 20,000 of each. max_iter=20 Jacobians a step.",
    ),
    _rival(
        "nncg",
        "nncg:NystromNewtonCG",
        "curvature",
        "arXiv 2402.01868",
        {"damping": Range(1e-5, 1e-1)},
        remarks="Up to max_iter=20 iterations a step, each with a solve of up to cg_iterations=1000 Hessian products.",
    ),
)

register(
    Entry(
        "ire-sgd",
        "curvopt.zoo.rivals.ire:IRE",
        "subspace",
        memory=2.0,
        paper="arXiv 2405.20763",
        licence="MIT",
        search={"lr": Range(1e-4, 10.0), "prog": Range(0.25, 4.0), "sharp": Choice((0.1, 0.01, 0.4))},
        remarks="SGD with momentum; longer steps along the coordinates with a small diagonal Fisher.",
    ),
    Entry(
        "eigen-sam",
        "curvopt.zoo.rivals.eigen_sam:EigenSAM",
        "curvature",
        needs_closure=True,
        needs_curvature=True,
        memory=2.0,
        paper="arXiv 2501.12666",
        licence="MIT",
        search={"lr": Range(1e-4, 10.0), "rho": Range(0.005, 0.5)},
        remarks="Two gradients a step; the perturbation of SAM turned toward the top eigenvector, by five products a refresh.",
    ),
)
