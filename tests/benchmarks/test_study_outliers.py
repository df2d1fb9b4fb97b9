"""The outliers study: end to end at a tiny size, its pieces against references, its metrics on hand-made results."""

import json
import math

import pytest
import torch

from benchmarks.cli import main
from benchmarks.config import ConfigError
from benchmarks.studies import PartResult
from benchmarks.studies.claims import judge_all
from benchmarks.studies.config import load_study
from benchmarks.studies.folder import StudyFolder
from benchmarks.studies.problem import image_problem, mlp, seeded
from benchmarks.studies.spectra import of_classes, over_others, ratio, shape, shuffled, whole_spectrum

TINY = (
    "examples=80 side=4 hidden=[4] batch_size=20 steps=5 class_counts=[3,10] level_cap=10 width_examples=60 width_side=4 "
    "widths=[2,4] width_steps=5 rank_examples=10 rank_hidden=[2,4] rank_steps=10 line_examples=60 line_side=4 "
    "line_hidden=[4] line_batches=[20,60] line_steps=5 line_points=3 sharp_hidden=[4] sharp_batches=[20,60] "
    "sharp_levels=[10.0,9.0] sharp_steps=10"
).split()


@pytest.fixture(autouse=True)
def _bundled_digits(monkeypatch, tmp_path):
    """Without a data folder the study runs on the digits of scikit-learn."""
    monkeypatch.delenv("CURVOPT_DATA", raising=False)
    monkeypatch.setenv("CURVOPT_CACHE", str(tmp_path / "cache"))


def test_tiny_run(tmp_path):
    words = [*TINY, "--seeds", "1", "--out", str(tmp_path), "--wandb", "disabled"]
    assert main(["study", "outliers", *words]) == 0
    config = load_study("outliers", seeds=1, overrides=TINY)
    folder = StudyFolder(config.folder(tmp_path))
    found = json.loads(folder.claims_json.read_text())
    assert len(found["claims"]) == len(config.file.claims) and "digits" in found["data"]
    assert (folder.figures / "outliers.png").exists()
    arms = {p.arm: folder.finished(p) for p in config.study.parts(0)}
    metrics = config.study.metrics(arms)
    assert {c.metric for c in config.file.claims} <= set(metrics)
    # both runs start from the same weights, above the highest level: the same sharpness there
    assert metrics["batch_sharpness"].value == pytest.approx(1.0) and metrics["batch_sharpness"].null == 9.0
    # the ends of the lines have the solutions' losses
    line, ends = arms["line-plain"].values, {e: arms[f"plain-{e}"].values["loss"] for e in ("small", "large", "other")}
    assert line["same"]["loss"][0] == pytest.approx(ends["small"]) and line["same"]["loss"][-1] == pytest.approx(
        ends["large"]
    )
    assert line["starts"]["loss"][-1] == pytest.approx(ends["other"])
    # interpolated statistics are the solutions' own at the ends
    bn = arms["line-bn"].values["same"]["interpolated"]
    assert bn[0] == pytest.approx(arms["bn-small"].values["loss"])


def test_the_full_size_fits_the_bundled_digits():
    config = load_study("outliers", size="paper")
    assert config.study.dataset == "digits" and config.settings["widths"] == [10, 30, 70]


# ---- pieces
def test_fewer_classes():
    for loss in ("mse", "cross_entropy"):
        whole = image_problem("digits", examples=80, side=4, loss=loss)
        problem = of_classes(whole, 3)
        kept = whole.labels < 3
        assert torch.equal(problem.labels, whole.labels[kept]) and problem.rank == (3 if loss == "mse" else 2)
        assert torch.equal(problem.train[0], whole.train[0][kept])
        targets = problem.train[1] if loss == "cross_entropy" else problem.train[1].argmax(1)
        assert torch.equal(targets, problem.labels) and int(problem.test_labels.max()) == 2
    assert of_classes(image_problem("digits", examples=80, side=4, loss="mse"), 3).train[1].shape[1] == 3


def test_shuffled_labels():
    whole = image_problem("digits", examples=80, side=4, loss="mse")
    mixed = shuffled(whole, 0)
    assert torch.equal(mixed.train[0], whole.train[0]) and not torch.equal(mixed.labels, whole.labels)
    assert torch.equal(mixed.labels.bincount(), whole.labels.bincount())
    assert torch.equal(mixed.train[1].argmax(1), mixed.labels)
    noise = shuffled(whole, 0, gaussian=True)
    assert torch.equal(noise.labels, mixed.labels) and noise.train[0].shape == whole.train[0].shape
    # 1,280 normal numbers: mean within 4 of its standard errors
    assert abs(float(noise.train[0].mean())) < 4 / 1280**0.5
    assert not torch.equal(shuffled(whole, 1).labels, mixed.labels)


