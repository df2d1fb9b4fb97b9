"""The studies themselves at a tiny size, their problems against closed forms, their metrics on hand-made results."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import curvopt
from benchmarks.cli import main
from benchmarks.config import ConfigError
from benchmarks.studies import Lab, PartResult, all_studies, displacement, problem, sharp_flat
from benchmarks.studies.config import load_study
from benchmarks.studies.folder import StudyFolder
from benchmarks.studies.mixtures import Heads, Xor, gmm_samples, gmm_sgd, xor_clusters, xor_samples, xor_sgd
from benchmarks.studies.problem import batches, flat_weights, image_problem, mlp, seeded, set_weights
from curvopt.diagnostics import dominant_share

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "sharp-flat": "examples=100 side=4 hidden=[5] batch_size=20 steps=8 switch_after=4 switch_by=4 align_every=4 "
    "refresh_every=4 measure_every=8 log_every=2 probes=4",
    "displacement": "examples=100 side=4 hidden=[5] batch_size=20 steps=10 record_every=5 lag=5 burn_in=5 draws=2",
    "alignment": "gmm_dimension=12 gmm_classes=3 gmm_steps=4 gmm_early=2 xor_dimension=6 xor_steps=5 xor_neurons=[3,4] "
    "xor_runs=[2,1] examples=100 side=4 hidden=6 batch_size=20 steps=12 poor_step=3",
}


@pytest.fixture(autouse=True)
def _bundled_digits(monkeypatch, tmp_path):
    """Without a data folder the studies run on the digits of scikit-learn."""
    monkeypatch.delenv("CURVOPT_DATA", raising=False)
    monkeypatch.setenv("CURVOPT_CACHE", str(tmp_path / "cache"))


# ---- end to end
def check(name, out, page):
    """That all is there, and that each claim has its metric, those of the full size too."""
    (folder,) = out.glob(f"{name}-small-*")
    found = json.loads((folder / "claims.json").read_text())
    assert "digits" in found["data"] and len(found["claims"]) == len(load_study(name).file.claims)
    assert {c["verdict"] for c in found["claims"]} <= {"undecided", "not run at this size"}  # one seed decides nothing
    assert list((folder / "figures").glob("*.png")) and list((folder / "figures").glob("*.pdf"))
    assert f"## {name}: " in page.read_text() and list((page.parent / page.stem).glob("*.png"))
    config = load_study(name, seeds=1, overrides=TINY[name].split())
    results = StudyFolder(config.folder(out))
    metrics = config.study.metrics({p.arm: results.finished(p) for p in config.study.parts(0)})
    assert {c.metric for c in config.file.claims} <= set(metrics)


@pytest.mark.parametrize("name", ["sharp-flat", "alignment"])
def test_tiny_runs(name, tmp_path, capsys):
    page = tmp_path / "page.md"
    words = [*TINY[name].split(), "--seeds", "1", "--out", str(tmp_path), "--wandb", "disabled", "--page", str(page)]
    assert main(["study", name, *words]) == 0
    assert f"Study {name} (small)" in capsys.readouterr().out
    check(name, tmp_path, page)


def tables(out):
    """What must repeat of a study's folder: the claims but for what was measured, and the figure's data."""
    (folder,) = out.glob("displacement-*")
    found = json.loads((folder / "claims.json").read_text())
    found.pop("measured")
    return found, (folder / "figures" / "displacement.csv").read_bytes()


def test_a_killed_study_equals_an_unbroken_one(tmp_path):
    words = ["study", "displacement", *TINY["displacement"].split(), "--seeds", "1", "--wandb", "disabled"]
    whole, broken, page = tmp_path / "whole", tmp_path / "broken", tmp_path / "page.md"
    command = [sys.executable, "-m", "benchmarks", *words, "--out", str(broken)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(broken.glob("*/parts/seed-0-mse-sgd")):  # in the middle: the fourth of six parts has begun
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 3 <= len(list(broken.glob("*/parts/*/result.json"))) < 6
    for out in (whole, broken):
        assert main([*words, "--out", str(out), "--page", str(page)]) == 0
    assert tables(whole) == tables(broken)
    check("displacement", broken, page)


# ---- problems
def test_image_problem():
    problem = image_problem("digits", examples=50, side=4, loss="cross_entropy", test_examples=20)
    assert problem.train[0].shape == (50, 16) and problem.test[0].shape == (20, 16)
    assert abs(float(problem.train[0].mean())) < 1e-6 and abs(float(problem.train[0].std()) - 1) < 1e-6
    assert problem.rank == 9 and image_problem("digits", examples=50, side=4, loss="mse").rank == 10
    from sklearn.datasets import load_digits

    image = torch.from_numpy(
        load_digits().images[__import__("numpy").random.RandomState(0).permutation(1797)[360:][0]]
    ).float()
    pooled = image.reshape(4, 2, 4, 2).mean((1, 3)).flatten()
    mine = problem.train[0][0]
    scale = float((pooled - pooled.mean()).norm() / (mine - mine.mean()).norm())
    torch.testing.assert_close(mine * scale - (mine * scale).mean(), pooled - pooled.mean(), atol=1e-4, rtol=1e-4)
    whole = image_problem("digits", examples=50, side=8, loss="mse", flat=False).double()
    assert whole.train[0].shape == (50, 1, 8, 8) and whole.train[0].dtype == whole.train[1].dtype == torch.float64
    assert torch.equal(whole.train[1].argmax(1), whole.labels)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"side": 3}, "side=3 does not divide the images of digits, 8 x 8"),
        ({"loss": "hinge"}, "loss must be one of cross_entropy, mse, got 'hinge'"),
        ({"examples": 0}, "examples must lie between 1 and 1,437 for digits, got 0"),
    ],
)
def test_bad_problems(arguments, text):
    with pytest.raises(ConfigError, match=text):
        image_problem("digits", **{"examples": 10, "side": 8, "loss": "mse", **arguments})


def test_pages_name_no_folder_of_this_machine():
    assert problem._place("folder /home/me/mnist") == "from a local folder"
    assert problem._place("cache /home/me/.cache/curvopt/mnist") == "from the cache"
    assert problem._place("bundled with scikit-learn") == "bundled with scikit-learn"


def test_batches_go_on_where_another_stream_stopped():
    problem = image_problem("digits", examples=50, side=4, loss="mse")
    first = batches(problem, 20, 3)
    for _ in range(4):
        next(first)
    second = batches(problem, 20, 3, skip=4)
    for _ in range(5):
        one, other = next(first), next(second)
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(5)
    one = seeded(lambda: mlp([4, 3, 2]), 0)
    state = torch.get_rng_state()
    other = seeded(lambda: mlp([4, 3, 2], batch_norm=True), 0)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one[0].weight, other[0].weight) and len(other) == 4
    set_weights(one, torch.arange(float(len(flat_weights(one)))))
    assert torch.equal(one[0].weight.flatten(), torch.arange(12.0))


# ---- mixtures against autograd and closed forms
def test_gmm_sgd_is_sgd():
    generator = torch.Generator().manual_seed(0)
    start, samples = torch.randn(3, 5, generator=generator), gmm_samples(20, 3, 5, 4.0, generator)
    stops = dict(gmm_sgd(start, samples, 0.3, 0.05, [0, 7, 20]))
    assert torch.equal(stops[0], start)
    model = Heads(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, weight_decay=0.05)
    for i in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(samples[0][i : i + 1]), samples[1][i : i + 1]).backward()
        optimizer.step()
        if i + 1 in stops:
            mine = torch.cat([head.weight for head in model.heads]).detach()
            torch.testing.assert_close(stops[i + 1], mine, rtol=1e-4, atol=1e-5)  # 20 steps of float32


def test_xor_sgd_is_sgd():
    generator = torch.Generator().manual_seed(1)
    w, v = torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator)
    x, y = xor_samples(15, 6, 10.0, generator)
    model = Xor(w, v)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, weight_decay=0.05)
    for i in range(15):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x[i : i + 1]), y[i : i + 1, None])
        loss.backward()
        optimizer.step()
    found = xor_sgd(w, v, (x, y), 0.2, 0.05)
    torch.testing.assert_close(found[0], torch.cat([n.weight for n in model.neurons]).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], model.readout.weight[0].detach(), rtol=1e-4, atol=1e-5)


def test_samples_have_their_means_and_noise():
    generator = torch.Generator().manual_seed(2)
    x, label = gmm_samples(20_000, 3, 4, 10.0, generator)
    for c in range(3):  # standard error sqrt(.1 / 6,700) = .004
        torch.testing.assert_close(x[label == c].mean(0), torch.eye(4)[c], atol=0.02, rtol=0)
    assert abs(float(x[:, 3].var()) - 0.1) < 0.005  # standard error .1 sqrt(2 / 20,000) = .001
    x, y = xor_samples(20_000, 4, 10.0, generator)
    assert abs(float(y.mean()) - 0.5) < 0.02
    torch.testing.assert_close(x[y == 1].square().mean(0), torch.tensor([1.1, 0.1, 0.1, 0.1]), atol=0.03, rtol=0)


def test_blocks_of_the_heads_are_the_closed_form():
    """H_cc = E[p_c (1 - p_c) y y^T], M_cc = E[(p_c - 1{a = c})^2 y y^T]."""
    generator = torch.Generator().manual_seed(3)
    x, label = gmm_samples(40, 3, 5, 4.0, generator)
    x, w = x.double(), torch.randn(3, 5, generator=generator).double()
    model = Heads(w).double()
    with torch.no_grad():
        for layer, row in zip(model.heads, w, strict=True):
            layer.weight.copy_(row[None])
    p = torch.softmax(x @ w.T, 1)
    eye = torch.eye(5, dtype=torch.float64)
    loss = torch.nn.CrossEntropyLoss()
    h, m = (c(model, loss, (x, label)).layers() for c in (curvopt.Hessian, curvopt.GradientSecondMoment))
    for c in range(3):
        hit = (label == c).double()
        for op, weight in ((h, p[:, c] * (1 - p[:, c])), (m, (p[:, c] - hit) ** 2)):
            torch.testing.assert_close(op[f"heads.{c}"] @ eye, (x * weight[:, None]).T @ x / 40, rtol=1e-9, atol=1e-12)


def test_blocks_of_the_xor_network_are_the_closed_form():
    generator = torch.Generator().manual_seed(4)
    x, y = (t.double() for t in xor_samples(40, 5, 4.0, generator))
    w, v = torch.randn(3, 5, generator=generator), torch.randn(3, generator=generator)
    model = Xor(w, v).double()
    w, v = w.double(), v.double()
    layers = curvopt.Hessian(model, torch.nn.BCEWithLogitsLoss(), (x, y[:, None])).layers()
    z = x @ w.T
    s = torch.sigmoid(torch.relu(z) @ v)
    eye = torch.eye(5, dtype=torch.float64)
    for j in range(3):
        weight = s * (1 - s) * v[j] ** 2 * (z[:, j] > 0)
        torch.testing.assert_close(
            layers[f"neurons.{j}"] @ eye, (x * weight[:, None]).T @ x / 40, rtol=1e-9, atol=1e-12
        )
    h = torch.relu(z)
    expected = (h * (s * (1 - s))[:, None]).T @ h / 40
    torch.testing.assert_close(layers["readout"] @ torch.eye(3, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)


def test_clusters():
    w = torch.zeros(3, 5)
    assert xor_clusters(w) == 0
    w[0, 0], w[1, 0], w[2, 1] = 1.0, -0.5, 0.01
    assert xor_clusters(w) == 2 and xor_clusters(w, share=0.001) == 3


def test_weights_in_the_span_of_the_means_are_aligned():
    """Far above the transition the k outliers of a block are the means' span."""
    generator = torch.Generator().manual_seed(5)
    x, label = gmm_samples(4000, 3, 20, 100.0, generator)
    w = torch.zeros(3, 20)
    w[:, :3] = torch.randn(3, 3, generator=generator)
    block = curvopt.Hessian(Heads(w), torch.nn.CrossEntropyLoss(), (x, label)).layers()["heads.1"]
    found = curvopt.eigsh(block, 3)
    # out of the span by the sample's noise, about sqrt(d / (N snr)) = .007 a vector
    assert float(dominant_share(w[1], found)) > 0.99


