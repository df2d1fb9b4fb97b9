"""Claims against what was measured: verdicts, and the table in Markdown and JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.config import ConfigError
from benchmarks.studies.base import Value
from benchmarks.studies.config import LEAST_SEEDS, ClaimSpec

REPRODUCED, FAILED, UNDECIDED, NOT_RUN = "reproduced", "not reproduced", "undecided", "not run at this size"


@dataclass(frozen=True)
class Claim:
    """A row of the table.

    Attributes:
        spec: as its file has it.
        values, nulls: by seed; empty where it was not run.
        verdict: one of the four.
        reason: why it is undecided.
    """

    spec: ClaimSpec
    values: tuple[float, ...]
    nulls: tuple[float, ...]
    verdict: str
    reason: str = ""

    def value_text(self) -> str:
        """``median (smallest to largest)``."""
        return spread_text(self.values)

    def null_text(self) -> str:
        """Words of the null model, and its values."""
        measured = spread_text(self.nulls) if any(not math.isnan(v) for v in self.nulls) else ""
        return ": ".join(t for t in (self.spec.baseline, measured) if t) or "-"

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "id": self.spec.id,
            "claim": self.spec.text,
            "source": self.spec.source,
            "metric": self.spec.metric,
            "threshold": self.spec.threshold(),
            "at_least": self.spec.at_least,
            "at_most": self.spec.at_most,
            "values": list(self.values),
            "median": median(self.values),
            "baseline": self.spec.baseline,
            "baseline_values": list(self.nulls),
            "verdict": self.verdict,
            "reason": self.reason,
            "note": self.spec.note,
        }


def median(values: Sequence[float]) -> float:
    """Median; NaN without values or if one is NaN, for a seed that says nothing must not vanish."""
    return statistics.median(values) if values and not any(map(math.isnan, values)) else math.nan


def spread_text(values: Sequence[float]) -> str:
    """``median (smallest to largest)``; seeds without a value are counted."""
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return "-"
    words = _number(statistics.median(known))
    if len(known) > 1:
        words += f" ({_number(min(known))} to {_number(max(known))})"
    lost = len(values) - len(known)
    return words + (f", {lost} without a value" if lost else "")


def _number(value: float) -> str:
    return format(value, ".3g") if abs(value) < 1000 or math.isinf(value) else format(value, ",.0f")


def judge(spec: ClaimSpec, values: Sequence[Value], size: str) -> Claim:
    """The verdict: reproduced if every seed meets the threshold, not reproduced if none does, else undecided.

    Fewer than three seeds decide nothing, and neither do seeds whose value could not be measured.
    """
    if size not in spec.sizes:
        return Claim(spec, (), (), NOT_RUN)
    found = tuple(float(v.value) for v in values)
    nulls = tuple(float(v.null) for v in values)
    lost = sum(map(math.isnan, found))
    met = sum(spec.met(v) for v in found if not math.isnan(v))
    if len(found) < LEAST_SEEDS:
        return Claim(spec, found, nulls, UNDECIDED, f"{len(found)} of the {LEAST_SEEDS} seeds that a verdict takes")
    if lost:
        return Claim(spec, found, nulls, UNDECIDED, f"not to be measured with {lost} of {len(found)} seeds")
    if met == len(found):
        return Claim(spec, found, nulls, REPRODUCED)
    if met == 0:
        return Claim(spec, found, nulls, FAILED)
    return Claim(spec, found, nulls, UNDECIDED, f"met by {met} of {len(found)} seeds")


def judge_all(specs: Sequence[ClaimSpec], metrics: Sequence[Mapping[str, Value]], size: str) -> list[Claim]:
    """One row a claim.

    Args:
        specs: of the study's file.
        metrics: of every seed.
        size: that was run.

    Raises:
        ConfigError: a claim about a metric that the study does not have.
    """
    rows = []
    for spec in specs:
        if size in spec.sizes and any(spec.metric not in found for found in metrics):
            known = ", ".join(sorted(metrics[0]))
            raise ConfigError(f"claim {spec.id} asks for the metric {spec.metric!r}, which is none of {known}")
        rows.append(judge(spec, [found[spec.metric] for found in metrics] if size in spec.sizes else [], size))
    return rows


HEADER = ("id", "claim", "source", "metric", "threshold", "value: median (range over seeds)", "null or baseline")


def markdown(claims: Sequence[Claim]) -> str:
    """The claims table."""
    lines = ["| " + " | ".join((*HEADER, "verdict")) + " |", "|---" * (len(HEADER) + 1) + "|"]
    for c in claims:
        text = c.spec.text + (f" ({c.spec.note})" if c.spec.note else "")
        verdict = f"**{c.verdict}**" + (f" ({c.reason})" if c.reason else "")
        cells = [c.spec.id, text, c.spec.source or "-", f"`{c.spec.metric}`", c.spec.threshold(), c.value_text()]
        cells += [c.null_text(), verdict]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def tally(claims: Sequence[Claim]) -> str:
    """How many of each verdict, in words."""
    counts = {v: sum(c.verdict == v for c in claims) for v in (REPRODUCED, FAILED, UNDECIDED, NOT_RUN)}
    return ", ".join(f"{n} {v}" for v, n in counts.items() if n) or "no claims"
