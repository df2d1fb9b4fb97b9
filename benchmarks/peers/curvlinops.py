"""curvlinops: Hessian and GGN operators; ``checked`` leaves the determinism check on, as constructed by default."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from benchmarks.peers import Product


def _operator(kind: type, model: nn.Module, loss_fn: nn.Module, batch: tuple[Tensor, Tensor], checked: bool) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(
            model,
            loss_fn,
            list(model.parameters()),
            [batch],
            check_deterministic=checked,
            num_data=len(batch[0]),
            batch_size_fn=len,
        )


def hessian(model: nn.Module, loss_fn: nn.Module, batch: tuple[Tensor, Tensor], checked: bool = False) -> Product:
    """``HessianLinearOperator``."""
    op = _operator(HessianLinearOperator, model, loss_fn, batch, checked)
    return lambda v: op @ v  # type: ignore[operator]


def ggn(model: nn.Module, loss_fn: nn.Module, batch: tuple[Tensor, Tensor], checked: bool = False) -> Product:
    """``GGNLinearOperator``."""
    op = _operator(GGNLinearOperator, model, loss_fn, batch, checked)
    return lambda v: op @ v  # type: ignore[operator]


def leading(
    model: nn.Module, loss_fn: nn.Module, batch: tuple[Tensor, Tensor], k: int, documented: bool
) -> tuple[Tensor, Tensor]:
    """``eigsh(H.to_scipy(), ...)``: as documented (float64 wrapper, tol 0, checks on), or float32 with tol .03."""
    op = _operator(HessianLinearOperator, model, loss_fn, batch, documented)
    dtype = np.float64 if documented else np.float32
    start = np.random.default_rng(0).standard_normal(op.shape[0]).astype(dtype)  # type: ignore[attr-defined]
    scipy_op = op.to_scipy(dtype=dtype)  # type: ignore[attr-defined]
    values, vectors = eigsh(scipy_op, k=k, which="LA", tol=0 if documented else 0.03, v0=start)
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy())
