"""The outliers study's measurements on a model of your own: outliers over width, and the way between two solutions."""

import copy

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


def network(width, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.Tanh(), torch.nn.Linear(width, 10))


def trained(model, batch_size=30, steps=300, seed=0):
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    order = torch.Generator().manual_seed(seed)
    sampler = torch.utils.data.RandomSampler(dataset, num_samples=batch_size * steps, replacement=True, generator=order)
    for x, y in torch.utils.data.DataLoader(dataset, batch_size=batch_size, sampler=sampler):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return model


print("the bulk grows with the parameters, the outliers with the classes")
for width in (8, 16, 32):
    model = trained(network(width))
    curvature = curvopt.Hessian(model, loss_fn, (images, labels))
    found = diagnostics.outliers(curvature, expected=9)  # C - 1 for cross-entropy
    ratios = found.ratios()
    print(
        f"  {curvature.shape[0]:5d} parameters: outliers {found.counted.verdict}; "
        f"lambda_9/lambda_10 {float(ratios[8]):.2f}, lambda_10/lambda_11 {float(ratios[9]):.2f}"
    )

print("small- and large-batch solutions")
start = network(16)
small, large = trained(start, 10, seed=1), trained(start, 300, seed=2)
other = trained(network(16, seed=7), 10, seed=3)
curvature = curvopt.Hessian(small, loss_fn, (images, labels))
paths = {
    "one start": diagnostics.loss_path(curvature, [small, large]),
    "two starts": diagnostics.loss_path(curvature, [small, other]),
}
sharpness = float(curvopt.eigsh(curvature, k=1).eigenvalues[0])
for (name, path), end in zip(paths.items(), (large, other), strict=True):
    line = torch.nn.utils.parameters_to_vector(end.parameters()) - diagnostics.flatten_weights(curvature)
    line = (line / line.norm()).detach()
    flat = float(line @ (curvature @ line)) / sharpness
    print(f"  {name}: barrier {path.barrier:.3f} over a distance of {path.length:.1f}, curvature {flat:.3f} lambda_1")
figure, data = plots.plot_path(paths, title="digits, 64-16-10 tanh")
print("written:", ", ".join(str(p) for p in plots.save_figure(figure, data, "figures", "study_outliers").values()))
