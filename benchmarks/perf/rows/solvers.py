"""Eigenpairs from nothing: the leading ten, and the leading C - 1 of a classifier."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import curvopt
from benchmarks.perf.lab import EXACT_STEP, Lab, figure, gradient
from benchmarks.perf.record import OURS, Row
from benchmarks.perf.timing import Work
from benchmarks.perf.verify import residual

TRUE_RESIDUAL = 1e-3
Solve = Callable[[], tuple[Tensor, Tensor]]


def cold_top_ten(lab: Lab) -> list[Row]:
    """Ten leading pairs from a random start, to a true relative residual of 1e-3; the guard's part apart."""
    out, peers = [], lab.peers
    for name, target, ncv in (("mlp", 38.0, 21), ("gpt", 78.0, 32)):
        lab.say(f"cold top ten, {name}")
        t, judge = lab.trained(name), lab.judge(name)
        model, batch, loss = t.at(EXACT_STEP), t.curvature_batch, t.loss_fn
        size = sum(p.numel() for p in model.parameters())
        words: dict[str, str] = {}

        def ours(guard: int, side: str, model=model, batch=batch, loss=loss, words=words) -> tuple[Tensor, Tensor]:
            found = curvopt.eigsh(curvopt.Hessian(model, loss, batch, check=False), 10, tol=1e-3, guard=guard)
            words[side] = f"{found.matvecs} products"
            return found.eigenvalues, found.eigenvectors

        sides: dict[str, Solve] = {
            OURS: lambda ours=ours: ours(0, OURS),
            "curvopt with its guard": lambda ours=ours: ours(6, "curvopt with its guard"),
        }
        if "arpack" in peers:

            def by_hand(model=model, batch=batch, loss=loss, ncv=ncv, size=size, words=words) -> tuple[Tensor, Tensor]:
                arpack = peers["arpack"]
                values, vectors, count = arpack.leading(arpack.hessian(model, loss, batch), size, 10, ncv)
                words["eigsh on a kept graph"] = f"{count} products"
                return values, vectors

            sides["eigsh on a kept graph"] = by_hand
        if "eigenthings" in peers:
            lanczos = peers["eigenthings"].leading
            best = 30 if name == "mlp" else 40
            sides["eigenthings, documented"] = lambda f=lanczos, a=(model, loss, batch): f(*a, 10, None)
            sides["eigenthings, best"] = lambda f=lanczos, a=(model, loss, batch), n=best: f(*a, 10, n)
        if "curvlinops" in peers:
            solve = peers["curvlinops"].leading
            sides["curvlinops, best"] = lambda f=solve, a=(model, loss, batch): f(*a, 10, False)
            sides["curvlinops, documented"] = lambda f=solve, a=(model, loss, batch): f(*a, 10, True)
        if "pyhessian" in peers:
            power = peers["pyhessian"].leading
            sides["pyhessian, documented"] = lambda f=power, a=(model, loss, batch): f(*a, 10)

        answers: dict[str, tuple[Tensor, Tensor]] = {}

        def work(side: str, solve: Solve, answers=answers) -> Work:
            def run() -> None:
                answers[side] = solve()

            return run

        unit = gradient(model, loss, batch)
        fast = {s: work(s, f) for s, f in sides.items() if not s.endswith("documented")}
        slow = {s: work(s, f) for s, f in sides.items() if s.endswith("documented")}
        timings = {**lab.times(unit, fast), **lab.times(unit, slow, rounds=1)}
        row = Row("cold top ten, true residual 1e-3", name, "gradients", target)
        product = judge.product(EXACT_STEP)
        for side, timing in timings.items():
            values, vectors = answers[side]
            true, share = residual(product, values, vectors), judge.overlap(vectors, EXACT_STEP)
            text = f"residual {true:.0e}, overlap {share:.4f}" + (f", {words[side]}" if side in words else "")
            row.figures.append(figure(side, timing, true <= TRUE_RESIDUAL and share > 0.99, text))
        out.append(row)
    return out
