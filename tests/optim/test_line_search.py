"""Line searches on functions of one variable that can be drawn on paper."""

import math

import pytest

from curvopt.optim.line_search import CURVATURE, SUFFICIENT, Trial, armijo, interpolate, strong_wolfe

# name: (phi, phi'), all falling at 0
FUNCTIONS = {
    "parabola": (lambda t: (t - 1) ** 2, lambda t: 2 * (t - 1)),
    "far minimum": (lambda t: (t - 300) ** 2, lambda t: 2 * (t - 300)),
    "near minimum": (lambda t: (t - 1e-3) ** 2, lambda t: 2 * (t - 1e-3)),
    "quartic": (lambda t: (t - 2) ** 4 + 0.1 * t, lambda t: 4 * (t - 2) ** 3 + 0.1),
    "waves": (lambda t: math.cos(9 * t + 0.5) + t * t, lambda t: -9 * math.sin(9 * t + 0.5) + 2 * t),
    "exponential": (lambda t: math.exp(t) - 3 * t, lambda t: math.exp(t) - 3),
    "fractured": (
        lambda t: -t if t <= 1 else math.inf,
        lambda t: -1.0,
    ),
    "more thuente": (lambda t: -t / (t * t + 2), lambda t: (t * t - 2) / (t * t + 2) ** 2),
}


def at(name):
    value, slope = FUNCTIONS[name]
    calls = []

    def phi(t):
        calls.append(t)
        v = value(t)
        return Trial(t, v, slope(t), math.isfinite(v), payload=t)

    return phi, Trial(0.0, value(0.0), slope(0.0)), calls


@pytest.mark.parametrize("first", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_armijo_lowers_enough(name, first):
    phi, start, calls = at(name)
    found = armijo(phi, start, first, max_evaluations=40)
    trial = found.trial
    assert trial.value <= start.value + SUFFICIENT * trial.t * start.slope
    assert found.evaluations == len(calls) and trial.payload == trial.t == calls[-1]
    # each step back lies inside [.1, .5] of the one before
    assert all(0.1 * a * (1 - 1e-12) <= b <= 0.5 * a * (1 + 1e-12) for a, b in zip(calls, calls[1:], strict=False))


@pytest.mark.parametrize("first", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "fractured"])
def test_strong_wolfe_meets_both_conditions(name, first):
    phi, start, calls = at(name)
    found = strong_wolfe(phi, start, first)
    trial = found.trial
    assert trial.value <= start.value + SUFFICIENT * trial.t * start.slope
    assert abs(trial.slope) <= CURVATURE * abs(start.slope)
    assert found.evaluations == len(calls) <= 25
    assert trial.payload == trial.t


def test_parabola_is_solved_by_one_interpolation():
    phi, start, calls = at("parabola")
    assert armijo(phi, start, 2.5).trial.t == pytest.approx(1.0) and len(calls) == 2
    assert interpolate(start, Trial(2.5, 2.25, 3.0)) == pytest.approx(1.0)
    # a trial that is no number says nothing of the shape
    assert interpolate(start, Trial(2.5, math.nan, 0.0, finite=False)) == 0.25
    # and one that looks like a straight line gives the most that is allowed
    assert interpolate(start, Trial(2.5, start.value + 2.5 * start.slope, 0.0)) == 1.25


@pytest.mark.parametrize("search", [armijo, strong_wolfe])
def test_failure_says_why(search):
    def uphill(t):
        return Trial(t, 1.0 + t, 1.0)

    found = search(uphill, Trial(0.0, 1.0, -1.0), 1.0, 7)
    assert found.trial is None and found.evaluations == 7
    assert "no step lowered the loss enough in 7 evaluations" in found.reason and "the slope predicts -" in found.reason

    def nowhere(t):
        return Trial(t, math.nan, math.nan, finite=False)

    found = search(nowhere, Trial(0.0, 1.0, -1.0), 1.0, 4)
    assert found.trial is None and "stayed NaN or infinite down to a step of" in found.reason


def test_strong_wolfe_takes_the_best_point_when_evaluations_run_out():
    phi, start, _ = at("far minimum")
    found = strong_wolfe(phi, start, 1e-9, 4)
    assert found.trial is not None and found.trial.value < start.value and found.evaluations == 4
    phi, start, _ = at("fractured")  # falls with slope -1 to the very edge: the second condition can't be met
    found = strong_wolfe(phi, start, 3.0, 12)
    assert found.evaluations == 12 and 0 < found.trial.t <= 1


def test_strong_wolfe_ends_where_no_number_lies_within_the_bracket():
    """A step in the loss at t = 1, as rounding makes one where nothing is left to gain."""
    asked = []

    def phi(t):
        asked.append(t)
        return Trial(t, -t if t <= 1 else 1.0, -1.0)

    result = strong_wolfe(phi, Trial(0.0, 0.0, -1.0), 1.0, max_evaluations=100)
    assert result.trial.t == 1.0
    assert result.evaluations == len(asked) < 30
    assert len(set(asked)) == len(asked)
