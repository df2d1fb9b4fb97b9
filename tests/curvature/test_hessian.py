"""Hessian products against explicitly built matrices, in every form, route and way of giving the data."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.perf.operations import launches
from curvopt.curvature import Hessian, Problem
from curvopt.curvature.quiet import mixed_seed
from tests.curvature.conftest import explicit
from tests.problems import BY_NAME, mlp
from tests.reference import dense_hessian, relative

# A product sums P terms of size eps through a graph a few dozen operations deep: measured 3e-16 and 2e-7.
FLOAT64, FLOAT32 = 1e-13, 5e-6


def build(case, dtype=torch.float64, **settings):
    model, loss_fn, data, forward = case.make(dtype)
    return Hessian(model, loss_fn, data, forward=forward, **settings)


def test_float64_against_explicit_matrix(case, exact):
    dense = build(case).to_dense()
    assert relative(dense, exact) < FLOAT64
    assert relative(dense.T, dense) < FLOAT64


def test_float32_against_explicit_matrix(case, exact):
    assert relative(build(case, torch.float32).to_dense(), exact) < FLOAT32


def test_vector_block_and_list_forms_agree_and_are_linear(case, exact):
    op = build(case, check=False, route="loop")
    u, v = torch.randn(2, op.shape[0], dtype=torch.float64)
    product = op @ v
    assert relative(product, exact @ v) < FLOAT64
    block = op @ torch.stack([u, v], dim=1)
    assert relative(block[:, 1], product) < FLOAT64
    parts = op @ op.layout.views(v)
    assert [p.shape for p in parts] == list(op.layout.shapes)
    assert relative(op.layout.flatten(parts), product) < FLOAT64
    assert relative(op @ (2 * u - 3 * v), 2 * block[:, 0] - 3 * block[:, 1]) < FLOAT64
    assert op.matvecs == 1 + 2 + 1 + 1


@pytest.mark.parametrize("route", ["loop", "batched"])
def test_routes_agree(case, exact, route):
    assert relative(build(case, check=False, route=route).to_dense(), exact) < FLOAT64


def test_route_is_measured_once_on_a_wide_block_and_can_be_pinned():
    op = build(BY_NAME["mlp"])
    op @ torch.randn(op.shape[0], 2, dtype=torch.float64)
    assert op.route is None
    op.to_dense()
    assert op.route in ("loop", "batched")
    op.route = "loop"
    op.to_dense()
    assert op.route == "loop"
    with pytest.raises(ValueError, match="route must be 'loop', 'batched' or None"):
        build(BY_NAME["mlp"], route="fast")


class ReadsANumber(torch.autograd.Function):
    """The identity, whose derivative looks at a number: under vmap there is none."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope if slope.sum().item() == slope.sum().item() else torch.zeros_like(slope)


class Reading(nn.Module):
    def forward(self, x):
        return ReadsANumber.apply(x)


def test_what_cannot_be_vectorised_falls_back_to_the_loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Reading(), nn.Tanh(), nn.Linear(4, 2)).double()
    data = (torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,)))
    op = Hessian(model, nn.CrossEntropyLoss(), data)
    found = op.to_dense()
    assert op.route == "loop"
    plain = Hessian(nn.Sequential(model[0], *model[2:]), nn.CrossEntropyLoss(), data, route="loop")
    assert relative(found, plain.to_dense()) < FLOAT64
    with pytest.raises(RuntimeError, match="vmap"):
        Hessian(model, nn.CrossEntropyLoss(), data, route="batched").to_dense()


def test_a_vectorised_pass_calls_no_kernel_once_a_column():
    """torch's older vectorisation has no rule for tanh and log-softmax and loops over the columns."""
    op = build(BY_NAME["mlp"], route="batched")

    def block(columns):
        return launches(lambda: op.multiply_rows(torch.ones(columns, op.shape[0], dtype=torch.float64)))

    with op.hold():
        block(2)
        assert block(12) == block(2)


