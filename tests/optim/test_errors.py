"""Bad input of the optimizers: each gets its own error or named warning, checked by its text."""

import math

import pytest
import torch
from torch import nn

from curvopt._errors import (
    CurvatureError,
    EmptyDataError,
    LearningRateWarning,
    NondeterministicClosureError,
    NonFiniteError,
    NonFiniteWarning,
    RankWarning,
)
from curvopt._params import ParameterLayout
from curvopt.curvature.dense import DenseOperator, DiagonalOperator
from curvopt.optim import BulkSGD, InterpolatedSGD, SubspaceScaled
from tests.optimizer_db import BY_NAME, ENTRIES, FAMILY, RANK, SGD, World, errors

pytestmark = pytest.mark.filterwarnings("ignore::curvopt._errors.GapWarning")
BAD = [description for description, *_ in errors(World())]


@pytest.mark.parametrize("description", BAD)
def test_constructor_arguments(description):
    call, error, text = next(rest for name, *rest in errors(World()) if name == description)
    with pytest.raises(error, match=text):
        call()


def test_the_table_of_errors_names_each_case_once():
    assert len(set(BAD)) == len(BAD)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_sparse_gradient_is_refused_by_name(entry):
    model = nn.Sequential()
    model.add_module("table", nn.Embedding(5, 2, sparse=True))
    model.add_module("head", nn.Linear(2, 2))
    params = list(model.parameters())
    op = DiagonalOperator(torch.arange(1.0, 17.0))
    op.layout = ParameterLayout(params, [name for name, _ in model.named_parameters()])
    convertible = None if entry.name.startswith("GGN") else op
    opt = entry.make(params, op if convertible is None else convertible)

    def closure():
        opt.zero_grad()
        loss = model(torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    closure()
    named = "'table.weight'" if entry.products else "'0'"
    with pytest.raises(RuntimeError, match=f"parameter {named} has a sparse gradient.*sparse=False"):
        opt.step(closure) if entry.needs_closure else opt.step()


def test_sparse_gradient_outside_the_subspace_is_refused_by_its_shape():
    table, vector = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.ones(3))
    op = DiagonalOperator(torch.tensor([3.0, 2.0, 1.0]))
    op.layout = ParameterLayout([vector])
    opt = BulkSGD([table.weight, vector], lr=0.1, rank=1, curvature=op)
    (table(torch.tensor([1])).sum() + vector.sum()).backward()
    with pytest.raises(RuntimeError, match=r"parameter of shape \(5, 2\) has a sparse gradient"):
        opt.step()


def test_complex_parameters():
    z = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="real floating-point.*complex64"):
        InterpolatedSGD([z], lr=0.1, rank=1, dominant=0.5, bulk=1.0, source="history")
    # without a subspace there is nothing in the way
    twin = nn.Parameter(z.detach().clone())
    ours, theirs = BulkSGD([z], lr=0.1, momentum=0.9, rank=0), torch.optim.SGD([twin], lr=0.1, momentum=0.9)
    for _ in range(3):
        for p, opt in ((z, ours), (twin, theirs)):
            opt.zero_grad()
            p.abs().square().sum().backward()
            opt.step()
    assert torch.equal(z, twin)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_inference_mode(entry):
    world = World()
    opt = entry.of(world)
    world.closure(opt, 0)()
    with torch.inference_mode(), pytest.raises(CurvatureError, match=r"step\(\) ran inside torch\.inference_mode"):
        opt.step()


# ---- curvature from a closure
def closure_sgd(world, **options):
    return BulkSGD(world.params(), lr=0.1, rank=RANK, curvature="closure", refresh_every=3, **options)


def test_closure_missing():
    world = World()
    opt = closure_sgd(world)
    world.closure(opt, 0)()
    before = world.flat()
    with pytest.raises(ValueError, match=r"curvature='closure' needs step\(closure\).*curvature_closure="):
        opt.step()
    with pytest.raises(ValueError, match=r"curvature='closure' needs"):
        opt.refresh()
    assert torch.equal(before, world.flat())


