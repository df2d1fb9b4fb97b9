"""A run: what its record holds, that its figures are right, and how it ends."""

import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import tasks
from benchmarks.config import ConfigError, compose_run, load_run, repeat_run
from benchmarks.progress import RunProgress
from benchmarks.protocol.measure import CurvatureMeter, measure_costs
from benchmarks.protocol.suite import load_suite, perform, plan
from benchmarks.protocol.train import Run, execute
from benchmarks.report.records import MEASURED, load_record
from benchmarks.sinks import read_jsonl
from benchmarks.sinks.jsonl import read_run as read_jsonl_run
from benchmarks.sinks.wandb_reader import read_run
from benchmarks.tasks.classifier_mlp import ClassifierMLP

SMALL = [
    "steps=20",
    "log_every=5",
    "eval_every=10",
    "measure_every=10",
    "energy_every=0",
    "wandb.mode=disabled",
    "product_cost=5.0",
    "route=loop",
    "task.rank=3",
    "task.curvature_examples=60",
    "task.hidden=[10]",
]


def _config(optimizer, folder, *extra):
    return compose_run("digits_mlp", optimizer, [*SMALL, f"out={folder}", *extra])


def test_the_record_of_plain_sgd_against_a_loop_by_hand(tmp_path):
    outcome = execute(_config("sgd", tmp_path, "measure_every=0", "optimizer.lr=0.1"))
    records = {r["step"]: r for r in read_jsonl(outcome.folder.log)}
    assert sorted(records) == [0, 5, 10, 15, 20]

    config = _config("sgd", tmp_path / "by_hand", "optimizer.lr=0.1")
    task = tasks.build(config.task)
    model = task.model(0)
    inputs, targets = task.train
    order = torch.Generator().manual_seed(1)  # seed 0 of the run, see DataOrder
    permutation = torch.randperm(1437, generator=order)
    losses = []
    for step in range(20):
        if step in (0, 10):
            whole = torch.nn.functional.cross_entropy(model(inputs), targets).item()
            assert records[step]["train_loss"] == pytest.approx(whole, rel=1e-6)
        index = permutation[50 * step : 50 * step + 50]
        loss = torch.nn.functional.cross_entropy(model(inputs[index]), targets[index])
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        losses.append(loss.item())
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradient, strict=True):
                p -= 0.1 * g
    for step in (5, 10, 15, 20):
        assert records[step]["batch_loss"] == pytest.approx(sum(losses[step - 5 : step]) / 5, rel=1e-5)
        assert records[step]["gradients"] == step and records[step]["products"] == 0
        assert records[step]["gradient_equivalents"] == step
        assert records[step]["lr"] == 0.1 and records[step]["edge"] == pytest.approx(20.0)
    assert outcome.record["train_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(model(inputs), targets).item(), rel=1e-5
    )


def test_eigenvalues_and_shares_against_a_dense_hessian(tmp_path):
    config = _config("sgd", tmp_path, "task.curvature_examples=40", "task.hidden=[2]", "task.rank=4")
    run = _fresh_run(config)
    meter = CurvatureMeter(run.task, run.model, 4)
    found = meter.update()
    model = copy.deepcopy(run.model).double()
    params = list(model.parameters())
    inputs, targets = run.task.curvature_batch()
    loss = torch.nn.functional.cross_entropy(model(inputs.double()), targets)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, create_graph=True)])
    rows = [torch.cat([r.flatten() for r in torch.autograd.grad(g, params, retain_graph=True)]) for g in gradient]
    values, vectors = torch.linalg.eigh(torch.stack(rows))
    # A Ritz value is off by its squared residual over the gap, at most by the residual itself: 1e-2 lambda_1.
    for i in range(4):
        assert found[f"lambda/{i + 1}"] == pytest.approx(float(values[-1 - i]), abs=1e-2 * float(values[-1]))
    top = vectors[:, -1].float()
    pieces = [t.view_as(p) for t, p in zip(top.split([p.numel() for p in params]), params, strict=True)]
    assert meter.share(pieces) == pytest.approx(1.0, abs=1e-2)
    bottom = vectors[:, 0].float()
    pieces = [t.view_as(p) for t, p in zip(bottom.split([p.numel() for p in params]), params, strict=True)]
    assert meter.share(pieces) < 0.05
    assert math.isnan(meter.share([torch.zeros_like(p) for p in params]))


