"""The cost model: counted beforehand on the meta device, fitted by timing, and leaving nothing behind."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.perf.memory import peak_bytes
from curvopt.curvature import GGN, ClosureHessian, Hessian
from curvopt.curvature.cost import Cost


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 5))
    return model, nn.CrossEntropyLoss(), (torch.randn(40, 30), torch.randint(5, (40,)))


def flops(work):
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_the_dry_run_counts_what_a_real_product_does(kind):
    op = kind(*mlp(), check=False)
    cost = op.cost(dry_run=True)
    assert (cost.source, cost.products) == ("counted", 1)
    unit = flops(op.problem.gradient)
    v = torch.randn(op.shape[0])
    with op.hold():
        first, second = flops(lambda: op @ v), flops(lambda: op @ v)
    assert second / unit == pytest.approx(cost.product_gradients)
    assert (first - second) / unit == pytest.approx(cost.setup_gradients)
    assert cost.of(10).gradients == pytest.approx(cost.setup_gradients + 10 * cost.product_gradients)
    assert math.isnan(cost.seconds)


def test_the_counts_are_those_of_the_formula():
    # units of one layer's forward product: 600, 200 and 50 multiplications an example for the three layers. A gradient
    # takes them once forward and twice back, the first layer's only once; a Hessian product on the graph takes twice
    # each of the two backward products, and for the layers above the first once more for the input's tangent.
    first, others = 600, 250
    gradient = 2 * first + 3 * others
    product = 2 * first + 6 * others
    assert Hessian(*mlp(), check=False).cost(dry_run=True).product_gradients == pytest.approx(product / gradient)


def test_the_graph_that_a_dry_run_measures_is_the_real_one():
    op = Hessian(*mlp(), check=False)
    with op.hold():
        op @ torch.ones(op.shape[0])
        assert op.cost(dry_run=True).graph_bytes == op.graph_bytes > 0


class Allocations(TorchDispatchMode):
    """Bytes of every tensor outside the meta device that operations make."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.bytes += sum(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.device.type != "meta")
        return out


def test_a_dry_run_allocates_and_computes_nothing():
    op = Hessian(*mlp(), check=False)
    op.problem.batches  # noqa: B018 read beforehand: data are the user's
    with Allocations() as mode:
        op.cost(10, dry_run=True)
    assert mode.bytes == 0
    assert op.matvecs == 0


def test_every_kind_of_net_is_counted_without_a_trace(case):
    model, loss_fn, data, forward = case.make()
    op = Hessian(model, loss_fn, data, forward=forward, check=False)
    before = {n: b.clone() for n, b in op.problem.model.named_buffers()}
    state = torch.get_rng_state()
    modes = [m.training for m in op.problem.model.modules()]
    cost = op.cost(3, dry_run=True)
    assert cost.source in ("counted", "rule")
    assert 1 <= cost.product_gradients < 6
    assert all(torch.equal(b, before[n]) and b.device.type == "cpu" for n, b in op.problem.model.named_buffers())
    assert all(p.device.type == "cpu" and p.grad is None for p in op.problem.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in op.problem.model.modules()] == modes


def test_a_net_that_reads_numbers_gets_the_rule():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(30, 5)

        def forward(self, x):
            return self.layer(x) * (2.0 if x.sum().item() > 0 else 1.0)

    _, loss_fn, data = mlp()
    cost = Hessian(Reads(), loss_fn, data, check=False).cost(4, dry_run=True)
    assert (cost.source, cost.gradients, cost.graph_bytes) == ("rule", 9.0, 0)


def test_a_fit_has_seconds_and_leaves_no_trace():
    op = Hessian(*mlp(), check=False)
    cost = op.cost(10)
    assert cost.source == "timed"
    assert cost.gradient_seconds > 0
    assert cost.product_seconds > 0
    assert cost.seconds == pytest.approx(cost.setup_seconds + 10 * cost.product_seconds)
    assert op.matvecs == 0
    assert op.cost(20) == cost.of(20)  # timed once
    assert not len(op._graphs)
    x, y = mlp()[2]
    op.set_batch((x[:7], y[:7]))
    assert op.cost(20).gradient_seconds != cost.gradient_seconds


@pytest.mark.parametrize(("scheme", "gradients"), [("central", 20), ("forward", 11)])
def test_differences_cost_gradients(scheme, gradients):
    op = Hessian(*mlp(), method="finite_difference", scheme=scheme)
    cost = op.cost(10, dry_run=True)
    assert (cost.gradients, cost.graph_bytes) == (gradients, 0)
    counted = flops(lambda: op @ torch.randn(op.shape[0], 10)) / flops(op.problem.gradient)
    assert counted == pytest.approx(gradients)


