"""Configurations: composition, precedence, and what a typing error is told."""

import pytest

from benchmarks.config import (
    ConfigError,
    available,
    compose_run,
    config_hash,
    load_run,
    run_directory,
    to_dict,
    to_yaml,
)
from benchmarks.protocol.suite_config import load_comparison


def test_precedence_file_then_tuned_then_command_line():
    tuned = compose_run("digits_mlp", "sgd")
    assert tuned.optimizer["lr"] == 0.8 and tuned.optimizer["zoo"] == "sgd"
    assert compose_run("mnist5k_mlp", "sgd").optimizer["lr"] == 0.4
    assert compose_run("digits_mlp", "sgd", ["optimizer.lr=0.3"]).optimizer["lr"] == 0.3
    assert compose_run("digits_mlp", "sgd_momentum").optimizer["momentum"] == 0.9


def test_run_fields_follow_the_task_until_given():
    config = compose_run("mnist5k_mlp", "bulk_sgd")
    assert (config.steps, config.batch_size, config.task["rank"], config.optimizer["rank"]) == (1200, 50, 9, 9)
    config = compose_run("mnist5k_mlp", "bulk_sgd", ["task.loss=mse", "task.rank=10", "steps=7"])
    assert (config.steps, config.task["loss"], config.optimizer["rank"]) == (7, "mse", 10)


def test_arguments_that_the_file_does_not_list():
    config = compose_run("digits_mlp", "sgd", ["optimizer.nesterov=true", "optimizer.momentum=0.8"])
    assert config.optimizer["nesterov"] is True and config.optimizer["momentum"] == 0.8
    config = compose_run("digits_mlp", "adamw", ["optimizer.betas=[0.8,0.99]"])
    assert config.optimizer["betas"] == [0.8, 0.99]
    config = compose_run("digits_mlp", "bulk_sgd", ["optimizer.refresh_every=auto"])
    assert config.optimizer["refresh_every"] == "auto"


def test_every_file_composes():
    """Each task with one optimizer and each optimizer with one task: their keys don't depend on each other."""
    for task in available("task"):
        assert compose_run(task, "bulk_sgd").optimizer["label"]
    for optimizer in available("optimizer"):
        assert compose_run("noisy_quadratic", optimizer).optimizer["label"]


@pytest.mark.parametrize("name", available("suite"))
def test_every_suite_is_complete(name):
    """Its tasks, optimizers, grids and changes are looked at before the first run; loading does that."""
    assert load_comparison(name).title


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["stps=4"], "unknown key 'stps': did you mean 'steps'"),
        (["task.hiden=[3]"], "unknown key 'task.hiden': did you mean 'hidden'"),
        (["wandb.mod=offline"], "unknown key 'wandb.mod': did you mean 'mode'"),
        (["optimizer.momentm=0.3"], "unknown key 'optimizer.momentm': did you mean 'momentum'"),
        (["lr=0.1"], "unknown key 'lr': did you mean 'optimizer.lr'"),
        (["optimizer.lr=abc"], "optimizer.lr: Value 'abc' of type 'str' could not be converted to Float"),
        (["optimizer.nesterov=2x"], "optimizer.nesterov: Value '2x' is not a valid bool"),
        (["steps=abc"], "steps: Value 'abc' of type 'str' could not be converted to Integer"),
        (["steps"], "expected KEY=VALUE, got 'steps'"),
        (["steps=0"], "steps must be at least 1, got 0"),
        (["eval_every=-1"], "eval_every must not be negative, got -1"),
        (["wandb.mode=cloud"], "wandb.mode must be auto, offline, online or disabled, got 'cloud'"),
        (["task=digits_mlp"], "the task is named before the overrides"),
        (["optimizer.zoo=adamv"], "optimizer.zoo: unknown optimizer 'adamv': did you mean 'adam' or 'adamw'"),
        (["optimizer.lr=[0.1"], r"can't read 'optimizer.lr=\[0.1'"),
    ],
)
def test_a_wrong_override_is_named(overrides, text):
    with pytest.raises(ConfigError, match=text):
        compose_run("digits_mlp", "sgd", overrides)


def test_unknown_files_list_what_there_is():
    with pytest.raises(
        ConfigError, match="unknown task 'digit_mlp': did you mean 'digits_mlp'. available: cifar10_5k_cnn, "
    ):
        compose_run("digit_mlp", "sgd")
    with pytest.raises(ConfigError, match="unknown optimizer 'sdg': did you mean 'sgd'. available: adam, .*bulk_sgd"):
        compose_run("digits_mlp", "sdg")


def test_saved_configuration_comes_back(tmp_path):
    config = compose_run("digits_mlp", "scaled_adamw", ["seed=3", "optimizer.betas=[0.8,0.99]", f"out={tmp_path}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load_run(tmp_path / "config.yaml")
    assert to_dict(again) == to_dict(config)
    assert config_hash(again) == config_hash(config) and run_directory(again) == run_directory(config)
    with pytest.raises(ConfigError, match="no configuration at"):
        load_run(tmp_path / "nothing.yaml")
    (tmp_path / "other.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match="is not the saved configuration of a run"):
        load_run(tmp_path / "other.yaml")


def test_hash_tells_what_changes_numbers_and_nothing_else():
    base = config_hash(compose_run("digits_mlp", "sgd"))
    for same in ("out=elsewhere", "wandb.mode=disabled", "checkpoint_every=7", "seed=4", "product_cost=3.0"):
        assert config_hash(compose_run("digits_mlp", "sgd", [same])) == base, same
    for other in ("optimizer.lr=0.3", "steps=9", "task.hidden=[8]", "batch_size=20", "measure_every=0"):
        assert config_hash(compose_run("digits_mlp", "sgd", [other])) != base, other


def test_run_directory_names_task_optimizer_hash_and_seed(tmp_path):
    config = compose_run("digits_mlp", "sgd", [f"out={tmp_path}", "seed=2"])
    assert run_directory(config) == tmp_path / "digits_mlp" / f"sgd-{config_hash(config)}" / "seed-2"
    config = compose_run("digits_mlp", "sgd", [f"run_dir={tmp_path}/here"])
    assert run_directory(config) == tmp_path / "here"