def test_no_batched_pass_beyond_the_memory_budget():
    op = build(BY_NAME["mlp"], graph_budget=1)
    assert relative(op.to_dense(), explicit("mlp")) < FLOAT64
    assert op.route == "loop"
    op = build(BY_NAME["mlp"], route="batched", graph_budget=1)
    assert relative(op.to_dense(), explicit("mlp")) < FLOAT64  # one column at a time


def test_a_pinned_vectorised_pass_keeps_to_the_budget_from_the_first_block():
    op = build(BY_NAME["mlp"])
    with op.hold():
        op @ torch.ones(op.shape[0], dtype=torch.float64)
        size = op.graph_bytes
    v = torch.ones(12, op.shape[0], dtype=torch.float64)
    pinned = build(BY_NAME["mlp"], route="batched", graph_budget=3 * size)
    first = launches(lambda: pinned.multiply_rows(v))  # four passes of three columns each, and the graph
    assert launches(lambda: pinned.multiply_rows(v)) == first
    whole = build(BY_NAME["mlp"], route="batched", graph_budget=12 * size)
    assert launches(lambda: whole.multiply_rows(v)) < first


class SlopeOfCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x, slope)
        return 3 * x * x * slope

    @staticmethod
    def backward(ctx, g):
        x, slope = ctx.saved_tensors
        return 6 * x * slope * g, 3 * x * x * g


