"""Registry of small models, losses and batches: an operator that joins the tests meets all of them.

Each entry builds (model, loss_fn, data, forward) in float64, from a fixed seed, with P small enough for an explicit
matrix. ``smooth`` is False where ReLU or max-pooling kinks spoil difference quotients. ``ggn`` is False where the loss
has no Gauss-Newton form (the model returns its own loss).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[nn.Module, Callable[..., Any], Any, Callable[..., Any] | None]


@dataclass(frozen=True)
class Case:
    """One problem: ``make()`` returns (model, loss_fn, data, forward), float64, the same at each call."""

    name: str
    build: Callable[[], Made]
    smooth: bool = True
    ggn: bool = True
    stochastic: bool = False
    tags: frozenset[str] = field(default_factory=frozenset)

    def make(self, dtype: torch.dtype = torch.float64) -> Made:
        """Build it; inputs, floating targets, parameters and buffers have ``dtype``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(map(ord, self.name)))
            model, loss_fn, data, forward = self.build()
        model.to(dtype)
        if isinstance(loss_fn, nn.Module):
            loss_fn.to(dtype)
        return model, loss_fn, cast(data, dtype), forward


def cast(item: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of a nest in ``dtype``."""
    if isinstance(item, Tensor):
        return item.to(dtype) if item.is_floating_point() else item
    if isinstance(item, dict):
        return {k: cast(v, dtype) for k, v in item.items()}
    return type(item)(cast(v, dtype) for v in item)


# ---- models
class Residual(nn.Module):
    """x + f(x), with one layer used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.first(x))
        return x + self.second(torch.tanh(self.first(x)))


class Attention(nn.Module):
    """Pre-norm attention block on ``scaled_dot_product_attention``, then a head on the mean."""

    def __init__(self, width: int = 4, heads: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, classes)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (
            z.view(n, t, self.heads, d // self.heads).transpose(1, 2) for z in self.mix(self.norm(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head((x + y.transpose(1, 2).reshape(n, t, d)).mean(1))


class MultiHead(nn.Module):
    """nn.MultiheadAttention without weights: the fused path."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    """A recurrent layer and a head on its last output."""

    def __init__(self, kind: type[nn.RNNBase], inputs: int = 2, width: int = 3, outputs: int = 2) -> None:
        super().__init__()
        self.cell = kind(inputs, width, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class TiedLanguageModel(nn.Module):
    """Embedding and output layer share one weight; one target a position."""

    def __init__(self, vocabulary: int = 5, width: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens)))).transpose(1, 2)


class TwoInputs(nn.Module):
    """Takes keyword arguments, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weight = attention_mask.unsqueeze(-1).to(self.embed.weight.dtype)
        pooled = (self.embed(input_ids) * weight).sum(1) / weight.sum(1)
        return self.head(torch.tanh(pooled))


class OwnLoss(nn.Module):
    """Returns an object with ``loss`` and ``logits`` from a dict batch, after Hugging Face's habit."""

    @dataclass
    class Output:
        """Loss and logits."""

        loss: Tensor
        logits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = TwoInputs()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> OwnLoss.Output:
        logits = self.inner(input_ids, attention_mask)
        return OwnLoss.Output(F.cross_entropy(logits, labels), logits)


class TwoOutputs(nn.Module):
    """Returns a tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.left = nn.Linear(3, 2)
        self.right = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.left(h), self.right(h)


def two_losses(outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of one output and squared error of the other."""
    return F.cross_entropy(outputs[0], targets[0]) + F.mse_loss(outputs[1], targets[1])


# ---- parts of cases
def mlp(inputs: int = 4, outputs: int = 3) -> nn.Module:
    """A tanh net with one hidden layer."""
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs))


