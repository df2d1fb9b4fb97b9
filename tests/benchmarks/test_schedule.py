"""A cosine schedule and an average of the weights do what they say, and survive a checkpoint."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from benchmarks.cli import main
from benchmarks.config import ConfigError, compose_run
from benchmarks.progress import RunProgress
from benchmarks.protocol.checkpoint import RunFolder
from benchmarks.protocol.log import RunLog
from benchmarks.protocol.schedule import build_average, build_schedule
from benchmarks.protocol.train import Run, execute
from benchmarks.report.records import MEASURED
from benchmarks.sinks import read_jsonl

QUIET = ["steps=40", "eval_every=1", "log_every=1", "measure_every=0", "energy_every=0", "wandb.mode=disabled"]
QUIET += ["product_cost=3.0", "route=loop"]


def _quadratic(tmp_path, optimizer, *overrides):
    return compose_run("noisy_quadratic", optimizer, [*QUIET, f"out={tmp_path}", *overrides])


def test_the_rate_falls_along_a_cosine_to_zero(tmp_path):
    outcome = execute(_quadratic(tmp_path, "momentum_cosine", "optimizer.lr=0.01"))
    for row in read_jsonl(outcome.folder.log):
        # torch goes from rate to rate by a factor: an error of a few eps a step
        expected = 0.005 * (1 + math.cos(math.pi * row["step"] / 40))
        assert row["lr"] == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_the_average_is_what_a_double_loop_gives(tmp_path):
    """Weights recorded step by step, averaged by hand; the run itself is that of its base."""
    config = _quadratic(tmp_path, "momentum_average", "optimizer.lr=0.01", "optimizer.average=0.8", "batch_size=10")
    run = Run(config, RunFolder(tmp_path / "a"), RunProgress(enabled=False))
    base = Run(_quadratic(tmp_path, "sgd_momentum", "optimizer.lr=0.01"), RunFolder(tmp_path / "b"), run.progress)
    expected = None
    for _ in range(10):
        run._step(run.task.batch(run.order.next()))
        base._step(base.task.batch(base.order.next()))
        now = [p.detach().double().clone() for p in run.model.parameters()]
        assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), base.model.parameters(), strict=True))
        expected = now if expected is None else [0.8 * e + 0.2 * p for e, p in zip(expected, now, strict=True)]
    for p, e in zip(run.average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.double(), e, rtol=1e-13, atol=1e-15)  # float64, ten roundings
    with run._evaluating():
        seen = run._look(last=True)["train_loss"]
    assert seen == pytest.approx(float(run.task.evaluate(run.average.module)["train_loss"]), rel=1e-13)
    assert seen != run.task.evaluate(run.model)["train_loss"]


def test_running_statistics_are_averaged_too():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = build_average(0.5, model)
    for _ in range(3):
        model(torch.randn(8, 2))
        average.update_parameters(model)
    assert not average.module.training and model.training
    assert not torch.equal(average.module[1].running_mean, model[1].running_mean)
    assert torch.isfinite(average.module[1].running_var).all()


@pytest.mark.parametrize("optimizer", ["momentum_cosine", "adamw_average"])
def test_a_checkpoint_in_between_changes_nothing(optimizer, tmp_path):
    whole = execute(_quadratic(tmp_path / "whole", optimizer))
    config = _quadratic(tmp_path / "broken", optimizer)
    folder = RunFolder(tmp_path / "state")
    first = Run(config, folder, RunProgress(enabled=False))
    first.config = dataclasses.replace(config, steps=17)  # stops there, its schedule made for all the steps
    with RunLog(folder.path, first.config, {}, checkpoint_step=None) as log:
        first.train(log)
        first._save(log)
    second = Run(config, folder, RunProgress(enabled=False))
    second.load_state_dict(folder.load())
    with RunLog(folder.path, config, {}, checkpoint_step=17) as log:
        second.train(log)
        second.last_look(log)
    rows = [
        [{k: v for k, v in r.items() if k not in MEASURED} for r in read_jsonl(f.log)] for f in (whole.folder, folder)
    ]
    assert repr(rows[0]) == repr(rows[1])


def test_any_optimizer_takes_them_from_the_command_line(tmp_path):
    given = ["optimizer.schedule=cosine", "optimizer.average=0.9", "optimizer.lr=0.01"]
    record = execute(_quadratic(tmp_path, "scaled_momentum", *given)).record
    assert record["status"] == "done" and record["lr"] == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("optimizer", "override", "text"),
    [
        ("adamw", "optimizer.schedule=cosin", "optimizer.schedule must be one of cosine or left out, got 'cosin'"),
        (
            "adamw",
            "optimizer.average=1.5",
            "optimizer.average is the decay of a moving average, between 0 and 1, got 1.5",
        ),
        ("adamw", "optimizer.average=ema", "optimizer.average: "),
        ("adamw", "optimizer.averge=0.9", "unknown key 'optimizer.averge'"),
    ],
)
def test_mistakes(optimizer, override, text, capsys, tmp_path):
    assert main(["run", "noisy_quadratic", optimizer, override, f"out={tmp_path}", *QUIET]) == 2
    assert text in capsys.readouterr().err


def test_a_schedule_without_a_rate_is_refused():
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="needs a learning rate that scales the updates, and SGD has none"):
        build_schedule("cosine", optimizer, 10, schedulable=False)


def test_the_rivals_are_in_the_controls():
    from benchmarks.protocol.comparison import load_comparison

    rivals = {"momentum_cosine", "adamw_cosine", "momentum_average", "adamw_average"}
    assert rivals <= set(load_comparison("controls").optimizers)
