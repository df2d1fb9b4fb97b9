"""NaN, Inf and failures: parameters, buffers and basis stay as they were, and somebody says so."""

import warnings

import pytest
import torch
from torch import nn

from curvopt._errors import NonFiniteError, NonFiniteWarning, RefreshWarning
from curvopt.curvature.hessian import Hessian
from curvopt.optim import BulkSGD, InterpolatedSGD, SubspaceScaled
from curvopt.optim.engine import SubspaceEngine
from curvopt.optim.guards import all_finite
from tests.optimizer_db import BY_NAME, ENTRIES, FAMILY, HALF, RANK, SGD, WRAPPERS, World

pytestmark = pytest.mark.filterwarnings("ignore::curvopt._errors.GapWarning")
each = pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
BAD = [float("nan"), float("inf"), float("-inf")]


def momentum(entry):
    return {} if entry.wrapper and entry.name != "SubspaceScaled(SGD)" else {"momentum": 0.9}


def bad_step(entry, world, opt, value, i=0):
    """A step whose gradient holds one bad number."""

    def closure():
        loss = world.closure(opt, i)()
        world.params()[2].grad[0, 1] = value
        return loss

    if entry.needs_closure:
        return opt.step(closure)
    closure()
    return opt.step()


def everything(world, opt):
    """Parameters and all state tensors, copied."""
    out = {"flat": world.flat(), "values": opt.subspace.eigenvalues.clone()}
    for i, state in opt.state_dict()["state"].items():
        out |= {(i, k): v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    return out


def assert_same(before, after):
    assert before.keys() == after.keys()
    assert [k for k in before if not torch.equal(before[k], after[k])] == []


@each
@pytest.mark.parametrize("value", BAD)
def test_a_bad_gradient_changes_no_bit(entry, value):
    world = World()
    opt = entry.of(world, momentum(entry), refresh_every=1)
    entry.train(world, opt, entry.first_refresh + 3)
    before, counts = everything(world, opt), opt.stats()
    with pytest.warns(NonFiniteWarning, match="NaN or Inf gradients was refused: parameters, buffers and basis stay"):
        bad_step(entry, world, opt, value)
    assert_same(before, everything(world, opt))
    assert opt.stats()["matvecs"] == counts["matvecs"]
    assert opt.stats()["steps"] == counts["steps"]
    assert torch.isfinite(entry.train(world, opt, 2)).all()


@each
def test_a_bad_first_gradient_leaves_no_buffer(entry):
    world, clean = World(), World()
    opt = entry.of(world, momentum(entry))
    with pytest.warns(NonFiniteWarning):
        bad_step(entry, world, opt, float("nan"))
    steps = entry.first_refresh + 4
    # nothing of it stays: what follows is what a fresh optimizer does
    assert torch.equal(entry.train(world, opt, steps), entry.train(clean, entry.of(clean, momentum(entry)), steps))


@each
def test_five_in_a_row_raise(entry):
    world = World()
    opt = entry.of(world, momentum(entry))
    entry.train(world, opt, entry.first_refresh + 2)
    before = everything(world, opt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            bad_step(entry, world, opt, float("inf"))
    named = [w for w in caught if w.category is NonFiniteWarning]
    assert len(named) == 1, "once a refresh period"
    with pytest.raises(NonFiniteError, match="5 steps in a row had NaN or Inf gradients.*Lower lr, clip gradients"):
        bad_step(entry, world, opt, float("inf"))
    assert_same(before, everything(world, opt))


def test_a_good_step_between_starts_the_count_anew_and_it_is_saved():
    world = World()
    entry = BY_NAME["BulkSGD"]
    opt = entry.of(world)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(12):
            bad_step(entry, world, opt, float("nan")) if i % 4 else entry.train(world, opt, 1)
        fresh = entry.of(world)
        fresh.load_state_dict(opt.state_dict())
        bad_step(entry, world, fresh, float("nan"))
        with pytest.raises(NonFiniteError, match="5 steps in a row"):
            bad_step(entry, world, fresh, float("nan"))


def test_the_warning_comes_once_a_refresh_period():
    world = World()
    entry = BY_NAME["BulkSGD"]
    opt = entry.of(world, refresh_every=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NonFiniteWarning)
        for i in range(6):
            entry.train(world, opt, 1, start=i)
            bad_step(entry, world, opt, float("nan"))
    assert opt.stats()["refreshes"] == 3
    assert len([w for w in caught if w.category is NonFiniteWarning]) == 3


# ---- the route without a host read, taken off the CPU
@pytest.fixture
def deferred(monkeypatch):
    monkeypatch.setattr(SubspaceEngine, "deferred", staticmethod(lambda finite: True))


@pytest.mark.parametrize("entry", FAMILY, ids=lambda e: e.name)
@pytest.mark.parametrize("inputs", [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.4}], ids=str)
def test_the_deferred_route_gives_the_same(entry, inputs, monkeypatch):
    def run():
        world = World()
        # one basis throughout: a refused step counts as a step here, so periods would end elsewhere
        period = {"refresh_every": 100} if entry.products else {}
        opt = entry.of(world, inputs, **period)
        for i, bad in enumerate([0, 1, 0, 0, 1, 1, 0, 0] if entry.products else [0, 0, 0, 0]):
            bad_step(entry, world, opt, float("nan"), i) if bad else entry.train(world, opt, 1, start=i)
        return world.flat(), everything(world, opt)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at_once = run()
        monkeypatch.setattr(SubspaceEngine, "deferred", staticmethod(lambda finite: True))
        later = run()
    assert torch.isfinite(later[0]).all()
    assert_same(at_once[1], later[1])


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_the_deferred_route_keeps_the_basis_clean(deferred, project):
    for entry in FAMILY:
        if project == "gradient" and not entry.products:
            continue
        world = World()
        opt = entry.of(world, {"momentum": 0.9}, refresh_every=2, project=project)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i in range(12):
                bad_step(entry, world, opt, float("inf"), i) if i % 3 == 1 else entry.train(world, opt, 1, start=i)
        for name, value in everything(world, opt).items():
            assert torch.isfinite(value).all(), (entry.name, name)


def test_the_deferred_route_warns_and_raises_with_the_next_refresh(deferred):
    world, entry = World(), BY_NAME["BulkSGD"]
    opt = entry.of(world, refresh_every=4)
    entry.train(world, opt, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bad_step(entry, world, opt, float("nan"))
        entry.train(world, opt, 2)
    with pytest.warns(NonFiniteWarning):
        entry.train(world, opt, 1)
    before = world.flat()
    with pytest.raises(NonFiniteError, match="[5-8] steps in a row"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(20):
            bad_step(entry, world, opt, float("nan"))
    assert torch.equal(before, world.flat())


@pytest.mark.parametrize("options", [{"rank": 0}, {"refresh_every": "frozen"}], ids=str)
def test_the_deferred_route_without_refreshes_looks_every_hundred_steps(deferred, options):
    world, entry = World(), BY_NAME["BulkSGD"]
    opt = entry.of(world, **options)
    entry.train(world, opt, 1)
    with pytest.raises(NonFiniteError, match="99 steps in a row"):
        for _ in range(101):
            bad_step(entry, world, opt, float("nan"))


@pytest.mark.parametrize("given", [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3}], ids=str)
def test_the_deferred_route_at_rank_0_is_sgd_bit_for_bit(deferred, given):
    world, plain = World(torch.float32), World(torch.float32)
    ours = world.train(BulkSGD(world.params(), lr=0.05, rank=0, **given), 20)
    assert torch.equal(ours, plain.train(torch.optim.SGD(plain.params(), lr=0.05, **given), 20))


def test_what_is_read_of_gradients():
    assert bool(all_finite([]))
    assert bool(all_finite([torch.empty(0), torch.ones(2)]))
    assert bool(all_finite([torch.ones(2), torch.full((2,), 1e300, dtype=torch.float64)]))
    assert bool(all_finite([torch.full((2,), 65504.0, dtype=torch.float16)]))
    for value in BAD:
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64):
            assert not bool(all_finite([torch.ones(3), torch.tensor([1.0, value], dtype=dtype)]))


# ---- wrappers that don't look
@pytest.mark.parametrize("entry", [e for e in WRAPPERS if not e.needs_closure], ids=lambda e: e.name)
def test_check_finite_false_lets_the_base_see_everything(entry):
    world, plain = World(), World()
    opt = entry.of(world, check_finite=False)
    left = entry.train(world, opt, 3)
    assert torch.equal(left, entry.train(plain, entry.of(plain), 3)), "no difference while all is finite"
    with warnings.catch_warnings():
        warnings.simplefilter("error", NonFiniteWarning)
        bad_step(entry, world, opt, float("nan"))
    assert world.flat().isnan().any()
    assert opt.stats()["steps"] == 4


def test_lbfgs_returns_the_loss_of_a_refused_step():
    entry, world = BY_NAME["SubspaceScaled(LBFGS)"], World()
    opt = entry.of(world)
    with pytest.warns(NonFiniteWarning):
        loss = bad_step(entry, world, opt, float("nan"))
    assert loss.item() == world.loss(0).item()


# ---- refreshes that fail
def failing(world, error):
    """A curvature whose data are read anew at each refresh and fail from the second reading on."""
    readings = []

    def batch():
        readings.append(1)
        if len(readings) > 2:  # one at construction or the first refresh
            raise error
        return world.x, world.y

    return batch, readings


@pytest.mark.parametrize(
    "error", [OSError("disk gone"), KeyError("labels"), StopIteration(), ZeroDivisionError("by zero")], ids=repr
)
@pytest.mark.parametrize("name", ["BulkSGD", "SubspaceScaled(AdamW)"])
def test_data_that_raise_keep_the_old_basis(name, error):
    world, entry = World(), BY_NAME[name]
    batch, readings = failing(world, error)
    op = Hessian(world.model, world.loss_fn, batch)
    opt = entry.make(world.params(), op)
    while not opt.subspace.ready or len(readings) < 2:
        entry.train(world, opt, 1)
    old, refreshes = opt.subspace.basis.clone(), opt.subspace.refreshes
    flat = world.flat()
    text = rf"a refresh failed and the basis of \d steps ago stays in use: .*{type(error).__name__}"
    with pytest.warns(RefreshWarning, match=text):
        entry.train(world, opt, 4)
    assert torch.equal(old, opt.subspace.basis)
    assert opt.subspace.refreshes == refreshes
    assert not torch.equal(flat, world.flat()), "training goes on with the old basis"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.products], ids=lambda e: e.name)
