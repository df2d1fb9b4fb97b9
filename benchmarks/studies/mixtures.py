"""The two Gaussian mixtures of Ben Arous et al. (2024): samples, single-sample SGD, and the networks as modules.

Means are orthonormal coordinate vectors, which loses nothing: everything else is rotation invariant. Each class (each
neuron) is a layer of its own, so that an operator's ``layers()`` are the papers' blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class Heads(nn.Module):
    """Softmax regression without biases, each class a layer ``heads.c`` (d, 1)."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.heads = _rows(weights)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, k)."""
        return torch.cat([head(x) for head in self.heads], 1)


class Xor(nn.Module):
    """``f = sum_j v_j relu(W_j x)``, each neuron a layer ``neurons.j`` (d, 1), v the layer ``readout``."""

    def __init__(self, weights: Tensor, readout: Tensor) -> None:
        super().__init__()
        self.neurons = _rows(weights)
        self.readout = nn.Linear(len(readout), 1, bias=False)
        with torch.no_grad():
            self.readout.weight.copy_(readout[None])

    def forward(self, x: Tensor) -> Tensor:
        """Logit (N, 1)."""
        return self.readout(torch.relu(torch.cat([neuron(x) for neuron in self.neurons], 1)))


def _rows(weights: Tensor) -> nn.ModuleList:
    layers = nn.ModuleList(nn.Linear(weights.shape[1], 1, bias=False) for _ in weights)
    with torch.no_grad():
        for layer, row in zip(layers, weights, strict=True):
            layer.weight.copy_(row[None])
    return layers


def gmm_samples(
    count: int, classes: int, dimension: int, snr: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``Y = e_a + Z``, Z ~ N(0, I / snr), a uniform: inputs (count, dimension) and classes a (count,)."""
    label = torch.randint(classes, (count,), generator=generator)
    x = torch.randn(count, dimension, generator=generator) / snr**0.5
    x[torch.arange(count), label] += 1
    return x, label


def xor_samples(count: int, dimension: int, snr: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Means e_1, -e_1 with label 1 and e_2, -e_2 with label 0: inputs (count, dimension), labels (count,) as floats."""
    axis = torch.randint(2, (count,), generator=generator)
    sign = 2.0 * torch.randint(2, (count,), generator=generator) - 1
    x = torch.randn(count, dimension, generator=generator) / snr**0.5
    x[torch.arange(count), axis] += sign
    return x, (axis == 0).float()


def gmm_sgd(
    weights: Tensor, samples: tuple[Tensor, Tensor], rate: float, ridge: float, stops: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """One-pass SGD on softmax cross-entropy with a ridge; gives (steps done, weights) at ``stops``, rising."""
    w = weights.clone()
    done = 0
    for stop in stops:
        for i in range(done, stop):
            x, label = samples[0][i], int(samples[1][i])
            p = torch.softmax(w @ x, 0)
            p[label] -= 1
            w -= rate * (torch.outer(p, x) + ridge * w)
        done = stop
        yield stop, w.clone()


def xor_sgd(
    weights: Tensor, readout: Tensor, samples: tuple[Tensor, Tensor], rate: float, ridge: float
) -> tuple[Tensor, Tensor]:
    """One-pass SGD on the logistic loss with a ridge on both layers, through all samples; the weights of both."""
    w, v = weights.clone(), readout.clone()
    for x, y in zip(*samples, strict=True):
        z = w @ x
        h = z.clamp_min(0)
        r = torch.sigmoid(v @ h) - y
        grad_w = torch.outer(r * v * (z > 0), x)
        v, w = v - rate * (r * h + ridge * v), w - rate * (grad_w + ridge * w)
    return w, v


def xor_clusters(weights: Tensor, share: float = 0.1) -> int:
    """How many of the four cluster means have features ``relu(W m)`` of more than ``share`` of the largest norm."""
    means = torch.zeros(4, weights.shape[1])
    means[0, 0], means[1, 0], means[2, 1], means[3, 1] = 1, -1, 1, -1
    norms = torch.relu(means @ weights.T).norm(dim=1)
    return int((norms > share * norms.max()).sum()) if float(norms.max()) > 0 else 0
