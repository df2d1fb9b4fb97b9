"""Every task file: its data load, its model is built, trained three steps and judged; second derivatives are there."""

import math

import pytest
import torch

from benchmarks import tasks
from benchmarks.config import available, compose_run
from benchmarks.tasks.base import all_tasks

# So much smaller that three steps and an evaluation take a moment.
SMALL = {
    "classifier_mlp": ["task.train_examples=100", "task.test_examples=50", "task.hidden=[8]"],
    "image_classifier": ["task.train_examples=6", "task.test_examples=4"],
    "autoencoder": ["task.train_examples=40", "task.test_examples=20", "task.hidden=[16,4]"],
    "char_gpt": ["task.train_windows=8", "task.test_windows=4", "task.context=16", "task.width=16"],
    "sentence_transformer": ["task.train_examples=40", "task.width=16", "task.length=12"],
}
BUNDLED = {"classifier_mlp": "digits"}
NEEDS_DATA = {"mnist", "cifar-10", "tinyshakespeare", "sst-2"}


def _names(with_data):
    chosen = []
    for name in available("task"):
        values = compose_run(name, "sgd").task
        if values["task"] != "pinn" and (values.get("dataset") in NEEDS_DATA) is with_data:
            chosen.append(name)
    return chosen


def _three_steps(name):
    kind = compose_run(name, "sgd").task["task"]
    small = SMALL.get(kind, [])
    size = [] if not small else ["batch_size=4", "task.curvature_examples=4"]
    config = compose_run(name, "sgd", [*small, *size])
    task = tasks.build(config.task)
    model = task.model(0)
    assert task.data_source
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    first = None
    for _ in range(3):
        optimizer.zero_grad()
        loss = task.loss(model, task.batch(torch.arange(config.batch_size)))
        loss.backward()
        first = float(loss.detach()) if first is None else first
        optimizer.step()
    assert float(task.loss(model, task.batch(torch.arange(config.batch_size))).detach()) < first
    operator = task.curvature(model, "loop")
    generator = torch.Generator().manual_seed(0)
    params = list(model.parameters())
    v = torch.randn(operator.shape[0], generator=generator, dtype=params[0].dtype)
    product = operator @ v
    assert product.shape == v.shape and bool(torch.isfinite(product).all())
    u = torch.randn(v.shape, generator=generator, dtype=v.dtype)
    # Symmetry, in float32 over networks of depth up to 20: rounding of some 1e-4 of the norms
    error = abs(float(u @ product - v @ (operator @ u)))
    assert error < 1e-3 * float(product.norm()) * float(u.norm())
    model.eval()
    found = task.evaluate(model)
    assert all(math.isfinite(x) for x in found.values()) and found["train_loss"] >= 0
    return task, model, found


@pytest.mark.parametrize("name", _names(with_data=False))
def test_bundled_task(name):
    _three_steps(name)


@pytest.mark.parametrize("name", _names(with_data=True))
def test_task_on_public_data(name, data_root):
    task, _, found = _three_steps(name)
    if "test_accuracy" in found:
        assert 0 <= found["test_accuracy"] <= 1
    assert "rows from folder" in task.data_source


def test_every_task_class_has_a_file():
    used = {compose_run(name, "sgd").task["task"] for name in available("task")}
    assert used == set(all_tasks())


def test_sizes_of_the_networks(data_root):
    """Those that other measurements were made on."""
    for name, size in {"cifar10_5k_cnn_bn": 69_738, "shakespeare_gpt": 112_512, "mnist_autoencoder": 210_520}.items():
        values = compose_run(name, "sgd").task
        task = tasks.build(values | {"train_examples": 500, "test_examples": 8, "train_windows": 32, "test_windows": 4})
        assert sum(p.numel() for p in task.model(0).parameters()) == size


def test_chunked_evaluation_is_the_whole_one(data_root):
    from benchmarks.tasks.metrics import accuracy, mean_loss

    task, model, found = _three_steps("shakespeare_gpt")
    with torch.no_grad():
        outputs = model(task.test[0])
        assert mean_loss(task, model, task.test, chunk=3) == pytest.approx(
            float(torch.nn.functional.cross_entropy(outputs, task.test[1])), rel=1e-5
        )
        assert accuracy(model, task.test, chunk=3) == float((outputs.argmax(1) == task.test[1]).double().mean())


def test_a_gpt_sees_no_future_and_padding_is_not_seen(data_root):
    task, model, _ = _three_steps("shakespeare_gpt")
    ids = task.test[0][:1].clone()
    before = model(ids)[..., :5]
    ids[0, 5:] = 0
    torch.testing.assert_close(model(ids)[..., :5], before)
    task, model, _ = _three_steps("sst2_transformer")
    ids = task.train[0][:1].clone()
    ids[0, 3:] = 0
    model.word.weight.data[0] = 100.0  # whatever stands for padding
    first = model(ids)
    model.word.weight.data[0] = -100.0
    torch.testing.assert_close(model(ids), first)
