"""Tables and figures from hand-made logs whose answers are known."""

import io
import math
import re

import pandas as pd
import pytest
from rich.console import Console

from benchmarks.config import ConfigError, compose_run
from benchmarks.protocol.checkpoint import VERSION, RunFolder
from benchmarks.report import plots
from benchmarks.report.plots import all_figures
from benchmarks.report.records import RunRecord, by_label, distinguish, find_records, load_record
from benchmarks.report.table import Spread, markdown, summarise, terminal, verdict
from benchmarks.report.write import write_report


def _record(label, seed, losses, cost=1.0, seconds=0.01, status="done", products=0):
    """A run evaluated every 10 steps; a step costs ``cost`` gradient-equivalents and ``seconds``."""
    config = compose_run("digits_mlp", "sgd", [f"seed={seed}"])
    config.optimizer["label"] = label
    steps = [10 * i for i in range(len(losses))]
    frame = pd.DataFrame(
        {
            "train_loss": losses,
            "test_accuracy": [0.5 + 0.01 * i for i in range(len(losses))],
            "gradient_equivalents": [cost * s for s in steps],
            "seconds": [seconds * s for s in steps],
            "seconds_base": [0.5 * seconds * s for s in steps],
            "seconds_refresh": [0.3 * seconds * s for s in steps],
            "seconds_projection": [0.2 * seconds * s for s in steps],
            "products": products,
            "chi_update": [0.25, *[math.nan] * (len(losses) - 2), 0.75],
            "chi_gradient": 0.5,
            "chi_full_gradient": 0.9,
            "lambda/1": 4.0,
            "lambda/2": 2.0,
            "edge": 20.0,
        },
        index=pd.Index(steps, name="step"),
    )
    return RunRecord(config, frame, {"status": status, "reason": "", "step": steps[-1], "data": "made up"})


@pytest.fixture
def records():
    return [
        _record("quick", 0, [2.0, 0.5, 0.09, 0.01], cost=30.0, seconds=0.1, products=7),
        _record("slow", 0, [2.0, 1.0, 0.5, 0.1], cost=1.0, seconds=0.01),
        _record("lost", 0, [2.0, 3.0, 9.0], status="diverged"),
    ]


def test_to_target_is_the_first_evaluation_at_or_below_it(records):
    quick, slow, lost = records
    assert quick.to_target(0.1, "step") == 20 and quick.to_target(0.5, "step") == 10
    assert quick.to_target(0.1, "gradient_equivalents") == 600 and quick.to_target(0.1, "seconds") == pytest.approx(2.0)
    assert slow.to_target(0.1, "step") == 30  # exactly at the target counts
    assert math.isinf(slow.to_target(0.05, "seconds")) and math.isinf(lost.to_target(0.1, "step"))


def test_rows_are_sorted_and_right(records):
    rows = summarise(records, 0.1)
    assert [r.label for r in rows] == ["quick", "slow", "lost"]
    quick = rows[0]
    assert quick.train_loss.median == 0.01 and quick.test_accuracy.median == pytest.approx(0.53)
    assert quick.to_target["gradient_equivalents"].median == 600
    # 30 steps of 100 ms: half base, .3 refresh, .2 projection
    assert (quick.base.median, quick.refresh.median, quick.projection.median) == pytest.approx((50.0, 30.0, 20.0))
    assert quick.chi.median == 0.5 and quick.products.median == 7
    assert rows[2].status == "diverged at step 20" and math.isinf(rows[2].train_loss.median)


def test_verdict_names_winners_and_what_they_are_worth(records):
    lines = verdict(summarise(records, 0.1), 0.1)
    assert lines[0] == "Lowest train loss at the end: quick (0.01)."
    assert lines[1] == "Fewest steps to 0.1: quick (20); then slow (30)."
    assert lines[2] == "Fewest gradient-equivalents to 0.1: slow (30); then quick (600)."
    assert lines[3] == "Fewest seconds to 0.1: slow (0.30); then quick (2.00)."
    assert lines[4].startswith("One seed:") and "no ranking is claimed" in lines[4]
    assert not any("better" in line for line in lines)


def test_verdict_on_ties_and_misses():
    twins = [_record("a", 0, [1.0, 0.1]), _record("b", 0, [1.0, 0.1]), _record("c", 0, [1.0, 0.4])]
    assert verdict(summarise(twins, 0.1), 0.1)[1] == "Fewest steps to 0.1: a and b (10, a tie)."
    assert verdict(summarise(twins, 0.01), 0.01)[1] == "No optimizer reached a train loss of 0.01."


