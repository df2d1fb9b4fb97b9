"""What is saved comes back: state dicts, checkpoints in new processes, deepcopy, pickle, and what is refused."""

import copy
import math
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from curvopt._params import ParameterLayout
from curvopt.curvature.dense import PlantedSpectrum
from curvopt.optim import BulkSGD, InterpolatedSGD, SubspaceScaled
from tests.optimizer_db import BY_NAME, ENTRIES, HALF, RANK, WRAPPERS, World

pytestmark = [
    pytest.mark.filterwarnings("ignore::curvopt._errors.GapWarning"),
    pytest.mark.filterwarnings("ignore::curvopt._errors.RefreshWarning"),
]
ROOT = Path(__file__).resolve().parents[2]
each = pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
VARIANTS = {
    "plain": {},
    "gradient": {"project": "gradient"},
    "bf16 basis": {"basis_dtype": torch.bfloat16},
    "layers": {"layout": "layer", "rank": 1},
    "aligned": {"start": "aligned", "start_threshold": 0.5, "start_timeout": 9},
    "auto": {"refresh_every": "auto", "costs": 1e-3},
}


def fits(entry, variant):
    """Whether the combination exists at all."""
    if variant == "layers":
        return entry.products and not entry.first_refresh and entry.options.get("rank") != "edge"
    if variant == "aligned":
        return entry.products
    return True


def momentum(entry):
    """Base arguments that give the base state."""
    return {} if entry.wrapper and entry.name != "SubspaceScaled(SGD)" else {"momentum": 0.9}


def state_of(opt):
    """All tensors of a state dict, by (index, key), copied."""
    saved = opt.state_dict()["state"]
    return {(i, k): v.clone() for i, e in saved.items() for k, v in e.items() if isinstance(v, torch.Tensor)}


def same(left, right):
    """Whether two state dicts agree bit for bit, dtypes included."""
    a, b = state_of(left), state_of(right)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


CASES = [
    pytest.param(e, v, d, id=f"{e.name}-{v}-{d}") for e in ENTRIES for v in VARIANTS for d in e.resumes if fits(e, v)
]
each_copied = pytest.mark.parametrize("entry", [e for e in ENTRIES if e.copies], ids=lambda e: e.name)


