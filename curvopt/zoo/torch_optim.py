"""torch.optim's optimizers, as data."""

from __future__ import annotations

from curvopt.zoo.registry import Entry, Range, register

_LICENCE = "BSD-3-Clause"
_DECAY = Range(1e-6, 1e-1)
_ADAM = {"lr": Range(1e-5, 1e-1), "weight_decay": _DECAY}


def _entry(name: str, cls: str, family: str, memory: float | None, **kw: object) -> Entry:
    return Entry(name, f"torch.optim:{cls}", family, memory=memory, licence=_LICENCE, **kw)  # type: ignore[arg-type]


register(
    _entry("sgd", "SGD", "sgd", 0, paper="Robbins and Monro 1951", search={"lr": Range(1e-4, 10.0)}),
    _entry(
        "sgd-momentum",
        "SGD",
        "sgd",
        1,
        fixed={"momentum": 0.9},
        paper="Polyak 1964",
        search={"lr": Range(1e-4, 10.0), "momentum": Range(0.5, 0.99, log=False)},
    ),
    _entry(
        "sgd-nesterov",
        "SGD",
        "sgd",
        1,
        fixed={"momentum": 0.9, "nesterov": True},
        paper="Nesterov 1983",
        search={"lr": Range(1e-4, 10.0), "momentum": Range(0.5, 0.99, log=False)},
    ),
    _entry("adam", "Adam", "adaptive", 2, paper="arXiv 1412.6980", search=_ADAM),
    _entry("adamw", "AdamW", "adaptive", 2, paper="arXiv 1711.05101", search=_ADAM),
    _entry("nadam", "NAdam", "adaptive", 2, paper="Dozat 2016", search=_ADAM),
    _entry("radam", "RAdam", "adaptive", 2, paper="arXiv 1908.03265", search=_ADAM),
    _entry("rmsprop", "RMSprop", "adaptive", 1, paper="Tieleman and Hinton 2012", search={"lr": Range(1e-5, 1e-1)}),
    _entry("adagrad", "Adagrad", "adaptive", 1, paper="Duchi, Hazan and Singer 2011", search={"lr": Range(1e-4, 1.0)}),
    _entry("adadelta", "Adadelta", "adaptive", 2, paper="arXiv 1212.5701", search={"lr": Range(1e-2, 10.0)}),
    _entry("adamax", "Adamax", "adaptive", 2, paper="arXiv 1412.6980", search=_ADAM),
    _entry(
        "asgd",
        "ASGD",
        "sgd",
        1,
        paper="Polyak and Juditsky 1992",
        search={"lr": Range(1e-4, 10.0)},
        schedulable=False,
        remarks="lambd decays the weights whatever lr is. The average is kept in state 'ax'; the parameters themselves are not averaged.",
    ),
    _entry(
        "rprop",
        "Rprop",
        "sign",
        2,
        paper="Riedmiller and Braun 1993",
        search={"lr": Range(1e-5, 1e-1)},
        schedulable=False,
        remarks="Meant for full batches; lr is only the first step size.",
    ),
    _entry("adafactor", "Adafactor", "adaptive", None, paper="arXiv 1804.04235", search={"lr": Range(1e-4, 1e-1)}),
    _entry(
        "lbfgs",
        "LBFGS",
        "quasi-newton",
        None,
        needs_closure=True,
        param_groups=False,
        adds_groups=False,
        paper="Liu and Nocedal 1989",
        search={"lr": Range(1e-2, 1.0)},
        remarks="Up to max_iter=20 iterations a step; memory: 2 history_size, 100 by default, numbers a parameter.",
    ),
    _entry(
        "muon",
        "Muon",
        "matrix",
        1,
        matrices_only=True,
        paper="Jordan et al. 2024",
        search={"lr": Range(1e-4, 1e-1), "weight_decay": _DECAY},
        remarks="Two-dimensional parameters only: give the others to another optimizer.",
    ),
    _entry(
        "sparse-adam",
        "SparseAdam",
        "adaptive",
        2,
        paper="arXiv 1412.6980",
        available=False,
        reason="takes sparse gradients alone, the other optimizers here dense ones",
    ),
)
