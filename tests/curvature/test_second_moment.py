"""The second moment against gradients that a loop takes one example at a time."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvopt._errors import CurvatureError
from curvopt.curvature.second_moment import GradientSecondMoment
from tests.problems import BY_NAME
from tests.reference import relative

D = torch.float64


def rows_of(model, term, x, y):
    """(N, P): the gradient of ``term(output, y, i)``, the example's part of the loss times N, by a loop."""
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(y)):
        parts = torch.autograd.grad(term(model(x[i : i + 1]), y[i : i + 1], i), params, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(parts, params)]))
    return torch.stack(rows)


def moment(rows):
    return rows.T @ rows / len(rows)


def loss_gradient(model, loss_fn, x, y):
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_fn(model(x), y), params)])


W3 = torch.tensor([0.3, 1.0, 2.5], dtype=D)


def plain(out, y, i):
    return F.cross_entropy(out, y)


# name of the problem -> the example's g_i as the gradient of this
TERMS = {
    "mlp": plain,
    "mlp-sum": plain,
    "mlp-functional": plain,
    "label-smoothing": lambda o, y, i: F.cross_entropy(o, y, label_smoothing=0.2),
    "soft-labels": lambda o, y, i: F.cross_entropy(o, y),
    "partial": lambda o, y, i: F.cross_entropy(o, y, label_smoothing=0.1),
    "bce": lambda o, y, i: F.binary_cross_entropy_with_logits(o, y),
    "mse": lambda o, y, i: F.mse_loss(o, y),
    "mse-sum": lambda o, y, i: F.mse_loss(o, y, reduction="sum"),
    "batchnorm-eval": plain,
    "groupnorm": plain,
    "layernorm-attention": plain,
    "embedding": plain,
    "residual": plain,
    "gru": lambda o, y, i: F.mse_loss(o, y),
    "lstm": lambda o, y, i: F.mse_loss(o, y),
    "frozen": plain,
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("centered", [False, True], ids=["uncentred", "centred"])
def test_equals_the_loop(name, centered):
    model, loss_fn, (x, y), _ = BY_NAME[name].make()
    rows = rows_of(model, TERMS[name], x, y)
    truth = moment(rows - rows.mean(0) if centered else rows)
    op = GradientSecondMoment(model, loss_fn, (x, y), centered=centered)
    M = op.to_dense()
    assert relative(M, truth) < 1e-9
    assert torch.linalg.eigvalsh((M + M.T) / 2)[0] > -1e-12 * M.norm()
    factor = 1 if getattr(loss_fn, "reduction", "mean") == "mean" else 1 / len(y)
    torch.testing.assert_close(rows.mean(0), loss_gradient(model, loss_fn, x, y) * factor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "groupnorm", "layernorm-attention", "lstm"])
def test_float32(name):
    model, _, (x, y), _ = BY_NAME[name].make()
    truth = moment(rows_of(model, TERMS[name], x, y))
    model, loss_fn, data, _ = BY_NAME[name].make(torch.float32)
    assert relative(GradientSecondMoment(model, loss_fn, data).to_dense(), truth) < 1e-4


@pytest.mark.parametrize("name", ["class-weights", "ignore-index", "smoothing-weights-ignored"])
def test_class_weights_and_ignored_targets(name):
    model, loss_fn, (x, y), _ = BY_NAME[name].make()
    live = y != -100
    weight = loss_fn.weight if loss_fn.weight is not None else torch.ones(3, dtype=D)
    n, total = int(live.sum()), weight[y[live]].sum()

    def term(out, target, i):
        part = F.cross_entropy(out, target, weight, label_smoothing=loss_fn.label_smoothing, reduction="sum")
        return part * n / total

    rows = rows_of(model, term, x[live], y[live])
    op = GradientSecondMoment(model, loss_fn, (x, y))
    assert op.examples == n
    assert relative(op.to_dense(), moment(rows)) < 1e-9
    torch.testing.assert_close(rows.mean(0), loss_gradient(model, loss_fn, x, y), rtol=1e-10, atol=1e-12)


