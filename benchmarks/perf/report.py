"""Rows as a table on the screen and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.perf.record import OURS, Figure, Row


def number(value: float | None) -> str:
    """Three significant digits."""
    return "-" if value is None else f"{value:.3g}"


def verdict(row: Row) -> str:
    """In a word."""
    if row.ours is not None and row.ours.right is False:
        return "WRONG"
    return {True: "met", False: "missed", None: ""}[row.met]


def ratio(row: Row) -> float | None:
    """How many times ours is better than the best peer."""
    ours, peer = row.ours, row.best_peer
    if ours is None or peer is None or not ours.value or not peer.value:
        return None
    return ours.value / peer.value if row.higher else peer.value / ours.value


def _peer(row: Row) -> str:
    peer = row.best_peer
    return "-" if peer is None else f"{number(peer.value)} {peer.side}{' (published)' if peer.published else ''}"


def cells(row: Row) -> list[str]:
    """A line of the main table."""
    ours = row.ours
    best = ratio(row)
    return [
        row.name,
        row.problem,
        row.unit,
        number(row.target),
        number(None if ours is None else ours.value),
        verdict(row),
        _peer(row),
        "-" if best is None else f"{best:.2f}",
    ]


HEAD = ["what", "problem", "unit", "target", "ours", "", "best right peer", "ratio"]


def show(rows: Sequence[Row], console: Console) -> None:
    """The table, on a screen."""
    table = Table(*HEAD, title=None)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.name}, {row.problem}: {row.note}", soft_wrap=True, highlight=False)


def _side(f: Figure) -> list[str]:
    spread = "" if f.spread is None else f"{number(f.spread[0])} to {number(f.spread[1])}"
    checked = {True: "right", False: "**wrong**", None: ""}[f.right]
    origin = "published, not measured" if f.published else ""
    words = ", ".join(w for w in (checked, f.evidence, origin) if w)
    return [f.side, number(f.value), spread, number(f.flops), words]


def _line(items: Sequence[str]) -> str:
    return "| " + " | ".join(item.replace("|", "\\|") for item in items) + " |"


def page(
    rows: Sequence[Row], where: dict[str, Any], versions: dict[str, str], missing: dict[str, str], how: str
) -> str:
    """The report as Markdown."""
    parts = [
        "# What curvature costs",
        "",
        f"`{how}` on {where['processor']} ({where['cores']} cores; GPU: {where['gpu']}), {where['platform']}, "
        f"Python {where['python']}, torch {where['torch']}, commit {where['commit']}, {where['date']}. "
        "That is the latest call; rows can be measured one by one, and each says below at which commit it was.",
        "",
        "Times are processor seconds in units of one gradient (forward and backward of the same batch) in the same "
        "process, at one thread, sides alternating; each is the median over the rounds, with the extremes beside it. "
        "Every answer was checked by independent float64 products: a side whose answer is wrong does not compete, and "
        "ours then counts as missed. A target counts as met within 5 %. `mult.` are multiplications of matrix products "
        "and convolutions in units of one gradient's, counted, not timed.",
        "",
        "Peers: " + ", ".join(f"{name} {v}" for name, v in sorted(versions.items())) + ".",
    ]
    parts += [f"Not installed: {name} ({why})." for name, why in sorted(missing.items())]
    parts += ["", _line(HEAD), _line(["---"] * len(HEAD)), *(_line(cells(row)) for row in rows), ""]
    for row in rows:
        parts += [f"## {row.name}, {row.problem} ({row.unit})", ""]
        if row.figures:
            parts += [_line(["side", "median", "spread", "mult.", "checked"]), _line(["---"] * 5)]
            parts += [_line(_side(f)) for f in row.figures] + [""]
        if row.note:
            parts += [row.note, ""]
        if row.measured:
            parts += [f"Measured: {row.measured}.", ""]
    return "\n".join(parts).rstrip() + "\n"


__all__ = ["OURS", "page", "show"]