def _fresh_run(config):
    from benchmarks.config import run_directory
    from benchmarks.protocol.checkpoint import RunFolder

    return Run(config, RunFolder(run_directory(config)), RunProgress(enabled=False))


def test_the_shares_of_bulk_and_dom_sgd(tmp_path):
    """Right after a refresh the bulk's update holds nothing of the subspace, the dominant one's nothing else."""
    settings = ["optimizer.rank=3", "optimizer.refresh_every=10", "optimizer.tol=0.001", "optimizer.max_matvecs=90"]
    bulk = execute(_config("bulk_sgd", tmp_path, *settings))
    dom = execute(_config("dom_sgd", tmp_path, *settings, "optimizer.start=0"))
    for outcome, expected in ((bulk, 0.0), (dom, 1.0)):
        records = {r["step"]: r for r in read_jsonl(outcome.folder.log)}
        for step in (0, 10):
            # No gap, and the first ten steps leave less than half of the basis standing. A thousandth of the span may be
            # missing, of three directions an energy of .003, so that a share of sqrt(.003) is nothing wrong.
            assert records[step]["chi_update"] == pytest.approx(expected, abs=0.055)
            assert records[step]["basis_age"] == 0 or step == 10
        assert records[20]["products"] > 0 and records[20]["refreshes"] == 2
        spent = records[20]["products"]
        assert records[20]["gradient_equivalents"] == 20 + 5.0 * spent


def test_seconds_are_split(tmp_path):
    outcome = execute(_config("bulk_sgd", tmp_path, "optimizer.rank=3", "optimizer.refresh_every=10"))
    r = outcome.record
    assert r["seconds"] == pytest.approx(r["seconds_base"] + r["seconds_refresh"] + r["seconds_projection"])
    assert 0 < r["seconds_products"] < r["seconds_refresh"] and r["seconds_projection"] > 0 and r["seconds_measure"] > 0


def test_measuring_changes_nothing(tmp_path):
    plain = execute(_config("adamw", tmp_path, "measure_every=0", "log_every=1"))
    watched = execute(_config("adamw", tmp_path, "measure_every=1", "energy_every=10", "log_every=1"))
    left, right = read_jsonl(plain.folder.log), read_jsonl(watched.folder.log)
    for a, b in zip(left, right, strict=True):
        assert {k: v for k, v in a.items() if k not in MEASURED}.items() <= b.items()
    last = right[-1]
    for matrix in ("hessian", "ggn", "functional"):
        assert last[f"energy/{matrix}_frobenius_error"] >= 0
    assert 0 < last["energy/ggn_trace"] < 1 and 0 < last["energy/ggn_frobenius"] < 1


def test_measuring_leaves_running_statistics_and_random_numbers_alone(tmp_path, monkeypatch):
    def build(self):
        layers = [torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Dropout(0.3)]
        return torch.nn.Sequential(*layers, torch.nn.Linear(8, 10))

    monkeypatch.setattr(ClassifierMLP, "build_model", build)
    plain = execute(_config("sgd", tmp_path, "measure_every=0", "log_every=1"))
    watched = execute(_config("sgd", tmp_path, "measure_every=2", "energy_every=10", "log_every=1"))
    for a, b in zip(read_jsonl(plain.folder.log), read_jsonl(watched.folder.log), strict=True):
        assert {k: v for k, v in a.items() if k not in MEASURED}.items() <= b.items()
    left, right = plain.folder.load()["model"], watched.folder.load()["model"]
    assert int(left["1.num_batches_tracked"]) == 20
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_all_optimizers_see_the_same_start_and_the_same_batches(tmp_path):
    first = {}
    for name in ("sgd", "adamw", "sgd_momentum"):
        records = read_jsonl(execute(_config(name, tmp_path, "log_every=1")).folder.log)
        first[name] = (records[0]["train_loss"], records[1]["batch_loss"])
    assert len(set(first.values())) == 1


def test_a_repeated_run_gives_the_same_numbers(tmp_path):
    pinned = ["optimizer.rank=7", "energy_every=10", "route=loop"]
    runs = [execute(_config("scaled_adamw", tmp_path / str(i), *pinned)) for i in range(2)]
    left, right = (
        [{k: v for k, v in r.items() if k not in MEASURED} for r in read_jsonl(run.folder.log)] for run in runs
    )
    assert repr(left) == repr(right)


