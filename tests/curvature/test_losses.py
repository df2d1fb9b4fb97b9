"""Loss Hessians against the Hessian that autograd builds entry by entry."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvopt._errors import CurvatureError, DoubleBackwardError
from curvopt.curvature.losses import by_autograd, closed_form, recognise

D = torch.float64
# Both sides are float64 sums of at most 60 terms of order 1: 1e-12 is some 100 eps of room.
TOL = 1e-12


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(3)) * 2


def indices(*shape: int, classes: int, ignored: int | None = None) -> torch.Tensor:
    y = torch.randint(classes, shape, generator=torch.Generator().manual_seed(4))
    if ignored is not None:
        y.view(-1)[::3] = ignored
    return y


def explicit(loss_fn, z, y, share):
    """The Hessian as a matrix, by torch's own double loop over outputs."""
    n = z.numel()
    return torch.autograd.functional.hessian(lambda o: loss_fn(o, y) * share, z).reshape(n, n)


def as_matrix(product, z):
    eye = torch.eye(z.numel(), dtype=D)
    return torch.stack([product(e.view(z.shape)).reshape(-1) for e in eye], dim=1)


W4 = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=D)
SOFT = torch.softmax(logits(5, 4) * 0.3, dim=1)
PROBABILITY = torch.sigmoid(logits(4, 3))
CASES = {
    "ce": (nn.CrossEntropyLoss(), logits(5, 4), indices(5, classes=4)),
    "ce sum": (nn.CrossEntropyLoss(reduction="sum"), logits(5, 4), indices(5, classes=4)),
    "ce weight": (nn.CrossEntropyLoss(weight=W4), logits(5, 4), indices(5, classes=4)),
    "ce weight sum": (nn.CrossEntropyLoss(weight=W4, reduction="sum"), logits(5, 4), indices(5, classes=4)),
    "ce ignore": (nn.CrossEntropyLoss(), logits(6, 4), indices(6, classes=4, ignored=-100)),
    "ce ignore a class": (nn.CrossEntropyLoss(ignore_index=1), logits(6, 4), indices(6, classes=4, ignored=1)),
    "ce smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), logits(5, 4), indices(5, classes=4)),
    "ce everything": (
        nn.CrossEntropyLoss(weight=W4 + 0.1, ignore_index=2, label_smoothing=0.3),
        logits(6, 4),
        indices(6, classes=4, ignored=2),
    ),
    "ce soft": (nn.CrossEntropyLoss(), logits(5, 4), SOFT),
    "ce soft, not normalised": (nn.CrossEntropyLoss(), logits(5, 4), SOFT * 1.7),
    "ce soft weight smoothing": (nn.CrossEntropyLoss(weight=W4, label_smoothing=0.1), logits(5, 4), SOFT),
    "ce tokens": (nn.CrossEntropyLoss(label_smoothing=0.1), logits(2, 4, 3), indices(2, 3, classes=4, ignored=-100)),
    "ce image, soft": (nn.CrossEntropyLoss(), logits(2, 3, 2, 2), torch.softmax(logits(2, 3, 2, 2), dim=1)),
    "ce image": (nn.CrossEntropyLoss(weight=W4[:3]), logits(2, 3, 2, 2), indices(2, 2, 2, classes=3)),
    "ce one example": (nn.CrossEntropyLoss(), logits(4), torch.tensor(2)),
    "F.cross_entropy": (F.cross_entropy, logits(5, 4), indices(5, classes=4)),
    "partial": (
        functools.partial(F.cross_entropy, label_smoothing=0.2, reduction="sum"),
        logits(5, 4),
        indices(5, classes=4),
    ),
    "mse": (nn.MSELoss(), logits(4, 3), logits(4, 3) + 1),
    "mse sum": (nn.MSELoss(reduction="sum"), logits(4, 3), logits(4, 3) + 1),
    "F.mse_loss": (F.mse_loss, logits(4), logits(4) - 1),
    "bce": (nn.BCEWithLogitsLoss(), logits(4, 3), (logits(4, 3) > 0).to(D)),
    "bce soft sum": (nn.BCEWithLogitsLoss(reduction="sum"), logits(4, 3), PROBABILITY),
    "bce weights": (
        nn.BCEWithLogitsLoss(
            weight=torch.tensor([[0.3], [1.0], [2.0], [0.0]], dtype=D),
            pos_weight=torch.tensor([0.5, 3.0, 1.0], dtype=D),
        ),
        logits(4, 3),
        PROBABILITY,
    ),
    "F.bce": (F.binary_cross_entropy_with_logits, logits(4, 1), PROBABILITY[:, :1]),
}


