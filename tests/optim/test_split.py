"""The split of the displacement: members of the family, Dom + Bulk = base, and a dense float64 twin of whole runs."""

import math

import pytest
import torch

from curvopt.optim import BulkSGD, DomSGD, InterpolatedSGD, SubspaceScaled
from tests.quadratics import Quartic, flat, leading, parameters, with_spectrum

# The spectrum has no gap on purpose, see below.
pytestmark = pytest.mark.filterwarnings("ignore::curvopt._errors.GapWarning")

SHAPES = [(2, 2), (3,), (1, 2)]
# No gap of 1.3 after the third value, and a warm Lanczos chain may take k + 6 = 9 = P products: each refresh spans the
# whole space, so the basis is exact and a dense twin can follow it to rounding.
SPECTRUM = [3.0, 2.6, 2.2, 2.0, 1.7, 1.2, 0.8, 0.4, 0.1]
RANK = 3
MATRIX = with_spectrum(SPECTRUM)

SGD_RULES = {
    "plain": dict(),
    "momentum": dict(momentum=0.9, dampening=0.2),
    "nesterov": dict(momentum=0.8, nesterov=True, weight_decay=0.05),
    "decay": dict(weight_decay=0.1),
    "maximize": dict(momentum=0.5, weight_decay=0.02, maximize=True),
}
EXACT = dict(rank=RANK, tol=1e-12)


def relative(x, y):
    return float((x - y).norm() / y.norm())


def problem(dtype=torch.float64, c=0.05):
    params = parameters(SHAPES, dtype)
    return params, Quartic(MATRIX, params, c)


def grouped(params):
    return [{"params": params[:1], "lr": 0.03}, {"params": params[1:], "lr": 0.07}]


def run(make, steps=20, dtype=torch.float64, sign=1.0, c=0.05):
    params, op = problem(dtype, c)
    opt = make(params, op)
    for _ in range(steps):
        op.backward()
        for p in params:
            p.grad *= sign
        opt.step()
    return flat(params), opt


# ---- (1, 1) is the base optimizer
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("name", SGD_RULES)
@pytest.mark.parametrize("groups", [False, True])
def test_ones_equal_sgd(name, groups, dtype, tol):
    # 20 contracting steps, a few roundings each: some tens of eps.
    options = {"lr": 0.05, **SGD_RULES[name]}
    sign = -1.0 if options.get("maximize") else 1.0
    base, _ = run(lambda p, _: torch.optim.SGD(grouped(p) if groups else p, **options), dtype=dtype, sign=sign)
    ours, opt = run(
        lambda p, op: InterpolatedSGD(
            grouped(p) if groups else p, **options, dominant=1.0, bulk=1.0, curvature=op, rank=RANK, refresh_every=5
        ),
        dtype=dtype,
        sign=sign,
    )
    assert opt.subspace.refreshes == 4
    assert relative(ours, base) < tol


BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.float64, 1e-14)])
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("project", ["update", "gradient"])
def test_ones_equal_any_base(name, project, dtype, tol):
    # project="gradient" hands the base gradients that went through V (a - b) V^T = 0: the same bits times 1.
    base, _ = run(lambda p, _: BASES[name](p), dtype=dtype)
    ours, opt = run(
        lambda p, op: SubspaceScaled(BASES[name](p), curvature=op, rank=RANK, refresh_every=5, project=project),
        dtype=dtype,
    )
    assert opt.subspace.refreshes == 4
    assert relative(ours, base) < tol


# ---- Dom + Bulk = base
def displacements(make, dtype, steps=6):
    """Each step's displacement (steps, P) under gradients that do not depend on the weights, at a constant Hessian."""
    params, op = problem(dtype, c=0.0)
    opt = make(params, op)
    generator = torch.Generator().manual_seed(5)
    out = []
    for _ in range(steps):
        before = flat(params)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        opt.step()
        out.append(flat(params) - before)
    return torch.stack(out), opt


class LayeredQuartic(Quartic):
    """The same with one block a parameter."""

    def layers(self):
        out, start = {}, 0
        for name, p in zip("abc", self.params, strict=True):
            n = p.numel()
            out[name] = Quartic(self.matrix[start : start + n, start : start + n].contiguous(), [p], self.c)
            start += n
        return out


