"""The probe: bit-identical runs, right numbers, a known and capped cost, clear errors."""

from __future__ import annotations

import math
import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvopt
from curvopt._errors import EmptyDataError, MissingExtraError, NonFiniteError, RankWarning
from curvopt.diagnostics import Probe, ProbeWarning, Table
from tests.reference import dense_gradient, dense_hessian

D = torch.float64
EVERYTHING = (
    *("eigenvalues", "sharpness", "alignment", "rates", "displacement", "localization"),
    *("batch_sharpness", "preconditioned", "energy", "trace"),
)


def blobs(n=48, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(3, (n,), generator=generator)
    x = torch.randn(n, 4, generator=generator, dtype=D) + torch.eye(3, 4, dtype=D)[y] * 2
    return x.to(dtype), y


def network(kind="plain"):
    torch.manual_seed(5)
    middle = {"plain": [], "dropout": [nn.Dropout(0.3)], "batchnorm": [nn.BatchNorm1d(8)]}[kind]
    return nn.Sequential(nn.Linear(4, 8), *middle, nn.Tanh(), nn.Linear(8, 3))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True),
}


def run(kind, make, probed, *, steps=8, closure=False, **options):
    """Train over a shuffling loader; everything that a run leaves behind."""
    model, loss_fn = network(kind), nn.CrossEntropyLoss()
    x, y = blobs()
    optimizer = make(model.parameters())
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    probe = None
    if probed:
        curvature = curvopt.Hessian(model, loss_fn, (x, y))
        measure = [m for m in EVERYTHING if m != "preconditioned" or "eps" in optimizer.defaults]
        probe = Probe(curvature, optimizer, every=3, batches=loader, measure=measure, **options)
    losses, batches = [], iter(())
    for _ in range(steps):
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)

        def compute(batch=batch):
            optimizer.zero_grad()
            loss = loss_fn(model(batch[0]), batch[1])
            loss.backward()
            losses.append(loss.item())
            return loss

        if closure:
            optimizer.step(compute)
        else:
            compute()
            optimizer.step()
    state = {"losses": torch.tensor(losses, dtype=D), "rng": torch.get_rng_state(), "py": random.getstate()[1]}
    state["np"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    state |= {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"grad.{n}": p.grad for n, p in model.named_parameters()}
    for i, entry in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{i}.{k}": v for k, v in entry.items() if isinstance(v, torch.Tensor)}
    state["training"] = tuple(m.training for m in model.modules())
    return state, probe


@pytest.mark.filterwarnings("ignore::curvopt._errors.CurvatureModeWarning")
@pytest.mark.parametrize("closure", [False, True], ids=["backward", "closure"])
@pytest.mark.parametrize("kind", ["plain", "dropout", "batchnorm"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_probed_run_is_bit_identical_to_an_unprobed_one(name, kind, closure):
    plain, _ = run(kind, OPTIMIZERS[name], False, closure=closure)
    probed, probe = run(kind, OPTIMIZERS[name], True, closure=closure)
    assert plain.keys() == probed.keys()
    for key, value in plain.items():
        same = torch.equal(value, probed[key]) if isinstance(value, torch.Tensor) else value == probed[key]
        assert same, key
    table = probe.table()
    assert table["step"].tolist() == [0, 3, 6] and not any(table["note"])
    assert np.isfinite(table["chi_update"]).all() and np.isfinite(table["chi_minibatch"]).all()


def test_curvature_data_from_the_training_loader_itself():
    finals = []
    for probed in (False, True):
        model, x, y, loss_fn, optimizer = double_world()
        loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
        torch.manual_seed(4)
        probe = Probe(curvopt.Hessian(model, loss_fn, loader), optimizer, 4, rank=2) if probed else None
        for _ in range(2):
            for a, b in loader:
                optimizer.zero_grad()
                loss_fn(model(a), b).backward()
                optimizer.step()
        finals.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*finals) and probe.table()["step"].tolist() == [0, 4, 8]
    state = loss_fn(model(x), y).item()
    assert probe.view.loss().item() == pytest.approx(state), "every example once, read once for the whole run"


def test_an_optimizer_that_calls_its_closure_many_times():
    finals = []
    for probed in (False, True):
        model, x, y, loss_fn, _ = double_world()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
        probe = Probe(curvopt.Hessian(model, loss_fn, (x, y)), optimizer, 1) if probed else None

        def closure(model=model, optimizer=optimizer, x=x, y=y, loss_fn=loss_fn):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        finals.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*finals) and len(probe.table()) == 3
    assert np.isfinite(probe.table()["chi_update"]).all()


def test_a_probe_of_the_gauss_newton_matrix_and_of_columns_of_ones_own():
    model, x, y, loss_fn, optimizer = double_world()
    found = []

    def extra(probe):
        report = curvopt.diagnostics.outliers(probe.view, veto=False)
        found.append(report.count)
        return {"outliers": report.count}

    curvature = curvopt.GGN(model, loss_fn, (x, y))
    probe = Probe(curvature, optimizer, 2, rank=2, tol=1e-8, extra=extra)
    G = curvature.to_dense()
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    table = probe.table()
    assert table["lambda/1"][0] == pytest.approx(float(torch.linalg.eigvalsh(G)[-1]), rel=1e-9)
    np.testing.assert_equal(table["outliers"], np.array([math.nan if c is None else c for c in found]))
    assert (table["products"] > 67).all(), "the dense decomposition of the extra column is counted"


@pytest.mark.parametrize("wrapped", [False, True], ids=["BulkSGD", "SubspaceScaled"])
@pytest.mark.filterwarnings("ignore::curvopt._errors.CurvoptWarning")
def test_our_own_optimizers_are_left_alone_too(wrapped):
    def make(params):
        model = network()
        params = list(params)
        del model
        if wrapped:
            return torch.optim.Adam(params, lr=1e-2)
        return torch.optim.SGD(params, lr=0.1)

    finals = []
    for probed in (False, True):
        model, loss_fn = network(), nn.CrossEntropyLoss()
        x, y = blobs()
        curvature = curvopt.Hessian(model, loss_fn, (x, y))
        base = make(model.parameters())
        if wrapped:
            optimizer = curvopt.SubspaceScaled(base, curvature=curvature, rank=2, dominant=0.5, refresh_every=2)
        else:
            optimizer = curvopt.BulkSGD(model.parameters(), lr=0.1, curvature=curvature, rank=2, refresh_every=2)
        probe = Probe(curvature, optimizer, every=2) if probed else None
        for _ in range(6):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        finals.append((torch.cat([p.detach().reshape(-1) for p in model.parameters()]), optimizer.stats()["matvecs"]))
        assert probe is None or len(probe.table()) == 3
    assert torch.equal(finals[0][0], finals[1][0])
    assert finals[0][1] == finals[1][1], "the probe's products are counted on its own view"


def double_world(lr=0.1, optimizer=torch.optim.SGD, **options):
    model = network().double()
    x, y = blobs(dtype=D)
    loss_fn = nn.CrossEntropyLoss()
    return model, x, y, loss_fn, optimizer(model.parameters(), lr=lr, **options)


def test_every_column_against_dense_matrices():
    model, x, y, loss_fn, optimizer = double_world()
    curvature = curvopt.Hessian(model, loss_fn, (x, y))
    batches = [(x[:8], y[:8]), (x[8:24], y[8:24])]
    names = [m for m in EVERYTHING if m != "preconditioned"]
    probe = Probe(curvature, optimizer, rank=3, every=1, tol=1e-10, measure=names, batches=batches)
    H = dense_hessian(model, loss_fn, (x, y))
    g, gb = dense_gradient(model, loss_fn, (x, y)), dense_gradient(model, loss_fn, batches[0])
    sharp = []
    for batch in batches:
        slope = dense_gradient(model, loss_fn, batch)
        sharp.append(float(slope @ dense_hessian(model, loss_fn, batch) @ slope / (slope @ slope)))
    loss = loss_fn(model(x), y).item()
    optimizer.zero_grad()
    loss_fn(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    (row,) = probe.table()
    values, vectors = torch.linalg.eigh(H)
    V = vectors[:, -3:].flip(1)

    def chi(u):
        return float((V.T @ u).norm() / u.norm())

    wanted = {
        "loss": loss,
        "lambda/1": float(values[-1]),
        "lambda/3": float(values[-3]),
        "gap": float(values[-3] / values[-4]),
        "sharpness": float(values[-1]),
        "sharpness_over_loss": float(values[-1]) / loss,
        "threshold": 20.0,
        "sharpness_ratio": float(values[-1]) / 20,
        "chi_full": chi(g),
        "chi_minibatch": chi(gb),
        "chi_noise": chi(gb - g),
        "chi_update": chi(gb),  # plain SGD moves along the mini-batch gradient
        "chi_null": math.sqrt(3 / len(g)),
        "gradient_norm": float(g.norm()),
        "update_norm": 0.1 * float(gb.norm()),
        "rate_dominant": 0.1 * float((V.T @ gb) @ (V.T @ g) / (V.T @ g).square().sum()),
        "rate_bulk": 0.1 * float((gb @ g - (V.T @ gb) @ (V.T @ g)) / (g @ g - (V.T @ g).square().sum())),
        "ipr/1": float(V[:, 0].pow(4).sum()),
        "ipr_mean": float(V.pow(4).sum(0).mean()),
        "batch_sharpness": sum(sharp) / 2,
        "energy/hessian_trace": float(values[-3:].sum() / values.sum()),
        "energy/hessian_frobenius": float(values[-3:].square().sum() / values.square().sum()),
    }
    for name, value in wanted.items():
        assert row[name] == pytest.approx(value, rel=1e-6), name  # eigenvectors to 1e-10 in residual, gaps above 1e-3
    assert abs(row["trace"] - float(values.sum())) <= 4 * row["trace_error"] + 1e-9
    assert row["converged"] == 1 and row["residual"] <= 1e-10
    assert math.isnan(row["overlap_last"])
    assert row["step"] == 0 and row["products"] == probe.cost.products > 0


def test_preconditioned_sharpness_of_adam_in_a_run():
    model, x, y, loss_fn, optimizer = double_world(1e-2, torch.optim.Adam)
    curvature = curvopt.Hessian(model, loss_fn, (x, y))
    probe = Probe(curvature, optimizer, rank=2, every=[0, 4], tol=1e-8, measure=["preconditioned", "sharpness"])
    for step in range(5):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        if step == 4:
            H = dense_hessian(model, loss_fn, (x, y))
            v = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in model.parameters()])
            d = (v / (1 - 0.999**4)).sqrt() + 1e-8
        optimizer.step()
    table = probe.table()
    wanted = torch.linalg.eigvalsh(H / (d[:, None] * d[None]).sqrt())[-1]
    assert math.isnan(table["preconditioned_sharpness"][0])
    assert table["preconditioned_sharpness"][1] == pytest.approx(float(wanted), rel=1e-6)
    assert table["preconditioned_ratio"][1] == pytest.approx(float(wanted) / (38 / 1e-2), rel=1e-6)
    assert "threshold" not in table.columns, "Adam has no threshold for the plain sharpness"


