"""BackPACK as a second, independent path to Gauss-Newton quantities, where it covers the model.

Its second-order extensions give what products alone do not: the exact trace layer by layer (``DiagGGNExact``) and a
factor S with G = S^T S (``SqrtGGNExact``), hence exact V^T G V and ||G||_F^2. They need a chain of modules that they
know, and several things go wrong without a word: they start at the loss module, so factors on the loss are not seen;
a tied parameter keeps the last module's share only; ``backpack`` hangs hooks, inputs and outputs on what it extends.
So the walk over the modules comes first, names the first one that is not covered, and everything runs on a
structural copy whose parameters share the storage of the user's, scaled by the batch's share here.

The Hessian-free products (``backpack.hessianfree``) are plain autograd and work with any module.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from curvopt.curvature.backpack_coverage import NotCovered as NotCovered
from curvopt.curvature.backpack_coverage import check_covered, extension_of, known_loss, layer_chain, require_backpack
from curvopt.curvature.backpack_coverage import supports as supports
from curvopt.curvature.data import Batch
from curvopt.curvature.ggn import GGN, FactorCache
from curvopt.curvature.graphs import GradientGraph
from curvopt.curvature.hessian import ProblemOperator
from curvopt.curvature.jacobian import Outputs
from curvopt.curvature.losses import KnownLoss
from curvopt.curvature.problem import Problem
from curvopt.curvature.quiet import gradients


# ---- second-order quantities on a structural copy
def _shared_copy(module: nn.Module, wanted: set[int]) -> tuple[nn.Module, list[tuple[int, nn.Parameter]]]:
    """A twin of a leaf module: parameters of its own on the same storage, cloned buffers, no hooks."""
    twin = copy.copy(module)
    twin.__dict__ = {k: v for k, v in vars(module).items() if not k.startswith(("_backpack", "input0", "output"))}
    for key in list(twin.__dict__):
        if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            twin.__dict__[key] = OrderedDict()
    twin.__dict__["_is_full_backward_hook"] = None
    pairs = []
    parameters: dict[str, Any] = {}
    for name, p in module._parameters.items():
        parameters[name] = None
        if p is not None:
            parameters[name] = nn.Parameter(p.detach(), requires_grad=id(p) in wanted)
            pairs.append((id(p), parameters[name]))
    twin.__dict__["_parameters"] = parameters
    twin.__dict__["_buffers"] = {k: None if b is None else b.detach().clone() for k, b in module._buffers.items()}
    return twin, pairs


def _loss_module(known: KnownLoss) -> nn.Module:
    if known.kind == "cross_entropy":
        smoothing = known.options.get("label_smoothing", 0.0)
        return nn.CrossEntropyLoss(reduction=known.reduction, label_smoothing=smoothing)
    kind = nn.MSELoss if known.kind == "mse" else nn.BCEWithLogitsLoss
    return kind(reduction=known.reduction)


@contextmanager
def _own_hooks(backpack: ModuleType) -> Iterator[None]:
    """Take off, and out of BackPACK's global list, the hooks that the block adds."""
    context = backpack.context.CTX
    before = len(context.hook_handles)
    try:
        yield
    finally:
        for handle in context.hook_handles[before:]:
            handle.remove()
        del context.hook_handles[before:]


def _run(problem: Problem, batch: Batch, quantity: str) -> list[Tensor | None]:
    """The extension's quantity for one batch, one tensor a parameter of the layout (None where it has no part)."""
    backpack = require_backpack()
    extension = extension_of(quantity)
    batch = problem.placed(batch)
    known = known_loss(problem.loss_fn)
    index = problem.layout.index()
    with problem.quiet(batch), _own_hooks(backpack):
        twins: list[nn.Module] = []
        found: dict[int, nn.Parameter] = {}
        for _, module in layer_chain(problem.model):
            twin, pairs = _shared_copy(module, set(index))
            twins.append(twin)
            found.update(pairs)
        try:
            net = backpack.extend(nn.Sequential(*twins))
            loss_fn = backpack.extend(_loss_module(known))
            loss = loss_fn(net(batch.inputs), batch.targets)
            with backpack.backpack(extension), warnings.catch_warnings():
                # the first layer's input needs no gradient: what the hooks see there is what they need
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                loss.backward()
        except Exception as error:  # BackPACK's own refusals are of many types
            raise NotCovered(f"BackPACK refused: {type(error).__name__}: {str(error).splitlines()[0]}") from error
        # second-order extensions start at the loss module, so the batch's share is ours to apply
        return [getattr(found.get(id(p)), extension.savefield, None) for p in problem.layout.params]


def ggn_diagonal(problem: Problem) -> Tensor:
    """The exact diagonal of the GGN (P,), by ``DiagGGNExact``: about two gradients, no matter how large P is.

    Raises:
        NotCovered: see ``check_covered``.
    """
    check_covered(problem, "diag_ggn")
    layout = problem.layout
    total = torch.zeros(layout.total, dtype=layout.dtype, device=layout.device)
    for batch in problem.batches:
        parts = [None if d is None else d.detach() * batch.share for d in _run(problem, batch, "diag_ggn")]
        total += layout.flatten(parts)
    return total


def ggn_factor_bytes(problem: Problem) -> int:
    """Bytes that ``ggn_factor`` takes (outputs times P), by one forward pass."""
    rows = 0
    for batch in problem.batches:
        outputs, _ = problem.evaluate(batch, grad=False)
        rows += outputs.numel()
    return int(rows * problem.layout.vector_bytes)


