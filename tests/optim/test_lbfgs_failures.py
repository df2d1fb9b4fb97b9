"""What SubspaceLBFGS does when something is wrong: stated behaviours, named warnings, parameters never half-updated."""

import math
import warnings

import pytest
import torch
from torch import nn

from curvopt._errors import (
    LineSearchWarning,
    NondeterministicClosureError,
    NonFiniteError,
    NonFiniteWarning,
    RankWarning,
    RefreshWarning,
)
from curvopt.curvature import Hessian
from curvopt.optim import SubspaceLBFGS, SubspaceScaled
from tests.quadratics import Quartic, flat, parameters, with_spectrum


def bowl(seed=1, values=(30.0, 8.0, 2.0, 1.0, 0.5), c=0.3, dtype=torch.float64):
    """A Quartic of five unknowns and its parameters."""
    params = parameters([(3,), (2,)], dtype, seed)
    return Quartic(with_spectrum(list(values)).to(dtype), params, c), params


def closure_of(op, change=lambda loss: loss):
    """The closure of a Quartic; ``change`` sees the loss."""

    def closure():
        for p in op.params:
            p.grad = None
        op.backward()
        return change(torch.tensor(op.value(), dtype=op.dtype))

    return closure


def make(params, **options):
    return SubspaceLBFGS(params, **{"rank": 0, **options})


# ---- the constructor
BAD = [
    ({"lr": -1.0}, ValueError, r"Invalid learning rate: -1\.0"),
    ({"max_iter": 0}, ValueError, r"max_iter must be at least 1, got 0"),
    ({"max_iter": 2.5}, TypeError, r"max_iter must be an int, got 2\.5"),
    ({"max_eval": 0}, ValueError, r"max_eval must be at least 1, got 0"),
    ({"history_size": 0}, ValueError, r"history_size must be at least 1, got 0"),
    ({"tolerance_grad": -1e-3}, ValueError, r"tolerance_grad must be at least 0, got -0\.001"),
    ({"tolerance_change": math.nan}, ValueError, r"tolerance_change must be at least 0, got nan"),
    ({"line_search_fn": "wolfe"}, ValueError, r"line_search_fn must be 'armijo', 'strong_wolfe' or None, got 'wolfe'"),
    ({"rank": -1}, ValueError, r"rank must be at least 0, got -1"),
    ({"rank": 1.5}, TypeError, r"rank must be an int, got 1\.5"),
    ({"rank": "edge"}, TypeError, r"rank must be an int, got 'edge'"),
    ({"rank": None}, TypeError, r"rank must be an int, got None"),
    ({"rank": 6}, ValueError, r"rank=6 is larger than the number of parameters under the operator, 5"),
    ({"rank": 2, "curvature": None}, ValueError, r"curvature=None with rank > 0: give curvature="),
    ({"rank": 2, "curvature": "hessian"}, ValueError, r"curvature must be an operator, 'closure' or None, got 'hess"),
    ({"refresh_at": (5, 5)}, ValueError, r"refresh_at must hold iterations >= 0 in rising order, got \(5, 5\)"),
    ({"refresh_at": (-1,)}, ValueError, r"refresh_at must hold iterations >= 0"),
    ({"refresh_at": (1.5,)}, TypeError, r"refresh_at must hold iteration numbers, got \(1\.5,\)"),
    ({"refresh_every": 0}, ValueError, r"refresh_every must be at least 1 iteration, got 0"),
    ({"refresh_every": "auto"}, ValueError, r"refresh_every must be a number of iterations or 'frozen', got 'auto'"),
    ({"refresh_every": 1.5}, TypeError, r"refresh_every must be an int or 'frozen', got 1\.5"),
    ({"refresh_at": (), "refresh_every": "frozen"}, ValueError, r"never computes a basis: use rank=0"),
    ({"rounds": 0}, ValueError, r"rounds must be at least 1, got 0"),
    ({"cold_rounds": 0}, ValueError, r"cold_rounds must be at least 1, got 0"),
    ({"floor": 0.0}, ValueError, r"floor must lie between 0 and 1, got 0\.0"),
    ({"gamma_limit": 0.5}, ValueError, r"gamma_limit must be at least 1, got 0\.5"),
    ({"curvature_closure": print, "curvature": None}, ValueError, r"curvature_closure is for curvature='closure'"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD, ids=lambda x: str(x)[:30])
def test_bad_arguments_are_named(options, error, text):
    with pytest.raises(error, match=text):
        make(bowl()[1], **options)


def test_an_empty_list_of_parameters_is_an_error():
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        SubspaceLBFGS([])
    with pytest.raises(ValueError, match="at least one parameter that requires grad"):
        SubspaceLBFGS([torch.zeros(3)])


def test_it_can_not_be_wrapped():
    with pytest.raises(TypeError, match="base is a SubspaceLBFGS, which splits its updates itself"):
        SubspaceScaled(make(bowl()[1]), rank=0)


def test_groups_must_agree():
    _, params = bowl()
    opt = make([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}])
    with pytest.raises(ValueError, match=r"share one line search, so their lr must agree, got \[1\.0, 0\.1\]"):
        opt.step(lambda: None)


