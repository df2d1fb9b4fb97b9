"""What holds for every entry of the zoo, and what an entry declares of itself: run, not read."""

import io
import pickle

import pytest
import torch

from curvopt import zoo
from tests.zoo.contract import ARGUMENTS, Problem, make, numbers, settings, step_with, train

NAMES = zoo.names()
FACTS = {name: zoo.describe(name) for name in NAMES}
PLAIN = [n for n in NAMES if not FACTS[n].needs_curvature]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def having(**facts):
    return [n for n in NAMES if all(getattr(FACTS[n], k) == v for k, v in facts.items())]


@pytest.mark.parametrize("kind", ["mlp", "conv", "regression"])
@pytest.mark.parametrize("name", NAMES)
def test_some_setting_of_the_search_space_lowers_the_loss(name, kind):
    key, values = settings(FACTS[name])
    # Dom-SGD moves in two directions alone, and stalls: that is what it is there to show.
    enough = 1.0 if name == "dom-sgd" else 0.95
    reached = {}
    # 25 steps are enough for most; methods that estimate their learning rate start from almost nothing.
    for steps in (25, 150):
        for value in values:
            problem = Problem(kind)
            start = problem.value()
            optimizer, entry = make(name, problem, **{key: value})
            try:
                reached[steps, value] = train(optimizer, entry, problem, steps) / start
            except torch.linalg.LinAlgError:  # a decomposition of what such a setting has blown up
                continue
            if reached[steps, value] < enough:
                return
    pytest.fail(f"{name} on {kind}: loss ratios {reached}")


@pytest.mark.parametrize("name", [*NAMES, "bulk+adamw", "dom+sgd", "scaled+rmsprop", "scaled+pytorch-optimizer/lion"])
def test_a_saved_state_goes_on_with_the_same_bits(name):
    problem, twin = Problem("mlp"), Problem("mlp", seed=1)
    optimizer, entry = make(name, problem)
    train(optimizer, entry, problem, 7)
    buffer = io.BytesIO()
    torch.save({"model": problem.model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    if not entry.safe_load:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            torch.load(buffer, weights_only=True)
        buffer.seek(0)
    saved = torch.load(buffer, weights_only=entry.safe_load)
    twin.model.load_state_dict(saved["model"])
    second, _ = make(name, twin)
    second.load_state_dict(saved["optimizer"])
    twin.x, twin.y = problem.x, problem.y
    if entry.needs_curvature:  # the operator of the twin was made on other data
        second, _ = make(name, twin)
        second.load_state_dict(saved["optimizer"])
    for opt, prob in ((optimizer, problem), (second, twin)):
        torch.manual_seed(5)  # some draw probes or noise from the global generator
        train(opt, entry, prob, 4)
    for a, b in zip(problem.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)


def halves(problem, entry):
    params = problem.parameters(entry)
    return params[: len(params) // 2], params[len(params) // 2 :]


@pytest.mark.parametrize("name", having(param_groups=True, schedulable=True))
def test_learning_rate_zero_freezes_a_group(name):
    """From the start, and when a schedule comes down to it."""
    problem = Problem("mlp")
    first, second = halves(problem, FACTS[name])
    optimizer, entry = make(name, problem, [{"params": first}, {"params": second, "lr": 0.0}])
    before = [p.detach().clone() for p in second]
    train(optimizer, entry, problem, 6)
    assert all(torch.equal(p, q) for p, q in zip(second, before, strict=True))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    everything = [p.detach().clone() for p in problem.model.parameters()]
    train(optimizer, entry, problem, 2)
    assert all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), everything, strict=True))