def test_curvature_that_is_not_finite_keeps_the_old_basis(entry, value):
    world = World()
    data = [world.x.clone(), world.y]
    op = Hessian(world.model, world.loss_fn, lambda: tuple(data))
    opt = entry.make(world.params(), op)
    entry.train(world, opt, entry.first_refresh + 1)
    before = everything(world, opt)
    data[0] = torch.full_like(world.x, value)
    with pytest.warns(RefreshWarning, match="a refresh failed and the basis of 1 steps ago stays in use: "):
        opt.refresh()
    assert_same(before, everything(world, opt))
    assert opt.stats()["age"] == 1
    data[0] = world.x
    opt.refresh()
    assert opt.stats()["age"] == 0


def test_a_failed_refresh_is_not_tried_again_at_every_step():
    world = World()
    batch, readings = failing(world, OSError("disk gone"))
    op = Hessian(world.model, world.loss_fn, batch)
    opt = BulkSGD(world.params(), lr=0.05, rank=RANK, curvature=op, refresh_every=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RefreshWarning)
        world.train(opt, 1)
        while len(readings) <= 2:
            world.train(opt, 1)
        tried = len(readings)
        world.train(opt, 4)
        assert len(readings) == tried
        world.train(opt, 1)
        assert len(readings) == tried + 1