def test_divergence_is_a_row_not_a_crash(tmp_path):
    outcome = execute(_config("sgd", tmp_path, "optimizer.lr=1e6", "log_every=1", "task.loss=mse", "measure_every=0"))
    assert outcome.status == "diverged"
    assert "at the start" in outcome.reason or "not finite" in outcome.reason
    again = execute(_config("sgd", tmp_path, "optimizer.lr=1e6", "log_every=1", "task.loss=mse", "measure_every=0"))
    assert again.status == "diverged" and again.resumed
    assert load_record(outcome.folder.path).status == "diverged"


def test_a_failing_optimizer_is_a_row_of_the_suite(tmp_path):
    configs = plan("digits_mlp", ["sgd", "bulk_sgd"], [0], [*SMALL, f"out={tmp_path}"])
    configs[0].optimizer["weight_decay"] = "nonsense"
    said = []
    folders = perform(configs, RunProgress(enabled=False), said.append)
    statuses = [load_record(f).status for f in folders]
    assert statuses == ["failed", "done"]
    assert "failed (TypeError" in said[0] and "Bulk-SGD, seed 0: done" in said[1]


def test_an_optimizer_that_refuses_its_settings_says_so(tmp_path):
    with pytest.raises(ConfigError, match="bulk_sgd on digits_mlp: rank must be at least 0, got -1"):
        execute(_config("bulk_sgd", tmp_path, "optimizer.rank=-1"))
    with pytest.raises(ConfigError, match="batch_size must lie between 1 and the 1437 training examples, got 5000"):
        execute(_config("sgd", tmp_path, "batch_size=5000"))


@pytest.mark.parametrize("zoo_name", ["lbfgs", "torch-optimizer/adahessian"])
def test_optimizers_with_needs_of_their_own(zoo_name, tmp_path):
    outcome = execute(_config("sgd", tmp_path, f"optimizer.zoo={zoo_name}", "optimizer.lr=0.1", "measure_every=0"))
    assert outcome.status == "done" and outcome.record["train_loss"] < 2.3
    if zoo_name == "lbfgs":
        assert outcome.record["gradients"] > 20  # every call of the closure is counted
    else:
        assert outcome.record["products"] == 20
        # 20 gradients, and 20 products on the training batch: 50 of the 60 examples for which one counts 5 gradients
        assert outcome.record["gradient_equivalents"] == pytest.approx(20 + 20 * 5.0 * 50 / 60)


def test_product_cost_is_measured_once_and_kept(tmp_path):
    config = _config("bulk_sgd", tmp_path, "product_cost=null", "optimizer.rank=3", "checkpoint_every=10")
    first = execute(config)
    assert first.record["product_cost"] > 0
    first.folder.done.unlink()
    first.folder.checkpoint.unlink()
    assert execute(config).record["product_cost"] == first.record["product_cost"]
    task = tasks.build(config.task)
    costs = measure_costs(task, task.model(0), 50)
    assert costs.product_cost > 0 and costs.route in ("loop", "batched")
    assert first.record["route"] in ("loop", "batched")


def test_wandb_holds_what_the_plain_file_holds(tmp_path):
    outcome = execute(_config("bulk_sgd", tmp_path, "wandb.mode=offline", "optimizer.rank=3"))
    run = read_run(outcome.folder.path)
    plain = read_jsonl(outcome.folder.log)
    assert len(run.files) == 1 and run.exit_code == 0
    assert [r["step"] for r in run.history] == [r["step"] for r in plain] == [0, 5, 10, 15, 20]
    for theirs, ours in zip(run.history, plain, strict=True):
        assert set(ours) <= set(theirs)
        assert {k: theirs[k] for k in ours} == ours
    assert run.config["optimizer"]["rank"] == 3 and run.config["seed"] == 0
    assert run.summary["train_loss"] == outcome.record["train_loss"] and run.summary["status"] == "done"
    assert run.project == "curvopt" and run.name == "digits_mlp-bulk_sgd-seed0"


