"""A refresh's cost beside a gradient's over four decades of parameters."""

from __future__ import annotations

import statistics
import warnings

import torch
from torch import Tensor, nn

import curvopt
from benchmarks.perf.lab import Lab
from benchmarks.perf.record import OURS, Figure, Row
from benchmarks.perf.timing import seconds
from curvopt.linalg.orthogonal import orthonormalize_rows
from curvopt.subspace import DominantSubspace


def scale(lab: Lab) -> list[Row]:
    """Seconds of a warm refresh's product and of a gradient over P, and the slope of both in the logarithms."""
    points = [_at_width(lab, *shape) for shape in ((10, 1000), (100, 1000), (1000, 1000), (3000, 1000), (9500, 200))]
    size, product, once, counted = (torch.tensor(c, dtype=torch.float64) for c in zip(*points, strict=True))
    slopes = _slope(size, product), _slope(size, once)
    row = Row(
        "slope of a refresh's seconds over P, against the gradient's", "mlp, P = 8e3 to 9.8e7", "ratio of slopes", 1.0
    )
    words = "; ".join(f"P = {p:.1e}: {a / b:.2f} gradients a product, counted {c:.2f}" for p, a, b, c in points)
    row.figures = [Figure(OURS, slopes[0] / slopes[1], evidence=f"slopes {slopes[0]:.2f} and {slopes[1]:.2f}; {words}")]
    row.note = (
        f"Bound: multiplications alone give {_slope(size, counted * once) / slopes[1]:.2f}. The first layer needs no "
        "input gradient, which makes a narrow net's products cheaper beside its gradient than a wide one's, where the "
        "square hidden layer is nearly all. Set-up included; batches of 1,000, at the largest P of 200."
    )
    return [row]


def _at_width(lab: Lab, width: int, batch: int) -> tuple[int, float, float, float]:
    """(P, seconds a product of a warm refresh, seconds of a gradient, gradients a product by count)."""
    lab.say(f"scale, width {width}")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    model.to(lab.device)
    x, y = torch.randn(batch, 784, device=lab.device), torch.randint(10, (batch,), device=lab.device)
    operator = curvopt.Hessian(model, nn.CrossEntropyLoss(), (x, y), check=False, route="loop")
    size = operator.shape[0]
    subspace = DominantSubspace(operator, 4, max_matvecs=10)
    rows = torch.randn(4, size, device=lab.device)
    subspace.replace(orthonormalize_rows(rows)[0], torch.tensor([4.0, 3.0, 2.0, 1.0]))
    products, gradients, reports = [], [], []

    def refresh() -> None:
        reports.append(subspace.refresh())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refresh()
        operator.problem.gradient()
        for _ in range(lab.rounds if size < 10**7 else 1):
            products.append(seconds(refresh, lab.device) / reports[-1].matvecs)
            gradients.append(seconds(operator.problem.gradient, lab.device))
    matvecs = reports[-1].matvecs
    counted = operator.cost(matvecs, dry_run=True).gradients / matvecs
    return size, statistics.median(products), statistics.median(gradients), counted


def _slope(size: Tensor, times: Tensor) -> float:
    """Least squares in the logarithms."""
    x, y = size.log(), times.log()
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())