# ---- metrics on hand-made results
def part(rows, **values):
    return PartResult(values, rows, dict)


def test_sharp_flat_metrics_by_hand():
    fast = part([{"step": s, "loss": 2.0 ** (-s / 10)} for s in range(0, 50, 10)])
    assert sharp_flat._steps_to(fast, 0.25) == 20 and math.isinf(sharp_flat._steps_to(fast, 0.01))
    assert sharp_flat._share_of_gap(0.5, 0.5, 2.0) == 0 and math.isnan(sharp_flat._share_of_gap(0.5, 0.5, 0.4))
    assert sharp_flat._share_of_gap(1.0, 0.5, 2.0) == pytest.approx(0.5)
    one = part([{"step": 0, "loss": 1.0, "sharpness": 9.0}, {"step": 1, "loss": 0.5, "sharpness": 6.0}])
    other = part([{"step": 0, "loss": 1.0, "sharpness": 7.0}, {"step": 9, "loss": 0.4, "sharpness": 3.0}])
    assert sharp_flat._sharpness_at_equal_loss(one, other) == 2.0  # at loss .5 and .4
    assert math.isnan(sharp_flat._sharpness_at_equal_loss(one, part([{"step": 0, "loss": 1.0}])))
    rates = part([{"step": i, "rate_dominant": 0.1 * d, "rate_bulk": 0.1 * b} for i, (d, b) in
                  enumerate([(1, 2), (2, 8), (3, 4)])], lr=0.1)  # fmt: skip
    assert sharp_flat._rate_ratio(rates) == pytest.approx(2.0)
    assert sharp_flat._rate_error(rates) == pytest.approx(7.0)
    energy = {
        "functional": {"trace": {"dominant": -1.0}, "frobenius": {"dominant": 1.0, "bulk": 6.0}},
        "hessian": {"trace": {"dominant": 4.0}, "frobenius": {"dominant": 10.0, "bulk": 12.0}},
    }
    assert sharp_flat._functional_dominant(energy) == 0.25 and sharp_flat._functional_ratio(energy) == 5.0


