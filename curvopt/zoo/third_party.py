"""Optimizers of torch-optimizer 0.3.0, as data; each class was run on torch 2.13 for this table."""

from __future__ import annotations

from curvopt.zoo.registry import Entry, Range, register

_LR = Range(1e-5, 1.0)
_GROUP = "a param group added later never moves: it loops over the learning rates that the constructor saw"

# class: (name, family, numbers of state a parameter, copy of the parameters, paper, remarks)
_WORKING: dict[str, tuple[str, str, float | None, bool, str, str]] = {
    "AccSGD": ("accsgd", "sgd", 1, True, "arXiv 1803.05591", "A learning rate of 0 does not freeze the parameters."),
    "AdaBelief": ("adabelief", "adaptive", 2, False, "arXiv 2010.07468", ""),
    "AdaMod": ("adamod", "adaptive", 3, False, "arXiv 1910.12249", ""),
    "AdamP": ("adamp", "adaptive", 2, False, "arXiv 2006.08217", ""),
    "AggMo": ("aggmo", "sgd", 3, False, "arXiv 1804.00325", ""),
    "Apollo": ("apollo", "adaptive", 3, False, "arXiv 2009.13586", ""),
    "DiffGrad": ("diffgrad", "adaptive", 3, False, "arXiv 1909.11015", ""),
    "LARS": ("lars", "sgd", 0, False, "arXiv 1708.03888", ""),
    "Lamb": ("lamb", "adaptive", 2, False, "arXiv 1904.00962", ""),
    "MADGRAD": (
        "madgrad",
        "adaptive",
        3,
        True,
        "arXiv 2101.11075",
        "A learning rate of 0 does not freeze the parameters.",
    ),
    "NovoGrad": ("novograd", "adaptive", 1, False, "arXiv 1905.11286", ""),
    "PID": ("pid", "sgd", 3, False, "CVPR 2018", ""),
    "QHAdam": ("qhadam", "adaptive", 2, False, "arXiv 1810.06801", ""),
    "QHM": ("qhm", "sgd", 1, False, "arXiv 1810.06801", ""),
    "RAdam": ("radam", "adaptive", 2, False, "arXiv 1908.03265", "torch.optim has its own."),
    "RangerQH": ("rangerqh", "adaptive", 3, True, "arXiv 1810.06801", ""),
    "SGDP": ("sgdp", "sgd", 1, False, "arXiv 2006.08217", ""),
    "SGDW": ("sgdw", "sgd", 0, False, "arXiv 1711.05101", ""),
    "SWATS": ("swats", "adaptive", 2, False, "arXiv 1712.07628", ""),
    "Shampoo": (
        "shampoo",
        "matrix",
        None,
        False,
        "arXiv 1802.09568",
        "A singular value decomposition each step: slow.",
    ),
    "Yogi": ("yogi", "adaptive", 2, False, "NeurIPS 2018", ""),
}

_BROKEN: dict[str, tuple[str, str, str]] = {
    "A2GradUni": ("a2graduni", "arXiv 1810.00553", "has no learning rate: any scheduler fails on None"),
    "A2GradInc": ("a2gradinc", "arXiv 1810.00553", "has no learning rate: any scheduler fails on None"),
    "A2GradExp": ("a2gradexp", "arXiv 1810.00553", "has no learning rate: any scheduler fails on None"),
    "AdaBound": ("adabound", "arXiv 1902.09843", _GROUP),
    "Adafactor": ("adafactor", "arXiv 1804.04235", "fails on four-dimensional weights; torch.optim has its own"),
    "Lookahead": (
        "lookahead",
        "arXiv 1907.08610",
        "never initialises torch's Optimizer: state_dict, schedulers and closures raise AttributeError",
    ),
    "Ranger": ("ranger", "arXiv 1907.08610", "ignores the closure: it is never called and step returns None"),
    "RangerVA": ("rangerva", "arXiv 1908.00700", "ignores the closure: it is never called and step returns None"),
}


def _entry(cls: str, name: str, family: str, **kw: object) -> Entry:
    return Entry(f"torch-optimizer/{name}", f"torch_optimizer:{cls}", family, licence="Apache-2.0", **kw)  # type: ignore[arg-type]


register(
    *(
        _entry(
            cls,
            name,
            family,
            memory=memory,
            holds_parameters_copy=copy,
            paper=paper,
            remarks=remarks,
            search={"lr": _LR},
        )
        for cls, (name, family, memory, copy, paper, remarks) in _WORKING.items()
    ),
    _entry(
        "Adahessian",
        "adahessian",
        "curvature",
        memory=2,
        needs_create_graph=True,
        products_per_step=1.0,
        paper="arXiv 2006.00719",
        search={"lr": Range(1e-3, 1.0)},
        remarks="Fails on three-dimensional weights; seed= reseeds torch's global generator.",
    ),
    *(
        _entry(cls, name, "adaptive", paper=paper, available=False, reason=reason)
        for cls, (name, paper, reason) in _BROKEN.items()
    ),
)