@pytest.mark.parametrize("name", having(param_groups=True, adds_groups=True))
def test_a_group_added_later_is_trained(name):
    problem = Problem("mlp")
    first, second = halves(problem, FACTS[name])
    optimizer, entry = make(name, problem, first)
    train(optimizer, entry, problem, 3)
    before = [p.detach().clone() for p in second]
    optimizer.add_param_group({"params": second})
    train(optimizer, entry, problem, 15)  # AdaShift waits for ten gradients, RAdam for five
    assert not any(torch.equal(p, q) for p, q in zip(second, before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_zero_and_missing_gradients(name):
    problem = Problem("mlp")
    params = problem.parameters(FACTS[name])
    optimizer, entry = make(name, problem)
    problem.loss = lambda outputs, targets: (0 * outputs).square().sum()
    train(optimizer, entry, problem, 3)  # nothing has been seen but zeros: the place for 0/0
    assert all(bool(torch.isfinite(p).all()) for p in params)

    problem = Problem("mlp")
    problem.model.register_parameter("unused", torch.nn.Parameter(torch.randn(3, 2)))
    optimizer, entry = make(name, problem)
    before = problem.model.unused.detach().clone()
    train(optimizer, entry, problem, 3)
    assert torch.equal(problem.model.unused, before)
    assert all(bool(torch.isfinite(p).all()) for p in problem.model.parameters())


@pytest.mark.parametrize("name", [n for n in PLAIN if FACTS[n].memory is not None])
def test_memory_is_what_the_state_holds(name):
    problem = Problem("wide")
    optimizer, entry = make(name, problem)
    train(optimizer, entry, problem, 3)
    params = problem.parameters(entry)
    held = sum(numbers(dict(optimizer.state[p])) for p in params if p in optimizer.state)
    # a few numbers a tensor or a row are not counted
    assert held / sum(p.numel() for p in params) == pytest.approx(entry.memory, abs=0.02)


def _pull(name):
    """Mean displacement that a shift of all parameters by 1, behind the optimizer's back, brings in ten steps."""

    def run(shift):
        problem = Problem("mlp")
        entry = FACTS[name]
        decay = {"weight_decay": 0.0} if "weight_decay" in entry.defaults else {}
        optimizer, _ = make(name, problem, **decay)
        params = problem.parameters(entry)
        if entry.needs_train_mode:
            optimizer.train()
        noise = torch.Generator().manual_seed(3)
        for step in range(12):
            if step == 2:
                with torch.no_grad():
                    for p in params:
                        p.add_(shift)
                here = [p.detach().clone() for p in params]
            torch.manual_seed(step)
            step_with(optimizer, entry, params, [0.1 * torch.randn(p.shape, generator=noise) for p in params])
        return torch.cat([(p.detach() - q).flatten() for p, q in zip(params, here, strict=True)])

    return float((run(1.0) - run(0.0)).mean())


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in PLAIN
        if not (FACTS[n].needs_create_graph or FACTS[n].needs_residuals or FACTS[n].family == "quasi-newton")
    ],
)
def test_who_holds_a_copy_of_the_parameters_undoes_what_is_done_behind_its_back(name):
    pull = _pull(name)
    if FACTS[name].holds_parameters_copy:
        assert abs(pull) > 0.05
    else:  # steps in proportion to a weight's size (LAMB) grow with it, but don't bring it back
        assert pull > -0.05


@pytest.mark.parametrize("name", having(needs_closure=False, needs_create_graph=False))
def test_a_closure_is_called_and_its_loss_given_back(name):
    problem = Problem("mlp")
    optimizer, entry = make(name, problem)
    if entry.needs_train_mode:
        optimizer.train()
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = problem.loss(problem.model(problem.x), problem.y)
        loss.backward()
        calls.append(float(loss))
        return loss

    assert float(optimizer.step(closure)) == calls[0]


@pytest.mark.parametrize("name", having(needs_closure=True))
def test_a_closure_that_is_needed_is_asked_for(name):
    problem = Problem("mlp")
    optimizer, _ = make(name, problem)
    with pytest.raises(Exception, match="closure"):
        optimizer.step()


@pytest.mark.parametrize("name", having(needs_create_graph=True))
def test_create_graph_is_asked_for(name):
    problem = Problem("mlp")
    optimizer, entry = make(name, problem)
    problem.loss(problem.model(problem.x), problem.y).backward()
    with pytest.raises(RuntimeError):
        optimizer.step()


@pytest.mark.parametrize("name", having(needs_train_mode=True))
def test_training_and_evaluation_are_at_two_points(name):
    problem = Problem("mlp")
    optimizer, entry = make(name, problem)
    train(optimizer, entry, problem, 10)  # RAdam's first five steps have length 0
    evaluated = [p.detach().clone() for p in problem.model.parameters()]
    optimizer.train()
    assert not any(torch.equal(p, q) for p, q in zip(problem.model.parameters(), evaluated, strict=True))
    optimizer.eval()
    for p, q in zip(problem.model.parameters(), evaluated, strict=True):
        # There and back is an interpolation each: some float32 eps of the values.
        torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", having(matrices_only=True))
def test_vectors_are_refused(name):
    with pytest.raises(ValueError, match="(?i)2.?d"):
        optimizer = zoo.create(name, [torch.nn.Parameter(torch.ones(3))], lr=0.1)
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()


@pytest.mark.parametrize("name", [n for n in NAMES if FACTS[n].required])
def test_required_arguments_are_asked_for(name):
    kw = {k: v for k, v in ARGUMENTS[name].items() if k not in FACTS[name].required}
    with pytest.raises(TypeError, match=f"needs {FACTS[name].required[0]}="):
        zoo.create(name, [torch.nn.Parameter(torch.ones(3, 2))], **kw)


@pytest.mark.parametrize("name", zoo.names("scaled+*"))
def test_every_base_that_can_be_wrapped_is(name):
    problem = Problem("mlp")
    start = problem.value()
    optimizer, entry = make(name, problem, dominant=0.5)
    train(optimizer, entry, problem, 12)
    assert optimizer.subspace is not None and optimizer.subspace.basis.shape[1] == 2
    assert problem.value() != start and all(bool(torch.isfinite(p).all()) for p in problem.model.parameters())
