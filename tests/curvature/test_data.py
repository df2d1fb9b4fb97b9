"""The batches of one matrix: forms, reading once a generation, shares, errors."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from curvopt._errors import EmptyDataError
from curvopt.curvature import Problem
from curvopt.curvature.data import DataSource, example_count, is_one_batch, map_tensors, place
from tests.problems import mlp


def labelled(n=10):
    return torch.randn(n, 4), torch.randint(0, 3, (n,))


def problem_of(data, loss_fn=None, **settings):
    return Problem(mlp(), nn.CrossEntropyLoss() if loss_fn is None else loss_fn, data, **settings)


@dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor


def test_forms():
    x, y = labelled()
    single = [(x, y), [x, y], {"x": x, "y": y}, x, Record(x, y), ({"a": x}, y), [{"a": x}, y], [x, y, y]]
    assert all(is_one_batch(data) for data in single)
    several = [
        [(x, y)],
        [(x, y), (x, y)],
        [[x, y], [x, y]],
        [{"x": x}],
        [Record(x, y)],
        DataLoader(TensorDataset(x, y)),
    ]
    assert not any(is_one_batch(data) for data in several)
    assert [len(problem_of(d).batches) for d in ((x, y), [(x, y), (x, y)], lambda: (x, y))] == [1, 2, 1]


def test_a_callable_is_called_once_a_generation():
    calls = []

    def draw():
        calls.append(torch.rand(1).item())
        return labelled()

    problem = problem_of(draw)
    assert calls == []
    problem.gradient()
    problem.loss()
    problem.renew(0)
    problem.gradient()
    assert len(calls) == 1
    first = problem.batches[0].raw
    problem.renew(1)
    problem.gradient()
    assert len(calls) == 2
    problem.renew(0)
    assert torch.equal(problem.batches[0].raw[0], first[0])  # the same generation, the same random numbers
    assert calls[2] == calls[0] != calls[1]


class Augmented(Dataset):
    """Draws from three global generators."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        noise = torch.rand(4) + random.random() + np.random.rand()
        return i + noise, i % 3


@pytest.mark.parametrize("own", [False, True])
def test_a_loader_is_read_alike_in_one_generation_and_moves_nothing_global(own):
    generator = torch.Generator().manual_seed(3) if own else None
    loader = DataLoader(Augmented(), batch_size=3, shuffle=True, generator=generator)
    model = mlp()
    states = [torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()]
    own_state = generator.get_state() if own else None

    def content(generation, seed=None):
        problem = Problem(model, nn.CrossEntropyLoss(), loader, seed=seed)
        problem.renew(generation)
        return torch.cat([b.raw[0] for b in problem.batches])

    first = content(4)
    torch.rand(7)
    again = content(4)
    assert torch.equal(first, again)
    assert not torch.equal(first, content(5))
    assert not torch.equal(first, content(4, seed=9))
    torch.set_rng_state(states[0])
    content(6)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    if own:
        assert torch.equal(generator.get_state(), own_state)


def test_reading_a_loader_with_persistent_workers_leaves_a_running_loop_alone():
    loader = DataLoader(TensorDataset(torch.arange(6.0)), batch_size=2, num_workers=1, persistent_workers=True)
    seen = []
    for number, (x,) in enumerate(loader):
        seen += x.tolist()
        if number == 0:
            assert len(DataSource(loader).read(0, torch.device("cpu"))) == 3
    assert seen == [0, 1, 2, 3, 4, 5]


def test_fixed_data_survive_a_renewal_without_being_read_again():
    problem = problem_of([labelled(), labelled()])
    before = problem.batches
    problem.renew(1)
    assert problem.batches is before


def test_empty_data():
    with pytest.raises(EmptyDataError, match="data is an empty list"):
        problem_of([])
    loader = DataLoader(TensorDataset(torch.zeros(2, 4)), batch_size=5, drop_last=True)
    with pytest.raises(EmptyDataError, match=r"data \(DataLoader\) gave no batch; give one \(inputs, targets\) pair"):
        problem_of(loader).loss()
    with pytest.raises(EmptyDataError, match="data: batch 0 holds no example"):
        problem_of((torch.zeros(0, 4), torch.zeros(0).long())).loss()
    with pytest.raises(EmptyDataError, match="data weighs nothing: every target is ignored"):
        problem_of((torch.zeros(2, 4), torch.full((2,), -100))).loss()


def test_data_of_a_wrong_kind():
    with pytest.raises(TypeError, match="data is a bare TensorDataset, which yields single examples: use a DataLoader"):
        problem_of(TensorDataset(*labelled()))
    with pytest.raises(TypeError, match="data is an iterator"):
        problem_of(iter([labelled()]))
    with pytest.raises(TypeError, match="data is None"):
        problem_of(None)
    with pytest.raises(TypeError, match="data gave None as batch 0"):
        problem_of([None]).loss()


