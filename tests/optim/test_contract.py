"""An optimizer is an optimizer: what torch promises of every Optimizer, over all of ours from one table."""

import copy
import math
import warnings

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from torch import nn
from torch.optim import lr_scheduler

from curvopt._errors import CurvoptWarning
from curvopt._params import ParameterLayout
from curvopt.curvature.dense import DiagonalOperator
from curvopt.optim import BulkSGD, DomSGD, InterpolatedSGD, SubspaceScaled
from tests.optimizer_db import BY_NAME, ENTRIES, FAMILY, HALF, RANK, SGD_INPUTS, WRAPPERS, Entry, World

pytestmark = [
    pytest.mark.filterwarnings("ignore::curvopt._errors.GapWarning"),
    pytest.mark.filterwarnings("ignore::curvopt._errors.RefreshWarning"),
]
each = pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
each_without_closure = pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if not e.needs_closure], ids=lambda e: e.name
)
each_of_family = pytest.mark.parametrize("entry", FAMILY, ids=lambda e: e.name)


def steps_until_split(entry: Entry) -> int:
    """Steps after which the basis has been in use for a few."""
    return entry.first_refresh + 5


# ---- it trains, and it does split
@each
def test_it_splits_what_its_base_would_do(entry):
    world, plain = World(), World()
    opt = entry.of(world)
    steps = steps_until_split(entry)
    split = entry.train(world, opt, steps)
    base = plain.train(entry.base(plain.params()), steps, closure=entry.needs_closure)
    assert torch.isfinite(split).all()
    assert opt.stats()["refreshes"] >= 1
    assert opt.subspace.live > 0
    assert not torch.allclose(split, base)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.free], ids=lambda e: e.name)
def test_ones_are_the_base_optimizer(entry):
    world, plain = World(), World()
    opt = entry.of(world, dominant=1.0, bulk=1.0)
    steps = steps_until_split(entry)
    base = plain.train(entry.base(plain.params()), steps, closure=entry.needs_closure)
    # rounding of one displacement a step, in float64, through a smooth problem: 1e-12 is 4 orders above eps
    torch.testing.assert_close(entry.train(world, opt, steps), base, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inputs", SGD_INPUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rank_0_is_sgd_bit_for_bit(inputs, dtype):
    given = {"lr": 0.05, **SGD_INPUTS[inputs]}
    world, plain = World(dtype), World(dtype)
    ours = world.train(BulkSGD(world.params(), **given, rank=0), 100)
    theirs = plain.train(torch.optim.SGD(plain.params(), **given), 100)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, World(dtype).flat())


def test_rank_0_takes_every_input_of_torchs_own_sgd_tests():
    common = pytest.importorskip(
        "torch.testing._internal.common_optimizers", reason="torch's table of optimizer inputs needs expecttest"
    )
    inputs = common.optim_inputs_func_sgd(device="cpu")
    assert len(inputs) > 5
    for given in inputs:
        world, plain = World(), World()
        ours = world.train(BulkSGD(world.params(), **given.kwargs, rank=0), 5)
        theirs = plain.train(torch.optim.SGD(plain.params(), **given.kwargs), 5)
        assert torch.equal(ours, theirs), given.desc
        split = World()
        opt = BulkSGD(split.params(), **given.kwargs, rank=RANK, curvature=split.curvature())
        assert torch.isfinite(split.train(opt, 3)).all(), given.desc


def test_every_argument_error_of_torchs_own_sgd_tests():
    common = pytest.importorskip(
        "torch.testing._internal.common_optimizers", reason="torch's table of optimizer inputs needs expecttest"
    )
    tried = 0
    for bad in common.optim_error_inputs_func_sgd(device="cpu", dtype=torch.float64):
        if bad.error_type is UserWarning:
            continue  # duplicate parameters: a warning from torch, not an error
        kwargs = {"lr": 0.1, **bad.optimizer_error_input.kwargs}
        with pytest.raises(bad.error_type, match=bad.error_regex):
            BulkSGD(bad.optimizer_error_input.params, **kwargs, rank=0)
        tried += 1
    assert tried >= 5


