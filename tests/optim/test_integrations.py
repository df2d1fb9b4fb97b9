"""What surrounds an optimizer: GradScaler, compiled models, averaged models, distributed checkpoints, the profiler."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from curvopt.linalg import eigsh, spectral_density, trace
from curvopt.optim import BulkSGD, SubspaceScaled
from tests.optimizer_db import BY_NAME, ENTRIES, HALF, RANK, World

pytestmark = [
    pytest.mark.filterwarnings("ignore::curvopt._errors.GapWarning"),
    pytest.mark.filterwarnings("ignore::curvopt._errors.RefreshWarning"),
]
each = pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
each_without_closure = pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if not e.needs_closure], ids=lambda e: e.name
)


# ---- GradScaler
def scaled_step(scaler, world, opt, i, poison=False):
    opt.zero_grad()
    scaler.scale(world.loss(i)).backward()
    if poison:
        world.params()[0].grad[0, 0] = float("inf")
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(world.params(), 10.0)
    scaler.step(opt)
    scaler.update()


@each_without_closure
def test_gradscaler_unscales_clips_and_steps(entry):
    scaled, plain = World(torch.float32), World(torch.float32)
    opt, other = entry.of(scaled), entry.of(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    steps = entry.first_refresh + 4
    for i in range(steps):
        scaled_step(scaler, scaled, opt, i)
    # a power of two scales without rounding, and nothing is large enough to be clipped
    assert torch.equal(scaled.flat(), entry.train(plain, other, steps))
    assert opt.stats()["refreshes"] == other.stats()["refreshes"]


@each_without_closure
def test_gradscaler_skips_an_infinite_step(entry):
    world = World(torch.float32)
    opt = entry.of(world)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(entry.first_refresh + 2):
        scaled_step(scaler, world, opt, i)
    before, counts = world.flat(), opt.stats()
    scaled_step(scaler, world, opt, 0, poison=True)
    assert torch.equal(before, world.flat())
    assert scaler.get_scale() == 2.0**9
    for key in ("steps", "refreshes", "matvecs"):
        assert opt.stats()[key] == counts[key]
    scaled_step(scaler, world, opt, 1)
    assert not torch.equal(before, world.flat())


@each
def test_gradscaler_and_closures_are_torchs_to_refuse(entry):
    world = World(torch.float32)
    opt = entry.of(world)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(world.loss(0)).backward()
    with pytest.raises(RuntimeError, match="Closure use is not currently supported if GradScaler is enabled"):
        scaler.step(opt, closure=world.closure(opt, 0))


def test_fused_asks_gradscaler_to_unscale_all_the_same():
    world, plain = World(torch.float32), World(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    opt = BulkSGD(world.params(), lr=0.1, momentum=0.9, fused=True, rank=RANK, curvature=world.curvature())
    other = BulkSGD(plain.params(), lr=0.1, momentum=0.9, fused=True, rank=RANK, curvature=plain.curvature())
    for i in range(3):
        world.closure(opt, i)
        opt.zero_grad()
        scaler.scale(world.loss(i)).backward()
        scaler.step(opt)
        scaler.update()
    assert torch.equal(world.flat(), plain.train(other, 3))


# ---- compiled and averaged models
@pytest.mark.parametrize("name", ["BulkSGD", "SubspaceScaled(AdamW)"])
def test_a_compiled_model(name):
    entry = BY_NAME[name]
    world, plain = World(), World()
    operator = world.curvature()  # of the module as it was written
    compiled = torch.compile(world.model, backend="aot_eager")
    opt = entry.make(compiled.parameters(), operator)
    for i in range(5):
        opt.zero_grad()
        world.loss_fn(compiled(world.x[i % 3 :: 3]), world.y[i % 3 :: 3]).backward()
        opt.step()
    assert opt.stats()["refreshes"] == 2
    # compiled arithmetic may round otherwise
    torch.testing.assert_close(world.flat(), entry.train(plain, entry.of(plain), 5), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["mean", "ema"])
def test_averaged_models(average):
    world, plain = World(), World()
    opt, other = BY_NAME["BulkSGD"].of(world), BY_NAME["BulkSGD"].of(plain)
    averaged = AveragedModel(world.model, multi_avg_fn=average)
    for i in range(5):
        world.train(opt, 1, start=i)
        averaged.update_parameters(world.model)
    assert torch.equal(world.flat(), plain.train(other, 5)), "averaging is no business of the optimizer's"
    assert int(averaged.n_averaged) == 5


def test_the_profiler_names_the_step():
    world = World()
    opt = BY_NAME["SubspaceScaled(AdamW)"].of(world)
    world.closure(opt, 0)()
    with torch.profiler.profile() as profile:
        opt.step()
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#SubspaceScaled.step", "Optimizer.step#AdamW.step"} <= names


# ---- torch.distributed.checkpoint, one process
OPTIONS = {
    "plain": dcp.StateDictOptions(),
    "flattened": dcp.StateDictOptions(flatten_optimizer_state_dict=True),
    "full": dcp.StateDictOptions(full_state_dict=True),
    "full on the CPU": dcp.StateDictOptions(full_state_dict=True, cpu_offload=True),
}


def momentum(entry):
    return {} if entry.wrapper and entry.name != "SubspaceScaled(SGD)" else {"momentum": 0.9}


@each_without_closure
@pytest.mark.parametrize("form", OPTIONS)
def test_distributed_checkpoint_resumes_bit_for_bit(entry, form, tmp_path):
    options, steps, dtype = OPTIONS[form], entry.first_refresh + 4, entry.resumes[-1]
    unbroken, resumed = World(dtype), World(dtype)
    opt = entry.of(unbroken, momentum(entry))
    entry.train(unbroken, opt, steps)
    unbroken.model.zero_grad(set_to_none=True)
    saved = dcp.get_optimizer_state_dict(unbroken.model, opt, options=options)
    weights = copy.deepcopy(unbroken.model.state_dict())
    torch.save(saved, tmp_path / "at.pt")
    unbroken_end = entry.train(unbroken, opt, 5, start=steps)

    resumed.model.load_state_dict(weights)
    fresh = entry.of(resumed, momentum(entry))
    loaded = torch.load(tmp_path / "at.pt", weights_only=True)
    dcp.set_optimizer_state_dict(resumed.model, fresh, loaded, options=options)
    assert fresh.subspace.live > 0
    assert torch.equal(unbroken_end, entry.train(resumed, fresh, 5, start=steps))
    assert torch.equal(opt.subspace.basis, fresh.subspace.basis)
    assert opt.stats()["matvecs"] == fresh.stats()["matvecs"]


@each_without_closure
def test_building_empty_state_evaluates_nothing_and_allocates_everything(entry):
    world, clean = World(), World()
    opt = entry.of(world, momentum(entry))
    before = world.flat()
    first = dcp.get_optimizer_state_dict(world.model, opt)
    assert torch.equal(before, world.flat())
    assert opt.stats()["matvecs"] == 0
    assert opt.stats()["steps"] == 0
    assert not opt.subspace.ready
    key = "curvopt_basis" if entry.wrapper else "basis"
    for name, p in world.model.named_parameters():
        assert first["state"][name][key].shape == (opt.subspace.rank, *p.shape)
        assert first["state"][name][key].dtype == p.dtype
    # keys are the same before and after training: a later checkpoint loads into an empty one
    entry.train(world, opt, entry.first_refresh + 2)
    later = dcp.get_optimizer_state_dict(world.model, opt)
    assert {n: set(s) for n, s in first["state"].items()} == {n: set(s) for n, s in later["state"].items()}
    assert first["param_groups"][0].keys() == later["param_groups"][0].keys()
    if entry.wrapper:  # none of it is left for the base to see
        assert not any("curvopt_" in str(k) for state in opt.base.state.values() for k in state)
    # and training after it is as without it, where the base itself does not count the empty step
    if entry.name in ("BulkSGD", "DomSGD", "GGNProjectedSGD", "InterpolatedSGD"):
        reference = entry.of(clean, momentum(entry))
        assert torch.equal(world.flat(), entry.train(clean, reference, entry.first_refresh + 2))


def test_building_empty_state_with_a_curvature_closure():
    world = World()
    opt = BulkSGD(world.params(), lr=0.1, momentum=0.9, rank=RANK, curvature="closure")
    saved = dcp.get_optimizer_state_dict(world.model, opt)
    assert saved["state"]["0.weight"]["basis"].shape == (RANK, 4, 3)
    calls = []
    opt.step(lambda: calls.append(1) or world.closure(opt, 0)())
    assert len(calls) > 1 and opt.subspace.ready


@pytest.mark.parametrize("base", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.02)])
def test_saving_a_wrapper_again_and_again_changes_nothing(base):
    left, right = World(), World()
    opt = SubspaceScaled(base(left.params()), curvature=left.curvature(), rank=RANK, refresh_every=3, **HALF)
    other = SubspaceScaled(base(right.params()), curvature=right.curvature(), rank=RANK, refresh_every=3, **HALF)
    left.train(opt, 1)
    right.train(other, 1)
    for i in range(1, 7):
        left.model.zero_grad(set_to_none=True)
        for options in OPTIONS.values():
            dcp.get_optimizer_state_dict(left.model, opt, options=options)
        left.train(opt, 1, start=i)
        right.train(other, 1, start=i)
    assert torch.equal(left.flat(), right.flat())
    assert opt.stats()["steps"] == other.stats()["steps"]


def test_model_and_optimizer_with_frozen_and_grouped_parameters():
    def made(world):
        world.params()[0].requires_grad_(False)
        groups = [{"params": world.params()[:2], "lr": 0.05}, {"params": world.params()[2:]}]
        return BulkSGD(groups, lr=0.1, momentum=0.9, rank=RANK, curvature=world.curvature(), refresh_every=3)

    for options in (OPTIONS["plain"], OPTIONS["flattened"]):
        world, twin = World(), World()
        opt, fresh = made(world), made(twin)
        world.train(opt, 4)
        saved = copy.deepcopy(dcp.get_state_dict(world.model, opt, options=options))
        dcp.set_state_dict(twin.model, fresh, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
        assert torch.equal(world.train(opt, 5, 4), twin.train(fresh, 5, 4))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_files(tmp_path):
    for name in ("BulkSGD", "SubspaceScaled(AdamW)", "InterpolatedSGD-edge"):
        entry = BY_NAME[name]
        world, twin = World(), World()
        opt, fresh = entry.of(world), entry.of(twin)
        world.train(opt, 4)
        folder = tmp_path / name
        saved = {"model": world.model.state_dict(), "opt": dcp.get_optimizer_state_dict(world.model, opt)}
        checkpoint.save(saved, checkpoint_id=folder, no_dist=True)
        target = {"model": twin.model.state_dict(), "opt": dcp.get_optimizer_state_dict(twin.model, fresh)}
        checkpoint.load(target, checkpoint_id=folder, no_dist=True)
        twin.model.load_state_dict(target["model"])
        dcp.set_optimizer_state_dict(twin.model, fresh, target["opt"])
        assert torch.equal(world.train(opt, 5, 4), twin.train(fresh, 5, 4)), name


def test_a_flattened_checkpoint_into_a_wrapper_that_has_stepped_is_refused():
    # torch restores the keys that it finds in ``state``, where a wrapper's basis lies only before the first step
    world, twin = World(), World()
    opt, used = BY_NAME["SubspaceScaled(AdamW)"].of(world), BY_NAME["SubspaceScaled(AdamW)"].of(twin)
    world.train(opt, 2)
    twin.train(used, 2)
    saved = dcp.get_optimizer_state_dict(world.model, opt, options=OPTIONS["flattened"])
    with pytest.raises(ValueError, match="counts 1 refreshes but holds no basis of parameter '0.weight'"):
        dcp.set_optimizer_state_dict(twin.model, used, saved, options=OPTIONS["flattened"])


@pytest.fixture
def elsewhere():
    """A default device that nothing can be computed on: what is made without naming a device shows."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


