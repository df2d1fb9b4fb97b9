"""The cost benchmark: what its problems are, how it times, and that a fast wrong answer loses."""

import math
import time

import pytest
import torch
from torch import nn

from benchmarks.config import ConfigError
from benchmarks.peers import DISTRIBUTIONS, Peers
from benchmarks.perf import report
from benchmarks.perf.bound import Profile, Rates, Traffic, explain
from benchmarks.perf.lab import Lab
from benchmarks.perf.problems import GPT, PROBLEMS, Problem, order
from benchmarks.perf.record import OURS, Figure, Row
from benchmarks.perf.rows import ROWS, cuda
from benchmarks.perf.run import chosen
from benchmarks.perf.timing import alternate, multiplications
from benchmarks.perf.verify import ggn64, hessian64, leading, overlap, relative_error, residual


@pytest.mark.parametrize(("name", "size"), [("mlp", 199_210), ("cnn", 69_738), ("gpt", 112_512)])
def test_the_nets_have_the_published_size(name, size):
    assert sum(p.numel() for p in PROBLEMS[name].build().parameters()) == size


def test_the_gpt_sees_no_future():
    model = GPT(7, width=8, layers=1, heads=2, context=5)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    changed = torch.tensor([[1, 2, 3, 6, 6]])
    assert torch.equal(model(tokens)[:3], model(changed)[:3])
    assert not torch.equal(model(tokens)[3:], model(changed)[3:])


def test_the_order_visits_every_row_once_an_epoch():
    steps = order(50, 101)
    assert len(steps) == 101
    assert torch.equal(torch.cat(steps[:100]).sort().values, torch.arange(5000))
    assert not torch.equal(steps[0], steps[100])


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(20, 4), torch.randint(3, (20,)))


def dense_hessian(model, loss_fn, batch):
    x, y = batch[0].double(), batch[1]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])

    def loss(theta):
        w1, b1, w2, b2 = (t.view(s) for t, s in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True))
        return loss_fn((x @ w1.T + b1).tanh() @ w2.T + b2, y)

    return torch.autograd.functional.hessian(loss, flat)


def test_the_references_are_right(small):
    dense = dense_hessian(*small)
    size = dense.shape[0]
    product = hessian64(*small)
    eye = torch.eye(size, dtype=torch.float64)
    # a few hundred operations in float64
    assert torch.allclose(torch.stack([product(e) for e in eye]), dense, atol=1e-13)
    values, vectors = torch.linalg.eigh(dense)
    found = leading(product, size, 4, torch.device("cpu"))
    assert found.values.tolist() == pytest.approx(values.flip(0)[:4].tolist(), rel=1e-8)
    assert overlap(vectors.flip(1)[:, :4], found) == pytest.approx(1, abs=1e-8)
    assert overlap(vectors[:, :4], found) < 1e-8
    assert residual(product, values[-3:], vectors[:, -3:]) < 1e-13
    assert residual(product, values[-3:] + 0.1, vectors[:, -3:]) == pytest.approx(float(0.1 / (values[-1] + 0.1)))
    # at weights where the net is linear in its last layer alone the two matrices agree on that layer
    gauss_newton = torch.stack([ggn64(*small)(e) for e in eye])
    last = slice(size - 18, size)
    assert torch.allclose(gauss_newton[last, last], dense[last, last], atol=1e-13)
    assert torch.linalg.eigvalsh(gauss_newton).min() > -1e-13
    assert relative_error(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]).double()) == pytest.approx(1 / 5**0.5)


@pytest.mark.parametrize("peer", [*DISTRIBUTIONS])
def test_an_installed_peer_gives_the_hessian(peer, small):
    """Peers outside this environment are named with the reason; those inside must give the dense matrix' product."""
    peers = Peers()
    if peer not in peers:
        assert "No module named" in peers.missing[peer]
        return
    dense = dense_hessian(*small).float()
    v = torch.randn(dense.shape[0])
    assert torch.allclose(peers[peer].hessian(*small)(v), dense @ v, atol=1e-5)


def test_sides_alternate_and_are_in_units_of_the_reference():
    calls = []

    def burn(name, milliseconds):
        def work():
            calls.append(name)
            end = time.process_time() + milliseconds / 1000
            while time.process_time() < end:
                pass

        return work

    sides = {"double": burn("double", 8), "same": burn("same", 4)}
    found = alternate(burn("unit", 4), sides, 3, torch.device("cpu"))
    assert 1.5 < found["double"].ratio / found["same"].ratio < 2.5
    timed = [c for c in calls[3:] if c != "unit"]
    assert timed == ["double", "same", "same", "double", "double", "same"]
    assert found["same"].low <= found["same"].ratio <= found["same"].high


def test_multiplications_are_counted():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert multiplications(lambda: a @ b) == 2 * 3 * 4 * 5


def test_what_comes_before_a_side_is_not_timed():
    calls = []

    def burn(milliseconds):
        end = time.process_time() + milliseconds / 1000
        while time.process_time() < end:
            pass

    def prepare():
        calls.append("prepare")
        burn(40)

    def side():
        calls.append("side")
        burn(4)

    found = alternate(lambda: burn(4), {"side": side}, 3, torch.device("cpu"), prepare)
    assert calls == ["prepare", "side"] * 4  # one round more warms up
    assert found["side"].ratio < 4  # eleven units with the preparation


