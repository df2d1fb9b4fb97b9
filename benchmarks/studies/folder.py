"""A study's folder: a sub-folder a part, each finished in one stroke, so that a kill costs only the part at work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.config import ConfigError
from benchmarks.files import atomic_torch_save, atomic_write_json
from benchmarks.protocol.checkpoint import RunFolder
from benchmarks.sinks.jsonl import decode, encode
from benchmarks.studies.base import Outcome, Part, PartResult
from benchmarks.studies.config import StudyConfig

# Of the layout of the files below: a folder of another version is refused, never misread.
VERSION = 1


class StudyFolder:
    """The files of one study.

    ``study.json`` its settings; ``parts/NAME/`` the log of a part, its tensors and, once it is finished,
    ``result.json``; ``claims.json``, ``claims.md`` and ``figures/`` what came of it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.head = self.path / "study.json"
        self.claims_json = self.path / "claims.json"
        self.claims_md = self.path / "claims.md"
        self.figures = self.path / "figures"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out."""
        with RunFolder(self.path).lock():
            yield

    def claim(self, config: StudyConfig) -> None:
        """Write the settings, or check that the folder holds results of the same ones.

        Raises:
            ConfigError: it holds those of others, or another format.
        """
        asked = encode({"version": VERSION, "study": config.name, "data": config.study.dataset, **config.settings})
        if not self.head.exists():
            if (self.path / "parts").exists():
                raise ConfigError(f"{self.path} holds parts but no {self.head.name}: move it away, or use --fresh")
            atomic_write_json(self.head, asked)
            return
        found = json.loads(self.head.read_text())
        differing = [k for k in {**found, **asked} if found.get(k) != asked.get(k)]
        if differing:
            key = differing[0]
            raise ConfigError(
                f"{self.path} holds another study ({key}: {found.get(key)!r} there, {asked.get(key)!r} asked for): "
                "move it away, or use --fresh"
            )

    def clear(self) -> None:
        """Delete what earlier calls left; a folder that holds no study is left alone.

        Raises:
            ConfigError: it holds files but no study.
        """
        if self.path.exists():
            if not self.head.exists() and any(self.path.iterdir()):
                raise ConfigError(f"{self.path} holds files but no study: it is left alone")
            shutil.rmtree(self.path)

    def part(self, part: Part) -> Path:
        """Folder of a part."""
        return self.path / "parts" / part.name

    def finished(self, part: Part) -> PartResult | None:
        """A part's result, or None.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self.part(part) / "result.json"
        if not path.exists():
            return None
        try:
            found = decode(json.loads(path.read_text()))
            values, rows = found["values"], found["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} can't be read: delete the folder to do this part anew") from error
        tensors = self.part(part) / "tensors.pt"

        def load() -> dict[str, Tensor]:
            return dict(torch.load(tensors, weights_only=True)) if tensors.exists() else {}

        return PartResult(values, rows, load)

    def measured(self, part: Part) -> dict[str, Any]:
        """What can't repeat: seconds, date, commit, machine."""
        return dict(decode(json.loads((self.part(part) / "result.json").read_text()))["measured"])

    def begin(self, part: Part) -> Path:
        """An empty folder for a part: a kill may have left pieces of it."""
        path = self.part(part)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def warnings(self, part: Part) -> list[str]:
        """Names of the warnings that a part gave."""
        return list(json.loads((self.part(part) / "result.json").read_text())["warnings"])

    def finish(
        self, part: Part, outcome: Outcome, rows: list[dict[str, Any]], warnings: list[str], measured: dict[str, Any]
    ) -> None:
        """Store a part; ``result.json`` comes last, whole or not at all, and marks it as done."""
        if outcome.tensors:
            kept = {k: v.detach().to("cpu", copy=True) for k, v in outcome.tensors.items()}
            atomic_torch_save(kept, self.part(part) / "tensors.pt")
        found = encode({"values": outcome.values, "rows": rows, "warnings": warnings, "measured": measured})
        atomic_write_json(self.part(part) / "result.json", found, indent=None)
