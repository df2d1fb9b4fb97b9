"""Refreshes of a cached basis: warm ones 50 steps later, from class directions, and averaged over rotating batches."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

import curvopt
from benchmarks.perf.lab import EXACT_STEP, Lab, figure, gradient
from benchmarks.perf.record import OURS, Figure, Row
from benchmarks.perf.verify import Spectrum, leading, overlap
from curvopt.curvature import class_directions
from curvopt.subspace import DominantSubspace

LATER = EXACT_STEP + 50
START_EXAMPLES = 250  # of the 1,000, the least decided ones: enough for a start
DIFFERENCES: dict[str, Any] = {"method": "finite_difference", "scheme": "forward"}


def _saved(subspace: DominantSubspace) -> dict[str, Any]:
    return copy.deepcopy(subspace.state_dict())


def warm(
    lab: Lab,
    name: str,
    k: int,
    target: float,
    what: str,
    published: float | None,
    reference: Callable[[], Spectrum] | None = None,
    **options: Any,
) -> Row:
    """One refresh from the basis of step 200 at the weights of step 250; what it costs and how near it gets.

    Args:
        lab, name: where and on which problem.
        k: rank.
        target: in gradients.
        what: the row's name.
        published: what a cold solution by peers costs there.
        reference: the right answer, called at the weights of step 250; None takes the judge's.
        options: of the operator.
    """
    lab.say(f"{what}, {name} k = {k}")
    t = lab.trained(name)
    loss, batch = t.loss_fn, t.curvature_batch
    t.train([EXACT_STEP, LATER])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subspace = DominantSubspace(curvopt.Hessian(t.at(EXACT_STEP), loss, batch, check=False), k)
        subspace.refresh()
        before = _saved(subspace)
        t.at(LATER)
        exact = reference() if reference else lab.judge(name).spectrum(LATER)
        model = t.at(LATER)
        subspace.attach(curvopt.Hessian(model, loss, batch, check=False, **options))

        def restore() -> None:
            subspace.load_state_dict(before)

        unit = gradient(model, loss, batch)
        timing = lab.times(unit, {OURS: subspace.refresh}, rounds=max(lab.rounds, 5), prepare=restore)[OURS]
        note = lab.explain(subspace.refresh, unit, timing.ratio, prepare=restore)
        restore()
        report = subspace.refresh()
    near = overlap(subspace.basis, exact)
    row = Row(what, f"{name} k = {k}", "gradients", target, note=note)
    words = f"overlap {near:.4f}, {report.matvecs} products ({report.kind})"
    row.figures.append(figure(OURS, timing, near >= 0.99, words))
    if published is not None:
        cold = "eigsh on a kept graph, cold"
        row.figures.append(Figure(cold, published, evidence="no peer warm-starts", published=True))
    return row


def warm_refreshes(lab: Lab) -> list[Row]:
    """To overlap .99, 50 steps later; probe column and orthogonalisation included."""
    exact, rough = "warm refresh, exact products", "warm refresh, gradient differences"
    return [
        warm(lab, "mlp", 9, 14.0, exact, 41.5),
        warm(lab, "mlp", 9, 13.5, rough, 41.5, **DIFFERENCES),
        warm(lab, "gpt", 4, 12.8, exact, 82.0),
        warm(lab, "gpt", 4, 6.6, rough, 82.0, **DIFFERENCES),
    ]


def warm_without_gap(lab: Lab) -> list[Row]:
    """No gap follows k: products, and whether the library says so and names the nearest gap."""
    lab.say("warm refresh without a gap, gpt k = 10")
    t, judge = lab.trained("gpt"), lab.judge("gpt")
    t.train([EXACT_STEP, LATER])
    batch = t.curvature_batch
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        operator = curvopt.Hessian(t.at(EXACT_STEP), t.loss_fn, batch, check=False)
        subspace = DominantSubspace(operator, 10, max_matvecs=60, tol=1e-3)
        subspace.refresh()
        t.at(LATER)
        report = subspace.refresh()
    said = [str(w.message) for w in caught if issubclass(w.category, curvopt.GapWarning)]
    near = overlap(subspace.basis, judge.spectrum(LATER))
    words = f"overlap {near:.4f}; said: {said[0] if said else 'nothing'}"
    right = near >= 0.99 and bool(said)
    row = Row("warm refresh where no gap follows k", "gpt k = 10", "products", 26.0)
    row.figures = [
        Figure(OURS, float(report.matvecs), right=right, evidence=words),
        Figure("eigsh on a kept graph, cold", 33.0, published=True),
    ]
    return [row]


def class_start(lab: Lab) -> list[Row]:
    """The leading C - 1 of a classifier, cold: class directions and one power step."""
    lab.say("class directions, mlp k = 9")
    t = lab.trained("mlp")
    exact = lab.judge("mlp").spectrum(EXACT_STEP)
    model, batch, loss = t.at(EXACT_STEP), t.curvature_batch, t.loss_fn
    found: dict[str, Any] = {}

    def ours() -> None:
        operator = curvopt.Hessian(model, loss, batch, check=False)
        subspace = DominantSubspace(operator, 9)
        found["report"] = subspace.refresh(start=class_directions(operator, START_EXAMPLES))
        found["basis"] = subspace.basis

    unit = gradient(model, loss, batch)
    timing = lab.times(unit, {OURS: ours})[OURS]
    near = overlap(found["basis"], exact)
    words = (
        f"overlap {near:.4f}, 9 reverse passes over the {START_EXAMPLES} least decided of {len(batch[0])} examples and "
        f"{found['report'].matvecs} products ({found['report'].kind})"
    )
    row = Row("cold leading C - 1 from class directions", "mlp k = 9", "gradients", 18.0)
    row.note = lab.explain(ours, unit, timing.ratio)
    row.figures = [
        figure(OURS, timing, near >= 0.995, words),
        Figure("eigsh on a kept graph", 41.5, published=True),
    ]
    return [row]


def averaged(lab: Lab) -> list[Row]:
    """A running average over rotating curvature batches of 1,000, judged on all 5,000; the worst checkpoint counts."""
    lab.say("averaged images over rotating batches, mlp k = 9")
    t = lab.trained("mlp")
    steps = list(range(EXACT_STEP, 2201, 50))
    t.train(steps)
    turn = itertools.cycle(range(5))
    model = t.at(EXACT_STEP)
    size = sum(p.numel() for p in model.parameters())

    def batch() -> tuple[Tensor, Tensor]:
        first = 1000 * next(turn)
        return t.rows(slice(first, first + 1000))

    subspace = DominantSubspace(curvopt.Hessian(model, t.loss_fn, batch, check=False), 9, gain=0.25)
    lines: list[str] = []
    worst, margin = 1.0, 1.0
    start: Tensor | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in steps:
            t.at(step)
            report = subspace.refresh()
            if step % 200 or step < 400:
                continue
            exact: Spectrum = leading(lab.judge("mlp").product(step, whole=True), size, 9, lab.device, start)
            start = exact.vectors.sum(1)
            mine = overlap(subspace.basis, exact)
            fresh_op = curvopt.Hessian(model, t.loss_fn, t.rows(slice(1000)), check=False)
            fresh = overlap(curvopt.eigsh(fresh_op, 9, tol=1e-3).eigenvectors, exact)
            worst = min(worst, mine)
            if step >= 600:
                margin = min(margin, mine - fresh)
            lines.append(f"{step}: {mine:.4f} ({report.kind}), fresh from 1,000 {fresh:.4f}")
    row = Row(
        "averaged images, worst overlap with all data's subspace, steps 400 to 2,200",
        "mlp k = 9",
        "overlap",
        0.98,
        True,
    )
    row.figures = [
        Figure(OURS, worst, right=margin >= 0.03, evidence=f"at least {margin:.3f} above a fresh basis from 600 on")
    ]
    row.note = "Step: ours, and a fresh basis from the first 1,000 examples. " + "; ".join(lines) + "."
    return [row]