def convolution(norm: Callable[[int], nn.Module]) -> nn.Module:
    """A small convolutional net with a normalisation layer."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), norm(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )


def classes(n: int = 7, width: int = 4, count: int = 3) -> tuple[Tensor, Tensor]:
    """Inputs and class labels."""
    return torch.randn(n, width), torch.randint(0, count, (n,))


def images(n: int = 6) -> tuple[Tensor, Tensor]:
    """4 x 4 pictures and class labels."""
    return torch.randn(n, 1, 4, 4), torch.randint(0, 3, (n,))


def sequences(n: int = 5) -> tuple[Tensor, Tensor]:
    """Sequences of 3 vectors of width 4 and class labels."""
    return torch.randn(n, 3, 4), torch.randint(0, 3, (n,))


def affine_norms_moved(model: nn.Module) -> nn.Module:
    """Norm layers away from weight 1 and bias 0, where faults in their derivatives hide."""
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def tokens(n: int = 5) -> dict[str, Tensor]:
    """A dict of token ids and a mask."""
    mask = torch.ones(n, 4, dtype=torch.long)
    mask[1:3, -1] = 0
    return {"input_ids": torch.randint(0, 6, (n, 4)), "attention_mask": mask}


def ignored(targets: Tensor) -> Tensor:
    """The labels with the first two ignored."""
    targets = targets.clone()
    targets.view(-1)[:2] = -100
    return targets


def class_case(loss_fn: Callable[..., Any], change: Callable[[Tensor], Any] = lambda y: y) -> Made:
    """The MLP on class labels."""
    x, y = classes()
    return mlp(), loss_fn, (x, change(y)), None


def soft(y: Tensor) -> Tensor:
    """Soft labels."""
    return torch.softmax(torch.randn(y.shape[0], 3), dim=1)


def _tokens_and_next(n: int = 4) -> tuple[Tensor, Tensor]:
    walk = torch.randint(0, 5, (n, 4))
    return walk[:, :-1], ignored(walk[:, 1:])


def _own_loss() -> Made:
    batch = tokens()
    batch["labels"] = torch.randint(0, 3, (5,))
    return OwnLoss(), (lambda out, batch: out.loss), batch, (lambda model, batch: model(**batch))


def _two_outputs() -> Made:
    x, y = classes(count=2)
    return TwoOutputs(), two_losses, (x, (y, torch.randn(7, 1))), None


def _frozen() -> Made:
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model, nn.CrossEntropyLoss(), classes(), None


def _dropout() -> Made:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 3))
    return model, nn.CrossEntropyLoss(), classes(), None


def _made(model: Callable[[], nn.Module], data: Callable[[], Any], loss: Callable[..., Any] | None = None) -> Any:
    return lambda: (model(), nn.CrossEntropyLoss() if loss is None else loss, data(), None)


CASES: list[Case] = [
    Case("mlp", _made(mlp, classes)),
    Case("mlp-sum", lambda: class_case(nn.CrossEntropyLoss(reduction="sum"))),
    Case("mlp-functional", lambda: class_case(F.cross_entropy)),
    Case("label-smoothing", lambda: class_case(nn.CrossEntropyLoss(label_smoothing=0.2))),
    Case("class-weights", lambda: class_case(nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0, 2.5])))),
    Case("ignore-index", lambda: class_case(nn.CrossEntropyLoss(), ignored)),
    Case(
        "smoothing-weights-ignored",
        lambda: class_case(nn.CrossEntropyLoss(torch.tensor([0.3, 1.0, 2.5]), label_smoothing=0.1), ignored),
    ),
    Case("soft-labels", lambda: class_case(nn.CrossEntropyLoss(), soft)),
    Case("partial", lambda: class_case(functools.partial(F.cross_entropy, label_smoothing=0.1))),
    Case("bce", _made(lambda: mlp(4, 2), lambda: (torch.randn(6, 4), torch.rand(6, 2)), nn.BCEWithLogitsLoss())),
    Case("mse", _made(lambda: mlp(4, 2), lambda: (torch.randn(6, 4), torch.randn(6, 2)), nn.MSELoss())),
    Case(
        "mse-sum", _made(lambda: mlp(4, 2), lambda: (torch.randn(6, 4), torch.randn(6, 2)), nn.MSELoss(reduction="sum"))
    ),
    Case(
        "batchnorm-train",
        _made(lambda: affine_norms_moved(convolution(nn.BatchNorm2d)).train(), images),
        smooth=False,
        tags=frozenset({"batchnorm"}),
    ),
    Case("batchnorm-eval", _made(lambda: affine_norms_moved(convolution(nn.BatchNorm2d)).eval(), images), smooth=False),
    Case(
        "groupnorm",
        _made(lambda: affine_norms_moved(convolution(lambda c: nn.GroupNorm(2, c))), images),
        smooth=False,
        tags=frozenset({"groupnorm"}),
    ),
    Case("layernorm-attention", _made(lambda: affine_norms_moved(Attention()), sequences), tags=frozenset({"sdpa"})),
    Case("multihead", _made(MultiHead, sequences), tags=frozenset({"sdpa"})),
    Case(
        "embedding",
        _made(
            lambda: nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Tanh(), nn.Linear(9, 3)),
            lambda: (torch.randint(0, 6, (6, 3)), torch.randint(0, 3, (6,))),
        ),
    ),
    Case("residual", _made(lambda: nn.Sequential(Residual(4), nn.Linear(4, 3)), classes)),
    Case("gru", _made(lambda: Recurrent(nn.GRU), lambda: (torch.randn(4, 3, 2), torch.randn(4, 2)), nn.MSELoss())),
    Case("lstm", _made(lambda: Recurrent(nn.LSTM), lambda: (torch.randn(4, 3, 2), torch.randn(4, 2)), nn.MSELoss())),
    Case("tied", _made(TiedLanguageModel, _tokens_and_next)),
    Case("dropout", _dropout, stochastic=True),
    Case("dict-inputs", _made(TwoInputs, lambda: (tokens(), torch.randint(0, 3, (5,))))),
    Case("tuple-outputs", _two_outputs),
    Case("own-loss", _own_loss, ggn=False),
    Case("frozen", _frozen),
]
BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
