"""SubspaceLBFGS saved, copied, resumed in new processes, handed new groups, and averaged over two processes."""

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from curvopt.curvature import Hessian
from curvopt.optim import SubspaceLBFGS

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {
    "rank 0": {"rank": 0},
    "closure": {"rank": 4, "refresh_at": (3,), "refresh_every": 9},
    "strong wolfe": {"rank": 4, "refresh_at": (3,), "refresh_every": 9, "line_search_fn": "strong_wolfe"},
    "turning ring": {"rank": 3, "refresh_at": (3,), "refresh_every": 9, "history_size": 4},
    "hessian": {"rank": 4, "refresh_at": (3,), "refresh_every": 9, "curvature": "hessian"},
    "frozen": {"rank": 2, "refresh_at": (3,), "refresh_every": "frozen"},
}


class World:
    """A small regression; the same at each call, and copyable."""

    def __init__(self, dtype=torch.float64):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.model = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)
            self.x = torch.rand(30, 2, dtype=dtype)
        self.y = torch.sin(4 * self.x[:, :1]) * self.x[:, 1:]

    def loss(self):
        return nn.functional.mse_loss(self.model(self.x), self.y)

    def make(self, **options):
        options = {"max_iter": 5, **options}
        if options.get("curvature") == "hessian":
            options["curvature"] = Hessian(self.model, nn.MSELoss(), (self.x, self.y), route="loop")
        return SubspaceLBFGS(self.model.parameters(), **options)

    def train(self, opt, steps):
        def closure():
            opt.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        for _ in range(steps):
            opt.step(closure)

    def flat(self):
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).clone()


def numbers(opt):
    """What stats() counts, without seconds."""
    return {k: v for k, v in opt.stats().items() if not k.startswith(("seconds", "share")) and v == v}


def same_state(left, right):
    a, b = left.state_dict(), right.state_dict()
    assert a["state"].keys() == b["state"].keys()
    for i in a["state"]:
        assert a["state"][i].keys() == b["state"][i].keys()
        assert all(torch.equal(v, b["state"][i][k]) for k, v in a["state"][i].items())
    assert repr(a["param_groups"]) == repr(b["param_groups"])