def test_spread_over_seeds_is_shown_and_a_miss_stays_in_the_median():
    runs = [
        _record("a", 0, [2.0, 0.05, 0.02]),
        _record("a", 1, [2.0, 0.3, 0.04]),
        _record("a", 2, [2.0, 0.9, 0.8]),
    ]
    row = summarise(runs, 0.1)[0]
    assert row.seeds == 3 and row.train_loss.text(".4g") == "0.04 (0.02 to 0.8)"
    assert row.to_target["step"].text(",.0f") == "20 (10 to not reached)"
    assert "Medians over 3 seeds" in verdict([row], 0.1)[-1] and "too few seeds" in verdict([row], 0.1)[-1]
    assert Spread((math.nan, math.nan)).text(".2f") == "-" and Spread((3.0, 3.0)).text(".1f") == "3.0"


def test_lucky_survivors_do_not_win():
    """Two of three seeds diverged: the one that did not is no median."""
    wild = [_record("wild", s, [2.0, 0.001], status="done" if s == 1 else "diverged") for s in range(3)]
    tame = [_record("tame", s, [2.0, 0.1 * (s + 1)], status="diverged" if s == 2 else "done") for s in range(3)]
    rows = summarise([*wild, *tame], None)
    assert [r.label for r in rows] == ["tame", "wild"]
    text = markdown(rows, None)
    assert "| tame | 2 done, 1 diverged | 0.2 (0.1 to no end) | 51.00 (no end to 51.00) % |" in text
    assert "| wild | 2 diverged, 1 done | no end (0.001 to no end) |" in text
    assert verdict(rows, None)[0] == "Lowest train loss at the end: tame (0.2 (0.1 to no end))."


def test_equal_losses_at_the_end_are_a_tie():
    rows = summarise([_record("a", 0, [1.0, 0.1]), _record("b", 0, [2.0, 0.1]), _record("c", 0, [1.0, 0.4])], None)
    assert verdict(rows, None)[0] == "Lowest train loss at the end: a and b (0.1, a tie)."


def test_unequal_numbers_of_seeds_are_said():
    runs = [_record("a", s, [1.0, 0.1]) for s in range(3)] + [_record("b", s, [1.0, 0.1]) for s in range(2)]
    assert "Medians over 2 to 3 seeds" in verdict(summarise(runs, None), None)[-1]
    assert "One seed for some of them" in verdict(summarise([*runs, _record("c", 0, [1.0, 0.1])], None), None)[-1]


def test_only_seeds_of_one_setting_are_pooled():
    runs = [_record("a", s, [1.0, 0.1]) for s in range(2)]
    other = _record("a", 0, [1.0, 0.2])
    other.config.optimizer["lr"] = 0.5
    again = _record("a", 1, [1.0, 0.1])
    kept = distinguish([*runs, other, again, _record("b", 0, [1.0, 0.1])])
    assert [(r.label, r.config.seed) for r in kept] == [
        ("a (lr=0.8)", 0),
        ("a (lr=0.8)", 1),
        ("a (lr=0.5)", 0),
        ("b", 0),
    ]
    assert [(r.label, r.seeds) for r in summarise(kept, None)] == [("a (lr=0.8)", 2), ("b", 1), ("a (lr=0.5)", 1)]


def test_a_page_says_when_runs_are_not_of_one_kind(tmp_path):
    line = '{"step": %d, "train_loss": %g, "seconds": 1.0, "gradient_equivalents": %d}\n'
    for name, commit, steps, cost in (("sgd", "abc", 10, 4.0), ("adamw", "def+", 20, 5.0)):
        run = RunFolder(tmp_path / name)
        run.claim(compose_run("digits_mlp", name, [f"steps={steps}"]), {"version": VERSION, "commit": commit})
        run.log.write_text(line % (0, 2.0, 0) + line % (steps, 0.005, steps))
        run.finish({"status": "done", "reason": "", "step": steps, "data": "made up", "product_cost": cost})
    out = Console(record=True, width=120, file=io.StringIO())
    text = write_report([tmp_path / "sgd", tmp_path / "adamw"], tmp_path / "out", out).read_text()
    assert "Not like for like: the runs differ in steps (10, 20)." in text
    assert "made by different versions of the code (def+, abc): --fresh makes them anew" in text
    assert "counts 4.0 to 5.0 of them, by run" in text and "rounded up to a multiple of 50" in text


def test_a_far_border_does_not_flatten_the_eigenvalues(records, tmp_path, monkeypatch):
    records[1].frame["edge"] = 4000.0
    drawn = {}
    monkeypatch.setattr(plots, "save", lambda figure, table, folder, name: drawn.setdefault("figure", figure))
    plots.eigenvalue_figure(records, tmp_path, "title")
    quick, slow = drawn["figure"].axes[:2]
    assert len(quick.lines) == 3 and not quick.texts  # two eigenvalues and the border
    assert len(slow.lines) == 2 and slow.texts[0].get_text() == "2/lr = 4,000, above"
    assert slow.get_ylim()[1] < 100