def test_effective_rates_of_full_batch_gradient_descent_are_the_learning_rate():
    model, x, y, loss_fn, optimizer = double_world(0.07)
    probe = Probe(curvopt.Hessian(model, loss_fn, (x, y)), optimizer, every=2)
    for _ in range(4):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    for name in ("rate_dominant", "rate_bulk", "rate_whole"):
        np.testing.assert_allclose(probe.table()[name], 0.07, rtol=1e-9)
    assert (probe.table()["chi_noise"] != probe.table()["chi_noise"]).all(), "no noise, no share of it"


def short_run(**options):
    model, x, y, loss_fn, optimizer = double_world(0.1, torch.optim.SGD, momentum=0.9)
    probe = Probe(curvopt.Hessian(model, loss_fn, (x, y)), optimizer, every=2, **options)
    return model, x, y, loss_fn, optimizer, probe


def advance(model, x, y, loss_fn, optimizer, probe, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        part = slice(probe.step % 3, None, 3)
        loss_fn(model(x[part]), y[part]).backward()
        optimizer.step()


def without_times(table):
    return [{k: v for k, v in row.items() if k not in table.times} for row in table]


@pytest.mark.parametrize("keep", [False, True])
def test_a_resumed_probe_continues_bit_for_bit(keep, tmp_path):
    first = short_run(keep=keep)
    advance(*first, 5)
    torch.save([first[i].state_dict() for i in (0, 4, 5)], tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = short_run(keep=keep)
    for part, state in zip((second[0], second[4], second[5]), saved, strict=True):
        part.load_state_dict(state)
    reference = short_run(keep=keep)
    advance(*reference, 8)
    advance(*second, 3)
    one, other = without_times(reference[5].table()), without_times(second[5].table())
    np.testing.assert_equal(one, other)
    assert second[5].cost.products == reference[5].cost.products
    assert second[5].displacement.steps == reference[5].displacement.steps == ([0, 2, 4, 6] if keep else [0, 6])


def test_the_cost_is_counted_and_capped():
    model, x, y, loss_fn, optimizer = double_world()
    curvature = curvopt.Hessian(model, loss_fn, (x, y))
    before = curvature.matvecs
    probe = Probe(curvature, optimizer, every=1, rank=2, max_matvecs=12, max_products=30, measure=["eigenvalues"])
    with pytest.warns(ProbeWarning, match="budget is spent at step [23].*of max_products=30"):
        for _ in range(8):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    table = probe.table()
    assert probe.planned_products == 12
    assert table["products"].max() <= 12 and table["products"].sum() == probe.cost.products <= 30
    assert probe.cost.measurements == len(table) in (2, 3) and probe.step == 8
    assert probe.cost.gradient_equivalents == probe.cost.gradients + 2 * probe.cost.products
    assert curvature.matvecs == before
    assert table.times == ("seconds",) and (table["seconds"] > 0).all()


def test_the_plan_bounds_what_is_spent():
    _, probe = run("plain", OPTIMIZERS["adam"], True)
    assert probe.table()["products"].max() <= probe.planned_products


def test_full_memory_ends_the_keeping_not_the_run():
    *world, probe = short_run(rank=2, keep=True)
    probe.displacement.max_bytes = 2 * 67 * 2 * 4
    with pytest.warns(ProbeWarning, match="no eigenvectors are kept from step 4 on: 1072 bytes are full"):
        advance(*world, probe, 8)
    assert probe.displacement.steps[0] == 0 and len(probe.table()) == 4
    assert probe.table()["lag_last"].tolist()[1:] == [2, 2, 2]


def test_schedules_and_detaching():
    model, x, y, loss_fn, optimizer = double_world()
    curvature = curvopt.Hessian(model, loss_fn, (x, y))
    probes = [
        Probe(curvature, optimizer, every, measure=["eigenvalues"], rank=2)
        for every in (3, [1, 4], lambda step: step == 2)
    ]
    extra = Probe(curvature, optimizer, 2, rank=2, measure=[], extra=lambda p: {"twice": 2 * p.step, "k": p.rank})

    def go(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()

    with extra:
        go(5)
    go(2)
    assert [p.table()["step"].tolist() for p in probes] == [[0, 3, 6], [1, 4], [2]]
    assert extra.table()["twice"].tolist() == [0, 4, 8] and extra.step == 5
    assert set(extra.table().columns) == {"step", "note", "loss", "twice", "k", "products", "gradients", "seconds"}


def test_a_loop_that_ends_in_nan_is_recorded_not_ended():
    model, x, y, loss_fn, optimizer = double_world()
    probe = Probe(curvopt.Hessian(model, loss_fn, (x, y)), optimizer, every=1, rank=2)
    with pytest.warns(ProbeWarning, match="the probe measured nothing at step 1"):
        for step in range(2):
            if step == 1:
                nn.init.constant_(model[0].weight, math.nan)
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    table = probe.table()
    assert table["note"][0] == "" and "NaN" in table["note"][1] and math.isnan(table["lambda/1"][1])


def test_several_learning_rates_have_a_common_ratio():
    model, x, y, loss_fn, _ = double_world()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.4}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    probe = Probe(curvopt.Hessian(model, loss_fn, (x, y)), optimizer, every=1, tol=1e-8, rank=2)
    H = dense_hessian(model, loss_fn, (x, y))
    rates = torch.cat([torch.full((p.numel(),), g["lr"], dtype=D) for g in groups for p in g["params"]])
    rates = torch.cat([torch.full((40,), 0.1, dtype=D), torch.full((27,), 0.4, dtype=D)])
    loss_fn(model(x), y).backward()
    optimizer.step()
    (row,) = probe.table()
    wanted = torch.linalg.eigvalsh((rates[:, None] * rates[None]).sqrt() * H)[-1] / 2
    assert row["sharpness_ratio"] == pytest.approx(float(wanted), rel=1e-6)
    assert row["threshold"] == pytest.approx(row["sharpness"] / float(wanted), rel=1e-6)


# ---- logging and tables
def test_records_go_to_a_function():
    seen = []
    model, x, y, loss_fn, optimizer = double_world()
    curvature = curvopt.Hessian(model, loss_fn, (x, y))
    probe = Probe(curvature, optimizer, 1, rank=2, log=lambda record, step: seen.append((step, dict(record))))
    loss_fn(model(x), y).backward()
    optimizer.step()
    assert (
        seen == [(0, probe.table()._rows[0])] or seen[0][0] == 0 and seen[0][1].keys() == probe.table()._rows[0].keys()
    )


@pytest.mark.parametrize("every", [2, 1], ids=["slower", "as-fast"])
@pytest.mark.parametrize("explicit", [True, False], ids=["own-steps", "counted"])
def test_records_go_to_wandb_without_moving_the_users_steps(tmp_path, every, explicit):
    history, table = wandb_run(tmp_path, every, explicit, user_every=1)
    assert [row["step"] for row in history if "train/loss" in row] == [0, 1, 2, 3, 4]
    check_history(history, table)


def test_records_that_come_faster_than_the_users_own_wait(tmp_path):
    history, table = wandb_run(tmp_path, 1, True, user_every=3)
    assert [row["step"] for row in history if "train/loss" in row] == [0, 1]  # the user counts in epochs here
    check_history(history, table)


def wandb_run(folder, every, explicit, user_every):
    import wandb

    from benchmarks.sinks.wandb_reader import holds_exit, read_run

    own = wandb.init(mode="offline", dir=str(folder), project="probe", reinit="finish_previous")
    try:
        model, x, y, loss_fn, optimizer = double_world()
        probe = Probe(curvopt.Hessian(model, loss_fn, (x, y)), optimizer, every, rank=2, log="wandb")
        for step in range(5):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            if step % user_every == 0:
                own.log({"train/loss": loss.item()}, step=step // user_every if explicit else None)
        probe.detach()
    finally:
        own.finish()
    file = next(folder.rglob("*.wandb"))
    deadline = time.monotonic() + 60  # another process writes the file
    while not holds_exit(file) and time.monotonic() < deadline:
        time.sleep(0.05)
    return read_run(file).history, probe.table()


def check_history(history, table):
    logged = {int(row["curvature/step"]): row for row in history if "curvature/step" in row}
    assert sorted(logged) == table["step"].tolist()
    for row in table:
        assert logged[row["step"]]["curvature/lambda/1"] == row["lambda/1"]


def test_tables(tmp_path):
    table = Table([{"step": 0, "a": 1.5, "w": "x"}, {"step": 2, "a": math.nan, "b": 0.1, "w": "y"}], times=("b", "z"))
    assert len(table) == 2 and table.columns == ("step", "a", "w", "b") and table.times == ("b",)
    assert table["step"].dtype == np.int64 and table["a"][0] == 1.5 and np.isnan(table["b"][0])
    assert table["w"].tolist() == ["x", "y"] and next(iter(table))["step"] == 0
    assert repr(table) == "Table(2 rows: step, a, w, b)"
    frame = table.to_pandas()
    assert list(frame.columns) == list(table.columns) and frame["b"].tolist()[1] == 0.1
    lines = table.to_csv(tmp_path / "deep" / "t.csv").read_text().splitlines()
    assert lines == ["step,a,w,b", "0,1.5,x,", "2,,y,0.1"]
    with pytest.raises(KeyError, match="there is no column 'c'; columns: step, a, w, b"):
        table["c"]


def test_without_the_extras(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"curvopt-torch\[plots\]"):
        Table([{"a": 1}]).to_pandas()
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    model, x, y, loss_fn, optimizer = double_world()
    with pytest.raises(MissingExtraError, match=r"curvopt-torch\[wandb\]"):
        Probe(curvopt.Hessian(model, loss_fn, (x, y)), optimizer, log="wandb")


# ---- errors before any long work
def bad_cases():
    model, x, y, loss_fn, optimizer = double_world()
    H = curvopt.Hessian(model, loss_fn, (x, y))
    other = torch.optim.SGD(network().parameters(), lr=0.1)
    wide = curvopt.Hessian(model, lambda o, t: nn.functional.cross_entropy(o, t, reduction="none"), (x, y), check=False)
    empty = curvopt.Hessian(model, loss_fn, DataLoader(TensorDataset(x[:0], y[:0])), check=False)
    return {
        "k": (dict(curvature=H, optimizer=optimizer, rank=68), ValueError, "rank=68 is larger than the model.*67"),
        "k0": (dict(curvature=H, optimizer=optimizer, rank=0), ValueError, "rank must be at least 1"),
        "kind": (dict(curvature=H, optimizer=optimizer, rank=2.0), TypeError, "rank must be a whole number"),
        "operator": (dict(curvature=model, optimizer=optimizer), TypeError, "curvature must be a Hessian.*Sequential"),
        "optimizer": (dict(curvature=H, optimizer=model), TypeError, "optimizer must be a torch.optim.Optimizer"),
        "params": (dict(curvature=H, optimizer=other), ValueError, "parameter '0.weight' is not among the optimizer's"),
        "empty": (dict(curvature=empty, optimizer=optimizer, rank=2), EmptyDataError, "gave no batch"),
        "scalar": (dict(curvature=wide, optimizer=optimizer, rank=2), ValueError, r"shape \(48,\), expected a scalar"),
        "measure": (dict(curvature=H, optimizer=optimizer, measure=["hessian"]), ValueError, "measure holds 'hessian'"),
        "batches": (
            dict(curvature=H, optimizer=optimizer, measure="batch_sharpness"),
            ValueError,
            "needs batches=",
        ),
        "none": (
            dict(curvature=H, optimizer=optimizer, measure="batch_sharpness", batches=[]),
            EmptyDataError,
            "empty list",
        ),
        "moments": (
            dict(curvature=H, optimizer=optimizer, measure="preconditioned"),
            ValueError,
            "needs an optimizer with second moments.*got SGD",
        ),
        "every": (dict(curvature=H, optimizer=optimizer, every=0), ValueError, "every must be at least 1"),
        "every-bool": (dict(curvature=H, optimizer=optimizer, every=True), TypeError, "every must be a number"),
        "every-none": (dict(curvature=H, optimizer=optimizer, every=[]), ValueError, "at least one step"),
        "cap": (dict(curvature=H, optimizer=optimizer, rank=5, max_matvecs=4), ValueError, "below rank=5"),
        "budget": (
            dict(curvature=H, optimizer=optimizer, rank=5, max_products=9),
            ValueError,
            "max_products=9 does not cover one measurement, which may take 100",
        ),
        "log": (dict(curvature=H, optimizer=optimizer, log="tensorboard"), ValueError, "log must be 'wandb'"),
        "log-kind": (dict(curvature=H, optimizer=optimizer, log=3), TypeError, "log must be 'wandb'.*got int"),
        "log-run": (dict(curvature=H, optimizer=optimizer, log="wandb"), ValueError, "call wandb.init"),
    }


@pytest.mark.parametrize("name", list(bad_cases()))
def test_bad_input_is_refused_before_any_product(name):
    arguments, kind, text = bad_cases()[name]
    with pytest.raises(kind, match=text):
        Probe(**arguments)
    optimizer = arguments["optimizer"]
    if isinstance(optimizer, torch.optim.Optimizer):
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert getattr(arguments["curvature"], "matvecs", 0) == 0


def test_nan_weights_at_the_start():
    model, x, y, loss_fn, optimizer = double_world()
    curvature = curvopt.Hessian(model, loss_fn, (x, y))
    nn.init.constant_(model[0].weight, math.nan)
    with pytest.raises(NonFiniteError, match="nan before the first step"):
        Probe(curvature, optimizer)


def test_a_state_of_another_rank_or_model():
    *_, probe = short_run(rank=2)
    model, x, y, loss_fn, optimizer = double_world()
    other = Probe(curvopt.Hessian(model, loss_fn, (x, y)), optimizer, rank=3)
    with pytest.raises(ValueError, match="has rank=2, this one rank=3"):
        other.load_state_dict(probe.state_dict())
    *world, probe = short_run(rank=3)
    advance(*world, probe, 1)
    small = nn.Linear(4, 3).double()
    last = Probe(curvopt.Hessian(small, loss_fn, (x, y)), torch.optim.SGD(small.parameters(), lr=0.1), rank=3)
    with pytest.raises(ValueError, match="67 entries, this model has 15 parameters.*another architecture"):
        last.load_state_dict(probe.state_dict())


def test_a_loss_that_tells_no_rank():
    model, x, y, _, optimizer = double_world()
    curvature = curvopt.Hessian(model, lambda o, t: nn.functional.cross_entropy(o, t) * 2, (x, y))
    with pytest.warns(RankWarning, match="rank=10 is taken; give rank="):
        probe = Probe(curvature, optimizer)
    assert probe.rank == 10