# A displacement read off as a difference of weights of size 1 carries eps absolutely; the displacements are about .05.
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("layout", ["whole", "layer"])
@pytest.mark.parametrize("name", ["plain", "momentum", "adamw"])
def test_dominant_and_bulk_displacements_add_up(name, layout, dtype, tol):
    def make(dominant, bulk):
        def build(params, op):
            op = LayeredQuartic(op.matrix, params) if layout == "layer" else op
            options = dict(curvature=op, rank=2, layout=layout, refresh_every=2, dominant=dominant, bulk=bulk)
            if name == "adamw":
                return SubspaceScaled(torch.optim.AdamW(params, lr=0.05, weight_decay=0.0), **options)
            return InterpolatedSGD(params, lr=0.05, **SGD_RULES[name], **options)

        return build

    dom, opt = displacements(make(1.0, 0.0), dtype)
    bulk, _ = displacements(make(0.0, 1.0), dtype)
    base, _ = displacements(make(1.0, 1.0), dtype)
    assert dom.norm() > 0.1 * base.norm() and bulk.norm() > 0.1 * base.norm()
    assert relative(dom + bulk, base) < tol
    if layout == "layer":  # a layer's dominant part stays in that layer: the blocks are 1-parameter bases
        assert opt.subspace.basis.shape == (9, 6)
    inside = opt.subspace.project(dom.T[:, -1].to(dtype)).double()
    assert relative(inside, dom[-1]) < 100 * tol  # P_k of a dominant displacement is itself


def test_float32_displacements_add_up_to_1e_6_before_they_are_added_to_the_weights():
    # Read at weights of zero, where adding loses nothing.
    params = parameters([(40, 5)], torch.float32)
    op = Quartic(with_spectrum([10.0, 8.0, 5.0] + [1.0] * 197), params)
    results = {}
    for key, pair in {"dom": (1.0, 0.0), "bulk": (0.0, 1.0), "base": (1.0, 1.0)}.items():
        with torch.no_grad():
            params[0].zero_()
        opt = InterpolatedSGD(params, lr=0.1, dominant=pair[0], bulk=pair[1], curvature=op, rank=3)
        params[0].grad = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
        opt.step()
        results[key] = flat(params)
    assert relative(results["dom"] + results["bulk"], results["base"]) < 1e-6


# ---- named members
@pytest.mark.parametrize(
    ("path", "alpha", "pair", "lr"),
    [
        ("centered", 0.5, (1.0, 1.0), 0.05),
        ("centered", 0.0, (1.0, 0.0), 0.05),
        ("centered", 1.0, (0.0, 1.0), 0.05),
        ("centered", 0.75, (0.5, 1.0), 0.05),
        ("convex", 0.5, (1.0, 1.0), 0.025),  # SGD at half the learning rate
        ("convex", 0.2, (0.8, 0.2), 0.05),
        ("damped", 0.3, (0.3, 1.0), 0.05),
        ("amplified", 1.5, (1.0, 1.5), 0.05),
    ],
)
def test_paths_give_the_members_they_name(path, alpha, pair, lr):
    options = dict(momentum=0.6, rank=RANK, refresh_every=3)
    named, _ = run(lambda p, op: InterpolatedSGD(p, lr=0.05, curvature=op, path=path, alpha=alpha, **options))
    plain, _ = run(lambda p, op: InterpolatedSGD(p, lr=lr, curvature=op, dominant=pair[0], bulk=pair[1], **options))
    assert relative(named, plain) < 1e-13


def test_named_classes_are_members():
    for cls, pair in ((BulkSGD, (0.0, 1.0)), (DomSGD, (1.0, 0.0))):
        named, _ = run(lambda p, op, cls=cls: cls(p, lr=0.05, curvature=op, rank=RANK, refresh_every=3))
        plain, _ = run(
            lambda p, op, pair=pair: InterpolatedSGD(
                p, lr=0.05, curvature=op, rank=RANK, refresh_every=3, dominant=pair[0], bulk=pair[1]
            )
        )
        assert torch.equal(named, plain)


