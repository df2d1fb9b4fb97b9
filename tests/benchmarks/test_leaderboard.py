"""The scorer on hand-made logs: every score in the tables is known before it is computed."""

import dataclasses
import functools
import json
import math

import pandas as pd
import pytest

from benchmarks.config import compose_run, to_yaml
from benchmarks.files import atomic_write_json
from benchmarks.protocol.comparison import SuiteConfig, Unit
from benchmarks.protocol.search import Trial, Tuned
from benchmarks.report.leaderboard import (
    markdown,
    profile_table,
    repetition,
    seconds_table,
    task_table,
    tuning_table,
)
from benchmarks.report.records import load_record
from benchmarks.report.standings import _standing
from benchmarks.report.suite_plots import (
    cost_figure,
    costs,
    curvature_figure,
    curve,
    curves_figure,
    profile_figure,
    sensitivity_figure,
)
from benchmarks.report.verdicts import claim, in_short, judged, uses_curvature
from benchmarks.sinks.jsonl import encode

INF = math.inf


@functools.cache
def _composed(optimizer):
    return compose_run("noisy_quadratic", optimizer, ["steps=40"])


def _log(folder, optimizer, label, seed, reaches, status="done"):
    """A run of 40 steps, evaluated every 10: loss 1 before step ``reaches``, .01 from there on; 3 gradients a step."""
    composed = _composed(optimizer)
    config = dataclasses.replace(composed, seed=seed, optimizer={**composed.optimizer, "label": label})
    path = folder / f"{label}-{seed}"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    rows = []
    for step in range(0, 41, 10):
        loss = 0.01 if step >= reaches else 1.0
        accuracy = 0.9 if step >= reaches else 0.1
        rows.append({"step": step, "train_loss": loss, "test_accuracy": accuracy})
        rows[-1] |= {"gradient_equivalents": 3.0 * step, "seconds": 0.5 * step}
    (path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    reason = "" if status == "done" else "the loss was not finite"
    atomic_write_json(path / "result.json", encode({"status": status, "reason": reason, "step": 40}))
    return load_record(path)


def _tuned():
    trials = [(0.01, 2.0), (0.1, 1.0), (1.0, INF)]
    return Tuned("lr", [Trial({"lr": v}, s, "search", 100.0, 0.25) for v, s in trials])


def _row(folder, optimizer, label, reaches, status="done"):
    records = [_log(folder, optimizer, label, seed, r, status) for seed, r in enumerate(reaches)]
    return _standing(Unit("noisy_quadratic", optimizer), label, records, 0.02, _tuned(), records, [{"same": True}] * 6)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    return {
        "fast": _row(folder, "interpolated_sgd", "fast", [10] * 6),
        "base": _row(folder, "sgd_momentum", "base", [20, 20, 20, 20, 20, 20]),
        "mixed": _row(folder, "lion", "mixed", [10, 10, 10, 30, 30, INF]),
        "lost": _row(folder, "adamw", "lost", [INF] * 6, status="diverged"),
    }


def test_scores_of_a_run(rows):
    fast = rows["fast"]
    assert fast.to_target == {"step": [10.0] * 6, "gradient_equivalents": [30.0] * 6, "seconds": [5.0] * 6}
    assert fast.train_loss == [0.01] * 6 and fast.accuracy == [0.9] * 6 and fast.lost == 0
    # log10: 0 at step 0, then -2: (10 * -1 + 30 * -2) / 40
    assert fast.area == pytest.approx([-1.75] * 6)
    assert rows["mixed"].to_target["step"] == [10, 10, 10, 30, 30, INF]
    lost = rows["lost"]
    assert lost.lost == 1.0 and lost.train_loss == [INF] * 6 and lost.reasons == ["the loss was not finite"]
    assert lost.to_target["step"] == [INF] * 6 and lost.area == [INF] * 6


def test_claims(rows):
    # six pairs on one side: p = 2/64; ten steps instead of twenty
    assert claim(rows["fast"], rows["base"]) == "better (p 0.031, x0.50 [0.50, 0.50])"
    assert claim(rows["base"], rows["fast"]) == "worse (p 0.031, x2.00 [2.00, 2.00])"
    assert claim(rows["lost"], rows["base"]) == "worse (p 0.031)"
    assert claim(rows["base"], rows["base"]) == "no difference shown (p 1.00, x1.00 [1.00, 1.00])"
    assert claim(rows["mixed"], rows["base"]).startswith("no difference shown (p ")
    # ratios seed by seed: .5 .5 .5 1.5 1.5 inf
    assert claim(rows["mixed"], rows["base"]).endswith(", x1.00 [0.50, inf])")
    assert claim(rows["base"], rows["lost"]) == "better (p 0.031)"  # no ratio to what never gets there
    assert claim(rows["lost"], rows["lost"]).endswith("x1.00 [1.00, 1.00])")
    few = dataclasses.replace(rows["fast"], to_target={"step": [10.0] * 5})
    assert claim(few, rows["base"]) == "too few seeds (5)"


def test_where_each_optimizer_wins_and_loses(rows):
    """Beside the better of the baselines, by each criterion, on two tasks, of which one has no target."""
    config = SuiteConfig(baselines=["sgd_momentum", "adamw"])
    second = [
        dataclasses.replace(rows[k], task="two", to_target={}, train_loss=[v] * 6)
        for k, v in (("fast", 0.5), ("base", 0.1))
    ]
    slow = {"step": [10.0] * 6, "gradient_equivalents": [90.0] * 6, "seconds": [10.0] * 6}
    dear = dataclasses.replace(rows["fast"], to_target=slow)
    found = [dear, rows["base"], rows["mixed"], rows["lost"], *second]
    short = in_short(found, config)
    assert short.header == ["optimizer", "curvature", "steps", "gradient-equivalents", "seconds", "final train loss"]
    assert short.body == [
        ["fast", "yes", "better: noisy_quadratic", "worse: noisy_quadratic", "1 open", "worse: two; 1 open"],
        ["mixed", "no", "1 open", "1 open", "1 open", "1 open"],
    ]
    assert short.sentences == [
        "Steps to target, 1 curvature-aware setting, 1 in all over the tasks: 1 better.",
        "Gradient-equivalents to target, 1 curvature-aware setting, 1 in all over the tasks: 1 worse.",
        "Seconds to target, 1 curvature-aware setting, 1 in all over the tasks: 1 open.",
        "Final train loss, 1 curvature-aware setting, 2 in all over the tasks: 1 worse, 1 open.",
    ]
    few = [dataclasses.replace(r, train_loss=r.train_loss[:5], to_target={}) for r in found[:2]]
    assert in_short(few, config).body == [["fast", "yes", "1 too few seeds"]]
    assert judged(rows["fast"], rows["base"]) == ("better", pytest.approx(2 / 64))
    assert in_short([rows["base"]], config).body == []


@pytest.mark.parametrize(
    ("optimizer", "aware"),
    [
        ("sgd_momentum", False), ("control_rank0", False), ("control_random", False), ("control_ire", False),
        ("bulk_sgd", True), ("history_sgd", True), ("subspace_lbfgs", True), ("control_oracle", True),
        ("control_eigen_sam", True),
    ],
)  # fmt: skip
def test_who_uses_curvature(optimizer, aware, tmp_path):
    record = _log(tmp_path, optimizer, optimizer, 0, 10)
    assert uses_curvature(_standing(Unit("noisy_quadratic", optimizer), "x", [record], 0.02, None)) is aware


def test_the_leaderboard_of_a_task(rows):
    config = SuiteConfig(baselines=["sgd_momentum", "adamw"])
    header, body = task_table(list(rows.values()), config)
    assert header == [
        "optimizer", "steps", "gradient-equivalents", "seconds", "train loss", "accuracy, %", "mean log10 loss",
        "lost runs", "against the best baseline",
    ]  # fmt: skip
    lines = {line[0]: line for line in body}
    assert [line[0] for line in body] == ["fast", "base", "mixed", "lost"]  # a tie of medians goes by name
    assert lines["fast"][1:4] == ["10 [10, 10]", "30 [30, 30]", "5.00 [5.00, 5.00]"]
    assert lines["mixed"][1].startswith("20 [10, ") and lines["lost"][1] == "missed"
    assert lines["fast"][5] == "90.00 [90.00, 90.00]" and lines["lost"][5] == "-"
    assert lines["lost"][7] == "100 %" and lines["base"][8] == "the baseline"
    text = markdown(header, body).splitlines()
    assert text[0].startswith("| optimizer | steps |") and len(text) == 6
    assert text[1] == "|---|" + "---:|" * 7 + "---|"  # words to the left, numbers to the right
    assert markdown(["a", "b"], [["x|y", "1 <b>\n2"]]).splitlines()[2] == "| x\\|y | 1 \\<b> 2 |"


def test_nothing_is_said_of_seconds_that_were_timed_once(rows):
    few = [dataclasses.replace(rows[name], retimed=rows[name].retimed[:1]) for name in ("fast", "base")]
    assert claim(*few, "seconds") == "too few timings (1, x0.50 [0.50, 0.50])"
    assert claim(*few).startswith("better (p 0.031") and judged(*few, "seconds")[0] == "too few timings"
    assert judged(rows["fast"], rows["base"], "seconds")[0] == "better"
    slow = dataclasses.replace(rows["fast"], to_target={**rows["fast"].to_target, "seconds": [500.0] * 6})
    for metric, first in (("step", "fast"), ("seconds", "base")):
        config = SuiteConfig(baselines=["sgd_momentum"], metric=metric)
        assert task_table([slow, rows["base"]], config)[1][0][0] == first


def test_seconds_are_those_of_the_seeds_that_were_timed_alone(tmp_path):
    """First runs at half a second a step, two seeds once more at 0.1 and 0.3; step 20 is the target's."""
    records = [_log(tmp_path / "first", "sgd_momentum", "base", seed, 20) for seed in range(3)]
    again = [_log(tmp_path / "again", "sgd_momentum", "base", seed, 20) for seed in range(2)]
    for record, pace in zip(again, (0.1, 0.3), strict=True):
        record.frame["seconds"] = [pace * step for step in record.frame.index]
    unit, same = Unit("noisy_quadratic", "sgd_momentum"), {"same": True}
    row = _standing(unit, "base", records, 0.02, _tuned(), again, [same, same])
    assert row.to_target["seconds"] == pytest.approx([2.0, 6.0, 4.0])  # the third has no timing of its own: the median
    assert row.to_target["step"] == [20.0] * 3 and row.seconds == [20.0] * 3
    header, (line,) = seconds_table([row])
    assert dict(zip(header, line, strict=True))["ms a step"] == "200.000" and line[-1] == "2 of 2"
    assert repetition([row]) == "All 2 re-timed runs gave the same losses bit for bit."
    other = {
        "same": False,
        "difference": "train_loss at step 10: 1.0, then 2.0",
        "operations": ["put_"],
        "surroundings": [],
    }
    text = repetition([dataclasses.replace(row, repeats=[same, other])])
    assert text.startswith("Of 2 re-timed runs 1 did not give the same losses bit for bit:")
    assert text.endswith(
        "- noisy_quadratic, base, seed 1: NOT the same: train_loss at step 10: 1.0, then 2.0; "
        "non-deterministic operation: put_"
    )
    assert repetition([dataclasses.replace(row, retimed=[], repeats=[])]).startswith("No run was done twice")


def test_the_cost_of_tuning(rows):
    _, body = tuning_table([rows["fast"]])
    assert body[0][2:] == ["3", "1", "300", "0.8", "yes", "1.0"]
    edge = dataclasses.replace(rows["fast"], tuned=Tuned("lr", _tuned().trials[:2]))
    assert tuning_table([edge])[1][0][6] == "NO: lr at the edge of what was tried"


def test_profiles_over_tasks(rows):
    slow, quick = ({"step": [x] * 6, "gradient_equivalents": [3 * x] * 6} for x in (60.0, 30.0))
    second = [dataclasses.replace(rows["fast"], task="two", to_target=slow)]
    second += [dataclasses.replace(rows["base"], task="two", to_target=quick)]
    axes = {"step": "steps", "gradient_equivalents": "gradient-equivalents"}
    header, body = profile_table([rows["fast"], rows["base"], *second], axes)
    assert header == ["optimizer", "score in steps", "ratios", "score in gradient-equivalents", "ratios"]
    # each is first once and twice as slow once: (3 + 2) / 6
    line = ["0.833", "1.00, 2.00"] * 2
    assert body == [["base", *line], ["fast", *line]]
    _, body = profile_table([rows["base"], rows["lost"], rows["fast"]], axes)
    assert [x[:3] for x in body] == [
        ["fast", "1.000", "1.00"],
        ["base", "0.667", "2.00"],
        ["lost", "0.000", "missed"],
    ]
    without = [dataclasses.replace(r, to_target={}) for r in rows.values()]
    assert profile_table(without, axes) == ([], [])
    assert profile_table([rows["lost"]], axes) == ([], [])  # a task that nobody solved


def test_figures_show_the_ratios_and_the_trials(rows, tmp_path):
    places = {label: i for i, label in enumerate(rows)}
    drawn = profile_figure([rows["fast"], rows["base"], rows["lost"]], tmp_path)
    table = pd.read_csv(drawn.path.with_suffix(".csv"))
    steps = table[table["axis"] == "step"].set_index("optimizer")["ratio"]
    assert steps.to_dict() == {"fast": 1.0, "base": 2.0, "lost": INF} and drawn.path.stat().st_size > 1000
    assert profile_figure([dataclasses.replace(rows["fast"], to_target={})], tmp_path / "none") is None
    drawn = sensitivity_figure([rows["fast"], rows["lost"]], places, tmp_path)
    table = pd.read_csv(drawn.path.with_suffix(".csv"))
    assert table["train_loss"].tolist() == [2.0, 1.0, INF] * 2 and table["value"].tolist() == [0.01, 0.1, 1.0] * 2
    text = drawn.markdown("python -m benchmarks suite x")
    assert text.startswith("![noisy_quadratic: final train loss of every") and "\\\nEvery trial" in text
    assert "[sensitivity_noisy_quadratic.csv](sensitivity_noisy_quadratic.csv). Made by `python -m benchmarks" in text


def test_curves_are_medians_with_the_spread_over_seeds(rows, tmp_path):
    # one run of six never gets there, two do after 20 steps
    assert curve(rows["mixed"].records, "train_loss") == [
        (0.0, 1.0, 1.0, 1.0), (10.0, 0.505, 0.01, 1.0), (20.0, 0.505, 0.01, 1.0), (30.0, 0.01, 0.01, 1.0), (40.0, 0.01, 0.01, 1.0),
    ]  # fmt: skip
    assert [p[0] for p in curve(rows["mixed"].records, "train_loss", "gradient_equivalents")] == [0, 30, 60, 90, 120]
    short = [dataclasses.replace(r, frame=r.frame.loc[:20]) for r in rows["base"].records[:4]]
    ended = curve([*short, *rows["base"].records[4:]], "train_loss")
    assert [p[0] for p in ended] == [0, 10, 20] and ended[2] == (20.0, 0.01, 0.01, 0.01)  # most have ended by then
    drawn = curves_figure(list(rows.values()), {label: i for i, label in enumerate(rows)}, 0.02, tmp_path)
    table = pd.read_csv(drawn.path.with_suffix(".csv"))
    fast = table[(table.optimizer == "fast") & (table.axis == "seconds")]
    assert fast.x.tolist() == [5.0, 10.0, 15.0, 20.0] and fast.train_loss.tolist() == [0.01] * 4  # 0 has no logarithm
    assert "best fast" in drawn.alt


def test_what_a_step_costs(rows, tmp_path):
    records = [dataclasses.replace(r, frame=r.frame.copy()) for r in rows["fast"].records]
    for i, r in enumerate(records):
        given = {"gradients": 1.0, "gradient_equivalents": 3.0, "seconds_base": 2e-3, "seconds_refresh": 1e-3 * i}
        for name, slope in {**given, "seconds_products": 4e-4 * i, "seconds_projection": 0.0}.items():
            r.frame[name] = slope * r.frame.index
    row = dataclasses.replace(rows["fast"], records=records)
    expected = {
        "seconds_base": 2.0,
        "seconds_products": 1.0,
        "seconds_orthogonalisation": 1.5,
        "seconds_refresh": 0.0,
        "seconds_projection": 0.0,
        "gradients": 1.0,
        "products": 2.0,
    }
    assert costs(row) == pytest.approx(expected)
    older = [dataclasses.replace(r, frame=r.frame.drop(columns="seconds_products")) for r in records]
    unsplit = {"seconds_products": 0.0, "seconds_orthogonalisation": 0.0, "seconds_refresh": 2.5}
    assert costs(dataclasses.replace(row, records=older)) == pytest.approx({**expected, **unsplit})
    table = pd.read_csv(cost_figure([row, rows["lost"]], tmp_path).path.with_suffix(".csv"))
    assert table.optimizer.tolist() == ["fast"] and table.products.tolist() == [2.0]
    assert cost_figure([rows["lost"]], tmp_path) is None


def test_curvature_stands_beside_the_loss_where_it_was_measured(rows, tmp_path):
    assert curvature_figure(list(rows.values()), {}, tmp_path) is None
    records = [dataclasses.replace(r, frame=r.frame.copy()) for r in rows["base"].records]
    for r in records:
        measured = {"lambda/1": 10.0, "lambda/2": 1.0, "edge": 20.0, "chi_update": 0.25, "chi_full_gradient": 0.75}
        for name, value in measured.items():
            r.frame[name] = value
    drawn = curvature_figure([dataclasses.replace(rows["base"], records=records)], {"base": 0}, tmp_path)
    table = pd.read_csv(drawn.path.with_suffix(".csv"))
    assert {c: set(t["median"]) for c, t in table.groupby("column") if c != "train_loss"} == {
        "lambda/1": {10.0}, "lambda/2": {1.0}, "chi_update": {0.25}, "chi_full_gradient": {0.75},
    }  # fmt: skip
