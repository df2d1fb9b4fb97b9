"""PyHessian 0.1: double backward through ``.grad`` and power iteration with deflation.

It switches the model to evaluation mode and leaves ``.grad`` with a graph behind; ``clear`` takes that away.
"""

from __future__ import annotations

import torch
from pyhessian import hessian as Hessian
from pyhessian.utils import hessian_vector_product
from torch import Tensor, nn

from benchmarks.peers import Product


def clear(model: nn.Module) -> None:
    """Drop the gradients and the graph that they hold."""
    for p in model.parameters():
        p.grad = None


def _build(model: nn.Module, loss_fn: nn.Module, batch: tuple[Tensor, Tensor]) -> Hessian:
    clear(model)
    return Hessian(model, loss_fn, data=batch, cuda=batch[0].is_cuda)


def hessian(model: nn.Module, loss_fn: nn.Module, batch: tuple[Tensor, Tensor]) -> Product:
    """Its product, as its own power iteration calls it."""
    op = _build(model, loss_fn, batch)
    params = op.params

    def product(v: Tensor) -> Tensor:
        pieces = [piece.view(p.shape) for piece, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
        return torch.cat([h.reshape(-1) for h in hessian_vector_product(op.gradsH, params, pieces)])

    return product


def leading(model: nn.Module, loss_fn: nn.Module, batch: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """``eigenvalues(top_n=k)`` as documented."""
    op = _build(model, loss_fn, batch)
    values, vectors = op.eigenvalues(top_n=k)
    clear(model)
    return torch.tensor(values), torch.stack([torch.cat([p.reshape(-1) for p in v]) for v in vectors]).T
