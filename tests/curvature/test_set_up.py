"""What a set-up does beyond the graph itself: zeros are not multiplied, bytes are read off the graph."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import curvopt.curvature.jacobian as jacobian
from curvopt.curvature.ggn import GGN
from curvopt.curvature.graphs import GradientGraph, measured_bytes, saved_bytes
from curvopt.curvature.hessian import Hessian
from curvopt.curvature.zeros import zeros_not_multiplied

CPU = torch.device("cpu")


class Attention(nn.Module):
    """A transformer layer over (N, T, D), pooled."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Checkpointed(nn.Module):
    """Its first part is run again in each backward pass."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh())
        self.last = nn.Linear(20, 4)

    def forward(self, x):
        return self.last(checkpoint(self.first, x, use_reentrant=False))


def conv():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 4)), (10,)),
    "conv": (conv, (2, 8, 8)),
    "attention": (Attention, (5, 8)),
    "checkpointed": (Checkpointed, (10,)),
}


def problem(name, dtype=torch.float64):
    torch.manual_seed(0)
    build, shape = NETS[name]
    x, y = torch.randn(6, *shape, dtype=dtype), torch.randint(4, (6,))
    return build().to(dtype), nn.CrossEntropyLoss(), (x, y)


@pytest.mark.parametrize("name", NETS)
def test_zeros_that_are_not_multiplied_change_no_bit(name, monkeypatch):
    model, loss_fn, batch = problem(name)
    rows = torch.randn(3, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    fast = GGN(model, loss_fn, batch, method="double_backward").multiply_rows(rows)
    monkeypatch.setattr(jacobian, "zeros_not_multiplied", lambda device: zeros_not_multiplied(torch.device("meta")))
    plain = GGN(model, loss_fn, batch, method="double_backward").multiply_rows(rows)
    assert torch.equal(fast, plain)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_a_set_up_multiplies_no_more_than_a_forward_pass(name):
    model, loss_fn, batch = problem(name)
    op = GGN(model, loss_fn, batch, check=False)

    def flops(work):
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    def set_up():
        with op.hold():
            list(op._cache.each())

    assert flops(set_up) == flops(lambda: model(batch[0])) > 0
    found = op.cost(0, dry_run=True)
    once = flops(lambda: torch.autograd.grad(loss_fn(model(batch[0]), batch[1]), list(model.parameters())))
    assert found.gradients == pytest.approx(flops(set_up) / once)


def test_products_with_numbers_in_them_are_done():
    a, b = torch.zeros(3, 4), torch.zeros(4, 2)
    a[2, 3], b[3, 1] = 2.0, 3.0  # the first entries are zero, the last are not
    images, kernel = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 3, 3, requires_grad=True)
    images[0, 0, 3, 3] = 1.0
    with zeros_not_multiplied(CPU):
        assert (a @ b)[2, 1] == 6.0 and not (a @ torch.zeros(4, 2)).any()
        assert torch.bmm(a[None], b[None])[0, 2, 1] == 6.0 and torch.bmm(a[None], b[None] * 0).shape == (1, 3, 2)
        assert (b.T @ a.T)[1, 2] == 6.0
        (slope,) = torch.autograd.grad(nn.functional.conv2d(images, kernel).sum(), kernel)
        assert slope[0, 0, 2, 2] == 1.0
        assert torch.isnan(torch.full((2, 2), torch.nan) @ torch.ones(2, 2)).all()


@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_bytes_are_read_off_the_graph(name):
    model, loss_fn, batch = problem(name, torch.float32)
    op = Hessian(model, loss_fn, batch, check=False)
    graph, recorded = measured_bytes(lambda: GradientGraph(op.problem, op.problem.batches[0]), CPU)
    # the recorder also sees constants and copies that no product needs, up to a few vectors of P numbers
    assert 0.5 * recorded <= graph.nbytes <= recorded + 4 * op.shape[0]
    with op.hold():
        op @ torch.ones(op.shape[0])
    assert op.graph_bytes == graph.nbytes


def test_packed_tensors_are_not_unpacked_for_it():
    model, loss_fn, batch = problem("checkpointed", torch.float32)
    runs = []
    model.first.register_forward_hook(lambda *_: runs.append(1))
    slopes = torch.autograd.grad(loss_fn(model(batch[0]), batch[1]), list(model.parameters()), create_graph=True)
    before = len(runs)
    assert saved_bytes(slopes) is None and len(runs) == before
    op = Hessian(model, loss_fn, batch, check=False)
    with op.hold():
        op @ torch.ones(op.shape[0])
    assert op.graph_bytes > 0  # recorded instead
