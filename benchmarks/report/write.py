"""A comparison's folder: table, verdict, figures and the data behind them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.config import ConfigError, settings
from benchmarks.files import atomic_write_text
from benchmarks.report.html import write_html
from benchmarks.report.plots import Drawn, all_figures
from benchmarks.report.records import RunRecord, differences, distinguish, load_record
from benchmarks.report.table import markdown, summarise, terminal, verdict


def write_report(folders: Sequence[Path], out: Path, console: Console, target: float | None = None) -> Path:
    """Write ``report.md`` and ``.html``, figures and their CSV to ``out``, and print the table.

    Args:
        folders: run folders, all of one task.
        out: where to.
        console: of the terminal.
        target: train loss that counts as solved; None takes the task's.

    Returns:
        the path of ``report.md``.
    """
    if not folders:
        raise ConfigError("no runs to report")
    loaded = [load_record(f) for f in folders]
    tasks = sorted({str(r.config.task["file"]) for r in loaded})
    if len(tasks) > 1:
        raise ConfigError(f"a report compares runs of one task, these are of {', '.join(tasks)}")
    records = sorted(distinguish(loaded), key=lambda r: (r.label, r.config.seed))
    task = records[0].config.task
    aim = task["target"] if target is None else target
    title = f"{task['title']}, {task['loss'].replace('_', '-')}" if "loss" in task else str(task["title"])
    rows = summarise(records, aim)
    lines = [*_unlike(records), *verdict(rows, aim)]
    figures = all_figures(records, out, title, aim)
    path = atomic_write_text(out / "report.md", _page(records, title, markdown(rows, aim), lines, figures))
    write_html(path)
    for table in terminal(rows, aim, title):
        console.print(table)
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"Report, figures and their data: {out}", soft_wrap=True)
    return path


def _unlike(records: Sequence[RunRecord]) -> list[str]:
    """What makes a comparison of these runs less than fair, or of one piece."""
    lines = []
    differing = [k for k in differences([r.config for r in records]) if not k.startswith("optimizer.")]
    if differing:
        found = (f"{k} ({', '.join(sorted({str(settings(r.config).get(k)) for r in records}))})" for k in differing)
        lines.append(f"Not like for like: the runs differ in {'; '.join(found)}.")
    commits = list(dict.fromkeys(c for r in records for c in r.commits))
    if len(commits) > 1:
        lines.append(
            f"The runs were made by different versions of the code ({', '.join(commits)}): --fresh makes them anew."
        )
    return lines


def _gradients(records: Sequence[RunRecord]) -> str:
    costs = sorted({float(r.result["product_cost"]) for r in records if r.result.get("product_cost", 0.0) > 0})
    if not costs:
        return "as many as measured."
    if len(costs) == 1:
        return f"{costs[0]:.1f} of them, as measured once on this machine."
    return f"{costs[0]:.1f} to {costs[-1]:.1f} of them, by run: give product_cost= for a comparison in one unit."


def _machine(record: RunRecord) -> str:
    meta, config = record.meta, record.config
    threads = f"{config.threads} thread{'s' if config.threads > 1 else ''}"
    where = f"{meta.get('processor', 'unknown')}, {threads}"
    if config.device != "cpu":
        where = f"{meta.get('gpu', 'unknown')} ({config.device}; {where})"
    return (
        f"Measured on {where}, torch {meta.get('torch', '?')}, commit {', '.join(record.commits)}, "
        f"{str(meta.get('date', '?'))[:10]}."
    )


def _page(
    records: Sequence[RunRecord],
    title: str,
    table: str,
    lines: Sequence[str],
    figures: Sequence[Path],
) -> str:
    first = records[0]
    data = next((r.result["data"] for r in records if "data" in r.result), "unknown")
    seeds = ", ".join(map(str, sorted({r.config.seed for r in records})))
    facts = [
        f"Data: {data}. {first.config.steps:,} steps, batches of {first.config.batch_size}, "
        f"evaluated every {first.config.eval_every or first.config.steps:,}; curvature on a fixed batch of "
        f"{first.config.task['curvature_examples']:,}. Seeds: {seeds}.",
        "A gradient-equivalent is one gradient of a training batch; a curvature product counts " + _gradients(records),
        f"Steps, gradient-equivalents and seconds to a target are those of the first evaluation at or below it: steps "
        f"are rounded up to a multiple of {first.config.eval_every or first.config.steps:,}.",
        "Seconds hold training, refreshes and projections, not evaluation and not the harness's own measurements.",
        _machine(first),
    ]
    command = f"python -m benchmarks {shlex.join(sys.argv[1:])}"
    failed = [
        f"- {r.label}, seed {r.config.seed}: {r.status}: {r.result.get('reason', '')}"
        for r in records
        if r.status != "done"
    ]
    warned = list(dict.fromkeys(f"- {r.label}: {text}" for r in records for text in r.result.get("warnings", [])))
    given_rows = ["| optimizer | settings |", "|---|---|"]
    for record in {r.label: r for r in records}.values():
        given = {k: v for k, v in record.config.optimizer.items() if k not in ("file", "zoo", "label")}
        given_rows.append(
            f"| {record.label} | `{record.config.optimizer['zoo']}` {', '.join(f'{k}={v}' for k, v in given.items())} |"
        )
    parts = [
        f"# {title}",
        "\n\n".join(facts),
        table,
        "\n".join(f"- {line}" for line in lines),
        *(["Runs that did not end well:\n\n" + "\n".join(failed)] if failed else []),
        *(Drawn(p, f"{title}: {p.stem.replace('_', ' ')}").markdown(command) for p in figures),
        "## Settings\n\n" + "\n".join(given_rows),
        *(["## Warnings\n\n" + "\n".join(warned)] if warned else []),
        f"Made by `{command}`.",
    ]
    return "\n\n".join(parts) + "\n"
