"""Checkpoints that a kill at any moment leaves readable, and the marks of a run's folder."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.config import ConfigError, RunConfig, config_hash, load_run, to_yaml
from benchmarks.files import atomic_torch_save, atomic_write_json, atomic_write_text, remove_leftovers
from benchmarks.protocol.log import RECORDS
from benchmarks.sinks.jsonl import decode, encode

# Of the layout of the files below: a folder of another version is refused, never misread.
VERSION = 1


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
                raise ConfigError(f"another process is working in {self.path}") from None
            yield

    def claim(self, config: RunConfig, meta: dict[str, Any]) -> None:
        """Write the configuration, or check that the folder holds results of the same one.

        Raises:
            ConfigError: it holds another run's results.
        """
        remove_leftovers(self.checkpoint)
        if not self.config.exists():
            if self.checkpoint.exists() or self.done.exists():
                raise ConfigError(
                    f"{self.path} holds results but no config.yaml: move it away, or give another run_dir="
                )
            atomic_write_json(self.meta, meta)
            atomic_write_text(self.config, to_yaml(config))
            return
        found = load_run(self.config)
        version = json.loads(self.meta.read_text()).get("version")
        if version != VERSION:
            raise ConfigError(
                f"{self.path} was written in format {version}, this program writes {VERSION}: move it away"
            )
        if (config_hash(found), found.seed) != (config_hash(config), config.seed):
            raise ConfigError(
                f"{self.path} holds results of another configuration ({_difference(found, config)}): "
                "move it away, or give another run_dir="
            )

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint, all or nothing."""
        atomic_torch_save(state, self.checkpoint)

    def load(self) -> dict[str, Any] | None:
        """The checkpoint, or None. Loaded with ``weights_only=True``: it can hold no code."""
        if not self.checkpoint.exists():
            return None
        return torch.load(self.checkpoint, weights_only=True)

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


def _difference(found: RunConfig, asked: RunConfig) -> str:
    from benchmarks.config import to_dict

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in values.items():
            out.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
        return out

    old, new = flat(to_dict(found)), flat(to_dict(asked))
    keys = [k for k in {**old, **new} if old.get(k) != new.get(k) and not k.startswith(("wandb", "out", "run_dir"))]
    return ", ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} asked for" for k in keys[:3])
