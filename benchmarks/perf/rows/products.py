"""Curvature products: what one costs when set-up is shared by ten, ours and the peers'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

import curvopt
from benchmarks.perf.lab import EXACT_STEP, Lab, figure, gradient, relative_flops
from benchmarks.perf.record import OURS, Row
from benchmarks.perf.verify import Product, ggn64, hessian64, relative_error

COUNT = 10
# Rounding of a float32 product along a random vector is 1e-6 here; a fault of LayerNorm's derivative shows as 4e-3.
RIGHT = 1e-4
# ReLU and max-pooling: a unit within rounding of its kink falls on the other side in float64, for every float32 code alike
# (2e-4 on the cnn).
RIGHT_WITH_KINKS = 2e-3
Make = Callable[[], Product]
BY_HAND = "by hand, graph kept"
COUNTED = (OURS, BY_HAND, "backpack")  # whose multiplications are counted, at the price of one more round


def _measure(
    lab: Lab,
    name: str,
    sides: dict[str, Make],
    exact: Product,
    row: Row,
    forms: bool = False,
    rounds: int | None = None,
) -> Row:
    trained = lab.trained(name)
    model, batch = trained.at(EXACT_STEP), trained.curvature_batch
    rows = lab.vectors(sum(p.numel() for p in model.parameters()), COUNT)
    unit = gradient(model, trained.loss_fn, batch)
    answers: dict[str, Tensor] = {}

    def work(side: str, make: Make) -> Callable[[], None]:
        def run() -> None:
            product = make()
            answers[side] = torch.stack([product(v) for v in rows])

        return run

    works = {side: work(side, make) for side, make in sides.items()}
    timings = lab.times(unit, works, rounds)
    expected = exact(rows[0])
    if forms:
        expected = rows[0].double() @ expected
    share = 1 if forms else COUNT
    right = RIGHT_WITH_KINKS if trained.problem.kinks else RIGHT
    for side, timing in timings.items():
        error = relative_error(answers[side][0], expected)
        flops = relative_flops(works[side], unit) if side in COUNTED else None
        scaled = type(timing)(timing.ratio / share, timing.low / share, timing.high / share)
        row.figures.append(
            figure(side, scaled, error < right, f"error {error:.0e}", None if flops is None else flops / share)
        )
    for p in model.parameters():
        p.grad = None
    ours = row.ours
    if ours is not None and ours.value:
        row.note = lab.explain(works[OURS], unit, ours.value, share)
    return row


def _held(op: curvopt.curvature.SymmetricOperator) -> Product:
    """The product of an operator whose graph is kept, as inside a refresh."""
    return _while_held(op, lambda v: op.multiply_rows(v[None])[0])


def _while_held(op: curvopt.curvature.SymmetricOperator, product: Product) -> Product:
    """The product with its operator's ``hold()`` open for as long as the function lives."""
    stack = ExitStack()
    stack.enter_context(op.hold())

    def held(v: Tensor, stack: ExitStack = stack) -> Tensor:
        return product(v)

    return held


def hessian_product(lab: Lab) -> list[Row]:
    """A Hessian product within a refresh, set-up shared over 10."""
    everybody = ("arpack", "pyhessian", "eigenthings", "curvlinops", "backpack")
    return [_hessian(lab, name, target, everybody) for name, target in (("mlp", 1.35), ("gpt", 2.35))]


def hessian_product_cnn(lab: Lab) -> list[Row]:
    """The same through convolutions, in evaluation mode; one round, because a side takes a minute or more."""
    return [_hessian(lab, "cnn", None, ("arpack", "pyhessian"), rounds=1)]


def _hessian(lab: Lab, name: str, target: float | None, peers: Sequence[str], rounds: int | None = None) -> Row:
    lab.say(f"Hessian product, {name}")
    t = lab.trained(name)
    model, batch, loss = t.at(EXACT_STEP), t.curvature_batch, t.loss_fn

    def of(peer: str) -> Make:
        return lambda: lab.peers[peer].hessian(model, loss, batch)

    sides: dict[str, Make] = {OURS: lambda: _held(curvopt.Hessian(model, loss, batch, check=False))}
    sides |= {BY_HAND if peer == "arpack" else peer: of(peer) for peer in peers if peer in lab.peers}
    row = Row("Hessian product, set-up shared over 10", name, "gradients", target)
    return _measure(lab, name, sides, hessian64(model, loss, batch), row, rounds=rounds)


def ggn_product(lab: Lab) -> list[Row]:
    """A GGN product within a refresh, set-up shared over 10."""
    return [_ggn(lab, name, target, False) for name, target in (("mlp", 1.15), ("gpt", 1.7))]


def ggn_forms(lab: Lab) -> list[Row]:
    """Ten forms v^T G v, cold."""
    return [_ggn(lab, name, target, True) for name, target in (("mlp", 6.5), ("gpt", 9.5))]


def _ggn(lab: Lab, name: str, target: float, forms: bool) -> Row:
    what = "ten forms v'Gv, cold" if forms else "GGN product, set-up shared over 10"
    lab.say(f"{what}, {name}")
    t = lab.trained(name)
    model, batch, loss = t.at(EXACT_STEP), t.curvature_batch, t.loss_fn

    def ours() -> Product:
        op = curvopt.GGN(model, loss, batch, check=False)
        if forms:
            return _while_held(op, lambda v: op.forms(v[:, None])[0])
        return _held(op)

    def of(peer: str) -> Make:
        def make() -> Product:
            product = lab.peers[peer].ggn(model, loss, batch)
            return (lambda v: v @ product(v)) if forms else product

        return make

    sides = {OURS: ours, **{p: of(p) for p in ("backpack", "eigenthings", "curvlinops") if p in lab.peers}}
    return _measure(lab, name, sides, ggn64(model, loss, batch), Row(what, name, "gradients", target), forms)
