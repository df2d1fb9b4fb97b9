"""Spectrum of the gradient second moment by its Gram dual: N x N matrices of inner products, never a P x P one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvopt._errors import CurvatureError, NonFiniteError
from curvopt.curvature.data import Batch
from curvopt.curvature.jacobian import BatchJacobian, Outputs
from curvopt.curvature.layers import group_by_layer
from curvopt.curvature.second_moment import GradientSecondMoment
from curvopt.diagnostics._inputs import check_rank, named_layers
from curvopt.linalg.orthogonal import exact_arithmetic

_MOST_EXAMPLES = 20_000


@dataclass(frozen=True)
class MomentSpectrum:
    """The non-zero spectrum of ``M = (1/N) sum_i g_i g_i^T`` (or of the covariance) on one set of parameters.

    Attributes:
        eigenvalues: largest first, (min(N, P),), float64 on the CPU; those that rounding made negative are 0.
        eigenvectors: (P, k), the leading ones; k = 0 if none were asked for or fewer are not zero.
        trace: tr M, the mean of ``||g_i||^2``.
        examples: N, live ones.
        size: P.
        rank: eigenvalues above rounding, at most N.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor = field(repr=False)
    trace: float
    examples: int
    size: int
    rank: int


def moment_spectrum(
    moment: GradientSecondMoment,
    k: int = 0,
    *,
    layers: bool | Iterable[str] = False,
    max_bytes: int = 2**31,
) -> dict[str | None, MomentSpectrum]:
    """Exact spectrum of the gradient second moment, whole (under None) and by layer, from inner products of gradients.

    ``M``'s non-zero eigenvalues are those of ``K_ij = <g_i, g_j> / N``, and ``v = G^T u / sqrt(N lambda)`` turns an
    eigenvector u of K into one of M. For a Linear layer ``K = (A A^T) o (D D^T) / N``, A the layer's inputs and D the
    loss's gradients by its outputs, so that no per-example gradient is ever formed; convolutions and Linear layers over
    positions form them for that layer; any other layer takes N backward passes. The whole network's K is the sum over
    its layers. Memory: N x N float64 a layer.

    Args:
        moment: the operator; ``centered=True`` gives the covariance.
        k: how many eigenvectors; each costs a backward pass for each set of parameters.
        layers: also by layer: True for all, or names as in ``moment.layers()``.
        max_bytes: cap on the per-example gradients of one layer, where they have to be formed.

    Raises:
        TypeError: another operator.
        ValueError: k out of range, an unknown layer, or ``max_bytes`` exceeded (the layer is named).
        CurvatureError: more than 20,000 examples.
        NonFiniteError: a gradient holds NaN or Inf.
    """
    if not isinstance(moment, GradientSecondMoment):
        raise TypeError(f"moment must be a GradientSecondMoment, got {type(moment).__name__}")
    layout = moment.layout
    if k:
        check_rank(k, layout.total)
    indices = named_layers(layout)
    wanted = named_layers(layout, None if isinstance(layers, bool) else layers) if layers else {}
    n = moment.examples
    if n > _MOST_EXAMPLES:
        raise CurvatureError(
            f"the Gram matrix of {n} examples would hold {n}^2 numbers; give at most {_MOST_EXAMPLES} examples"
        )
    features = _features(moment, max_bytes)
    grams: dict[str | None, Tensor] = {}
    total: Tensor | None = None
    for name in indices:
        gram = features.pop(name).gram() / n
        if not bool(torch.isfinite(gram).all()):
            raise NonFiniteError("a gradient of an example holds NaN or Inf: look at the loss and the weights first")
        total = gram if total is None else total + gram
        if name in wanted:
            grams[name] = gram
    assert total is not None
    out: dict[str | None, MomentSpectrum] = {}
    for key, gram in [(None, total), *grams.items()]:
        index = None if key is None else indices[str(key)]
        out[key] = _spectrum(moment, gram, k, index, n)
    return out


