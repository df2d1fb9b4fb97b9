"""Suites: what they do, that they survive, and what they refuse."""

import contextlib
import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cli import main
from benchmarks.config import ConfigError, compose_run, run_directory, settings
from benchmarks.progress import RunProgress, Sender, show
from benchmarks.protocol.comparison import Comparison, SuiteConfig, load_comparison, units
from benchmarks.protocol.repeat import difference
from benchmarks.protocol.train import execute
from benchmarks.report.leaderboard import repetition
from benchmarks.report.page import _csv, write_leaderboard
from benchmarks.report.records import find_records
from benchmarks.report.standings import standings

ROOT = Path(__file__).resolve().parents[2]
PINNED = "overrides=[steps=40,product_cost=3.0,route=loop,wandb.mode=disabled,checkpoint_every=10]"
TINY = ["trials=3", "seeds=2", "optimizers=[sgd_momentum,interpolated_sgd]", "baselines=[sgd_momentum]", PINNED]
MEASURED = {"seconds", "run_seconds", "run_wall_seconds"}


def _perform(out, *overrides, jobs=1, report=False):
    config, said = load_comparison("smoke", [*TINY, *overrides]), []
    Comparison(config, out, said.append).perform(RunProgress(enabled=False), jobs)
    if report:
        write_leaderboard(config, out, "test")
    else:  # its table alone: the figures take longer than the runs
        (out / "leaderboard.csv").write_text(_csv(standings(config, out)))
    return config, said


def _table(out):
    with open(out / "leaderboard.csv") as handle:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(handle)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    return out, *_perform(out, report=True)


def test_every_optimizer_gets_the_same_budget_and_every_run_a_row(unbroken):
    out, config, said = unbroken
    rows = _table(out)
    labels = ["SGD with momentum", "SGD with momentum, lr x 2", "Interpolated SGD"]
    assert [(r["optimizer"], r["seed"]) for r in rows] == [(label, s) for label in labels for s in ("0", "1")]
    for name in config.optimizers:
        found = json.loads((out / "tuning" / "noisy_quadratic" / f"{name}.json").read_text())
        assert len(found["trials"]) == 3
    # 2 optimizers x 3 trials, then 2 seeds each, and 2 of the control
    assert len(list((out / "runs").rglob("DONE"))) == 2 * 3 + 3 * 2
    assert any(line.startswith("[2/2] noisy_quadratic, interpolated_sgd: best lr=") for line in said)
    report = (out / "report.md").read_text()
    # 40 steps are too few for the target: that is a row like any other.
    assert (
        "No run reached this target: it is a miss for all of them" in report
        and "| missed | missed | missed |" in report
    )
    assert "too few seeds (2)" in report and "the baseline" in report and "Tuning on noisy_quadratic" in report


def test_the_control_takes_the_tuned_setting_with_its_rate_scaled(unbroken):
    out, config, _ = unbroken
    plain, scaled = standings(config, out)[:2]
    rate = plain.tuned.best.settings["lr"]
    assert f"lr={rate}," in plain.settings and f"lr={float(f'{2 * rate:.3g}')}," in scaled.settings
    assert scaled.tuned is None


def test_the_same_command_again_does_nothing_twice(unbroken):
    out, _, _ = unbroken
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("DONE")}
    before = _table(out)
    _perform(out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("DONE")} == stamps and _table(out) == before


def test_each_setting_is_run_once_more_alone_and_repeats_bit_for_bit(unbroken):
    out, config, said = unbroken
    labels = ["SGD with momentum", "SGD with momentum, lr x 2", "Interpolated SGD"]
    assert len(list((out / "retimed").rglob("DONE"))) == 3 and not list((out / "retimed").rglob("wandb"))
    alone = [line for line in said if " alone: " in line]
    assert [line.partition(", seed")[0] for line in alone] == [
        f"[{i}/3] alone: noisy_quadratic, {label}" for i, label in enumerate(labels, 1)
    ]
    assert said[-3:] == alone and all("the same losses bit for bit" in line for line in alone)
    report = (out / "report.md").read_text()
    assert "All 3 re-timed runs gave the same losses bit for bit." in report
    assert "Seconds (CPU seconds of the run's process, over all of its threads) are of each setting's runs" in report
    for row in standings(config, out):
        (run,) = row.retimed
        assert run.config.seed == 0 and row.clock == "process" and 0 < run.last("seconds")
        assert len(row.seconds) == 2 and all(s > 0 for s in [*row.seconds, *row.wall_seconds])