def test_the_table_is_right_about_what_bases_can_not_do():
    # should torch mend these, the exceptions in the table must go
    world, twin = World(), World()
    nadam = BY_NAME["SubspaceScaled(NAdam)"].base
    first, second = nadam(world.params()), nadam(twin.params())
    world.train(first, 3)
    twin.model.load_state_dict(world.model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert not torch.equal(world.train(first, 9), twin.train(second, 9))
    lbfgs = BY_NAME["SubspaceScaled(LBFGS)"].base(world.params())
    assert not hasattr(copy.deepcopy(lbfgs), "_params")


@pytest.mark.parametrize(("entry", "variant", "dtype"), CASES)
def test_resumed_from_a_file_it_continues_bit_for_bit(entry, variant, dtype, tmp_path):
    options, first = VARIANTS[variant], entry.first_refresh + 4
    unbroken, resumed = World(dtype), World(dtype)
    opt = entry.of(unbroken, momentum(entry), **options)
    entry.train(unbroken, opt, first)
    torch.save({"model": unbroken.model.state_dict(), "opt": opt.state_dict()}, tmp_path / "at.pt")
    assert opt.stats()["refreshes"] > 0
    entry.train(unbroken, opt, 5, start=first)

    saved = torch.load(tmp_path / "at.pt", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    fresh = entry.of(resumed, momentum(entry), **options)
    fresh.load_state_dict(saved["opt"])
    entry.train(resumed, fresh, 5, start=first)
    assert torch.equal(unbroken.flat(), resumed.flat())
    assert same(opt, fresh)
    for key in ("steps", "refreshes", "matvecs", "age"):
        assert opt.stats()[key] == fresh.stats()[key]
    assert torch.equal(opt.subspace.eigenvalues, fresh.subspace.eigenvalues)


@pytest.mark.parametrize("name", ["BulkSGD", "InterpolatedSGD-history", "SubspaceScaled(AdamW)-preconditioner"])
def test_a_new_process_continues_bit_for_bit(name, tmp_path):
    script = f"""
import sys, warnings, torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
from tests.optimizer_db import BY_NAME, World
entry, world = BY_NAME[{name!r}], World(torch.float32)
opt = entry.of(world)
saved = torch.load(sys.argv[1], weights_only=True)
world.model.load_state_dict(saved["model"])
opt.load_state_dict(saved["opt"])
entry.train(world, opt, 7, start=13)
torch.save({{"flat": world.flat(), "opt": opt.state_dict()}}, sys.argv[2])
"""
    world, entry = World(torch.float32), BY_NAME[name]
    opt = entry.of(world)
    entry.train(world, opt, 13)
    torch.save({"model": world.model.state_dict(), "opt": opt.state_dict()}, tmp_path / "at.pt")
    entry.train(world, opt, 7, start=13)
    subprocess.run([sys.executable, "-c", script, tmp_path / "at.pt", tmp_path / "end.pt"], cwd=ROOT, check=True)
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    assert torch.equal(end["flat"], world.flat())
    for i, state in opt.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(end["opt"]["state"][i][key]), torch.as_tensor(value)), key


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("basis_dtype", "expected"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str
)
def test_the_basis_keeps_its_dtype_with_half_precision_parameters(wrapped, basis_dtype, expected):
    # torch casts every tensor in state[p] to the dtype of p
    def made():
        p = nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6).to(torch.bfloat16))
        op = PlantedSpectrum(torch.linspace(0.1, 3.0, 24) ** 2)
        op.layout = ParameterLayout([p])
        if wrapped:
            base = torch.optim.SGD([p], lr=0.05, momentum=0.9)
            return p, SubspaceScaled(base, curvature=op, rank=2, refresh_every=3, basis_dtype=basis_dtype, **HALF)
        given = {"curvature": op, "rank": 2, "refresh_every": 3, "basis_dtype": basis_dtype}
        return p, InterpolatedSGD([p], lr=0.05, momentum=0.9, **given, **HALF)

    def train(p, opt, steps):
        for _ in range(steps):
            p.grad = p.detach().clone()
            opt.step()

    p, opt = made()
    train(p, opt, 4)
    saved = copy.deepcopy(opt.state_dict())
    q, fresh = made()
    q.data.copy_(p.data)
    fresh.load_state_dict(saved)
    key = "curvopt_basis" if wrapped else "basis"
    for o in (opt, fresh):
        assert o.state_dict()["state"][0][key].dtype == expected
        assert o.subspace.blocks[0].dtype == expected
    assert torch.equal(opt.subspace.basis, fresh.subspace.basis)
    train(p, opt, 5)
    train(q, fresh, 5)
    assert torch.equal(p, q)
    assert same(opt, fresh)


# ---- what is refused, and what else may be loaded
@each
def test_a_basis_of_another_rank_is_refused_by_name_and_nothing_is_loaded(entry):
    if entry.options.get("rank") == "edge":
        other = {"max_rank": 2}
    else:
        other = {"rank": RANK + 1}
    world, donor = World(), World()
    opt, source = entry.of(world), entry.of(donor, **other)
    steps = entry.first_refresh + 2
    entry.train(world, opt, steps)
    entry.train(donor, source, steps + 1)
    before, counts, groups = state_of(opt), opt.stats(), copy.deepcopy(opt.state_dict()["param_groups"])
    named = "'0.weight'" if entry.products else "'0'"
    with pytest.raises(ValueError, match=rf"saved basis of parameter {named} has shape .*\(rank, then the parameter"):
        opt.load_state_dict(source.state_dict())
    after = state_of(opt)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert repr(groups) == repr(opt.state_dict()["param_groups"])
    assert opt.stats()["matvecs"] == counts["matvecs"]
    entry.train(world, opt, 1, start=steps)  # and it goes on


