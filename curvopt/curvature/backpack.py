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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from curvopt._errors import CurvatureError, MissingExtraError
from curvopt.curvature.data import Batch
from curvopt.curvature.ggn import GGN, FactorCache
from curvopt.curvature.graphs import GradientGraph
from curvopt.curvature.hessian import ProblemOperator
from curvopt.curvature.jacobian import Outputs
from curvopt.curvature.losses import KnownLoss, recognise
from curvopt.curvature.operator import SymmetricOperator
from curvopt.curvature.problem import Problem


def require_backpack() -> ModuleType:
    """The ``backpack`` module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import backpack
        import backpack.context
        import backpack.extensions
        import backpack.hessianfree.ggnvp
        import backpack.hessianfree.hvp
    except ImportError as error:
        raise MissingExtraError(
            'BackPACK is not installed: pip install "curvopt-torch[backpack]", or use backend="autograd"'
        ) from error
    return backpack


def available() -> bool:
    """Whether BackPACK can be imported."""
    try:
        require_backpack()
    except MissingExtraError:
        return False
    return True


# ---- what is covered
class NotCovered(CurvatureError):
    """The model, loss or data are outside what BackPACK's second-order extensions compute rightly."""


def layer_chain(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The leaf modules of ``model`` in the order in which its forward applies them, with their dotted names.

    Raises:
        NotCovered: the forward is no plain chain of modules, each used once.
    """
    if type(model) is nn.Sequential or not any(True for _ in model.children()):
        return _distinct(_leaves("", model))
    label = type(model).__name__
    try:
        # a shallow copy, so that a forward that sets attributes sets them elsewhere
        graph = fx.Tracer().trace(copy.copy(model))
    except Exception as error:  # tracing runs the user's Python: anything may come
        raise NotCovered(
            f"the forward of {label} can't be read as a chain of modules ({type(error).__name__})"
        ) from error
    layers: list[tuple[str, nn.Module]] = []
    last: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if last is not None:
                raise NotCovered(f"the forward of {label} takes more than one input")
        elif node.op == "call_module":
            if node.args != (last,) or node.kwargs:
                raise NotCovered(f"module {node.target!r} in {label} is not applied to the output of the one before it")
            layers.extend(_leaves(str(node.target), model.get_submodule(str(node.target))))
        elif node.op == "output":
            if node.args != (last,):
                raise NotCovered(f"{label} returns something else than the output of its last module")
        else:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            raise NotCovered(f"the forward of {label} uses the functional operation {name!r}, no module")
        last = node
    return _distinct(layers)


def _leaves(prefix: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    if type(module) is not nn.Sequential:
        return [(prefix, module)]
    found: list[tuple[str, nn.Module]] = []
    for name, child in module._modules.items():  # named_children would leave out a module used twice
        if child is not None:
            found += _leaves(f"{prefix}.{name}" if prefix else name, child)
    return found


def _distinct(layers: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    seen: dict[int, str] = {}
    for name, module in layers:
        if id(module) in seen:
            raise NotCovered(f"layer {name!r} ({type(module).__name__}) is used more than once")
        seen[id(module)] = name
    return layers


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _check_layer(name: str, module: nn.Module, table: dict[type[nn.Module], Any], saves: str) -> None:
    kind = type(module).__name__
    where = f"layer {name!r} ({kind})" if name else f"the model ({kind})"
    if type(module) not in table:
        raise NotCovered(f"{where} is not covered by BackPACK's {saves}")
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        raise NotCovered(f"{where} carries hooks")
    if getattr(module, "inplace", False):
        raise NotCovered(f"{where} works in place")
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.training:
            raise NotCovered(f"{where} is in training mode: its outputs mix the examples of a batch")
        if not module.affine or not module.track_running_stats:
            raise NotCovered(f"{where} must have affine=True and track_running_stats=True")
    if isinstance(module, nn.Dropout) and module.training and module.p > 0:
        raise NotCovered(f"{where} is in training mode")
    if isinstance(module, nn.Embedding):
        plain = module.padding_idx is None and module.max_norm is None
        if not plain or module.sparse or module.scale_grad_by_freq:
            raise NotCovered(f"{where} uses padding_idx, max_norm, sparse or scale_grad_by_freq")
        if module.weight.dtype != torch.float32:  # BackPACK's one-hot matrix is float32 whatever the weight is
            raise NotCovered(f"{where} is covered in float32 only")
    if isinstance(module, nn.modules.conv._ConvNd) and module.padding_mode != "zeros":
        raise NotCovered(f"{where} pads with {module.padding_mode!r}")
    if hasattr(module, "parametrizations"):
        raise NotCovered(f"{where} has parametrized weights")


def _check_loss(loss_fn: Callable[..., Any]) -> KnownLoss:
    known = recognise(loss_fn)
    if known is None:
        raise NotCovered(
            f"the loss {getattr(loss_fn, '__name__', type(loss_fn).__name__)!r} is not torch's CrossEntropyLoss, MSELoss "
            "or BCEWithLogitsLoss"
        )
    for option in ("weight", "pos_weight"):
        if known.options.get(option) is not None:
            raise NotCovered(f"the loss uses {option}=")
    if known.options.get("ignore_index", -100) != -100:
        raise NotCovered("the loss uses ignore_index=")
    return known


def _check_batch(known: KnownLoss, targets: Any) -> None:
    if not isinstance(targets, Tensor):
        raise NotCovered(f"the targets are a {type(targets).__name__}, no tensor")
    if known.kind == "cross_entropy":
        if targets.is_floating_point():
            raise NotCovered("the targets of the cross-entropy are probabilities, not class indices")
        if (targets == -100).any():
            raise NotCovered("some targets carry the ignore_index -100")
    elif targets.dim() != 2 or (known.kind == "bce_with_logits" and targets.shape[1] != 1):
        wanted = "(N, C)" if known.kind == "mse" else "(N, 1)"
        raise NotCovered(f"the targets have shape {tuple(targets.shape)}, BackPACK takes {wanted} with this loss")


def _table(extension: Any) -> dict[type[nn.Module], Any]:
    found: dict[type[nn.Module], Any] = vars(extension)["_BackpropExtension__module_extensions"]
    return found


def check_covered(problem: Problem, quantity: str = "sqrt_ggn") -> list[tuple[str, nn.Module]]:
    """The chain of layers of a problem that BackPACK's extension covers.

    Args:
        problem: model, loss and data.
        quantity: "sqrt_ggn" or "diag_ggn" (which knows a few layers more).

    Raises:
        NotCovered: naming the first layer, or what else stands in the way.
        MissingExtraError: BackPACK is not installed.
    """
    extension = _extension(quantity)
    if problem.forward is not None:
        raise NotCovered("the problem has a forward= of its own, which BackPACK's extensions can't see into")
    known = _check_loss(problem.loss_fn)
    first = problem.placed(problem.batches[0])
    with problem.quiet(first, grad=False):  # in the problem's mode
        chain = layer_chain(problem.model)
        for name, module in chain:
            _check_layer(name, module, _table(extension), extension.savefield)
    owners: dict[int, str] = {}
    for name, module in chain:
        for p in module._parameters.values():
            if p is not None and id(p) in owners:
                raise NotCovered(f"layers {owners[id(p)]!r} and {name!r} share a parameter")
            if p is not None:
                owners[id(p)] = name
    for batch in problem.batches:
        if not batch.is_pair or not isinstance(batch.inputs, Tensor):
            raise NotCovered("the batches are not pairs (inputs, targets) with one tensor as inputs")
        _check_batch(known, batch.targets)
    return chain


def supports(problem: Problem, quantity: str = "sqrt_ggn") -> tuple[bool, str]:
    """Whether BackPACK's second-order extensions cover a problem, and if not, what stands in the way.

    Args:
        problem: model, loss and data.
        quantity: "sqrt_ggn" or "diag_ggn".

    Returns:
        ``(True, "")``, or False and a sentence that names the first layer that is not covered.
    """
    try:
        check_covered(problem, quantity)
    except (NotCovered, MissingExtraError) as error:
        return False, str(error)
    return True, ""


def _extension(quantity: str) -> Any:
    kinds = {"sqrt_ggn": "SqrtGGNExact", "diag_ggn": "DiagGGNExact"}
    if quantity not in kinds:
        raise ValueError(f"quantity must be one of {', '.join(map(repr, kinds))}, got {quantity!r}")
    return getattr(require_backpack().extensions, kinds[quantity])()


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
    extension = _extension(quantity)
    batch = problem.placed(batch)
    known = _check_loss(problem.loss_fn)
    index = problem.layout.index()
    with problem.quiet(batch), _own_hooks(backpack):
        twins, found = [], {}
        for _, module in layer_chain(problem.model):
            twin, pairs = _shared_copy(module, set(index))
            twins.append(twin)
            found.update(pairs)
        try:
            net = backpack.extend(nn.Sequential(*twins))
            loss_fn = backpack.extend(_loss_module(known))
            loss = loss_fn(net(batch.inputs), batch.targets)
            with backpack.backpack(extension):
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
    return int(rows * problem.layout.total * problem.layout.dtype.itemsize)


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
            parts = torch.autograd.grad(
                top, problem.leaves, [torch.ones_like(t) for t in top], create_graph=True, allow_unused=True
            )
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
        self._holds = 0

    @contextmanager
    def hold(self) -> Iterator[SymmetricOperator]:
        """Keep the batches' graphs until the outermost block ends."""
        self._holds += 1
        try:
            yield self
        finally:
            self._holds -= 1
            if self._holds == 0:
                self._cache.clear()

    def _multiply(self, rows: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        with self.hold():
            for graph in self._cache.each():
                for row, target in zip(rows, out, strict=True):
                    graph.multiply(target, self.layout.views(row))
        return out
