"""The density study: end to end at a tiny size, its quadrature distance, and its metrics on hand-made results."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from benchmarks.cli import main
from benchmarks.config import ConfigError
from benchmarks.studies import PartResult
from benchmarks.studies.claims import judge_all
from benchmarks.studies.config import load_study
from benchmarks.studies.density import convolutional, distance
from benchmarks.studies.folder import StudyFolder
from benchmarks.studies.problem import batches, flat_weights, image_problem, mlp, seeded
from benchmarks.studies.training import descend

TINY = (
    "examples=60 side=4 hidden=[4] batch_size=20 steps=10 middle=5 record_at=[2] leading=12 lanczos_steps=12 probes=2 "
    "oracle_examples=60 oracle_side=4 oracle_hidden=[4] oracle_train_steps=5 oracle_steps=15 oracle_probes=3 "
    "bn_examples=60 bn_hidden=[4] bn_steps=10 bn_early=2 bn_middle=5 mass_batches=2 cnn_examples=60 cnn_side=4 "
    "cnn_channels=[2] cnn_steps=4 rates=[0.1,0.4] rate_steps=5"
).split()


@pytest.fixture(autouse=True)
def _bundled_digits(monkeypatch, tmp_path):
    """Without a data folder the study runs on the digits of scikit-learn."""
    monkeypatch.delenv("CURVOPT_DATA", raising=False)
    monkeypatch.setenv("CURVOPT_CACHE", str(tmp_path / "cache"))


def test_tiny_run(tmp_path, capsys):
    words = [*TINY, "--seeds", "1", "--out", str(tmp_path), "--wandb", "disabled"]
    assert main(["study", "density", *words]) == 0
    config = load_study("density", seeds=1, overrides=TINY)
    folder = StudyFolder(config.folder(tmp_path))
    found = json.loads(folder.claims_json.read_text())
    assert len(found["claims"]) == len(config.file.claims) and "digits" in found["data"]
    assert (folder.figures / "density.png").exists() and (folder.figures / "density.csv").exists()
    arms = {p.arm: folder.finished(p) for p in config.study.parts(0)}
    assert {c.metric for c in config.file.claims} <= set(config.study.metrics(arms))
    # loss is the same function in both modes, for the statistics are those of all training examples as one batch
    for row in arms["relu-bn"].rows:
        if "loss_eval" in row:
            assert row["loss_eval"] == pytest.approx(row["loss_train"], rel=1e-4)  # float32 sums over 60 examples


def test_distance_by_hand_and_against_scipy():
    assert distance(np.array([0.0, 1.0]), np.array([0.5, 0.5]), np.array([0.0, 0.0, 1.0, 1.0])) == pytest.approx(0)
    assert distance(np.array([0.5]), np.array([1.0]), np.array([0.0, 1.0])) == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    nodes, exact = rng.normal(size=7), rng.normal(size=30)
    weights = rng.dirichlet(np.ones(7))
    assert distance(nodes, weights, exact) == pytest.approx(wasserstein_distance(nodes, exact, weights), rel=1e-12)


def test_convolutional_network():
    plain = convolutional([8, 16], 14, 10, batch_norm=False)
    assert sum(p.numel() for p in plain.parameters()) == 2698  # 80 + 1,168 + 1,450
    bn = convolutional([8, 16], 14, 10, batch_norm=True)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in bn) == 2
    assert bn(torch.randn(3, 1, 14, 14)).shape == (3, 10)
    deep = convolutional([2, 2, 2, 2], 4, 10, batch_norm=True)  # more layers than can be pooled
    assert sum(isinstance(m, torch.nn.MaxPool2d) for m in deep) == 2 and deep(torch.randn(3, 1, 4, 4)).shape == (3, 10)


def test_the_full_size_fits_the_bundled_digits():
    config = load_study("density", size="paper")
    assert config.study.dataset == "digits" and len(config.settings["cnn_channels"]) == 4


@pytest.mark.parametrize("batch_size", [20, 500])
def test_descend_is_sgd(batch_size):
    problem = image_problem("digits", examples=60, side=4, loss="mse")
    model, twin = (seeded(lambda: mlp([16, 4, 10], batch_norm=True), 0) for _ in range(2))
    assert list(descend(model, problem, lr=0.1, batch_size=batch_size, seed=3, steps=4, momentum=0.5)) == [
        0,
        1,
        2,
        3,
        4,
    ]
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.5)
    stream = batches(problem, min(batch_size, 60), 3)
    for _ in range(4):
        x, y = problem.train if batch_size > 60 else next(stream)
        optimizer.zero_grad()
        problem.loss_fn(twin(x), y).backward()
        optimizer.step()
    assert torch.equal(flat_weights(model), flat_weights(twin))


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("probes=1", "probes must be at least 2, for a standard error, got 1"),
        ("middle=3000", "middle must be at most steps=10, got 3000"),
        ("bn_early=7", "bn_early <= bn_middle <= bn_steps must hold, got 7, 5, 10"),
        ("rates=[0.1,-1]", "rates must hold positive learning rates, got"),
        ("cnn_channels=[2,0]", "cnn_channels must hold positive numbers, got [2, 0]"),
        ("leading=11", "leading must be at least 12, two more than classes, got 11"),
        ("cnn_side=5", "side=5 does not divide the images of digits"),
        ("mass_batches=0", "mass_batches must be at least 1, got 0"),
    ],
)
def test_bad_settings(word, text):
    with pytest.raises(ConfigError) as caught:
        load_study("density", overrides=[*TINY, word])
    assert text in str(caught.value)


# ---- claims on hand-made results
def part(values, rows=()):
    return PartResult(values, list(rows), dict)


def course(gaps, masses, counts):
    """A tanh network's records at steps 0, 100, 500 and 2,000."""
    rows = [
        {"step": t, "gap": g, "mass": m, "loss": 1.0} for t, g, m in zip((0, 100, 500, 2000), gaps, masses, strict=True)
    ]
    named = {str(t): {"count": c} for t, c in zip((0, 500, 2000), counts, strict=True)}
    return part({"counts": named, "rank": 9, "parameters": 1450}, rows)


