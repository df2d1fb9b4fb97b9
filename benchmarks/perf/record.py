"""What a row of the report holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Lab = "benchmarks.perf.lab.Lab"
TOLERANCE = 1.05  # a target counts as met within 5 %
OURS = "curvopt"


@dataclass(frozen=True)
class Figure:
    """One side of a row.

    Attributes:
        side: "curvopt", a peer, or a variant of ours.
        value: in the row's unit; None where nothing could be measured.
        spread: (lowest, highest) over the rounds.
        right: whether the independent products agree; None where there is nothing to check.
        evidence: what they said.
        flops: multiplications in units of one gradient's, or None.
        published: taken from the literature, not measured here.
        counts: whether it competes for "best peer" (a reference by hand may, a bound does not).
    """

    side: str
    value: float | None
    spread: tuple[float, float] | None = None
    right: bool | None = None
    evidence: str = ""
    flops: float | None = None
    published: bool = False
    counts: bool = True


@dataclass
class Row:
    """A line of the report.

    Attributes:
        name: what is measured.
        problem: on what.
        unit: of the values.
        target: what ours should be, or None.
        higher: larger is better.
        figures: ours first.
        note: in words, an explanation of a miss for one.
        measured: commit and date.
    """

    name: str
    problem: str
    unit: str
    target: float | None = None
    higher: bool = False
    figures: list[Figure] = field(default_factory=list)
    note: str = ""
    measured: str = ""

    @property
    def ours(self) -> Figure | None:
        """Our own figure."""
        return next((f for f in self.figures if f.side == OURS), None)

    @property
    def best_peer(self) -> Figure | None:
        """The best peer that gave a right answer."""
        peers = [
            f for f in self.figures if f.side != OURS and f.counts and f.value is not None and f.right is not False
        ]
        pick = max if self.higher else min
        return pick(peers, key=lambda f: float(f.value or 0.0), default=None)

    @property
    def met(self) -> bool | None:
        """Whether ours meets the target within 5 % and is right; None where that can't be said."""
        f = self.ours
        if f is None or f.value is None:
            return None
        if f.right is False:
            return False
        if self.target is None:
            return None
        return f.value >= self.target if self.higher else f.value <= TOLERANCE * self.target


RowMaker = Callable[["Lab"], list[Row]]  # type: ignore[valid-type]