@each
def test_an_incomplete_checkpoint_is_refused(entry):
    world = World()
    opt = entry.of(world)
    entry.train(world, opt, entry.first_refresh + 3)
    saved = copy.deepcopy(opt.state_dict())
    del saved["state"][1]["curvopt_basis" if entry.wrapper else "basis"]
    named = "'0.bias'" if entry.products else "'1'"
    with pytest.raises(ValueError, match=f"counts . refreshes but holds no basis of parameter {named}"):
        entry.of(World()).load_state_dict(saved)


def test_another_layout_is_refused():
    world = World()
    layered = BulkSGD(world.params(), lr=0.1, rank=RANK, curvature=world.curvature(), layout="layer")
    world.train(layered, 1)
    opt = BulkSGD(world.params(), lr=0.1, rank=RANK, curvature=world.curvature())
    with pytest.raises(ValueError, match=r"saved eigenvalues have shape \(2, 2\), expected \(1, 2\).*another layout="):
        opt.load_state_dict(layered.state_dict())
    assert not opt.subspace.ready


def test_another_number_of_groups_is_refused_and_nothing_is_loaded():
    for name in ("BulkSGD", "SubspaceScaled(AdamW)"):
        world, donor = World(), World()
        opt, source = BY_NAME[name].of(world), BY_NAME[name].of(donor)
        donor.train(source, 2)
        source.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        with pytest.raises(ValueError, match="different number of parameter groups"):
            opt.load_state_dict(source.state_dict())
        assert not opt.subspace.ready
        assert opt.stats()["steps"] == 0


@each
def test_a_checkpoint_of_the_plain_optimizer(entry):
    world, plain, reference = World(), World(), World()
    base = entry.base(plain.params(), **momentum(entry))
    plain.train(base, 3, closure=entry.needs_closure)
    opt = entry.of(world, momentum(entry))
    entry.train(world, opt, entry.first_refresh + 2)  # its own basis belongs to other weights and must go
    world.model.load_state_dict(plain.model.state_dict())
    opt.load_state_dict(copy.deepcopy(base.state_dict()))
    assert not opt.subspace.ready
    assert opt.stats()["steps"] == 0
    reference.model.load_state_dict(plain.model.state_dict())
    fresh = entry.of(reference, momentum(entry))
    fresh.load_state_dict(copy.deepcopy(base.state_dict()))
    steps = entry.first_refresh + 3
    # as a fresh optimizer with the same buffers does (the work done before counts for no start vector)
    assert torch.equal(entry.train(world, opt, steps), entry.train(reference, fresh, steps))


def test_the_plain_optimizer_takes_ours():
    world, plain = World(), World()
    opt = BulkSGD(world.params(), lr=0.1, momentum=0.9, rank=RANK, curvature=world.curvature())
    world.train(opt, 3)
    plain.model.load_state_dict(world.model.state_dict())
    base = torch.optim.SGD(plain.params(), lr=0.1, momentum=0.9)
    base.load_state_dict(copy.deepcopy(opt.state_dict()))
    reference = BulkSGD(world.params(), lr=0.1, momentum=0.9, rank=0)
    reference.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert all(state.keys() == {"momentum_buffer"} for state in reference.state.values())
    assert torch.equal(plain.train(base, 4), world.train(reference, 4))


def test_a_checkpoint_of_rank_0_starts_the_basis_anew():
    world = World()
    first = BulkSGD(world.params(), lr=0.1, momentum=0.9, rank=0)
    world.train(first, 4)
    opt = BulkSGD(world.params(), lr=0.1, momentum=0.9, rank=RANK, curvature=world.curvature())
    opt.load_state_dict(copy.deepcopy(first.state_dict()))
    assert opt.stats()["steps"] == 4
    assert not opt.subspace.ready
    world.train(opt, 1)
    assert opt.subspace.ready


@each
def test_a_fresh_state_dict_loads(entry):
    world = World()
    source, opt = entry.of(World()), entry.of(world)
    opt.load_state_dict(copy.deepcopy(source.state_dict()))
    twin = World()
    steps = entry.first_refresh + 3
    assert torch.equal(entry.train(world, opt, steps), entry.train(twin, entry.of(twin), steps))


