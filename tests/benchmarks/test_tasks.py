"""Tasks: data, initial weights, data order, losses."""

import dataclasses
import re

import pytest
import torch

from benchmarks import tasks
from benchmarks.config import ConfigError, compose_run
from benchmarks.protocol.order import DataOrder
from benchmarks.tasks.base import register
from benchmarks.tasks.classifier_mlp import ClassifierMLP, HalfSquaredError


@pytest.fixture(scope="module")
def digits():
    return tasks.build(compose_run("digits_mlp", "sgd").task)


def test_digits_mlp(digits):
    inputs, targets = digits.train
    assert inputs.shape == (1437, 64) and targets.shape == (1437,) and digits.examples == 1437
    assert digits.test[0].shape == (360, 64)
    assert "bundled with scikit-learn" in digits.data_source
    model = digits.model(0)
    assert [tuple(p.shape) for p in model.parameters()] == [(64, 64), (64,), (64, 64), (64,), (10, 64), (10,)]
    found = digits.evaluate(model)
    assert set(found) == {"train_loss", "test_loss", "test_accuracy"}
    by_hand = torch.nn.functional.cross_entropy(model(inputs), targets)
    assert found["train_loss"] == pytest.approx(float(by_hand.detach()), rel=1e-6)
    assert found["test_accuracy"] == float((model(digits.test[0]).argmax(1) == digits.test[1]).double().mean())


def test_mnist5k_mlp_is_the_papers_problem(data_root):
    task = tasks.build(compose_run("mnist5k_mlp", "sgd").task)
    inputs, targets = task.train
    assert inputs.shape == (5000, 784) and task.test[0].shape == (10000, 784)
    assert targets[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # the first labels of MNIST's training file
    # (x/255 - .1307)/.3081: a black pixel, of which the first image's corner is one
    assert float(inputs[0, 0]) == pytest.approx(-0.1307 / 0.3081, rel=1e-6)
    assert sum(p.numel() for p in task.model(0).parameters()) == 199_210
    assert torch.equal(task.curvature_batch()[0], inputs[:1000])


def test_weights_depend_on_the_seed_alone(digits):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = [p.clone() for p in digits.model(3).parameters()]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    second = list(digits.model(3).parameters())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], next(digits.model(4).parameters()))


def test_squared_error_variant():
    task = tasks.build(compose_run("digits_mlp", "sgd", ["task.loss=mse"]).task)
    outputs = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    targets = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    # half the sum of squares: (1 + 1)/2 and (1 + 1)/2, averaged
    assert float(HalfSquaredError()(outputs, targets)) == 1.0
    assert task.train[1].shape == (1437, 10) and set(task.train[1].unique().tolist()) == {0.0, 1.0}
    assert 0 <= task.evaluate(task.model(0))["test_accuracy"] <= 1


def test_curvature_is_the_hessian_on_the_fixed_batch(digits):
    model = digits.model(0)
    operator = digits.curvature(model)
    assert operator.shape == (8970, 8970)
    vector = torch.randn(8970, generator=torch.Generator().manual_seed(0))
    params = list(model.parameters())
    inputs, targets = digits.train[0][:500], digits.train[1][:500]
    gradient = torch.autograd.grad(torch.nn.functional.cross_entropy(model(inputs), targets), params, create_graph=True)
    product = torch.autograd.grad(torch.cat([g.flatten() for g in gradient]) @ vector, params)
    exact = torch.cat([p.flatten() for p in product])
    # The same formula in float32, summed in another order: some hundred eps.
    assert float((operator @ vector - exact).norm() / exact.norm()) < 1e-5


def test_order_covers_every_epoch_and_depends_on_the_seed_alone():
    order, twin = DataOrder(10, 3, seed=1), DataOrder(10, 3, seed=1)
    epochs = [[order.next() for _ in range(3)] for _ in range(4)]
    for epoch in epochs:
        seen = torch.cat(epoch)
        assert len(seen.unique()) == 9  # three whole batches; the tenth example waits for another epoch
    assert all(torch.equal(b, twin.next()) for epoch in epochs for b in epoch)
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))


@pytest.mark.parametrize("taken", range(8))
def test_order_resumes_anywhere(taken):
    order = DataOrder(10, 3, seed=1)
    for _ in range(taken):
        order.next()
    state = order.state_dict()
    rest = [order.next() for _ in range(7)]
    other = DataOrder(10, 3, seed=7)
    other.load_state_dict(state)
    assert all(torch.equal(a, other.next()) for a in rest)


def test_bad_settings_are_named(digits):
    with pytest.raises(ValueError, match="batch_size must lie between 1 and the 10 training examples, got 11"):
        DataOrder(10, 11, seed=0)
    with pytest.raises(ConfigError, match="task.loss must be 'cross_entropy' or 'mse', got 'hinge'"):
        tasks.build(compose_run("digits_mlp", "sgd", ["task.loss=hinge"]).task)
    with pytest.raises(ConfigError, match="unknown task class 'gpt': known are autoencoder, char_gpt, classifier_mlp"):
        tasks.build({"task": "gpt"})


def test_a_name_is_given_once():
    other = dataclasses.make_dataclass("Other", [])
    with pytest.raises(ValueError, match=re.escape("already a task named 'classifier_mlp'")):
        register("classifier_mlp")(other)
    assert tasks.all_tasks()["classifier_mlp"] is ClassifierMLP