def ggn_factor(problem: Problem) -> Tensor:
    """S of shape (examples x outputs, P) with ``GGN = S^T S``, by ``SqrtGGNExact``.

    From it V^T G V = (S V)^T (S V), tr G = ||S||_F^2 and ||G||_F^2 = ||S S^T||_F^2 follow exactly. Memory: see
    ``ggn_factor_bytes``.

    Raises:
        NotCovered: see ``check_covered``.
    """
    check_covered(problem, "sqrt_ggn")
    layout = problem.layout
    blocks = []
    for batch in problem.batches:
        parts = _run(problem, batch, "sqrt_ggn")  # (C, N, *p.shape) each
        lead = next(s.shape[:2].numel() for s in parts if s is not None)
        block = torch.zeros(lead, layout.total, dtype=layout.dtype, device=layout.device)
        for start, size, part in zip(layout.offsets, layout.sizes, parts, strict=True):
            if part is not None:
                block[:, start : start + size] = part.detach().reshape(lead, size)
        blocks.append(block * batch.share**0.5)
    return torch.cat(blocks)


@dataclass(frozen=True)
class ExactGGN:
    """Exact quantities of the GGN.

    Attributes:
        diagonal: (P,).
        row_squares: ``sum_j G_ij^2`` (P,), or None where the factor S does not fit the memory allowed.
    """

    diagonal: Tensor
    row_squares: Tensor | None


def exact_ggn(problem: Problem, memory_budget: int = 2**28) -> ExactGGN:
    """Diagonal and squared row norms of the GGN, checked against our own Jacobian-vector products.

    Args:
        problem: model, loss and data.
        memory_budget: bytes that the factor S may take; beyond it only the diagonal is computed.

    Raises:
        NotCovered: the problem is not covered, or BackPACK's numbers differ from ours.
    """
    layers = problem.layout.offsets
    if ggn_factor_bytes(problem) <= memory_budget and supports(problem, "sqrt_ggn")[0]:
        factor = ggn_factor(problem)
        gram = factor @ factor.T
        exact = ExactGGN(factor.square().sum(0), ((gram @ factor) * factor).sum(0))
    else:
        exact = ExactGGN(ggn_diagonal(problem), None)
    # the largest entry of the first and the last parameter, by J v
    where = [
        start + int(exact.diagonal[start : start + size].argmax()) for start, size in zip(layers, problem.layout.sizes)
    ]
    chosen = sorted({where[0], where[-1]})
    axes = torch.nn.functional.one_hot(torch.tensor(chosen, device=exact.diagonal.device), problem.layout.total)
    ours = GGN.from_problem(problem, check=False).forms(axes.T.to(exact.diagonal.dtype))
    gap = float((ours - exact.diagonal[chosen]).abs().max())
    if gap > 1e4 * torch.finfo(ours.dtype).eps * float(exact.diagonal.abs().max()):
        raise NotCovered(
            f"BackPACK's diagonal of the GGN differs from e^T G e by {gap:.3g} at coordinates {chosen}: its result for "
            "this model is not to be trusted"
        )
    return exact


# ---- Hessian-free products, for any module
class _ProductGraph(GradientGraph):
    """One batch's graph, multiplied by BackPACK's Hessian-free functions."""

    def __init__(self, problem: Problem, batch: Batch, kind: str) -> None:
        self.kind = kind
        self.problem = problem
        batch = problem.placed(batch)
        with problem.quiet(batch) as buffers:
            outputs, self.graph_loss = problem.call(batch)
            self.outputs = tuple(Outputs(outputs).tensors) if kind == "ggn" else ()
            top = self.outputs if kind == "ggn" else (self.graph_loss,)
            parts = gradients(top, problem.leaves, [torch.ones_like(t) for t in top], create_graph=True)
        self.buffers = buffers
        self.kept = [(i, g) for i, g in enumerate(parts) if g is not None and (kind == "ggn" or g.requires_grad)]

    def multiply(self, out: Tensor, vectors: Any, batched: bool = False) -> None:
        hessianfree = require_backpack().hessianfree
        leaves = [self.problem.leaves[i] for i, _ in self.kept]
        towards = [vectors[i].to(p.dtype) for (i, _), p in zip(self.kept, leaves, strict=True)]
        if not leaves:
            return
        with self.problem.quiet_backward(self.buffers):
            if self.kind == "ggn":
                output = self.outputs[0] if len(self.outputs) == 1 else self.outputs
                parts = hessianfree.ggnvp.ggn_vector_product_from_plist(self.graph_loss, output, leaves, towards)
            else:
                parts = hessianfree.hvp.hessian_vector_product(
                    self.graph_loss, leaves, towards, grad_params=[g for _, g in self.kept]
                )
        views = self.problem.layout.views(out)
        for (i, _), part in zip(self.kept, parts, strict=True):
            views[i].add_(part)


class BackpackOperator(ProblemOperator):
    """Hessian or GGN by BackPACK's Hessian-free products: plain autograd, any module, an independent twin of ours.

    Args:
        problem: model, loss and data.
        kind: "hessian" or "ggn".
        graph_budget: bytes of graphs kept inside ``hold()``.

    Raises:
        MissingExtraError: BackPACK is not installed.
    """

    def __init__(self, problem: Problem, kind: str, *, graph_budget: int = 2**31) -> None:
        if kind not in ("hessian", "ggn"):
            raise ValueError(f"kind must be 'hessian' or 'ggn', got {kind!r}")
        require_backpack()
        super().__init__(problem)
        self.kind = kind
        self._cache = FactorCache(problem, graph_budget, lambda batch: _ProductGraph(problem, batch, kind))

    def _release(self) -> None:
        self._cache.clear()

    def _multiply(self, rows: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        with self.hold():
            for graph in self._cache.each():
                for row, target in zip(rows, out, strict=True):
                    graph.multiply(target, self.layout.views(row))
        return out