def test_an_error_in_the_middle_of_a_step_leaves_it_repeatable():
    world, clean = World(), World()
    flaky = {"broken": True}

    def batch():
        if flaky["broken"]:
            raise OSError("not mounted yet")
        return world.x, world.y

    flaky["broken"] = False
    op = Hessian(world.model, world.loss_fn, batch)
    flaky["broken"] = True
    opt = BulkSGD(world.params(), lr=0.1, momentum=0.9, rank=RANK, curvature=op)
    world.closure(opt, 0)()
    op.set_batch(batch)
    with pytest.raises(OSError, match="not mounted yet"):
        opt.step()
    flaky["broken"] = False
    world.train(opt, 2)
    reference = BulkSGD(clean.params(), lr=0.1, momentum=0.9, rank=RANK, curvature=clean.curvature())
    # the second attempt starts from other random directions: the same subspace within the solver's tolerance
    torch.testing.assert_close(world.flat(), clean.train(reference, 2), rtol=1e-3, atol=1e-3)


# ---- curvature from a closure touches nothing else
@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_of_parameters_outside_survive_a_closure_refresh(to_none):
    world = World()
    added = nn.Parameter(torch.zeros(3).double())
    opt = InterpolatedSGD(world.params(), lr=0.1, rank=RANK, curvature="closure", refresh_every=1, **HALF)
    opt.add_param_group({"params": [added]})

    def closure():
        opt.zero_grad(set_to_none=to_none)
        loss = world.loss(0) + ((added - 1).square() * world.params()[1][:3]).sum()
        loss.backward()
        return loss

    closure()
    expected = added.grad.clone()
    opt.step(closure)
    assert torch.equal(added.grad, expected)
    assert torch.equal(added, -0.1 * expected)


