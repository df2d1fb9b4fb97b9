"""Evaluating a user's model without leaving a trace on it.

What a forward or backward pass may move, and how each is kept still:

- **Buffers** (BatchNorm statistics, counters): each module's ``_buffers`` holds clones for the length of a pass, and
  the original objects afterwards, so a graph that outlives the pass keeps the clones.
- **Tensors set as attributes by a forward pass** (the old ``weight_norm``, cached activations): put back.
- **Random numbers**: torch's CPU generator and the one of the parameters' CUDA device are saved, seeded for the pass
  and restored. ``everything=True`` (reading data, calling closures) does the same for Python's and numpy's.
- **Weights that a forward pass writes to**: embeddings forget their ``max_norm`` for the length of a pass.
- **Training flags**: saved for each module apart. ``.grad``: never used, because gradients come from ``autograd.grad``.
- **Gradient hooks** of parameters and full backward hooks of modules: suspended, since they would fire in passes that
  are not the user's. Forward hooks are part of the model and do run.
- **Kernels without a right second derivative**: fused attention is replaced by the maths kernel, cuDNN's recurrent
  layers by the native ones, weight normalisation by its formula, compiled code by eager code. Autocast is off: second
  derivatives of half-precision passes are unsymmetric to 1e-4.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from curvopt._errors import CurvatureError

Buffers = list[tuple[nn.Module, dict[str, Tensor | None]]]


def mixed_seed(*parts: object) -> int:
    """A 63-bit seed from any parts, the same in every process (``hash`` is not)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def forked_rng(device: torch.device, seed: int, everything: bool = False) -> Iterator[None]:
    """Seed the generators for the block and restore them after it.

    torch's CPU generator and ``device``'s are covered, and with ``everything`` Python's and numpy's global ones too.
    """
    # torch.manual_seed would also seed every other accelerator, for which nothing is saved here
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    python_state = random.getstate() if everything else None
    numpy_state = np.random.get_state() if everything else None
    try:
        torch.default_generator.manual_seed(seed)
        if cuda_state is not None:
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[index].manual_seed(seed)
        if everything:
            random.seed(seed)
            np.random.seed(seed % 2**32)
        yield
    finally:
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)
        if everything:
            random.setstate(python_state)  # type: ignore[arg-type]
            np.random.set_state(numpy_state)  # type: ignore[arg-type]


def refuse_inference_mode() -> None:
    """Raise inside ``torch.inference_mode()``, where no derivative exists, whatever the grad mode."""
    if torch.is_inference_mode_enabled():
        raise CurvatureError(
            "curvature can't be computed inside torch.inference_mode(): its tensors have no derivatives; "
            "use torch.no_grad() there, or leave inference mode first"
        )


def all_modules(roots: Iterable[object]) -> list[nn.Module]:
    """Every module below the roots, each once; roots that are no modules are passed over."""
    found: dict[int, nn.Module] = {}
    for root in roots:
        if isinstance(root, nn.Module):
            for module in root.modules():
                found.setdefault(id(module), module)
    return list(found.values())


