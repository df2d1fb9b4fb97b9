"""Slow, obvious twins of the operators: explicit float64 matrices, built coordinate by coordinate.

They share no code with the package: the loss is written as a function of a flat vector through
``torch.func.functional_call``, and differentiated twice by ``autograd.grad``, one coordinate a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


class _Called(nn.Module):
    """Lets ``functional_call`` reach a ``forward(model, batch)`` function."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any] | None) -> None:
        super().__init__()
        self.model = model
        self.function = forward

    def forward(self, batch: Any) -> Any:
        if self.function is not None:
            return self.function(self.model, batch)
        inputs = batch[0]
        return self.model(**inputs) if isinstance(inputs, dict) else self.model(inputs)


def chosen(model: nn.Module, params: Sequence[Tensor] | None = None) -> list[tuple[str, Tensor]]:
    """(name, parameter) of the parameters that are differentiated, tied ones once, frozen ones left out."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if params is None:
        return named
    names = {id(p): n for n, p in named}
    return [(names[id(p)], p) for p in params]


def flat_function(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    batch: Any,
    forward: Callable[..., Any] | None = None,
    params: Sequence[Tensor] | None = None,
    mask_seed: int = 0,
) -> tuple[Callable[[Tensor], tuple[Any, Tensor]], Tensor]:
    """``f(theta) -> (outputs, loss)`` over a flat vector, and the vector of the parameters' values.

    Buffers are cloned for each call, the generator is seeded with ``mask_seed``, tied weights are tied.
    """
    named = chosen(model, params)
    wrapped = _Called(model, forward)
    start = torch.cat([p.detach().reshape(-1) for _, p in named])

    def function(theta: Tensor) -> tuple[Any, Tensor]:
        pieces = theta.split([p.numel() for _, p in named])
        state = {"model." + n: piece.view(p.shape) for (n, p), piece in zip(named, pieces, strict=True)}
        state |= {"model." + n: b.clone() for n, b in model.named_buffers()}
        with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
            torch.manual_seed(mask_seed)
            outputs = functional_call(wrapped, state, (batch,), tie_weights=True)
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        return outputs, loss_fn(outputs, batch[1] if pair else batch)

    return function, start


def jacobian(function: Callable[[Tensor], Tensor], theta: Tensor, create_graph: bool = False) -> Tensor:
    """(outputs, P), a row at a time."""
    theta = theta.detach().clone().requires_grad_()
    values = function(theta).reshape(-1)
    rows = []
    for value in values:
        if not value.requires_grad:
            rows.append(torch.zeros_like(theta))
            continue
        (row,) = torch.autograd.grad(value, theta, retain_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(theta) if row is None else row)
    return torch.stack(rows)


def dense_hessian(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    batch: Any,
    forward: Callable[..., Any] | None = None,
    params: Sequence[Tensor] | None = None,
    mask_seed: int = 0,
) -> Tensor:
    """The explicit Hessian (P, P) of the loss of one batch."""
    function, theta = flat_function(model, loss_fn, batch, forward, params, mask_seed)

    def gradient(point: Tensor) -> Tensor:
        return torch.autograd.grad(function(point)[1], point, create_graph=True)[0]

    return jacobian(gradient, theta)


def dense_gradient(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    batch: Any,
    forward: Callable[..., Any] | None = None,
    params: Sequence[Tensor] | None = None,
    mask_seed: int = 0,
) -> Tensor:
    """The gradient (P,) of the loss of one batch."""
    function, theta = flat_function(model, loss_fn, batch, forward, params, mask_seed)
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(function(theta)[1], theta)[0]


def _flat_outputs(outputs: Any) -> Tensor:
    return torch.cat([o.reshape(-1) for o in outputs]) if isinstance(outputs, tuple) else outputs.reshape(-1)


def _like(outputs: Any, flat: Tensor) -> Any:
    if not isinstance(outputs, tuple):
        return flat.view(outputs.shape)
    pieces = flat.split([o.numel() for o in outputs])
    return tuple(piece.view(o.shape) for o, piece in zip(outputs, pieces, strict=True))


def dense_ggn(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    batch: tuple[Any, Any],
    forward: Callable[..., Any] | None = None,
    params: Sequence[Tensor] | None = None,
    mask_seed: int = 0,
) -> Tensor:
    """The explicit generalized Gauss-Newton matrix ``J^T (d2 loss / d outputs2) J``, (P, P)."""
    function, theta = flat_function(model, loss_fn, batch, forward, params, mask_seed)
    rows = jacobian(lambda point: _flat_outputs(function(point)[0]), theta)
    with torch.no_grad():
        outputs = function(theta)[0]
    flat = _flat_outputs(outputs).detach()

    def loss_gradient(z: Tensor) -> Tensor:
        return torch.autograd.grad(loss_fn(_like(outputs, z), batch[1]), z, create_graph=True)[0]

    middle = jacobian(loss_gradient, flat)
    return rows.T @ middle @ rows


def relative(found: Tensor, wanted: Tensor) -> float:
    """Frobenius-norm error relative to ``wanted``."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()