def test_closure_curvature_leaves_gradients_and_calls_in_known_numbers():
    world = World()
    calls = []
    opt = SubspaceScaled(SGD(world.params()), rank=RANK, curvature="closure", refresh_every=3, **HALF)

    def closure(i):
        def evaluate():
            calls.append(i)
            return world.closure(opt, i)()

        return evaluate

    for i in range(6):
        before, products = len(calls), opt.stats()["matvecs"]
        opt.step(closure(i))
        spent = len(calls) - before
        # one call is the step's own; a product costs two, and a refresh checks one point twice
        assert spent == 1 + (2 * (opt.stats()["matvecs"] - products) + 1 if i % 3 == 0 else 0)


def test_curvature_closure_is_what_is_differentiated():
    left, right = World(), World()
    calls = []

    def larger(world, opt):
        def evaluate():
            calls.append(1)
            opt.zero_grad()
            loss = world.loss_fn(world.model(world.x), world.y)
            loss.backward()
            return loss

        return evaluate

    opt = BulkSGD(left.params(), lr=0.1, rank=RANK, curvature="closure", refresh_every=2)
    opt.curvature_closure = larger(left, opt)
    left.train(opt, 5)  # and no closure is needed in step
    assert calls
    exact = BulkSGD(right.params(), lr=0.1, rank=RANK, curvature=right.curvature(), refresh_every=2)
    right.train(exact, 5)
    # central differences in float64 are good to 1e-9 or so; the basis to the same, over a gap of more than 2
    torch.testing.assert_close(left.flat(), right.flat(), rtol=1e-5, atol=1e-6)


def test_a_closure_serves_where_double_backward_does_not():
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * x.cos()

    world, twin = World(), World()

    class Act(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.f = f

        def forward(self, x):
            return self.f(x)

    world.model[1], twin.model[1] = Act(Round.apply), Act(torch.sin)
    opt = BulkSGD(world.params(), lr=0.1, rank=RANK, curvature="closure", refresh_every=2)
    exact = BulkSGD(twin.params(), lr=0.1, rank=RANK, curvature="closure", refresh_every=2)
    assert torch.equal(world.train(opt, 5, closure=True), twin.train(exact, 5, closure=True))
    assert opt.subspace.eigenvalues.min() > 0


@each
def test_a_nan_loss_leaves_everything(entry):
    world = World()
    opt = entry.of(world, momentum(entry))
    entry.train(world, opt, entry.first_refresh + 2)
    before = everything(world, opt)
    x, world.x = world.x, torch.full_like(world.x, float("nan"))
    with pytest.warns(NonFiniteWarning):
        entry.train(world, opt, 1)
    world.x = x
    assert_same(before, everything(world, opt))


@pytest.mark.parametrize("entry", [e for e in ENTRIES if not e.needs_closure], ids=lambda e: e.name)
def test_a_step_without_any_gradient_moves_nothing(entry):
    world = World()
    opt = entry.of(world, momentum(entry))
    before = world.flat()
    opt.step()
    assert torch.equal(before, world.flat())
    entry.train(world, opt, entry.first_refresh + 3)
    before = world.flat()
    opt.zero_grad()
    opt.step()
    assert torch.equal(before, world.flat())
    assert torch.isfinite(entry.train(world, opt, 2)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64])
def test_finite_gradients_whose_sum_overflows_are_finite(dtype):
    top = torch.finfo(dtype).max
    huge = torch.full((100,), top, dtype=dtype)
    assert bool(all_finite([torch.ones(3, dtype=dtype), huge]))
    for bad in BAD:
        for spot in (0, 57, 99):
            broken = huge.clone()
            broken[spot] = bad
            assert not bool(all_finite([torch.ones(3, dtype=dtype), broken]))
            single = torch.zeros(100, dtype=dtype)
            single[spot] = bad
            assert not bool(all_finite([single, torch.ones(3, dtype=dtype)]))
    # Infinities of both signs give a NaN sum; an empty gradient has no entry that could be wrong.
    assert not bool(all_finite([torch.tensor([float("inf"), -float("inf")]).to(dtype)]))
    assert bool(all_finite([torch.empty(0, dtype=dtype)]))