each = pytest.mark.parametrize("variant", VARIANTS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@each
@both_dtypes
@pytest.mark.parametrize("at", [0, 1, 3])
def test_resumed_from_a_file_it_continues_bit_for_bit(variant, dtype, at, tmp_path):
    unbroken, resumed = World(dtype), World(dtype)
    opt = unbroken.make(**VARIANTS[variant])
    unbroken.train(opt, at)
    torch.save({"model": unbroken.model.state_dict(), "opt": opt.state_dict()}, tmp_path / "at.pt")
    unbroken.train(opt, 4)
    saved = torch.load(tmp_path / "at.pt", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    fresh = resumed.make(**VARIANTS[variant])
    fresh.load_state_dict(saved["opt"])
    assert fresh.stats()["iterations"] == (0 if at == 0 else saved["opt"]["param_groups"][0]["curvopt_iterations"])
    resumed.train(fresh, 4)
    assert torch.equal(unbroken.flat(), resumed.flat())
    assert numbers(opt) == numbers(fresh)
    same_state(opt, fresh)


def test_a_new_process_continues_bit_for_bit(tmp_path):
    script = """
import sys, torch
torch.set_num_threads(1)
from tests.optim.test_lbfgs_state import VARIANTS, World
out = {}
for variant, saved in torch.load(sys.argv[1], weights_only=True).items():
    world = World(torch.float32)
    opt = world.make(**VARIANTS[variant])
    world.model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    world.train(opt, 3)
    out[variant] = {"flat": world.flat(), "opt": opt.state_dict()}
torch.save(out, sys.argv[2])
"""
    at, unbroken = {}, {}
    for variant in ("closure", "turning ring", "hessian", "strong wolfe"):
        world = World(torch.float32)
        opt = world.make(**VARIANTS[variant])
        world.train(opt, 3)
        at[variant] = copy.deepcopy({"model": world.model.state_dict(), "opt": opt.state_dict()})
        world.train(opt, 3)
        unbroken[variant] = world, opt
    torch.save(at, tmp_path / "at.pt")
    subprocess.run([sys.executable, "-c", script, tmp_path / "at.pt", tmp_path / "end.pt"], cwd=ROOT, check=True)
    for variant, end in torch.load(tmp_path / "end.pt", weights_only=True).items():
        world, opt = unbroken[variant]
        assert torch.equal(end["flat"], world.flat())
        mine = opt.state_dict()
        for i, entry in mine["state"].items():
            assert all(torch.equal(end["opt"]["state"][i][k], v) for k, v in entry.items())
        assert repr(end["opt"]["param_groups"]) == repr(mine["param_groups"])


def test_history_size_follows_the_group():
    world = World()
    opt = world.make(rank=0, history_size=9)
    world.train(opt, 3)  # 15 iterations, so the ring has turned
    pairs = [tuple(t.clone() for t in pair) for pair in opt._quasi.history.by_age()]
    opt.param_groups[0]["history_size"] = 5
    opt._quasi._resize(5)
    kept = opt._quasi.history.by_age()
    assert len(pairs) == 9
    assert all(
        torch.equal(a, b) for old, new in zip(pairs[-5:], kept, strict=True) for a, b in zip(old, new, strict=True)
    )
    world.train(opt, 1)
    assert opt.stats()["pairs"] == 5
    opt.load_state_dict(opt.state_dict())
    assert opt.stats()["pairs"] == 5


def test_after_the_state_of_torchs_lbfgs_ones_own_loads_again():
    world = World()
    opt = world.make(rank=0)
    opt.load_state_dict(torch.optim.LBFGS(world.model.parameters()).state_dict())  # its history_size, 100, comes along
    world.train(opt, 2)
    opt.load_state_dict(opt.state_dict())
    assert opt.stats()["pairs"] > 0


@each
def test_saving_writes_each_number_once(variant, tmp_path):
    world = World()
    opt = world.make(**VARIANTS[variant])
    world.train(opt, 3)
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    total = world.flat().numel()
    rank, m = VARIANTS[variant]["rank"], opt.defaults["history_size"]
    expected = 8 * ((2 * m + rank) * total + m * m)
    held = {
        v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for e in opt.state.values() for v in e.values()
    }
    assert sum(held.values()) == expected  # the memory that the documentation states
    # besides: names, shapes, and counters
    assert expected < (tmp_path / "opt.pt").stat().st_size < expected + 20_000
    # plain pickle and deepcopy write no view's storage twice either; pickle also holds the parameters
    assert len(pickle.dumps(opt)) < expected + 40_000


@each
def test_a_deep_copy_goes_on_alone(variant):
    world = World()
    opt = world.make(**VARIANTS[variant])
    world.train(opt, 2)
    twin, copied = copy.deepcopy((world, opt))
    assert copied.param_groups[0]["params"][0] is next(twin.model.parameters())
    world.train(opt, 3)
    before = twin.flat()
    assert not torch.equal(world.flat(), before)
    twin.train(copied, 3)
    assert torch.equal(world.flat(), twin.flat())
    assert numbers(opt) == numbers(copied)
    same_state(opt, copied)


@each
def test_a_pickle_goes_on_once_it_has_its_operator(variant):
    world = World()
    opt = world.make(**VARIANTS[variant])
    world.train(opt, 2)
    twin, copied = pickle.loads(pickle.dumps((world, opt)))
    if variant == "hessian":
        copied.curvature = Hessian(twin.model, nn.MSELoss(), (twin.x, twin.y), route="loop")
    world.train(opt, 3)
    twin.train(copied, 3)
    assert torch.equal(world.flat(), twin.flat())
    same_state(opt, copied)


def test_a_pickle_without_its_operator_says_so():
    world = World()
    opt = world.make(**{**VARIANTS["hessian"], "refresh_at": (0,), "refresh_every": 5})
    world.train(opt, 1)
    twin, copied = pickle.loads(pickle.dumps((world, opt)))
    assert copied.curvature is None
    with pytest.raises(ValueError, match=r"no curvature operator is attached .*set optimizer\.curvature"):
        twin.train(copied, 1)


def test_a_loaded_state_is_not_shared():
    world, other = World(), World()
    opt = world.make(**VARIANTS["closure"])
    world.train(opt, 2)
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    second = other.make(**VARIANTS["closure"])
    second.load_state_dict(saved)
    other.train(second, 2)
    same = all(torch.equal(v, kept["state"][i][k]) for i, e in saved["state"].items() for k, v in e.items())
    assert same


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 5}, r"saved basis of parameter '0' has shape \(4, 7, 2\), expected \(5, 7, 2\).*another rank"),
        ({"history_size": 6}, r"saved steps of parameter '0' has shape \(50, 7, 2\), expected \(6, 7, 2\)"),
    ],
)
def test_another_rank_or_history_is_refused_and_nothing_is_loaded(options, text):
    world, donor = World(), World()
    source = donor.make(**VARIANTS["closure"])
    donor.train(source, 2)
    opt = world.make(**{**VARIANTS["closure"], **options})
    world.train(opt, 2)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=text):
        opt.load_state_dict(source.state_dict())
    after = opt.state_dict()
    assert repr(before["param_groups"]) == repr(after["param_groups"])
    assert all(torch.equal(v, after["state"][i][k]) for i, e in before["state"].items() for k, v in e.items())
    world.train(opt, 1)


