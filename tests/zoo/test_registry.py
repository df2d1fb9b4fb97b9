"""The registry: names, facts, errors, and every entry that works stepping on a small problem."""

import dataclasses
import io

import pytest
import torch
from torch import nn

from curvopt import zoo
from curvopt._errors import MissingExtraError
from curvopt.curvature import Hessian
from curvopt.zoo import registry


def _problem(seed=0, dtype=torch.float32):  # torch casts saved scalars to it: NAdam resumes exactly in float32 only
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    x, y = torch.randn(40, 4, dtype=dtype), torch.randint(0, 3, (40,))
    return model, nn.CrossEntropyLoss(), (x, y)


# Learning rates at which 12 full-batch steps lower this loss; the library's own defaults hardly move in 12 steps.
_LR = {
    "sgd": 0.1,
    "adaptive": 0.01,
    "sign": 0.01,
    "quasi-newton": 0.5,
    "matrix": 0.02,
    "curvature": 0.05,
    "subspace": 0.1,
}
_OWN_LR = {
    "adadelta": 1.0,
    "torch-optimizer/accsgd": 0.01,
    "torch-optimizer/lars": 0.5,
    "torch-optimizer/sgdw": 0.1,
    "torch-optimizer/apollo": 0.1,
}
_EXTRA = {"interpolated-sgd": {"dominant": 0.5, "bulk": 1.0}}
_WRAPPED = ["bulk+adamw", "dom+sgd", "scaled+adamw", "scaled+rmsprop"]


def _make(name, model, loss, data):
    entry = zoo.describe(name)
    kw = {"lr": _OWN_LR.get(name, 0.01 if "+a" in name or "+r" in name else _LR[entry.family]), **_EXTRA.get(name, {})}
    if entry.needs_curvature:
        kw |= {"curvature": Hessian(model, loss, data), "rank": 2, "refresh_every": 5}
    params = [p for p in model.parameters() if p.dim() == 2 or not entry.matrices_only]
    return zoo.create(name, params, **kw), entry


def _train(optimizer, entry, model, loss, data, steps):
    def closure():
        optimizer.zero_grad()
        value = loss(model(data[0]), data[1])
        value.backward(create_graph=entry.needs_create_graph)
        return value

    for _ in range(steps):
        if entry.needs_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        return float(loss(model(data[0]), data[1]))


