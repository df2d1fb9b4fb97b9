"""schedule-free's optimizers (Defazio et al. 2024), as data; each class was run on torch 2.13 for this table.

They train one point and evaluate another: call ``train()`` before training and ``eval()`` before evaluating or saving.
The ``-closure`` forms need neither; their ``step`` takes the closure that computes the gradients instead.
"""

from __future__ import annotations

from typing import Any

from curvopt.zoo.registry import Entry, Range, register


def _row(name: str, cls: str, memory: float, lr: float, **facts: Any) -> Entry:
    facts = {"needs_train_mode": True, "search": {"lr": Range.around(lr)}, **facts}
    return Entry(
        f"schedule-free/{name}",
        f"schedulefree:{cls}",
        "averaging",
        memory=memory,
        holds_parameters_copy=True,
        schedulable=False,  # the average goes on moving; a schedule defeats the method's point
        paper="arXiv 2405.15682",
        licence="Apache-2.0",
        **facts,
    )


_REFERENCE = "Written for reading, with every sequence stored; schedule-free/{} takes the same steps in less memory."
_CLOSURE: dict[str, Any] = {"needs_train_mode": False, "needs_closure": True}

register(
    _row("sgd", "SGDScheduleFree", 1, 1.0),
    _row("adamw", "AdamWScheduleFree", 2, 0.025),
    _row("radam", "RAdamScheduleFree", 2, 0.25),
    _row("sgd-closure", "SGDScheduleFreeClosure", 1, 1.0, **_CLOSURE),
    _row("adamw-closure", "AdamWScheduleFreeClosure", 2, 0.025, **_CLOSURE),
    _row("radam-closure", "RAdamScheduleFreeClosure", 2, 0.25, **_CLOSURE),
    _row("sgd-reference", "SGDScheduleFreeReference", 3, 1.0, remarks=_REFERENCE.format("sgd")),
    _row("adamw-reference", "AdamWScheduleFreeReference", 4, 0.025, remarks=_REFERENCE.format("adamw")),
    _row("adamw-paper", "AdamWScheduleFreePaper", 2, 0.025, remarks="The algorithm as the paper prints it."),
)
