"""BackPACK's matrix-free products (backpack.hessianfree), on graphs that are kept between products."""

from __future__ import annotations

import torch
from backpack.hessianfree.ggnvp import ggn_vector_product_from_plist
from backpack.hessianfree.hvp import hessian_vector_product
from torch import Tensor, nn

from benchmarks.peers import Product


def _split(params: list[Tensor], v: Tensor) -> list[Tensor]:
    pieces = v.split([p.numel() for p in params])
    return [piece.view(p.shape) for piece, p in zip(pieces, params, strict=True)]


def hessian(model: nn.Module, loss_fn: nn.Module, batch: tuple[Tensor, Tensor]) -> Product:
    """``hessian_vector_product`` with ``grad_params`` computed once."""
    params: list[Tensor] = list(model.parameters())
    loss = loss_fn(model(batch[0]), batch[1])
    slopes = torch.autograd.grad(loss, params, create_graph=True)

    def product(v: Tensor) -> Tensor:
        parts = hessian_vector_product(loss, params, _split(params, v), grad_params=slopes)
        return torch.cat([p.reshape(-1) for p in parts])

    return product


def ggn(model: nn.Module, loss_fn: nn.Module, batch: tuple[Tensor, Tensor]) -> Product:
    """``ggn_vector_product_from_plist`` on one forward pass."""
    params: list[Tensor] = list(model.parameters())
    outputs = model(batch[0])
    loss = loss_fn(outputs, batch[1])

    def product(v: Tensor) -> Tensor:
        parts = ggn_vector_product_from_plist(loss, outputs, params, _split(params, v))
        return torch.cat([p.detach().reshape(-1) for p in parts])

    return product