# torch's own Adam and its kin count their steps on the default device, wherever the parameters are.
@pytest.mark.parametrize(
    "name",
    ["BulkSGD", "InterpolatedSGD-edge", "InterpolatedSGD-history", "GGNProjectedSGD", "SubspaceScaled(SGD)"],
)
@pytest.mark.parametrize("options", [{}, {"start": "aligned", "start_timeout": 4}], ids=["", "aligned"])
def test_the_default_device_does_not_matter(name, options, elsewhere):
    entry = BY_NAME[name]
    if not entry.products:
        options = {}
    ends = []
    for device in ("meta", None):
        with torch.device("cpu"):
            world, twin = World(), World()
        torch.set_default_device(device)
        opt = entry.of(world, **options)
        entry.train(world, opt, 7)
        fresh = entry.of(twin, **options)
        fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert torch.equal(fresh.subspace.basis, opt.subspace.basis)
        ends.append(world.flat())
    assert torch.equal(*ends)


def test_the_default_device_does_not_matter_to_solvers(elsewhere):
    with torch.device("cpu"):
        world = World()
    op = world.curvature()
    found = eigsh(op, 3)
    assert found.converged
    assert trace(op, probes=4).value > 0
    assert len(spectral_density(op, deflate=found).grid) > 0
    assert torch.isfinite(op.layers()["0"].to_dense()).all()
    assert eigsh(op, 2, v0=found.eigenvectors).converged


def test_maximize_turns_the_sign_of_a_closures_curvature():
    ends = []
    for sign, flag in ((1.0, False), (-1.0, True)):
        world = World()
        opt = BulkSGD(world.params(), lr=0.1, momentum=0.9, maximize=flag, curvature="closure", rank=2, refresh_every=3)
        for i in range(8):

            def closure(world=world, opt=opt, sign=sign, i=i):
                opt.zero_grad()
                loss = sign * world.loss(i)
                loss.backward()
                return loss

            opt.step(closure)
        assert opt.subspace.eigenvalues[0] > 0.05
        ends.append(world.flat())
    assert torch.equal(*ends)
