"""The comparison as a table: Markdown for files, aligned for a terminal, and the verdict in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.report.records import AXES, RunRecord, by_label

_LOST = "no end"  # of a run that diverged or failed
_FORMS = {"step": ",.0f", "gradient_equivalents": ",.0f", "seconds": ".2f"}


@dataclass(frozen=True)
class Spread:
    """Values over seeds. A miss counts as infinitely bad, so the median is what stays meaningful.

    Leaving the misses out instead would judge an optimizer that diverged twice out of three by its one lucky seed.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over seeds; NaN without values."""
        known = [v for v in self.values if not math.isnan(v)]
        return statistics.median(known) if known else math.nan

    def text(self, form: str, miss: str = "not reached") -> str:
        """``median (smallest to largest)``, or the one value; ``miss`` stands for what is infinite."""
        known = [v for v in self.values if not math.isnan(v)]
        if not known:
            return "-"
        middle = _number(self.median, form, miss)
        if len(known) == 1 or min(known) == max(known):
            return middle
        return f"{middle} ({_number(min(known), form, miss)} to {_number(max(known), form, miss)})"

    def at_end(self, form: str) -> str:
        """The same for a value at the end of a run, which a run that did not end well has not."""
        return self.text(form, _LOST) if any(map(math.isfinite, self.values)) else "-"


@dataclass(frozen=True)
class Row:
    """One optimizer.

    Attributes:
        label, seeds, status: name, number of runs, and how they ended.
        train_loss, test_accuracy: at the end; accuracy a share. A run that ended early counts as the worst.
        to_target: axis -> where it stood when the target was reached; infinite for a miss.
        products, refreshes: in all.
        base, refresh, projection: milliseconds a step; the three together are the step.
        chi: mean dominant share of the update.
    """

    label: str
    seeds: int
    status: str
    train_loss: Spread
    test_accuracy: Spread
    to_target: dict[str, Spread]
    products: Spread
    refreshes: Spread
    base: Spread
    refresh: Spread
    projection: Spread
    chi: Spread


def _number(value: float, form: str, miss: str) -> str:
    if math.isnan(value):
        return "-"
    return miss if math.isinf(value) else format(value, form)


def _status(runs: Sequence[RunRecord]) -> str:
    counts = {s: sum(r.status == s for r in runs) for s in dict.fromkeys(r.status for r in runs)}
    if list(counts) == ["done"]:
        return "done"
    if len(runs) == 1:
        return (
            f"{runs[0].status} at step {int(runs[0].result.get('step', 0))}"
            if "step" in runs[0].result
            else runs[0].status
        )
    return ", ".join(f"{n} {s}" for s, n in counts.items())


def _per_step(record: RunRecord, column: str) -> float:
    steps = record.result.get("step", 0)
    return 1e3 * record.last(column) / steps if steps else math.nan


def summarise(records: Sequence[RunRecord], target: float | None) -> list[Row]:
    """One row an optimizer, sorted by the median final train loss; runs that ended early come last.

    Args:
        records: runs of one task.
        target: train loss that counts as solved; None leaves "to target" out.
    """

    def spread(runs: Sequence[RunRecord], name: str, worst: float) -> Spread:
        return Spread(tuple(r.last(name) if r.status == "done" else worst for r in runs))

    rows = []
    for label, runs in by_label(records).items():
        reached = {} if target is None else {a: Spread(tuple(r.to_target(target, a) for r in runs)) for a in AXES}
        chi = [float(c.mean()) if len(c := r.column("chi_update")) else math.nan for r in runs]
        rows.append(
            Row(
                label=label,
                seeds=len(runs),
                status=_status(runs),
                train_loss=spread(runs, "train_loss", math.inf),
                test_accuracy=spread(runs, "test_accuracy", -math.inf),
                to_target=reached,
                products=Spread(tuple(r.last("products") for r in runs)),
                refreshes=Spread(tuple(r.last("refreshes") for r in runs)),
                base=Spread(tuple(_per_step(r, "seconds_base") for r in runs)),
                refresh=Spread(tuple(_per_step(r, "seconds_refresh") for r in runs)),
                projection=Spread(tuple(_per_step(r, "seconds_projection") for r in runs)),
                chi=Spread(tuple(chi)),
            )
        )
    return sorted(rows, key=lambda r: math.inf if math.isnan(r.train_loss.median) else r.train_loss.median)


def _results(rows: Sequence[Row], target: float | None) -> tuple[list[str], list[list[str]]]:
    header = ["optimizer", "status", "train loss", "test accuracy"]
    header += [] if target is None else list(AXES.values())
    body = []
    for r in rows:
        accuracy = Spread(tuple(100 * v for v in r.test_accuracy.values)).at_end(".2f")
        line = [r.label, r.status, r.train_loss.at_end(".4g"), accuracy if accuracy == "-" else f"{accuracy} %"]
        if target is not None:
            line += [r.to_target[axis].text(form) for axis, form in _FORMS.items()]
        body.append(line)
    return header, body


def _costs(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["optimizer", "products", "refreshes", "base", "refresh", "projection", "chi"]
    body = [
        [
            r.label,
            r.products.text(",.0f"),
            r.refreshes.text(",.0f"),
            r.base.text(".2f"),
            r.refresh.text(".2f"),
            r.projection.text(".2f"),
            r.chi.text(".2f"),
        ]
        for r in rows
    ]
    return header, body


def _captions(target: float | None) -> tuple[str, str]:
    first = "Train loss and test accuracy at the end."
    if target is not None:
        first += f" Steps, gradient-equivalents and seconds to a train loss of {target:g}."
    second = (
        "Curvature products and refreshes in all; base, refresh and projection in milliseconds a step; "
        "chi: mean share of the update in the top k, by the harness's own basis."
    )
    return first, second


def markdown(rows: Sequence[Row], target: float | None) -> str:
    """Two Markdown tables: what was reached, and what it cost."""
    parts = []
    for caption, (header, body) in zip(_captions(target), (_results(rows, target), _costs(rows)), strict=True):
        lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
        parts += [caption, "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in body)])]
    return "\n\n".join(parts) + "\n"


def terminal(rows: Sequence[Row], target: float | None, title: str) -> list[Table]:
    """The same two for rich."""
    tables = []
    for caption, (header, body) in zip(_captions(target), (_results(rows, target), _costs(rows)), strict=True):
        table = Table(title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, column in enumerate(header):
            table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
        for line in body:
            table.add_row(*line)
        tables.append(table)
    return tables


def _listed(rows: Sequence[Row]) -> str:
    return " and ".join(filter(None, [", ".join(r.label for r in rows[:-1]), rows[-1].label]))


def verdict(rows: Sequence[Row], target: float | None) -> list[str]:
    """Who comes first, by what, and what that is worth."""
    lines = []
    finished = [r for r in rows if math.isfinite(r.train_loss.median)]
    if finished:
        best = [r for r in finished if r.train_loss.median == finished[0].train_loss.median]
        lines.append(
            f"Lowest train loss at the end: {_listed(best)} ({best[0].train_loss.at_end('.4g')}"
            f"{', a tie' if len(best) > 1 else ''})."
        )
    for axis, name in AXES.items() if target is not None else ():
        assert target is not None
        reached = [r for r in rows if math.isfinite(r.to_target[axis].median)]
        if not reached:
            lines.append(f"No optimizer reached a train loss of {target:g}.")
            break
        order = sorted(reached, key=lambda r: r.to_target[axis].median)
        least = order[0].to_target[axis].median
        first = [r for r in order if r.to_target[axis].median == least]
        rest = order[len(first) : len(first) + 3]
        others = "; then " + ", ".join(f"{r.label} ({r.to_target[axis].text(_FORMS[axis])})" for r in rest)
        lines.append(
            f"Fewest {name} to {target:g}: {_listed(first)} ({first[0].to_target[axis].text(_FORMS[axis])}"
            f"{', a tie' if len(first) > 1 else ''}){others if rest else ''}."
        )
    seeds, most = min((r.seeds for r in rows), default=0), max((r.seeds for r in rows), default=0)
    if seeds == 1:
        few = "One seed" if most == 1 else "One seed for some of them"
        lines.append(f"{few}: these are single runs, so small differences may be chance, and no ranking is claimed.")
    else:
        lines.append(
            f"Medians over {seeds}{f' to {most}' if most > seeds else ''} seeds, smallest and largest in brackets; "
            + (
                "no test of significance was made."
                if seeds >= 6
                else "too few seeds for a test of significance (6 is the least)."
            )
        )
    return lines
