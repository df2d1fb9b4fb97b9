"""Optimizers of torch-optimizer 0.3.0, as data; each class was run on torch 2.13 for this table.

Where pytorch_optimizer has the same method, prefer that one: it is maintained.
"""

from __future__ import annotations

from typing import Any

from curvopt.zoo.registry import Entry, Range, register

_LIPS = {"lips": Range(0.1, 1000.0)}
_LICENCE = "Apache-2.0"
_LOOKAHEAD = "Averages with a slow copy every k = 6 steps."


def _row(
    name: str,
    cls: str,
    family: str,
    memory: float | None,
    lr: float | None,
    paper: str,
    adapted: bool = False,
    **facts: Any,
) -> Entry:
    """An entry; ``lr``: the middle of its search range; ``adapted``: the class of curvopt.zoo.adapt is taken."""
    search = {} if lr is None else {"lr": Range.around(lr)}
    facts = {"search": search, **facts}
    target = f"curvopt.zoo.adapt:{cls}" if adapted else f"torch_optimizer:{cls}"
    return Entry(
        f"torch-optimizer/{name}",
        target,
        family,
        package="torch_optimizer",
        memory=memory,
        paper=paper,
        licence=_LICENCE,
        **facts,
    )


def _no(name: str, cls: str, paper: str, reason: str) -> Entry:
    return Entry(
        f"torch-optimizer/{name}",
        f"torch_optimizer:{cls}",
        "adaptive",
        paper=paper,
        licence=_LICENCE,
        available=False,
        reason=reason,
    )


# name, class, family, numbers of state a parameter, learning rate, paper, facts
register(
    _row(
        "a2graduni",
        "A2GradUni",
        "sgd",
        2,
        None,
        "arXiv 1810.00553",
        schedulable=False,
        search=_LIPS,
        holds_parameters_copy=True,
    ),
    _row(
        "a2gradinc",
        "A2GradInc",
        "sgd",
        2,
        None,
        "arXiv 1810.00553",
        schedulable=False,
        search=_LIPS,
        holds_parameters_copy=True,
    ),
    _row(
        "a2gradexp",
        "A2GradExp",
        "sgd",
        2,
        None,
        "arXiv 1810.00553",
        schedulable=False,
        search=_LIPS,
        holds_parameters_copy=True,
    ),
    _row("accsgd", "AccSGD", "sgd", 1, 0.1, "arXiv 1704.08227", holds_parameters_copy=True, schedulable=False),
    _row("adabelief", "AdaBelief", "adaptive", 2, 0.01, "arXiv 2010.07468"),
    _row("adabound", "AdaBound", "adaptive", 2, 0.01, "arXiv 1902.09843", adapted=True),
    _no("adafactor", "Adafactor", "arXiv 1804.04235", "fails on four-dimensional weights; torch.optim has its own"),
    _row(
        "adahessian",
        "Adahessian",
        "curvature",
        2,
        0.15,
        "arXiv 2006.00719",
        needs_create_graph=True,
        products_per_step=1.0,
        remarks="Fails on three-dimensional weights; seed= reseeds torch's global generator.",
    ),
    _row("adamod", "AdaMod", "adaptive", 3, 0.3, "arXiv 1910.12249"),
    _row("adamp", "AdamP", "adaptive", 2, 0.01, "arXiv 2006.08217"),
    _row("aggmo", "AggMo", "sgd", 3, 0.1, "arXiv 1804.00325"),
    _row("apollo", "Apollo", "adaptive", 3, 0.1, "arXiv 2009.13586"),
    _row("diffgrad", "DiffGrad", "adaptive", 3, 0.1, "arXiv 1909.11015"),
    _row("lamb", "Lamb", "adaptive", 2, 0.1, "arXiv 1904.00962"),
    _row("lars", "LARS", "sgd", 0, 0.1, "arXiv 1708.03888"),
    _no(
        "lookahead",
        "Lookahead",
        "arXiv 1907.08610",
        "never initialises torch's Optimizer: state_dict, schedulers and closures raise AttributeError; "
        "pytorch_optimizer has one that works",
    ),
    _row(
        "madgrad",
        "MADGRAD",
        "adaptive",
        3,
        0.01,
        "arXiv 2101.11075",
        adapted=True,
        holds_parameters_copy=True,
        schedulable=False,
    ),
    _row("novograd", "NovoGrad", "adaptive", 1, 0.01, "arXiv 1905.11286"),
    _row("pid", "PID", "sgd", 0, 0.1, "CVPR 2018"),
    _row("qhadam", "QHAdam", "adaptive", 2, 0.01, "arXiv 1810.06801"),
    _row("qhm", "QHM", "sgd", 1, 0.1, "arXiv 1810.06801"),
    _row("radam", "RAdam", "adaptive", 2, 0.1, "arXiv 1908.03265", adapted=True),
    _row(
        "ranger",
        "Ranger",
        "averaging",
        3,
        0.1,
        "arXiv 1907.08610",
        adapted=True,
        holds_parameters_copy=True,
        remarks=_LOOKAHEAD,
    ),
    _row(
        "rangerqh", "RangerQH", "averaging", 3, 0.1, "arXiv 1810.06801", holds_parameters_copy=True, remarks=_LOOKAHEAD
    ),
    _row(
        "rangerva",
        "RangerVA",
        "averaging",
        4,
        0.1,
        "arXiv 1908.00700",
        adapted=True,
        holds_parameters_copy=True,
        remarks=_LOOKAHEAD,
    ),
    _row("sgdp", "SGDP", "sgd", 1, 0.1, "arXiv 2006.08217"),
    _row("sgdw", "SGDW", "sgd", 0, 0.1, "arXiv 1711.05101"),
    _row(
        "shampoo",
        "Shampoo",
        "matrix",
        None,
        0.05,
        "arXiv 1802.09568",
        remarks="A singular value decomposition each step: slow.",
    ),
    _row("swats", "SWATS", "adaptive", 2, 0.03, "arXiv 1712.07628"),
    _row("yogi", "Yogi", "adaptive", 2, 0.01, "NeurIPS 2018"),
)
