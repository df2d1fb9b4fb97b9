"""Checkpoints that a kill at any moment leaves readable, and the marks of a run's folder."""

from __future__ import annotations

import fcntl
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.config import ConfigError, RunConfig, config_hash, load_run, settings, to_yaml
from benchmarks.files import atomic_torch_save, atomic_write_json, atomic_write_text, remove_leftovers
from benchmarks.protocol.log import RECORDS
from benchmarks.sinks.jsonl import decode, encode

# Of the layout of the files below: a folder of another version is refused, never misread.
VERSION = 2


class BusyError(ConfigError):
    """Another process is working in the folder."""


class RunFolder:
    """The files of one run.

    ``config.yaml`` the resolved configuration, ``meta.json`` versions and machine, ``log.jsonl`` the record,
    ``checkpoint.pt`` the state, ``costs.json`` what was timed once, ``result.json`` the outcome, and ``DONE``
    once all of them are final.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.meta = self.path / "meta.json"
        self.log = self.path / RECORDS
        self.checkpoint = self.path / "checkpoint.pt"
        self.result = self.path / "result.json"
        self.costs = self.path / "costs.json"
        self.done = self.path / "DONE"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out; the operating system drops the lock with the process, however it ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(f"another process is working in {self.path}") from None
            yield

    def claim(self, config: RunConfig, meta: dict[str, Any]) -> dict[str, Any]:
        """Write the configuration, or check that the folder holds results of the same one.

        Returns:
            what ``meta.json`` now holds: ``meta``, or that of the first process with those of later ones that worked
            in another environment under ``resumed``.

        Raises:
            ConfigError: it holds another run's results.
        """
        for path in (self.checkpoint, self.config, self.meta, self.costs, self.result, self.done):
            remove_leftovers(path)
        if not self.config.exists():
            if self.checkpoint.exists() or self.done.exists():
                raise ConfigError(
                    f"{self.path} holds results but no config.yaml: move it away, or give another run_dir="
                )
            atomic_write_json(self.meta, meta)
            atomic_write_text(self.config, to_yaml(config))
            return meta
        found = load_run(self.config)
        kept: dict[str, Any] = json.loads(self.meta.read_text())
        version = kept.get("version")
        if version != VERSION:
            raise ConfigError(
                f"{self.path} was written in format {version}, this program writes {VERSION}: move it away"
            )
        if (config_hash(found), found.seed) != (config_hash(config), config.seed):
            raise ConfigError(
                f"{self.path} holds results of another configuration ({_difference(found, config)}): "
                "move it away, or give another run_dir="
            )
        if not self.done.exists() and not _same_place([kept, *kept.get("resumed", [])][-1], meta):
            kept["resumed"] = [*kept.get("resumed", []), meta]
            atomic_write_json(self.meta, kept)
        return kept

    def pin(self, config: RunConfig) -> None:
        """Write the configuration anew where it now holds what was measured."""
        text = to_yaml(config)
        if self.config.exists() and self.config.read_text() != text:
            atomic_write_text(self.config, text)

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint, all or nothing."""
        atomic_torch_save(state, self.checkpoint)

    def load(self) -> dict[str, Any] | None:
        """The checkpoint, or None. Loaded with ``weights_only=True``: it can hold no code.

        Raises:
            ConfigError: the file is damaged.
        """
        if not self.checkpoint.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ConfigError(
                f"{self.checkpoint} can't be read ({str(error).splitlines()[0][:200]}): delete the file to begin the run anew"
            ) from error
        return state

    def once(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``measure`` gave the first process of this run; all later ones read it."""
        if not self.costs.exists():
            atomic_write_json(self.costs, measure())
        found: dict[str, Any] = json.loads(self.costs.read_text())
        return found

    def finish(self, result: dict[str, Any]) -> None:
        """Write the outcome and mark the run as done."""
        atomic_write_json(self.result, encode(result))
        atomic_write_text(self.done, f"{result['status']}\n")

    def finished(self) -> dict[str, Any] | None:
        """The outcome of a run that is done, or None."""
        return decode(json.loads(self.result.read_text())) if self.done.exists() else None


def _same_place(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return {**one, "date": "", "resumed": []} == {**other, "date": "", "resumed": []}


def _difference(found: RunConfig, asked: RunConfig) -> str:
    old, new = ({**settings(c), "seed": c.seed} for c in (found, asked))
    keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    return ", ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} asked for" for k in keys[:3])