def norm_rows(steps, losses, **columns):
    rows = []
    for i, (t, loss) in enumerate(zip(steps, losses, strict=True)):
        rows.append({"step": t, "loss": loss, **{k: v[i] for k, v in columns.items() if v[i] is not None}})
    return rows


def hand_made():
    steps = (0, 100, 200, 400, 800)
    plain = norm_rows(
        steps,
        (2.3, 1.0, 0.6, 0.5, 0.3),
        spread_train=(4.0, 12.0, 14.0, None, 20.0),
        mass_train=(0.3, 0.5, 0.6, None, 0.8),
        full_mass_train=(0.3, 0.7, 0.75, None, 0.9),
    )
    bn = norm_rows(
        steps,
        (2.3, 0.5, 0.2, 0.1, 0.05),
        spread_train=(5.0, 3.0, 2.5, None, 3.5),
        spread_eval=(9.0, 8.0, 9.5, None, 8.5),
        mass_train=(0.3, 0.2, 0.22, None, 0.18),
        mass_eval=(0.4, 0.4, 0.45, None, 0.4),
        full_mass_train=(0.4, 0.5, 0.6, None, 0.5),
        sharpness_train=(1.0, 2.0, 2.0, None, 4.0),
        sharpness_eval=(5.0, 9.0, 9.0, None, 16.0),
    )
    return {
        "oracle": part({"distance": 0.001, "distance_one": 0.003, "trace_error": 1.5}),
        "tanh-ce": course((1.05, 1.5, 1.7, 1.3), (0.25, 0.6, 0.8, 0.9), (None, 9, 9)),
        "tanh-mse": course((1.2, 1.9, 2.5, 3.0), (0.9, 0.9, 0.95, 0.9), (None, 10, None)),
        "relu-plain": part({}, plain),
        "relu-bn": part({}, bn),
        "cnn-plain": part({}, [{"step": 100, "spread_train": 14.0, "mass_train": 0.8}]),
        "cnn-bn": part({}, [{"step": 100, "spread_train": 7.0, "spread_eval": 28.0, "mass_train": 0.62}]),
        "rates-plain": part({"losses": [0.6, 0.4, math.inf], "largest": 0.2}),
        "rates-bn": part({"losses": [0.3, 0.2, 0.25], "largest": 0.8}),
    }


EXPECTED = {
    "slq_distance": (0.001, 0.003),
    "agree_init": (0, math.nan),
    "agree_trained": (2, 0),
    "early_ce": (100 / 2000, 1.05),
    "early_mse": (500 / 2000, 1.2),
    "fade_ce": (1.3 / 1.7, 3.0 / 2.5),
    "mass_ce": (0.8, 0.25),
    "mass_gain_ce": (3.2, 0.95 / 0.9),
    "mass_init_mse": (0.9, 9 / 1450),
    "spread_plain": (14.0, 4.0),
    "spread_plain_early": (12.0, 4.0),
    "spread_bn": (3.5, 9.5),
    "spread_bn_eval": (9.5, 3.5),
    "batch_mass_plain": (0.6, 0.3),
    "batch_mass_bn": (0.22, 0.45),
    "full_mass_bn": (0.6, 0.75),
    "sharper_eval": (4.0, math.nan),
    "cnn_spread": (0.5, 14.0),
    "cnn_spread_eval": (2.0, 28.0),
    "cnn_spread_bn": (7.0, 28.0),
    "cnn_batch_mass_bn": (0.62, 0.8),
    "speed_steps": (200 / 800, 0.3),
    "speed_rate": (4.0, 0.2),
    "speed_best": (0.5, 0.4),
}


def test_metrics_on_hand_made_results():
    config = load_study("density")
    found = config.study.metrics(hand_made())
    for name, (value, null) in EXPECTED.items():
        assert found[name].value == pytest.approx(value), name
        assert found[name].null == pytest.approx(null, nan_ok=True), name


def test_verdicts_on_hand_made_results():
    config = load_study("density")
    claims = judge_all(config.file.claims, [config.study.metrics(hand_made())] * 3, "small")
    verdicts = {c.spec.id: c.verdict for c in claims}
    expected_failures = {c.spec.id for c in claims if c.spec.note.startswith("expected to fail")}
    assert {i for i, v in verdicts.items() if v == "not reproduced"} == expected_failures
    assert {i for i, v in verdicts.items() if v == "not run at this size"} == {"DE24", "DE25"}
    assert set(verdicts.values()) == {"reproduced", "not reproduced", "not run at this size"}


def test_networks_that_never_get_there():
    arms = hand_made()
    arms["tanh-ce"] = course((1.05, 1.1, 1.2, 1.2), (0.25, 0.2, 0.2, 0.2), (None, None, None))
    arms["relu-bn"].rows[:] = [{**row, "loss": 2.0} for row in arms["relu-bn"].rows]
    arms["rates-plain"] = part({"losses": [2.0, 2.0, math.inf], "largest": math.nan})
    found = load_study("density").study.metrics(arms)
    assert found["early_ce"].value == math.inf and found["agree_trained"].value == 1
    assert found["speed_steps"].value == math.inf and math.isnan(found["speed_rate"].value)