@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_a_closure_is_counted_and_never_called(scheme):
    model, loss_fn, (x, y) = mlp()

    def closure():
        model.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    op = ClosureHessian(closure, model.parameters(), scheme=scheme)
    cost = op.cost(10)
    assert op.closure_calls == 0
    op @ torch.randn(op.shape[0], 10)
    assert op.closure_calls == cost.gradients
    assert math.isnan(cost.seconds)


def test_bytes_add_up():
    cost = Cost(1, 1.0, 2.0, 0.5, 1000, 200, 40, "timed")
    assert cost.peak_bytes == 1200
    assert cost.seconds == 1.5


def wide(name):
    """Nets whose activations or whose weights outweigh everything else."""
    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(nn.Linear(200, 100), nn.Tanh(), nn.Linear(100, 10)), (400, 200)
    if name == "conv":
        first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Tanh(), nn.AvgPool2d(2))
        return nn.Sequential(*first, nn.Flatten(), nn.Linear(16 * 64, 10)), (100, 3, 16, 16)
    return nn.Sequential(nn.Linear(300, 300), nn.LayerNorm(300), nn.GELU(), nn.Linear(300, 10)), (20, 300)


@pytest.mark.parametrize("name", ["mlp", "conv", "weights"])
@pytest.mark.parametrize("kind", ["hessian", "ggn", "differences"])
def test_stated_bytes_are_those_that_the_allocator_sees(name, kind):
    model, shape = wide(name)
    data = (torch.randn(shape), torch.randint(10, shape[:1]))
    make = GGN if kind == "ggn" else Hessian
    options = {"method": "finite_difference"} if kind == "differences" else {}
    op = make(model, nn.CrossEntropyLoss(), data, check=False, **options)
    v = torch.randn(op.shape[0])
    op @ v  # what is made once stays
    stated = op.cost(dry_run=True)
    assert stated.source == "counted"
    peak, left = peak_bytes(lambda: op @ v, torch.device("cpu"))  # by torch's profiler, the result included
    # Scalars, indices and small copies are what the shapes do not tell. Watched, autograd adds up what reaches a parameter
    # by two ways in a third place, which it saves itself otherwise: up to the bytes of the largest parameter.
    largest = max(p.nbytes for p in op.layout.params)
    assert 0.9 * stated.peak_bytes - largest < peak < 1.05 * stated.peak_bytes
    assert left <= stated.vector_bytes


def in_batches(data):
    return list(zip(data[0].split(100), data[1].split(100), strict=True))


@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize(
    "case", ["a part of the parameters", "several batches", "beyond the budget", "bfloat16", "rows"]
)
def test_stated_bytes_hold_for(case, kind):
    model, shape = wide("mlp")
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    model, data = model.to(dtype), (torch.randn(shape, dtype=dtype), torch.randint(10, shape[:1]))
    options = {"params": list(model[2].parameters())} if case == "a part of the parameters" else {}
    if case == "beyond the budget":
        options["graph_budget"] = 1
    given = in_batches(data) if case in ("several batches", "beyond the budget") else data
    op = kind(model, nn.CrossEntropyLoss(), given, check=False, **options)
    rows = torch.randn(5 if case == "rows" else 1, op.shape[0])
    op.multiply_rows(rows)
    stated = op.cost(dry_run=True)
    peak, _ = peak_bytes(lambda: op.multiply_rows(rows), torch.device("cpu"))
    peak -= (len(rows) - 1) * stated.vector_bytes  # further results
    # kernels of half precision take copies of their own on a CPU; the worst moments of building and of products differ
    low, high = (0.85 if case == "beyond the budget" else 0.9), (1.2 if case == "bfloat16" else 1.05)
    assert low * stated.peak_bytes < peak < high * stated.peak_bytes


def test_bytes_follow_the_budget_and_times_stay():
    model, shape = wide("mlp")
    op = Hessian(
        model, nn.CrossEntropyLoss(), in_batches((torch.randn(shape), torch.randint(10, shape[:1]))), check=False
    )
    whole = op.cost()
    op.graph_budget = 1
    less = op.cost()
    assert less.graph_bytes * 4 == whole.graph_bytes
    assert less.gradient_seconds == whole.gradient_seconds


def test_a_net_without_matrix_products_has_bytes_and_the_rule_of_thumb():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x):
            return (x * self.weight).tanh()

    cost = Hessian(Scale(), nn.MSELoss(), (torch.randn(50, 1000), torch.randn(50, 1000)), check=False).cost(
        dry_run=True
    )
    assert (cost.source, cost.gradients) == ("rule", 3.0)
    assert cost.graph_bytes >= 50 * 1000 * 4


def test_a_negative_number_of_products_is_refused():
    with pytest.raises(ValueError, match="products must be at least 0, got -1"):
        Hessian(*mlp(), check=False).cost(-1)