def test_closure_that_returns_nothing():
    world = World()
    opt = closure_sgd(world)

    def closure():
        opt.zero_grad()
        world.loss(0).backward()

    with pytest.raises(TypeError, match="closure returned None: the closure must return the loss"):
        opt.step(closure)


def test_closure_that_never_calls_backward():
    world = World()
    opt = closure_sgd(world)
    world.closure(opt, 0)()
    with pytest.raises(ValueError, match=r"left no gradient in any parameter: it must call loss\.backward\(\)"):
        opt.step(lambda: world.loss(0))


def test_closure_that_draws_new_data():
    world = World()
    opt = closure_sgd(world)
    calls = iter(range(100))
    with pytest.raises(NondeterministicClosureError, match="same weights gave losses.*Give curvature_closure="):
        opt.step(lambda: world.closure(opt, next(calls))())


def test_curvature_closure_needs_a_closure_at_all():
    world = World()
    opt = BulkSGD(world.params(), lr=0.1, rank=RANK, curvature=world.curvature())
    with pytest.raises(ValueError, match="curvature_closure is for curvature='closure'"):
        opt.curvature_closure = lambda: None


# ---- the operator
def test_empty_data():
    world = World()
    with pytest.raises(EmptyDataError):
        BulkSGD(world.params(), lr=0.1, rank=RANK, curvature=type(world.curvature())(world.model, world.loss_fn, []))


def test_first_refresh_that_fails_raises_and_leaves_everything():
    world = World()
    opt = BulkSGD(world.params(), lr=0.1, momentum=0.9, rank=RANK, curvature=world.curvature())
    world.closure(opt, 0)()
    with torch.no_grad():
        world.x.fill_(float("nan"))  # after the gradient: the step's own gradients are finite
    before = world.flat()
    with pytest.raises((NonFiniteError, CurvatureError)):
        opt.step()
    assert torch.equal(before, world.flat())
    assert not any("momentum_buffer" in state for state in opt.state.values())


def test_indefinite_curvature_with_too_few_positive_eigenvalues():
    p = nn.Parameter(torch.ones(6, dtype=torch.float64))
    op = DiagonalOperator(torch.tensor([3.0, -1.0, -2.0, -3.0, -4.0, -5.0], dtype=torch.float64))
    op.layout = ParameterLayout([p])
    opt = BulkSGD([p], lr=0.1, rank=3, curvature=op)
    p.grad = torch.ones_like(p)
    with pytest.warns(
        RankWarning, match="only 1 of rank=3 curvature eigenvalues are positive.*Lower rank, or take the"
    ):
        opt.step()
    # the one positive direction is taken out, the others count as bulk; 1e-6: the solver's tolerance, squared, and more
    torch.testing.assert_close(p.detach(), torch.tensor([1.0] + 5 * [0.9]).double(), atol=1e-6, rtol=0)


def test_rank_that_the_loss_does_not_tell():
    p = nn.Parameter(torch.ones(30, dtype=torch.float64))
    op = DiagonalOperator(torch.arange(1.0, 31.0, dtype=torch.float64))
    op.layout = ParameterLayout([p])
    with pytest.warns(
        RankWarning, match="rank=None: curvature and loss do not tell the number of outputs; taking rank=10"
    ):
        opt = BulkSGD([p], lr=0.1, curvature=op)
    assert opt.subspace.rank == 10


def test_rank_from_the_loss():
    world = World()
    assert BulkSGD(world.params(), lr=0.1, curvature=world.curvature()).subspace.rank == 2  # three classes


@pytest.mark.parametrize("matrix", ["no layout", "other order", "no operator"])
def test_attaching_something_else(matrix):
    world = World()
    opt = BulkSGD(world.params(), lr=0.1, rank=RANK, curvature=world.curvature())
    if matrix == "no operator":
        with pytest.raises(TypeError, match="curvature must be an operator such as curvopt.Hessian, got Sequential"):
            opt.curvature = world.model
        return
    op = DenseOperator(torch.eye(31, dtype=torch.float64))
    if matrix == "other order":
        op.layout = ParameterLayout(world.params()[::-1])
    with pytest.raises(ValueError, match="over the same parameters, in the same order, as the basis"):
        opt.curvature = op


