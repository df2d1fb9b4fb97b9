"""The scorer, on numbers whose scores are known by hand."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.protocol.statistics import (
    area_under_curve,
    as_row,
    better,
    bootstrap_median,
    median,
    paired_test,
    profile,
    profile_score,
    sensitivity,
    summary,
)

INF = math.inf


def test_a_miss_stays_in_the_median():
    assert median([3, 1, INF]) == 3 and median([1, INF, INF]) == INF
    assert median([1, 2, INF, INF]) == INF and median([1, 3]) == 2
    assert math.isnan(median([])) and math.isnan(median([1, math.nan]))


def test_bootstrap_interval():
    assert bootstrap_median([5.0]) == bootstrap_median([5.0, 5.0, 5.0])
    found = bootstrap_median([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.value, found.low, found.high) == (3.0, 1.0, 100.0)
    # Three values: a resample's median is the least one with probability (1/3)^3 + 3 (1/3)^2 (2/3) = 7/27 > .025
    assert bootstrap_median([1.0, 2.0, INF]).high == INF
    assert bootstrap_median([1.0] * 20 + [INF]).high == 1.0
    rng = np.random.default_rng(3)
    values = list(rng.lognormal(size=15))
    scipys = stats.bootstrap((values,), np.median, method="percentile", n_resamples=10_000, rng=rng)
    ours = bootstrap_median(values)
    # Both are quantiles of 10,000 draws among some fifty possible medians: the same one, or the next.
    near = np.sort(values)
    for a, b in ((ours.low, scipys.confidence_interval.low), (ours.high, scipys.confidence_interval.high)):
        assert abs(int(np.searchsorted(near, a)) - int(np.searchsorted(near, b))) <= 1
    with pytest.raises(ValueError, match="no values to resample"):
        bootstrap_median([])
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, got 95"):
        bootstrap_median([1.0], confidence=95)


def test_paired_test_against_enumeration_by_hand():
    first, second = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2.0, 4.1, 6.4, 8.9, 11.0, 14.0]
    assert paired_test(first, second) == pytest.approx(2 / 2**6)  # all six on one side: the two extreme sign patterns
    assert paired_test(first[:5], second[:5]) == pytest.approx(2 / 2**5)
    assert paired_test([1.0, 2.0], [1.0, 3.0]) == 1.0  # one pair that is no tie: either sign is as likely
    assert not better(first[:5], second[:5]) and better(first, second) and not better(second, first)
    mixed = [2.0, 1.0, 6.4, 8.9, 11.0, 14.0]
    ranks = stats.rankdata(np.abs(np.log(first) - np.log(mixed)))
    signs = np.sign(np.log(first) - np.log(mixed))
    observed = abs(float((signs * ranks).sum()))
    flips = [abs(float((np.array(s) * ranks).sum())) for s in itertools.product((-1, 1), repeat=6)]
    assert paired_test(first, mixed) == pytest.approx(sum(f >= observed - 1e-9 for f in flips) / 64)
    # without ties it is scipy's exact Wilcoxon test
    assert paired_test(first, mixed) == pytest.approx(
        stats.wilcoxon(np.log(first), np.log(mixed), method="exact").pvalue
    )


def test_paired_test_with_misses():
    hits, misses = [10.0, 11, 12, 13, 14, 15], [INF] * 6
    assert paired_test(hits, misses) == pytest.approx(2 / 64) and better(hits, misses)
    assert paired_test(misses, misses) == 1.0 and not better(misses, misses)
    half = [INF, INF, INF, 13.0, 14.0, 15.0]  # three losses that rank above all, three ties that are left out
    assert paired_test(hits, half) == pytest.approx(2 / 2**3)
    with pytest.raises(ValueError, match="pairs are needed, got 2 and 1 values"):
        paired_test([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="must be positive numbers or infinite"):
        paired_test([1.0, 0.0], [1.0, 2.0])


def test_performance_profile():
    times = {
        "a": {"one": 10.0, "two": 100.0, "three": INF, "none": INF},
        "b": {"one": 20.0, "two": 50.0, "three": 7.0, "none": INF},
    }
    found = profile(times)
    assert found == {"a": [1.0, 2.0, INF], "b": [1.0, 1.0, 2.0]}
    # a: (4 - 1) + (4 - 2) + 0 of 3 x 3; b: 3 + 3 + 2 of 9
    assert profile_score(found["a"]) == pytest.approx(5 / 9) and profile_score(found["b"]) == pytest.approx(8 / 9)
    assert profile_score([1.0, 1.0]) == 1.0 and profile_score([INF]) == 0.0 and math.isnan(profile_score([]))
    # a target that holds before the first step
    assert profile({"a": {"one": 0.0}, "b": {"one": 5.0}, "c": {"one": 0.0}}) == {"a": [1.0], "b": [INF], "c": [1.0]}
    with pytest.raises(ValueError, match="b has no result on two"):
        profile({"a": {"one": 1.0, "two": 2.0}, "b": {"one": 1.0}})


def test_area_under_the_curve():
    # log10: 0, -2, -2 at steps 0, 10, 30: (10 * -1 + 20 * -2) / 30
    assert area_under_curve([0, 10, 30], [1.0, 0.01, 0.01]) == pytest.approx(-50 / 30)
    assert area_under_curve([0, 10], [1.0, INF]) == INF and area_under_curve([0], [1.0]) == INF


def test_sensitivity_to_the_learning_rate():
    scores = {0.001: 9.0, 0.01: 1.5, 0.1: 1.0, 1.0: 1.9, 10.0: INF, 1e-4: 1.2}
    assert sensitivity(scores) == pytest.approx(2.0)  # 0.01 to 1; 1e-4 lies beyond a worse value
    assert sensitivity(scores, factor=1.6) == pytest.approx(1.0)
    assert sensitivity({0.1: INF, 1.0: INF}) == 0.0 and sensitivity({}) == 0.0 and sensitivity({0.1: 1.0}) == 0.0


def test_words():
    assert as_row(bootstrap_median([2.0, INF, INF]), ".0f") == "missed [2, missed]"
    assert summary([], ".0f") == "-" and summary([4.0], ".1f") == "4.0 [4.0, 4.0]"
