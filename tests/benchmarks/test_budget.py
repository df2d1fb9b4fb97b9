"""Runs that end at a budget or at targets, that another optimizer begins, and that are given residuals."""

import math

import pytest
import torch

from benchmarks import tasks
from benchmarks.config import ConfigError, compose_run, config_hash, run_directory
from benchmarks.protocol.checkpoint import RunFolder
from benchmarks.protocol.train import execute
from benchmarks.report.records import MEASURED
from benchmarks.sinks import read_jsonl
from benchmarks.tasks.pinn import Pinn
from curvopt import zoo

TINY = ["task.hidden=[6]", "task.interior_points=30", "task.initial_points=6", "task.boundary_points=4"]
TINY += ["batch_size=40", "task.curvature_examples=10", "task.grid=9", "measure_every=0", "wandb.mode=disabled"]
COMMON = [*TINY, "eval_every=0", "eval_gradients=10", "log_every=3", "checkpoint_every=4", "jacobian_cost=20.0"]


def _config(optimizer, folder, *extra):
    return compose_run("pinn_convection", optimizer, [*COMMON, *extra, f"out={folder}"])


def _numbers(folder):
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in read_jsonl(folder.log)]


class Killed(BaseException):
    """Stands for a kill: nothing in the harness catches it."""


def _interrupted(config, monkeypatch, at_call):
    """Run until the task is asked for its residuals or its loss for the ``at_call``-th time; what is on disk then stays."""
    calls = 0

    def counted(function):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == at_call:
                raise Killed
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Pinn, "loss", counted(Pinn.loss))
        patch.setattr(Pinn, "residuals", counted(Pinn.residuals))
        with pytest.raises(Killed):
            execute(config)


def _same(whole, again):
    expected, got = _numbers(whole.folder), _numbers(again.folder)
    assert [repr(r) for r in got] == [repr(r) for r in expected]
    left, right = whole.folder.load()["model"], again.folder.load()["model"]
    assert all(torch.equal(left[name], right[name]) for name in left)


# ---- residuals
@pytest.mark.parametrize("equation", ["convection", "reaction", "wave", "burgers", "poisson"])
def test_the_mean_square_of_the_residuals_is_the_loss(equation):
    task = tasks.build(compose_run(f"pinn_{equation}", "lbfgs", TINY[:4] + ["task.curvature_examples=10"]).task)
    model = task.model(0)
    index = torch.randperm(task.examples, generator=torch.Generator().manual_seed(0))
    blocks = task.residuals(model, task.batch(index))
    found = torch.cat(blocks)
    assert len(found) == task.examples and max(map(len, blocks)) <= 16
    # sums of forty squares in another order
    assert found.square().mean().item() == pytest.approx(task.loss(model, task.train).item(), rel=1e-12)


def test_levenberg_marquardt_is_given_residuals_and_every_jacobian_is_counted(tmp_path):
    outcome = execute(_config("levenberg_marquardt", tmp_path, "steps=8"))
    rows = read_jsonl(outcome.folder.log)
    assert outcome.status == "done" and rows[-1]["train_loss"] < 0.3 * rows[0]["train_loss"]
    # one Jacobian a step, 20 gradients each as pinned, and a forward pass counted as a gradient
    assert outcome.record["gradient_equivalents"] == outcome.record["gradients"] + 8 * 20.0
    assert outcome.record["gradients"] >= 16 and outcome.record["iterations"] == 8


def test_a_task_without_residuals_says_so(tmp_path):
    config = compose_run("noisy_quadratic", "levenberg_marquardt", ["steps=3", f"out={tmp_path}"])
    with pytest.raises(ConfigError, match="gives no residuals, which Levenberg-Marquardt"):
        execute(config)


def test_the_cost_of_a_jacobian_is_measured_once_and_pinned(tmp_path):
    config = _config("levenberg_marquardt", tmp_path, "steps=2", "jacobian_cost=null")
    outcome = execute(config)
    cost = RunFolder(outcome.folder.path).once(dict)["jacobian_cost"]
    spent = outcome.record["gradient_equivalents"] - outcome.record["gradients"]
    assert cost > 0 and spent == pytest.approx(2 * cost, rel=1e-6)
    assert config_hash(config) == config_hash(_config("levenberg_marquardt", tmp_path, "steps=2"))


# ---- the budget
def test_gradients_end_a_run_at_the_same_step_always(tmp_path):
    outcome = execute(_config("adam", tmp_path, "steps=500", "max_gradients=37"))
    assert outcome.record["ended"] == "max_gradients" and outcome.record["step"] == 37
    # looked at after every ten gradients, and at the end
    looked = [r["step"] for r in read_jsonl(outcome.folder.log) if "train_loss" in r]
    assert looked == [0, 10, 20, 30, 37]


