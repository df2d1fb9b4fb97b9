"""A physics-informed network in thirty lines: Adam first, then SubspaceLBFGS, with the loss curve of both.

u_t + 8 u_x = 0 on a ring, u = sin x at the start; the solution is sin(x - 8 t). Float64, fixed points, full batch.
`python examples/pinn.py curve.png` draws the curve (needs matplotlib).
"""

import math
import sys

import torch

import curvopt

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
net = torch.nn.Sequential(
    torch.nn.Linear(2, 24), torch.nn.Tanh(), torch.nn.Linear(24, 24), torch.nn.Tanh(), torch.nn.Linear(24, 1)
)
inside = torch.rand(400, 2) * torch.tensor([2 * math.pi, 1.0])
start = torch.stack([torch.rand(60) * 2 * math.pi, torch.zeros(60)], dim=1)
left = torch.stack([torch.zeros(60), torch.rand(60)], dim=1)
right = left + torch.tensor([2 * math.pi, 0.0])


def loss_on(points: torch.Tensor) -> torch.Tensor:
    """Equation inside, values at the start, one value at both ends."""
    points = points.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
    equation = slope[:, 1] + 8 * slope[:, 0]
    initial = net(start)[:, 0] - torch.sin(start[:, 0])
    return equation.square().mean() + initial.square().mean() + (net(left) - net(right)).square().mean()


def closure_over(points: torch.Tensor):
    """What both optimizers call; `curve` keeps the losses of the training points."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_on(points)
        loss.backward()
        if points is inside:
            curve.append(loss.item())
        return loss

    return closure


curve: list[float] = []
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
for _ in range(200):
    optimizer.step(closure_over(inside))
switch = len(curve)

# Curvature from a quarter of the points inside; those on the border are few and stay whole.
optimizer = curvopt.SubspaceLBFGS(net.parameters(), rank=20, curvature_closure=closure_over(inside[:100]))
for _ in range(25):
    optimizer.step(closure_over(inside))

grid = torch.cartesian_prod(torch.linspace(0, 2 * math.pi, 60), torch.linspace(0, 1, 30))
exact = torch.sin(grid[:, 0] - 8 * grid[:, 1])
error = (net(grid)[:, 0] - exact).norm().item() / exact.norm().item()
stats = optimizer.stats()
print(f"Adam: loss {curve[0]:.2e} -> {curve[switch - 1]:.2e} in {switch} calls of the closure")
print(
    f"SubspaceLBFGS: -> {curve[-1]:.2e} in {stats['closure_calls']}, of which {stats['curvature_calls']} for curvature"
)
print(f"{stats['kept']} eigenpairs kept, relative error of the solution {error:.1e}; last step: {stats['reason']}")

if len(sys.argv) > 1:
    import matplotlib.pyplot as plt

    plt.semilogy(range(switch), curve[:switch], label="Adam")
    plt.semilogy(range(switch, len(curve)), curve[switch:], label="SubspaceLBFGS")
    plt.xlabel("calls of the closure on all points")
    plt.ylabel("loss")
    plt.legend()
    plt.savefig(sys.argv[1], dpi=150)
