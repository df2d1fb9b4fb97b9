"""No operator at hand: curvature from differences of a closure's gradients, as torch.optim.LBFGS calls closures."""

import torch
from sklearn.datasets import load_digits

import curvopt

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float64) / 16 - 0.3
labels = torch.tensor(digits.target)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10)).double()
loss_fn = torch.nn.CrossEntropyLoss()


def closure_over(rows: slice):
    """The closure of a batch: clear the gradients, compute the loss, call backward, return the loss."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(images[rows]), labels[rows])
        loss.backward()
        return loss

    return closure


# A fixed, larger batch for the curvature: two calls at the same weights must agree.
optimizer = curvopt.BulkSGD(
    model.parameters(),
    lr=0.2,
    rank=9,
    curvature="closure",
    curvature_closure=closure_over(slice(0, 500)),
    refresh_every=50,
    start=50,  # by then the spectrum has its gap after 9 = classes - 1
)
for step in range(150):
    start = 50 * step % 1500
    loss = optimizer.step(closure_over(slice(start, start + 50)))
print(f"loss {loss.item():.3f}, eigenvalues {[round(v, 2) for v in optimizer.subspace.eigenvalues.tolist()]}")