@pytest.mark.parametrize("key", ["basis", "changes"])
def test_an_incomplete_checkpoint_is_refused(key):
    world = World()
    opt = world.make(**VARIANTS["closure"])
    world.train(opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    del saved["state"][1][key]
    with pytest.raises(ValueError, match=f"holds no {key} of parameter '1': it is incomplete"):
        opt.load_state_dict(saved)


def test_a_state_of_torch_lbfgs_starts_anew():
    world = World()
    donor = torch.optim.LBFGS(world.model.parameters(), lr=0.5, max_iter=7)
    world.train(donor, 2)
    opt = world.make(rank=3, refresh_at=(2,))
    world.train(opt, 2)
    saved = donor.state_dict()
    saved["param_groups"][0]["line_search_fn"] = "strong_wolfe"
    opt.load_state_dict(saved)
    assert opt.stats()["iterations"] == 0 and opt.stats()["kept"] == 0 and opt.stats()["pairs"] == 0
    before = float(world.loss().detach())
    world.train(opt, 2)
    assert float(world.loss().detach()) < before


def test_hooks_and_schedulers():
    world = World()
    opt = world.make(rank=3, refresh_at=(2,))
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for _ in range(3):
        world.train(opt, 1)
        scheduler.step()
    assert seen == ["pre", "post"] * 3
    assert opt.param_groups[0]["lr"] == 0.125
    assert "rank: 3" in repr(opt).replace("=", ": ") and "curvopt_" not in repr(opt)


def test_a_new_group_begins_anew():
    world = World()
    first, last = world.model[0], world.model[2]
    opt = SubspaceLBFGS(first.parameters(), rank=3, refresh_at=(2,), refresh_every=5, max_iter=5)
    held = last.weight.detach().clone()
    world.train(opt, 2)
    assert torch.equal(last.weight, held)
    opt.add_param_group({"params": last.parameters()})
    assert opt.stats()["pairs"] == 0 and opt.stats()["kept"] == 0
    before = float(world.loss().detach())
    world.train(opt, 3)
    assert not torch.equal(last.weight, held)
    assert float(world.loss().detach()) < before
    assert opt.subspace.blocks[2].shape == (3, 1, 7)


@pytest.mark.parametrize("variant", ["closure", "hessian"])
def test_two_processes_that_average_agree_bit_for_bit(variant, tmp_path):
    script = """
import os, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
torch.set_num_threads(1)
from tests.optim.test_lbfgs_state import World
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
world = World()
whole = (world.x, world.y)
world.x, world.y = whole[0][rank::2], whole[1][rank::2]
model = DistributedDataParallel(world.model)
from curvopt.optim import SubspaceLBFGS
from curvopt.curvature import Hessian
options = {"rank": 4, "refresh_at": (3,), "refresh_every": 9, "max_iter": 5}
if sys.argv[4] == "hessian":
    options["curvature"] = Hessian(world.model, torch.nn.MSELoss(), (world.x, world.y), route="loop")
opt = SubspaceLBFGS(model.parameters(), **options)
def closure():
    opt.zero_grad()
    loss = torch.nn.functional.mse_loss(model(world.x), world.y)
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)
    return loss / 2
for _ in range(4):
    opt.step(closure)
torch.save({"flat": world.flat(), "kept": opt.stats()["kept"]}, f"{sys.argv[3]}/{rank}.pt")
dist.destroy_process_group()
"""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(r), str(tmp_path / "store"), str(tmp_path), variant], cwd=ROOT
        )
        for r in range(2)
    ]
    assert [p.wait(timeout=100) for p in started] == [0, 0]
    left, right = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    assert torch.equal(left["flat"], right["flat"]) and left["kept"] == right["kept"] >= 1
    world = World()
    opt = world.make(**VARIANTS[variant])
    world.train(opt, 4)
    # Sums in another order: differences of gradients turn that rounding into 1e-8, and 20 iterations pass it on.
    assert float((world.flat() - left["flat"]).norm() / world.flat().norm()) < 1e-4


def test_no_warning_in_an_ordinary_run():
    world = World()
    opt = world.make(**VARIANTS["closure"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        world.train(opt, 6)
    assert opt.stats()["refreshes"] == 3