def test_tables_hold_the_same_numbers(records):
    rows = summarise(records, 0.1)
    text = markdown(rows, 0.1)
    assert "| quick | done | 0.01 | 53.00 % | 20 | 600 | 2.00 |" in text
    assert "| lost | diverged at step 20 | - | - | not reached | not reached | not reached |" in text
    assert "| quick | 7 | - | 50.00 | 30.00 | 20.00 | 0.50 |" in text
    console = Console(record=True, width=100, file=io.StringIO())
    for table in terminal(rows, 0.1, "title"):
        console.print(table)
    shown = console.export_text()
    assert re.search(r"quick +done +0\.01 +53\.00 % +20 +600 +2\.00", shown)


def test_figures_come_with_their_data(records, tmp_path):
    paths = all_figures(records, tmp_path, "a title", 0.1)
    assert [p.name for p in paths] == [
        "loss_against_steps.png",
        "loss_against_gradient_equivalents.png",
        "loss_against_seconds.png",
        "alignment.png",
        "eigenvalues.png",
    ]
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000
        assert path.with_suffix(".csv").exists()
    loss = pd.read_csv(tmp_path / "loss_against_steps.csv")
    quick = loss[loss.optimizer == "quick"]
    assert list(quick.step) == [0, 10, 20, 30] and list(quick.train_loss) == [2.0, 0.5, 0.09, 0.01]
    chi = pd.read_csv(tmp_path / "alignment.csv")
    assert list(chi[chi.optimizer == "slow"].chi_update.dropna()) == [0.25, 0.75]
    files = [q for p in paths for q in (p, p.with_suffix(".svg"))]
    before = [p.read_bytes() for p in files]
    all_figures(records, tmp_path, "a title", 0.1)
    assert [p.read_bytes() for p in files] == before  # no dates inside


def _write(folder, lines, result=None, config=None):
    run = RunFolder(folder)
    run.claim(config or compose_run("digits_mlp", "adamw"), {"version": VERSION})
    run.log.write_text("".join(lines))
    if result is not None:
        run.finish(result)


def test_reading_back_torn_and_unfinished_runs(tmp_path):
    _write(
        tmp_path / "a",
        ['{"step": 0, "train_loss": 2.0}\n', '{"step": 10, "train_loss": "NaN", "edge": "Infinity"}\n', '{"st'],
    )
    record = load_record(tmp_path / "a")
    assert record.status == "unfinished" and record.label == "AdamW"
    assert list(record.frame.index) == [0, 10] and math.isnan(record.frame.train_loss[10])
    assert record.column("nothing").empty and math.isnan(record.last("nothing"))
    _write(tmp_path / "b", [], {"status": "diverged", "reason": "at once", "step": 0, "product_cost": math.nan})
    assert load_record(tmp_path / "b").status == "diverged"
    assert math.isnan(load_record(tmp_path / "b").result["product_cost"])
    assert len(find_records(tmp_path)) == 2 and list(by_label(find_records(tmp_path))) == ["AdamW"]
    with pytest.raises(ConfigError, match="no runs below"):
        find_records(tmp_path / "none")


def test_page(tmp_path):
    line = '{"step": %d, "train_loss": %g, "test_accuracy": 0.9, "seconds": 1.0, "gradient_equivalents": %d}\n'
    result = {"status": "done", "reason": "", "step": 10, "data": "made up", "warnings": ["GapWarning: no gap"]}
    _write(tmp_path / "a", [line % (0, 2.0, 0), line % (10, 0.0005, 10)], result)
    out = Console(record=True, width=120, file=io.StringIO())
    path = write_report([tmp_path / "a"], tmp_path / "out", out)
    text = path.read_text()
    for part in (
        "# digits MLP, cross-entropy",
        "Data: made up.",
        "Seeds: 0.",
        "| AdamW | done | 0.0005 |",
        "| AdamW | `adamw` lr=0.016",
        "AdamW: GapWarning: no gap",
        "(loss_against_steps.png)",
    ):
        assert part in text, part
    assert "Fewest steps to 0.00084: AdamW (10)." in out.export_text()
    other = compose_run("mnist5k_mlp", "adamw")
    _write(tmp_path / "b", [line % (0, 2.0, 0)], result, other)
    with pytest.raises(ConfigError, match="compares runs of one task, these are of digits_mlp, mnist5k_mlp"):
        write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "out", out)