# ---- what is projected
def run_projected(project, **options):
    return run(
        lambda p, op: InterpolatedSGD(
            p, lr=0.05, curvature=op, rank=RANK, refresh_every=5, dominant=0.3, bulk=1.4, project=project, **options
        ),
        c=0.0 if options.pop("quadratic", False) else 0.05,
    )[0]


def test_projecting_update_or_gradient_is_the_same_for_plain_sgd():
    assert relative(run_projected("gradient"), run_projected("update")) < 1e-13


@pytest.mark.parametrize("name", ["momentum", "decay"])
def test_projecting_update_or_gradient_differs_with_momentum_and_decay(name):
    # By how much is the business of the dense twin below.
    assert relative(run_projected("gradient", **SGD_RULES[name]), run_projected("update", **SGD_RULES[name])) > 1e-3


def test_channels_last_parameters():
    def final(memory_format):
        params = [torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)]
        params = [p.to(memory_format=memory_format).requires_grad_() for p in params]
        op = Quartic(with_spectrum([9.0, 7.0, 4.0] + [1.0] * 21), params, 0.02)
        opt = InterpolatedSGD(
            params, lr=0.05, momentum=0.9, curvature=op, rank=3, refresh_every=4, dominant=0.2, bulk=1.1
        )
        for _ in range(12):
            op.backward()
            opt.step()
        assert params[0].is_contiguous(memory_format=memory_format)
        return flat(params), opt

    last, opt = final(torch.channels_last)
    usual, _ = final(torch.contiguous_format)
    assert opt.subspace.blocks[0].shape == (3, 2, 3, 2, 2)
    assert relative(last, usual) < 1e-13


# ---- the dense twin of whole runs
def twin_projector(hessian, x):
    _, v = leading(hessian(x), RANK)
    return v @ v.T


def sgd_twin(lr, pair, project, steps, every, sign, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0, **_):
    """torch.optim.SGD and the split, written out on one float64 vector."""
    params, op = problem()
    x, buffer, projector = flat(params), None, None
    for t in range(steps):
        if t % every == 0:
            projector = twin_projector(op.dense, x)
        mix = pair[0] * projector + pair[1] * (torch.eye(len(x), dtype=torch.float64) - projector)
        g = op.slope(x)  # minimised in both cases: maximize gets the negative gradient
        if project == "gradient":
            g = mix @ g
        g = g + weight_decay * x
        if momentum:
            buffer = g.clone() if buffer is None else momentum * buffer + (1 - dampening) * g
            step = g + momentum * buffer if nesterov else buffer
        else:
            step = g
        x = x - lr * (mix @ step if project == "update" else step)
    return x


@pytest.mark.parametrize("project", ["update", "gradient"])
@pytest.mark.parametrize("name", SGD_RULES)
def test_family_follows_its_dense_twin(name, project):
    options = {"lr": 0.05, **SGD_RULES[name]}
    sign = -1.0 if options.get("maximize") else 1.0
    pair = (0.4, 1.3)
    ours, opt = run(
        lambda p, op: InterpolatedSGD(
            p, **options, curvature=op, dominant=pair[0], bulk=pair[1], project=project, refresh_every=6, **EXACT
        ),
        sign=sign,
    )
    assert opt.subspace.refreshes == 4 and opt.subspace.age == 2
    twin = sgd_twin(options.pop("lr"), pair, project, 20, 6, sign, **options)
    # The basis solves to 1e-12 of the norm over a gap of .2: 1e-11 a refresh.
    assert relative(ours, twin) < 1e-10


def adamw_twin(lr, decay, pair, project, steps, every, betas=(0.9, 0.999), eps=1e-8):
    """AdamW and the split of its whole displacement (or of the gradient it sees), on one float64 vector."""
    params, op = problem()
    x, projector = flat(params), None
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t in range(steps):
        if t % every == 0:
            projector = twin_projector(op.dense, x)
        mix = pair[0] * projector + pair[1] * (torch.eye(len(x), dtype=torch.float64) - projector)
        g = mix @ op.slope(x) if project == "gradient" else op.slope(x)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** (t + 1)), v / (1 - betas[1] ** (t + 1))
        u = -lr * decay * x - lr * m_hat / (v_hat.sqrt() + eps)
        x = x + (mix @ u if project == "update" else u)
    return x


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_wrapper_follows_its_dense_twin(project):
    pair = (0.4, 1.3)
    ours, _ = run(
        lambda p, op: SubspaceScaled(
            torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
            curvature=op,
            dominant=pair[0],
            bulk=pair[1],
            project=project,
            refresh_every=6,
            **EXACT,
        )
    )
    assert relative(ours, adamw_twin(0.05, 0.1, pair, project, 20, 6)) < 1e-9