WEIGHTS = torch.tensor([0.3, 1.0, 2.0])


def soft(n):
    return torch.softmax(torch.randn(n, 3), dim=1)


def some_ignored(n):
    return torch.where(torch.rand(n) < 0.4, -100, torch.randint(0, 3, (n,)))


class Named(nn.CrossEntropyLoss):
    """A user's subclass that reduces as its parent does."""


class Penalised(nn.CrossEntropyLoss):
    """One that does not: a mean over examples, whatever is ignored."""

    def forward(self, outputs, targets):
        return super().forward(outputs, targets.clamp_min(0)) + outputs.square().mean()


LOSSES = {
    "subclass": (Named(WEIGHTS), some_ignored),
    "own forward": (Penalised(), some_ignored),
    "cross-entropy": (nn.CrossEntropyLoss(), lambda n: torch.randint(0, 3, (n,))),
    "ignored": (nn.CrossEntropyLoss(), some_ignored),
    "ignored-0": (nn.CrossEntropyLoss(ignore_index=0), lambda n: torch.randint(0, 3, (n,))),
    "weights": (nn.CrossEntropyLoss(WEIGHTS), lambda n: torch.randint(0, 3, (n,))),
    "weights-ignored-smoothing": (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2), some_ignored),
    "soft": (nn.CrossEntropyLoss(), soft),
    "soft-weights": (nn.CrossEntropyLoss(WEIGHTS), soft),
    "soft-weights-smoothing": (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2), soft),
    "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), some_ignored),
    "nll": (nn.NLLLoss(WEIGHTS), lambda n: torch.randint(0, 3, (n,))),
    "mse": (nn.MSELoss(), lambda n: torch.randn(n, 3)),
    "l1": (F.l1_loss, lambda n: torch.randn(n, 3)),
    "smooth-l1": (nn.SmoothL1Loss(), lambda n: torch.randn(n, 3)),
    "huber": (nn.HuberLoss(), lambda n: torch.randn(n, 3)),
    "bce": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), lambda n: torch.rand(n, 3)),
    "poisson": (nn.PoissonNLLLoss(), lambda n: torch.rand(n, 3)),
    "batchmean": (nn.KLDivLoss(reduction="batchmean"), soft),
    "kl": (nn.KLDivLoss(), soft),
    "multilabel": (nn.MultiLabelSoftMarginLoss(), lambda n: torch.randint(0, 2, (n, 3)).float()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_shares_make_streamed_losses_equal_the_concatenated_one(name):
    loss_fn, targets = LOSSES[name]
    x, y = torch.randn(11, 4), targets(11)
    parts = [(x[:5], y[:5]), (x[5:10], y[5:10]), (x[10:], y[10:])]
    model = mlp()
    whole = Problem(model, loss_fn, (x, y))
    streamed = Problem(model, loss_fn, parts)
    # float32 sums of eleven terms
    assert torch.allclose(streamed.loss(), whole.loss(), rtol=1e-5)
    assert torch.allclose(streamed.gradient(), whole.gradient(), rtol=1e-4, atol=1e-6)
    assert abs(sum(b.share for b in streamed.batches) - 1) < 1e-12


def test_positions_of_sequences_count():
    model = nn.Embedding(5, 5)
    x, y = torch.randint(0, 5, (6, 3)), torch.randint(0, 5, (6, 3))
    y[:4, 1:] = -100

    def flat(m, batch):
        return m(batch[0]).transpose(1, 2)

    whole = Problem(model, nn.CrossEntropyLoss(), (x, y), forward=flat)
    streamed = Problem(model, nn.CrossEntropyLoss(), [(x[:4], y[:4]), (x[4:], y[4:])], forward=flat)
    assert torch.allclose(streamed.loss(), whole.loss(), rtol=1e-5)


def test_a_batch_that_weighs_nothing_is_left_out():
    x, y = labelled()
    y[:5] = -100
    problem = problem_of([(x[:5], y[:5]), (x[5:], y[5:])])
    assert len(problem.batches) == 1
    assert torch.isfinite(problem.loss())


def test_nests_of_tensors():
    @dataclass
    class Item:
        x: torch.Tensor
        name: str

    nest = {"a": [torch.ones(2), (torch.zeros(3), "text")], "b": Item(torch.ones(1), "n")}
    doubled = map_tensors(nest, lambda t: t + 1)
    assert doubled["a"][0].tolist() == [2, 2]
    assert doubled["a"][1][1] == "text"
    assert doubled["b"].x.tolist() == [2]
    assert nest["b"].x.tolist() == [1]
    assert example_count(nest) == 2
    assert place(nest, torch.device("cpu")) is nest
    moved = place(nest, torch.device("meta"))
    assert moved["b"].x.device.type == "meta"
    assert nest["b"].x.device.type == "cpu"
