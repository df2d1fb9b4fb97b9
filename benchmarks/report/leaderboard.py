"""The tables of a suite's report: leaderboards, tuning, seconds, performance profiles."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from benchmarks.protocol.comparison import SuiteConfig
from benchmarks.protocol.repeat import in_words
from benchmarks.protocol.statistics import median, profile, profile_score, summary
from benchmarks.report.records import AXES
from benchmarks.report.standings import Standing
from benchmarks.report.verdicts import best_baseline, claim, criterion

_NUMBER = re.compile(r"[*_]*[-+]?[0-9.]|missed|-$")
_FORMS = {"step": ".0f", "gradient_equivalents": ".0f", "seconds": ".2f"}


def task_table(rows: Sequence[Standing], config: SuiteConfig) -> tuple[list[str], list[list[str]]]:
    """Header and lines of one task's leaderboard, best first."""
    timed = bool(rows[0].to_target)
    scored = any(not math.isnan(v) for r in rows for v in r.accuracy)
    baseline = best_baseline(rows, config.baselines, config.metric)
    header = ["optimizer", *(list(AXES.values()) if timed else []), "train loss", *(["accuracy, %"] if scored else [])]
    header += ["mean log10 loss", "lost runs", "against the best baseline"]
    body = []
    for r in sorted(rows, key=lambda r: (median(criterion(r, config.metric)), median(r.train_loss), r.label)):
        line = [r.label, *(summary(r.to_target[a], _FORMS[a]) for a in AXES if timed), summary(r.train_loss, ".4g")]
        line += [summary([100 * v for v in r.accuracy], ".2f")] if scored else []
        word = "-" if baseline is None else "the baseline" if r is baseline else claim(r, baseline, config.metric)
        body.append([*line, summary(r.area, ".3f"), f"{100 * r.lost:.0f} %", word])
    return header, body


def tuning_table(rows: Sequence[Standing]) -> tuple[list[str], list[list[str]]]:
    """Settings found, what finding them cost, whether they are bracketed, how wide the good learning rates lie."""
    header = [
        "optimizer",
        "settings",
        "trials",
        "failed",
        "gradient-equivalents",
        "seconds",
        "bracketed",
        "decades within x2",
    ]
    body = []
    for r in rows:
        if r.tuned is not None:
            t = r.tuned.trials
            body.append(
                [
                    r.label,
                    r.settings,
                    str(len(t)),
                    str(sum(math.isinf(x.score) for x in t)),
                    f"{sum(x.gradients for x in t):.0f}",
                    f"{sum(x.seconds for x in t):.1f}",
                    "yes" if r.tuned.bracketed else f"NO: {r.tuned.key} at the edge of what was tried",
                    f"{r.tuned.sensitivity:.1f}",
                ]
            )
    return header, body


def seconds_table(rows: Sequence[Standing]) -> tuple[list[str], list[list[str]]]:
    """What a whole run and a step took: beside the others of the suite, and alone; nothing where no run was timed."""
    header = ["optimizer", "seconds, all runs", "wall clock", "alone: seconds", "wall clock", "ms a step", "repeated"]
    body = []
    for r in rows:
        alone = [(x.last("seconds"), x.last("wall_seconds"), float(x.result.get("step", 0))) for x in r.retimed]
        steps = [1e3 * s / n for s, _, n in alone if n and not math.isnan(s)]
        same = sum(bool(x["same"]) for x in r.repeats)
        line = [r.label, _middle(r.seconds), _middle(r.wall_seconds)]
        line += [_middle([s for s, _, _ in alone]), _middle([w for _, w, _ in alone])]
        body.append([*line, f"{median(steps):.3f}" if steps else "-", f"{same} of {len(r.repeats)}" if alone else "-"])
    return header, body


def _middle(values: Sequence[float]) -> str:
    known = [v for v in values if not math.isnan(v)]
    return f"{median(known):.2f}" if known else "-"


def repetition(found: Sequence[Standing]) -> str:
    """Whether the re-timed runs gave the first runs' losses bit for bit; those that did not, and what stands in the way."""
    runs = [(r, x, v) for r in found for x, v in zip(r.retimed, r.repeats, strict=True)]
    other = [(r, x, v) for r, x, v in runs if not v["same"]]
    if not runs:
        return "No run was done twice, so seconds are of runs beside others, and nothing is said of repetition."
    if not other:
        return f"All {len(runs)} re-timed runs gave the same losses bit for bit."
    lines = [f"- {r.task}, {r.label}, seed {x.config.seed}: {in_words(v)}" for r, x, v in other]
    return f"Of {len(runs)} re-timed runs {len(other)} did not give the same losses bit for bit:\n\n" + "\n".join(lines)


def profile_table(found: Sequence[Standing], axes: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Scores of the performance profiles over the tasks that have a target, and the ratios behind them.

    Args:
        found: all settings on all tasks.
        axes: column -> its name in words; the first one orders the table, best first.
    """
    scored: dict[str, dict[str, list[float]]] = {}
    for axis in axes:
        times: dict[str, dict[str, float]] = {}
        for r in found:
            if r.to_target:
                times.setdefault(r.label, {})[r.task] = median(r.to_target[axis])
        ratios = profile(times) if times else {}
        if any(ratios.values()):  # somebody reached a target
            scored[axis] = ratios
    if not scored:
        return [], []
    first, header = next(iter(scored)), ["optimizer"]
    for axis in scored:
        header += [f"score in {axes[axis]}", "ratios"]
    body = []
    for name in sorted(scored[first], key=lambda n: (-round(profile_score(scored[first][n]), 3), n)):
        line = [name]
        for ratios in scored.values():
            line += [f"{profile_score(ratios[name]):.3f}", ", ".join(_ratio(r) for r in ratios[name])]
        body.append(line)
    return header, body


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "missed"


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns of numbers to the right."""
    columns = list(zip(*body, strict=True))[1:]
    sides = ["---", *("---:" if all(_NUMBER.match(cell) for cell in column) else "---" for column in columns)]
    lines = [header, *body]
    rows = ["| " + " | ".join(map(_cell, line)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join(sides) + "|", *rows[1:]])


def _cell(text: str) -> str:
    """Text that is no markup of the table; stars may stand for emphasis."""
    return re.sub(r"([|<`\\])", r"\\\1", " ".join(text.split()))