@pytest.mark.parametrize("name", ["plain", "nesterov"])
def test_wrapper_around_sgd_is_the_family(name):
    options = {"lr": 0.05, **SGD_RULES[name]}
    split = dict(dominant=0.4, bulk=1.3, refresh_every=6, **EXACT)
    family, _ = run(lambda p, op: InterpolatedSGD(p, **options, curvature=op, **split))
    wrapped, _ = run(lambda p, op: SubspaceScaled(torch.optim.SGD(p, **options), curvature=op, **split))
    assert relative(wrapped, family) < 1e-13


# ---- several groups: the displacement over all groups together is what is split
@pytest.mark.parametrize("wrapped", [False, True])
def test_groups_with_their_own_lr_are_split_together(wrapped):
    rates = torch.tensor([0.03] * 4 + [0.07] * 5, dtype=torch.float64)

    def make(p, op):
        split = dict(curvature=op, dominant=0.2, bulk=1.0, refresh_every=6, **EXACT)
        if wrapped:
            return SubspaceScaled(torch.optim.SGD(grouped(p)), **split)
        return InterpolatedSGD(grouped(p), **split)

    ours, _ = run(make)
    params, op = problem()
    x = flat(params)
    for t in range(20):
        if t % 6 == 0:
            projector = twin_projector(op.dense, x)
        u = -rates * op.slope(x)
        x = x + 0.2 * (projector @ u) + (u - projector @ u)
    assert relative(ours, x) < 1e-10


def test_operator_over_a_subset_leaves_the_others_to_the_base():
    params, _ = problem(c=0.0)
    inner = MATRIX[:4, :4].contiguous()
    op = Quartic(inner, params[:1])
    whole = Quartic(MATRIX, params)
    opt = BulkSGD(params, lr=0.05, momentum=0.5, curvature=op, rank=2, tol=1e-12, refresh_every=50)
    reference = [p.detach().clone().requires_grad_() for p in params]
    base = torch.optim.SGD(reference, lr=0.05, momentum=0.5)
    _, v = leading(inner, 2)
    whole.backward()
    for p, q in zip(params, reference, strict=True):
        q.grad = p.grad.clone()
    before = flat(params)
    opt.step()
    base.step()
    moved, expected = flat(params) - before, flat(reference) - before
    expected[:4] -= v @ (v.T @ expected[:4])
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)


def test_parameter_without_gradient_stays_and_does_not_enter_the_projection():
    params, op = problem(c=0.0)
    opt = InterpolatedSGD(params, lr=0.05, curvature=op, dominant=0.3, bulk=1.0, **EXACT)
    op.backward()
    params[1].grad = None
    before = flat(params)
    u = -0.05 * op.slope(before)
    u[4:7] = 0
    opt.step()
    _, v = leading(MATRIX, RANK)
    expected = 0.3 * (v @ (v.T @ u)) + (u - v @ (v.T @ u))
    expected[4:7] = 0
    torch.testing.assert_close(flat(params) - before, expected, rtol=1e-11, atol=1e-12)


def test_rank_zero_scales_the_whole_update():
    ours, _ = run(lambda p, _: InterpolatedSGD(p, lr=0.05, momentum=0.9, rank=0, dominant=7.0, bulk=0.5))
    wrapped, _ = run(
        lambda p, _: SubspaceScaled(torch.optim.SGD(p, lr=0.05, momentum=0.9), rank=0, dominant=7.0, bulk=0.5)
    )
    base, _ = run(lambda p, _: torch.optim.SGD(p, lr=0.025, momentum=0.9))
    assert relative(ours, base) < 1e-14
    assert relative(wrapped, base) < 1e-14
    assert math.isfinite(ours.norm().item())
