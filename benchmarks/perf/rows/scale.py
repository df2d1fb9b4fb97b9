"""A refresh's cost beside a gradient's over four decades of parameters."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn

import curvopt
from benchmarks.perf.lab import Lab
from benchmarks.perf.record import OURS, Figure, Row
from benchmarks.perf.timing import Work, seconds
from curvopt.linalg import power_image
from curvopt.linalg.orthogonal import orthonormalize_rows

RANK = 4
PROFILED = 3000  # the width whose profile stands in the note


def scale(lab: Lab) -> list[Row]:
    """Seconds a product of a power step, which a warm refresh is, and of a gradient over P: slopes in the logarithms."""
    points, note = [], ""
    for width in (10, 100, 1000, PROFILED, 9500):
        point, profile = _at_width(lab, width)
        points.append(point)
        note = profile or note
    size, product, once, counted = (torch.tensor(c, dtype=torch.float64) for c in zip(*points, strict=True))
    slopes = _slope(size, product), _slope(size, once)
    row = Row(
        "slope of a refresh's seconds over P, against the gradient's", "mlp, P = 8e3 to 9.8e7", "ratio of slopes", 1.0
    )
    words = "; ".join(f"P = {p:.1e}: {a / b:.2f} gradients a product, counted {c:.2f}" for p, a, b, c in points)
    row.figures = [Figure(OURS, slopes[0] / slopes[1], evidence=f"slopes {slopes[0]:.2f} and {slopes[1]:.2f}; {words}")]
    row.note = (
        f"A power step of {RANK + 1} products, set-up included, batches of 1,000. "
        f"Bound: multiplications alone give {_slope(size, counted * once) / slopes[1]:.2f}. The first layer needs no "
        "input gradient, which makes a narrow net's products cheaper beside its gradient than a wide one's, where the "
        f"square hidden layer is nearly all. The step at P = {points[3][0]:.1e}: {note}"
    )
    return [row]


def _at_width(lab: Lab, width: int) -> tuple[tuple[int, float, float, float], str]:
    """(P, seconds a product of a power step, seconds of a gradient, gradients a product by count), and a profile."""
    lab.say(f"scale, width {width}")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    model.to(lab.device)
    x, y = torch.randn(1000, 784, device=lab.device), torch.randint(10, (1000,), device=lab.device)
    operator = curvopt.Hessian(model, nn.CrossEntropyLoss(), (x, y), check=False, route="loop")
    size, count = operator.shape[0], RANK + 1
    rows = orthonormalize_rows(torch.randn(count, size, device=lab.device))[0]

    def step() -> None:
        power_image(operator, rows)

    gradient: Work = operator.problem.gradient
    large = size >= 10**7
    for work in (gradient, gradient if large else step):  # first calls of anything take longer
        work()
    times = [(seconds(gradient, lab.device), seconds(step, lab.device)) for _ in range(1 if large else lab.rounds)]
    once, whole = (statistics.median(column) for column in zip(*times, strict=True))
    counted = operator.cost(count, dry_run=True).gradients / count
    profile = lab.explain(step, gradient, whole / once) if width == PROFILED else ""
    return (size, whole / count, once, counted), profile


def _slope(size: Tensor, times: Tensor) -> float:
    """Least squares in the logarithms."""
    x, y = size.log(), times.log()
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())
