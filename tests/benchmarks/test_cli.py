"""The command line: what it prints, what it writes, and what a mistake is told."""

import subprocess
import sys

import pytest

from benchmarks.cli import main
from benchmarks.config import compose_run, run_directory

SMALL = ["steps=20", "eval_every=10", "measure_every=10", "energy_every=0", "wandb.mode=disabled", "task.hidden=[8]"]


def test_run_and_run_again(tmp_path, capsys):
    command = ["run", "digits_mlp", "adamw", *SMALL, f"out={tmp_path}"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "AdamW: done after 20 steps: train loss" in first and "20 gradients, 0 curvature products" in first
    assert "bundled with scikit-learn" in first
    assert main(command) == 0
    assert capsys.readouterr().out == first

    folder = run_directory(compose_run("digits_mlp", "adamw", [*SMALL, f"out={tmp_path}"]))
    assert {"config.yaml", "meta.json", "log.jsonl", "result.json", "checkpoint.pt", "DONE"} <= {
        p.name for p in folder.iterdir()
    }
    assert main(["run", "--config", str(folder / "config.yaml")]) == 0
    assert "AdamW: done after 20 steps" in capsys.readouterr().out

    stamp = (folder / "DONE").stat().st_mtime_ns
    assert main([*command, "--fresh"]) == 0
    assert (folder / "DONE").stat().st_mtime_ns > stamp


def test_bench(tmp_path, capsys):
    command = ["bench", "--task", "digits_mlp", "--optimizers", "sgd,bulk_sgd", "--seeds", "2", "--out", str(tmp_path)]
    settings = [*SMALL, "task.rank=3", "task.curvature_examples=60", "product_cost=4.0"]
    assert main([*command, *settings]) == 0
    out = capsys.readouterr().out
    assert "Medians over 2 seeds" in out and "Bulk-SGD" in out
    folder = tmp_path / "bench-digits_mlp"
    assert (folder / "report.md").exists() and (folder / "loss_against_gradient_equivalents.png").exists()
    assert len(list(folder.rglob("DONE"))) == 4
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("DONE")}
    assert main([*command, *settings]) == 0  # nothing is done twice
    assert stamps == {p: p.stat().st_mtime_ns for p in folder.rglob("DONE")}
    assert main(["report", str(folder), "--out", str(tmp_path / "again"), "--target", "2.2"]) == 0
    assert "to 2.2" in (tmp_path / "again" / "report.md").read_text()


