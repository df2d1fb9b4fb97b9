"""Stated bytes where something other than layers and activations takes most of them."""

import pytest
import torch
from torch import nn

from benchmarks.perf.memory import peak_bytes
from curvopt.curvature import GGN, FunctionalHessian, GradientSecondMoment, Hessian


def shares(op):
    """Peak of one product by torch's allocator over the stated bytes, and the cost."""
    v = torch.randn(op.shape[0])
    op @ v  # what is made once stays
    stated = op.cost(dry_run=True)
    peak, _ = peak_bytes(lambda: op @ v, torch.device("cpu"))
    return peak / stated.peak_bytes, stated


def wide_outputs():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5000)), (
        torch.randn(256, 16),
        torch.randint(5000, (256,)),
    )


def plainly(outputs, targets):
    """A loss without a closed form of its second derivative."""
    return nn.functional.cross_entropy(outputs, targets) * 1.0


class Plainly(nn.Module):
    def forward(self, outputs, targets):
        return plainly(outputs, targets)


@pytest.mark.parametrize(
    ("kind", "loss", "options", "least"),
    [
        (GGN, nn.CrossEntropyLoss(), {}, 0.9),
        (GGN, plainly, {"reduction": "mean"}, 0.9),
        (GGN, Plainly(), {"reduction": "mean"}, 0.9),
        # Watched, autograd adds up the two terms of J v in a third place: one tensor of outputs too many.
        (GradientSecondMoment, nn.CrossEntropyLoss(), {}, 0.8),
    ],
)
def test_what_the_loss_keeps_of_wide_outputs_counts(kind, loss, options, least):
    model, data = wide_outputs()
    share, stated = shares(kind(model, loss, data, check=False, **options))
    assert least < share < 1.02  # the loss's part was a quarter to a half
    assert stated.source == "counted"


def test_a_loss_that_reads_numbers_gets_the_rule():
    def reads(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets) * float(1 + 0 * outputs.sum().item())

    model, data = wide_outputs()
    stated = GGN(model, reads, data, check=False, reduction="mean").cost(dry_run=True)
    assert (stated.source, stated.graph_bytes) == ("rule", 0)
    options = {"method": "finite_difference", "check": False, "reduction": "mean"}
    stated = Hessian(model, reads, data, **options).cost(dry_run=True)
    assert (stated.source, stated.gradients) == ("rule", 2.0)
    assert stated.peak_bytes == 6 * stated.vector_bytes


class WithTable(nn.Module):
    """A small layer beside a buffer of 4 MB."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 10)
        self.register_buffer("table", torch.randn(1000, 1000))

    def forward(self, x):
        return self.layer(x).tanh() + self.table[0, 0]


@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("pieces", [1, 6])
def test_each_kept_graph_keeps_the_buffers_that_it_saw(kind, pieces):
    torch.manual_seed(0)
    data = [(torch.randn(50, 20), torch.randint(10, (50,))) for _ in range(pieces)]
    op = kind(WithTable(), nn.CrossEntropyLoss(), data, check=False)
    share, stated = shares(op)
    assert 0.9 < share < 1.02
    assert stated.graph_bytes > pieces * 4_000_000
    if kind is Hessian:  # and so the budget sees them
        op.graph_budget = 10_000_000
        with op.hold():
            op @ torch.ones(op.shape[0])
            assert len(op._graphs) == min(pieces, 2)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_buffers_are_counted_by_what_holds_them(layout):
    class OnAGraph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)
            self.register_buffer("adjacency", getattr(torch.eye(9), layout)())

        def forward(self, x):
            return torch.tanh(self.layer(torch.sparse.mm(self.adjacency, x)))

    torch.manual_seed(0)
    model, data = OnAGraph(), (torch.randn(9, 6), torch.randint(4, (9,)))
    op = Hessian(model, nn.CrossEntropyLoss(), data, check=False)
    plain = Hessian(nn.Sequential(model.layer, nn.Tanh()), nn.CrossEntropyLoss(), data, check=False)
    with op.hold(), plain.hold():
        v = torch.randn(op.shape[0])
        assert torch.allclose(op @ v, plain @ v, atol=1e-6)
        assert op.graph_bytes > plain.graph_bytes


def test_the_result_is_there_while_the_graph_is_built():
    class Detour(nn.Module):
        """Takes 24 MB for a moment, and leaves no graph of it; the layer has 4 MB."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1000, 1000)

        def forward(self, x):
            with torch.no_grad():
                k = (x[:, :1].expand(-1, 3_000_000) + 1.0).mean(1, keepdim=True)
            return torch.tanh(self.layer(x)) + k

    share, _ = shares(Hessian(Detour(), nn.MSELoss(), (torch.randn(2, 1000), torch.randn(2, 1000)), check=False))
    assert 0.9 < share < 1.02


def test_parameters_that_enter_linearly_are_not_kept_once_a_batch():
    class Linearly(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope, self.weight = nn.Parameter(torch.randn(200_000)), nn.Parameter(torch.randn(10))

        def forward(self, x):
            return (self.weight**2 * x).sum(1) + self.slope.mean() * x[:, 0]

    def mean(outputs, targets):
        return outputs.mean()

    data = [(torch.randn(5, 10), torch.randn(5)) for _ in range(8)]
    share, stated = shares(Hessian(Linearly(), mean, data, check=False, reduction="mean"))
    assert share < 1.02
    assert stated.peak_bytes < 4 * stated.vector_bytes


def test_differences_are_counted_where_there_is_no_second_derivative():
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 20)
            self.wide, self.last = nn.Linear(20, 200), nn.Linear(200, 10)

        def forward(self, x):
            bags = nn.functional.embedding_bag(x, self.table.weight.tanh(), mode="sum")
            return self.last(torch.tanh(self.wide(bags)))

    torch.manual_seed(0)
    data = (torch.randint(50, (2000, 4)), torch.randint(10, (2000,)))
    share, stated = shares(Hessian(Bags(), nn.CrossEntropyLoss(), data, method="finite_difference", check=False))
    assert 0.9 < share < 1.02
    assert (stated.source, stated.gradients) == ("counted", 2.0)


def test_the_functional_hessian_follows_its_budget_and_its_method():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    data = [(torch.randn(50, 20), torch.randint(5, (50,))) for _ in range(4)]
    kept = FunctionalHessian(model, nn.CrossEntropyLoss(), data, check=False).cost(dry_run=True)
    rebuilt = FunctionalHessian(model, nn.CrossEntropyLoss(), data, check=False, graph_budget=1).cost(dry_run=True)
    assert rebuilt.graph_bytes * 4 == kept.graph_bytes
    op = FunctionalHessian(model, nn.CrossEntropyLoss(), data, method="finite_difference", check=False)
    stated = op.cost(10, dry_run=True)
    assert (stated.gradients, stated.graph_bytes) == (21.0, 0)
