"""Controls do what they say: a random subspace, no subspace; and targets come from tuned baselines."""

import shutil

import pytest
import torch

import benchmarks.protocol.target as target_module
from benchmarks import tasks
from benchmarks.config import ConfigError, compose_run
from benchmarks.progress import RunProgress
from benchmarks.protocol.controls import RandomSubspace
from benchmarks.protocol.target import find_target, round_up, write_target
from benchmarks.protocol.train import execute
from curvopt.linalg import eigsh

QUIET = ["steps=30", "measure_every=0", "energy_every=0", "wandb.mode=disabled", "product_cost=3.0", "route=loop"]


def test_a_random_subspace_has_the_rank_and_no_more():
    task = tasks.build(compose_run("noisy_quadratic", "sgd").task)
    like = task.curvature(task.model(0))
    operator = RandomSubspace(like, 3, seed=1)
    found = eigsh(operator, k=4, tol=1e-8)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([2.0, 1.5, 1.0, 0.5]).double(), rtol=1e-6, atol=0)
    dense = operator.to_dense()
    torch.testing.assert_close(dense, dense.T, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(dense) == 4 and operator.layout is like.layout
    first = operator @ torch.ones(100).double()
    operator.renew(1)
    assert not torch.allclose(operator @ torch.ones(100).double(), first)
    operator.renew(0)
    assert torch.equal(operator @ torch.ones(100).double(), first)
    # of a vector that it knows nothing of, a random subspace of rank 3 holds 3 in 100 on average
    shares = []
    for seed in range(50):
        vectors = eigsh(RandomSubspace(like, 3, seed), k=3, tol=1e-8).eigenvectors
        shares.append(float((vectors.T @ task.eigenvectors[:, 0]).square().sum()))
    assert sum(shares) / 50 == pytest.approx(0.03, abs=0.012)  # spread of one share about .025, of the mean .0035


def test_rank_zero_is_its_base(tmp_path):
    common = [*QUIET, "optimizer.lr=0.01", f"out={tmp_path}"]
    base = execute(compose_run("noisy_quadratic", "sgd_momentum", common)).record
    control = execute(compose_run("noisy_quadratic", "control_rank0", common)).record
    assert control["train_loss"] == base["train_loss"] and control["products"] == 0


def test_the_random_control_differs_from_the_true_subspace_and_from_its_base(tmp_path):
    common = [*QUIET, "optimizer.lr=0.01", f"out={tmp_path}"]
    losses = {
        name: execute(compose_run("noisy_quadratic", name, common)).record["train_loss"]
        for name in ("scaled_momentum", "control_random", "control_rank0")
    }
    assert len(set(losses.values())) == 3


def test_what_the_controls_from_papers_cost(tmp_path):
    """IRE takes no product; Eigen-SAM a second gradient a step and five products every hundred steps."""
    common = [*QUIET, "optimizer.lr=0.01", f"out={tmp_path}"]
    base, ire, sam = (
        execute(compose_run("noisy_quadratic", name, common)).record
        for name in ("sgd_momentum", "control_ire", "control_eigen_sam")
    )
    assert (ire["gradients"], ire["products"], ire["gradient_equivalents"]) == (30, 0, 30)
    assert (sam["gradients"], sam["products"], sam["refreshes"]) == (60, 5, 1)
    assert sam["gradient_equivalents"] == 60 + 5 * 3.0
    assert len({base["train_loss"], ire["train_loss"], sam["train_loss"]}) == 3


def test_round_up():
    assert round_up(0.0123) == 0.013 and round_up(0.012) == 0.012 and round_up(1234.0) == 1300.0
    assert round_up(0.0) == 0.0 and round_up(9.96) == 10.0


def test_a_target_is_what_half_of_the_baselines_reach(tmp_path):
    settings = ["optimizers=[sgd_momentum,adamw,nadam]", "trials=3", "seeds=1"]
    settings += ["overrides=[steps=60,product_cost=3.0,route=loop,wandb.mode=disabled]"]
    said = []
    found = find_target("noisy_quadratic", settings, tmp_path, RunProgress(enabled=False), say=said.append)
    from benchmarks.report.records import find_records

    ends = sorted(r.last("train_loss") for r in find_records(tmp_path / "target-noisy_quadratic") if r.config.seed == 0)
    assert len(ends) == 3 and found == round_up(ends[1]) and len(said) == 3 * 3 + 3
    with pytest.raises(ConfigError, match="unknown task 'nosy_quadratic': did you mean 'noisy_quadratic'"):
        find_target("nosy_quadratic", [], tmp_path, RunProgress(enabled=False))


def test_a_target_is_written_with_the_command_that_found_it(tmp_path, monkeypatch):
    shutil.copytree(target_module.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(target_module, "CONFIGS", tmp_path / "configs")
    for name in ("digits_mlp", "noisy_quadratic"):
        path = tmp_path / "configs" / "task" / f"{name}.yaml"
        before = path.read_text()
        for value in (0.02, 0.03):
            assert write_target(name, value, f"python -m benchmarks target {name}") == path
        text = path.read_text()
        assert text.count("target:") == 1 and "target: 0.03\n" in text
        assert text.count(f"# Set by `python -m benchmarks target {name}`.") == 1
        rest = [line for line in before.splitlines() if not line.startswith("target:")]
        assert [line for line in text.splitlines() if line in rest] == rest
