"""How a refresh finds its basis (cold, power step, Lanczos), and when policies ask for one."""

import math
import warnings
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvopt._errors import GapWarning, NonFiniteError, RefreshWarning
from curvopt._params import ParameterLayout
from curvopt.curvature.dense import PlantedSpectrum
from curvopt.subspace import DominantSubspace
from curvopt.subspace.refresh import Auto, Every, Frozen, RefreshState, policy
from curvopt.subspace.solve import Plan, Spectrum
from tests.quadratics import leading, rotation

SIZE = 400


@contextmanager
def _quiet():
    """Warnings are not the point there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def planted(leaders, size=SIZE, dtype=torch.float64, bulk=1.0, seed=0):
    """Leaders over a bulk that is spread evenly in [0, bulk], with a layout of three parameters."""
    values = torch.cat(
        [torch.tensor(leaders, dtype=torch.float64), torch.linspace(bulk, 0, size - len(leaders)).double()]
    )
    op = PlantedSpectrum(values.to(dtype), seed=seed)
    sizes = [size // 4, size // 4, size - 2 * (size // 4)]
    op.layout = ParameterLayout([torch.zeros(n, dtype=dtype) for n in sizes])
    return op


def overlap(basis, vectors):
    return float((vectors.double().T @ basis.double()).square().sum()) / vectors.shape[1]


def turn(op, angle, i, j):
    """Rotate two eigenvectors into each other, in place: ``op`` becomes the matrix of a later step."""
    before = op._rotate

    def rotated(rows, back):
        if not back:
            rows = before(rows, False).clone()
            a, b = rows[:, i].clone(), rows[:, j].clone()
            rows[:, i], rows[:, j] = (
                math.cos(angle) * a + math.sin(angle) * b,
                math.cos(angle) * b - math.sin(angle) * a,
            )
            return rows
        rows = rows.clone()
        a, b = rows[:, i].clone(), rows[:, j].clone()
        rows[:, i], rows[:, j] = math.cos(angle) * a - math.sin(angle) * b, math.cos(angle) * b + math.sin(angle) * a
        return before(rows, True)

    op._rotate = rotated


# ---- which route
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(), "image"),
        (dict(values=[]), "cold"),
        (dict(values=[9.0, 8.0]), "krylov"),  # fewer rows than wanted
        (dict(next_value=4.0), "image"),  # 5 / 4 is gap enough
        (dict(next_value=4.3), "krylov"),  # 5 / 4.3 is none for a power step
        (dict(next_residual=2.0), "krylov"),  # ... and 5 / (3 + 2) may be none
        (dict(next_value=-2.0, next_residual=0.0), "krylov"),  # the probe follows the negative end
        (dict(next_value=0.0), "image"),
        (dict(next_value=-1e-9), "image"),  # rounding of a zero
        (dict(has_probe=False), "krylov"),
        (dict(converged=False), "krylov"),  # values that are too low tell no gap
        (dict(max_matvecs=3), "krylov"),  # the k + 1 products of a power step do not fit
        (dict(size=3), "krylov"),  # no room for a probe
    ],
)
def test_route(change, expected):
    values = torch.tensor(change.get("values", [9.0, 8.0, 5.0]), dtype=torch.float64)
    spectrum = Spectrum(
        values,
        change.get("next_value", 3.0),
        change.get("next_residual", 0.1),
        change.get("has_probe", True),
        change.get("converged", True),
    )
    plan = Plan(3, 1e-2, change.get("max_matvecs", 32), 0)
    assert spectrum.route(plan, change.get("size", 100)) == expected


@given(
    k=st.integers(1, 12),
    extra=st.integers(0, 40),
    gap=st.floats(1, 3),
    following=st.floats(-1, 1),
    live=st.integers(0, 12),
)
def test_worst_case_never_passes_the_cap(k, extra, gap, following, live):
    plan = Plan(k, 1e-2, k + extra, 0)
    values = torch.full((min(live, k),), gap, dtype=torch.float64)
    worst = Spectrum(values, following, 0.0, True).worst_matvecs(plan, 100)
    assert k <= worst <= plan.max_matvecs
    assert plan.warm_matvecs <= plan.max_matvecs


def test_cold_then_image_at_a_gap():
    op = planted([10, 9, 8, 7, 6])
    s = DominantSubspace(op, 5)
    first = s.refresh()
    assert first.kind == "cold" and first.converged and math.isnan(first.overlap)
    assert first.guard_matvecs == 6
    turn(op, 0.2, 4, 30)
    second = s.refresh()
    assert (second.kind, second.matvecs, second.guard_matvecs) == ("image", 6, 0)
    # A power step shrinks the error along the other vector (value ~.93 of 6) by 6.4; twice by 41.
    assert 1 - overlap(s.basis, op.eigenvectors(list(range(5)))) < 1.2 * math.sin(0.2) ** 2 / 5 / 6.4**2 + 1e-4
    # ... so of the turn of sin(.2) the new basis has made 1 - 1 / 6.4.
    assert second.overlap == pytest.approx(1 - (math.sin(0.2) * (1 - 1 / 6.4)) ** 2 / 5, abs=2e-4)
    assert op.matvecs == s.matvecs == first.matvecs + 6


@pytest.mark.parametrize("seed", range(8))  # the random signs of the start must not decide
def test_krylov_where_there_is_no_gap(seed):
    op = planted([10, 9, 8, 7, 6, 5.5, 5.0])
    s = DominantSubspace(op, 5, tol=1e-3, seed=seed)
    with pytest.warns(GapWarning, match="rank=5 sits at no gap"):
        s.refresh()
    turn(op, 0.2, 2, 30)
    report = s.refresh()
    assert report.kind == "krylov"
    assert report.matvecs <= 11  # max(2k, k + 6)
    assert overlap(s.basis, op.eigenvectors(list(range(5)))) > 0.99


def test_image_that_is_not_enough_is_followed_by_lanczos_within_the_cap():
    op = planted([10, 9, 8, 7, 6])
    for cap in (40, 8):
        s = DominantSubspace(op, 5, max_matvecs=40)
        s.refresh()
        s.max_matvecs = cap
        # Leaders that are almost orthogonal to the old ones, and old ones that are no eigenvectors any more.
        other = planted([10, 9, 8, 7, 6], seed=1)
        other.spectrum = other.spectrum.roll(60)
        s.attach(other)
        with _quiet():
            report = s.refresh()
        assert report.matvecs <= cap
        assert report.kind == ("krylov" if cap == 40 else "image")
        if cap == 8:
            assert not report.converged
            assert (
                "not near enough for good, and of the 8 allowed too few are left for chains after it" in report.reason
            )
            s.max_matvecs = 40  # once there are products to spend, the chains come
            report = s.refresh()
            assert report.kind == "krylov"
            assert overlap(s.basis, other.eigenvectors(list(range(60, 65)))) > 0.95
        if cap == 40:
            assert overlap(s.basis, other.eigenvectors(list(range(60, 65)))) > 0.95


def test_products_never_pass_the_plan():
    op = planted([10, 9, 8, 7, 6, 4, 4, 4, 3])
    s = DominantSubspace(op, 5, max_matvecs=30)
    for step in range(12):
        planned = s.planned_matvecs
        turn(op, 0.3, step % 5, 20 + step)
        report = s.refresh()
        assert report.matvecs <= planned <= 30


# ---- following a matrix that changes
def test_a_drifting_spectrum_is_followed():
    # Each refresh finds two leaders turned by .1 rad towards the bulk, some 15 degrees a refresh in all.
    op = planted([10, 9, 8, 7, 6])
    s = DominantSubspace(op, 5)
    s.refresh()
    start = s.basis.clone()
    worst = 1.0
    for step in range(25):
        for i in range(5):
            turn(op, 0.1, i, 5 + 20 * i + step % 20)
        s.refresh()
        worst = min(worst, overlap(s.basis, op.eigenvectors(list(range(5)))))
    assert worst > 0.999
    assert overlap(start, op.eigenvectors(list(range(5)))) < 0.9  # it did drift
    assert s.eigenvalues.tolist() == pytest.approx([10, 9, 8, 7, 6], rel=1e-2)


@pytest.mark.parametrize("size", [400, 20_000])
def test_a_new_leader_outside_of_the_basis_is_found(size):
    # An eigenvector of the bulk gets the value 12, orthogonal to the whole basis: Rayleigh-Ritz on the old space cannot
    # see it; the probe grows by 12 against 11 .. 7 at each power step.
    op = planted([11, 10, 9, 8, 7], size=size)
    s = DominantSubspace(op, 5)
    s.refresh()
    op.spectrum[size - 7] = 12.0
    leaders = [size - 7, 0, 1, 2, 3]
    seen = []
    for _ in range(8):
        with _quiet():
            report = s.refresh()
        seen.append((report.kind, overlap(s.basis, op.eigenvectors(leaders))))
        if seen[-1][1] > 0.99:
            break
    assert seen[-1][1] > 0.99, seen
    assert len(seen) <= 6
    assert s.eigenvalues[0].item() > 11.5


def test_a_large_negative_value_does_not_take_the_basis_over():
    # |-30| is larger than all of them: a pure power iteration would turn to it.
    op = planted([10, 9, 8, 7, 6])
    op.spectrum[-1] = -30.0
    s = DominantSubspace(op, 5)
    s.refresh()
    for step in range(10):
        turn(op, 0.05, step % 5, 40 + step)
        s.refresh()
        assert overlap(s.basis, op.eigenvectors(list(range(5)))) > 0.995, step
        assert overlap(s.basis, op.eigenvectors([SIZE - 1])) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_cache(dtype):
    op = planted([10, 9, 8, 7, 6], dtype=torch.float32)
    s = DominantSubspace(op, 5, dtype=dtype)
    s.refresh()
    assert all(b.dtype == dtype for b in s.blocks) and s.basis.dtype == dtype
    for step in range(4):
        turn(op, 0.05, step, 50 + step)
        assert s.refresh().kind == "image"
        # Rounding of the cache: unit vectors to eps, so 1 - overlap of about eps^2 plus what the image leaves.
        assert overlap(s.basis, op.eigenvectors(list(range(5)))) > 0.998


@pytest.mark.parametrize("given", ["cache", "start"])
def test_a_power_step_under_autocast_is_exact(given):
    op = planted([10, 9, 8, 7, 6], dtype=torch.float32)
    s = DominantSubspace(op, 5, dtype=torch.bfloat16)
    start = op.eigenvectors(list(range(5))).float() + 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s.refresh(start=start if given == "start" else None)
        turn(op, 0.05, 0, 50)
        assert s.refresh().kind == "image"
    assert overlap(s.basis, op.eigenvectors(list(range(5)))) > 0.998


# ---- failing
class Failing(PlantedSpectrum):
    """Raises, or gives NaN, from the n-th product on."""

    at, how = 10**9, "raise"

    def _multiply(self, rows):
        if self.matvecs >= self.at:
            if self.how == "raise":
                raise RuntimeError("the data ran out")
            return rows * math.nan
        return super()._multiply(rows)


@pytest.mark.parametrize("how", ["raise", "nan"])
@pytest.mark.parametrize("after", [1, 5])
@pytest.mark.parametrize("gap", [True, False])
def test_a_failed_refresh_changes_nothing(how, after, gap):
    values = torch.cat([torch.tensor([10.0, 9, 8, 7, 6 if gap else 1.05]), torch.linspace(1, 0, 95)]).double()
    op = Failing(values)
    op.layout = ParameterLayout([torch.zeros(60, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)])
    s = DominantSubspace(op, 5)
    with _quiet():
        s.refresh()
    s.age = 3
    before = {key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in s.scalars().items()}
    blocks, probes, mass, spent = (
        [b.clone() for b in s.blocks],
        [p.clone() for p in s.probes],
        s.mass.clone(),
        s.matvecs,
    )
    op.at, op.how = op.matvecs + after, how
    with pytest.raises(RuntimeError if how == "raise" else NonFiniteError):
        s.refresh()
    for name, value in s.scalars().items():
        if name not in ("attempts", "matvecs"):
            same = torch.equal(torch.as_tensor(value), torch.as_tensor(before[name]))
            assert same or (name == "overlap" and math.isnan(value) and math.isnan(before[name])), name
    assert s.matvecs == op.matvecs > spent  # what was spent is counted
    assert all(map(torch.equal, s.blocks, blocks)) and all(map(torch.equal, s.probes, probes))
    assert torch.equal(s.mass, mass)
    op.at = 10**9
    with _quiet():
        assert s.refresh().kind in ("image", "krylov")
    assert overlap(s.basis, op.eigenvectors(list(range(5)))) > 0.99


def test_unconverged_refreshes_say_so():
    op = planted([1.02, 1.01])
    s = DominantSubspace(op, 4, max_matvecs=6, tol=1e-6)
    with pytest.warns(RefreshWarning, match=r"before every pair met tol=1e-06: .*Raise max_matvecs or tol"):
        report = s.refresh()
    assert not report.converged and s.ready
    assert report.matvecs <= 6
    with pytest.warns(RefreshWarning, match="a warm refresh stops there by design"):
        s.refresh()
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error", RefreshWarning)
        s.refresh()


# ---- policies
def states(**options):
    return RefreshState(**{"refreshes": 1, "cost_ratio": 1.0, **options})


@given(period=st.integers(1, 50), age=st.integers(0, 60), refreshes=st.integers(0, 3))
def test_every_counts_steps(period, age, refreshes):
    decision = Every(period).decide(RefreshState(refreshes=refreshes, age=age))
    assert decision == ("recompute" if refreshes == 0 else "refine" if age >= period else "keep")


@given(age=st.integers(0, 10**6), refreshes=st.integers(0, 3))
def test_frozen_computes_once(age, refreshes):
    assert Frozen().decide(RefreshState(refreshes=refreshes, age=age)) == ("keep" if refreshes else "recompute")


def test_auto_always_takes_the_first_refresh():
    assert Auto(1e-6).decide(RefreshState()) == "recompute"


def test_auto_waits_until_the_cost_is_known():
    assert Auto(0.1).decide(RefreshState(refreshes=1, age=10**6, later_steps=10**6)) == "keep"


@pytest.mark.parametrize(
    ("overlap", "interval", "expected"),
    [
        (0.999, 10, 20),
        (0.98, 10, 20),
        (0.95, 10, 10),
        (0.90, 10, 10),
        (0.89, 10, 5),
        (0.2, 1, 1),
        (0.999, 8000, 10_000),
        (math.nan, 10, 10),
    ],
)
def test_auto_doubles_and_halves_its_period(overlap, interval, expected):
    state = states(overlap=overlap, interval=interval)
    Auto().observe(state)
    assert state.interval == expected


@given(
    overhead=st.floats(0.01, 2.0),
    ratio=st.floats(0.1, 20.0),
    planned=st.integers(1, 60),
    data=st.data(),
)
def test_auto_never_passes_its_budget(overhead, ratio, planned, data):
    rule, state = Auto(overhead), RefreshState(refreshes=1, cost_ratio=ratio, planned_matvecs=planned)
    for _ in range(300):
        before = (state.interval, state.age)
        decision = rule.decide(state)
        assert (state.interval, state.age) == before  # deciding changes nothing
        if decision == "refine":
            assert state.age >= state.interval
            assert rule.budget(state) >= planned
            state.later_matvecs += data.draw(st.integers(1, rule.budget(state)))
            state.age = 0
            state.refreshes += 1
            state.overlap = data.draw(st.floats(0, 1))
            rule.observe(state)
            assert state.later_matvecs * ratio <= overhead * state.later_steps * (1 + 1e-12)
        state.age += 1
        state.later_steps += 1


def test_auto_refreshes_as_soon_as_both_period_and_budget_allow():
    rule = Auto(0.1)
    for step, expected in ((9, "keep"), (99, "keep"), (100, "refine")):
        assert rule.decide(states(age=step, later_steps=step, planned_matvecs=10)) == expected  # 10 * 1 <= .1 * 100
    for step, expected in ((9, "keep"), (10, "refine")):
        assert rule.decide(states(age=step, later_steps=step, planned_matvecs=1)) == expected  # the period of 10
    # what earlier refreshes did not use is there for the next
    assert rule.decide(states(age=10, later_steps=1000, later_matvecs=80, planned_matvecs=20)) == "refine"
    assert rule.decide(states(age=10, later_steps=1000, later_matvecs=81, planned_matvecs=20)) == "keep"


def test_names_of_policies():
    assert policy(7) == Every(7)
    assert policy("frozen") == Frozen()
    assert policy("auto", 0.3) == Auto(0.3)


@pytest.mark.parametrize(
    ("value", "overhead", "error", "text"),
    [
        (0, 0.1, ValueError, "refresh_every must be at least 1 step, got 0"),
        ("often", 0.1, ValueError, "refresh_every must be an int, 'auto' or 'frozen', got 'often'"),
        (2.5, 0.1, TypeError, "refresh_every must be an int, 'auto' or 'frozen', got 2.5"),
        (True, 0.1, TypeError, "refresh_every must be an int"),
        ("auto", 0.0, ValueError, "overhead must be above 0"),
        ("auto", math.nan, ValueError, "overhead must be above 0"),
    ],
)
def test_bad_policies(value, overhead, error, text):
    with pytest.raises(error, match=text):
        policy(value, overhead)


# ---- exact for small matrices
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 3, 8, 12])
def test_every_route_agrees_with_dense_eigh(k, seed):
    # A random spectrum, kept away from the tie of two values at k.
    q = rotation(12, seed)
    values = torch.sort(torch.rand(12, dtype=torch.float64) * 5 + 0.1, descending=True).values
    if k < 12:
        values[:k] += 0.5
    params = [torch.zeros(3, 4, dtype=torch.float64)]
    op = planted([1.0], size=12)
    op._rotate = lambda rows, back: rows @ (q.T if back else q)
    op.spectrum, op.layout = values, ParameterLayout(params)
    s = DominantSubspace(op, k, tol=1e-10)
    exact = leading(op.to_dense(), k)
    with _quiet():
        s.refresh()
        assert s.eigenvalues.tolist() == pytest.approx(exact[0].tolist(), rel=1e-9)
        for _ in range(3):
            s.refresh()  # nothing has changed, and one chain of k + 14 products at most starts with a tenth of noise
    assert overlap(s.basis, exact[1]) == pytest.approx(1, abs=1e-4)
    assert s.eigenvalues.tolist() == pytest.approx(exact[0].tolist(), rel=1e-4)