# ---- the closure
@pytest.mark.parametrize(
    ("closure", "error", "text"),
    [
        (None, ValueError, r"SubspaceLBFGS needs step\(closure\): a function that clears the gradients"),
        (3, TypeError, r"closure must be a function without arguments, got int"),
        (lambda: None, TypeError, r"the closure returned None: it must return the loss"),
        (lambda: torch.zeros(2), ValueError, r"must return the loss, a scalar; its shape is \(2,\)"),
        (lambda: "low", TypeError, r"must return the loss, a scalar tensor; it returned str"),
        (lambda: torch.tensor(1.0), ValueError, r"left no gradient in any parameter: it must call loss\.backward\(\)"),
    ],
)
def test_bad_closures_are_named_and_move_nothing(closure, error, text):
    _, params = bowl()
    before = flat(params)
    for p in params:
        p.grad = torch.ones_like(p)  # left from an earlier step: not to be taken for this closure's
    opt = make(params)
    with pytest.raises(error, match=text):
        opt.step(closure)
    assert torch.equal(flat(params), before)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)

    def closure():
        loss = table(torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="sparse gradient, which this optimizer does not support"):
        make(table.parameters()).step(closure)


def test_inference_mode_is_refused():
    op, params = bowl()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        make(params).step(closure_of(op))


@pytest.mark.parametrize("search", ["armijo", "strong_wolfe", None])
@pytest.mark.parametrize("calls", [1, 2, 3, 5])
def test_an_error_in_the_closure_leaves_the_last_accepted_iterate(search, calls):
    op, params = bowl()
    twin_op, twin = bowl()
    left = [calls]

    def failing(loss):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return loss

    opt = make(params, line_search_fn=search, tolerance_grad=0.0)
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure_of(op, failing))
    # The iterates of an unbroken run, one a step.
    other, seen = make(twin, line_search_fn=search, max_iter=1, max_eval=99), [flat(twin)]
    for _ in range(5):
        other.step(closure_of(twin_op))
        seen.append(flat(twin))
    assert any(torch.equal(flat(params), x) for x in seen)
    assert opt.reason == "the step ended by an error"
    opt.step(closure_of(op))  # and it goes on


# ---- numbers that are none
def test_a_nan_loss_at_the_start_is_refused_five_times_and_then_raised():
    op, params = bowl()
    opt = make(params)
    opt.step(closure_of(op))
    before, pairs = flat(params), opt.stats()["pairs"]
    with pytest.warns(NonFiniteWarning, match="parameters, buffers and basis stay as they were"):
        opt.step(closure_of(op, lambda loss: loss * math.nan))
    assert "refused: the loss was nan" in opt.reason
    for _ in range(3):
        opt.step(closure_of(op, lambda loss: loss * math.inf))
    with pytest.raises(NonFiniteError, match="5 steps in a row had NaN or Inf"):
        opt.step(closure_of(op, lambda loss: loss * math.nan))
    assert torch.equal(flat(params), before)
    assert opt.stats()["pairs"] == pairs
    opt.step(closure_of(op))  # a good step ends the row
    assert opt.refusals.row == 0


