"""Judging every side by the same independent float64 products: written here, from torch.autograd alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as arpack
from torch import Tensor, nn

from benchmarks.perf.problems import Pair, Trained

Product = Callable[[Tensor], Tensor]


def _double(model: nn.Module, batch: Pair) -> tuple[nn.Module, Tensor, Tensor]:
    x, y = batch
    twin = copy.deepcopy(model).double()
    return twin, x.double() if x.is_floating_point() else x, y


def hessian64(model: nn.Module, loss_fn: nn.Module, batch: Pair) -> Product:
    """``v -> H v`` on a float64 copy of the net: double backward over one graph."""
    twin, x, y = _double(model, batch)
    params = list(twin.parameters())
    slopes = torch.autograd.grad(loss_fn(twin(x), y), params, create_graph=True)
    gradient = torch.cat([g.reshape(-1) for g in slopes])

    def product(v: Tensor) -> Tensor:
        parts = torch.autograd.grad(gradient, params, v.double(), retain_graph=True)
        return torch.cat([p.reshape(-1) for p in parts]).detach()

    return product


def ggn64(model: nn.Module, loss_fn: nn.Module, batch: Pair) -> Product:
    """``v -> J^T (diag(p) - p p^T) J v / n`` on a float64 copy, J v by forward-mode differentiation."""
    twin, x, _ = _double(model, batch)
    names = [n for n, _ in twin.named_parameters()]
    params = {n: p.detach() for n, p in twin.named_parameters()}

    def outputs(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(twin, p, (x,))

    def product(v: Tensor) -> Tensor:
        pieces = v.double().split([params[n].numel() for n in names])
        tangent = {n: piece.view(params[n].shape) for n, piece in zip(names, pieces, strict=True)}
        logits, push = torch.func.jvp(outputs, (params,), (tangent,))
        p = logits.softmax(-1)
        inner = p * (push - (p * push).sum(-1, keepdim=True)) / len(logits)
        back = torch.func.vjp(outputs, params)[1](inner)[0]
        return torch.cat([back[n].reshape(-1) for n in names]).detach()

    return product


@dataclass(frozen=True)
class Spectrum:
    """Leading pairs to a residual of about 1e-5: values (m,) and vectors (P, m), float64."""

    values: Tensor
    vectors: Tensor


def leading(product: Product, size: int, count: int, device: torch.device, start: Tensor | None = None) -> Spectrum:
    """The ``count`` leading pairs of a float64 product, by ARPACK."""

    def multiply(v: np.ndarray) -> np.ndarray:
        row = torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64)).reshape(-1).to(device)
        return product(row).cpu().numpy()

    op = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    v0 = np.random.default_rng(0).standard_normal(size) if start is None else start.double().cpu().numpy()
    values, vectors = arpack(op, k=count, which="LA", tol=1e-5, ncv=max(32, 2 * count + 10), v0=v0)
    return Spectrum(torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy()).to(device))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``||got - expected|| / ||expected||``."""
    return float((got.double() - expected).norm() / expected.norm())


def residual(product: Product, values: Tensor, vectors: Tensor) -> float:
    """``max_i ||H v_i - l_i v_i|| / l_1`` of unit v_i, recomputed."""
    worst = 0.0
    for value, v in zip(values.double(), vectors.T.double(), strict=True):
        v = v / v.norm()
        worst = max(worst, float((product(v) - value * v).norm()))
    return worst / float(values.double().abs().max())


def overlap(vectors: Tensor, exact: Spectrum) -> float:
    """``||V^T V_exact||_F^2 / k`` for the span of (P, k) columns, whatever basis they are."""
    q = torch.linalg.qr(vectors.double())[0]
    return float((exact.vectors[:, : q.shape[1]].T @ q).square().sum()) / q.shape[1]


class Judge:
    """References of one trained problem, computed once a step."""

    def __init__(self, trained: Trained, count: int = 11) -> None:
        self.trained = trained
        self.count = count
        self._spectra: dict[tuple[int, bool], Spectrum] = {}

    def product(self, step: int, whole: bool = False) -> Product:
        """The Hessian's product at a step, on the curvature batch or on ``whole`` data."""
        t = self.trained
        return hessian64(t.at(step), t.loss_fn, t.rows(slice(None)) if whole else t.curvature_batch)

    def spectrum(self, step: int, whole: bool = False) -> Spectrum:
        """The leading pairs at a step."""
        key = (step, whole)
        if key not in self._spectra:
            size = sum(p.numel() for p in self.trained.model.parameters())
            self._spectra[key] = leading(self.product(step, whole), size, self.count, self.trained.device)
        return self._spectra[key]

    def overlap(self, vectors: Tensor, step: int, whole: bool = False) -> float:
        """Overlap of a span with the exact one of the same dimension."""
        return overlap(vectors, self.spectrum(step, whole))
