"""Closed forms on noisy quadratics: Dom-SGD's floor, SGD's alignment, Bulk-SGD's loss, and the stability border.

On H = diag(lambda) with gradient noise of standard deviation s per coordinate, SGD's stationary variance is
``lr s^2 / (lambda (2 - lr lambda))`` per coordinate. The set-up: 5 values of 20 and 55 of .05, lr .05, s .1, started at
.05 in the sharp coordinates and 1 in the flat ones.
"""

import pytest
import torch

from curvopt.optim import BulkSGD, DomSGD, InterpolatedSGD, SubspaceScaled, rules
from tests.quadratics import Quartic, flat, leading, parameters, rotation, with_spectrum

D, K, SHARP, FLAT, LR, NOISE = 60, 5, 20.0, 0.05, 0.05, 0.1
SPECTRUM = torch.tensor([SHARP] * K + [FLAT] * (D - K), dtype=torch.float64)
START = torch.tensor([0.05] * K + [1.0] * (D - K), dtype=torch.float64)


def stationary_loss(value):
    """Of one coordinate: lambda E[x^2] / 2."""
    return 0.5 * LR * NOISE**2 / (2 - LR * value)


DOM_FLOOR = 0.5 * FLAT * (D - K) + K * stationary_loss(SHARP)
BULK_LOSS = 0.5 * SHARP * K * 0.05**2 + (D - K) * stationary_loss(FLAT)
ENERGY = [LR * v * NOISE**2 / (2 - LR * v) for v in SPECTRUM.tolist()]  # E[(lambda x)^2]
ALIGNMENT = sum(ENERGY[:K]) / sum(ENERGY)


def test_formulas_give_the_published_figures():
    assert pytest.approx(1.37625, abs=5e-6) == DOM_FLOOR
    assert pytest.approx(0.13188, abs=5e-6) == BULK_LOSS
    assert pytest.approx(0.9864, abs=5e-5) == ALIGNMENT