@pytest.mark.parametrize("inputs", SGD_INPUTS, ids=str)
def test_sgds_arguments_enter_the_displacement(inputs):
    given = {"lr": 0.05, **SGD_INPUTS[inputs]}
    ours, wrapped, plain = World(), World(), World()
    family = InterpolatedSGD(ours.params(), **given, curvature=ours.curvature(), rank=RANK, refresh_every=2, **HALF)
    wrapper = SubspaceScaled(
        torch.optim.SGD(wrapped.params(), **given), curvature=wrapped.curvature(), rank=RANK, refresh_every=2, **HALF
    )
    left, right = ours.train(family, 8), wrapped.train(wrapper, 8)
    # the family computes the displacement itself, the wrapper measures it: they agree to rounding
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(left, plain.train(torch.optim.SGD(plain.params(), **given), 8))


def test_differentiable_is_forwarded():
    start = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    p = start.clone()
    p.grad = torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)
    op = DiagonalOperator(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    op.layout = ParameterLayout([p])
    opt = BulkSGD([p], lr=0.1, weight_decay=0.5, differentiable=True, curvature=op, rank=1)
    opt.step()
    p.sum().backward()
    # p' = p - lr (I - P) (g + 0.5 p), P onto the first axis: dp'/dp = (1, 0.95, 0.95); 1e-6: the basis is good to that
    torch.testing.assert_close(start.grad, torch.tensor([1.0, 0.95, 0.95], dtype=torch.float64), atol=1e-6, rtol=0)


# ---- groups
def two_groups(entry, world, **first):
    params = world.params()
    return entry.make([{"params": params[:2], **first}, {"params": params[2:]}], world.curvature())


@pytest.mark.parametrize("entry", [e for e in ENTRIES if not e.one_group], ids=lambda e: e.name)
def test_an_added_group_takes_the_bases_update(entry):
    world, added, alone = World(), nn.Parameter(torch.zeros(3).double()), nn.Parameter(torch.zeros(3).double())
    opt, reference = entry.of(world), entry.base([alone])
    first = entry.first_refresh + 2
    entry.train(world, opt, first)
    opt.add_param_group({"params": [added]})
    assert opt.param_groups[-1]["params"] == [added]
    for i in range(first, first + 6):
        opt.zero_grad()
        reference.zero_grad()
        (world.loss(i) + (added - 1).square().sum()).backward()
        (alone - 1).square().sum().backward()
        opt.step()
        reference.step()
    assert torch.equal(added, alone)
    assert added.abs().min() > 0


@pytest.mark.parametrize("entry", [e for e in ENTRIES if not e.one_group], ids=lambda e: e.name)
def test_the_subspace_spans_groups_with_their_own_lr(entry):
    world = World()
    opt = two_groups(entry, world, lr=0.0)
    still = [p.detach().clone() for p in world.params()[:2]]
    steps = steps_until_split(entry)
    before = world.flat()
    entry.train(world, opt, steps)
    assert opt.stats()["refreshes"] >= 1
    for p, old in zip(world.params()[:2], still, strict=True):
        assert torch.equal(p, old), "a group at lr 0 stays put, also where P u has an entry"
    assert not torch.equal(before, world.flat())


@pytest.mark.parametrize("entry", [e for e in ENTRIES if not e.one_group], ids=lambda e: e.name)
def test_a_group_at_a_tensor_lr_of_0_stays_put(entry):
    if "NAdam" in entry.name or "RMSprop" in entry.name or "AdamW" in entry.name:
        foreach = {"foreach": False}  # torch's foreach Adam family takes tensor lr only when capturable
    else:
        foreach = {}
    world = World()
    params = world.params()
    groups = [{"params": params[:2], "lr": torch.tensor(0.0)}, {"params": params[2:]}]
    opt = entry.make(groups, world.curvature(), foreach)
    still = [p.detach().clone() for p in params[:2]]
    entry.train(world, opt, steps_until_split(entry))
    assert all(torch.equal(p, old) for p, old in zip(params[:2], still, strict=True))


def test_named_parameters():
    world = World()
    opt = BulkSGD(world.model.named_parameters(), lr=0.1, rank=RANK, curvature=world.curvature())
    world.train(opt, 2)
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


# ---- gradients that are missing
@each_without_closure
def test_a_parameter_without_gradient_stays_where_it_is(entry):
    world = World()
    opt = entry.of(world)
    silent = world.params()[0]
    steps = steps_until_split(entry)
    entry.train(world, opt, steps)  # momentum and basis are there, and both have entries at this parameter
    before = silent.detach().clone()
    for i in range(steps, steps + 3):
        world.closure(opt, i)()
        silent.grad = None
        opt.step()
    assert torch.equal(silent, before)


@each_without_closure
def test_a_late_first_gradient(entry):
    world, plain = World(), World()
    opt, base = entry.of(world, dominant=1.0, bulk=1.0) if entry.free else entry.of(world), entry.base(plain.params())
    steps = steps_until_split(entry) + 3
    for i in range(steps):
        for w, o in ((world, opt), (plain, base)):
            w.closure(o, i)()
            if i < steps - 3:
                w.params()[1].grad = None  # its bias hears nothing at first
            o.step()
    assert torch.isfinite(world.flat()).all()
    if entry.free:
        torch.testing.assert_close(world.flat(), plain.flat(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "entry", [e for e in WRAPPERS if not e.needs_closure and not e.first_refresh], ids=lambda e: e.name
)
def test_a_wrapper_refreshed_before_its_bases_first_step(entry):
    world, plain = World(), World()
    opt, base = entry.of(world, dominant=1.0, bulk=1.0), entry.base(plain.params())
    world.closure(opt, 0)()
    opt.refresh()
    assert opt.subspace.ready
    assert all(len(state) == 0 for state in opt.base.state.values())
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)  # nor does loading make the base believe that it has begun
    assert all(len(state) == 0 for state in opt.base.state.values())
    torch.testing.assert_close(world.train(opt, 6), plain.train(base, 6), rtol=1e-12, atol=1e-12)


@each
def test_frozen_parameters(entry):
    world = World()
    frozen = world.params()[0].requires_grad_(False)
    before = frozen.detach().clone()
    opt = entry.of(world)
    entry.train(world, opt, steps_until_split(entry))
    assert torch.equal(frozen, before)
    assert opt.subspace.parameters.total == sum(p.numel() for p in world.params()[1:])


@each
def test_tied_parameters(entry):
    world = World()
    world.model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    world.model[2].weight = world.model[0].weight
    opt = entry.of(world)
    assert len(opt.param_groups[0]["params"]) == 3
    assert torch.isfinite(entry.train(world, opt, steps_until_split(entry))).all()
    assert world.model[2].weight is world.model[0].weight
    assert opt.subspace.parameters.total == 15


# ---- hooks and closures
@each
def test_step_hooks_fire_once(entry):
    world = World()
    opt = entry.of(world)
    seen = []
    opt.register_step_pre_hook(lambda o, *rest: seen.append(("pre", type(o))))
    opt.register_step_post_hook(lambda o, *rest: seen.append(("post", type(o))))
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(lambda o, *rest: seen.append(("global pre", type(o)))),
        torch_optimizer.register_optimizer_step_post_hook(lambda o, *rest: seen.append(("global post", type(o)))),
    ]
    try:
        entry.train(world, opt, 1)
    finally:
        for handle in handles:
            handle.remove()
    mine = [what for what, cls in seen if cls is type(opt)]
    assert sorted(mine) == ["global post", "global pre", "post", "pre"]
    # global hooks are for every optimizer that steps: the base is one, and steps once
    others = [(what, cls) for what, cls in seen if cls is not type(opt)]
    assert len(others) == (2 if entry.wrapper else 0)