def test_curvature_counts_in_the_budget(tmp_path):
    outcome = execute(_config("subspace_lbfgs", tmp_path, "steps=500", "max_gradients=150", "optimizer.rank=3"))
    record = outcome.record
    assert record["ended"] == "max_gradients" and record["refreshes"] >= 1
    share = 40 / 20  # 10 points inside and 10 on the border of 40
    calls = share * (record["gradient_equivalents"] - record["gradients"])
    # one call a product and one or two more a refresh
    assert record["products"] < calls <= record["products"] + 2 * record["refreshes"]
    assert record["gradient_equivalents"] >= 150


def test_seconds_end_a_run(tmp_path):
    outcome = execute(_config("adam", tmp_path, "steps=100000", "max_seconds=0.05"))
    assert outcome.record["ended"] == "max_seconds" and outcome.record["seconds"] >= 0.05
    assert 0 < outcome.record["step"] < 100000


def test_targets_end_a_run_when_all_are_reached(tmp_path):
    common = ["steps=400", "optimizer.lr=0.02"]
    free = execute(_config("adam", tmp_path / "free", *common))
    rows = [r for r in read_jsonl(free.folder.log) if "train_loss" in r]
    assert free.record["ended"] == "steps"
    goal, error = rows[8]["train_loss"], max(r["solution_error"] for r in rows)
    first = next(r["step"] for r in rows if r["train_loss"] <= goal)
    stopped = execute(_config("adam", tmp_path, *common, f"stop_at={{train_loss:{goal!r},solution_error:{error!r}}}"))
    assert stopped.record["ended"] == "stop_at" and stopped.record["step"] == first
    never = execute(_config("adam", tmp_path, *common, f"stop_at={{train_loss:{goal!r},solution_error:0}}"))
    assert never.record["ended"] == "steps"


def test_a_budget_out_of_range_is_refused():
    for text, words in (
        ("max_seconds=0", "max_seconds must be above 0"),
        ("max_gradients=-1", "max_gradients must be above 0"),
        ("eval_gradients=-1", "eval_gradients must not be negative"),
    ):
        with pytest.raises(ConfigError, match=words):
            compose_run("pinn_convection", "adam", [text])


def test_runs_from_before_budgets_keep_their_folders():
    plain = compose_run("pinn_convection", "adam")
    assert config_hash(compose_run("pinn_convection", "adam", ["max_seconds=null", "eval_gradients=0"])) == config_hash(
        plain
    )
    assert config_hash(compose_run("pinn_convection", "adam", ["max_gradients=10"])) != config_hash(plain)


# ---- a first optimizer
WARM = ["optimizer.warmup.steps=6", "optimizer.warmup.lr=0.02", "optimizer.rank=3", "optimizer.refresh_at=[2,7]"]


def test_the_first_optimizer_hands_its_weights_over(tmp_path):
    config = _config("adam_subspace_lbfgs", tmp_path, "steps=8", *WARM, "optimizer.max_iter=5")
    outcome = execute(config)
    task = tasks.build(config.task)
    model = task.model(0)
    order = torch.Generator().manual_seed(1)  # the data order of seed 0

    def closure():
        model.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        return loss

    def curvature():
        model.zero_grad()
        loss = task.loss(model, task.curvature_batch())
        loss.backward()
        return loss

    first = torch.optim.Adam(model.parameters(), lr=0.02)
    then = zoo.create(
        "subspace-lbfgs", model.parameters(), rank=3, refresh_at=(2, 7), max_iter=5, curvature_closure=curvature
    )
    for step in range(8):
        batch = task.batch(torch.randperm(40, generator=order))
        if step < 6:
            closure()
            first.step()
        else:
            then.step(closure)
    kept = outcome.folder.load()["model"]
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    # Adam's six gradients, and the closure's calls without those for curvature
    calls = then.stats()["closure_calls"] - then.stats()["curvature_calls"]
    assert outcome.record["gradients"] == 6 + calls


def test_no_steps_of_a_first_optimizer_are_none_at_all(tmp_path):
    plain = execute(_config("subspace_lbfgs", tmp_path, "steps=2", "optimizer.rank=3"))
    none = execute(_config("adam_subspace_lbfgs", tmp_path, "steps=2", "optimizer.rank=3", "optimizer.warmup.steps=0"))
    left, right = plain.folder.load()["model"], none.folder.load()["model"]
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("optimizer.warmup=adam", "must hold zoo and steps"),
        ("optimizer.warmup={zoo:adam,steps:-1}", "steps must be a whole number of at least 0"),
        ("optimizer.warmup={zoo:adamm,steps:5}", "optimizer.warmup.zoo: unknown optimizer 'adamm'"),
        ("optimizer.warmup.rate=0.1", "unknown key 'optimizer.warmup.rate'"),
        ("optimizer.warmup={zoo:lbfgs,steps:5}", "need nothing but gradients, as adam does; lbfgs needs more"),
        ("optimizer.schedule=cosine", "goes with neither schedule nor average"),
    ],
)
def test_a_first_optimizer_that_will_not_do_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        compose_run("pinn_convection", "adam_lbfgs", [given])


