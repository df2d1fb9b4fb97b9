"""The density study's measurements on a model of your own: density over training, BatchNorm in both of its modes."""

import torch
from sklearn.datasets import load_digits

import curvopt
from curvopt import diagnostics
from curvopt.diagnostics import plots

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32)[:600] / 16 - 0.3
labels = torch.tensor(digits.target)[:600]
dataset = torch.utils.data.TensorDataset(images, labels)
loss_fn = torch.nn.CrossEntropyLoss()
k = 9  # C - 1 for cross-entropy, C for a squared loss


def network(batch_norm):
    torch.manual_seed(0)
    layers = []
    for n_in, n_out in ((64, 16), (16, 16), (16, 16)):
        layers += [
            torch.nn.Linear(n_in, n_out),
            *([torch.nn.BatchNorm1d(n_out)] if batch_norm else []),
            torch.nn.ReLU(),
        ]
    return torch.nn.Sequential(*layers, torch.nn.Linear(16, 10))


def train(model, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    sampler = torch.utils.data.RandomSampler(dataset, num_samples=30 * steps, replacement=True)
    model.train()
    for x, y in torch.utils.data.DataLoader(dataset, batch_size=30, sampler=sampler):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


def freeze_statistics(model):
    """Statistics of all data as one batch, so that both modes are the same function at these weights."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def measure(model, mode):
    # One fixed batch: with BatchNorm in training mode, other batches would make another function.
    curvature = curvopt.Hessian(model, loss_fn, (images, labels), mode=mode)
    leading = curvopt.eigsh(curvature, k=20)
    top = leading.eigenvectors[:, :k]
    batches = list(zip(images.split(30), labels.split(30), strict=True))
    share = diagnostics.gradient_alignment(curvature, top, batches)
    known = leading.eigenvalues[:k], top
    density = curvopt.spectral_density(curvature, steps=40, probes=4, deflate=known)
    spread = float(leading.eigenvalues[0] / leading.eigenvalues[-1])
    print(
        f"{mode:5}: lambda_1 {float(leading.eigenvalues[0]):6.2f}, lambda_1/lambda_20 {spread:5.1f}, gradient in the top "
        f"{k}: mini-batches {share.minibatch.value:.2f}, all data {share.full:.2f}, random {share.null.mean:.3f}"
    )
    return density


densities = {}
model = network(batch_norm=False)
print("without BatchNorm, at the start")
densities["start"] = measure(model, "train")
train(model, 300)
print("after 300 steps")
densities["trained"] = measure(model, "train")

model = network(batch_norm=True)
train(model, 300)
freeze_statistics(model)
print("with BatchNorm, after 300 steps")
densities["BatchNorm, training mode"] = measure(model, "train")
densities["BatchNorm, evaluation mode"] = measure(model, "eval")

figure, data = plots.plot_density(densities, title="digits, 64-16-16-16-10 ReLU")
paths = plots.save_figure(figure, data, "figures", "study_density")
print("written:", ", ".join(str(path) for path in paths.values()))