def test_an_ignored_example_is_as_if_it_were_absent():
    model, loss_fn, (x, y), _ = BY_NAME["ignore-index"].make()
    with_it = GradientSecondMoment(model, loss_fn, (x, y)).to_dense()
    without = GradientSecondMoment(model, loss_fn, (x[y != -100], y[y != -100])).to_dense()
    assert relative(with_it, without) < 1e-12


def test_an_example_of_several_tokens_sums_them():
    model, loss_fn, (x, y), _ = BY_NAME["tied"].make()
    live = (y != -100).sum()
    n = int((y != -100).any(1).sum())
    rows = rows_of(model, lambda o, t, i: F.cross_entropy(o, t, reduction="sum") * n / live, x, y)
    op = GradientSecondMoment(model, loss_fn, (x, y))
    assert op.examples == n
    assert relative(op.to_dense(), rows.T @ rows / n) < 1e-9
    torch.testing.assert_close(rows.sum(0) / n, loss_gradient(model, loss_fn, x, y), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("centered", [False, True], ids=["uncentred", "centred"])
@pytest.mark.parametrize("name", ["mlp", "mlp-sum", "smoothing-weights-ignored"])
def test_streamed_batches_add_up(name, centered):
    model, loss_fn, (x, y), _ = BY_NAME[name].make()
    whole = GradientSecondMoment(model, loss_fn, (x, y), centered=centered)
    parts = GradientSecondMoment(model, loss_fn, [(x[:3], y[:3]), (x[3:], y[3:])], centered=centered)
    assert relative(parts.to_dense(), whole.to_dense()) < 1e-10
    V = torch.randn(whole.shape[0], 3, dtype=D)
    wanted = V.T @ (whole @ V)
    torch.testing.assert_close(parts.gram(V), wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(parts.forms(V), wanted.diagonal(), rtol=1e-9, atol=1e-12)


def test_trace_is_the_mean_squared_gradient_and_rank_at_most_n():
    model, loss_fn, (x, y), _ = BY_NAME["mlp"].make()
    rows = rows_of(model, plain, x, y)
    M = GradientSecondMoment(model, loss_fn, (x, y)).to_dense()
    torch.testing.assert_close(M.trace(), rows.square().sum(1).mean())
    # the non-zero spectrum is that of the N x N Gram matrix
    gram = torch.linalg.eigvalsh(rows @ rows.T / len(rows))
    torch.testing.assert_close(torch.linalg.eigvalsh(M)[-len(rows) :], gram, rtol=1e-10, atol=1e-13)
    assert torch.linalg.eigvalsh(M)[: -len(rows)].abs().max() < 1e-12 * M.norm()


def test_layers():
    model, loss_fn, (x, y), _ = BY_NAME["mlp"].make()
    truth = moment(rows_of(model, plain, x, y))
    layers = GradientSecondMoment(model, loss_fn, (x, y)).layers()
    n = layers["0"].shape[0]
    assert relative(layers["0"].to_dense(), truth[:n, :n]) < 1e-9
    assert relative(layers["2"].to_dense(), truth[n:, n:]) < 1e-9


def own_mean(out, y):
    return ((out - y) ** 4).sum(1).mean()


def own_weighted(out, y):
    """A mean that divides by the summed weights, the first column of the targets."""
    return (y[:, :1] * (out - y[:, 1:]) ** 2).sum() / y[:, 0].sum()


def test_a_loss_of_the_users_own():
    model, _, (x, y), _ = BY_NAME["mse"].make()
    truth = moment(rows_of(model, lambda o, t, i: own_mean(o, t), x, y))
    assert relative(GradientSecondMoment(model, own_mean, (x, y)).to_dense(), truth) < 1e-9


def test_a_loss_with_a_divisor_of_its_own():
    model, _, (x, y), _ = BY_NAME["mse"].make()
    y = torch.cat([torch.rand(len(y), 1, dtype=D) + 0.5, y], dim=1)
    n, total = len(y), y[:, 0].sum()
    truth = moment(rows_of(model, lambda o, t, i: (t[:, :1] * (o - t[:, 1:]) ** 2).sum() * n / total, x, y))
    op = GradientSecondMoment(model, own_weighted, (x, y), weight=lambda batch: batch[1][:, 0].sum())
    assert relative(op.to_dense(), truth) < 1e-9
    with pytest.raises(CurvatureError, match="loss_fn is not the mean of one loss an example"):
        GradientSecondMoment(model, own_weighted, (x, y))


def test_dict_batches():
    model, _, batch, _ = BY_NAME["own-loss"].make()
    op = GradientSecondMoment(
        model, lambda o, b: F.cross_entropy(o, b["labels"]), batch, forward=lambda m, b: m(**b).logits
    )

    def logits(i):
        return model.inner(batch["input_ids"][i : i + 1], batch["attention_mask"][i : i + 1])

    rows = []
    for i in range(5):
        parts = torch.autograd.grad(F.cross_entropy(logits(i), batch["labels"][i : i + 1]), list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in parts]))
    assert relative(op.to_dense(), moment(torch.stack(rows))) < 1e-9