def test_displacement_metrics_by_hand():
    steps = [0, 10, 20, 30, 40]
    q = torch.eye(5)
    for i, v in enumerate((0.2, 0.4, 0.6, 0.8)):
        q[i, i + 1] = q[i + 1, i] = v
    rows = [{"step": t, "loss": 2.0 ** (-i)} for i, t in enumerate(steps)]
    sgd = part(rows, steps=steps, overlaps=q.double().tolist())
    assert displacement._by_waiting(sgd, 10)[0] == [0, 10, 20, 30]
    assert displacement._early_and_late(sgd, 10, 10) == (pytest.approx(0.4), pytest.approx(0.8))
    assert displacement._by_lag(sgd, 20) == ([10, 20], [pytest.approx(0.6), 0.0])
    quick = part([{**r, "loss": r["loss"] / 2} for r in rows], steps=steps, overlaps=(0.5 * q).double().tolist())
    # the lowest loss of both is 1/8: SGD at t = 30 (.8), the quick one at t = 20 (.5 * .6)
    assert displacement._moves_at_equal_loss(sgd, quick, 10) == pytest.approx(0.8 - 0.3)
    first, second = displacement._at_equal_loss(quick, sgd)
    assert first["step"] == 30 and second["step"] == 40


def test_an_arm_that_diverges_is_a_result():
    """A learning rate far beyond 2/lambda_1: an infinite loss, no exception."""
    study = load_study("sharp-flat", overrides=[*TINY["sharp-flat"].split(), "hot=1e6"]).study
    parts = {p.arm: p for p in study.parts(0)}
    lab = Lab(torch.device("cpu"), "digits", {})
    warm = study.run(parts["mse-warmup"], lab)
    start = PartResult(warm.values, lab.rows, lambda: warm.tensors)
    for arm in ("mse-hot-sgd", "mse-hot-bulk"):
        lab = Lab(torch.device("cpu"), "digits", {"mse-warmup": start})
        outcome = study.run(parts[arm], lab)
        assert outcome.values["diverged"] > 0 and lab.rows[-1]["loss"] == math.inf


def test_the_studies_are_found():
    assert {"sharp-flat", "displacement", "alignment"} <= set(all_studies())
    assert os.path.exists(ROOT / "configs" / "study" / "sharp-flat.yaml")
