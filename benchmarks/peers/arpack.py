"""scipy's eigsh (ARPACK) over a product on kept graphs, put together by hand: the one to beat for eigenpairs."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from benchmarks.peers import Product


def hessian(model: nn.Module, loss_fn: nn.Module, batch: tuple[Tensor, Tensor]) -> Product:
    """Plain double backward over one kept graph of the gradient."""
    params = list(model.parameters())
    x, y = batch
    slopes = torch.autograd.grad(loss_fn(model(x), y), params, create_graph=True)
    sizes, shapes = [p.numel() for p in params], [p.shape for p in params]

    def product(v: Tensor) -> Tensor:
        pieces = [piece.view(shape) for piece, shape in zip(v.split(sizes), shapes, strict=True)]
        parts = torch.autograd.grad(slopes, params, pieces, retain_graph=True)
        return torch.cat([p.reshape(-1) for p in parts])

    return product


def leading(product: Product, size: int, k: int, ncv: int, tol: float = 0.1) -> tuple[Tensor, Tensor, int]:
    """Values (k,), vectors (P, k), products, of a float32 product; ARPACK's tolerance is relative to each value."""
    count = 0

    def multiply(v: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return product(torch.from_numpy(np.ascontiguousarray(v, dtype=np.float32)).reshape(-1)).numpy()

    start = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    op = LinearOperator((size, size), matvec=multiply, dtype=np.float32)
    values, vectors = eigsh(op, k=k, which="LA", tol=tol, ncv=ncv, v0=start)
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy()), count
