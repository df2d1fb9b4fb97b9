"""The report of a suite with targets: seconds to each, ours against the best of the others, whichever way it falls."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.config import run_directory
from benchmarks.files import atomic_write_json, atomic_write_text
from benchmarks.progress import RunProgress
from benchmarks.protocol.comparison import Comparison, SuiteConfig, Unit, units
from benchmarks.protocol.ratios import Versus, versus
from benchmarks.protocol.search import Tuned
from benchmarks.protocol.statistics import median, summary
from benchmarks.report.html import write_html
from benchmarks.report.leaderboard import markdown
from benchmarks.report.records import RunRecord, load_record
from benchmarks.sinks.jsonl import encode

# What is asked of a run where it reached a target, to say why it was sooner or later.
_SPENT = ("gradient_equivalents", "iterations", "kept", "seconds_refresh")


@dataclass(frozen=True)
class Entrant:
    """One optimizer on one task.

    Attributes:
        task, optimizer, label: names.
        ours: whether it is set against the others.
        records: its runs, in the order of the seeds.
        tuned: its search.
        settings: of those runs.
    """

    task: str
    optimizer: str
    label: str
    ours: bool
    records: Sequence[RunRecord]
    tuned: Tuned = field(compare=False)
    settings: str = ""

    def times(self, column: str, target: float, axis: str = "seconds") -> list[float]:
        """Where ``axis`` stood at the target, a seed each; infinite for a miss."""
        return [r.to_target(target, axis, column) for r in self.records]

    def at(self, column: str, target: float, axis: str) -> float:
        """Median of a column over the seeds that reached the target; NaN where none did."""
        found = [r.to_target(target, axis, column) for r in self.records if axis in r.frame]
        known = [v for v in found if math.isfinite(v)]
        return median(known) if known else math.nan


def entrants(config: SuiteConfig, out: Path) -> tuple[list[Entrant], list[Unit]]:
    """What is finished, from the run folders, and what is not."""
    suite, found, missing = Comparison(config, out), [], []
    quiet = RunProgress(enabled=False)
    for unit in units(config):
        if not (out / "tuning" / unit.task / f"{unit.optimizer}.json").exists():
            missing.append(unit)
            continue
        tuned = suite.tune(unit, quiet, reading=True)
        groups: dict[str, list[Path]] = {}
        for run in suite.finals(unit, tuned):
            groups.setdefault(str(run.optimizer["label"]), []).append(run_directory(run))
        for label, folders in groups.items():
            if not all((f / "result.json").exists() for f in folders):
                missing.append(unit)
                continue
            records = [load_record(f) for f in folders]
            given = {
                k: v for k, v in records[0].config.optimizer.items() if k not in ("file", "zoo", "label", "control")
            }
            shown = ", ".join(f"{k}={_plain(v)}" for k, v in given.items())
            ours = unit.optimizer in config.ours
            found.append(Entrant(unit.task, unit.optimizer, label, ours, records, tuned, shown))
    return found, list(dict.fromkeys(missing))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(str(v) if k == "zoo" else f"{k} {v}" for k, v in value.items())
    return str(value)


def compare(rows: Sequence[Entrant], column: str, target: float) -> dict[str, Versus]:
    """Each of ours against the best of the others at a target: label -> result."""
    others = {r.label: r.times(column, target) for r in rows if not r.ours}
    return {r.label: versus(r.times(column, target), others) for r in rows if r.ours}


def at_least(rows: Sequence[Entrant], label: str, result: Versus, column: str, target: float) -> float:
    """The ratio that is certain: a rival's miss counts as the seconds that it was given, not as infinite; NaN for no hit.

    Where no rival has a hit, the one that was given least is taken at each seed.
    """
    mine = next(r for r in rows if r.label == label).times(column, target)
    given = []
    for row in (r for r in rows if not r.ours and result.rival in (None, r.label)):
        ends = [r.last("seconds") for r in row.records]
        given.append([t if math.isfinite(t) else end for t, end in zip(row.times(column, target), ends, strict=True)])
    if not given or not any(map(math.isfinite, mine)):
        return math.nan
    found = [min(theirs) / own for own, *theirs in zip(mine, *given, strict=True)]
    return median([v for v in found if not math.isnan(v)])


def in_words(result: Versus, seeds: int, least: float = math.nan) -> str:
    """A cell: the ratio with its interval, p, and the rival; or who reached it."""
    if result.word == "nobody":
        return "nobody got there"
    if result.word == "ours alone":
        return f"only ours, {result.hits} of {seeds}" + ("" if math.isnan(least) else f"; at least {least:.2f}")

    def number(value: float) -> str:
        return "inf" if math.isinf(value) else f"{value:.2f}"

    r = result.ratio
    shown = f"{number(r.value)} [{number(r.low)}, {number(r.high)}]"
    p = "" if math.isnan(result.p) else f", p {result.p:.3f}"
    bound = f" (at least {least:.2f})" if math.isinf(r.value) and not math.isnan(least) else ""
    return f"{shown}{bound}{p}, {result.rival}"


def summary_table(found: Sequence[Entrant], suite: Comparison) -> tuple[list[str], list[list[str]]]:
    """A line a task, target and optimizer of ours."""
    body = []
    for task in suite.config.tasks:
        rows = [r for r in found if r.task == task]
        for column, targets in suite.targets(task).items():
            for target in targets:
                for label, result in compare(rows, column, target).items():
                    seeds = len(next(r for r in rows if r.label == label).records)
                    words = in_words(result, seeds, at_least(rows, label, result, column, target))
                    body.append([task, f"{column.replace('_', ' ')} {target:g}", label, words, result.word])
    return ["problem", "target", "ours", "seconds of the best rival over ours", "verdict"], body


def reach_table(rows: Sequence[Entrant], column: str, targets: Sequence[float]) -> tuple[list[str], list[list[str]]]:
    """Seconds to each target, with the number of seeds that got there; soonest at the tightest target first."""
    header = ["optimizer", *(f"{column.replace('_', ' ')} {t:g}" for t in targets)]

    def cell(row: Entrant, target: float) -> str:
        times = row.times(column, target)
        hits = sum(map(math.isfinite, times))
        return f"{summary(times, '.1f')} ({hits}/{len(times)})"

    order = sorted(rows, key=lambda r: [median(r.times(column, t)) for t in reversed(targets)])
    return header, [[r.label, *(cell(r, t) for t in targets)] for r in order]


def end_table(rows: Sequence[Entrant]) -> tuple[list[str], list[list[str]]]:
    """Where the runs ended: a low loss on a wrong solution is seen here."""
    header = ["optimizer", "train loss", "solution error", "seconds", "of it in refreshes", "gradient-equivalents"]
    header += ["iterations", "pairs kept", "settings"]
    body = []
    for r in rows:
        done = [x for x in r.records if x.status == "done"]

        def values(name: str, done: Sequence[RunRecord] = done) -> list[float]:
            return [x.last(name) for x in done if x.last(name) == x.last(name)]

        def middle(name: str, form: str, values: Any = values) -> str:
            known = values(name)
            return format(median(known), form) if known else "-"

        seconds = values("seconds")
        share = [a / b for a, b in zip(values("seconds_refresh"), seconds, strict=False) if b > 0]
        lost = len(r.records) - len(done)
        body.append(
            [
                r.label + (f" ({lost} runs lost)" if lost else ""),
                *(summary(values(n), ".2g") for n in ("train_loss", "solution_error")),
                middle("seconds", ".1f"),
                f"{100 * median(share):.0f} %" if share else "-",
                *(middle(n, ".0f") for n in ("gradient_equivalents", "iterations", "kept")),
                f"`{r.settings}`",
            ]
        )
    return header, body


def tuning_table(rows: Sequence[Entrant]) -> tuple[list[str], list[list[str]]]:
    """What was tried, and what it cost."""
    header = ["optimizer", "trials", "best", "gradient-equivalents", "seconds", "bracketed"]
    body = []
    for r in {r.optimizer: r for r in reversed(rows)}.values():
        trials, best = r.tuned.trials, r.tuned.best
        spent = [f"{sum(t.gradients for t in trials):.0f}", f"{sum(t.seconds for t in trials):.0f}"]
        values = {str(t.settings[r.tuned.key]) for t in trials}
        edge = "-" if len(values) == 1 else "yes" if r.tuned.bracketed else f"NO: {r.tuned.key} at the edge"
        shown = ", ".join(f"{k}={v}" for k, v in best.settings.items())
        body.append([r.label, str(len(trials)), shown, *spent, edge])
    return header, body[::-1]


def reasons(rows: Sequence[Entrant], column: str, target: float) -> list[str]:
    """For each of ours that lost at a target: what both spent up to it, as measured."""
    lines = []
    by_label = {r.label: r for r in rows}
    for label, result in compare(rows, column, target).items():
        if result.word != "lost" or result.rival is None:
            continue
        parts = []
        for name in (label, result.rival):
            row = by_label[name]
            numbers = {axis: row.at(column, target, axis) for axis in (*_SPENT, "seconds")}
            if math.isnan(numbers["seconds"]):
                losses = [r.last("train_loss") for r in row.records if r.status == "done"]
                parts.append(f"{name} did not get there (final train loss {summary(losses, '.2g')})")
                continue
            text = f"{name} took {numbers['gradient_equivalents']:.0f} gradient-equivalents"
            if not math.isnan(numbers["iterations"]):
                text += f" in {numbers['iterations']:.0f} iterations"
            text += f" at {1e3 * numbers['seconds'] / numbers['gradient_equivalents']:.1f} ms each"
            if row.ours:
                text += f", {100 * numbers['seconds_refresh'] / numbers['seconds']:.0f} % of the seconds in refreshes"
                text += "" if math.isnan(numbers["kept"]) else f", {numbers['kept']:.0f} pairs kept"
            parts.append(text)
        lines.append(f"- {column.replace('_', ' ')} {target:g}, lost: {'; '.join(parts)}.")
    return lines


def _facts(config: SuiteConfig, out: Path, seeds: int) -> list[str]:
    metas = [json.loads(p.read_text()) for p in sorted((out / "runs").rglob("meta.json"))]
    places = sorted({(m.get("processor", "?"), m.get("torch", "?"), m.get("commit", "?")) for m in metas})
    dates = sorted({str(m.get("date", "?"))[:10] for m in metas}) or ["?"]
    suite = Comparison(config, out)
    trial, final = (suite.first(config.tasks[0], final=last) for last in (False, True))
    results = [json.loads(p.read_text()) for p in sorted((out / "runs").rglob("result.json"))]
    clocks = {r["clock"] for r in results if "clock" in r}
    waited = [r["wall_seconds"] / r["seconds"] for r in results if r.get("clock") == "process" and r["seconds"] > 0]
    kind = "CPU seconds of the process, one thread" if clocks == {"process"} else "seconds"
    limit = f"{final.max_seconds:g} s of training" if final.max_seconds else "its last step"
    if trial.max_seconds and trial.max_seconds != final.max_seconds:
        limit += f", in the tuning {trial.max_seconds:g} s"
    return [
        f"Each optimizer was tuned with {config.trials} settings on {config.tuning_seeds} seed(s) apart, the same number for "
        f"all, by the seconds to the lowest train loss of the targets or else by the train loss at the end, then run on "
        f"{seeds} seeds that the tuning had not seen, each with the same initial weights for all. A run ends at its targets "
        f"or after {limit} (the task's own limit where its table says so).",
        f"Times are {kind}, refreshes, Jacobians and solves included, evaluation not; medians over seeds with 95 % bootstrap "
        "intervals, a miss counts as infinite, and beside them how many seeds got there.",
        *([_RATIOS] if config.ours else []),
        *(f"Measured on {cpu}, torch {version}, commit {commit}." for cpu, version, commit in places),
        f"Dates: {dates[0]} to {dates[-1]}.",
        *(
            [
                f"A run took {median(waited):.1f} times as long by the wall clock as its CPU seconds (median): above 1 the "
                "machine had other work beside it, which makes CPU seconds longer too, for all methods."
            ]
            if waited
            else []
        ),
    ]


_RATIOS = (
    "A ratio is the median over seeds of the best rival's seconds over ours, with a 95 % bootstrap interval over seeds; "
    "above 1 ours was sooner. A miss counts as infinite, so a ratio can be inf or 0; a seed that both missed counts as 1. "
    "The best rival is the one with the lowest median on these very seeds, at each target anew: the harder test for ours. "
    "Verdicts are by an exact paired signed-rank test over seeds, not corrected for their number."
)


def write_targets(config: SuiteConfig, out: Path, command: str, page: Path | None = None) -> Path:
    """Write ``report.md``, ``.html`` and ``.json`` to the suite's folder, and to a page of its own if asked for.

    What is not finished is named and left out.
    """
    found, missing = entrants(config, out)
    suite = Comparison(config, out)
    parts = [f"# {config.title}", *_facts(config, out, config.seeds)]
    if missing:
        parts.append(f"Not finished, so left out, as a rival too: {_named(missing, config)}.")
    header, body = summary_table(found, suite)
    if body:
        parts += ["## Ours against the best rival", markdown(header, body), _count(found, suite)]
    for task in config.tasks:
        rows = [r for r in found if r.task == task]
        if not rows:
            continue
        run = rows[0].records[0]
        limit = run.config.max_seconds
        size = f"{run.result['parameters']:,} parameters" if "parameters" in run.result else ""
        parts.append(f"## {task}\n\n{run.config.task['title']}, {size}" + (f", {limit:g} s a run." if limit else "."))
        lines: list[str] = []
        for column, targets in suite.targets(task).items():
            parts.append(
                f"Seconds to a {column.replace('_', ' ')}:\n\n" + markdown(*reach_table(rows, column, targets))
            )
            for target in targets:
                lines += reasons(rows, column, target)
        parts += ["\n".join(lines)] if lines else []
        parts.append("At the end of the runs:\n\n" + markdown(*end_table(rows)))
        parts.append("Tuning:\n\n" + markdown(*tuning_table(rows)))
        lost = [f"- {r.label}, seed {x.config.seed}: {x.result.get('reason', '')}" for r in rows for x in r.records
                if x.status != "done"]  # fmt: skip
        parts += ["Runs that did not end well:\n\n" + "\n".join(lost)] if lost else []
    parts.append(f"Made by `{command}`.")
    text = "\n\n".join(parts) + "\n"
    for path in (out / "report.md", *([] if page is None else [page])):
        atomic_write_text(path, text)
        atomic_write_json(path.with_suffix(".json"), encode(_numbers(found, suite, command)))
    write_html(out / "report.md")
    return page or out / "report.md"


def _named(missing: Sequence[Unit], config: SuiteConfig) -> str:
    by_task = {task: [u.optimizer for u in missing if u.task == task] for task in config.tasks}
    whole = [f"all on {task}" for task, names in by_task.items() if len(names) == len(config.optimizers)]
    some = [
        f"{', '.join(names)} on {task}" for task, names in by_task.items() if 0 < len(names) < len(config.optimizers)
    ]
    return "; ".join([*some, *whole])


def _count(found: Sequence[Entrant], suite: Comparison) -> str:
    """On how many problems ours was at least twice as soon at the lowest train loss, and where it was not."""
    lines = []
    for label in dict.fromkeys(r.label for r in found if r.ours):
        twice, seen = [], []
        for task in suite.config.tasks:
            rows = [r for r in found if r.task == task]
            targets = suite.targets(task)["train_loss"]
            result = compare(rows, "train_loss", targets[-1]).get(label)
            if result is None:
                continue
            seen.append(task)
            least = at_least(rows, label, result, "train_loss", targets[-1])
            if result.word in ("won", "ours alone") and least >= 2.0:
                twice.append(task)
        named = f" ({', '.join(twice)})" if twice else ""
        lines.append(
            f"{label}: at the lowest train loss at least twice as soon as the best rival on {len(twice)} of {len(seen)} "
            f"problems{named}, where a rival's miss counts only as the seconds that it was given."
        )
    return "\n\n".join(lines)


def _numbers(found: Sequence[Entrant], suite: Comparison, command: str) -> dict[str, Any]:
    rows, results = [], []
    for r in found:
        for record in r.records:
            reached = {
                column: {f"{t:g}": record.to_target(t, "seconds", column) for t in targets}
                for column, targets in suite.targets(r.task).items()
            }
            kept = ("train_loss", "solution_error", "seconds", *_SPENT)
            rows.append(
                {"task": r.task, "optimizer": r.label, "seed": record.config.seed, "status": record.status}
                | {"settings": r.settings, "seconds_to": reached, **{k: record.last(k) for k in kept}}
            )
    for task in suite.config.tasks:
        here = [r for r in found if r.task == task]
        for column, targets in suite.targets(task).items():
            for target in targets:
                for label, result in compare(here, column, target).items():
                    results.append(
                        {"task": task, "column": column, "target": target, "ours": label, "verdict": result.word}
                        | asdict(result)
                    )
    return {"title": suite.config.title, "command": command, "ratios": results, "runs": rows}