class Cube(torch.autograd.Function):
    """Of the older style, its derivative another Function: torch.func refuses it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return SlopeOfCube.apply(ctx.saved_tensors[0], g)


class Cubes(nn.Module):
    def forward(self, x):
        return Cube.apply(x)


def test_functions_of_the_older_style_are_vectorised_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Cubes(), nn.Linear(4, 2)).double()
    data = (torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,)))
    found = Hessian(model, nn.CrossEntropyLoss(), data, route="batched").to_dense()
    assert relative(found, Hessian(model, nn.CrossEntropyLoss(), data, route="loop").to_dense()) < FLOAT64


def test_graphs_beyond_the_budget_are_built_once_a_block():
    model, loss_fn, (x, y), _ = BY_NAME["mlp"].make(torch.float64)
    pieces = list(zip(x.split(4), y.split(4), strict=True))
    assert len(pieces) > 1
    op = Hessian(model, loss_fn, pieces, graph_budget=1, route="loop", check=False)
    with op.hold():
        op.multiply_rows(torch.ones(5, op.shape[0], dtype=torch.float64))
        assert op._graphs.built == len(pieces)
    assert relative(op.to_dense(), explicit("mlp")) < FLOAT64


LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights": nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)),
    "smoothing-weights": nn.CrossEntropyLoss(
        weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), label_smoothing=0.3
    ),
    "plain": lambda outputs, targets: nn.functional.cross_entropy(outputs, targets),
}


def labelled(n=11):
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(0, 3, (n,))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", ["list", "loader", "callable"])
def test_streamed_data_equal_the_concatenated_batch(loss, form):
    model = mlp().double()
    x, y = labelled()
    whole = Hessian(model, LOSSES[loss], (x, y))
    parts = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 11, 4)]
    data = {
        "list": parts,
        "loader": DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True),
        "callable": lambda: (x, y),
    }[form]
    op = Hessian(model, LOSSES[loss], data)
    assert len(op.problem.batches) == (1 if form == "callable" else 3)
    assert relative(op.to_dense(), whole.to_dense()) < FLOAT64
    assert relative(op.gradient(), whole.gradient()) < FLOAT64
    assert abs(op.loss() - whole.loss()) < 1e-13


def test_weight_argument_for_losses_of_ones_own():
    model = mlp().double()
    x, y = labelled()
    y[:5] = -100

    def loss_fn(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, ignore_index=-100)

    parts = [(x[:6], y[:6]), (x[6:], y[6:])]
    whole = Hessian(model, loss_fn, (x, y)).to_dense()
    weighed = Hessian(model, loss_fn, parts, weight=lambda batch: (batch[1] != -100).sum())
    assert relative(weighed.to_dense(), whole) < FLOAT64
    assert relative(Hessian(model, loss_fn, parts).to_dense(), whole) > 1e-2  # by length: another matrix


def test_graph_budget_rebuilds_what_does_not_fit():
    model = mlp().double()
    x, y = labelled(12)
    parts = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 12, 4)]
    op = Hessian(model, nn.CrossEntropyLoss(), parts, graph_budget=0, route="loop", check=False)
    with op.hold():
        first = op.to_dense()
        assert len(op._graphs) == 1
        built = op._graphs.built
        op @ torch.ones(op.shape[0], dtype=torch.float64)
        assert op._graphs.built == built + 2
    op.graph_budget = 2**20
    built = op._graphs.built
    with op.hold():
        assert relative(op.to_dense(), first) < FLOAT64
        assert len(op._graphs) == 3
        assert 0 < op._graphs.nbytes <= 2**20
    assert op._graphs.built == built + 3


def test_kept_graph_is_rebuilt_when_weights_or_data_change():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    op = Hessian(model, loss_fn, data, check=False)
    v = torch.ones(op.shape[0], dtype=torch.float64)
    with op.hold():
        before = op @ v
        op @ v
        assert op._graphs.built == 1
        with torch.no_grad():
            model[0].weight.add_(0.1)
        moved = op @ v
        assert op._graphs.built == 2
        assert relative(moved, dense_hessian(model, loss_fn, data) @ v) < FLOAT64
        assert relative(moved, before) > 1e-3
        other = (data[0] + 1, data[1])
        op.set_batch(other)
        assert relative(op @ v, dense_hessian(model, loss_fn, other) @ v) < FLOAT64


def test_nothing_is_left_after_hold():
    model, loss_fn, data, _ = BY_NAME["layernorm-attention"].make()
    op = Hessian(model, loss_fn, data)
    v = torch.ones(op.shape[0], dtype=torch.float64)

    def bytes_alive():
        gc.collect()
        seen = {}
        for o in gc.get_objects():
            if issubclass(type(o), torch.Tensor):
                seen[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
        return sum(seen.values())

    out = op @ v
    before = bytes_alive()
    gc.disable()  # reference counts alone must free the graph
    try:
        with op.hold():
            out = op @ v
            (graph,) = op._graphs.each()
            parts = [weakref.ref(part) for _, part in graph.kept]
            graph_reference = weakref.ref(graph)
            del graph
            assert graph_reference() is not None
        assert graph_reference() is None
        assert all(part() is None for part in parts)
    finally:
        gc.enable()
    assert bytes_alive() == before
    assert out.grad_fn is None
    assert not out.requires_grad


def test_graph_bytes_are_measured():
    x = torch.randn(64, 50, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    op = Hessian(model, nn.CrossEntropyLoss(), (x, torch.randint(0, 3, (64,))), check=False)
    op @ torch.ones(op.shape[0], dtype=torch.float64)
    # at least tanh's output and its gradient; at most ten activations and ten gradients
    activation, parameters = 64 * 40 * 8, op.shape[0] * 8
    assert 2 * activation < op.graph_bytes < 10 * (activation + parameters)


def test_layers_are_the_diagonal_blocks(case, exact):
    op = build(case, check=False)
    layers = op.layers()
    covered = []
    for name, layer in layers.items():
        index = [i for i, n in enumerate(op.layout.names) if n.rpartition(".")[0] == name]
        coordinates = torch.cat(
            [torch.arange(op.layout.offsets[i], op.layout.offsets[i] + op.layout.sizes[i]) for i in index]
        )
        covered.append(coordinates)
        block = exact[coordinates][:, coordinates]
        assert (layer.to_dense() - block).norm() < FLOAT64 * exact.norm()
    assert torch.equal(torch.cat(covered).sort().values, torch.arange(op.shape[0]))


def test_a_private_view_has_data_and_counter_of_its_own():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    op = Hessian(model, loss_fn, data, route="loop")
    private = op.private()
    first = op.to_dense()
    assert torch.equal(private.to_dense(), first)
    private.set_batch((data[0] + 1, data[1]))
    private.renew(4)
    assert relative(private.to_dense(), first) > 1e-3
    assert torch.equal(op.to_dense(), first)
    assert (op.matvecs, private.matvecs, op.problem.generation) == (70, 70, 0)
    assert private.route == "loop"


def test_a_copy_of_model_and_operator_stays_tied():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    op = Hessian(model, loss_fn, data)
    first = op.to_dense()
    twin, copied = copy.deepcopy((model, op))
    assert all(p is q for p, q in zip(twin.parameters(), copied.layout.params, strict=True))
    with torch.no_grad():
        twin[0].weight.add_(0.1)
    assert relative(copied.to_dense(), first) > 1e-3
    assert relative(op.to_dense(), first) < FLOAT64


def test_layers_share_the_data():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    op = Hessian(model, loss_fn, data)
    layer = op.layers()["2"]
    first = layer.to_dense()
    op.set_batch((data[0] + 1, data[1]))
    assert relative(layer.to_dense(), first) > 1e-3


def test_given_parameters_keep_their_order_and_frozen_ones_are_left_out():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    chosen = [model[2].bias, model[0].weight]
    op = Hessian(model, loss_fn, data, chosen)
    assert op.layout.names == ("2.bias", "0.weight")
    assert relative(op.to_dense(), dense_hessian(model, loss_fn, data, params=chosen)) < FLOAT64
    model[0].weight.requires_grad_(False)
    assert Hessian(model, loss_fn, data, chosen).layout.names == ("2.bias",)


def test_dtype_and_device_follow_the_parameters():
    model, loss_fn, data, _ = BY_NAME["mlp"].make(torch.float32)
    op = Hessian(model, loss_fn, data)
    assert op.dtype == torch.float32
    model.double()
    op.set_batch((data[0].double(), data[1]))
    assert op.dtype == torch.float64
    assert op.device == model[0].weight.device
    assert relative(op.to_dense(), dense_hessian(model, loss_fn, (data[0].double(), data[1]))) < FLOAT64


def test_masks_are_the_same_until_renewed():
    model, loss_fn, data, _ = BY_NAME["dropout"].make()
    op = Hessian(model, loss_fn, data)
    first = op.to_dense()
    assert torch.equal(op.to_dense(), first)  # another hold, another graph, the same masks
    op.renew(0)
    assert torch.equal(op.to_dense(), first)
    op.renew(1)
    second = op.to_dense()
    assert relative(second, first) > 1e-2
    assert relative(second, dense_hessian(model, loss_fn, data, mask_seed=mixed_seed(0, 1, 0))) < FLOAT64
    op.renew(0)
    assert torch.equal(op.to_dense(), first)
    op.reseed(5)
    assert relative(op.to_dense(), first) > 1e-2


@pytest.mark.parametrize("name", ["mlp", "layernorm-attention", "gru", "tied", "dropout"])
def test_finite_difference_method(name):
    # central differences in float64: step 4e-7 of the weights' norm, so rounding gives about 1e-9
    op = build(BY_NAME[name], method="finite_difference")
    v = torch.randn(op.shape[0], dtype=torch.float64)
    product = op @ v
    error = relative(product, explicit(name) @ v)
    assert error < 1e-6
    # float32: eps^(1/3)/16 of the norm leaves 1e-5 .. 1e-3 (module docstring of differences.py)
    single = build(BY_NAME[name], torch.float32, method="finite_difference")
    assert relative(single @ v.float(), explicit(name) @ v) < 5e-3
    assert single.error_estimate(v.float()) < 5e-2


class Waves(nn.Module):
    """Bends on a scale of 1/300, far below the weights' norm."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(-1, 1, 100))

    def forward(self, x):
        return torch.cos(300 * self.theta) * x


