"""SubspaceScaled around optimizers of every kind: the base is the user's, and stays what it was."""

import copy
import warnings

import pytest
import torch
from torch import nn

from curvopt.optim import BulkSGD, SubspaceScaled
from tests.optimizer_db import BY_NAME, HALF, RANK, WRAPPERS, World

pytestmark = [
    pytest.mark.filterwarnings("ignore::curvopt._errors.GapWarning"),
    pytest.mark.filterwarnings("ignore::curvopt._errors.RefreshWarning"),
]
each = pytest.mark.parametrize("entry", WRAPPERS, ids=lambda e: e.name)

# Every dense first-order rule of torch.optim, at a rate at which it moves.
TORCH = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 0.02, "amsgrad": True},
    "AdamW": {"lr": 0.02, "weight_decay": 0.1},
    "NAdam": {"lr": 0.02},
    "RAdam": {"lr": 0.02},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "Adagrad": {"lr": 0.05},
    "Adadelta": {"lr": 1.0},
    "Adamax": {"lr": 0.02},
    "ASGD": {"lr": 0.05},
    "Rprop": {"lr": 0.01},
    "Adafactor": {"lr": 0.05},
}


@each
def test_groups_and_state_are_the_bases_own(entry):
    world = World()
    opt = entry.of(world)
    assert opt.param_groups is opt.base.param_groups
    assert opt.state is opt.base.state
    assert opt.defaults is opt.base.defaults
    entry.train(world, opt, 2)
    assert opt.param_groups is opt.base.param_groups
    opt.param_groups = list(opt.base.param_groups)
    assert opt.base.param_groups is opt.param_groups
    assert isinstance(opt, torch.optim.Optimizer)


@each
def test_nothing_is_written_into_the_bases_state(entry):
    world = World()
    opt = entry.of(world)
    entry.train(world, opt, entry.first_refresh + 4)
    keys = {key for state in opt.base.state.values() for key in state}
    assert not any(str(key).startswith("curvopt_") for key in keys)
    assert not any("curvopt_" in str(key) for state in opt.base.state_dict()["state"].values() for key in state)


@pytest.mark.parametrize("name", TORCH)
def test_every_rule_of_torch(name):
    world, twin, plain = World(), World(), World()
    cls = getattr(torch.optim, name)
    opt = SubspaceScaled(
        cls(world.params(), **TORCH[name]), curvature=world.curvature(), rank=RANK, refresh_every=3, **HALF
    )
    ones = SubspaceScaled(
        cls(twin.params(), **TORCH[name]), curvature=twin.curvature(), rank=RANK, dominant=1.0, bulk=1.0
    )
    base = plain.train(cls(plain.params(), **TORCH[name]), 8)
    # u = p_new - p_old and back is rounding in float64; 1e-12 leaves four orders for the problem to amplify it
    torch.testing.assert_close(twin.train(ones, 8), base, rtol=1e-12, atol=1e-12)
    split = world.train(opt, 8)
    assert torch.isfinite(split).all()
    assert not torch.allclose(split, base)
    saved = copy.deepcopy(opt.state_dict())
    cls(plain.params(), **TORCH[name]).load_state_dict(opt.base.state_dict())
    opt.load_state_dict(saved)
    assert torch.isfinite(world.train(opt, 2)).all()


@pytest.mark.parametrize("name", TORCH)
def test_one_step_is_the_split_of_the_bases_step(name):
    world, plain = World(), World()
    cls = getattr(torch.optim, name)
    opt = SubspaceScaled(cls(world.params(), **TORCH[name]), curvature=world.curvature(), rank=RANK, **HALF)
    start = world.flat()
    u = plain.train(cls(plain.params(), **TORCH[name]), 1) - start
    moved = world.train(opt, 1) - start
    basis = opt.subspace.basis
    inside = basis @ (basis.T @ u)
    torch.testing.assert_close(moved, 0.5 * inside + 1.5 * (u - inside), rtol=1e-10, atol=1e-14)