def gradients(
    outputs: Any, inputs: Sequence[Tensor], grad_outputs: Any = None, **options: Any
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``, with None for inputs that take no part, and for those frozen by now."""
    live = [p for p in inputs if p.requires_grad]
    found = iter(torch.autograd.grad(outputs, live, grad_outputs, allow_unused=True, **options) if live else ())
    return tuple(next(found) if p.requires_grad else None for p in inputs)


def batched_gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """``gradients`` for each of several ``grad_outputs`` (m, ...) in one vectorised pass; the graph stays.

    By ``torch.func.vmap``: what ``is_grads_batched`` of ``torch.autograd.grad`` goes through has no rule for tanh or
    log-softmax and calls their kernels m times. That is left to derivatives that call a Function of the older style
    (no ``setup_context``), which ``torch.func`` refuses.

    Raises:
        RuntimeError: memory does not suffice, or neither way can vectorise an operation (one that reads a number).
    """
    try:
        return _mapped_gradients(outputs, inputs, grad_outputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        try:
            return gradients(outputs, inputs, grad_outputs, retain_graph=True, is_grads_batched=True)
        except RuntimeError:
            raise error from None  # the newer way's words say more


def _mapped_gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    taking_part: list[bool] = []

    def one(rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        parts = gradients(outputs, inputs, rows, retain_graph=True)
        taking_part[:] = [part is not None for part in parts]
        return tuple(part for part in parts if part is not None)

    found = iter(torch.func.vmap(one)(list(grad_outputs)))
    return tuple(next(found) if takes_part else None for takes_part in taking_part)


@contextmanager
def _emptied(dictionaries: Iterable[dict[Any, Any] | None]) -> Iterator[None]:
    stored = [(hooks, list(hooks.items())) for hooks in dictionaries if hooks]
    for hooks, _ in stored:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, items in stored:
            hooks.update(items)


def gradient_hooks_suspended(params: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Empty the parameters' hook dictionaries for the block: the dictionaries stay, so handles stay valid."""
    return _emptied(
        hooks for p in params for hooks in (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None))
    )


