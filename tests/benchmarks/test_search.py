"""The tuner: equal budgets, repeatable proposals, the bracketing rule."""

import math

import pytest

from benchmarks.config import ConfigError, compose_run
from benchmarks.progress import RunProgress
from benchmarks.protocol.search import Trial, Tuned, as_overrides, judge, search, space_of, tuning_runs
from benchmarks.protocol.train import execute
from curvopt.zoo import Choice, Range

SPACE = {"lr": Range(1e-4, 10.0), "momentum": Choice((0.0, 0.9))}


def _bowl(best, worst=math.inf):
    return lambda s: (min(1.0 + abs(math.log10(s["lr"] / best)), worst), 10.0, 0.5)


@pytest.mark.parametrize("best", [0.003, 0.3])
def test_the_budget_is_spent_to_the_trial_and_the_best_is_bracketed(best):
    found = search(SPACE, _bowl(best), trials=14)
    assert len(found.trials) == 14 and found.key == "lr" and found.bracketed
    assert abs(math.log10(found.best.settings["lr"] / best)) < 0.5
    assert set(found.best.settings) == {"lr", "momentum"} and found.best.settings["momentum"] in (0.0, 0.9)
    assert sum(t.gradients for t in found.trials) == 140


def test_a_search_repeats_itself_and_another_seed_does_not():
    first, again = search(SPACE, _bowl(0.1), trials=9), search(SPACE, _bowl(0.1), trials=9)
    assert [t.settings for t in first.trials] == [t.settings for t in again.trials]
    assert [t.settings for t in search(SPACE, _bowl(0.1), trials=9, seed=1).trials] != [
        t.settings for t in first.trials
    ]


@pytest.mark.parametrize("best", [1e-6, 1e4])
def test_the_last_trials_go_beyond_an_edge(best):
    found = search(SPACE, _bowl(best), trials=8)
    assert [t.stage for t in found.trials] == ["search"] * 6 + ["bracket"] * 2
    tried = [t.settings["lr"] for t in found.trials]
    extreme = max(tried[:6]) if best > 1 else min(tried[:6])
    factor = 10**0.5 if best > 1 else 10**-0.5
    assert tried[6] == pytest.approx(extreme * factor, rel=1e-2) and tried[7] == pytest.approx(
        extreme * factor**2, rel=1e-2
    )
    assert not found.bracketed and len(found.trials) == 8


def test_where_everything_fails_it_goes_down():
    found = search(SPACE, lambda s: (math.inf, 1.0, 0.0), trials=6)
    tried = [t.settings["lr"] for t in found.trials]
    assert min(tried[:4]) > tried[4] > tried[5] and not found.bracketed and math.isinf(found.best.score)


def test_bracketed_needs_something_worse_on_both_sides():
    def tuned(*pairs):
        return Tuned("lr", [Trial({"lr": v}, s, "search", 1.0, 0.0) for v, s in pairs])

    assert tuned((0.1, 2.0), (1.0, 1.0), (10.0, math.inf)).bracketed
    assert not tuned((0.1, 2.0), (1.0, 1.0)).bracketed
    assert not tuned((0.1, 1.0), (1.0, 1.0), (10.0, 2.0)).bracketed  # equal is not worse
    assert tuned((0.1, 2.0), (1.0, 1.0), (2.0, 1.5), (10.0, 3.0)).sensitivity == pytest.approx(math.log10(20))


def test_impossible_budgets_are_named():
    with pytest.raises(ConfigError, match="trials must be at least 3, got 2"):
        search(SPACE, _bowl(1.0), trials=2)
    with pytest.raises(ConfigError, match="the search space is empty"):
        search({}, _bowl(1.0), trials=3)


def test_what_a_file_sets_by_a_rules_name_is_not_searched():
    assert set(space_of("digits_mlp", "interpolated_sgd")) == {"lr", "momentum", "dominant", "bulk"}
    assert set(space_of("digits_mlp", "newton_sgd")) == {"lr", "momentum", "bulk"}


def test_tuning_runs_never_evaluate_on_the_test_set_nor_use_the_results_seeds(tmp_path):
    settings = {"lr": 0.3, "momentum": 0.0}
    runs = tuning_runs("digits_mlp", "sgd_momentum", settings, [f"out={tmp_path}", "steps=5"], [1000, 1001])
    assert [r.seed for r in runs] == [1000, 1001] and all(r.optimizer["lr"] == 0.3 for r in runs)
    assert all(r.stop_hopeless and not r.eval_every and r.wandb.mode == "disabled" for r in runs)
    assert as_overrides({"lr": 0.3, "how": "edge"}) == ["optimizer.lr=0.3", 'optimizer.how="edge"']
    score, cost, seconds = judge([execute(r, RunProgress(enabled=False)).record for r in runs])
    assert 0 < score < 2.4 and cost == 10 and seconds > 0


def test_a_trial_is_judged_by_its_worst_ends():
    good, bad = {"status": "done", "train_loss": 0.5, "gradient_equivalents": 3.0}, {"status": "diverged"}
    assert judge([good])[0] == 0.5 and math.isinf(judge([good, bad])[0]) and judge([good, bad])[1] == 3.0
    assert judge([good, good, bad])[0] == 0.5


def test_hopeless_trials_are_stopped_by_one_rule(tmp_path):
    common = [f"out={tmp_path}", "steps=40", "log_every=5", "measure_every=0", "energy_every=0", "wandb.mode=disabled"]
    config = compose_run("noisy_quadratic", "sgd", [*common, "optimizer.lr=0.0201", "stop_hopeless=true"])
    # just beyond 2/100: the leading component grows by 1 % a step
    outcome = execute(config, RunProgress(enabled=False))
    assert outcome.status == "done"  # it still falls at first, so that a quarter through it is below its start
    config = compose_run("noisy_quadratic", "sgd", [*common, "optimizer.lr=0.022", "stop_hopeless=true"])
    outcome = execute(config, RunProgress(enabled=False))
    assert outcome.status == "diverged" and "hopeless: a quarter through" in outcome.reason
    config = compose_run("noisy_quadratic", "sgd", [*common, "optimizer.lr=0.022"])
    assert "hopeless" not in execute(config, RunProgress(enabled=False)).reason