def test_lbfgs_with_a_line_search():
    world, plain = World(), World()
    given = {"lr": 1.0, "max_iter": 4, "line_search_fn": "strong_wolfe"}
    opt = SubspaceScaled(
        torch.optim.LBFGS(world.params(), **given), curvature=world.curvature(), rank=RANK, dominant=1.0, bulk=1.0
    )
    base = torch.optim.LBFGS(plain.params(), **given)
    torch.testing.assert_close(
        world.train(opt, 3, closure=True), plain.train(base, 3, closure=True), rtol=1e-9, atol=1e-9
    )


def test_the_gradient_is_what_is_split_on_demand():
    world, plain = World(), World()
    opt = SubspaceScaled(
        torch.optim.SGD(world.params(), lr=0.1), curvature=world.curvature(), rank=RANK, project="gradient", **HALF
    )
    update = SubspaceScaled(
        torch.optim.SGD(plain.params(), lr=0.1), curvature=plain.curvature(), rank=RANK, project="update", **HALF
    )
    # without momentum a rule linear in the gradient makes no difference between the two
    torch.testing.assert_close(world.train(opt, 4), plain.train(update, 4), rtol=1e-11, atol=1e-12)


def test_rank_0_scales_or_leaves_alone():
    world, plain, scaled = World(), World(), World()
    base = plain.train(torch.optim.AdamW(plain.params(), lr=0.02), 5)
    same = world.train(SubspaceScaled(torch.optim.AdamW(world.params(), lr=0.02), rank=0), 5)
    assert torch.equal(same, base)
    opt = SubspaceScaled(torch.optim.SGD(scaled.params(), lr=0.1), rank=0, bulk=0.5)
    half = World()
    torch.testing.assert_close(
        scaled.train(opt, 5), half.train(torch.optim.SGD(half.params(), lr=0.05), 5), rtol=1e-12, atol=1e-13
    )