def test_a_nan_gradient_is_refused_as_well():
    op, params = bowl()
    before = flat(params)

    def closure():
        loss = closure_of(op)()
        params[0].grad[0] = math.nan
        return loss

    with pytest.warns(NonFiniteWarning):
        make(params).step(closure)
    assert torch.equal(flat(params), before)


@pytest.mark.parametrize("search", ["armijo", "strong_wolfe"])
def test_a_search_backs_out_of_nan(search):
    # -log(1 - |x|^2) is NaN outside the unit ball, where a step of 1 leads.
    x = torch.tensor([0.6, 0.3], dtype=torch.float64, requires_grad=True)
    opt = make([x], line_search_fn=search)
    seen = []

    def closure():
        opt.zero_grad()
        loss = -torch.log(1 - x.square().sum()) + (x - 0.9 / math.sqrt(2)).square().sum() * 50
        loss.backward()
        seen.append(float(loss.detach()))
        return loss

    for _ in range(3):
        opt.step(closure)
    assert math.isfinite(seen[-1]) and seen[-1] < seen[0]
    assert float(x.detach().square().sum()) < 1


# ---- line searches that fail
@pytest.mark.parametrize("search", ["armijo", "strong_wolfe"])
def test_ten_failures_in_a_row_are_named_and_nothing_moves(search):
    op, params = bowl()
    before = flat(params)
    calls = []

    def uphill():
        closure_of(op)()
        for p in params:
            p.grad.neg_()  # the gradient of another function
        calls.append(1)
        return torch.tensor(op.value(), dtype=torch.float64)

    opt = make(params, line_search_fn=search)
    with pytest.warns(LineSearchWarning) as caught:
        for _ in range(10):
            opt.step(uphill)
            assert torch.equal(flat(params), before)
            assert opt.reason.startswith("the line search failed along every direction")
    told = [str(w.message) for w in caught]
    assert len([t for t in told if t.startswith("a step ended early")]) == 3
    assert len([t for t in told if re_ten(t)]) == 1
    assert opt.stats()["failures"] == 10
    # From now on a step at this loss is one call.
    spent = len(calls)
    opt.step(uphill)
    assert len(calls) == spent + 1
    assert "nothing has changed since 10 searches in a row failed" in opt.reason
    # A closure that is right again is followed again.
    twin, good = bowl(), opt
    with torch.no_grad():
        for p in params:
            p.add_(0.01)
    good.step(closure_of(op))
    assert op.value() < twin[0].value()


def re_ten(text):
    return text.startswith("10 line searches in a row failed") and "as they were" in text


def test_a_failed_search_is_tried_again_without_history():
    op, params = bowl()
    opt = make(params)
    opt.step(closure_of(op))
    history = opt._quasi.history
    assert history.count > 2
    with torch.no_grad():
        for p in params:
            p.add_(0.5)
    history.steps.mul_(-1e-3)  # s . y < 0: pairs that no search would have kept
    history.products.mul_(-1e-3)
    before = op.value()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step(closure_of(op))
    assert op.value() < before
    assert all(issubclass(w.category, LineSearchWarning) for w in caught)
    assert opt.stats()["failures"] + opt.stats()["dropped"] >= 1


def test_a_direction_that_does_not_descend_is_dropped_and_named():
    op, params = bowl()
    opt = make(params)
    opt.step(closure_of(op))
    with torch.no_grad():
        for p in params:
            p.add_(0.5)
    opt._quasi.history.products.fill_(math.nan)
    before = op.value()
    with pytest.warns(LineSearchWarning, match=r"direction of the history of pairs does not descend \(slope nan\)"):
        opt.step(closure_of(op))
    assert op.value() < before
    assert opt.stats()["dropped"] == 1


