"""The step between refreshes, a whole run, memory and host synchronisations."""

from __future__ import annotations

import math
import statistics
import warnings
from functools import partial
from typing import Any

import torch

import curvopt
from benchmarks.perf.lab import EXACT_STEP, Lab, gradient
from benchmarks.perf.memory import peak_bytes
from benchmarks.perf.operations import Operations
from benchmarks.perf.problems import order
from benchmarks.perf.record import OURS, Figure, Row
from curvopt.curvature.routes import timed
from curvopt.optim import rules


def projection(lab: Lab) -> list[Row]:
    """Projecting an update onto a cached basis of ten vectors at P = 1e7, against reading the basis twice."""
    lab.say("projection, P = 1e7")
    sizes = (3000 * 2000, 2000 * 1500, 1000 * 1000)
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator).to(lab.device) for n in sizes]
    basis = [torch.randn(10, n, generator=generator).to(lab.device) for n in sizes]
    basis = [b / math.sqrt(sum(sizes)) for b in basis]
    update = [torch.randn(n, generator=generator).to(lab.device) for n in sizes]

    def twice() -> None:  # the bound: a pass that only reads, two times
        for _ in range(2):
            for b in basis:
                b.sum()

    def ours() -> None:
        c = rules.coefficients(basis, update)
        for p, b in zip(params, basis, strict=True):
            rules.add_combination_(p, b, c)

    def plain() -> None:
        flat = torch.cat(update)
        rows = torch.cat(basis, dim=1)
        torch.cat(params).sub_(rows.T @ (rows @ flat))

    known = rules.coefficients(basis, update)

    def second() -> None:
        for p, b in zip(params, basis, strict=True):
            rules.add_combination_(p, b, known)

    parts = {
        "of it: inner products": lambda: rules.coefficients(basis, update),
        "of it: subtracting the combination": second,
    }
    timing = lab.times(twice, {OURS: ours, "flat vectors, joined at each step": plain, **parts})
    before = [p.clone() for p in params]
    ours()
    exact = torch.stack([b.double() @ u.double() for b, u in zip(basis, update, strict=True)]).sum(0)
    error = max(
        float(((p - old).double() - exact @ b.double()).norm() / (exact @ b.double()).norm())
        for p, old, b in zip(params, before, basis, strict=True)
    )
    row = Row("projection of a step at P = 1e7, k = 10", "three tensors", "readings of the basis, two", 1.35)
    row.figures = [
        Figure(
            n,
            t.ratio,
            (t.low, t.high),
            error < 1e-4 if n == OURS else None,
            f"error {error:.0e}" if n == OURS else "",
            counts=n not in parts,
        )
        for n, t in timing.items()
    ]
    row.note = (
        "Bound: two passes read 2 k P numbers, the update P, and read and write the parameters, 2 P: (2 k + 3) / 2 k = "
        f"{23 / 20:.2f} at the rate of a pass that only reads. The rest is BLAS's matrix-vector product, which reads k "
        "rows side by side and slower than a sum reads one after the other; cutting the rows into pieces that fit the cache "
        "made it slower still."
    )
    return [row]