def test_a_run_that_does_not_repeat_is_named_with_what_stands_in_the_way(unbroken, tmp_path):
    out = tmp_path / "suite"
    shutil.copytree(unbroken[0], out)
    log = sorted((out / "runs").rglob("sgd_momentum-*/seed-0/log.jsonl"))[0]
    lines = log.read_text().splitlines()
    row = json.loads(lines[-1])
    lines[-1] = json.dumps({**row, "train_loss": row["train_loss"] * (1 + 1e-15)})
    log.write_text("\n".join(lines) + "\n")
    for note in (out / "retimed").rglob("repeat.json"):
        note.unlink()
    config, _ = _perform(out)
    report = repetition(standings(config, out))
    assert "Of 3 re-timed runs 1 did not give the same losses bit for bit:" in report
    assert "seed 0: NOT the same: train_loss at step 40: " in report
    assert "; no operation that torch knows as non-deterministic" in report


def test_two_processes_give_the_same_table(unbroken, tmp_path):
    out, said, progress = tmp_path / "jobs", [], RunProgress(enabled=False)
    config = load_comparison("smoke", TINY)
    Comparison(config, out, said.append).perform(progress, 2)
    (out / "leaderboard.csv").write_text(_csv(standings(config, out)))
    assert _table(out) == _table(unbroken[0])
    # The workers told of every trial and every run: 2 x 3 of the search, 3 x 2 results, 3 alone.
    assert sum(", best so far " in line for line in said) == 6 and sum(" alone: " in line for line in said) == 3
    (bar,) = progress._bar.tasks
    assert (bar.description, bar.completed, bar.total) == ("all runs", 15, 15)
    assert "best so far" in bar.fields["phase"]


def test_a_worker_tells_what_it_does():
    told, said, progress = [], [], RunProgress(enabled=False)
    worker = Sender(told.append)
    progress.overall(4)
    worker.begin("noisy quadratic: SGD, seed 0", 40)
    worker.advance(10)
    for message in told:
        show(progress, message, said.append)
    assert [bar.description for bar in progress._bar.tasks] == ["all runs", "noisy quadratic: SGD, seed 0"]
    told.clear()
    worker.finish_run()
    worker.begin("noisy quadratic: SGD, seed 1", 40)
    worker.count(2)
    worker.note("best so far 0.1")
    worker.print("a line")
    for message in told:
        show(progress, message, said.append)
    overall, row = progress._bar.tasks
    assert (overall.completed, overall.fields["phase"]) == (3, "best so far 0.1") and said == ["a line"]
    assert row.description == "noisy quadratic: SGD, seed 1"
    progress.clear()
    assert progress._bar.tasks == [overall]