def test_whole_spectrum_against_torch_func():
    problem = image_problem("digits", examples=30, side=4, loss="cross_entropy")
    model = seeded(lambda: mlp([16, 2, 10]), 0)
    values = whole_spectrum(model, problem)
    named = {k: v.detach().double() for k, v in model.named_parameters()}
    shapes = [v.shape for v in named.values()]
    flat = torch.cat([v.flatten() for v in named.values()])

    def loss(theta):
        parts = theta.split([s.numel() for s in shapes])
        weights = {k: p.reshape(s) for k, p, s in zip(named, parts, shapes, strict=True)}
        return problem.loss_fn(torch.func.functional_call(model, weights, problem.train[0].double()), problem.train[1])

    exact = torch.linalg.eigvalsh(torch.func.hessian(loss)(flat)).flip(0)
    # both in float64; eigenvalues of order 1
    torch.testing.assert_close(values, exact, atol=1e-10, rtol=0)
    assert next(model.parameters()).dtype == torch.float32


def test_shape_of_a_planted_spectrum():
    bulk = 0.05 * (1 - (torch.arange(100, dtype=torch.float64) / 100) ** (2 / 3))
    values = torch.cat([torch.linspace(10, 4, 7, dtype=torch.float64), bulk, torch.zeros(43), -torch.ones(50) * 0.02])
    found = shape(values, 0)
    assert found["edge_count"] == found["last_gap_count"] == 7
    assert found["negative"] == pytest.approx(0.25) and found["lowest"] == pytest.approx(0.002)
    assert found["large"] == 7 and found["sharpness"] == 10 and found["parameters"] == 200
    # within .01 of zero: the bulk below .01, i.e. (j/100)^(2/3) > .8, and the zeros
    below = int(((torch.arange(100) / 100) ** (2 / 3) > 0.8).sum())
    assert found["near_zero"] == pytest.approx((below + 43) / 200)


def test_ratios():
    values = [8.0, 4.0, 1.0, 0.5, 0.4, 0.4, 0.3]
    assert ratio(values, 1) == 2 and ratio(values, 2) == 4 and ratio([1.0, 0.0], 1) == math.inf
    assert over_others(values, 2) == 2.0
    assert over_others(values[1:] + [0.3], 2) == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("class_counts=[2,10]", "class_counts must lie between 3 and 10, got [2, 10]"),
        ("widths=[8]", "widths must hold at least 2 numbers, smallest first, got [8]"),
        ("line_batches=[60,20]", "line_batches must hold at least 2 numbers, smallest first, got [60, 20]"),
        ("sharp_levels=[0.1,0.3]", "sharp_levels must hold losses, highest first, got [0.1, 0.3]"),
        ("line_points=2", "line_points must be at least 3, got 2"),
        ("rank_steps=0", "rank_steps must be at least 1, got 0"),
        ("line_side=3", "side=3 does not divide the images of digits"),
    ],
)
def test_bad_settings(word, text):
    with pytest.raises(ConfigError) as caught:
        load_study("outliers", overrides=[*TINY, word])
    assert text in str(caught.value)


# ---- claims on hand-made results
def part(values):
    return PartResult(values, [], dict)


def width(count, near_zero, large):
    record = {"edge_count": count, "near_zero": near_zero, "large": large, "negative": 0.2, "lowest": 0.01}
    return {**record, "negative_init": 0.4, "lowest_init": 0.4}


def spectrum(classes, place, size=3.0, elsewhere=1.1):
    """Eigenvalues whose neighbours have the ratio ``size`` at rank ``place`` and ``elsewhere`` at all others."""
    values = [100.0]
    for i in range(1, 2 * classes + 3):
        values.append(values[-1] / (size if i == place else elsewhere))
    return values