def test_a_method_that_must_see_the_first_weights_takes_none_before_it():
    with pytest.raises(ConfigError, match=r"takes no optimizer\.warmup"):
        compose_run("pinn_convection", "schedule_free_adamw", ["optimizer.warmup={zoo:adam,steps:5}"])


# ---- kills
@pytest.mark.parametrize(
    ("optimizer", "extra", "at_calls"),
    [
        ("levenberg_marquardt", ["steps=11"], (22, 4)),
        # within the first optimizer's steps, and after them, the basis there
        ("adam_subspace_lbfgs", ["steps=13", *WARM, "optimizer.max_iter=3", "max_gradients=60"], (9, 40)),
        ("ssbroyden", ["steps=11", "optimizer.warmup.steps=3", "optimizer.max_iter=2"], (30,)),
        ("nncg", ["steps=9", "optimizer.warmup.steps=3", "optimizer.rank=4", "optimizer.cg_iterations=5"], (60,)),
    ],
)
def test_a_killed_run_continues_bit_for_bit(optimizer, extra, at_calls, tmp_path, monkeypatch):
    whole = execute(_config(optimizer, tmp_path / "whole", *extra))
    config = _config(optimizer, tmp_path / "broken", *extra)
    for at in at_calls:
        _interrupted(config, monkeypatch, at)
    again = execute(config)
    assert again.resumed
    _same(whole, again)
    assert again.record["ended"] == whole.record["ended"]


def test_a_run_killed_between_its_weights_and_its_result_ends_with_the_same(tmp_path):
    config = _config("ssbroyden", tmp_path, "steps=200", "max_gradients=60")
    first = execute(config)
    before = _numbers(first.folder)
    kept = first.folder.load()
    assert "optimizer" not in kept and kept["ended"] == "max_gradients"  # not P x P numbers a run
    first.folder.done.unlink()
    first.folder.result.unlink()
    second = execute(config)
    assert second.record["ended"] == "max_gradients" and second.record["step"] == first.record["step"]
    assert second.record["train_loss"] == first.record["train_loss"]
    assert [r["step"] for r in _numbers(second.folder)] == [r["step"] for r in before]


def test_products_of_newton_cg_are_counted_as_the_gradients_they_are(tmp_path):
    extra = ["steps=3", "optimizer.warmup.steps=0", "optimizer.rank=4", "optimizer.cg_iterations=5"]
    outcome = execute(_config("nncg", tmp_path, *extra))
    record = outcome.record
    # two calls of the closure a product; the others evaluate points
    assert record["products"] >= 4 and record["gradients"] > 2 * record["products"]
    assert record["gradient_equivalents"] == record["gradients"] and math.isfinite(record["train_loss"])
    assert run_directory(_config("nncg", tmp_path, *extra)) == outcome.folder.path


def test_resampled_points_are_new_each_step_and_the_same_for_all(tmp_path, monkeypatch):
    given = [*COMMON, "steps=11", f"out={tmp_path}", "task.resample=true", "optimizer.max_iter=3", "optimizer.rank=3"]
    config = compose_run("pinn_convection", "subspace_lbfgs", given)
    task = tasks.build(config.task)
    one, two = torch.randperm(40, generator=torch.Generator().manual_seed(1)), torch.arange(40)
    first, again, other = task.batch(one)[0], task.batch(one)[0], task.batch(two)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    # as many of each kind, with the same weights, and none of the fixed points inside
    assert torch.equal(first[:, 2:], task.train[0][:, 2:]) and not torch.equal(first[:, :2], task.train[0][:, :2])
    with pytest.raises(ConfigError, match=r"task\.resample needs the full batch, batch_size=40, got 7"):
        task.batch(two[:7])
    whole = execute(compose_run("pinn_convection", "subspace_lbfgs", [*given, f"out={tmp_path / 'whole'}"]))
    _interrupted(config, monkeypatch, 50)
    _same(whole, execute(config))


def test_exact_products_in_the_place_of_differences(tmp_path):
    extra = ["steps=3", "optimizer.rank=3", "optimizer.control=exact", "product_cost=5.0", "route=loop"]
    record = execute(_config("subspace_lbfgs", tmp_path, *extra)).record
    assert record["refreshes"] >= 1 and record["products"] >= 9
    assert record["gradient_equivalents"] == record["gradients"] + 5.0 * record["products"]