def test_a_numpy_lr_can_be_saved(tmp_path):
    for name in ("BulkSGD", "SubspaceScaled(AdamW)"):
        world = World()
        opt = BY_NAME[name].of(world, {"lr": np.float64(0.1)})
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: np.float64(0.5) ** i)
        world.train(opt, 1)
        schedule.step()
        torch.save(opt.state_dict(), tmp_path / "at.pt")
        loaded = torch.load(tmp_path / "at.pt", weights_only=True)
        assert type(loaded["param_groups"][0]["lr"]) is float
        assert loaded["param_groups"][0]["lr"] == 0.05


@each
def test_state_dict_hooks(entry):
    world = World()
    opt = entry.of(world)
    entry.train(world, opt, entry.first_refresh + 2)
    seen = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("save pre"))
    opt.register_state_dict_post_hook(lambda o, sd: {**sd, "note": 7})
    saved = opt.state_dict()
    assert saved["note"] == 7
    fresh = entry.of(World())
    key = "curvopt_basis" if entry.wrapper else "basis"

    def turned(o, sd):
        seen.append("load pre")
        state = {i: {k: -v if k == key else v for k, v in e.items()} for i, e in sd["state"].items()}
        return {**sd, "state": state}

    fresh.register_load_state_dict_pre_hook(turned)
    fresh.register_load_state_dict_post_hook(lambda o: seen.append(o.subspace.blocks[0].clone()))
    fresh.load_state_dict(state_dict=copy.deepcopy(saved))  # by keyword, as torch.distributed.checkpoint does
    assert seen[:2] == ["save pre", "load pre"]
    assert torch.equal(seen[2], -opt.subspace.blocks[0])  # the user's change is what was loaded, and is there already
    assert len(fresh._optimizer_load_state_dict_pre_hooks) == 1
    assert len(fresh._optimizer_load_state_dict_post_hooks) == 1


# ---- copies
@each_copied
def test_deepcopy_of_model_and_optimizer_is_tied_and_steps_alike(entry):
    world = World()
    opt = entry.of(world)
    entry.train(world, opt, entry.first_refresh + 2)
    twin, copied = copy.deepcopy((world, opt))
    assert {id(p) for g in copied.param_groups for p in g["params"]} == {id(p) for p in twin.params()}
    assert copied.subspace is not opt.subspace
    if entry.products:
        assert copied.curvature is not opt.curvature
        assert {id(p) for p in copied.curvature.layout.params} <= {id(p) for p in twin.params()}
        product = copied.curvature @ torch.ones(copied.curvature.shape[0], dtype=torch.float64)
        torch.testing.assert_close(product, opt.curvature @ torch.ones_like(product), rtol=1e-12, atol=1e-12)
    before = twin.flat()
    left = entry.train(world, opt, 5, start=2)
    assert torch.equal(twin.flat(), before), "the copy does not move with the original"
    assert torch.equal(left, entry.train(twin, copied, 5, start=2))
    assert same(opt, copied)
    if not entry.wrapper:
        for p in twin.params():
            assert any(copied.state[p]["basis"] is block for block in copied.subspace.blocks)


@each_copied
def test_pickle_drops_the_operator_and_says_so(entry):
    world = World()
    opt = entry.of(world)
    steps = entry.first_refresh + 1
    entry.train(world, opt, steps)
    data = pickle.dumps((world, opt))
    twin, back = pickle.loads(data)
    assert back.curvature is None
    assert torch.equal(back.subspace.basis, opt.subspace.basis)
    if not entry.products:
        assert torch.equal(entry.train(world, opt, 6, steps), entry.train(twin, back, 6, steps))
        return
    with pytest.raises(ValueError, match="no curvature operator is attached .pickling drops it.*optimizer.curvature"):
        back.refresh()
    with pytest.raises(ValueError, match="no curvature operator is attached"):
        entry.train(twin, back, 4, steps)  # the next due refresh says so too
    twin, back = pickle.loads(data)
    operator = twin.curvature()
    back.curvature = operator.ggn() if entry.name.startswith("GGN") else operator
    assert torch.equal(entry.train(world, opt, 6, steps), entry.train(twin, back, 6, steps))


