"""What BackPACK's second-order extensions cover: looked up before anything runs, and named where they don't."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from curvopt._errors import CurvatureError, MissingExtraError
from curvopt.curvature.losses import KnownLoss, recognise
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


def known_loss(loss_fn: Callable[..., Any]) -> KnownLoss:
    """The loss's settings.

    Raises:
        NotCovered: it is none of the three that BackPACK knows, or has options that it leaves out.
    """
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
    extension = extension_of(quantity)
    if problem.forward is not None:
        raise NotCovered("the problem has a forward= of its own, which BackPACK's extensions can't see into")
    known = known_loss(problem.loss_fn)
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


def extension_of(quantity: str) -> Any:
    """A fresh BackPACK extension for "sqrt_ggn" or "diag_ggn"."""
    kinds = {"sqrt_ggn": "SqrtGGNExact", "diag_ggn": "DiagGGNExact"}
    if quantity not in kinds:
        raise ValueError(f"quantity must be one of {', '.join(map(repr, kinds))}, got {quantity!r}")
    return getattr(require_backpack().extensions, kinds[quantity])()