def contrastive(out, y):
    return F.cross_entropy(out @ out.T, torch.arange(len(out)))


@pytest.mark.parametrize(
    ("loss_fn", "options"),
    [
        (contrastive, {}),
        (functools.partial(contrastive), {}),
        (lambda o, y: (o - y).square().sum(), {}),  # a sum that calls itself a mean
        (own_mean, {"reduction": "sum"}),
    ],
)
def test_a_loss_that_is_no_mean_over_examples_is_refused(loss_fn, options):
    model, _, (x, y), _ = BY_NAME["mse"].make()
    with pytest.raises(CurvatureError, match="loss_fn is not the (mean|sum) of one loss an example"):
        GradientSecondMoment(model, loss_fn, (x, y), **options)


def test_a_loss_that_refuses_single_examples():
    model, _, (x, y), _ = BY_NAME["mse"].make()

    def picky(out, target):
        if len(out) < 2:
            raise ValueError("two at least")
        return F.mse_loss(out, target)

    with pytest.raises(CurvatureError, match="can't be evaluated on single examples.*two at least.*check=False"):
        GradientSecondMoment(model, picky, (x, y))
    op = GradientSecondMoment(model, picky, (x, y), check=False)
    truth = moment(rows_of(model, lambda o, t, i: F.mse_loss(o, t), x, y))
    assert relative(op.to_dense(), truth) < 1e-9


def test_batch_statistics_are_refused():
    model, loss_fn, data, _ = BY_NAME["batchnorm-train"].make()
    with pytest.raises(CurvatureError, match="BatchNorm2d '1' is in training mode.*mode='eval'"):
        GradientSecondMoment(model, loss_fn, data)
    op = GradientSecondMoment(model, loss_fn, data, mode="eval")
    model.eval()
    truth = moment(rows_of(model, plain, *data))
    model.train()
    assert relative(op.to_dense(), truth) < 1e-9
    model[1] = nn.BatchNorm2d(2, track_running_stats=False).double()
    with pytest.raises(CurvatureError, match="no running statistics.*track_running_stats=True"):
        GradientSecondMoment(model, loss_fn, data, mode="eval")


def test_outputs_that_merge_examples_with_positions_are_refused():
    model, _, (x, y), _ = BY_NAME["tied"].make()
    with pytest.raises(CurvatureError, match=r"outputs of shape \(12, 5\) for targets of length 4"):
        GradientSecondMoment(
            model,
            lambda o, t: F.cross_entropy(o, t.reshape(-1)),
            (x, y),
            forward=lambda m, b: m(b[0]).transpose(1, 2).reshape(-1, 5),
        )