def hand_made():
    counts = (5, 8, 10)
    mse = {str(c): {"init": spectrum(c, 1, 1.5), "trained": spectrum(c, c, 2.5)} for c in counts}
    mse["2"] = {"init": spectrum(2, 1), "trained": spectrum(2, 4)}
    ce = {str(c): {"init": spectrum(c, 1), "trained": spectrum(c, c - 1, 1.6)} for c in counts}
    true = {"count": 9, "overlap_init": 0.6}
    lines = {"same": {"barrier": 0.01, "curvature": [0.02, -0.03]}, "starts": {"barrier": 0.8, "curvature": [0.1, 0.2]}}
    bn = {
        "same": {"barrier": 0.005, "interpolated_barrier": 0.01},
        "starts": {"barrier": 1.0, "interpolated_barrier": 1.25},
    }
    return {
        "width-ce": part({"widths": {"8": width(8, 0.48, 100), "16": width(9, 0.5, 180), "32": width(9, 0.54, 200)}}),
        "width-mse": part({"widths": {"8": width(12, 0.5, 90), "16": width(10, 0.6, 90), "32": width(11, 0.7, 90)}}),
        "rank": part({"large": {"loss": 5e-5, "share": 1.005}, "small": {"loss": 0.1, "share": 0.5}}),
        "classes-mse": part({"spectra": mse}),
        "classes-ce": part({"spectra": ce}),
        "labels-ce": part({"true": {**true, "overlap": 0.9}, "shuffled": {"count": 9}, "gaussian": {"count": 0}}),
        "labels-mse": part({"true": {**true, "overlap": 0.999}, "shuffled": {"count": 9}, "gaussian": {"count": 10}}),
        "sharp": part({"large": {"levels": {"0.3": 3.5, "0.2": 3.2}}, "small": {"levels": {"0.3": 2.5, "0.2": 2.0}}}),
        "line-plain": part(lines),
        "line-bn": part(bn),
    }


def test_metrics_on_hand_made_results():
    found = load_study("outliers").study.metrics(hand_made())
    expected = {
        "width_count_ce": (0, 9),
        "width_count_mse": (1, 11),
        "width_count_all_ce": (1, math.nan),
        "width_count_all_mse": (2, math.nan),
        "zero_growth_ce": (0.06, 0.48),
        "positive_growth_ce": (2.0, 100),
        "rank_interpolation": (1.005, 0.5),
        "negative_ce": (0.2, 0.4),
        "lowest_mse": (0.01, 0.4),
        "classes_mse": (2.5, 1.1),
        "classes_mse_largest": (2.5 / 1.1, 1.1 / 1.5),
        "classes_ce": (1.6, 1.1),
        "classes_ce_next": (1.1, 2.5),
        "two_classes": (1.1 / 3.0, 1.1),
        "shuffled_ce": (0, 0),
        "shuffled_mse": (0, 10),
        "ggn_overlap_ce": (0.9, 0.6),
        "batch_sharpness": (1.6, 0.2),
        "barrier_same": (0.01, 0.8),
        "barrier_other": (0.8, 0.01),
        "line_curvature": (0.03, 0.2),
        "bn_barrier_same": (0.005, 1.0),
        "bn_statistics": (0.5, 0.8),
    }
    for name, (value, null) in expected.items():
        assert found[name].value == pytest.approx(value), name
        assert found[name].null == pytest.approx(null, nan_ok=True), name


def test_verdicts_on_hand_made_results():
    config = load_study("outliers")
    claims = judge_all(config.file.claims, [config.study.metrics(hand_made())] * 3, "small")
    verdicts = {c.spec.id: c.verdict for c in claims}
    expected_failures = {c.spec.id for c in claims if c.spec.note.startswith("expected to fail")}
    assert {i for i, v in verdicts.items() if v == "not reproduced"} == expected_failures == {"O5", "O15"}
    assert {i for i, v in verdicts.items() if v == "not run at this size"} == {"O26", "O27"}
    assert set(verdicts.values()) == {"reproduced", "not reproduced", "not run at this size"}


def test_what_was_not_reached_is_not_a_value():
    arms = hand_made()
    arms["rank"] = part({"large": {"loss": 1e-3, "share": 1.0}, "small": {"loss": 0.1, "share": 0.5}})
    arms["sharp"] = part({"large": {"levels": {}}, "small": {"levels": {"0.3": 2.0}}})
    arms["line-bn"] = part({n: {"barrier": 0.0, "interpolated_barrier": 0.0} for n in ("same", "starts")})
    found = load_study("outliers").study.metrics(arms)
    assert math.isnan(found["rank_interpolation"].value) and math.isnan(found["batch_sharpness"].value)
    assert found["bn_statistics"].value == 1.0
