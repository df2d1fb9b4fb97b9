"""Replace torch.optim.SGD by BulkSGD in an existing loop: only the constructor changes."""

import torch
from sklearn.datasets import load_digits

import curvopt

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16 - 0.3
labels = torch.tensor(digits.target)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
loss_fn = torch.nn.CrossEntropyLoss()

curvature = curvopt.Hessian(model, loss_fn, (images[:500], labels[:500]))
optimizer = curvopt.BulkSGD(model.parameters(), lr=0.1, momentum=0.9, curvature=curvature, rank=9, refresh_every=50)

for step in range(300):
    batch = torch.randint(0, 1500, (50,))
    optimizer.zero_grad()
    loss = loss_fn(model(images[batch]), labels[batch])
    loss.backward()
    optimizer.step()
    if step % 50 == 49:
        print(f"step {step + 1}: loss {loss.item():.3f}, leading eigenvalue {optimizer.subspace.eigenvalues[0]:.2f}")

stats = optimizer.stats()
print(f"{stats['refreshes']} refreshes, {stats['matvecs']} products, {stats['share_refresh']:.0%} of the time")
