"""hessian-eigenthings 1.0 (a pre-release): operators and its own Lanczos."""

from __future__ import annotations

from hessian_eigenthings import (
    GGNOperator,
    HessianOperator,
    lanczos,
    supervised_forward,
    supervised_loss,
    supervised_loss_of_output,
)
from torch import Tensor, nn

from benchmarks.peers import Product


def hessian(model: nn.Module, loss_fn: nn.Module, batch: tuple[Tensor, Tensor], method: str = "autograd") -> Product:
    """``HessianOperator``."""
    return HessianOperator(model, [batch], supervised_loss(loss_fn), method=method).matvec  # type: ignore[arg-type]


def ggn(model: nn.Module, loss_fn: nn.Module, batch: tuple[Tensor, Tensor]) -> Product:
    """``GGNOperator``."""
    return GGNOperator(model, [batch], supervised_forward, supervised_loss_of_output(loss_fn)).matvec


def leading(
    model: nn.Module, loss_fn: nn.Module, batch: tuple[Tensor, Tensor], k: int, iterations: int | None
) -> tuple[Tensor, Tensor]:
    """``lanczos(H, k=k)`` as documented (``iterations=None``), or with more steps, LA and reorthogonalisation."""
    op = HessianOperator(model, [batch], supervised_loss(loss_fn))
    if iterations is None:
        found = lanczos(op, k=k, seed=0)
    else:
        found = lanczos(op, k=k, max_iter=iterations, which="LA", reorthogonalize=True, seed=0)
    return found.eigenvalues, found.eigenvectors.T
