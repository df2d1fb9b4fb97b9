"""The nets that costs are measured on: mlp, cnn and gpt, trained by plain SGD to fixed steps.

Float32, seed 0 before the net is built, training order from ``torch.randperm`` with a generator of seed 0, one epoch
after the other; the loss is the mean cross-entropy. Published leading Hessian values at step 200 say whether a rebuilt
problem is the same one (``Problem.published``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from benchmarks.data import load_chars, load_images

Pair = tuple[Tensor, Tensor]
CONTEXT = 64


class Block(nn.Module):
    """Pre-norm transformer block with plain softmax attention: fused kernels have no second derivative."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rise, self.fall = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            z.view(b, t, self.heads, d // self.heads).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(-2, -1) / math.sqrt(d // self.heads)).masked_fill(future, -torch.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))
        return x + self.fall(nn.functional.gelu(self.rise(self.norm2(x))))


class GPT(nn.Module):
    """Pre-norm GPT with learned positions and a head without bias; logits are (windows * time, vocab).

    Args:
        vocab, width, layers, heads, context: the shape.
        spread: standard deviations of the initial matrices and embeddings.
        tied: the head is the embedding, as in GPT-2.
    """

    def __init__(
        self,
        vocab: int,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        context: int = CONTEXT,
        spread: tuple[float, float] = (0.08, 0.3),
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=spread[0])
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=spread[1])
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).flatten(0, 1)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 10))


def _cnn() -> nn.Module:
    def stage(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *stage(3), *stage(32), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 8 * 8, 10)
    )


def _mnist() -> Pair:
    data = load_images("mnist", limit=5000, normalize=True)
    return data.inputs.reshape(5000, 784), data.targets


def _cifar() -> Pair:
    data = load_images("cifar-10", limit=5000)
    x = data.inputs.float()
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return (x - mean) / std, data.targets


def _text(windows: int = 5000, context: int = CONTEXT) -> Pair:
    ids = load_chars("tinyshakespeare", limit=windows * context + 1).ids
    return ids[:-1].view(windows, context), ids[1:].view(windows, context)


def _gpt2() -> nn.Module:
    """The shape of GPT-2 small, 124M parameters; characters take the first 65 of its 50,257 symbols."""
    return GPT(50257, 768, 12, 12, 1024, (0.02, 0.02), tied=True)


@dataclass(frozen=True)
class Problem:
    """A net, its data, and how it is trained.

    Attributes:
        name: "mlp", "cnn", "gpt" or (on CUDA alone) "gpt2".
        build: makes the net from torch's global generator.
        load: reads inputs and targets, 5,000 rows (windows of gpt2: 1,000).
        lr, batch: of plain SGD.
        curvature_rows: rows of the curvature batch, the first ones.
        published: {place: value} of leading Hessian values at step 200.
        kinks: its units have some (ReLU, max-pooling).
    """

    name: str
    build: Callable[[], nn.Module]
    load: Callable[[], Pair]
    lr: float
    batch: int
    curvature_rows: int
    published: dict[int, float]
    kinks: bool = False


PROBLEMS = {
    p.name: p
    for p in (
        Problem("mlp", _mlp, _mnist, 0.05, 50, 1000, {0: 6.78, 1: 6.16, 2: 5.66, 8: 2.67, 9: 1.52, 10: 1.40}),
        Problem("cnn", _cnn, _cifar, 0.05, 50, 500, {0: 118, 1: 87, 2: 51, 8: 18.4, 9: 15.8, 10: 14.2}, True),
        Problem("gpt", lambda: GPT(65), _text, 0.1, 32, 32, {0: 19.7, 1: 14.3, 2: 10.3, 8: 3.7, 9: 3.6, 10: 3.3}),
        Problem("gpt2", _gpt2, lambda: _text(1000, 1024), 0.1, 8, 4, {}),
    )
}


class Trained:
    """A problem's net along its training run; weights are kept at every step that was asked for.

    Args:
        problem: what is trained.
        device: where.

    Attributes:
        model: the net; ``at(step)`` puts weights into it.
        inputs, targets: all rows.
    """

    def __init__(self, problem: Problem, device: torch.device | str = "cpu") -> None:
        self.problem = problem
        self.name = problem.name
        self.device = torch.device(device)
        self.inputs, self.targets = (t.to(self.device) for t in problem.load())
        torch.manual_seed(0)
        self.model = problem.build().to(self.device)
        self._start = copy.deepcopy(self.model.state_dict())
        self._weights: dict[int, dict[str, Tensor]] = {0: self._start}

    @cached_property
    def loss_fn(self) -> nn.Module:
        """The mean cross-entropy."""
        return nn.CrossEntropyLoss()

    def rows(self, index: Tensor | slice) -> Pair:
        """Inputs and (flat) targets of some rows."""
        return self.inputs[index], self.targets[index].reshape(-1)

    @property
    def curvature_batch(self) -> Pair:
        """The first rows."""
        return self.rows(slice(self.problem.curvature_rows))

    def train(self, steps: Sequence[int]) -> None:
        """Train once from the start and keep the weights at these steps."""
        missing = sorted(set(steps) - set(self._weights))
        if not missing:
            return
        model = copy.deepcopy(self.model)
        model.load_state_dict(self._start)
        model.train()
        opt = torch.optim.SGD(model.parameters(), lr=self.problem.lr)
        for step, index in enumerate(order(self.problem.batch, missing[-1], len(self.inputs))):
            if step in missing:
                self._weights[step] = copy.deepcopy(model.state_dict())
            x, y = self.rows(index)
            opt.zero_grad()
            self.loss_fn(model(x), y).backward()
            opt.step()
        self._weights[missing[-1]] = copy.deepcopy(model.state_dict())

    def at(self, step: int) -> nn.Module:
        """The net with the weights of a step, in evaluation mode (peers know no other)."""
        self.train([step])
        self.model.load_state_dict(self._weights[step])
        return self.model.eval()


def order(batch: int, steps: int, rows: int = 5000) -> list[Tensor]:
    """Indices of each step's mini-batch."""
    generator = torch.Generator().manual_seed(0)
    out: list[Tensor] = []
    while len(out) < steps:
        out += [i for i in torch.randperm(rows, generator=generator).split(batch) if len(i) == batch]
    return out[:steps]
