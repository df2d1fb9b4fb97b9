"""What may be said of an optimizer beside a tuned baseline: better, worse, or nothing, with an interval and a test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.protocol.comparison import SuiteConfig
from benchmarks.protocol.statistics import LEAST_PAIRS, bootstrap_median, median, paired_test
from benchmarks.report.records import AXES
from benchmarks.report.standings import Standing
from curvopt import zoo

# What is compared: where a run stood at the target, and where it ended.
CRITERIA = {**AXES, "train_loss": "final train loss"}


def criterion(standing: Standing, name: str = "step") -> list[float]:
    """One value a seed, positive: of ``CRITERIA``; the final train loss where the task has no target."""
    values = standing.to_target.get(name, standing.train_loss)
    return [max(v, 1e-300) for v in values]


def best_baseline(rows: Sequence[Standing], baselines: Sequence[str], name: str = "step") -> Standing | None:
    """The tuned baseline with the lowest median; None without one."""
    plain = [r for r in rows if r.optimizer in baselines and r.tuned is not None]
    return min(plain, key=lambda r: median(criterion(r, name)), default=None)


def judged(standing: Standing, baseline: Standing, name: str = "step") -> tuple[str, float]:
    """``"better"``, ``"worse"`` or ``"open"``, and the exact p of the paired test; ``"too few seeds"`` below six.

    Ties of the medians are open whatever p is. Of seconds nothing is said below six re-timed seeds: one timing tells
    nothing of its own error, however many seeds it is applied to.
    """
    mine, theirs = criterion(standing, name), criterion(baseline, name)
    if len(mine) < LEAST_PAIRS:
        return "too few seeds", math.nan
    if name == "seconds" and standing.to_target and _timed(standing, baseline) < LEAST_PAIRS:
        return "too few timings", math.nan
    p = paired_test(mine, theirs)
    if p >= 0.05 or median(mine) == median(theirs):
        return "open", p
    return "better" if median(mine) < median(theirs) else "worse", p


def _timed(standing: Standing, baseline: Standing) -> int:
    return min(len(standing.retimed), len(baseline.retimed))


def claim(standing: Standing, baseline: Standing, name: str = "step") -> str:
    """The word, the exact p, and the median ratio over seeds with its 95 % bootstrap interval."""
    word, p = judged(standing, baseline, name)
    if word == "too few seeds":
        return f"too few seeds ({len(criterion(standing, name))})"
    if word == "too few timings":
        return f"too few timings ({_timed(standing, baseline)}{_ratio(standing, baseline, name)})"
    words = "no difference shown" if word == "open" else word
    return f"{words} (p {p:.{2 if word == 'open' else 3}f}{_ratio(standing, baseline, name)})"


def _ratio(standing: Standing, baseline: Standing, name: str) -> str:
    """Of pairs that start alike: values of one seed; two misses are equal."""
    pairs = zip(criterion(standing, name), criterion(baseline, name), strict=True)
    ratios = [1.0 if math.isinf(a) and math.isinf(b) else 0.0 if math.isinf(b) else a / b for a, b in pairs]
    found = bootstrap_median(ratios)
    if math.isinf(found.low) or found.high == 0:  # one of them never gets there
        return ""
    return f", x{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def uses_curvature(standing: Standing) -> bool:
    """Whether an optimizer takes Hessian products or splits its step: the controls without a true subspace do not."""
    given = standing.records[0].config.optimizer
    entry = zoo.describe(str(given["zoo"]))
    aware = entry.needs_curvature or entry.products_per_step > 0 or "curvature" in entry.defaults
    return aware and given.get("rank") != 0 and not given.get("control")


@dataclass(frozen=True)
class InShort:
    """Wins and losses against the best tuned baseline of each task.

    Attributes:
        sentences: how the curvature-aware settings fare, one a criterion.
        header, body: a line a setting, curvature-aware ones first: on which tasks it is better, worse, or open.
    """

    sentences: list[str]
    header: list[str]
    body: list[list[str]]


def in_short(found: Sequence[Standing], config: SuiteConfig) -> InShort:
    """Each setting that is no baseline itself, beside the best tuned baseline of each task, criterion by criterion."""
    verdicts = _verdicts(found, config)
    names = [n for n in CRITERIA if any(n in by_name for row in verdicts.values() for by_name in row.values())]
    aware = {r.label: uses_curvature(r) for r in found}
    body, sentences = [], []
    for label, row in sorted(verdicts.items(), key=lambda item: not aware[item[0]]):
        cells = [_counted({task: by_name[n] for task, by_name in row.items() if n in by_name}) for n in names]
        body.append([label, "yes" if aware[label] else "no", *cells])
    count = sum(aware[label] for label in verdicts)
    for name in names:
        words = [
            by_name[name]
            for label, row in verdicts.items()
            if aware[label]
            for by_name in row.values()
            if name in by_name
        ]
        if words:
            at = CRITERIA[name] if name == "train_loss" else f"{CRITERIA[name]} to target"
            settings = "1 curvature-aware setting" if count == 1 else f"{count} curvature-aware settings"
            sentences.append(
                f"{at[0].upper()}{at[1:]}, {settings}, {len(words)} in all over the tasks: {_counts(words)}."
            )
    return InShort(sentences, ["optimizer", "curvature", *(CRITERIA[n] for n in names)], body)


def _verdicts(found: Sequence[Standing], config: SuiteConfig) -> dict[str, dict[str, dict[str, str]]]:
    """Label -> task -> criterion -> word, of all that is not a baseline itself."""
    out: dict[str, dict[str, dict[str, str]]] = {}
    for task in dict.fromkeys(r.task for r in found):
        rows = [r for r in found if r.task == task]
        for name in CRITERIA:
            baseline = best_baseline(rows, config.baselines, name)
            if baseline is None or (name in AXES and not rows[0].to_target):
                continue
            for r in rows:
                if r.optimizer not in config.baselines or r.tuned is None:
                    out.setdefault(r.label, {}).setdefault(task, {})[name] = judged(r, baseline, name)[0]
    return out


def _counts(words: Sequence[str]) -> str:
    return ", ".join(
        f"{words.count(w)} {w}" for w in ("better", "worse", "open", "too few seeds", "too few timings") if w in words
    )


def _counted(by_task: dict[str, str]) -> str:
    """``better: a, b; worse: c; open: 2``."""
    parts = []
    for word in ("better", "worse"):
        tasks = [task for task, found in by_task.items() if found == word]
        parts += [f"{word}: {', '.join(tasks)}"] if tasks else []
    rest = [w for w in by_task.values() if w not in ("better", "worse")]
    return "; ".join([*parts, *([_counts(rest)] if rest else [])])
