"""Does your model learn in the sharp or in the flat directions? The sharp-flat study on a model of your own."""

import copy

import torch
from sklearn.datasets import load_digits

import curvopt
from curvopt import diagnostics

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32)[:1000] / 16 - 0.3
targets = torch.nn.functional.one_hot(torch.tensor(digits.target)[:1000], 10).float()


def loss_fn(outputs, wanted):
    return 0.5 * (outputs - wanted).square().sum(1).mean()


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        index = torch.randint(len(images), (50,), generator=generator)
        optimizer.zero_grad()
        loss_fn(model(images[index]), targets[index]).backward()
        optimizer.step()


# your model, your data, your loss; k = C for a squared loss, C - 1 for cross-entropy
model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
rank, lr = 10, 0.1
train(model, torch.optim.SGD(model.parameters(), lr=lr), 200)  # up to the switch

curvature = curvopt.Hessian(model, loss_fn, (images, targets))
leading = curvopt.eigsh(curvature, k=rank + 1)
basis = leading.eigenvectors[:, :rank]
gap = float(leading.eigenvalues[rank - 1] / leading.eigenvalues[rank])
energy = diagnostics.curvature_energy(curvature, basis, probes=16)
print(f"gap after {rank} eigenvalues: {gap:.2f}; 2/lambda_1 = {2 / float(leading.eigenvalues[0]):.3f}, lr = {lr}")
print(f"dominant share of the gradient: {diagnostics.gradient_alignment(curvature, basis).full ** 0.5:.3f}")
print(f"share of the curvature energy in the dominant subspace: {energy.hessian.frobenius.dominant_share:.3f}")

with torch.no_grad():
    print(f"loss at the switch: {loss_fn(model(images), targets):.4f}")
for name, dominant, bulk in (("SGD", 1, 1), ("Dom-SGD", 1, 0), ("Bulk-SGD", 0, 1), ("bulk doubled", 1, 2)):
    twin = copy.deepcopy(model)
    twin_curvature = curvopt.Hessian(twin, loss_fn, (images, targets))
    optimizer = curvopt.InterpolatedSGD(
        twin.parameters(), lr=lr, dominant=dominant, bulk=bulk, curvature=twin_curvature, rank=rank, refresh_every=20
    )
    train(twin, optimizer, 200)
    with torch.no_grad():
        print(f"  {name:13} {loss_fn(twin(images), targets):.4f}")