def test_error_estimate_sees_truncation():
    model = Waves()
    data = (torch.ones(100), torch.zeros(100))

    def loss_fn(outputs, targets):
        return (outputs - targets).sum()

    op = Hessian(model, loss_fn, data, method="finite_difference")
    v = torch.randn(100)
    wanted = Hessian(model, loss_fn, data, method="double_backward") @ v
    error = relative(op @ v, wanted)
    # the fourth derivative is 300^2 times the second and the step 3e-4 ||theta||: some 1e-3, which h and 2h show
    assert 1e-4 < error < 1e-1
    assert 0.5 * error < op.error_estimate(v) < 2 * error
    with pytest.raises(ValueError, match="method='finite_difference'"):
        Hessian(model, loss_fn, data).error_estimate(v)


def test_finite_difference_products_of_the_zero_vector_are_zero():
    op = build(BY_NAME["mlp"], torch.float32, method="finite_difference")
    assert torch.equal(op @ torch.zeros(op.shape[0]), torch.zeros(op.shape[0]))


def test_operators_from_one_problem_share_it():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    problem = Problem(model, loss_fn, data)
    left, right = Hessian.from_problem(problem), Hessian.from_problem(problem)
    left.set_batch((data[0] + 1, data[1]))
    assert torch.equal(left.to_dense(), right.to_dense())