@each
def test_the_closure_is_called_as_often_as_by_the_base(entry):
    world, plain = World(), World()
    opt, base = entry.of(world), entry.base(plain.params())
    calls = {"ours": 0, "base": 0}

    def counted(w, o, i, who):
        evaluate = w.closure(o, i)

        def closure():
            assert torch.is_grad_enabled()
            calls[who] += 1
            return evaluate()

        return closure

    for i in range(steps_until_split(entry)):
        before = calls["ours"]
        loss = opt.step(counted(world, opt, i, "ours"))
        assert isinstance(loss, torch.Tensor)
        base.step(counted(plain, base, i, "base"))
        if not entry.needs_closure:
            assert calls["ours"] == before + 1
    # L-BFGS may end an iteration earlier or later on the way that the split takes: at most its max_iter calls a step
    assert calls["ours"] <= (calls["base"] if not entry.needs_closure else 3 * 2 * steps_until_split(entry))


@each_without_closure
def test_step_with_closure_is_step_without(entry):
    left, right = World(), World()
    steps = steps_until_split(entry)
    assert torch.equal(left.train(entry.of(left), steps), right.train(entry.of(right), steps, closure=True))


@each
def test_grad_mode_is_restored(entry):
    for mode in (True, False):
        world = World()
        opt = entry.of(world)
        for i in range(2):
            closure = world.closure(opt, i)
            if not entry.needs_closure:
                closure()
            with torch.set_grad_enabled(mode):
                opt.step(closure) if entry.needs_closure else opt.step()
                assert torch.is_grad_enabled() is mode
        assert all(p.requires_grad and p.is_leaf for p in world.params())


