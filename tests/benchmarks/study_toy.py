"""A study that costs nothing: what the framework promises is tested on it. Run as a script it kills itself once."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.progress import RunProgress
from benchmarks.studies import Outcome, Part, Study, Value, register
from benchmarks.studies.config import load_study
from benchmarks.studies.run import perform
from curvopt.diagnostics.plots import new_figure

FILE = """
title: a toy
paper: nobody
question: Does a random walk walk?
data: [digits]
settings: {steps: 6}
sizes:
  paper: {steps: 600}
claims:
  - {id: T1, text: it moves, metric: distance, at_least: 0.0, baseline: none}
  - {id: T2, text: it flies, metric: distance, at_least: 1000}
  - {id: T3, text: it comes far, metric: far, at_least: 3, sizes: [paper]}
  - {id: T4, text: seed 1 alone, metric: seed, at_least: 1, at_most: 1}
  - {id: T5, text: what can't be measured, metric: lost, at_most: 1}
"""


@dataclass
class Settings:
    steps: int = 3
    scale: float = 1.0


@register("toy")
class Toy(Study):
    Settings = Settings
    kill_at: str = ""  # name of the part in the middle of which the process kills itself
    done: list[str] = []

    def parts(self, seed):
        return [Part("start", seed), Part("walk", seed, ("start",)), Part("other", seed, ("start",))]

    def run(self, part, lab):
        if part.arm == "start":
            return Outcome({"seed": part.seed}, {"place": torch.full((2,), float(part.seed))})
        place = lab.needs["start"].load()["place"]
        generator = torch.Generator().manual_seed(part.seed + 10 * (part.arm == "other"))
        for step in range(self.settings.steps):
            place = place + self.settings.scale * torch.randn(2, generator=generator)
            lab.log(step, x=float(place[0]), strange=float("nan"))
            lab.advance(step + 1)
            if part.name == self.kill_at and step == self.settings.steps // 2:
                os.kill(os.getpid(), signal.SIGKILL)
        self.done.append(part.name)
        return Outcome({"distance": float(place.norm()), "infinite": float("inf"), "unit": float(torch.rand(()))})

    def metrics(self, arms):
        return {
            "distance": Value(arms["walk"].values["distance"], arms["other"].values["distance"]),
            "far": Value(arms["walk"].tail("x")),
            "seed": Value(arms["start"].values["seed"]),
            "lost": Value(float("nan")),
        }

    def figures(self, seeds):
        figure, axes = new_figure()
        rows = [{"seed": s, "x": arms["walk"].last("x")} for s, arms in seeds.items()]
        axes[0, 0].plot([r["x"] for r in rows])
        return {"toy": (figure, rows)}


def written(folder: Path) -> Path:
    path = folder / "toy.yaml"
    path.write_text(FILE)
    return path


if __name__ == "__main__":
    out = Path(sys.argv[1])
    Toy.kill_at = sys.argv[2]
    config = load_study("toy", path=written(out))
    with RunProgress() as progress:
        perform(config, out, progress, wandb="disabled")