def _killed(folder, kills, seed):
    """Run the suite by its command, SIGKILL it at random moments, start it again; the last call is let go on."""
    command = [sys.executable, "-m", "benchmarks", "suite", "smoke", *TINY, "--out", str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    moments = random.Random(seed)
    landed = 0
    for _ in range(kills):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        # counted in its own lines, so that the moment does not depend on how fast the machine is
        for _ in range(moments.randint(1, 4)):
            process.stdout.readline()
        time.sleep(moments.random() * 0.2)
        if process.poll() is None:  # it may have ended by itself
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
                landed += 1
        process.communicate()
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return landed


def _check_like(out, unbroken):
    assert _table(out) == _table(unbroken)
    assert not list(out.rglob("*.tmp"))
    for path in out.rglob("log.jsonl"):
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == sorted(set(steps)), path
    names = [str(p.parent.relative_to(out)) for p in out.rglob("DONE")]
    assert sorted(names) == sorted(str(p.parent.relative_to(unbroken)) for p in unbroken.rglob("DONE"))


def test_killed_and_started_again_it_ends_with_the_same_table(unbroken, tmp_path):
    assert _killed(tmp_path, kills=2, seed=0) >= 1
    _check_like(tmp_path / "suite-smoke", unbroken[0])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_twenty_times(unbroken, tmp_path):
    assert _killed(tmp_path, kills=20, seed=1) >= 10
    _check_like(tmp_path / "suite-smoke", unbroken[0])


@contextlib.contextmanager
def _files_up_to(size):
    """The operating system refuses every write beyond this size of a file, as a full disk refuses all of them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_room_it_stops_with_an_error_and_goes_on_later(unbroken, tmp_path, capsys):
    command = ["suite", "smoke", *TINY, "--out", str(tmp_path)]
    # A configuration takes 1,600 bytes, a checkpoint of this task 100,000: its matrix is among its state.
    for size, file in ((1200, "config.json"), (50_000, "checkpoint.pt")):
        with _files_up_to(size):
            assert main(command) == 2
        said = capsys.readouterr().err
        assert f"error: [Errno 27] File too large: '{tmp_path}" in said and f"{file}'" in said
        assert "once there is room, the same command goes on where this one stopped" in said
        assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("DONE"))
        assert not list(tmp_path.rglob("result.json")) and not list(tmp_path.rglob("tuning/*/*"))
    _perform(tmp_path / "suite-smoke")
    _check_like(tmp_path / "suite-smoke", unbroken[0])


def test_a_record_that_cannot_be_written_is_no_finished_run(tmp_path):
    """Half a record would read as a run that never reached its target."""
    given = [
        "steps=200",
        "log_every=1",
        "checkpoint_every=1000",
        "product_cost=3.0",
        "route=loop",
        "optimizer.lr=0.001",
    ]
    config = compose_run("noisy_quadratic", "sgd", [*given, "wandb.mode=disabled", f"out={tmp_path / 'full'}"])
    folder = run_directory(config)
    with _files_up_to(20_000), pytest.raises(OSError, match=r"File too large: '.*log\.jsonl'"):
        execute(config)
    assert not (folder / "DONE").exists() and not (folder / "result.json").exists()
    log = (folder / "log.jsonl").read_bytes()
    assert 19_000 < len(log) <= 20_000 and log.endswith(b"\n")  # the last line is whole
    # Without a limit the same call does the rest, and the record is that of a run that was never stopped.
    execute(config)
    whole = execute(replace(config, out=str(tmp_path / "whole")))
    assert difference(whole.folder.path, folder) == ""


def test_an_optimizer_that_cannot_run_is_a_row_with_its_reason(tmp_path):
    # A dominant space as large as the whole: refused by the optimizer, not by the configuration.
    rank = PINNED.replace("steps=40", "steps=20,task.rank=500")
    config, _ = _perform(tmp_path, rank, report=True)
    rows = {r.label: r for r in standings(config, tmp_path)}
    assert rows["Interpolated SGD"].lost == 1.0 and "rank" in rows["Interpolated SGD"].reasons[0]
    assert rows["SGD with momentum"].lost == 0.0
    assert "Runs that did not end well" in (tmp_path / "report.md").read_text()


def test_a_method_on_residuals_is_a_row_with_its_reason_where_a_task_has_none(tmp_path):
    costs = PINNED.replace("product_cost=3.0,route=loop,", "")  # measured, a Jacobian as well where there is one
    config, _ = _perform(tmp_path, "optimizers=[sgd_momentum,levenberg_marquardt]", "seeds=1", costs)
    rows = {r.label: r for r in standings(config, tmp_path)}
    assert rows["Levenberg-Marquardt"].lost == 1.0
    assert "noisy_quadratic gives no residuals" in rows["Levenberg-Marquardt"].reasons[0]
    assert rows["SGD with momentum"].lost == 0.0
    measured = json.loads((tmp_path / "costs" / "noisy_quadratic.json").read_text())
    assert measured["product_cost"] > 0 and "jacobian_cost" not in measured


def test_an_unfinished_suite_is_no_report(tmp_path, unbroken):
    config = load_comparison("smoke", TINY)
    with pytest.raises(ConfigError, match="sgd_momentum is not tuned on noisy_quadratic yet: run the suite to its end"):
        standings(config, tmp_path)
    out = tmp_path / "copy"
    shutil.copytree(unbroken[0], out)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ConfigError, match="is not tuned on noisy_quadratic yet|is missing: run the suite to its end"):
        write_leaderboard(load_comparison("smoke", [*TINY, "seeds=3"]), tmp_path / "elsewhere", "test")


def test_another_versions_folder_is_refused(tmp_path):
    (tmp_path / "suite.json").write_text('{"version": 99}')
    with pytest.raises(ConfigError, match="holds a suite of format 99, this program writes 2: move it away"):
        Comparison(SuiteConfig(), tmp_path).claim()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["smok"], "unknown suite 'smok': did you mean 'smoke'"),
        (["smoke", "trails=4"], "unknown key 'trails' of a suite: did you mean 'trials'"),
        (["smoke", "trials=2"], "trials must be at least 3, got 2"),
        (["smoke", "seeds=0"], "seeds must be at least 1, got 0"),
        (["smoke", "retime=3"], "retime must be at most seeds, 2, got 3"),
        (["smoke", "retime=-1"], "retime must be at least 0, got -1"),
        (["smoke", "metric=secnds"], "unknown metric 'secnds': did you mean 'seconds'"),
        (
            ["smoke", "metric=fame"],
            "unknown metric 'fame': known: gradient_equivalents, seconds, step, train_loss",
        ),
        (["smoke", "seeds=many"], "could not be converted to Integer"),
        (["smoke", "trials"], "expected KEY=VALUE, got 'trials'"),
        (["smoke", "tasks=[digit_mlp]"], "unknown task 'digit_mlp': did you mean 'digits_mlp'"),
        (["smoke", "optimizers=[sdg]"], "unknown optimizer 'sdg': did you mean 'sgd'"),
        (["smoke", "tasks=[]"], "tasks and optimizers must not be empty"),
        (["smoke", "baselines=[lion]"], "lion is a baseline, scaled or ablated, but not among its optimizers"),
        (["smoke", "ablate={bulk_sgd: {rank: [1]}}"], "bulk_sgd is a baseline, scaled or ablated, but not among"),
        (["smoke", "ablate={adamw: {rnk: [1]}}"], "unknown key 'optimizer.rnk'"),
        (["smoke", "ablate={adamw: {task.rnk: [1]}}"], "unknown key 'task.rnk': did you mean 'rank'"),
        (["smoke", "ablate={adamw: 3}"], "suite smoke: ablate"),
        (["smoke", "overrides=[stps=4]"], "unknown key 'stps': did you mean 'steps'"),
    ],
)
def test_mistakes(arguments, text, capsys, tmp_path):
    assert main(["suite", *arguments, "--out", str(tmp_path)]) == 2
    assert text in capsys.readouterr().err


def test_an_ablation_takes_the_tuned_setting_and_changes_one_thing(tmp_path):
    changes = "ablate={interpolated_sgd: {rank: [1, 3], refresh_every: [frozen], task.curvature_examples: [7]}}"
    config, _ = _perform(tmp_path, changes, "seeds=1", "overrides=[steps=20,wandb.mode=disabled]")
    tuned, *changed = [r for r in standings(config, tmp_path) if r.optimizer == "interpolated_sgd"]
    label = "Interpolated SGD"
    assert [r.label for r in changed] == [
        f"{label}, rank=1", f"{label}, rank=3", f"{label}, refresh_every=frozen", f"{label}, curvature_examples=7",
    ]  # fmt: skip
    runs = {r.config.optimizer["label"]: r.config for r in find_records(tmp_path / "runs") if r.config.seed == 0}
    plain = settings(runs[label])
    assert plain["optimizer.lr"] == tuned.tuned.best.settings["lr"]
    for row, key, value in zip(
        changed,
        ["optimizer.rank", "optimizer.rank", "optimizer.refresh_every", "task.curvature_examples"],
        [1, 3, "frozen", 7],
        strict=True,
    ):
        other = settings(runs[row.label])
        assert other[key] == value and row.tuned is None
        assert {k for k in plain if other[k] != plain[k]} <= {key, "optimizer.label"}
    # the rank that it has anyway: the same run, and so the same numbers; another rank, others
    assert changed[1].train_loss == tuned.train_loss != changed[0].train_loss
    # a product on another curvature batch has a cost of its own, one for all seeds
    costs = {p.stem for p in (tmp_path / "costs").glob("*.json")}
    assert costs == {"noisy_quadratic", "noisy_quadratic-curvature_examples=7"}


@pytest.mark.parametrize("name", ["small", "controls", "variants", "ablations", "smoke", "target"])
def test_every_suite_is_sound(name):
    config = load_comparison(name)
    if name == "ablations":
        (changes,) = config.ablate.values()
        assert set(changes) == {"rank", "refresh_every", "start", "task.curvature_examples"}
    assert len(units(config)) == len(config.tasks) * len(config.optimizers)
    if name == "small":
        assert len(config.tasks) == 5 and len(config.optimizers) == 12 and config.seeds == 6
        assert {"control_rank0", "control_random"} <= set(config.optimizers) and config.scaled
