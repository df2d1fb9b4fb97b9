"""Parameters frozen after an operator was built: their rows and columns are zero, whatever the route."""

import pytest
import torch
from torch import nn

from curvopt._errors import CurvatureError
from curvopt.curvature import GGN, FunctionalHessian, GradientSecondMoment, Hessian
from curvopt.curvature.closure import ClosureHessian
from tests.problems import BY_NAME
from tests.reference import dense_hessian, relative


def closure_hessian(model, loss_fn, data):
    def closure():
        model.zero_grad()
        loss = loss_fn(model(data[0]), data[1])
        loss.backward()
        return loss

    return ClosureHessian(closure, model.parameters())


OPERATORS = {
    "Hessian": Hessian,
    "Hessian by differences": lambda *a: Hessian(*a, method="finite_difference"),
    "Hessian, batched": lambda *a: Hessian(*a, route="batched"),
    "GGN": GGN,
    "GGN by differences": lambda *a: GGN(*a, method="finite_difference"),
    "functional": FunctionalHessian,
    "functional by differences": lambda *a: FunctionalHessian(*a, method="finite_difference"),
    "second moment": GradientSecondMoment,
    "closure": closure_hessian,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_frozen_later(name):
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    op = OPERATORS[name](model, loss_fn, data)
    whole = op.to_dense()
    assert whole.norm() > 1e-3
    model[0].weight.requires_grad_(False)
    expected = whole.clone()
    frozen = slice(0, model[0].weight.numel())  # the first parameter of the model
    expected[frozen] = 0
    expected[:, frozen] = 0
    # The remaining products are the same ones; differences choose their step by the norm of the whole vector.
    tol = 1e-6 if "differences" in name or name == "closure" else 1e-12
    assert relative(op.to_dense(), expected) < tol
    model[0].weight.requires_grad_(True)
    assert relative(op.to_dense(), whole) < tol


def test_the_frozen_block_agrees_with_an_operator_built_over_the_rest():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    op = Hessian(model, loss_fn, data)
    model[0].weight.requires_grad_(False)
    rest = slice(model[0].weight.numel(), None)
    assert relative(op.to_dense()[rest, rest], dense_hessian(model, loss_fn, data)) < 1e-9


def test_a_frozen_layer_has_no_curvature_and_a_frozen_model_is_an_error():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    op = Hessian(model, loss_fn, data)
    layer = op.layers()["0"]
    model[0].requires_grad_(False)
    assert not layer.to_dense().any()
    model.requires_grad_(False)
    with pytest.raises(CurvatureError, match="were the parameters frozen"):
        op @ torch.ones(op.shape[0], dtype=op.dtype)


@pytest.mark.parametrize("module", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_does_not_write_to_the_weights(module):
    """The forward pass of an embedding with ``max_norm`` shrinks the rows in use, in place; a product must not."""
    torch.manual_seed(0)
    options = {"mode": "sum"} if module is nn.EmbeddingBag else {}
    tokens, labels = torch.randint(0, 10, (12, 3)), torch.randint(0, 4, (12,))
    table = module(10, 4, max_norm=0.5, **options).double()
    head = nn.Linear(4 if options else 12, 4).double()
    model = nn.Sequential(table, nn.Flatten(), head)
    before = table.weight.detach().clone(), table.weight._version
    for method in ("finite_difference",) if options else ("double_backward", "finite_difference"):
        op = Hessian(model, nn.CrossEntropyLoss(), (tokens, labels), method=method)
        dense = op.to_dense()
        assert dense.norm() > 1e-3
        assert torch.equal(table.weight, before[0])
        assert table.weight._version == before[1]
        assert table.max_norm == 0.5
