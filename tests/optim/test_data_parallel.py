"""Two processes with half of the data each train as one process with all of it (DistributedDataParallel, gloo)."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from curvopt._params import ParameterLayout

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = textwrap.dedent("""
    import json, sys, warnings
    import torch, torch.distributed as dist
    from torch import nn
    import curvopt

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)

    def train(kind):
        apart = kind in ("apart", "alone")
        torch.manual_seed(rank if apart else 0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        torch.manual_seed(1)
        x, y = torch.randn(40, 5).double(), torch.randint(0, 3, (40,))
        x, y = x.chunk(size)[rank], y.chunk(size)[rank]
        wrapped = model if size == 1 or apart else nn.parallel.DistributedDataParallel(model)
        loss_fn = nn.CrossEntropyLoss()
        curvature = curvopt.Hessian(wrapped, loss_fn, (x, y))
        if kind == "alone":
            curvature.process_group = False
        keywords = dict(curvature=curvature, rank=3, refresh_every=2, max_matvecs=40)
        if kind == "auto":
            keywords.update(refresh_every="auto", overhead=1e6)
        if kind == "layer":
            keywords.update(layout="layer", rank=2)
        if kind == "closure":
            # Rounding may flip an eigenvector's sign, and a warm chain then takes another way: converge fully.
            keywords.update(curvature="closure", tol=1e-7, max_matvecs=57)
        if kind == "scaled":
            base = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
            opt = curvopt.SubspaceScaled(base, dominant=0.5, bulk=1.0, **keywords)
        else:
            opt = curvopt.BulkSGD(wrapped.parameters(), lr=0.1, momentum=0.9, **keywords)

        def closure():
            opt.zero_grad()
            loss = loss_fn(wrapped(x), y)
            loss.backward()
            return loss

        try:
            for _ in range(24 if kind == "auto" else 6):
                opt.step(closure)
        except ValueError as error:
            return {"error": str(error)}
        weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        return {
            "weights": weights.tolist(),
            "basis": opt.subspace.basis.sum(1).abs().tolist(),
            "values": opt.subspace.eigenvalues.reshape(-1).tolist(),
            "refreshes": opt.subspace.refreshes,
            "matvecs": opt.subspace.matvecs,
            "ratio": opt.stats()["cost_ratio"],
        }

    print(json.dumps({kind: train(kind) for kind in sys.argv[4:]}))
""")
TRAINED = ["hessian", "scaled", "layer", "closure"]


def run(folder, size, kinds):
    script = folder / "train.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(r), str(size), str(folder / "store"), *kinds],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(size)
    ]
    try:
        answers = [p.communicate(timeout=100)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0] * size
    return [json.loads(a.strip().splitlines()[-1]) for a in answers]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return run(tmp_path_factory.mktemp("pair"), 2, [*TRAINED, "auto", "apart", "alone"])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single"), 1, TRAINED)[0]


@pytest.mark.parametrize("kind", TRAINED)
def test_two_processes_train_as_one(pair, single, kind):
    (first, second), single = (answer[kind] for answer in pair), single[kind]
    assert first["weights"] == second["weights"]  # bit for bit: all numbers that differ between processes are averaged
    assert first["basis"] == second["basis"] and first["values"] == second["values"]
    # The mean of two half batches is the whole batch; differences of a closure's gradients keep about half the digits.
    tolerance = dict(abs=1e-5) if kind == "closure" else dict(abs=1e-9)
    assert first["weights"] == pytest.approx(single["weights"], **tolerance)
    assert first["values"] == pytest.approx(single["values"], **tolerance)
    assert first["refreshes"] == single["refreshes"]
    if kind != "closure":
        assert first["matvecs"] == single["matvecs"]


def test_a_schedule_by_measured_cost_is_the_same_on_all_processes(pair):
    first, second = (answer["auto"] for answer in pair)
    assert first["ratio"] == second["ratio"] > 0
    assert first["refreshes"] == second["refreshes"] > 1
    assert first["weights"] == second["weights"]


def test_processes_with_different_models_are_refused_or_left_alone(pair):
    for answer in pair:
        assert "hold different parameters" in answer["apart"]["error"]
        assert "curvature.process_group = False" in answer["apart"]["error"]
    first, second = (answer["alone"] for answer in pair)
    assert first["weights"] != second["weights"] and first["refreshes"] == second["refreshes"] == 3


def test_sharded_parameters_are_refused():
    from torch.distributed.tensor import DTensor

    assert hasattr(DTensor, "placements")

    class Sharded(torch.Tensor):
        placements = ()

    with pytest.raises(TypeError, match="parameter 'weight' is a DTensor .* not supported yet"):
        ParameterLayout([torch.zeros(3).as_subclass(Sharded)], ["weight"])
