"""Do your model's leading eigenvectors settle, and on how many parameters do they live? The displacement study on it."""

import torch
from sklearn.datasets import load_digits

import curvopt
from curvopt import diagnostics

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32)[:1000] / 16 - 0.3
labels = torch.tensor(digits.target)[:1000]
loss_fn = torch.nn.CrossEntropyLoss()
rank, every, lag = 9, 20, 40  # k = C - 1 for cross-entropy with C classes

for name in ("SGD", "Adam"):
    model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
    torch.manual_seed(1)
    if name == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    curvature = curvopt.Hessian(model, loss_fn, (images, labels))
    record, known = diagnostics.Displacement(), None
    for step in range(201):
        if step % every == 0:
            found = curvopt.eigsh(curvature, k=rank, tol=1e-3, v0=known)
            known = found.eigenvectors
            record.record(step, found)
        index = torch.randint(1000, (50,))
        optimizer.zero_grad()
        loss_fn(model(images[index]), labels[index]).backward()
        optimizer.step()
    moved = record.two_time(lags=[lag])
    print(f"{name}: overlap q(t, t + {lag}) for t = {moved.waiting.tolist()}; random subspaces have {moved.null:.4f}")
    print("  ", [round(q, 3) for q in moved.overlap.tolist()])
    place = diagnostics.localization(known, layout=curvature.layout)
    null = diagnostics.reinitialized_ipr(curvature, rank, draws=3)
    print(f"  IPR of the first eigenvector: {float(place.relative[0]):.2f} times that of a random direction,")
    print(f"  {float(place.ipr[0]) / null.mean:.2f} times that of re-initialised networks")
    print("  its mass by layer:", {layer: round(float(part.mass[0]), 3) for layer, part in place.layers.items()})
