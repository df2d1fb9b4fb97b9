"""Problems and runs for the contract that every entry of the zoo must keep."""

import math

import torch
from torch import nn

from curvopt import zoo
from curvopt.curvature import Hessian

# What an entry cannot work without, or what makes it work on problems as small as these.
ARGUMENTS = {
    "interpolated-sgd": {"dominant": 0.5, "bulk": 1.0},
    "nncg": {"max_iter": 3, "rank": 10, "cg_iterations": 20},  # for speed
    "pytorch-optimizer/ranger21": {"num_iterations": 200},
    "pytorch-optimizer/spectralsphere": {"solver_max_iterations": 5},  # for speed
    "pytorch-optimizer/sara": {"threshold": 10.0},  # its default trains almost none of freshly initialised weights
}


class Problem:
    """A model, a loss and one batch; the same for the same seed."""

    def __init__(self, kind: str, seed: int = 0):
        torch.manual_seed(seed)
        self.loss = nn.CrossEntropyLoss()
        if kind == "mlp":
            self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
            self.x, self.y = torch.randn(40, 4), torch.randint(0, 3, (40,))
        elif kind == "conv":
            self.model = nn.Sequential(
                nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
            )
            self.x, self.y = torch.randn(24, 1, 6, 6), torch.randint(0, 3, (24,))
        elif kind == "regression":  # features of unequal size: condition number 100
            self.model, self.loss = nn.Linear(12, 2), nn.MSELoss()
            self.x = torch.randn(40, 12) * torch.logspace(0.5, -0.5, 12)
            self.y = self.x @ torch.randn(12, 2)
        else:
            assert kind == "wide"  # matrices in which numbers kept once a row hardly count
            self.model = nn.Sequential(nn.Linear(60, 80), nn.ReLU(), nn.Linear(80, 70))
            self.x, self.y = torch.randn(20, 60), torch.randint(0, 70, (20,))

    def value(self):
        with torch.no_grad():
            return float(self.loss(self.model(self.x), self.y))

    def residuals(self):
        """A vector whose mean square is the loss, one number an example where the loss is a cross-entropy."""
        outputs = self.model(self.x)
        if isinstance(self.loss, nn.CrossEntropyLoss):
            return nn.functional.cross_entropy(outputs, self.y, reduction="none").sqrt()
        if isinstance(self.loss, nn.MSELoss):
            return outputs - self.y
        return 0 * outputs  # a loss without any slope

    def parameters(self, entry):
        return [p for p in self.model.parameters() if p.dim() == 2 or not entry.matrices_only]


def settings(entry):
    """Values of the first argument of the search space: its middle first, then by half decades to either side."""
    key, search = next(iter(entry.search.items()))
    if isinstance(search, zoo.Choice):
        return key, list(search.values)
    middle = math.sqrt(search.low * search.high) if search.log else (search.low + search.high) / 2
    reach = int(2 * math.log10(search.high / middle) + 1e-9)
    powers = sorted(range(-reach, reach + 1), key=lambda k: (k % 2, abs(k), -k))  # whole decades first
    return key, [middle * 10.0 ** (k / 2) for k in powers]


def make(name, problem, params=None, **kw):
    """The optimizer with the middle of its first search range, or with ``kw``; curvature is over what it holds."""
    entry = zoo.describe(name)
    key, values = settings(entry)
    kw = {key: values[0], **ARGUMENTS.get(name.partition("+")[2] or name, {}), **kw}
    params = problem.parameters(entry) if params is None else params
    if entry.needs_curvature:
        held = [p for g in params for p in (g["params"] if isinstance(g, dict) else [g])]
        data = (problem.x, problem.y)
        kw |= {"curvature": Hessian(problem.model, problem.loss, data, params=held), "refresh_every": 5}
        kw |= {"rank": 2} if "rank" in entry.defaults else {}
    return zoo.create(name, params, **kw), entry


def train(optimizer, entry, problem, steps):
    """Full-batch steps as the entry wants them done; the loss afterwards."""

    def closure():
        if entry.needs_residuals:
            return problem.residuals()
        optimizer.zero_grad()
        value = problem.loss(problem.model(problem.x), problem.y)
        value.backward(create_graph=entry.needs_create_graph)
        return value

    if entry.needs_train_mode:
        optimizer.train()
    for _ in range(steps):
        if entry.needs_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if entry.needs_train_mode:
        optimizer.eval()
    return problem.value()


def step_with(optimizer, entry, params, gradients):
    """One step with gradients given by hand (None leaves a parameter without one)."""

    def closure():
        for p, g in zip(params, gradients, strict=True):
            p.grad = None if g is None else g.clone()
        return torch.tensor(1.0)

    if entry.needs_train_mode:
        optimizer.train()
    if entry.needs_closure:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def numbers(value):
    """Numbers in the tensors of a state, however nested; single numbers (step counters) not counted."""
    if torch.is_tensor(value):
        return value.numel() if value.dim() else 0
    if isinstance(value, dict):
        return sum(map(numbers, value.values()))
    return sum(map(numbers, value)) if hasattr(value, "__iter__") and not isinstance(value, str) else 0