@pytest.mark.parametrize("name", CASES)
def test_closed_form_is_the_hessian(name):
    loss_fn, z, y = CASES[name]
    truth = explicit(loss_fn, z, y, 0.37)
    product = closed_form(loss_fn, z, y, 0.37)
    assert product is not None
    assert truth.abs().max() > 1e-3  # the comparison below means something
    torch.testing.assert_close(as_matrix(product, z), truth, rtol=TOL, atol=TOL)


@pytest.mark.parametrize("name", CASES)
def test_autograd_agrees_with_the_closed_form(name):
    loss_fn, z, y = CASES[name]
    product = by_autograd(lambda o: loss_fn(o[0], y) * 0.37, [z])
    torch.testing.assert_close(
        as_matrix(lambda w: product([w])[0], z), explicit(loss_fn, z, y, 0.37), rtol=TOL, atol=TOL
    )


def test_large_logits_stay_finite_in_float32():
    z = torch.tensor([[1e4, -1e4, 0.0]])
    u = closed_form(nn.CrossEntropyLoss(), z, torch.tensor([1]))(torch.ones_like(z))
    assert torch.isfinite(u).all()
    v = closed_form(nn.BCEWithLogitsLoss(), z, torch.ones_like(z))(torch.ones_like(z))
    assert torch.isfinite(v).all()


def test_a_softmax_shift_has_no_curvature():
    z = logits(5, 4)
    u = closed_form(nn.CrossEntropyLoss(), z, indices(5, classes=4))(torch.ones(5, 4, dtype=D))
    assert u.abs().max() < 1e-15  # p (1 - sum p): a few eps of p


class Doubled(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return 2 * super().forward(input, target)


def hooked() -> nn.Module:
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda module, args, out: 2 * out)
    return loss


@pytest.mark.parametrize(
    "loss_fn",
    [
        Doubled(),
        hooked(),
        nn.L1Loss(),
        nn.CrossEntropyLoss(reduction="none"),
        lambda o, y: F.cross_entropy(o, y),
        functools.partial(F.mse_loss, weight=torch.ones(1)),
        functools.partial(F.cross_entropy, reduction="none"),
    ],
    ids=["subclass", "hooked", "L1", "none", "lambda", "unknown option", "partial none"],
)
def test_what_is_not_torchs_own_loss_has_no_closed_form(loss_fn):
    assert recognise(loss_fn) is None
    assert closed_form(loss_fn, logits(5, 4), indices(5, classes=4)) is None


def test_a_broadcasting_mse_is_left_to_autograd():
    assert closed_form(nn.MSELoss(), logits(4, 3), logits(3)) is None


def test_several_outputs_and_one_that_is_not_used():
    a, b, c = logits(3), logits(3) + 1, logits(2)
    product = by_autograd(lambda o: (o[0] * o[1] ** 2).sum(), [a, b, c])
    w = [torch.ones(3, dtype=D), torch.zeros(3, dtype=D), torch.ones(2, dtype=D)]
    u = product(w)
    torch.testing.assert_close(u[0], torch.zeros(3, dtype=D))
    torch.testing.assert_close(u[1], 2 * b)
    torch.testing.assert_close(u[2], torch.zeros(2, dtype=D))


def test_a_linear_loss_has_zero_hessian():
    z = logits(3)
    assert torch.equal(by_autograd(lambda o: o[0].sum(), [z])([torch.ones_like(z)])[0], torch.zeros_like(z))


def test_a_loss_that_ignores_the_outputs_is_named():
    with pytest.raises(CurvatureError, match="does not depend on the model's output tensors"):
        by_autograd(lambda o: torch.tensor(1.0), [logits(3)])


def test_a_loss_without_second_derivative_is_named():
    with pytest.raises(DoubleBackwardError, match="no second derivative.*multi_margin"):
        by_autograd(lambda o: F.multi_margin_loss(o[0], indices(5, classes=4)), [logits(5, 4)])
