"""JetMLP: a tanh network that gives its output together with derivatives by its inputs, in one forward pass.

Derivatives are carried through the layers (a linear layer maps them linearly, tanh by the chain rule), stacked along
the batch: a gradient by the weights then costs one backward pass, where nested autograd needs one more an order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Jet:
    """An output and its derivatives at N points.

    Attributes:
        value: (N,).
        first: derivative by an input dimension, (N,) each.
        second: second derivative by an input dimension, (N,) each.
    """

    value: Tensor
    first: dict[int, Tensor]
    second: dict[int, Tensor]


class JetMLP(nn.Module):
    """A fully connected tanh network R^d -> R, inputs scaled to [-1, 1] in every dimension.

    Weights are drawn by Glorot's rule and biases are zero, as is usual for physics-informed networks.

    Args:
        low, high: the corners of the domain.
        hidden: widths.
    """

    def __init__(self, low: Sequence[float], high: Sequence[float], hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [len(low), *hidden, 1]
        self.layers = nn.ModuleList(nn.Linear(a, b, dtype=torch.float64) for a, b in pairwise(widths))
        for layer in self.layers:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        corner, opposite = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
        self.register_buffer("middle", (corner + opposite) / 2)
        self.register_buffer("scale", 2 / (opposite - corner))

    def forward(self, points: Tensor) -> Tensor:
        """Outputs (N,) at points (N, d)."""
        return self.jet(points).value

    def jet(self, points: Tensor, first: Sequence[int] = (), second: Sequence[int] = ()) -> Jet:
        """Outputs and derivatives at points (N, d).

        Args:
            points: (N, d).
            first: dimensions of first derivatives.
            second: dimensions of second derivatives; their first ones are carried along.
        """
        dims = list(dict.fromkeys([*second, *first]))
        n, m = len(points), len(second)
        value = (points - self.middle) * self.scale
        slopes = torch.zeros(len(dims), n, points.shape[1], dtype=value.dtype, device=value.device)
        for i, d in enumerate(dims):
            slopes[i, :, d] = self.scale[d]  # type: ignore[index]
        bends = torch.zeros_like(slopes[:m])
        layers = list(self.layers)
        for i, layer in enumerate(layers):
            whole = torch.cat([value[None], slopes, bends])  # (1 + d + m, N, width)
            whole = whole @ layer.weight.T  # type: ignore[union-attr,operator]
            value, slopes, bends = whole[0] + layer.bias, whole[1 : 1 + len(dims)], whole[1 + len(dims) :]
            if i + 1 < len(layers):
                value = torch.tanh(value)
                fall = 1 - value.square()
                if m:
                    bends = fall * (bends - 2 * value * slopes[:m].square())
                slopes = fall * slopes
        return Jet(
            value[:, 0],
            {d: slopes[i, :, 0] for i, d in enumerate(dims)},
            {d: bends[i, :, 0] for i, d in enumerate(second)},
        )
