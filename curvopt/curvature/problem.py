"""Problem: model, loss and data as one scalar function of the parameters, evaluated without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from curvopt._errors import CurvatureError, CurvatureModeWarning
from curvopt._params import ParameterLayout, named_parameters
from curvopt.curvature.data import Batch, DataSource, nbytes, place, tensors_in
from curvopt.curvature.quiet import (
    Buffers,
    all_modules,
    gradients,
    mixed_seed,
    quiet_backward,
    quiet_forward,
    substituted,
)
from curvopt.curvature.reduction import reduction_of, weigh


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and (Distributed)DataParallel wrappers: same parameters, plain forward."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


class _Store:
    """What operators over one problem share: the data of this generation, its seed and a version."""

    def __init__(self, source: DataSource, seed: int, data_budget: int) -> None:
        self.source = source
        self.seed = seed
        self.generation = 0
        self.version = 0
        self.data_budget = data_budget
        self.batches: list[Batch] | None = None
        self.on_device: dict[int, Batch] = {}
        self.on_device_bytes = 0

    def changed(self, reread: bool) -> None:
        self.version += 1
        if reread:
            self.batches = None
            self.on_device.clear()
            self.on_device_bytes = 0


class Problem:
    """``L(θ)``: the loss of a model on data, as a function of some of its parameters.

    Without ``forward`` a batch is (inputs, targets): a tensor goes in as ``model(inputs)``, a dict as
    ``model(**inputs)``, a tuple or list as ``model(*inputs)``; the loss is ``loss_fn(outputs, targets)``. With
    ``forward`` outputs are ``forward(model, batch)`` and the loss is ``loss_fn(outputs, batch[1])`` for a pair and
    ``loss_fn(outputs, batch)`` for any other batch.

    An evaluation leaves no trace (see ``curvopt.curvature.quiet``). The data are read once a generation and kept;
    dropout masks depend on (seed, generation, batch number) alone.

    Args:
        model: the network; DataParallel and ``torch.compile`` wrappers are taken off.
        loss_fn: maps outputs and targets to a scalar.
        data: see ``curvopt.curvature.data.DataSource``.
        params: parameters to differentiate by; None takes all that require grad.
        forward: see above.
        reduction: "mean" or "sum"; None reads ``loss_fn.reduction``, and a plain function counts as a mean.
        weight: maps a batch to what its mean loss divides by; None: see ``curvopt.curvature.reduction``.
        mode: "train", "eval" or None for the flags that the model has.
        seed: of masks and of the reading order; None is 0.
        data_budget: bytes of data that may be kept on an accelerator; the rest stays where it came from.

    Attributes:
        layout: order and shapes of the parameters.
        reduction: "mean" or "sum".
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        data: Any,
        params: Iterable[Tensor] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        *,
        reduction: str | None = None,
        weight: Callable[[Any], Any] | None = None,
        mode: str | None = None,
        seed: int | None = None,
        data_budget: int = 2**30,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for name, function in (("loss_fn", loss_fn), ("forward", forward), ("weight", weight)):
            if function is None and name != "loss_fn":
                continue
            if not callable(function):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        if mode not in (None, "train", "eval"):
            raise ValueError(f"mode must be 'train', 'eval' or None (the model's own), got {mode!r}")
        self.model = unwrap(model)
        self.loss_fn = loss_fn
        self.forward = forward
        self.reduction = reduction_of(loss_fn, reduction)
        self.weight = weight
        self.mode = mode
        self.layout: ParameterLayout = named_parameters(self.model, params)
        self._store = _Store(DataSource(data), 0 if seed is None else int(seed), data_budget)
        self._leaves: tuple[Tensor, ...] | None = None
        self._warned = False

    def restricted(self, params: Iterable[Tensor]) -> Problem:
        """The same function over fewer parameters; data, seed and generation are shared."""
        twin = object.__new__(Problem)
        twin.__dict__.update(self.__dict__)
        twin.layout = named_parameters(self.model, params)
        twin._leaves = None
        return twin

    def private(self) -> Problem:
        """The same function with data, seed and generation of its own, starting from this one's."""
        twin = object.__new__(Problem)
        twin.__dict__.update(self.__dict__)
        old = self._store
        twin._store = _Store(old.source, old.seed, old.data_budget)
        twin._store.generation = old.generation
        twin._store.batches = old.batches
        twin._leaves = None
        return twin

    # ---- which matrix
    @property
    def seed(self) -> int:
        """Seed of masks and reading order."""
        return self._store.seed

    @property
    def generation(self) -> int:
        """The generation whose data and masks are in use."""
        return self._store.generation

    @property
    def version(self) -> int:
        """Grows whenever the function changes (batch, seed, generation): what was kept for an older one is void."""
        return self._store.version

    @property
    def point(self) -> tuple[object, ...]:
        """Function and parameter values, to tell whether what was kept at another moment still holds."""
        leaves = self.leaves
        return (
            self.version,
            tuple(id(p) for p in leaves),
            tuple(p._version for p in leaves),
            tuple(p.data_ptr() for p in leaves),
            tuple(p.requires_grad for p in leaves),
        )

    def renew(self, generation: int) -> None:
        """Go to a generation: loaders and callables are read anew at the next use, masks drawn anew."""
        if generation != self._store.generation:
            self._store.generation = int(generation)
            self._store.changed(reread=self._store.source.renewable)

    def reseed(self, seed: int) -> None:
        """Take another seed: masks and reading order change."""
        self._store.seed = int(seed)
        self._store.changed(reread=self._store.source.renewable)

    def set_batch(self, data: Any) -> None:
        """Take other data, in any form that the constructor takes."""
        self._store.source = DataSource(data)
        self._store.changed(reread=True)

    @property
    def batches(self) -> list[Batch]:
        """The batches of this generation, weighed, read at the first use."""
        store = self._store
        if store.batches is None:
            raw = store.source.read(mixed_seed(store.seed, store.generation, "data"), self.layout.device)
            batches = [Batch(item, number) for number, item in enumerate(raw)]
            store.batches = weigh(batches, self.loss_fn, self.reduction, self.weight)
        return store.batches

    def placed(self, batch: Batch) -> Batch:
        """The batch on the parameters' device; kept there while the data budget lasts."""
        device = self.layout.device
        store = self._store
        kept = store.on_device.get(batch.number)
        if kept is not None and kept is batch:
            return batch
        if kept is not None and all(t.device == device for t in tensors_in(kept.raw)):
            return kept
        raw = place(batch.raw, device)
        if raw is batch.raw:
            return batch
        moved = Batch(raw, batch.number, batch.weight, batch.share)
        if store.batches is not None and any(b is batch for b in store.batches):
            size = nbytes(raw)
            if store.on_device_bytes + size <= store.data_budget:
                store.on_device[batch.number] = moved
                store.on_device_bytes += size
        return moved

    # ---- evaluation
    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors to differentiate by: the parameters, or what ``substituted`` has put in their place."""
        return self.layout.params if self._leaves is None else self._leaves

    @contextmanager
    def substituted(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Evaluate at other values: ``tensors`` (leaves that require grad) stand in for the parameters."""
        before = self._leaves
        with substituted((self.model, self.loss_fn), self.layout.params, tensors):
            self._leaves = tuple(tensors)
            try:
                yield
            finally:
                self._leaves = before

    def _mask_seed(self, batch: Batch) -> int:
        return mixed_seed(self._store.seed, self._store.generation, batch.number)

    @contextmanager
    def quiet(self, batch: Batch, grad: bool = True) -> Iterator[Buffers]:
        """The quiet context of a pass over ``batch``, with its masks' seed."""
        with quiet_forward(
            self.model, (self.loss_fn,), self.leaves, self.layout.device, self._mask_seed(batch), self.mode, grad
        ) as buffers:
            yield buffers

    @contextmanager
    def quiet_backward(self, buffers: Buffers) -> Iterator[None]:
        """The quiet context of a later backward pass through a graph made under ``quiet``."""
        with quiet_backward(self.leaves, self.layout.device, buffers, all_modules((self.model,))):
            yield

    def evaluate(self, batch: Batch, grad: bool = True) -> tuple[Any, Tensor]:
        """Outputs of the model and the batch's part of L, both with a graph to the parameters.

        Args:
            batch: one of ``batches`` (or of ``placed``).
            grad: record the graph.

        Returns:
            ``(outputs, loss)``; the 0-dimensional loss is multiplied by the batch's share, so that the sum over
            ``batches`` is L.

        Raises:
            CurvatureError: inside inference mode, or a loss that does not depend on a parameter that requires grad.
            TypeError: a loss that is no tensor.
            ValueError: a loss that is no scalar, or a batch of the wrong form.
        """
        self._warn_of_batch_statistics()
        batch = self.placed(batch)
        with self.quiet(batch, grad):
            return self.call(batch)

    def call(self, batch: Batch) -> tuple[Any, Tensor]:
        """``evaluate`` without the quiet context, for callers who are inside one."""
        outputs = self._outputs(batch)
        if self.forward is not None and not batch.is_pair:
            loss = self.loss_fn(outputs, batch.raw)
        else:
            loss = self.loss_fn(outputs, batch.targets)
        self._check_loss(loss)
        loss = loss.reshape(())
        return outputs, (loss if batch.share == 1.0 else loss * batch.share)

    def _outputs(self, batch: Batch) -> Any:
        if self.forward is not None:
            return self.forward(self.model, batch.raw)
        if not batch.is_pair:
            size = f" of length {len(batch.raw)}" if isinstance(batch.raw, (tuple, list)) else ""
            raise ValueError(
                f"batch {batch.number} is a {type(batch.raw).__name__}{size}, expected a pair (inputs, targets); "
                "for other batches give forward=lambda model, batch: ... and a loss_fn of (outputs, batch)"
            )
        inputs = batch.inputs
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        if isinstance(inputs, (tuple, list)) and not isinstance(inputs, nn.utils.rnn.PackedSequence):
            return self.model(*inputs)
        return self.model(inputs)

    def _check_loss(self, loss: Any) -> None:
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn returned {type(loss).__name__}, expected a scalar tensor")
        if loss.numel() != 1:
            raise ValueError(
                f"loss_fn returned a tensor of shape {tuple(loss.shape)}, expected a scalar; reduce it by mean or sum"
            )
        if not loss.is_floating_point():
            raise TypeError(f"loss_fn returned dtype {loss.dtype}, expected a real floating-point scalar")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise CurvatureError(
                "the loss does not require grad: it depends on no parameter that requires grad "
                "(was it computed under no_grad, from .item() or .detach(), or were the parameters frozen?)"
            )

    def loss(self) -> Tensor:
        """L, a 0-dimensional tensor without a graph."""
        total = torch.zeros((), dtype=self.layout.dtype, device=self.layout.device)
        for batch in self.batches:
            total += self.evaluate(batch, grad=False)[1].detach()
        return total

    def loss_and_gradient(self) -> tuple[Tensor, Tensor]:
        """L and its gradient (P,)."""
        total = torch.zeros((), dtype=self.layout.dtype, device=self.layout.device)
        gradient = torch.zeros(self.layout.total, dtype=self.layout.dtype, device=self.layout.device)
        self._warn_of_batch_statistics()
        for batch in self.batches:
            batch = self.placed(batch)
            with self.quiet(batch):
                _, loss = self.call(batch)
                parts = gradients(loss, self.leaves)
            total += loss.detach()
            for piece, part in zip(self.layout.views(gradient), parts, strict=True):
                if part is not None:
                    piece.add_(part)
        return total, gradient

    def gradient(self) -> Tensor:
        """Gradient of L, (P,)."""
        return self.loss_and_gradient()[1]

    def _warn_of_batch_statistics(self) -> None:
        """Warn once where several batches go through BatchNorm in training mode."""
        if self._warned or len(self.batches) < 2:
            return
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if norms and (self.mode == "train" or (self.mode is None and any(m.training for m in norms))):
            self._warned = True
            warnings.warn(
                f"BatchNorm in training mode over {len(self.batches)} batches: the curvature is that of the average of "
                "the per-batch losses, each with its own statistics; give one batch, or mode='eval'",
                CurvatureModeWarning,
                stacklevel=4,
            )