def _spectrum(moment: GradientSecondMoment, gram: Tensor, k: int, index: Tensor | None, n: int) -> MomentSpectrum:
    size = moment.layout.total if index is None else len(index)
    trace_whole = float(gram.trace())
    if moment.centered:  # rows of ignored examples are zero, but count neither in N nor in the mean
        live = torch.ones(len(gram), dtype=gram.dtype) if len(gram) == n else (gram.diagonal() > 0).to(gram)
        centre = torch.diag(live) - torch.outer(live, live) / n
        gram = centre @ gram @ centre
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    scale = float(values[0].clamp_min(0)) if len(values) else 0.0
    # products round at eps of the parameters' dtype; K doubles their error
    level = 10 * len(values) * torch.finfo(moment.dtype).eps * max(scale, trace_whole / max(n, 1))
    rank = int((values > level).sum())
    columns = torch.zeros(size, 0, dtype=moment.dtype, device=moment.device)
    if k:
        kept = min(k, rank, size)
        rows = [_pull(moment, vectors[:, j] / (n * values[j]).sqrt(), index) for j in range(kept)]
        columns = torch.stack(rows, 1) if rows else columns
        if rows:
            columns = _orthonormal(columns)
    values = values[: min(len(values), size)].clamp_min(0)
    return MomentSpectrum(values, columns, float(gram.trace()), n, size, min(rank, size))


def _orthonormal(columns: Tensor) -> Tensor:
    """Gram-Schmidt by QR with the signs kept: takes out what rounding of the pulls left."""
    with exact_arithmetic(columns.device):
        q, r = torch.linalg.qr(columns.double())
        return (q * torch.sign(r.diagonal())).to(columns.dtype)


def _each_batch(moment: GradientSecondMoment) -> Iterable[tuple[Batch, int]]:
    start = 0
    for batch in moment.problem.batches:
        batch = moment.problem.placed(batch)
        yield batch, start
        start += _count(moment, batch)


def _count(moment: GradientSecondMoment, batch: Batch) -> int:
    from curvopt.curvature.data import example_count
    from curvopt.curvature.jacobian import batch_targets

    return int(example_count(batch_targets(moment.problem, batch)) or 0)


def _scale(moment: GradientSecondMoment) -> float:
    """g_i is this times J_i^T rho_i."""
    return float(moment.examples) if moment.problem.reduction == "mean" else 1.0


def _pull(moment: GradientSecondMoment, weights: Tensor, index: Tensor | None) -> Tensor:
    """``sum_i w_i g_i`` (P,) on the chosen coordinates: one backward pass over the data."""
    problem = moment.problem
    total = torch.zeros(moment.layout.total, dtype=moment.dtype, device=moment.device)
    for batch, start in _each_batch(moment):
        with problem.quiet(batch) as buffers:
            outputs = Outputs(problem._outputs(batch))
            rho = moment._rows_of_gradient(batch, outputs)
            count = len(rho[0])
            share = weights[start : start + count].to(rho[0])
            jacobian = BatchJacobian(problem, batch, outputs, buffers, "finite_difference")  # only pulled, never pushed
            parts = jacobian.pull([r * share.view(-1, *[1] * (r.dim() - 1)) for r in rho])
        total += moment.layout.flatten(parts)
    total *= _scale(moment)
    return total if index is None else total[index]


# ---- inner products of per-example gradients
class _Rows:
    """Per-example gradients of one layer, (N, p)."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def gram(self) -> Tensor:
        with exact_arithmetic(self.rows[0].device):
            rows = torch.cat(self.rows).double()
            return (rows @ rows.T).cpu()


class _Product:
    """Inputs and output gradients of one Linear layer, (N, in) and (N, out)."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.grads: list[Tensor] = []

    def gram(self) -> Tensor:
        with exact_arithmetic(self.inputs[0].device):
            a, d = torch.cat(self.inputs).double(), torch.cat(self.grads).double()
            return ((a @ a.T) * (d @ d.T)).cpu()