@pytest.mark.parametrize("name", [*zoo.names(), *_WRAPPED])
@pytest.mark.filterwarnings("ignore::curvopt._errors.CurvoptWarning", "ignore::UserWarning")
def test_entry_lowers_the_loss_and_resumes(name):
    model, loss, data = _problem()
    start = float(loss(model(data[0]), data[1]))
    optimizer, entry = _make(name, model, loss, data)
    reached = _train(optimizer, entry, model, loss, data, 12)
    assert reached < start, f"{start} -> {reached}"

    # A copy that loads the state goes on with the same bits: torch.save, weights_only, load_state_dict.
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin = _problem(seed=1)[0]
    twin.load_state_dict(saved["model"])
    second, _ = _make(name, twin, loss, data)
    second.load_state_dict(saved["optimizer"])
    torch.manual_seed(5)  # Adahessian draws its probes from the global generator
    _train(optimizer, entry, model, loss, data, 3)
    torch.manual_seed(5)
    _train(second, entry, twin, loss, data, 3)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_same_optimizer_as_by_its_class():
    model, loss, data = _problem()
    twin, _, _ = _problem()
    ours = zoo.create("sgd-nesterov", model.parameters(), lr=0.1)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    entry = zoo.describe("sgd-nesterov")
    _train(ours, entry, model, loss, data, 10)
    _train(theirs, entry, twin, loss, data, 10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_arguments_override_fixed_ones():
    model, _, _ = _problem()
    assert zoo.create("sgd-momentum", model.parameters(), lr=0.1, momentum=0.5).defaults["momentum"] == 0.5
    assert zoo.create("sgd-momentum", model.parameters(), lr=0.1).defaults["momentum"] == 0.9


def test_wrapper_arguments_go_to_the_wrapper_and_others_to_the_base():
    model, loss, data = _problem()
    wrapped = zoo.create(
        "bulk+adamw",
        model.parameters(),
        lr=0.02,
        weight_decay=0.3,
        curvature=Hessian(model, loss, data),
        rank=2,
        bulk=1.5,
    )
    assert isinstance(wrapped.base, torch.optim.AdamW)
    assert wrapped.base.defaults["lr"] == 0.02 and wrapped.base.defaults["weight_decay"] == 0.3
    assert "dominant=0.0, bulk=1.5, rank=2" in repr(wrapped)


def test_entries_are_frozen_and_complete():
    for name in zoo.names():
        entry = zoo.describe(name)
        assert entry.paper and entry.licence and entry.search and "lr" in entry.defaults, name
        assert set(entry.search) <= set(entry.defaults), name
        with pytest.raises(dataclasses.FrozenInstanceError):
            entry.name = "other"
        with pytest.raises(TypeError):
            entry.defaults["lr"] = 1.0


def test_facts():
    assert zoo.describe("lbfgs").needs_closure
    assert zoo.describe("muon").matrices_only
    assert zoo.describe("torch-optimizer/adahessian").needs_create_graph
    assert zoo.describe("torch-optimizer/adahessian").products_per_step == 1
    assert zoo.describe("torch-optimizer/madgrad").holds_parameters_copy
    assert zoo.describe("adamw").memory == 2
    bulk = zoo.describe("bulk-sgd")
    assert bulk.needs_curvature and "dominant" not in bulk.defaults and bulk.defaults["momentum"] == 0
    scaled = zoo.describe("scaled+adamw")
    assert scaled.needs_curvature and {"betas", "rank", "metric", "check_finite"} <= set(scaled.defaults)


def test_memory_is_what_the_state_holds():
    model, loss, data = _problem()
    size = sum(p.numel() for p in model.parameters())
    for name in ("sgd", "sgd-momentum", "adam", "adamw", "rmsprop", "adagrad", "torch-optimizer/adamod"):
        optimizer, entry = _make(name, model, loss, data)
        _train(optimizer, entry, model, loss, data, 2)
        held = sum(v.numel() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim())
        assert held == entry.memory * size, name


def test_names_and_patterns():
    assert zoo.names("adam*") == ["adam", "adamax", "adamw"]
    assert zoo.names("bulk+adam*") == ["bulk+adam", "bulk+adamax", "bulk+adamw"]
    assert not any("+" in name for name in zoo.names())
    excluded = zoo.names(excluded=True)
    assert "sparse gradients" in excluded["sparse-adam"]
    assert "AttributeError" in excluded["torch-optimizer/lookahead"]
    assert not set(excluded) & set(zoo.names())


def test_reasons_are_true():
    """Two of the excluded classes, run: the reason given is what happens."""
    import torch_optimizer

    model, loss, data = _problem()
    lookahead = torch_optimizer.Lookahead(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(AttributeError):
        lookahead.state_dict()
    ranger = torch_optimizer.Ranger(model.parameters())
    loss(model(data[0]), data[1]).backward()
    called = []
    assert ranger.step(lambda: called.append(1)) is None and not called


def test_search_space():
    space = zoo.search_space("sgd-momentum")
    assert space["lr"].log and space["lr"].low < 0.1 < space["lr"].high and not space["momentum"].log
    assert zoo.search_space("bulk-sgd")["momentum"] == zoo.Choice((0.0, 0.9))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("adamv", "unknown optimizer 'adamv': did you mean 'adam' or 'adamw'"),
        ("adabelif", "did you mean 'torch-optimizer/adabelief'"),
        ("zzzzzz", r"unknown optimizer 'zzzzzz': curvopt.zoo.names\(\) lists them"),
        ("blk+adamw", "unknown wrapper 'blk' in 'blk.adamw': did you mean 'bulk.adamw'"),
        ("xyz+adamw", "it must be one of 'scaled.NAME', 'bulk.NAME', 'dom.NAME'"),
        ("bulk+adamv", "'adamv': did you mean 'adam' or 'adamw'"),
    ],
)
def test_unknown_name_names_the_nearest(name, text):
    model, _, _ = _problem()
    for ask in (lambda: zoo.create(name, model.parameters(), lr=0.1), lambda: zoo.describe(name)):
        with pytest.raises(zoo.UnknownOptimizerError, match=text):
            ask()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sgd", "'sgd' takes no argument 'momentm': did you mean 'momentum'"),
        ("scaled+sgd", "takes no argument 'momentm': did you mean 'momentum'"),
    ],
)
def test_unknown_argument_names_the_nearest(name, text):
    model, _, _ = _problem()
    with pytest.raises(TypeError, match=text.replace("+", r"\+")):
        zoo.create(name, model.parameters(), lr=0.1, momentm=0.9)


def test_unavailable_says_why():
    model, _, _ = _problem()
    with pytest.raises(
        zoo.UnavailableOptimizerError, match="'torch-optimizer/ranger' does not work here: ignores the closure"
    ):
        zoo.create("torch-optimizer/ranger", model.parameters())


def test_missing_library_names_the_extra(monkeypatch):
    found = registry.importlib.util.find_spec
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda n: None if n == "torch_optimizer" else found(n))
    model, _, _ = _problem()
    assert "torch-optimizer/yogi" not in zoo.names()
    assert "torch_optimizer is not installed" in zoo.names(excluded=True)["torch-optimizer/yogi"]
    with pytest.raises(MissingExtraError, match=r'pip install "curvopt-torch\[optimizers\]"'):
        zoo.create("torch-optimizer/yogi", model.parameters())


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="already has an optimizer named 'sgd'"):
        registry.register(zoo.Entry("sgd", "torch.optim:SGD", "sgd"))


def test_third_party_libraries_are_imported_lazily():
    import subprocess
    import sys

    code = "import sys, curvopt.zoo as z; z.names(); z.describe('sgd'); assert 'torch_optimizer' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