@pytest.mark.parametrize(
    ("name", "rank"), [("mlp", 2), ("tied", 4), ("mse", 2), ("soft-labels", 2), ("bce", None), ("tuple-outputs", None)]
)
def test_suggested_rank(name, rank):
    found = build(BY_NAME[name], check=False).suggested_rank()
    if rank is None:
        assert found is None
    else:
        assert found[0] == rank
        assert f"= {rank}" in found[1]


def test_suggested_rank_of_images_under_a_squared_loss():
    model = nn.Conv2d(2, 3, 3)
    op = Hessian(model, nn.MSELoss(), (torch.randn(2, 2, 7, 8), torch.randn(2, 3, 5, 6)), check=False)
    assert op.suggested_rank()[0] == 3


def test_bad_settings():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    with pytest.raises(
        ValueError, match="method must be one of 'auto', 'double_backward', 'finite_difference', got 'x'"
    ):
        Hessian(model, loss_fn, data, method="x")
    with pytest.raises(ValueError, match="mode must be 'train', 'eval' or None"):
        Hessian(model, loss_fn, data, mode="test")
    with pytest.raises(TypeError, match="operand has dtype torch.float32, the operator torch.float64"):
        Hessian(model, loss_fn, data) @ torch.ones(35)


def test_a_parameter_outside_the_loss_has_zero_rows():
    model = nn.ModuleDict({"used": mlp(), "idle": nn.Linear(2, 2)}).double()
    x, y = labelled()
    op = Hessian(model, nn.CrossEntropyLoss(), (x, y), forward=lambda m, batch: m["used"](batch[0]))
    dense = op.to_dense()
    assert (dense[-6:] == 0).all()
    assert relative(dense[:-6, :-6], dense_hessian(model["used"], nn.CrossEntropyLoss(), (x, y))) < FLOAT64


def test_checkpointed_layers_run_again_in_a_product_without_a_trace():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 5)
            self.norm = nn.BatchNorm1d(5)
            self.b = nn.Linear(5, 3)

        def forward(self, x):
            return self.b(checkpoint(lambda z: torch.tanh(self.norm(z)), self.a(x), use_reentrant=False))

    model = Checkpointed().double()
    x, y = labelled()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    op = Hessian(model, nn.CrossEntropyLoss(), (x, y))
    dense = op.to_dense()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    class Plain(Checkpointed):
        def forward(self, x):
            return self.b(torch.tanh(self.norm(self.a(x))))

    twin = Plain().double()
    twin.load_state_dict(before)
    assert relative(dense, dense_hessian(twin, nn.CrossEntropyLoss(), (x, y))) < FLOAT64