@each
def test_grad_mode_is_restored_after_an_error(entry):
    world = World()
    opt = entry.of(world)

    def broken():
        raise KeyError("broken")

    with torch.no_grad(), pytest.raises(KeyError, match="broken"):
        opt.step(broken)
    assert torch.is_grad_enabled()
    assert torch.isfinite(entry.train(world, opt, 2)).all()


@each_without_closure
def test_gradients_are_left_as_the_user_computed_them(entry):
    for project in ("update", "gradient"):
        world = World()
        opt = entry.of(world, project=project)
        entry.train(world, opt, steps_until_split(entry))
        world.closure(opt, 0)()
        raw = [p.grad.clone() for p in world.params()]
        opt.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(world.params(), raw, strict=True))


# ---- learning rates
SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: 0.9**i),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def test_no_scheduler_of_torch_is_left_out():
    known = {n for n in lr_scheduler.__all__ if n not in ("LRScheduler", "SWALR")}
    assert known <= SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "entry",
    [BY_NAME["BulkSGD"], BY_NAME["InterpolatedSGD-edge"], BY_NAME["SubspaceScaled(AdamW)"]],
    ids=lambda e: e.name,
)
def test_schedulers(entry, name):
    momentum = {} if entry.wrapper else {"momentum": 0.9}
    world, plain = World(), World()
    opt, base = entry.of(world, momentum), entry.base(plain.params(), **momentum)
    # both start from the same figures, so that both schedules walk the same way
    for o in (opt, base):
        o.param_groups[0]["lr"] = 0.1
    ours, theirs = SCHEDULERS[name](opt), SCHEDULERS[name](base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)  # "step() was called before": the patched step is seen
        warnings.simplefilter("ignore", category=CurvoptWarning)
        warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step")
        for i in range(7):
            for w, o, s in ((world, opt, ours), (plain, base, theirs)):
                w.closure(o, i)()
                o.step()
                s.step(1.0) if name == "ReduceLROnPlateau" else s.step()
            for key in ("lr", "momentum", "betas"):
                assert opt.param_groups[0].get(key) == base.param_groups[0].get(key)
    assert torch.isfinite(world.flat()).all()


@each_without_closure
def test_warm_up_from_lr_0_and_back_to_it(entry):
    world = World()
    opt = entry.of(world)
    schedule = lr_scheduler.LambdaLR(opt, lambda i: float(0 < i < steps_until_split(entry) + 1))
    before = world.flat()
    entry.train(world, opt, 1)
    assert torch.equal(before, world.flat())
    assert not opt.subspace.ready, "nothing is computed at lr 0"
    for i in range(steps_until_split(entry)):
        schedule.step()
        entry.train(world, opt, 1, start=i)
    assert opt.subspace.ready
    assert not torch.equal(before, world.flat())
    schedule.step()
    after, counts = world.flat(), opt.stats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entry.train(world, opt, 4)
    assert torch.equal(after, world.flat())
    for key in ("steps", "refreshes", "matvecs", "age"):
        assert opt.stats()[key] == counts[key]


@each_of_family
def test_tensor_lr(entry):
    left, right = World(), World()
    number = left.train(entry.of(left, {"lr": 0.125, "momentum": 0.9}), 5)
    tensor = right.train(entry.of(right, {"lr": torch.tensor(0.125), "momentum": 0.9}), 5)
    # 1/8 is the same number in float32 and float64; foreach may order the products otherwise
    torch.testing.assert_close(number, tensor, rtol=1e-12, atol=1e-12)


# ---- clipping, accumulation, looks
@each_without_closure
def test_clipping_and_accumulation(entry):
    def run(w, o, parts):
        for _ in range(steps_until_split(entry)):
            o.zero_grad()
            if parts:  # two halves of the batch, accumulated
                for half in (w.x[:6], w.y[:6]), (w.x[6:], w.y[6:]):
                    (w.loss_fn(w.model(half[0]), half[1]) / 2).backward()
            else:
                w.loss_fn(w.model(w.x), w.y).backward()
            nn.utils.clip_grad_norm_(w.params(), 0.1)
            assert math.sqrt(sum(float(p.grad.square().sum()) for p in w.params())) <= 0.1 * (1 + 1e-5)
            o.step()
        return w.flat()

    left, right = World(), World()
    # sums in another order differ in the last bits; RMSprop and Adam divide by what may be small
    torch.testing.assert_close(
        run(left, entry.of(left), False), run(right, entry.of(right), True), rtol=1e-6, atol=1e-6
    )