def test_a_loss_that_is_exact_to_rounding_ends_quietly():
    _, params = bowl()
    before = flat(params)

    calls = []

    def coarse():
        """1e6, and one rounding of a long sum more wherever a search looks, while the gradient is not yet zero."""
        for p in params:
            p.grad = torch.full_like(p, 1e-5)
        calls.append(1)
        return torch.tensor(1e6 + (2e-9 if len(calls) > 1 else 0.0), dtype=torch.float64)

    opt = make(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(15):
            calls.clear()
            opt.step(coarse)
    assert "is exact to rounding: the slope predicts a change of -5e-10" in opt.reason
    assert torch.equal(flat(params), before)


# ---- closures that are not one function
def test_points_drawn_at_every_call_are_found_by_the_refresh():
    op, params = bowl()
    generator = torch.Generator().manual_seed(0)  # out of reach of the seeding of torch's own generator
    opt = make(params, rank=2, refresh_at=(0,))

    def noisy():
        loss = closure_of(op)()
        for p in params:
            p.grad.mul_(1 + 0.1 * torch.rand((), generator=generator, dtype=torch.float64))
        return loss

    before = flat(params)
    with pytest.raises(NondeterministicClosureError, match="curvature_closure="):
        opt.step(noisy)
    assert torch.equal(flat(params), before)


def test_points_drawn_at_every_call_are_found_by_a_failed_search():
    op, params = bowl()
    opt = make(params)
    drift = [0.0]

    def rising():
        drift[0] += 1.0
        return closure_of(op, lambda loss: loss + drift[0] * 100)()

    before = flat(params)
    with pytest.raises(NondeterministicClosureError, match="a line search failed, and two calls .* once a step"):
        opt.step(rising)
    assert torch.equal(flat(params), before)


def test_new_points_each_step_are_followed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    opt = SubspaceLBFGS(model.parameters(), rank=5, refresh_at=(10,), refresh_every=20, max_iter=5)

    def loss_on(x):
        return (model(x) - torch.sin(3 * x)).square().mean()

    test = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None]
    first = float(loss_on(test).detach())
    for _ in range(30):
        x = torch.rand(60, 1, dtype=torch.float64) * 2 - 1

        def closure(x=x):
            opt.zero_grad()
            loss = loss_on(x)
            loss.backward()
            return loss

        opt.step(closure)
    assert float(loss_on(test).detach()) < 1e-2 * first


# ---- negative curvature
def test_pairs_of_negative_curvature_are_left_out_and_counted():
    x = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)  # between the wells of (x^2 - 1)^2
    opt = make([x], max_iter=1, max_eval=99)

    def closure():
        opt.zero_grad()
        loss = ((x.square() - 1).square()).sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.stats()["skipped"] == 1 and opt.stats()["pairs"] == 0
    for _ in range(20):
        opt.step(closure)
    assert float(x.detach()) == pytest.approx(1.0, abs=1e-8)


def test_negative_eigenvalues_are_left_out_of_the_basis():
    values = (50.0, 20.0, -30.0, -1.0, 0.5)
    op, params = bowl(values=values, c=3.0, seed=4)
    with torch.no_grad():
        for p in params:
            p.mul_(1e-3)  # where the quartic's own curvature is none
    opt = SubspaceLBFGS(params, rank=4, curvature=op, refresh_at=(0,), cold_rounds=30)
    opt.refresh()
    assert opt.stats()["kept"] == 2 and opt.subspace.live == 2
    assert torch.allclose(opt.subspace.eigenvalues[:2], torch.tensor([50.0, 20.0], dtype=torch.float64), rtol=1e-3)
    assert "kept 2 of 4 pairs above 0.001 of the largest" in opt.subspace.reason
    before = op.value()
    for _ in range(3):
        opt.step(closure_of(op))
    assert op.value() < before