def test_bench_says_which_data_it_used(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CURVOPT_DATA", raising=False)
    monkeypatch.setenv("CURVOPT_CACHE", str(tmp_path / "empty"))
    assert main(["bench", "--optimizers", "sgd", "--out", str(tmp_path), *SMALL]) == 0
    out = capsys.readouterr().out
    assert "mnist5k_mlp is left out: mnist is neither in the folder that CURVOPT_DATA names nor in the cache" in out
    assert "python -m benchmarks fetch mnist" in out and "Task: digits_mlp, on digits." in out


def test_bench_takes_mnist_where_it_is(tmp_path, capsys, data_root):
    settings = ["steps=3", "wandb.mode=disabled", "measure_every=0", "energy_every=0", "task.hidden=[4]"]
    assert main(["bench", "--optimizers", "sgd", "--out", str(tmp_path), *settings]) == 0
    assert "Task: mnist5k_mlp, on mnist." in capsys.readouterr().out


def test_tune(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["tune", "digits_mlp", "sgd", "steps=10", "task.hidden=[8]", "--seeds", "7", "--budget", "3"]
    assert main([*command, "--factor", "4"]) == 0
    assert "best lr=" in capsys.readouterr().out


def test_list(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert (
        "digits_mlp" in out
        and "mnist5k_mlp" in out
        and "bulk-sgd" in out
        and "not available: torch-optimizer/lookahead" in out
    )


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["run", "digits_mpl", "sgd"], "error: unknown task 'digits_mpl': did you mean 'digits_mlp'"),
        (["run", "digits_mlp", "sdg"], "error: unknown optimizer 'sdg': did you mean 'sgd'"),
        (["run", "digits_mlp", "sgd", "stps=3"], "error: unknown key 'stps': did you mean 'steps'"),
        (["run"], "error: run needs TASK and OPTIMIZER; tasks: cifar10_5k_cnn, "),
        (["run", "digits_mlp", "sgd", "--config", "x.yaml"], "error: --config takes everything from the saved file"),
        (["run", "--config", "x.yaml"], "error: no configuration at x.yaml"),
        (["report", "/nowhere"], "error: no runs below /nowhere"),
        (["fetch", "mnst"], "error: no data set named 'mnst'"),
        (["bench", "--optimizers", "sgdd"], "error: unknown optimizer 'sgdd': did you mean 'sgd'"),
    ],
)
def test_mistakes(command, text, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    captured = capsys.readouterr()
    assert text in captured.err and "Traceback" not in captured.err


def test_missing_data_names_the_way_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CURVOPT_DATA", str(tmp_path))
    monkeypatch.setenv("CURVOPT_CACHE", str(tmp_path / "empty"))
    assert main(["run", "mnist5k_mlp", "sgd", f"out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "CURVOPT_DATA" in error and "python -m benchmarks fetch mnist" in error


@pytest.mark.parametrize(
    ("arguments", "text"), [(["--seeds", "0"], "at least 1, got '0'"), (["--seeds", "x"], "got 'x'")]
)
def test_counts(arguments, text, capsys):
    with pytest.raises(SystemExit):
        main(["bench", *arguments])
    assert text in capsys.readouterr().err


def test_fresh_leaves_strangers_alone(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert main(["run", "digits_mlp", "sgd", f"run_dir={tmp_path}/mine", "--fresh"]) == 2
    assert "holds files but no run: it is left alone" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_settings_may_stand_anywhere(tmp_path, capsys):
    assert main(["run", "digits_mlp", "sgd", "--fresh", *SMALL, f"out={tmp_path}"]) == 0
    assert "SGD: done after 20 steps" in capsys.readouterr().out
    for wrong in (["run", "digits_mlp", "sgd", "--frsh"], ["list", "steps=3"], ["run", "digits_mlp", "--fresh", "sgd"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "unrecognized arguments" in capsys.readouterr().err


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    assert "train one optimizer on one task" in capsys.readouterr().out


def test_an_optimizer_named_twice_is_one_run(tmp_path, capsys):
    command = ["bench", "--task", "digits_mlp", "--optimizers", "sgd,sgd", "--out", str(tmp_path)]
    settings = ["steps=3", "wandb.mode=disabled", "measure_every=0", "energy_every=0", "task.hidden=[4]"]
    assert main([*command, *settings]) == 0
    assert "One seed:" in capsys.readouterr().out
    assert main([*command, *settings]) == 0
    assert "SGD, seed 0: done, by an earlier call" in capsys.readouterr().err


def test_a_folder_that_can_not_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert main(["run", "digits_mlp", "sgd", *SMALL, f"out={tmp_path}/file"]) == 2
    assert f"{tmp_path}/file" in capsys.readouterr().err


def test_where_wandb_writes_is_said(tmp_path, capsys):
    settings = [s for s in SMALL if not s.startswith("wandb")]
    assert main(["run", "digits_mlp", "sgd", *settings, f"out={tmp_path}", "wandb.mode=offline"]) == 0
    assert "W&B: offline, run" in capsys.readouterr().out


def test_module_help():
    shown = subprocess.run([sys.executable, "-m", "benchmarks", "--help"], capture_output=True, text=True, check=True)
    for word in ("run", "bench", "tune", "report", "fetch", "list", "CURVOPT_DATA", "examples:"):
        assert word in shown.stdout