@each
def test_repr_is_short_and_shows_no_tensor(entry):
    world = World()
    opt = entry.of(world)
    entry.train(world, opt, steps_until_split(entry))
    opt.state_dict()
    text = repr(opt)
    assert type(opt).__name__ in text
    assert "lr:" in text
    assert f"rank={entry.options.get('rank', RANK)!r}" in text
    assert "tensor" not in text
    assert "curvopt_" not in text
    assert len(text) < 1200
    if entry.wrapper:
        assert type(opt.base).__name__ in text


@each
def test_small_data_are_flat_plain_values_in_the_groups(entry):
    world = World()
    opt = entry.of(world)
    entry.train(world, opt, steps_until_split(entry))
    group = opt.state_dict()["param_groups"][0]
    ours = {key: value for key, value in group.items() if key.startswith("curvopt_")}
    assert {"curvopt_step", "curvopt_refreshes", "curvopt_eigenvalues"} <= ours.keys()

    def plain(value):
        return all(map(plain, value)) if type(value) is tuple else type(value) in (int, float, bool, str)

    assert {key: value for key, value in ours.items() if not plain(value)} == {}


@each
def test_the_basis_has_one_block_a_parameter(entry):
    world = World()
    opt = entry.of(world)
    entry.train(world, opt, 1)
    key = "curvopt_basis" if entry.wrapper else "basis"
    rank = opt.subspace.rank
    state = opt.state_dict()["state"]
    for i, p in enumerate(world.params()):
        assert state[i][key].shape == (rank, *p.shape)
    if not entry.wrapper:
        assert opt.state[world.params()[0]]["basis"] is opt.subspace.blocks[0]


def test_operator_over_some_of_the_parameters_in_another_order():
    world = World()
    head = [*reversed(list(world.model[2].parameters()))]
    opt = DomSGD(world.params(), lr=0.1, rank=RANK, curvature=world.curvature(params=head), refresh_every=1)
    plain = World()
    base = torch.optim.SGD(plain.params(), lr=0.1)
    world.train(opt, 1)
    plain.train(base, 1)
    for mine, other in zip(world.model[0].parameters(), plain.model[0].parameters(), strict=True):
        assert torch.equal(mine, other)  # outside the operator: the base's update
    assert opt.subspace.basis.shape == (15, RANK)
    start = World()
    moved = torch.cat(
        [(p - q).reshape(-1) for p, q in zip(head, reversed(list(start.model[2].parameters())), strict=True)]
    )
    basis = opt.subspace.basis
    # inside: in the span of the basis, whose rows follow the operator's order
    torch.testing.assert_close(basis @ (basis.T @ moved.detach()), moved.detach(), rtol=1e-10, atol=1e-12)


def test_odd_parameters_of_no_or_one_number():
    world = World()
    extra = nn.ParameterList([nn.Parameter(torch.empty(0).double()), nn.Parameter(torch.tensor(2.0).double())])
    opt = BulkSGD([*world.params(), *extra], lr=0.1, momentum=0.9, rank=RANK, curvature=world.curvature())
    for i in range(3):
        opt.zero_grad()
        (world.loss(i) + extra[1].square() + extra[0].sum()).backward()
        opt.step()
    assert extra[1].item() != 2.0
    assert torch.isfinite(world.flat()).all()


def test_large_float64_gradients_are_finite():
    p, q = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    ours, theirs = BulkSGD([p], lr=1e-201, rank=0), torch.optim.SGD([q], lr=1e-201)
    p.grad, q.grad = torch.full_like(p, 1e200), torch.full_like(q, 1e200)  # infinite in float32
    ours.step()
    theirs.step()
    assert torch.equal(p, q) and p[0].item() == 0.9


def test_layers_have_their_own_basis():
    world = World()
    opt = BulkSGD(world.params(), lr=0.1, rank=1, curvature=world.curvature(), layout="layer", refresh_every=2)
    assert torch.isfinite(world.train(opt, 5)).all()
    assert opt.subspace.eigenvalues.shape == (2, 1)