def test_pickle_does_not_hold_the_data():
    world = World()
    opt = BulkSGD(world.params(), lr=0.1, rank=RANK, curvature=world.curvature())
    small = len(pickle.dumps(opt))
    big = World()
    big.x, big.y = big.x.repeat(500, 1), big.y.repeat(500)
    opt = BulkSGD(big.params(), lr=0.1, rank=RANK, curvature=big.curvature())
    assert len(pickle.dumps(opt)) < small + 1000


def test_pickle_with_a_closure():
    world = World()
    opt = BulkSGD(world.params(), lr=0.1, rank=RANK, curvature="closure", refresh_every=2)
    world.train(opt, 3, closure=True)
    twin, back = pickle.loads(pickle.dumps((world, opt)))
    # step's closure brings a new one: nothing is missing
    assert torch.equal(world.train(opt, 4, 3, closure=True), twin.train(back, 4, 3, closure=True))


def test_pickle_with_a_curvature_closure_does_not_fall_back_on_steps():
    world = World()
    whole = BulkSGD(world.params(), lr=0.1, rank=RANK, curvature="closure", refresh_every=1, curvature_closure=None)

    def larger():
        whole.zero_grad()
        loss = world.loss_fn(world.model(world.x), world.y)
        loss.backward()
        return loss

    whole.curvature_closure = larger
    world.train(whole, 2)
    twin, back = pickle.loads(pickle.dumps((world, whole)))
    with pytest.raises(ValueError, match="curvature_closure is not attached .pickling drops it.*to None to"):
        twin.train(back, 1, closure=True)
    back.curvature_closure = None
    twin.train(back, 1, closure=True)


@pytest.mark.parametrize("entry", WRAPPERS, ids=lambda e: e.name)
def test_wrapper_and_base_stay_one_after_loading(entry):
    world = World()
    opt = entry.of(world)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    entry.train(world, opt, 2)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.param_groups is opt.base.param_groups
    assert opt.state is opt.base.state
    before = opt.base.param_groups[0]["lr"]
    schedule.step()
    assert opt.base.param_groups[0]["lr"] == before / 2, "the schedule reaches the base that steps"


@each
def test_saving_and_loading_leave_no_trace(entry):
    left, right = World(entry.resumes[-1]), World(entry.resumes[-1])
    opt, quiet = entry.of(left), entry.of(right)
    steps = entry.first_refresh + 6
    for i in range(steps):
        entry.train(left, opt, 1, start=i)
        repr(opt), opt.stats()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert torch.equal(left.flat(), entry.train(right, quiet, steps))
    assert opt.stats()["matvecs"] == quiet.stats()["matvecs"]


def test_auto_goes_on_when_resumed_before_its_costs_were_measured():
    """The cost of a product comes from the first refresh, which a run resumed a step later has behind it."""
    first, later = World(), World()
    settings = dict(lr=0.1, rank=RANK, overhead=1e6)  # the budget allows everything, once the ratio is known
    opt = BulkSGD(first.params(), curvature=first.curvature(), **settings)
    first.train(opt, 1)
    assert math.isnan(opt.stats()["cost_ratio"])
    later.model.load_state_dict(first.model.state_dict())
    resumed = BulkSGD(later.params(), curvature=later.curvature(), **settings)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    later.train(resumed, 30, start=1)
    assert resumed.stats()["cost_ratio"] > 0
    assert resumed.stats()["refreshes"] > 1


def test_unpickled_optimizers_do_not_time_the_pause(monkeypatch):
    world = World()
    opt = BY_NAME["BulkSGD"].of(world)
    world.train(opt, 4)
    twin = pickle.loads(pickle.dumps(opt))
    for group in twin.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    clock = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 1e6)  # another process's clock starts elsewhere
    twin.step()
    assert twin.stats()["seconds_total"] < 1e3