class Greedy(torch.optim.SGD):
    """Takes the gradients away, as some libraries do."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"])
                    p.grad = None


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_a_base_that_consumes_gradients(project):
    world, plain = World(), World()
    given = {"rank": RANK, "refresh_every": 2, "project": project, **HALF}
    opt = SubspaceScaled(Greedy(world.params(), lr=0.1), curvature=world.curvature(), **given)
    other = SubspaceScaled(torch.optim.SGD(plain.params(), lr=0.1), curvature=plain.curvature(), **given)
    torch.testing.assert_close(world.train(opt, 5), plain.train(other, 5), rtol=1e-12, atol=1e-13)
    assert all(p.grad is None for p in world.params())


def test_a_schedule_on_the_base_reaches_the_step():
    world = World()
    base = torch.optim.SGD(world.params(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(base, 0.5)
    opt = SubspaceScaled(base, curvature=world.curvature(), rank=RANK)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        world.train(opt, 1)
        schedule.step()
    assert opt.param_groups[0]["lr"] == 0.05


def test_the_bases_own_hooks_fire():
    world = World()
    base = torch.optim.SGD(world.params(), lr=0.1)
    seen = []
    base.register_step_pre_hook(lambda *rest: seen.append("pre"))
    base.register_step_post_hook(lambda *rest: seen.append("post"))
    base.register_state_dict_post_hook(lambda o, sd: seen.append("saved"))
    opt = SubspaceScaled(base, curvature=world.curvature(), rank=RANK)
    world.train(opt, 1)
    opt.state_dict()
    assert seen == ["pre", "post", "saved"]


def test_the_base_may_hold_state_already():
    world, plain = World(), World()
    base, other = (torch.optim.AdamW(w.params(), lr=0.02) for w in (world, plain))
    world.train(base, 3)
    plain.train(other, 3)
    opt = SubspaceScaled(base, curvature=world.curvature(), rank=RANK, dominant=1.0, bulk=1.0)
    torch.testing.assert_close(world.train(opt, 3, 3), plain.train(other, 3, 3), rtol=1e-12, atol=1e-12)


def test_decoupled_decay_stays_outside_the_preconditioned_split():
    entry = BY_NAME["SubspaceScaled(AdamW)-preconditioner"]
    moved = []
    for decay in (0.0, 0.3):
        world = World()
        opt = entry.of(world, {"weight_decay": decay}, refresh_every=100)
        world.train(opt, 11)
        # the same weights, moments and basis for one step with and without decay
        if decay == 0.0:
            weights, saved = copy.deepcopy((world.model.state_dict(), opt.state_dict()))
        world.model.load_state_dict(weights)
        opt.load_state_dict(copy.deepcopy(saved))
        opt.param_groups[0]["weight_decay"] = decay
        before = world.flat()
        moved.append(world.train(opt, 1, 11) - before)
    lr = opt.param_groups[0]["lr"]
    torch.testing.assert_close(moved[1], moved[0] - lr * 0.3 * before, rtol=1e-10, atol=1e-13)


def test_third_party_bases():
    optimizers = pytest.importorskip("torch_optimizer", reason="the extra 'optimizers' is not installed")
    for name, given in (("Yogi", {"lr": 0.02}), ("AggMo", {"lr": 0.01}), ("SGDP", {"lr": 0.05, "momentum": 0.9})):
        cls = getattr(optimizers, name)
        world, twin, plain = World(), World(), World()
        base = plain.train(cls(plain.params(), **given), 5)
        ones = SubspaceScaled(
            cls(twin.params(), **given), curvature=twin.curvature(), rank=RANK, dominant=1.0, bulk=1.0
        )
        torch.testing.assert_close(twin.train(ones, 5), base, rtol=1e-11, atol=1e-11)
        opt = SubspaceScaled(cls(world.params(), **given), curvature=world.curvature(), rank=RANK, **HALF)
        assert torch.isfinite(world.train(opt, 5)).all()
        fresh = SubspaceScaled(cls(world.params(), **given), curvature=world.curvature(), rank=RANK, **HALF)
        fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert torch.equal(fresh.subspace.basis, opt.subspace.basis)


def test_a_base_with_modes_keeps_them():
    schedulefree = pytest.importorskip("schedulefree", reason="the extra 'optimizers' is not installed")
    world, plain = World(), World()
    base, other = (schedulefree.SGDScheduleFree(w.params(), lr=0.1) for w in (world, plain))
    opt = SubspaceScaled(base, curvature=world.curvature(), rank=RANK, dominant=1.0, bulk=1.0)
    base.train(), other.train()
    torch.testing.assert_close(world.train(opt, 4), plain.train(other, 4), rtol=1e-11, atol=1e-11)
    base.eval(), other.eval()
    torch.testing.assert_close(world.flat(), plain.flat(), rtol=1e-11, atol=1e-11)


def test_two_kinds_of_parameters_in_two_wrappers():
    world = World()
    first, second = list(world.model[0].parameters()), list(world.model[2].parameters())
    left = SubspaceScaled(torch.optim.AdamW(first, lr=0.02), curvature=world.curvature(params=first), rank=RANK, **HALF)
    right = BulkSGD(second, lr=0.1, curvature=world.curvature(params=second), rank=RANK)
    for i in range(4):
        world.model.zero_grad()
        world.loss(i).backward()
        left.step()
        right.step()
    assert torch.isfinite(world.flat()).all()
    assert left.subspace.parameters.total + right.subspace.parameters.total == 31


def test_a_wrapped_model_part_that_is_unused_costs_nothing():
    world = World()
    idle = nn.Parameter(torch.ones(3).double())
    opt = SubspaceScaled(
        torch.optim.AdamW([*world.params(), idle], lr=0.02), curvature=world.curvature(), rank=RANK, **HALF
    )
    world.train(opt, 3)
    assert torch.equal(idle, torch.ones_like(idle))
    assert idle not in opt.base.state or not opt.base.state[idle]