def _module_hooks_suspended(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    return _emptied(hooks for module in modules for hooks in (module._backward_hooks, module._backward_pre_hooks))


def tensors_of(buffers: Buffers) -> list[Tensor]:
    """Each tensor among them, once."""
    return list({id(b): b for _, entry in buffers for b in entry.values() if b is not None}.values())


def _cloned_buffers(modules: Sequence[nn.Module]) -> Buffers:
    clones: dict[int, Tensor] = {}
    out: Buffers = []
    for module in modules:
        if not module._buffers:
            continue
        entry: dict[str, Tensor | None] = {}
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in clones:
                clones[id(buffer)] = buffer.detach().clone().requires_grad_(buffer.requires_grad)
            entry[name] = None if buffer is None else clones[id(buffer)]
        out.append((module, entry))
    return out


@contextmanager
def swapped_buffers(buffers: Buffers) -> Iterator[None]:
    """Let modules see other buffers for the block; their own objects come back, whatever the block assigned."""
    own = [(module._buffers, dict(module._buffers)) for module, _ in buffers]
    for module, entry in buffers:
        module._buffers.update(entry)
    try:
        yield
    finally:
        for place, entry in own:
            place.clear()
            place.update(entry)


@contextmanager
def tensor_attributes_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Take off modules the tensors that the block sets as attributes, and put back those that it replaces."""
    before = [{k: v for k, v in vars(module).items() if isinstance(v, Tensor)} for module in modules]
    try:
        yield
    finally:
        for module, entry in zip(modules, before, strict=True):
            attributes = vars(module)
            for name in [k for k, v in attributes.items() if isinstance(v, Tensor) and k not in entry]:
                del attributes[name]
            for name, value in entry.items():
                if attributes.get(name) is not value:
                    attributes[name] = value


@contextmanager
def _renorm_put_aside(modules: Sequence[nn.Module]) -> Iterator[None]:
    """``max_norm`` of embeddings, whose forward pass writes to the weights: rows in use are within it after a step's own."""
    limits = [
        (m, m.max_norm) for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None
    ]
    for module, _ in limits:
        module.max_norm = None
    try:
        yield
    finally:
        for module, limit in limits:
            module.max_norm = limit


@contextmanager
def modes(model: nn.Module, modules: Sequence[nn.Module], mode: str | None) -> Iterator[None]:
    """Put the model into "train" or "eval" (None: leave it) for the block; each module's own flag comes back."""
    flags = [module.training for module in modules]
    try:
        if mode is not None:
            model.train(mode == "train")  # the model's own train(): it may hold some layers back on purpose
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            if module.training != flag:
                module.training = flag


class _PlainWeightNorm(TorchFunctionMode):
    """Writes ``torch._weight_norm`` out: its own second derivative is wrong (relative error about a half)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))
        return _weight_norm(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [d for d in range(v.dim()) if dim == -1 or d != dim % v.dim()]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def _has_weight_norm(modules: Sequence[nn.Module]) -> bool:
    return any(
        type(m).__name__ == "_WeightNorm"
        or any(type(h).__name__ == "WeightNorm" for h in m._forward_pre_hooks.values())
        for m in modules
    )


@contextmanager
def differentiable_kernels(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Kernels with second derivatives, eager code and no autocast."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in modules):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if _has_weight_norm(modules):
            stack.enter_context(_PlainWeightNorm())
        if "torch._dynamo" in sys.modules:  # nothing is compiled where it was never imported
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def quiet_forward(
    model: nn.Module,
    others: Sequence[object],
    params: Sequence[Tensor],
    device: torch.device,
    seed: int,
    mode: str | None = None,
    grad: bool = True,
) -> Iterator[Buffers]:
    """Context of one forward pass and of backward passes made inside it.

    Args:
        model: the module that is evaluated.
        others: further modules (the loss) whose buffers are covered.
        params: the tensors that are differentiated; their gradient hooks are suspended.
        device: where the parameters are.
        seed: of the generators, so that masks repeat.
        mode: "train", "eval", or None for the modules' own flags.
        grad: record a graph.

    Yields:
        The buffers that the pass sees, for ``quiet_backward``.

    Raises:
        CurvatureError: inside ``torch.inference_mode()``.
    """
    refuse_inference_mode()
    modules = all_modules((model, *others))
    buffers = _cloned_buffers(modules)
    with ExitStack() as stack:
        stack.enter_context(forked_rng(device, seed))
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(modes(model, modules, mode))
        stack.enter_context(swapped_buffers(buffers))
        stack.enter_context(tensor_attributes_kept(modules))
        stack.enter_context(_renorm_put_aside(modules))
        stack.enter_context(_module_hooks_suspended(modules))
        stack.enter_context(gradient_hooks_suspended(params))
        stack.enter_context(differentiable_kernels(modules, device))
        yield buffers


@contextmanager
def quiet_backward(
    params: Sequence[Tensor], device: torch.device, buffers: Buffers, modules: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Context of a later backward pass through a kept graph.

    Checkpointed parts run forward again in it, hence the buffers and kernels of the forward pass.
    """
    refuse_inference_mode()
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(swapped_buffers(buffers))
        stack.enter_context(_renorm_put_aside(modules))
        stack.enter_context(gradient_hooks_suspended(params))
        stack.enter_context(differentiable_kernels(modules, device))
        yield


@contextmanager
def substituted(roots: Sequence[object], old: Sequence[Tensor], new: Sequence[Tensor]) -> Iterator[None]:
    """Let every module below the roots see ``new`` tensors in the place of its ``old`` parameters.

    The parameters themselves are not written to, so graphs that hold them and their hooks stay as they are.
    """
    table = {id(o): n for o, n in zip(old, new, strict=True)}
    places: list[tuple[dict[str, Any], str, Any]] = []
    recurrent: list[tuple[nn.RNNBase, list[Any]]] = []
    try:
        for module in all_modules(roots):
            for name, p in list(module._parameters.items()):
                if id(p) in table:
                    places.append((module._parameters, name, p))
                    module._parameters[name] = table[id(p)]  # type: ignore[assignment]
            if isinstance(module, nn.RNNBase):  # recurrent layers read their weights from a list of their own
                recurrent.append((module, module._flat_weights))
                module.__dict__["_flat_weights"] = [table.get(id(w), w) for w in module._flat_weights]
        yield
    finally:
        for place, name, p in places:
            place[name] = p
        for module, weights in recurrent:
            module.__dict__["_flat_weights"] = weights