def test_both_records_name_what_it_takes_to_repeat_the_run(tmp_path):
    outcome = execute(_config("sgd", tmp_path, "wandb.mode=offline", "product_cost=null", "measure_every=10"))
    plain = read_jsonl_run(outcome.folder.path).config
    assert plain == read_run(outcome.folder.path).config
    place = plain["environment"]
    assert place["torch"] == torch.__version__ and place["numpy"] == np.__version__
    assert {"curvopt", "commit", "python", "platform", "processor", "cores", "gpu", "date"} <= set(place)
    # What the clock decided stands in the saved configuration, so that a run made from it counts the same.
    saved = load_run(outcome.folder.config)
    assert saved.product_cost == outcome.record["product_cost"] == plain["product_cost"] and saved.route == "loop"
    again = execute(repeat_run(outcome.folder.config, [f"out={tmp_path / 'again'}", "wandb.mode=disabled"]))
    assert again.folder.path != outcome.folder.path and not again.resumed
    for left, right in zip(read_jsonl(outcome.folder.log), read_jsonl(again.folder.log), strict=True):
        assert {k: v for k, v in left.items() if k not in MEASURED} == {
            k: v for k, v in right.items() if k in left and k not in MEASURED
        }
    with pytest.raises(ConfigError, match="--config repeats a saved run, so 'steps' can't change"):
        repeat_run(outcome.folder.config, ["steps=3"])


def test_every_column_is_documented(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", page, flags=re.S)))
    outcome = execute(_config("bulk_sgd", tmp_path, "energy_every=20", "optimizer.rank=3"))
    columns = {key for record in read_jsonl(outcome.folder.log) for key in record}
    assert {"lambda/3", "energy/ggn_trace_error", "batch_loss", "chi_update"} <= columns
    single = {c for c in columns if not c.startswith(("lambda/", "energy/"))}
    assert single - named == set()
    assert {"lambda/1", "lambda/k", "energy/MATRIX_KIND", "..._error"} <= named


def test_a_run_that_went_on_elsewhere_says_so(tmp_path):
    config = _config("sgd", tmp_path, "measure_every=0")
    folder = execute(config).folder
    folder.done.unlink()
    meta = json.loads(folder.meta.read_text())
    folder.meta.write_text(json.dumps({**meta, "commit": "old", "torch": "2.6.0"}))
    execute(config)
    assert load_record(folder.path).commits == list(dict.fromkeys(["old", meta["commit"]]))
    resumed = json.loads(folder.meta.read_text())["resumed"]
    assert [r["torch"] for r in resumed] == [torch.__version__]


@pytest.mark.parametrize("route", ["loop", "batched"])
def test_the_route_that_is_asked_for_is_taken(route, tmp_path):
    run = _fresh_run(_config("bulk_sgd", tmp_path, f"route={route}"))
    assert run.meter._operator.route == run.optimizer.subspace.operator.route == route


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("device=toaster", "device=toaster can't be used with torch .*: "),
        ("device=cuda:77", "device=cuda:77 can't be used with torch .*: "),
        ("task.rank=0", "task.rank must be at least 1, got 0"),
        ("task.curvature_examples=0", "task.curvature_examples must be at least 1, got 0"),
        ("task.curvature_examples=2000", "task.curvature_examples=2000, but the training set has 1437 examples"),
        ("task.hidden=[8,0]", r"task.hidden must hold widths of at least 1, got \[8, 0\]"),
    ],
)
def test_what_can_not_be_run_is_said(override, text, tmp_path):
    with pytest.raises(ConfigError, match=text):
        execute(_config("sgd", tmp_path, override))


def test_a_damaged_checkpoint_is_named(tmp_path):
    config = _config("sgd", tmp_path, "measure_every=0")
    folder = execute(config).folder
    folder.done.unlink()
    folder.checkpoint.write_bytes(folder.checkpoint.read_bytes()[:-500])
    with pytest.raises(ConfigError, match="checkpoint.pt can't be read .*: delete the file to begin the run anew"):
        execute(config)


def test_suite_file(tmp_path):
    suite = load_suite("bench")
    assert suite.tasks == ["mnist5k_mlp", "digits_mlp"] and len(suite.optimizers) == 8
    with pytest.raises(ConfigError, match="no suite 'bnch'"):
        load_suite("bnch")
