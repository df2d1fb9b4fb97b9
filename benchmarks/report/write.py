"""A comparison's folder: table, verdict, figures and the data behind them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.config import ConfigError
from benchmarks.files import atomic_write_text
from benchmarks.report.plots import all_figures
from benchmarks.report.records import RunRecord, load_record
from benchmarks.report.table import markdown, summarise, terminal, verdict


def write_report(folders: Sequence[Path], out: Path, console: Console, target: float | None = None) -> Path:
    """Write ``report.md``, figures and their CSV to ``out``, and print the table.

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
    records = sorted((load_record(f) for f in folders), key=lambda r: (r.label, r.config.seed))
    tasks = sorted({str(r.config.task["file"]) for r in records})
    if len(tasks) > 1:
        raise ConfigError(f"a report compares runs of one task, these are of {', '.join(tasks)}")
    task = records[0].config.task
    aim = task["target"] if target is None else target
    title = f"{task['title']}, {task['loss'].replace('_', ' ')}" if "loss" in task else str(task["title"])
    rows = summarise(records, aim)
    lines = verdict(rows, aim)
    figures = all_figures(records, out, title, aim)
    path = atomic_write_text(out / "report.md", _page(records, folders, title, markdown(rows, aim), lines, figures))
    for table in terminal(rows, aim, title):
        console.print(table)
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"Report, figures and their data: {out}", soft_wrap=True)
    return path


def _page(
    records: Sequence[RunRecord],
    folders: Sequence[Path],
    title: str,
    table: str,
    lines: Sequence[str],
    figures: Sequence[Path],
) -> str:
    first = records[0]
    meta_file = Path(folders[0]) / "meta.json"
    meta = json.loads(meta_file.read_text()) if meta_file.exists() else {}
    data = next((r.result["data"] for r in records if "data" in r.result), "unknown")
    cost = next((r.result["product_cost"] for r in records if r.result.get("product_cost", 0.0) > 0), None)
    seeds = ", ".join(map(str, sorted({r.config.seed for r in records})))
    facts = [
        f"Data: {data}. {first.config.steps:,} steps, batches of {first.config.batch_size}, "
        f"evaluated every {first.config.eval_every}; curvature on a fixed batch of "
        f"{first.config.task['curvature_examples']:,}. Seeds: {seeds}.",
        "A gradient-equivalent is one gradient of a training batch; a curvature product counts "
        + (f"{cost:.1f} of them, as measured once on this machine." if cost else "as many as measured."),
        "Seconds hold training, refreshes and projections, not evaluation and not the harness's own measurements.",
        f"Measured on {meta.get('processor', 'unknown')}, {first.config.threads} thread, torch {meta.get('torch', '?')}, "
        f"commit {meta.get('commit', '?')}, {str(meta.get('date', '?'))[:10]}.",
    ]
    failed = [
        f"- {r.label}, seed {r.config.seed}: {r.status}: {r.result.get('reason', '')}"
        for r in records
        if r.status != "done"
    ]
    warned = list(dict.fromkeys(f"- {r.label}: {text}" for r in records for text in r.result.get("warnings", [])))
    settings = ["| optimizer | settings |", "|---|---|"]
    for record in {r.label: r for r in records}.values():
        given = {k: v for k, v in record.config.optimizer.items() if k not in ("file", "zoo", "label")}
        settings.append(
            f"| {record.label} | `{record.config.optimizer['zoo']}` {', '.join(f'{k}={v}' for k, v in given.items())} |"
        )
    parts = [
        f"# {title}",
        "\n\n".join(facts),
        table,
        "\n".join(f"- {line}" for line in lines),
        *(["Runs that did not end well:\n\n" + "\n".join(failed)] if failed else []),
        "\n".join(f"![{p.stem.replace('_', ' ')}]({p.name})\n\nData: [{p.stem}.csv]({p.stem}.csv)\n" for p in figures),
        "## Settings\n\n" + "\n".join(settings),
        *(["## Warnings\n\n" + "\n".join(warned)] if warned else []),
        f"Made by `python -m benchmarks {shlex.join(sys.argv[1:])}`.",
    ]
    return "\n\n".join(parts) + "\n"
