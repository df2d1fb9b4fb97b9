"""The split around AdamW, in AdamW's own metric: directions beyond their stability border are held inside it."""

import torch
from sklearn.datasets import load_digits

import curvopt

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16 - 0.3
labels = torch.tensor(digits.target)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
loss_fn = torch.nn.CrossEntropyLoss()

optimizer = curvopt.SubspaceScaled(
    torch.optim.AdamW(model.parameters(), lr=3e-3),
    curvature=curvopt.Hessian(model, loss_fn, (images[:300], labels[:300])),
    metric="preconditioner",
    dominant="edge",
    rank=8,
    refresh_every=50,
)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=150)  # reaches the base through the wrapper

for _ in range(150):
    optimizer.zero_grad()
    loss = loss_fn(model(images[:1500]), labels[:1500])
    loss.backward()
    optimizer.step()
    scheduler.step()

accuracy = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
print(f"loss {loss.item():.4f}, test accuracy {accuracy:.3f}, {optimizer.stats()['matvecs']} products")
