"""A run that is killed between two steps and resumed in a new process continues bit for bit."""

import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.config import ConfigError, compose_run, run_directory
from benchmarks.protocol.checkpoint import RunFolder
from benchmarks.protocol.train import execute
from benchmarks.report.records import MEASURED
from benchmarks.sinks import read_jsonl
from benchmarks.sinks.wandb_reader import read_run

# Processes that start from a server with everything imported, but no torch operation done: a start takes milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["benchmarks.protocol.train", "curvopt.optim", "sklearn.datasets"])

STEPS = 240
COMMON = [
    f"steps={STEPS}",
    "log_every=1",
    "eval_every=40",
    "measure_every=60",
    "checkpoint_every=17",
    "product_cost=5.0",
    "route=loop",
    "wandb.mode=disabled",
    "task.rank=3",
    "task.curvature_examples=100",
    "task.hidden=[12]",
]
# Rank 7: blocks wide enough that the route of a product matters, which is measured once and kept.
OURS = ["optimizer.rank=7", "optimizer.refresh_every=23"]
CASES = {
    "sgd_momentum": [],
    "adamw": [],
    "bulk_sgd": OURS,
    "scaled_adamw": OURS,
}


def _config(optimizer, folder, extra=()):
    return compose_run("digits_mlp", optimizer, [*COMMON, *CASES[optimizer], *extra, f"out={folder}"])


def _run_and_kill(config, at_step):
    """Run in a new process and kill it once its record has reached a step; whether it was killed in time."""
    log = run_directory(config) / "log.jsonl"
    process = PROCESSES.Process(target=execute, args=(config,))
    process.start()
    while process.is_alive():
        if log.exists() and log.read_bytes().count(b"\n") > at_step:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    process.join()
    return process.exitcode == -signal.SIGKILL


def _numbers(folder):
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in read_jsonl(folder.log)]


@pytest.mark.parametrize("optimizer", CASES)
def test_killed_and_resumed_equals_unbroken(optimizer, tmp_path):
    whole = execute(_config(optimizer, tmp_path / "whole"))
    assert whole.status == "done"

    config = _config(optimizer, tmp_path / "broken")
    moments = random.Random(optimizer)
    killed = 0
    for at in sorted(moments.randrange(20, STEPS - 40) for _ in range(3)):
        killed += _run_and_kill(config, at)
    assert killed >= 2, "the process was too quick to be killed"
    assert not RunFolder(run_directory(config)).done.exists()
    resumed = execute(config)
    assert resumed.resumed

    expected, got = _numbers(whole.folder), _numbers(resumed.folder)
    assert [r["step"] for r in got] == list(range(STEPS + 1))
    for left, right in zip(expected, got, strict=True):
        assert repr(left) == repr(right)  # repr tells every bit of a float, and NaN equals NaN
    final, again = whole.folder.load(), resumed.folder.load()
    for name, tensor in final["model"].items():
        assert torch.equal(tensor, again["model"][name]), name
    assert torch.equal(final["rng"], again["rng"])
    assert final["order"]["position"] == again["order"]["position"]


def test_after_a_kill_wandb_holds_what_the_plain_file_holds(tmp_path):
    """A kill tears off the end of wandb's file, here all of it; the records are sent again from the plain file."""
    config = _config("sgd_momentum", tmp_path, ["wandb.mode=offline", "measure_every=0", "steps=60"])
    assert _run_and_kill(config, 25), "the process was too quick to be killed"
    resumed = execute(config)
    assert resumed.resumed
    plain, theirs = read_jsonl(resumed.folder.log), read_run(resumed.folder.path)
    assert [r["step"] for r in theirs.history] == [r["step"] for r in plain] == list(range(61))
    for left, right in zip(theirs.history, plain, strict=True):
        assert {k: left[k] for k in right} == right
    assert theirs.exit_code == 0 and theirs.summary["status"] == "done"


def test_a_finished_run_is_not_done_again(tmp_path):
    config = _config("adamw", tmp_path, ["steps=30"])
    first = execute(config)
    stamp = first.folder.log.stat().st_mtime_ns
    second = execute(config)
    assert second.resumed and second.record["train_loss"] == first.record["train_loss"]
    assert first.folder.log.stat().st_mtime_ns == stamp


def test_results_of_another_configuration_are_refused(tmp_path):
    config = _config("adamw", tmp_path, ["steps=5", f"run_dir={tmp_path / 'here'}"])
    execute(config)
    other = _config("adamw", tmp_path, ["steps=5", f"run_dir={tmp_path / 'here'}", "optimizer.lr=0.02"])
    with pytest.raises(
        ConfigError, match=r"results of another configuration \(optimizer\.lr: [0-9.]+ there, 0\.02 asked"
    ):
        execute(other)
    with pytest.raises(ConfigError, match=r"seed: 0 there, 1 asked"):
        execute(replace(config, seed=1))


def test_a_checkpoint_of_an_older_layout_is_refused(tmp_path):
    config = _config("adamw", tmp_path, ["steps=5"])
    folder = execute(config).folder
    folder.meta.write_text('{"version": 0}')
    folder.done.unlink()
    with pytest.raises(ConfigError, match="was written in format 0, this program writes 2"):
        execute(config)


def test_two_processes_do_not_share_a_folder(tmp_path):
    config = _config("adamw", tmp_path, ["steps=5"])
    with RunFolder(run_directory(config)).lock(), pytest.raises(ConfigError, match="another process is working in"):
        execute(config)
