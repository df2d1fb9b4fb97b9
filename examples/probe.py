"""What a run's curvature does: a probe in two lines, then outliers, density and the way between two solutions."""

from pathlib import Path

import torch
from sklearn.datasets import load_digits

import curvopt
from curvopt import diagnostics
from curvopt.diagnostics import plots

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32)[:1000] / 16 - 0.3
labels = torch.tensor(digits.target)[:1000]
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=50, shuffle=True)
loss_fn = torch.nn.CrossEntropyLoss()


def train(model, optimizer, epochs):
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()


model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
start = {name: value.clone() for name, value in model.state_dict().items()}
optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
curvature = curvopt.Hessian(model, loss_fn, (images, labels))

probe = diagnostics.Probe(curvature, optimizer, every=20)  # line one
train(model, optimizer, epochs=6)
table = probe.table()  # line two
print(f"{'step':>6} {'loss':>7} {'sharpness':>10} {'2/lr':>6} {'chi full':>9} {'chi update':>10} {'overlap':>8}")
for row in table:
    print(
        f"{row['step']:6d} {row['loss']:7.3f} {row['sharpness']:10.3f} {row['threshold']:6.1f} "
        f"{row['chi_full']:9.3f} {row['chi_update']:10.3f} {row['overlap_last']:8.3f}"
    )
print("the probe took", probe.cost)
probe.detach()

found = diagnostics.outliers(curvature, expected=9)
print("outliers:", found.counted.verdict)
for name, layer in diagnostics.layer_outliers(curvature, veto=False).items():
    print(
        f"  layer {name}: edge rule {layer.counted.edge.count}, last gap {layer.counted.last_gap}, rank {layer.rank()}"
    )

leading = curvopt.eigsh(curvature, k=9)
spread = diagnostics.localization(leading, layout=curvature.layout)
print("IPR relative to a random vector:", [round(v, 1) for v in spread.relative.tolist()])

density = curvopt.spectral_density(curvature, deflate=leading)
figure, data = plots.plot_density(density, title="digits, 64-16-10 tanh")
paths = plots.save_figure(figure, data, Path("figures"), "density")
print("written:", ", ".join(str(path) for path in paths.values()))

other = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
other.load_state_dict(start)
train(other, torch.optim.SGD(other.parameters(), lr=0.2), epochs=6)
path = diagnostics.loss_path(curvature, [model, other])
print(f"barrier between two runs from the same start: {path.barrier:.4f}")