def auto_run(lab: Lab) -> list[Row]:
    """A whole run with ``refresh_every="auto"``, ``overhead=0.1``: the share of refreshes after the first."""
    out = []
    for batch, steps in ((500, 1500), (50, 2000)):
        lab.say(f"a run with refresh_every='auto', mlp, batch {batch}")
        t = lab.trained("mlp")
        model = t.at(0).train()
        curvature = curvopt.Hessian(model, t.loss_fn, t.curvature_batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt = curvopt.BulkSGD(model.parameters(), lr=0.05, curvature=curvature, rank=9)
            first: dict[str, float] = {}
            for index in order(batch, steps):
                x, y = t.rows(index)
                opt.zero_grad()
                t.loss_fn(model(x), y).backward()
                opt.step()
                first = first or opt.stats()
        stats = opt.stats()
        refresh = stats["seconds_refresh"] - first["seconds_refresh"]
        share = refresh / (stats["seconds_total"] - first["seconds_refresh"])
        said = [str(w.message) for w in caught if issubclass(w.category, curvopt.OverheadWarning)]
        row = Row("refreshes' share of a run after the first, overhead=0.1", f"mlp, batch {batch}", "share", 0.1)
        words = f"{stats['refreshes']:.0f} refreshes in {steps} steps, projection {stats['share_projection']:.0%}"
        row.figures = [Figure(OURS, share, evidence=words + (f"; said: {said[0]}" if said else ""))]
        out.append(row)
    return out


def _refresh_bytes(lab: Lab, name: str, rank: int) -> list[Row]:
    """What a basis and the refreshes of one problem take, against what is stated beforehand."""
    t = lab.trained(name)
    model = t.at(EXACT_STEP)
    curvature = curvopt.Hessian(model, t.loss_fn, t.curvature_batch)
    opt = curvopt.BulkSGD(model.parameters(), lr=0.05, curvature=curvature, rank=rank)
    stated = opt.cost(dry_run=True)
    assert opt.subspace is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cold, _ = peak_bytes(opt.refresh, lab.device)
        warm, left = peak_bytes(opt.refresh, lab.device)
    vector = opt.subspace.parameters.total * 4
    kept = sum(b.numel() * b.element_size() for b in (*opt.subspace.blocks, *opt.subspace.probes))
    problem = f"{name} k = {rank}"
    basis = Row("memory of the cached basis and its probe", problem, "(k + 1) P float32", 1.0)
    basis.figures = [
        Figure(OURS, kept / ((rank + 1) * vector), evidence=f"{left / vector:.2f} vectors left after a refresh")
    ]
    rows = [basis]
    for what, taken, said in (("first", cold, stated.first_work_bytes), ("later", warm, stated.work_bytes)):
        row = Row(f"peak of a {what} refresh", problem, "of the stated bytes", 1.0)
        row.figures = [Figure(OURS, taken / said, evidence=f"{taken / 2**20:.1f} MiB, stated {said / 2**20:.1f}")]
        rows.append(row)
    return rows


def memory(lab: Lab) -> list[Row]:
    """Bytes of the basis, of a refresh and of a product, against what is stated beforehand."""
    lab.say("memory, mlp and gpt")
    rows = [row for name in ("mlp", "gpt") for row in _refresh_bytes(lab, name, 10)]  # no gap: the dearest way
    g = lab.trained("gpt")
    model, batch, loss = g.at(EXACT_STEP), g.curvature_batch, g.loss_fn
    v = lab.vectors(sum(p.numel() for p in model.parameters()), 1)[0]
    plain, _ = peak_bytes(gradient(model, loss, batch), lab.device)
    operator = curvopt.Hessian(model, loss, batch, check=False)
    ours, after = peak_bytes(lambda: operator @ v, lab.device)
    row = Row("bytes of a product beyond those of a gradient", "gpt", "MiB")
    row.figures = [Figure(OURS, (ours - plain) / 2**20, evidence=f"{after / 2**20:.2f} MiB left")]
    if "arpack" in lab.peers:
        hand, _ = peak_bytes(lambda: lab.peers["arpack"].hessian(model, loss, batch)(v), lab.device)
        row.figures.append(Figure("by hand, graph kept", (hand - plain) / 2**20))
        row.target = (hand - plain) / 2**20
    return [*rows, row]


def _seconds_of_a_look(rounds: int) -> float:
    """What the solver thinks about between two products, k = 10 in a basis that grows to 60 rows; median."""
    operator = curvopt.curvature.DiagonalOperator(torch.linspace(1, 0, 1000))

    def solve(every: int) -> float:
        settings: dict[str, Any] = {"tol": 0.0, "guard": 0, "max_matvecs": 60, "max_basis": 64, "look_every": every}
        return timed(lambda: curvopt.eigsh(operator, 10, **settings), torch.device("cpu"))

    solve(1)
    return statistics.median(solve(1) - solve(60) for _ in range(rounds)) / 50  # looks begin with the tenth row


def host_reads(lab: Lab) -> list[Row]:
    """Numbers read by the host in a cold solution, and what looking less often would cost in products."""
    lab.say("host reads")
    t = lab.trained("mlp")
    operator = curvopt.Hessian(t.at(EXACT_STEP), t.loss_fn, t.curvature_batch, check=False)
    with Operations() as counted:
        found = curvopt.eigsh(operator, 10, tol=1e-3, guard=0)
    reads = counted.host_reads
    row = Row("numbers read by the host in a cold top ten", "mlp", "reads a product")
    words = f"{reads} in {found.matvecs} products and {found.restarts} restarts"
    row.figures = [Figure(OURS, reads / found.matvecs, evidence=words)]
    looks = Row("products by how often the solver looks (once a basis is one look a restart)", "mlp", "products")
    known = curvopt.eigsh(operator, 20, tol=1e-3, guard=0).eigenvectors
    noise = lab.vectors(operator.shape[0], 20).T / operator.shape[0] ** 0.5
    ranks, moves = (4, 10, 20), (0.1, 0.2, 0.3, 0.4, 0.5)
    policies = {"1": lambda k: 1, "max(2, k // 4)": lambda k: max(2, k // 4), "once a basis": lambda k: 10**6}
    for name, policy in policies.items():
        cold, warm = 0, 0.0
        for k in ranks:
            solved = partial(curvopt.eigsh, operator, k, tol=1e-3, look_every=policy(k))
            cold += solved().matvecs
            for move in moves:
                warm += solved(v0=known[:, :k] + move * noise[:, :k], guard=0).matvecs / len(moves)
        words = f"k = 4, 10 and 20 together: cold with the guard {cold}, from bases that moved {warm:.0f}"
        looks.figures.append(Figure(name, float(cold), evidence=words, counts=False))
    looks.note = (
        "On the CPU, where looking is free, the solver looks after each product. On CUDA it looks every max(2, k // 4) products "
        "of a cold refresh and after each of warm chains, where a look chooses the next direction; a power step has two "
        "looks in all. That is more than one a restart: one a restart takes the products above, each of which takes more "
        f"than a gradient, and a look takes {1e3 * _seconds_of_a_look(max(lab.rounds, 5)):.2f} ms of the host (k = 10, bases "
        "of 10 to 60 rows) and the way of some numbers there. No time of it was measured on a device."
    )
    return [row, looks]
