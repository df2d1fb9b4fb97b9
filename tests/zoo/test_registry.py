"""The registry: names, facts, errors; what is excluded and adapted, and why. What every entry does: test_contract."""

import copy
import dataclasses
import pickle

import pytest
import torch

from curvopt import zoo
from curvopt._errors import MissingExtraError
from curvopt.curvature import Hessian
from curvopt.zoo import registry
from tests.zoo.contract import Problem, make, train


def _problem():
    problem = Problem("mlp")
    return problem.model, problem.loss, (problem.x, problem.y)


def test_same_optimizer_as_by_its_class():
    ours, theirs = Problem("mlp"), Problem("mlp")
    first, entry = make("sgd-nesterov", ours, lr=0.1)
    second = torch.optim.SGD(theirs.model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    train(first, entry, ours, 10)
    train(second, entry, theirs, 10)
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))


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
        assert entry.paper and entry.licence and entry.search, name
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


def test_names_and_patterns():
    assert zoo.names("adam*") == ["adam", "adamax", "adamw"]
    assert zoo.names("bulk+adam*") == ["bulk+adam", "bulk+adamax", "bulk+adamw"]
    assert not any("+" in name for name in zoo.names())
    excluded = zoo.names(excluded=True)
    assert "sparse gradients" in excluded["sparse-adam"]
    assert "AttributeError" in excluded["torch-optimizer/lookahead"]
    assert not set(excluded) & set(zoo.names())


def test_reasons_are_true():
    """Every class that is listed as broken, run: the reason given is what happens."""
    import pytorch_optimizer.optimizer as kozistr
    import torch_optimizer

    model, loss, data = _problem()
    params = list(model.parameters())
    lookahead = torch_optimizer.Lookahead(torch.optim.SGD(params, lr=0.1))
    with pytest.raises(AttributeError):
        lookahead.state_dict()
    conv = Problem("conv")
    adafactor = torch_optimizer.Adafactor(conv.model.parameters())
    conv.loss(conv.model(conv.x), conv.y).backward()
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        adafactor.step()
    for name in ("AdaLOMO", "LOMO", "AdamMini"):
        with pytest.raises(AttributeError, match="parameters"):
            getattr(kozistr, name)(params)
    for name in ("DeMo", "DistributedMuon"):
        with pytest.raises(ValueError, match="process group"):
            groups = [{"params": params[:1], "use_muon": True}] if "Muon" in name else params[:1]
            optimizer = getattr(kozistr, name)(groups)
            params[0].grad = torch.ones_like(params[0])
            optimizer.step()
    # LoRARite: a lone matrix stays where it is
    weight = torch.nn.Parameter(torch.randn(3, 4))
    optimizer, before = kozistr.LoRARite([weight], lr=0.1), weight.detach().clone()
    weight.grad = torch.randn(3, 4)
    optimizer.step()
    assert torch.equal(weight, before)
    # bSAM: its momentum gathers weight_decay * gradient, so that without decay nothing moves but by noise
    weight = torch.nn.Parameter(torch.ones(2000))
    optimizer = kozistr.BSAM([weight], num_data=10**6, lr=0.1, weight_decay=0.0, rho=0.0, foreach=False)

    def closure():
        weight.grad = torch.ones_like(weight)
        return weight.sum()

    with pytest.raises(KeyError):
        optimizer.step(closure)
    for _ in range(5):
        optimizer.step(closure)
    assert abs(float(weight.detach().mean()) - 1.0) < 1e-4
    excluded = {n.rpartition("/")[2] for n in zoo.names(excluded=True)}
    assert excluded == {
        "lookahead", "adafactor", "adalomo", "lomo", "adammini", "demo", "distributedmuon", "lorarite", "bsam", "sparse-adam",
    }  # fmt: skip


def test_faults_of_other_libraries_that_are_put_right():
    """What the adapted classes repair is broken without them."""
    import torch_optimizer

    model, loss, data = _problem()
    loss(model(data[0]), data[1]).backward()
    called = []
    assert torch_optimizer.Ranger(model.parameters()).step(lambda: called.append(1)) is None and not called
    params = list(model.parameters())
    shared = torch_optimizer.RAdam([{"params": params[:2]}, {"params": params[2:], "lr": 1e-30}], lr=0.1)
    before = params[2].detach().clone()
    for _ in range(8):
        shared.step()
    assert not torch.equal(params[2], before)  # the other group's step size was used
    bound = torch_optimizer.AdaBound(params[:2])
    bound.add_param_group({"params": params[2:]})
    before = params[2].detach().clone()
    bound.step()
    assert torch.equal(params[2], before)

    import pytorch_optimizer

    weight = torch.nn.Parameter(torch.ones(3))
    for fixed, sign in (({}, 1), (zoo.describe("pytorch-optimizer/ranger").fixed, -1)):
        climbing = pytorch_optimizer.Ranger([weight], lr=0.1, **fixed)
        before = weight.detach().clone()
        weight.grad = torch.ones(3)
        climbing.step()
        assert bool(((weight - before).sign() == sign).all())


def test_adapted_classes_pickle_and_copy():
    problem = Problem("mlp")
    for name in ("torch-optimizer/ranger", "pytorch-optimizer/muon", "torch-optimizer/adabound"):
        optimizer, entry = make(name, problem)
        train(optimizer, entry, problem, 2)
        for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
            assert type(twin) is type(optimizer) and twin.state_dict().keys() == optimizer.state_dict().keys()
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = zoo.adapt.Nothing


def test_every_class_that_the_libraries_list_has_an_entry():
    import pytorch_optimizer
    import schedulefree
    import torch_optimizer

    known = {*zoo.names(), *zoo.names(excluded=True)}
    assert {f"pytorch-optimizer/{n}" for n in pytorch_optimizer.get_supported_optimizers()} <= known
    targets = {registry._ENTRIES[n].target.partition(":")[2] for n in known}
    classes = {n for n in torch_optimizer.__all__ if n[0].isupper()}
    classes |= {n for n in dir(schedulefree) if n[0].isupper() and "Wrapper" not in n}
    classes |= {n for n in torch.optim.__all__ if isinstance(getattr(torch.optim, n), type) and n != "Optimizer"}
    assert classes - targets == set()


def test_search_space():
    space = zoo.search_space("sgd-momentum")
    assert space["lr"].log and space["lr"].low < 0.1 < space["lr"].high and not space["momentum"].log
    assert zoo.search_space("bulk-sgd")["momentum"] == zoo.Choice((0.0, 0.9))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("adamv", "unknown optimizer 'adamv': did you mean 'adam' or 'adamw'"),
        ("adabelif", "did you mean 'pytorch-optimizer/adabelief'"),
        ("torch-optimizer/adabelif", "did you mean 'torch-optimizer/adabelief'"),
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
    text = "'torch-optimizer/lookahead' does not work here: never initialises torch's Optimizer"
    with pytest.raises(zoo.UnavailableOptimizerError, match=text):
        zoo.create("torch-optimizer/lookahead", model.parameters())


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
