"""What a basis costs on a real net: products of a cold start and of warm refreshes on MNIST, and how exact they are.

The net is 784-200-200-10 with tanh (199,210 parameters), trained by plain SGD (lr .05, batch 50) on the first 5,000
digits; curvature is that of the mean cross-entropy of the first 1,000. References are float64 products written here,
on a float64 copy of the net, and ARPACK.
"""

import copy

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as arpack
from torch import nn

from benchmarks.data.loaders import load_images
from curvopt.curvature.hessian import Hessian
from curvopt.linalg import eigsh
from curvopt.subspace import DominantSubspace

STEPS = (200, 250, 350)
CURVATURE_ROWS = 1000


class Run:
    """A training run: the net, its data, and its weights at ``STEPS``."""

    def __init__(self, digits, seed):
        self.inputs, self.targets = digits
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(784, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 10))
        self.weights = {}
        self._exact = {}
        generator = torch.Generator().manual_seed(seed)
        opt = torch.optim.SGD(self.model.parameters(), lr=0.05)
        batches = iter(())
        for step in range(max(STEPS) + 1):
            if step in STEPS:
                self.weights[step] = copy.deepcopy(self.model.state_dict())
            chosen = next(batches, None)
            if chosen is None:
                batches = iter(torch.randperm(5000, generator=generator).split(50))
                chosen = next(batches)
            opt.zero_grad()
            nn.functional.cross_entropy(self.model(self.inputs[chosen]), self.targets[chosen]).backward()
            opt.step()
        batch = (self.inputs[:CURVATURE_ROWS], self.targets[:CURVATURE_ROWS])
        self.hessian = Hessian(self.model, nn.CrossEntropyLoss(), batch)

    def at(self, step):
        """Put the weights of a step into the net, which the operator looks at."""
        self.model.load_state_dict(self.weights[step])

    def product(self, step):
        """An independent float64 product: double backward on a float64 copy of the net."""
        model = copy.deepcopy(self.model).double()
        model.load_state_dict(self.weights[step])
        params = list(model.parameters())
        x, y = self.inputs[:CURVATURE_ROWS].double(), self.targets[:CURVATURE_ROWS]
        slopes = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), params, create_graph=True)
        gradient = torch.cat([g.reshape(-1) for g in slopes])

        def multiply(v):
            v = torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64)).reshape(-1)
            return torch.cat(
                [g.reshape(-1) for g in torch.autograd.grad(gradient, params, v, retain_graph=True)]
            ).numpy()

        return multiply

    def exact(self, step):
        """The ten leading pairs: values (10,), vectors (P, 10), to a residual of about 1e-5."""
        if step not in self._exact:
            size = self.hessian.shape[0]
            op = LinearOperator((size, size), matvec=self.product(step), dtype=np.float64)
            values, vectors = arpack(op, k=10, which="LA", tol=1e-5, ncv=32)
            self._exact[step] = values[::-1].copy(), torch.from_numpy(vectors[:, ::-1].copy())
        return self._exact[step]

    def overlap(self, basis, step):
        """``||V^T V_exact||_F^2 / k``."""
        k = basis.shape[1]
        return float((self.exact(step)[1][:, :k].T @ basis.double()).square().sum()) / k


@pytest.fixture(scope="module")
def digits(data_root):
    data = load_images("mnist", root=data_root, limit=5000, normalize=True)
    inputs = data.inputs.reshape(5000, 784)
    assert inputs.min().item() == pytest.approx(-0.1307 / 0.3081, rel=1e-5)
    return inputs, data.targets


@pytest.fixture(scope="module")
def run0(digits):
    return Run(digits, seed=0)


@pytest.fixture(scope="module")
def run1(digits):
    return Run(digits, seed=1)


def test_the_problem_is_the_one_that_others_were_measured_on(run0):
    assert run0.hessian.shape[0] == 199_210
    expected = [6.78, 6.16, 5.66, 2.67, 1.52]  # published for this net at step 200: values 1 to 3, 9 and 10
    values, _ = run0.exact(200)
    assert [values[i] for i in (0, 1, 2, 8, 9)] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cold_top_ten_in_30_products(run0, seed):
    run0.at(200)
    result = eigsh(run0.hessian, 10, tol=1e-3, seed=seed)
    assert result.converged
    assert result.matvecs - result.guard_matvecs <= 30
    assert result.guard_matvecs <= 6
    multiply = run0.product(200)
    vectors = result.eigenvectors.double().numpy()
    values = result.eigenvalues.double().numpy()
    norms = np.linalg.norm(vectors, axis=0)
    residuals = [np.linalg.norm(multiply(v) - x * v) / n for v, x, n in zip(vectors.T, values, norms, strict=True)]
    assert max(residuals) <= 1e-3 * values[0]
    assert run0.overlap(result.eigenvectors, 200) > 0.999


@pytest.mark.filterwarnings("ignore::curvopt._errors.GapWarning")  # k = 10 lies at no gap
def test_cold_subspace_in_30_products(run0):
    run0.at(200)
    subspace = DominantSubspace(run0.hessian, 10, tol=1e-3)
    report = subspace.refresh()
    assert (report.kind, report.converged) == ("cold", True)
    assert report.matvecs - report.guard_matvecs <= 30
    assert run0.overlap(subspace.basis, 200) > 0.999


# The issue is 150 steps from step 200 with seed 0; the other rows show that this is no stroke of luck.
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("run", ["run0", "run1"])
@pytest.mark.parametrize("later", [250, 350])
@pytest.mark.filterwarnings("ignore::curvopt._errors.GapWarning")  # k = 10 lies at no gap
@pytest.mark.parametrize(("k", "products", "overlap"), [(10, 20, 0.995), (9, 10, 0.99)])
def test_warm_refresh(run, seed, later, k, products, overlap, request):
    run = request.getfixturevalue(run)
    run.at(200)
    subspace = DominantSubspace(run.hessian, k, seed=seed)
    subspace.refresh()
    stale = subspace.basis.clone()
    run.at(later)
    report = subspace.refresh()
    assert report.matvecs <= products
    assert report.kind == ("image" if k == 9 else "krylov")
    assert run.overlap(subspace.basis, later) >= overlap
    assert run.overlap(subspace.basis, later) > run.overlap(stale, later) + 0.01
    assert report.overlap == pytest.approx(float((stale.T @ subspace.basis).square().sum()) / k, abs=1e-4)