def test_attaching_and_refreshing_at_rank_0():
    world = World()
    opt = BulkSGD(world.params(), lr=0.1, rank=0)
    with pytest.raises(ValueError, match="rank=0 and source='history' use no operator"):
        opt.curvature = world.curvature()
    with pytest.raises(ValueError, match="rank=0 has no subspace to refresh"):
        opt.refresh()


# ---- the rule
@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (torch.ones(5), r"must return a number or shape \(2,\), got \(5,\)"),
        (float("nan"), r"returned .*nan.*: its numbers must be finite"),
        (torch.tensor([1.0, math.inf]), r"returned \[1\.0, inf\]: its numbers must be finite"),
    ],
)
def test_a_function_of_the_eigenvalues_that_answers_nonsense(answer, text):
    world = World()
    opt = InterpolatedSGD(
        world.params(), lr=0.1, rank=RANK, curvature=world.curvature(), dominant=lambda values, lr: answer, bulk=1.0
    )
    with pytest.raises(ValueError, match=text):
        world.train(opt, 1)


@pytest.mark.parametrize("options", [{"dominant": "edge"}, {"dominant": "newton"}, {"dominant": 0.5, "rank": "edge"}])
def test_a_scheduler_that_drives_lr_to_0(options):
    world = World()
    opt = InterpolatedSGD(
        world.params(), lr=0.5, curvature=world.curvature(), refresh_every=1, bulk=1.0, **{"rank": RANK, **options}
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.0 if i in (2, 3) else 1.0)
    world.train(opt, 2)
    schedule.step()
    schedule.step()
    before, basis, products = world.flat(), opt.subspace.basis.clone(), opt.curvature.matvecs
    with pytest.warns(LearningRateWarning, match=r"lr is 0 in every group, and .* divides by it: the basis is kept"):
        world.train(opt, 2)
    assert torch.equal(before, world.flat())
    assert torch.equal(basis, opt.subspace.basis)
    assert opt.curvature.matvecs == products
    schedule.step()
    schedule.step()
    world.train(opt, 1)
    assert not torch.equal(before, world.flat())
    assert torch.isfinite(world.flat()).all()


# ---- saved state
@pytest.mark.parametrize("entry", [e for e in FAMILY if e.name in ("BulkSGD", "GGNProjectedSGD")], ids=lambda e: e.name)
def test_a_closure_that_the_base_ignores_is_an_error(entry):
    class Deaf(torch.optim.SGD):
        def step(self, closure=None):
            return super().step()

    world = World()
    opt = SubspaceScaled(Deaf(world.params(), lr=0.1), curvature=world.curvature(), rank=RANK)
    with pytest.raises(RuntimeError, match="Deaf did not call the closure given to step"):
        opt.step(world.closure(opt, 0))


def test_no_state_yet_for_the_preconditioner():
    world = World()
    opt = SubspaceScaled(SGD(world.params()), curvature=world.curvature(), rank=RANK, metric="preconditioner")
    with pytest.raises(ValueError, match=r"metric='preconditioner' needs exp_avg_sq in the base optimizer's state"):
        world.train(opt, 12)


def test_refresh_by_hand_before_the_base_has_state():
    opt = BY_NAME["SubspaceScaled(AdamW)-preconditioner"].of(World())
    with pytest.raises(ValueError, match="needs exp_avg_sq in the base optimizer's state, but it has no state yet"):
        opt.refresh()


def test_warnings_point_at_the_users_line():
    world = World()
    opt = BulkSGD(world.params(), lr=0.1, rank=0)
    torch.optim.lr_scheduler.ConstantLR(opt)  # patches step: one frame more
    opt.param_groups[0]["params"][0].grad = torch.full((4, 3), math.nan, dtype=torch.float64)
    with pytest.warns(NonFiniteWarning) as caught:
        opt.step()
    assert caught[0].filename == __file__
