"""``python -m benchmarks perf``: run rows, print the table, write the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.config import ConfigError
from benchmarks.files import atomic_write_text
from benchmarks.perf import report
from benchmarks.perf.lab import Lab
from benchmarks.perf.record import Figure, Row
from benchmarks.perf.rows import ROWS
from benchmarks.protocol.environment import environment

DEFAULT_OUT = Path(__file__).resolve().parents[1] / "results" / "perf.md"


def chosen(names: Sequence[str]) -> list[str]:
    """The rows asked for, all by default."""
    unknown = [n for n in names if n not in ROWS]
    if unknown:
        raise ConfigError(f"no row named {unknown[0]!r}; rows: {', '.join(ROWS)}")
    return list(names) or list(ROWS)


def _load(store: Path) -> dict[str, list[Row]]:
    if not store.exists():
        return {}
    raw = json.loads(store.read_text())
    return {
        key: [Row(**{**item, "figures": [Figure(**f) for f in item["figures"]]}) for item in items]
        for key, items in raw.items()
    }


def perform(names: Sequence[str], rounds: int, out: Path, console: Console) -> list[Row]:
    """Run rows one after the other; results land in the page after each, so that an interruption loses one row.

    Args:
        names: rows, empty for all. A part of the rows replaces that part of a page written before.
        rounds: of each timing.
        out: the page; the figures stand beside it as JSON.
        console: takes progress and the table.
    """
    names = chosen(names)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lab = Lab(device, rounds, lambda text: console.print(text, highlight=False))
    store = out.with_suffix(".json")
    kept = _load(store)
    found: list[Row] = []
    for name in names:
        rows = ROWS[name](lab)
        where = environment()
        for row in rows:
            row.measured = f"commit {where['commit']}, {where['date']}"
        kept[name] = rows
        found += rows
        ordered = {key: kept[key] for key in ROWS if key in kept}
        figures = {key: [asdict(row) for row in rows] for key, rows in ordered.items()}
        atomic_write_text(store, json.dumps(figures, indent=1) + "\n")
        text = report.page(
            [row for rows in ordered.values() for row in rows],
            where,
            lab.peers.versions,
            lab.peers.missing,
            f"python -m benchmarks perf --rounds {rounds}",
        )
        atomic_write_text(out, text)
    report.show(found, console)
    console.print(f"Written: {out}", soft_wrap=True, highlight=False)
    return found
