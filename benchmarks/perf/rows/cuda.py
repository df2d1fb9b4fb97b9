"""Rows that need a CUDA device: a block of products on a small net, and the shape of GPT-2 small."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor

import curvopt
from benchmarks.perf.lab import EXACT_STEP, Lab, figure, gradient
from benchmarks.perf.operations import launches
from benchmarks.perf.record import OURS, Figure, Row
from benchmarks.perf.rows.refreshes import DIFFERENCES, LATER, warm
from benchmarks.perf.rows.solvers import TRUE_RESIDUAL
from benchmarks.perf.verify import Spectrum, overlap, residual
from curvopt.linalg import EigenResult
from curvopt.optim import rules

NOT_RUN = "Not run: no CUDA device."


def block(lab: Lab) -> list[Row]:
    """A block of products where launches dominate."""
    row = Row("block of 10 products, small net", "mlp, CUDA", "single products", 2.5)
    lab.say("block of 10 products on CUDA")
    t = lab.trained("mlp")
    model = t.at(EXACT_STEP)
    there = lab.device.type == "cuda"
    operator = curvopt.Hessian(model, t.loss_fn, t.rows(slice(50)), check=False, route=None if there else "batched")
    rows = lab.vectors(operator.shape[0], 10)
    with operator.hold():
        operator.multiply_rows(rows)  # the graph, and the trial of routes on a device
        one, many = (launches(partial(operator.multiply_rows, some)) for some in (rows[:1], rows))
        words = (
            f"{many} operations that write, {one} of one product: what it comes to where nothing but launches counts"
        )
        row.figures = [Figure("launches, counted", many / one, evidence=words, counts=False)]
        if not there:
            row.note = NOT_RUN
            return [row]
        timing = lab.times(lambda: operator.multiply_rows(rows[:1]), {OURS: lambda: operator.multiply_rows(rows)})
    row.figures.insert(0, figure(OURS, timing[OURS], None, f"route {operator.route}"))
    return [row]


def gpt2(lab: Lab) -> list[Row]:
    """The shape of GPT-2 small: cold exactly and by differences, warm by differences, and the projection of a step."""
    if lab.device.type != "cuda":
        return [Row(name, problem, unit, target, note=NOT_RUN) for name, problem, unit, target in GPT2_ROWS]
    return gpt2_rows(lab)


GPT2_ROWS = (
    ("cold top ten, true residual 1e-3", "gpt2", "gradients", 75.0),
    ("cold top ten, gradient differences, overlap .98", "gpt2", "gradients", 40.0),
    ("warm refresh, gradient differences, k at a gap", "gpt2", "gradients", 13.0),
    ("projection of a step, k = 10, basis in bfloat16", "gpt2, 32 windows", "share of a step", 0.03),
)


def gpt2_rows(lab: Lab, windows: int = 32) -> list[Row]:
    """The rows of ``gpt2`` wherever the lab is; a step takes ``windows`` windows.

    ARPACK would need its vectors in the host's memory, so the answers are judged by the residuals that independent
    float64 products give, and the overlaps against the pairs that passed.
    """
    rows = [Row(*head) for head in GPT2_ROWS]
    t, judge = lab.trained("gpt2"), lab.judge("gpt2")
    t.train([EXACT_STEP, LATER])
    batch, loss = t.curvature_batch, t.loss_fn
    model = t.at(EXACT_STEP)
    unit = gradient(model, loss, batch)
    found: dict[str, EigenResult] = {}

    def exact() -> None:
        found["exact"] = curvopt.eigsh(curvopt.Hessian(model, loss, batch, check=False), 10, tol=1e-3, guard=0)

    def rough() -> None:
        operator = curvopt.Hessian(model, loss, batch, check=False, **DIFFERENCES)
        found["rough"] = curvopt.eigsh(operator, 10, tol=5e-3, guard=0, max_matvecs=40)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lab.say("gpt2, cold top ten")
        timings = lab.times(unit, {OURS: exact, "differences": rough})
        pairs = found["exact"]
        true = residual(judge.product(EXACT_STEP), pairs.eigenvalues, pairs.eigenvectors)
        words = f"residual {true:.0e}, {pairs.matvecs} products"
        rows[0].figures = [figure(OURS, timings[OURS], true <= TRUE_RESIDUAL, words)]
        near = overlap(found["rough"].eigenvectors, _spectrum(pairs))
        words = f"overlap {near:.4f} with the pairs of the row before, {found['rough'].matvecs} products"
        rows[1].figures = [figure(OURS, timings["differences"], near >= 0.98, words)]
    k = _largest_gap(pairs)

    def later() -> Spectrum:
        return _spectrum(curvopt.eigsh(curvopt.Hessian(model, loss, batch, check=False), k, tol=1e-3))

    rows[2] = warm(lab, "gpt2", k, GPT2_ROWS[2][3], GPT2_ROWS[2][0], None, later, **DIFFERENCES)
    rows[3].figures = [_projection_share(lab, pairs.eigenvectors, windows)]
    return rows


def _spectrum(pairs: EigenResult) -> Spectrum:
    return Spectrum(pairs.eigenvalues.double(), pairs.eigenvectors.double())


def _largest_gap(pairs: EigenResult) -> int:
    """How many pairs lie before the largest ratio of neighbours."""
    values = pairs.eigenvalues.double()
    return 1 + int((values[:-1] / values[1:]).argmax())


def _projection_share(lab: Lab, vectors: Tensor, windows: int) -> Figure:
    """Of a step's gradient and projection together."""
    lab.say("gpt2, projection")
    t = lab.trained("gpt2")
    model = t.at(EXACT_STEP)
    params = list(model.parameters())
    sizes = [p.numel() for p in params]
    basis = [b.contiguous() for b in vectors.T.to(torch.bfloat16).split(sizes, dim=1)]
    update = [p.detach().flatten().clone() for p in params]
    moved = [torch.zeros_like(u) for u in update]

    def project() -> None:
        c = rules.coefficients(basis, update)
        for p, b in zip(moved, basis, strict=True):
            rules.add_combination_(p, b, c)

    timing = lab.times(gradient(model, t.loss_fn, t.rows(slice(windows))), {OURS: project})[OURS]
    share = timing.ratio / (1 + timing.ratio)
    return Figure(OURS, share, evidence=f"{windows * t.inputs.shape[1]} tokens a step")