def test_curvature_without_a_positive_value_is_named_and_plain_lbfgs_goes_on():
    op, params = bowl(values=(-5.0, -4.0, -3.0, -2.0, -1.0), c=1.0)
    with torch.no_grad():
        for p in params:
            p.mul_(1e-2)
    opt = SubspaceLBFGS(params, rank=3, curvature=op, refresh_at=(0,), refresh_every=1000)
    before = op.value()
    with pytest.warns(RankWarning, match="no curvature eigenvalue is positive .*plain L-BFGS"):
        opt.step(closure_of(op))
    assert opt.stats()["kept"] == 0
    assert op.value() < before


# ---- refreshes that fail
def test_a_failed_refresh_keeps_the_basis_and_says_why():
    op, params = bowl()
    opt = SubspaceLBFGS(params, rank=2, curvature=op, refresh_at=(0, 3), refresh_every=50, max_iter=2, max_eval=99)
    opt.step(closure_of(op))
    before, matvecs = opt.subspace.basis.clone(), opt.stats()["matvecs"]
    op.matrix = op.matrix * math.nan
    finite = op.slope, op.value

    # the loss stays finite: only the products are not
    clean, _ = bowl()
    op.slope, op.value = clean.slope, lambda: Quartic(clean.matrix, params, clean.c).value()
    with pytest.warns(RefreshWarning, match="a refresh failed, the basis of .* stays in use: NonFiniteError"):
        opt.step(closure_of(op))
        opt.step(closure_of(op))
    op.slope, op.value = finite
    assert torch.equal(opt.subspace.basis, before)
    assert opt.stats()["refreshes"] == 1 and opt.stats()["matvecs"] > matvecs
    assert opt._engine.next_refresh == 53  # not tried again at once


def test_a_first_refresh_that_fails_raises():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    data = (torch.randn(8, 3), torch.randn(8, 1))
    op = Hessian(model, nn.MSELoss(), data)

    def broken(rows):
        raise RuntimeError("no product today")

    op._multiply = broken
    opt = SubspaceLBFGS(model.parameters(), rank=2, curvature=op, refresh_at=(0,))
    before = flat(list(model.parameters()))

    def closure():
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(data[0]), data[1])
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="no product today"):
        opt.step(closure)
    assert torch.equal(flat(list(model.parameters())), before)


def test_no_subspace_to_refresh_at_rank_0():
    with pytest.raises(ValueError, match="rank=0 has no subspace to refresh"):
        make(bowl()[1]).refresh()


# ---- reasons
def test_the_reason_for_stopping_is_given_in_words():
    op, params = bowl(c=0.0)
    assert make(params).reason == "no step was taken yet"
    for options, text in [
        ({"max_iter": 2}, "max_iter=2 iterations are done"),
        ({"max_eval": 3, "max_iter": 9}, "3 calls of the closure reached max_eval=3"),
        ({"tolerance_grad": 1e9}, r"no gradient entry is above tolerance_grad=1e+09"),
        ({"tolerance_change": 1e9}, "no parameter moved by more than tolerance_change=1e+09"),
        ({"lr": 0.0}, "lr is 0: nothing moves"),
    ]:
        op, params = bowl()
        opt = make(params, **options)
        opt.step(closure_of(op))
        assert text in opt.reason, (options, opt.reason)
        assert opt.stats()["reason"] == opt.reason


def test_a_small_change_of_the_loss_is_a_reason_too():
    op, params = bowl()
    opt = make(params, tolerance_change=1e-4, max_iter=100, max_eval=200)
    opt.step(closure_of(op))
    assert "tolerance_change=0.0001" in opt.reason


def test_lr_0_moves_nothing():
    op, params = bowl()
    before = flat(params)
    opt = make(params, lr=0.0)
    assert float(opt.step(closure_of(op))) == op.value()
    assert opt.step() is None  # as torch.distributed.checkpoint calls it
    assert torch.equal(flat(params), before)
