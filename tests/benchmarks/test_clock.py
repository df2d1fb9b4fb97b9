"""The clock of the runs, and whether a run that is done again gives the same numbers."""

import json
import time

import pytest
import torch

from benchmarks.cli import main
from benchmarks.config import compose_run, repeat_run, run_directory
from benchmarks.protocol import repeat, train
from benchmarks.protocol.account import Account
from benchmarks.protocol.clock import MEASURED, Stopwatch, clock_of, now
from benchmarks.protocol.train import execute
from benchmarks.report.records import load_record
from benchmarks.sinks import read_jsonl
from curvopt import zoo

CPU = torch.device("cpu")
COMMON = ["optimizer.lr=0.001", "steps=30", "eval_every=10", "product_cost=3.0", "route=loop", "wandb.mode=disabled"]


def test_seconds_on_a_cpu_are_of_the_process_and_waiting_costs_none():
    watch = Stopwatch(CPU)
    with watch.lap("train"):
        time.sleep(0.3)
    # A sleep takes no CPU seconds; half of it is far more than its two calls can.
    assert watch.wall("train") >= 0.3 and watch.get("train") < 0.15
    spent = time.process_time()
    with watch.lap("work"):
        while time.process_time() - spent < 0.05:
            pass
    assert watch.get("work") >= 0.04 and watch.get("nothing") == watch.wall("nothing") == 0.0
    assert clock_of(CPU) == "process" and clock_of(torch.device("cuda")) == "wall"
    assert now(CPU) <= now(CPU)


def test_sums_go_on_in_another_process():
    watch, other = Stopwatch(CPU), Stopwatch(CPU)
    watch.seconds, watch.wall_seconds = {"train": 2.0}, {"train": 5.0}
    other.load_state_dict(watch.state_dict())
    with other.lap("train"):
        pass
    assert 2.0 <= other.get("train") < 2.5 and 5.0 <= other.wall("train") < 5.5
    assert watch.get("train") == 2.0


def test_parts_of_a_run_are_shares_of_its_seconds():
    """The optimizer's own clock shows 3 s and 1 s of 10 s on the wall: 30 % and 10 % of the 4 s of the process."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    stats = {"matvecs": 0, "refreshes": 1, "age": 2, "seconds_refresh": 3.0, "seconds_products": 2.0}
    stats["seconds_projection"] = 1.0
    optimizer.stats = lambda: stats
    watch = Stopwatch(CPU)
    watch.seconds, watch.wall_seconds = {"train": 4.0}, {"train": 10.0}
    row = Account(optimizer, zoo.describe("sgd"), 2.0).columns(watch)
    assert row["seconds"] == 4.0 and row["wall_seconds"] == 10.0
    assert row["seconds_refresh"] == pytest.approx(1.2) and row["seconds_projection"] == pytest.approx(0.4)
    assert row["seconds_base"] == pytest.approx(2.4) and row["seconds_products"] == pytest.approx(0.8)


@pytest.mark.parametrize("optimizer", ["adamw", "interpolated_sgd"])
def test_a_run_repeated_from_its_saved_config_gives_the_same_bits(optimizer, tmp_path, capsys):
    assert main(["run", "noisy_quadratic", optimizer, *COMMON, f"out={tmp_path / 'first'}"]) == 0
    assert "s of CPU (" in capsys.readouterr().out
    (saved,) = (tmp_path / "first").rglob("config.yaml")
    assert main(["run", "--config", str(saved), f"out={tmp_path / 'again'}"]) == 0
    assert f"Beside {saved.parent}: the same losses bit for bit." in " ".join(capsys.readouterr().out.split())
    again = run_directory(repeat_run(saved, [f"out={tmp_path / 'again'}"]))
    left, right = (
        [{k: v for k, v in r.items() if k not in MEASURED} for r in read_jsonl(f / "log.jsonl")]
        for f in (saved.parent, again)
    )
    assert len(left) == 4 and repr(left) == repr(right)
    assert repeat.verdict(repeat_run(saved), saved.parent, again) == {"same": True}


def test_a_difference_in_the_last_bit_is_seen(tmp_path):
    folders = [execute(compose_run("noisy_quadratic", "sgd", [*COMMON, f"out={tmp_path / n}"])).folder for n in "ab"]
    first, again = (f.path for f in folders)
    rows = read_jsonl(again / "log.jsonl")
    value = rows[2]["train_loss"]
    rows[2]["train_loss"] = float(torch.tensor(value, dtype=torch.float64).nextafter(torch.tensor(2.0 * value)).item())
    (again / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert repeat.difference(first, again) == f"train_loss at step 20: {value!r}, then {rows[2]['train_loss']!r}"
    (again / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:1]))
    assert repeat.difference(first, again) == "a record at step 10 only there"
    # Of two runs that ended by the clock one may have come further.
    rows = read_jsonl(first / "log.jsonl")
    (again / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows[:2], {**rows[2], "train_loss": 9.0}]))
    assert repeat.difference(first, again, timed=True) == ""
    (again / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [{**rows[0], "train_loss": 9.0}, *rows[1:]]))
    assert "train_loss at step 0: " in repeat.difference(first, again, timed=True)
    (again / "log.jsonl").write_bytes((first / "log.jsonl").read_bytes())
    (again / "result.json").write_text('{"status": "diverged", "reason": "the loss was not finite"}')
    assert repeat.difference(first, again) == "done, then diverged the loss was not finite"
    meta = json.loads((again / "meta.json").read_text())
    (again / "meta.json").write_text(json.dumps({**meta, "torch": "1.0"}))
    assert repeat.surroundings(first, again) == [f"torch: {meta['torch']}, then 1.0"]
    words = repeat.in_words(
        {"same": False, "difference": "x", "operations": ["put_"], "surroundings": ["torch: 2, then 1"]}
    )
    assert words == "NOT the same: x; non-deterministic operation: put_; other surroundings (torch: 2, then 1)"


def test_the_operation_that_stands_in_the_way_is_named(tmp_path, monkeypatch):
    """A step that puts values where indices repeat: torch knows of no deterministic way to do it."""

    class Putting(train.Run):
        def _step(self, batch):
            torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
            super()._step(batch)

    config = compose_run("noisy_quadratic", "sgd", [*COMMON, f"out={tmp_path}"])
    assert repeat.operations(config) == []
    monkeypatch.setattr(train, "Run", Putting)
    (name,) = repeat.operations(config)
    assert "put_" in name
    assert not torch.are_deterministic_algorithms_enabled() and not list(tmp_path.iterdir())


def test_what_a_run_had_spent_at_a_step(tmp_path):
    folder = execute(compose_run("noisy_quadratic", "sgd", [*COMMON, f"out={tmp_path}"])).folder.path
    rows = [{"step": s, "train_loss": 1.0, "seconds": 0.5 * s} for s in (0, 10, 20)]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    record = load_record(folder)
    assert [record.spent(s, "seconds") for s in (0, 10, 15, 20, 40)] == [0.0, 5.0, 5.0, 10.0, 20.0]
    assert record.spent(10, "nothing") != record.spent(10, "nothing")  # NaN
