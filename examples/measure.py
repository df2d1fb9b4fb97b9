"""Curvature on its own: eigenpairs with their residuals, trace with its error, density, and where the energy sits."""

import torch
from sklearn.datasets import load_digits

import curvopt

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16 - 0.3
labels = torch.tensor(digits.target)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
loss_fn = torch.nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
for _ in range(100):
    optimizer.zero_grad()
    loss_fn(model(images[:500]), labels[:500]).backward()
    optimizer.step()

hessian = curvopt.Hessian(model, loss_fn, (images[:500], labels[:500]))
result = curvopt.eigsh(hessian, k=9, tol=1e-3)
print("eigenvalues   ", [round(v, 3) for v in result.eigenvalues.tolist()])
print("residual norms", [f"{r:.0e}" for r in result.residual_norms.tolist()], result.reason)

trace = curvopt.trace(hessian, probes=30)
print(f"trace {trace.value:.2f} +- {trace.standard_error:.2f}")

grid, density = curvopt.spectral_density(hessian)
print(f"density on {len(grid)} points, integral {torch.trapezoid(density, grid):.4f}")

print(curvopt.curvature_energy(hessian, result.eigenvectors))