def test_traffic_counts_what_moves_and_nothing_else():
    a, b = torch.ones(100, 30), torch.ones(30)
    with Traffic() as traffic:
        a.view(30, 100).T[:5]  # views
        a @ torch.eye(30)  # the product is no traffic, the identity is written
    eye = traffic.bytes
    assert eye <= 3 * 4 * 900
    with Traffic() as traffic:
        a + b.expand(100, 30)
    assert traffic.bytes == 4 * (3000 + 30 + 3000)
    with Traffic() as traffic:
        a.add_(1.0)
    assert traffic.bytes == 4 * (3000 + 3000)


def test_a_profile_tells_products_from_the_rest():
    a, far = torch.randn(400, 400), torch.randn(4_000_000)
    heavy = Profile.of(lambda: [a @ a for _ in range(20)], torch.device("cpu"))
    assert heavy.products > 10 * sum(heavy.others.values())
    assert heavy.flops == 20 * 2 * 400**3
    light = Profile.of(lambda: far.exp().mul_(2.0), torch.device("cpu"))
    assert light.products == 0
    assert {"exp", "mul_"} <= set(light.others)
    assert light.bytes == 4 * 4 * len(far)
    assert light.outside >= 0
    calls = []
    Profile.of(lambda: calls.append("work"), torch.device("cpu"), lambda: calls.append("prepare"))
    assert calls == ["prepare", "work"] * 4


def test_a_bound_is_told_in_gradients():
    a, far = torch.randn(300, 300), torch.randn(1_000_000)

    def unit():
        return a @ a

    def work():
        return a @ (a @ a), far + 1.0

    text = explain(work, unit, 2.5, Rates(1e11, 1e10), torch.device("cpu"))
    assert text.startswith("Profile: of 2.50 gradients ")
    assert "Bound: 2.00 times a gradient's multiplications" in text
    assert "a square product of 2048: 100)" in text
    assert "8 MiB that the other operations read and write at 10 GB/s" in text
    rates = Rates.measured(torch.device("cpu"))
    assert rates.flops > 1e8
    assert rates.bytes > 1e7


@pytest.mark.filterwarnings("ignore::curvopt.CurvoptWarning")
def test_the_rows_of_gpt2_run_at_a_small_shape():
    def text():
        ids = torch.randint(13, (200 * 16 + 1,), generator=torch.Generator().manual_seed(0)).cumsum(0) % 13
        return ids[:-1].view(200, 16), ids[1:].view(200, 16)

    def net():
        return GPT(13, 16, 1, 2, 16, tied=True)

    lab = Lab(torch.device("cpu"), 1, print, {"gpt2": Problem("gpt2", net, text, 0.1, 8, 32, {})})
    assert [r.note for r in cuda.gpt2(lab)] == [cuda.NOT_RUN] * 4
    cold, rough, warm, step = cuda.gpt2_rows(lab, windows=4)
    # float32 products of a small net: the residual asked for is reached, and forward differences reach their .98
    assert cold.ours.right is True
    assert rough.ours.right is True
    assert warm.ours.right is True
    assert "products" in warm.ours.evidence
    assert 0 < step.ours.value < 1
    assert step.ours.evidence == "64 tokens a step"


def test_gpt2_has_its_published_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in PROBLEMS["gpt2"].build().parameters()) == 124_439_808


def row(ours, *peers, target=10.0, higher=False):
    return Row("what", "mlp", "gradients", target, higher, [ours, *peers])


def test_a_wrong_answer_is_a_failure_however_fast():
    fast_and_wrong = Figure(OURS, 1.0, right=False)
    right = Figure("slow", 30.0, right=True)
    wrong = Figure("quick", 2.0, right=False)
    bad = row(fast_and_wrong, right)
    assert bad.met is False
    assert "WRONG" in report.cells(bad)
    good = row(Figure(OURS, 10.4, right=True), right, wrong)
    assert good.met is True  # within 5 %
    assert good.best_peer is right
    assert report.ratio(good) == pytest.approx(30 / 10.4)
    assert row(Figure(OURS, 10.6, right=True)).met is False
    assert row(Figure(OURS, None)).met is None
    better = row(Figure(OURS, 0.99, right=True), Figure("a", 0.9), target=0.98, higher=True)
    assert better.met is True
    assert report.ratio(better) == pytest.approx(1.1)


def test_the_page_says_where_and_what():
    rows = [row(Figure(OURS, 10.0, (9.0, 11.0), True, "error 1e-07", 9.5), Figure("a|b", 41.5, published=True))]
    where = dict(processor="p", cores=2, gpu="none", platform="x", python="3", torch="2", commit="abc", date="today")
    text = report.page(rows, where, {"a": "1"}, {"b": "not here"}, "command")
    assert "| what | mlp | gradients | 10 | 10 | met | 41.5 a\\|b (published) | 4.15 |" in text
    assert "published, not measured" in text
    assert "commit abc" in text
    assert "Not installed: b (not here)." in text


def test_rows_are_chosen_by_name():
    assert chosen([]) == list(ROWS)
    with pytest.raises(ConfigError, match="no row named 'nothing'; rows: hessian_product"):
        chosen(["nothing"])
    assert all(maker.__doc__ for maker in ROWS.values())


def test_a_missing_figure_is_a_dash():
    assert report.number(None) == "-"
    assert math.isclose(float(report.number(1.2345)), 1.23)
