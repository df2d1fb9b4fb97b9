"""PairHistory: the last m steps and gradient changes of L-BFGS, and the product of its inverse matrix with a gradient.

The two-loop recursion (Nocedal 1980; Nocedal & Wright 2006, algorithm 7.4) is carried out on blocks. With the pairs in
order of age as rows of S and Y, R the upper triangle of ``S Y^T`` and D its diagonal, its first loop is the triangular
system ``R a = S g`` and its second ``R^T c = D a - Y r``, so that

    q = g - Y^T a,    r = H0 q,    H g = r + S^T c

in four products of a matrix with a vector instead of 4 m products of vectors, all of them on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class PairHistory:
    """A ring of at most ``size`` pairs (s, y) over flat vectors of length P. Memory: 2 * size * P numbers.

    Args:
        size: pairs kept; the oldest is overwritten.
        total: P.
        dtype: of the vectors.
        device: where they live.

    Attributes:
        steps: (size, P), the ring of s.
        changes: (size, P), the ring of y.
        products: (size, size), ``s_i . y_j`` by slot; right wherever pair i is not younger than pair j.
        head: slot of the oldest pair.
        count: pairs held.
    """

    def __init__(self, size: int, total: int, dtype: torch.dtype, device: torch.device) -> None:
        self.steps = torch.zeros(size, total, dtype=dtype, device=device)
        self.changes = torch.zeros(size, total, dtype=dtype, device=device)
        self.products = torch.zeros(size, size, dtype=dtype, device=device)
        self.head = 0
        self.count = 0

    @property
    def size(self) -> int:
        """The most pairs that are held."""
        return self.steps.shape[0]

    def clear(self) -> None:
        """Forget every pair."""
        self.head = self.count = 0

    def push(self, step: Tensor, change: Tensor) -> None:
        """Take a pair with ``s . y > 0``; both (P,)."""
        if self.count < self.size:
            slot = (self.head + self.count) % self.size
            self.count += 1
        else:
            slot, self.head = self.head, (self.head + 1) % self.size
        self.steps[slot].copy_(step)
        self.changes[slot].copy_(change)
        self.products[:, slot] = self.steps @ change

    def by_age(self) -> list[tuple[Tensor, Tensor]]:
        """The pairs (s, y) from the oldest to the newest, views."""
        slots = [(self.head + i) % self.size for i in range(self.count)]
        return [(self.steps[slot], self.changes[slot]) for slot in slots]

    @property
    def newest(self) -> tuple[Tensor, Tensor]:
        """The last pair (s, y), views."""
        slot = (self.head + self.count - 1) % self.size
        return self.steps[slot], self.changes[slot]

    def apply(self, gradient: Tensor, initial: Callable[[Tensor], Tensor]) -> Tensor:
        """``H g`` for a gradient (P,), with ``initial(q) = H0 q``, which must return a new tensor."""
        n, head = self.count, self.head
        if n == 0:
            return initial(gradient)
        # The ring turns only once it is full, so slots in use are always the first n; roll puts them in order of age.
        s, y = self.steps[:n], self.changes[:n]
        r = self.products[:n, :n].roll((-head, -head), (0, 1)).triu()
        alpha = torch.linalg.solve_triangular(r, torch.mv(s, gradient).roll(-head)[:, None], upper=True)[:, 0]
        q = torch.addmv(gradient, y.T, alpha.roll(head), alpha=-1)
        out = initial(q)
        right = r.diagonal() * alpha - torch.mv(y, out).roll(-head)
        c = torch.linalg.solve_triangular(r.T, right[:, None], upper=False)[:, 0]
        return out.addmv_(s.T, c.roll(head))