def simulate(pair, chains, steps, start, seed=0):
    """Many chains at once, each split by the update rules with the exact basis; the last points (chains, D)."""
    block = torch.eye(K, D, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x = start.expand(chains, D).clone()

    def dominant_part(u):
        return rules.coefficients([block], [u])

    for _ in range(steps):
        noise = torch.randn(chains, D, generator=generator, dtype=torch.float64)
        u = -LR * (SPECTRUM * x + NOISE * noise)
        inside = torch.vmap(dominant_part)(u) @ block
        x = x + pair[1] * u + (pair[0] - pair[1]) * inside
    return x


def loss_of(x):
    return (0.5 * SPECTRUM * x**2).sum(-1)


def test_dom_floor_over_4000_chains():
    # lr * lambda = 1: each step forgets the last. Only the noise's part moves, so that is what is held to a few per
    # cent: 5 x 4000 squared normals have a relative error of 1 %.
    x = simulate((1.0, 0.0), 4000, 5, START)
    assert torch.equal(x[:, K:], START[K:].expand(4000, D - K))  # the flat coordinates never move
    mean = loss_of(x).mean().item()
    assert mean == pytest.approx(DOM_FLOOR, rel=1e-2)
    noise_part = K * stationary_loss(SHARP)
    assert mean - 0.5 * FLAT * (D - K) == pytest.approx(noise_part, rel=0.04)


def test_bulk_loss_over_400_chains():
    # The flat coordinates forget as exp(-.0025 t); their 400 x 55 squared normals have a relative error of 1 %.
    x = simulate((0.0, 1.0), 400, 1800, START)
    assert torch.equal(x[:, :K], START[:K].expand(400, K))  # the sharp coordinates are frozen
    mean = loss_of(x).mean().item()
    assert mean == pytest.approx(BULK_LOSS, rel=1e-2)
    frozen = 0.5 * SHARP * K * 0.05**2
    assert mean - frozen == pytest.approx(
        (D - K) * stationary_loss(FLAT) + 0.5 * FLAT * 55 * (1 - LR * FLAT) ** 3600, rel=0.05
    )


def test_sgd_alignment_over_400_chains():
    x = simulate((1.0, 1.0), 400, 1500, torch.zeros(D, dtype=torch.float64))
    gradient = SPECTRUM * x
    energy = gradient.square().mean(0)
    assert (energy[:K].sum() / energy.sum()).item() == pytest.approx(ALIGNMENT, abs=1e-3)
    # ... and the same as the dominant share of each gradient, squared and weighted by its energy
    block = torch.eye(K, D, dtype=torch.float64)
    shares = torch.stack([rules.dominant_share([block], [g]) for g in gradient]).square()
    weighted = (shares * gradient.square().sum(1)).sum() / gradient.square().sum()
    assert weighted.item() == pytest.approx(ALIGNMENT, abs=1e-3)


# ---- the optimizers themselves, one chain, averaged over time
def one_chain(make, steps, burn_in):
    q = rotation(D, seed=2)
    params = [torch.zeros(4, 10, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)]
    op = Quartic(q @ torch.diag(SPECTRUM) @ q.T, params)
    start, at = q @ START, 0
    for p in params:
        p.copy_(start[at : at + p.numel()].view(p.shape))
        at += p.numel()
        p.requires_grad_()
    opt = make(params, op)
    generator = torch.Generator().manual_seed(11)
    points = []
    for t in range(steps):
        op.backward(NOISE * torch.randn(D, generator=generator, dtype=torch.float64))
        opt.step()
        if t >= burn_in:
            points.append(flat(params))
    return torch.stack(points) @ q, opt


def frozen(**options):
    return dict(rank=K, refresh_every="frozen", tol=1e-12, **options)


@pytest.mark.parametrize("wrapped", [False, True])
def test_dom_sgd_reaches_its_floor(wrapped):
    # The start's sharp part is forgotten in one step; 2000 steps x 5 squared normals: 1.4 % of the noise's part.
    def make(params, op):
        if wrapped:
            base = torch.optim.SGD(params, lr=LR)
            return SubspaceScaled(base, curvature=op, dominant=1.0, bulk=0.0, **frozen())
        return DomSGD(params, lr=LR, curvature=op, **frozen())

    x, opt = one_chain(make, 2000, 5)
    mean = loss_of(x).mean().item()
    assert mean == pytest.approx(DOM_FLOOR, rel=1e-3)
    assert mean - 0.5 * FLAT * (D - K) == pytest.approx(K * stationary_loss(SHARP), rel=0.06)
    assert opt.subspace.eigenvalues.tolist() == pytest.approx([SHARP] * K, rel=1e-12)


def test_bulk_sgd_freezes_the_sharp_part_and_trains_the_rest():
    x, _ = one_chain(lambda p, op: BulkSGD(p, lr=LR, curvature=op, **frozen()), 6000, 2000)
    assert (x[:, :K] - START[:K]).abs().max() < 1e-9  # frozen to the solver's tolerance
    # 55 coordinates x 4000 steps, correlated over some 400: about 550 independent squares, 6 % of 5 % of the loss.
    assert loss_of(x).mean().item() == pytest.approx(BULK_LOSS, rel=1e-2)


# ---- stability
BORDER_SPECTRUM = [10.0, 7.0, 4.0, 2.5, 1.0, 0.3, 0.1, 0.05]


def growth(a, b, lr, make=None):
    """Factor by which the loss's gradient grows over 300 steps from a start that holds every eigenvector."""
    matrix = with_spectrum(BORDER_SPECTRUM, seed=4)
    params = parameters([(2, 3), (2,)])
    with torch.no_grad():
        start = leading(matrix, 8)[1].sum(1)
        params[0].copy_(start[:6].view(2, 3))
        params[1].copy_(start[6:])
    op = Quartic(matrix, params)
    options = dict(curvature=op, rank=2, refresh_every="frozen", tol=1e-12, dominant=a, bulk=b)
    opt = InterpolatedSGD(params, lr=lr, **options) if make is None else make(params, options)
    first = flat(params)
    for _ in range(300):
        op.backward()
        opt.step()
    v = leading(matrix, 8)[1]
    return (v.T @ flat(params)).abs() / (v.T @ first).abs()


@pytest.mark.parametrize("pair", [(1.0, 1.0), (0.5, 1.0), (0.1, 1.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.5), (0.2, 2.0)])
def test_stability_border_is_sharp_to_one_per_cent(pair):
    # On the border a component changes sign and keeps its size; 1 % beyond it grows by 1.02 a step: 380 times in 300.
    a, b = pair
    top, following = BORDER_SPECTRUM[0], BORDER_SPECTRUM[2]
    border = min(2 / (a * top) if a else float("inf"), 2 / (b * following) if b else float("inf"))
    inside, outside = growth(a, b, 0.99 * border), growth(a, b, 1.01 * border)
    assert inside.max() <= 1 + 1e-9  # components with a coefficient of 0 stay as they are
    leader = 0 if a * top >= b * following else 2
    assert inside[leader] < 0.01
    assert outside[leader] == pytest.approx(1.02**300, rel=0.01)
    assert (outside.argmax()) == leader


def test_bulk_sgd_takes_a_larger_step_than_sgd():
    # 2 / lambda_1 = .2 for SGD, 2 / lambda_3 = .5 for Bulk-SGD
    assert growth(1.0, 1.0, 0.25).max() > 1e6
    assert growth(0.0, 1.0, 0.25).max() <= 1 + 1e-9
    assert growth(0.0, 1.0, 0.45).max() <= 1 + 1e-9
