"""SymmetricOperator: the one thing that the layers below curvature know of a curvature matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, overload

import torch
from torch import Tensor

from curvopt._params import ParameterLayout
from curvopt.curvature.count import ProductCount


class SymmetricOperator:
    """A real symmetric P x P matrix known by its products, after ``scipy.sparse.linalg.LinearOperator``.

    ``op @ x`` takes a vector (P,), a block (P, m) or, when the operator has a parameter layout, a list of tensors
    shaped like the parameters; the answer has the form of the question. Subclasses write ``_multiply``, which maps
    rows (m, P) to rows (m, P): a vector a row, because a row is contiguous and a column is not.

    An operator is **one matrix** until ``renew`` (or a subclass's ``set_batch``) is called. Inside ``with op.hold():``
    it may keep what several products share, a graph for one; all of that is freed on the way out.

    Attributes:
        matvecs: products so far; a block of m counts m.
        layout: order and shapes of the parameters behind the flat index, or None for a plain matrix.
        process_group: over which optimizers average products when torch.distributed runs: None for the default group,
            False for none (each process trains a model of its own).
        count: times products while it is entered; else None.
    """

    process_group: Any = None
    count: ProductCount | None = None

    def __init__(
        self,
        size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        layout: ParameterLayout | None = None,
    ) -> None:
        self._size = size
        self._dtype = dtype
        self._device = torch.device(device)
        self.layout = layout
        self.matvecs = 0
        self._holds = 0

    # ---- what it is
    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return (self._size, self._size)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the products."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where vectors must live."""
        return self._device

    @property
    def children(self) -> Sequence[SymmetricOperator]:
        """Operators that this one is made of (sums and the like)."""
        return ()

    # ---- life time
    @contextmanager
    def hold(self) -> Iterator[SymmetricOperator]:
        """Keep what products share until the outermost block ends; what changed weights made stale is built anew."""
        with ExitStack() as stack:
            for child in self.children:
                stack.enter_context(child.hold())
            self._holds += 1
            try:
                yield self
            finally:
                self._holds -= 1
                if self._holds == 0:
                    self._release()

    def _release(self) -> None:
        """Free what the products inside ``hold`` shared."""

    def renew(self, generation: int) -> None:
        """Become the matrix of this generation: callables and loaders are read anew, masks drawn anew.

        The same generation gives the same masks, so that a resumed run sees the matrix that an unbroken one saw.
        """
        for child in self.children:
            child.renew(generation)

    # ---- products
    def _multiply(self, rows: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} defines no product")

    def multiply_rows(self, rows: Tensor) -> Tensor:
        """Products with the rows of an (m, P) tensor, as rows; the solvers' entry."""
        if rows.dim() != 2 or rows.shape[1] != self.shape[1]:
            raise ValueError(f"expected rows of shape (m, {self.shape[1]}), got {tuple(rows.shape)}")
        self._check(rows)
        self.matvecs += rows.shape[0]
        if self.count is None:
            return self._multiply(rows)
        with self.count.product(self.device):
            return self._multiply(rows)

    def _check(self, x: Tensor) -> None:
        if x.dtype != self.dtype:
            raise TypeError(f"operand has dtype {x.dtype}, the operator {self.dtype}; convert with x.to({self.dtype})")
        if x.device != self.device:
            raise ValueError(f"operand is on {x.device}, the operator on {self.device}")

    @overload
    def __matmul__(self, x: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, x: list[Tensor]) -> list[Tensor]: ...
    def __matmul__(self, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Product with a vector (P,), a block (P, m), or a list of tensors shaped like the parameters."""
        if isinstance(x, (list, tuple)):
            if self.layout is None:
                raise TypeError("this operator has no parameter layout: give a tensor of shape (P,) or (P, m)")
            return self.layout.views(self @ self.layout.flatten(x))
        if not isinstance(x, Tensor):
            raise TypeError(f"operand must be a tensor or a list of tensors, got {type(x).__name__}")
        if x.dim() not in (1, 2) or x.shape[0] != self.shape[1]:
            raise ValueError(f"operand has shape {tuple(x.shape)}, expected ({self.shape[1]},) or ({self.shape[1]}, m)")
        if x.dim() == 1:
            return self.multiply_rows(x.unsqueeze(0)).squeeze(0)
        return self.multiply_rows(x.T).T

    def to_dense(self) -> Tensor:
        """The (P, P) matrix, by P products: for tests and small problems."""
        eye = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        with self.hold():
            return self.multiply_rows(eye).T.contiguous()

    # ---- algebra
    def __add__(self, other: SymmetricOperator) -> SymmetricOperator:
        return LinearCombination([(1.0, self), (1.0, other)])

    def __sub__(self, other: SymmetricOperator) -> SymmetricOperator:
        return LinearCombination([(1.0, self), (-1.0, other)])

    def __mul__(self, factor: float) -> SymmetricOperator:
        return LinearCombination([(float(factor), self)])

    __rmul__ = __mul__

    def __neg__(self) -> SymmetricOperator:
        return self * -1.0

    def shift(self, amount: float) -> SymmetricOperator:
        """``self + amount * I``."""
        return LinearCombination([(1.0, self)], identity=float(amount))

    def deflate(self, vectors: Tensor) -> SymmetricOperator:
        """``(I - V V^T) A (I - V V^T)`` for orthonormal columns V (P, k)."""
        return Deflated(self, vectors)

    def congruence(self, diagonal: Tensor) -> SymmetricOperator:
        """``D A D`` for a diagonal D given as a vector (P,): the matrix in a preconditioner's metric."""
        return Congruence(self, diagonal)

    def restrict(self, index: Tensor | slice, layout: ParameterLayout | None = None) -> SymmetricOperator:
        """The principal sub-matrix on some coordinates; each product still costs one of the whole."""
        return Restricted(self, index, layout)


def _same_space(operators: Sequence[SymmetricOperator]) -> SymmetricOperator:
    first = operators[0]
    for op in operators[1:]:
        if (op.shape, op.dtype, op.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"operators differ: {first.shape} {first.dtype} on {first.device} and {op.shape} {op.dtype} on {op.device}"
            )
    return first


class LinearCombination(SymmetricOperator):
    """``sum_i c_i A_i + s I``."""

    def __init__(self, terms: Sequence[tuple[float, SymmetricOperator]], identity: float = 0.0) -> None:
        first = _same_space([op for _, op in terms])
        super().__init__(first.shape[0], first.dtype, first.device, first.layout)
        self.terms = list(terms)
        self.identity = identity

    @property
    def children(self) -> Sequence[SymmetricOperator]:
        """The operators of the terms."""
        return [op for _, op in self.terms]

    def _multiply(self, rows: Tensor) -> Tensor:
        out = rows * self.identity
        for factor, op in self.terms:
            out.add_(op.multiply_rows(rows), alpha=factor)
        return out


class Deflated(SymmetricOperator):
    """``(I - V V^T) A (I - V V^T)``."""

    def __init__(self, operator: SymmetricOperator, vectors: Tensor) -> None:
        super().__init__(operator.shape[0], operator.dtype, operator.device, operator.layout)
        if vectors.dim() != 2 or vectors.shape[0] != self.shape[0]:
            raise ValueError(f"vectors must have shape ({self.shape[0]}, k), got {tuple(vectors.shape)}")
        self.operator = operator
        self.rows = vectors.T.contiguous()

    @property
    def children(self) -> Sequence[SymmetricOperator]:
        """The operator that is deflated."""
        return (self.operator,)

    def _project_out(self, rows: Tensor) -> Tensor:
        return rows - (rows @ self.rows.T) @ self.rows

    def _multiply(self, rows: Tensor) -> Tensor:
        return self._project_out(self.operator.multiply_rows(self._project_out(rows)))


class Congruence(SymmetricOperator):
    """``D A D`` with a diagonal D."""

    def __init__(self, operator: SymmetricOperator, diagonal: Tensor) -> None:
        super().__init__(operator.shape[0], operator.dtype, operator.device, operator.layout)
        if diagonal.shape != (self.shape[0],):
            raise ValueError(f"diagonal must have shape ({self.shape[0]},), got {tuple(diagonal.shape)}")
        self.operator = operator
        self.diagonal = diagonal.to(dtype=self.dtype, device=self.device)

    @property
    def children(self) -> Sequence[SymmetricOperator]:
        """The operator in the middle."""
        return (self.operator,)

    def _multiply(self, rows: Tensor) -> Tensor:
        return self.operator.multiply_rows(rows * self.diagonal) * self.diagonal


class Restricted(SymmetricOperator):
    """A principal sub-matrix."""

    def __init__(
        self, operator: SymmetricOperator, index: Tensor | slice, layout: ParameterLayout | None = None
    ) -> None:
        size = torch.arange(operator.shape[0], device="cpu")[index].numel()
        super().__init__(size, operator.dtype, operator.device, layout)
        self.operator = operator
        self.index = index

    @property
    def children(self) -> Sequence[SymmetricOperator]:
        """The whole operator."""
        return (self.operator,)

    def _multiply(self, rows: Tensor) -> Tensor:
        whole = rows.new_zeros(rows.shape[0], self.operator.shape[0])
        whole[:, self.index] = rows
        return self.operator.multiply_rows(whole)[:, self.index].contiguous()