def _features(moment: GradientSecondMoment, max_bytes: int) -> dict[str, _Rows | _Product]:
    problem, layout = moment.problem, moment.layout
    modules = dict(problem.model.named_modules())
    groups = group_by_layer(layout)
    found: dict[str, _Rows | _Product] = {}
    scale = _scale(moment)
    number = sum(_count(moment, b) for b, _ in _each_batch(moment))
    for batch, _ in _each_batch(moment):
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in groups}
        handles = [
            modules[name].register_forward_hook(_recorder(calls[name]))
            for name, params in groups.items()
            if name in modules and _known(modules[name], params)
        ]
        with problem.quiet(batch):
            try:
                outputs = Outputs(problem._outputs(batch))
            finally:
                for handle in handles:
                    handle.remove()
            rho = moment._rows_of_gradient(batch, outputs)
            count = len(rho[0])
            for name, params in groups.items():
                call = calls[name]
                if len(call) == 1 and call[0][1].requires_grad and call[0][1].dim() > 1 and len(call[0][1]) == count:
                    x, y = call[0]
                    (d,) = torch.autograd.grad(outputs.tensors, y, rho, retain_graph=True, allow_unused=True)
                    d = torch.zeros_like(y) if d is None else d
                    _add(found, name, modules[name], params, x.detach(), d * scale, number, max_bytes)
                else:
                    _room(name, number, sum(p.numel() for p in params), params[0], max_bytes)
                    rows = _one_by_one(outputs, rho, [problem.leaves[i] for i in _places(layout, params)], scale)
                    _rows_of(found, name).rows.append(rows)
    return found


def _places(layout: Any, params: list[Tensor]) -> list[int]:
    index = layout.index()
    return [index[id(p)] for p in params]


def _recorder(calls: list[tuple[Tensor, Tensor]]) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls.append((inputs[0], output))

    return hook


def _known(module: nn.Module, params: list[Tensor]) -> bool:
    """Whether the layer's gradients follow from its inputs and output gradients."""
    own = {id(p) for p in module.parameters(recurse=False)}
    if not all(id(p) in own for p in params) or module._forward_hooks or module._forward_pre_hooks:
        return False
    plain_conv = type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros"
    return type(module) is nn.Linear or (plain_conv and not isinstance(module.padding, str))


def _rows_of(found: dict[str, _Rows | _Product], name: str) -> _Rows:
    entry = found.setdefault(name, _Rows())
    if not isinstance(entry, _Rows):
        raise CurvatureError(f"layer {name!r} is used in different ways by different batches; give one batch")
    return entry


def _room(name: str, number: int, size: int, like: Tensor, max_bytes: int) -> None:
    needed = number * size * like.element_size()
    if needed > max_bytes:
        raise ValueError(
            f"layer {name!r} needs per-example gradients of {number} x {size} numbers ({needed} bytes), above "
            f"max_bytes={max_bytes}; take fewer examples or raise it"
        )


def _add(
    found: dict[str, _Rows | _Product],
    name: str,
    module: nn.Module,
    params: list[Tensor],
    x: Tensor,
    d: Tensor,
    number: int,
    max_bytes: int,
) -> None:
    chosen = {id(p) for p in params}
    weight, bias = id(module.weight) in chosen, getattr(module, "bias", None) is not None and id(module.bias) in chosen
    if type(module) is nn.Linear and x.dim() == 2:
        parts = ([x] if weight else []) + ([torch.ones_like(x[:, :1])] if bias else [])
        entry = found.setdefault(name, _Product())
        assert isinstance(entry, _Product)
        entry.inputs.append(torch.cat(parts, 1))
        entry.grads.append(d)
        return
    _room(name, number, sum(p.numel() for p in params), x, max_bytes)
    if type(module) is nn.Linear:
        x, d = x.flatten(1, -2), d.flatten(1, -2)  # (N, positions, features)
    else:
        x = nn.functional.unfold(  # (N, positions, in * kernel)
            x,
            module.kernel_size,  # type: ignore[arg-type]
            dilation=module.dilation,  # type: ignore[arg-type]
            padding=module.padding,  # type: ignore[arg-type]
            stride=module.stride,  # type: ignore[arg-type]
        ).transpose(1, 2)
        d = d.flatten(2).transpose(1, 2)
    with exact_arithmetic(x.device):
        pieces = [torch.einsum("nto,nti->noi", d, x).flatten(1)] if weight else []
        pieces += [d.sum(1)] if bias else []
    _rows_of(found, name).rows.append(torch.cat(pieces, 1))


def _one_by_one(outputs: Outputs, rho: list[Tensor], leaves: list[Tensor], scale: float) -> Tensor:
    rows = []
    for i in range(len(rho[0])):
        masked = [torch.zeros_like(r) for r in rho]
        for m, r in zip(masked, rho, strict=True):
            m[i] = r[i]
        parts = torch.autograd.grad(outputs.tensors, leaves, masked, retain_graph=True, allow_unused=True)
        flat = [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(parts, leaves, strict=True)]
        rows.append(torch.cat(flat) * scale)
    return torch.stack(rows)
