"""Weights & Biases beside the plain files: it never decides anything, never hangs and never ends a run.

All of wandb runs in a thread of its own behind a queue, so that training never waits for it except, for a bounded
time, at the start and at the end. The mode is the explicit argument, else WANDB_MODE, else offline where no key is
configured; a failure online continues offline under the same run id, a failure offline switches the sink off, and
either way one `SinkWarning` says so. Steps are always explicit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import os
import queue
import secrets
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_write_text
from .base import SinkWarning, check_record, plain
from .jsonl import encode
from .wandb_reader import holds_exit

__all__ = ["WandbSink", "choose_mode"]

_ID_FILE = "wandb-run-id.txt"
_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
_OFFLINE_INIT = 30.0  # seconds
_GRACE = 5.0  # seconds for wandb's file to be completed, and as many again before it is left behind
_QUEUE = 20_000  # records that may wait; a wandb that is this far behind is stuck


class WandbSink:
    """Logs a run to wandb.

    Args:
        folder: The run's folder; wandb writes to `folder/wandb/`, and the run id is kept beside it.
        mode: "online", "offline" or "disabled"; None asks WANDB_MODE, then looks whether a key is configured.
        project, name, group, tags: As in wandb.
        run_id: wandb's id; None takes that of `folder` (so that a resumed run is the same run), or makes one.
        resume_step: The step that a resumed run continues from.
        earlier: Gives the records of a resumed run up to that step, asked for when the run is opened. They are sent
            again first: a kill tears off the end of wandb's file, and the plain files are what holds.
        init_timeout: Seconds that wandb gets to open a run online before it goes offline.
        finish_timeout: Seconds that wandb gets to upload at the end; what is left stays on disk for `wandb sync`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        mode: str | None = None,
        project: str = "curvopt",
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        run_id: str | None = None,
        resume_step: int | None = None,
        earlier: Callable[[], Sequence[Mapping[str, Any]]] | None = None,
        init_timeout: float = 15.0,
        finish_timeout: float = 30.0,
    ) -> None:
        self.folder = Path(folder)
        self.mode = mode
        self.note = ""
        self.run_id = run_id
        self._labels: dict[str, Any] = {"project": project, "name": name, "group": group, "tags": tuple(tags)}
        self._resumed = resume_step is not None
        self._step = resume_step or 0
        self._earlier = earlier
        self._init_timeout = init_timeout
        self._finish_timeout = finish_timeout
        self._config: dict[str, Any] = {}
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(_QUEUE)
        self._problems: queue.Queue[str] = queue.Queue()
        self._ready = threading.Event()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._run: Any = None
        self._fell = False

    # --- the sink's calls, in the training thread: none raises, none waits beyond its time-out ---------------------

    def start(self, config: Mapping[str, Any]) -> None:
        """Opens the run, or switches the sink off; `mode` and `note` tell what came of it."""
        self._config = plain(config)
        self.mode, reason = choose_mode(self.mode)
        if reason:
            self._problems.put(reason)
        if self.mode == "disabled":
            self.note = "W&B: disabled"
        elif importlib.util.find_spec("wandb") is None:
            self.mode = "disabled"
            self.note = 'W&B: not installed (pip install "curvopt-torch[wandb]" brings it); the plain files have it all'
        else:
            self._open()
            self._send_earlier()
        self._report()

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Queues one record; wandb refuses steps that fall, so such a record stays out, with a warning."""
        check_record(record, step)
        if step < self._step:
            self._problems.put(f"a record of step {step} came after step {self._step}: wandb takes no falling steps")
        else:
            self._step = step
            values = {key: value for key, value in plain(record).items() if key != "step"}
            self._submit(lambda: self._run.log(values, step=step))
        self._report()

    def summary(self, values: Mapping[str, Any]) -> None:
        """Queues summary values; wandb would store NaN as null there, so it gets the text of the plain files."""
        given = encode(values)
        self._submit(lambda: self._run.summary.update(given))
        self._report()

    def figure(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Queues a picture, logged at the last step as "figure/NAME"."""
        file, step = Path(path), self._step

        def send() -> None:
            import wandb

            self._run.log({f"figure/{name or file.stem}": wandb.Image(str(file))}, step=step)

        self._submit(send, optional="figure")
        self._report()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Queues a table, logged at the last step as "table/NAME"."""
        heads: list[str | int] = list(columns)
        cells, step = [list(row) for row in plain(rows)], self._step

        def send() -> None:
            import wandb

            table = wandb.Table(columns=heads, data=cells, allow_mixed_types=True)
            self._run.log({f"table/{name}": table}, step=step)

        self._submit(send, optional="table")
        self._report()

    def sync(self) -> None:
        """Nothing: wandb has no such call. The plain files are what a resumed run builds on."""
        self._report()

    def finish(self, status: str = "finished") -> None:
        """Closes the run and waits until its file is complete, at most `finish_timeout` and a little.

        A second call does nothing.
        """
        if self._thread is not None:
            code = 0 if status == "finished" else 1
            self._submit(lambda: self._close(code))
            with contextlib.suppress(queue.Full):
                self._tasks.put(None, timeout=self._finish_timeout)
            # wandb's own finish_timeout comes first; this one holds when even that is stuck.
            if not self._done.wait(self._finish_timeout + 2 * _GRACE):
                self._problems.put(
                    f"wandb did not finish within {self._finish_timeout + 2 * _GRACE:g} s and is left behind; "
                    f"its files are in {self.folder / 'wandb'}, `wandb sync` uploads them"
                )
            self._thread = None
        self._report()

    def _send_earlier(self) -> None:
        rows = [plain(record) for record in self._earlier()] if self._earlier is not None else []

        def send() -> None:
            for row in rows:
                self._run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

        if rows:
            self._submit(send)

    # --- inside the thread -----------------------------------------------------------------------------------------

    def _open(self) -> None:
        # wandb reports its own errors and timings to its server, offline too, and waits for that at exit (0.31.0).
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run_id = self.run_id or self._remembered_id()
        self._thread = threading.Thread(target=self._work, name="wandb-sink", daemon=True)
        self._thread.start()
        # Online, then offline; twice, because wandb checks the key and starts its service beside them, and the import.
        limit = 2 * (self._init_timeout + max(self._init_timeout, _OFFLINE_INIT))
        if not self._ready.wait(limit):
            self._thread, self.mode = None, "disabled"
            self._problems.put(f"wandb did not start within {limit:g} s and is switched off")
        if self.mode != "disabled" and not self.note:
            self.note = f"W&B: {self.mode}, run {self.run_id}" + (
                f", files in {self.folder / 'wandb'}" if self.mode == "offline" else ""
            )

    def _work(self) -> None:
        try:
            self._begin()
        except Exception as error:  # a broken installation, whatever it raises
            self._switch_off("could not start", error)
        finally:
            self._ready.set()
        while (task := self._tasks.get()) is not None:
            if self._run is None:
                continue
            try:
                task()
            except Exception as error:
                self._retry_offline(task, error)
        self._done.set()

    def _begin(self) -> None:
        if self.mode == "online":
            try:
                self._init("online")
                return
            except Exception as error:
                self._problems.put(f"wandb could not start online, continuing offline: {_short(error)}")
                self._stop_service()
                self.mode = "offline"
        try:
            self._init("offline")
        except Exception as error:
            # The service of this process may still hold the run for another one, killed since, that it had started.
            if "in use" not in str(error):
                raise
            self._stop_service()
            self._init("offline")

    def _init(self, mode: str) -> None:
        import wandb

        wanted: dict[str, Any] = {
            "mode": mode,
            "root_dir": str(self.folder),
            "console": "off",
            "silent": True,
            "disable_git": True,
            "disable_code": True,
            "x_disable_stats": True,
            "x_disable_meta": True,
            "x_save_requirements": False,
            # Offline nothing but a busy machine can be slow, and there is no third way to fall back to.
            "init_timeout": self._init_timeout if mode == "online" else max(self._init_timeout, _OFFLINE_INIT),
            "login_timeout": self._init_timeout,
            "finish_timeout": self._finish_timeout,
            # A run of the user's own in this process stays untouched, and ours is not handed out in its place.
            "reinit": "create_new",
        }
        known = getattr(wandb.Settings, "model_fields", wanted)
        settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in known})
        self._run = wandb.init(
            id=self.run_id,
            config=self._config,
            settings=settings,
            resume="allow" if self._resumed and mode == "online" else None,
            **self._labels,
        )

    def _close(self, code: int) -> None:
        """Finishes the run; its file is written by another process, which may be behind when wandb returns."""
        self._run.finish(exit_code=code)
        file = getattr(self._run.settings, "sync_file", None)
        deadline, seen = time.monotonic() + _GRACE, -1
        while file and time.monotonic() < deadline:
            if os.path.exists(file) and (size := os.path.getsize(file)) != seen:
                seen = size
                if holds_exit(file):
                    return
            time.sleep(0.02)

    def _retry_offline(self, task: Callable[[], None], error: Exception) -> None:
        if isinstance(task, _Optional):
            self._problems.put(f"wandb took no {task.what}: {_short(error)}")
            return
        if self.mode != "online" or self._fell:
            self._switch_off("failed", error)
            return
        self._fell = True
        self._problems.put(f"wandb failed online, continuing offline: {_short(error)}")
        try:
            self._stop_service()
            self._init("offline")
            self.mode = "offline"
            task()
        except Exception as second:
            self._switch_off("failed offline too", second)

    def _switch_off(self, what: str, error: Exception) -> None:
        run, self._run, self.mode = self._run, None, "disabled"
        self._problems.put(f"wandb {what} and is switched off: {_short(error)}")
        if run is not None:
            with contextlib.suppress(Exception):  # else wandb.init() of the user would be handed this run
                run.finish(exit_code=1)

    def _stop_service(self) -> None:
        # The service process holds on to a run id whose start failed ("run ID is in use"); a new one does not.
        import wandb

        if wandb.run is None:
            wandb.teardown(exit_code=1)

    # --- small things ----------------------------------------------------------------------------------------------

    def _submit(self, task: Callable[[], None], optional: str = "") -> None:
        if self._thread is None or self.mode == "disabled":
            return
        try:
            self._tasks.put_nowait(_Optional(task, optional) if optional else task)
        except queue.Full:
            self.mode = "disabled"
            self._problems.put(f"wandb is {_QUEUE:,} records behind and is switched off")

    def _report(self) -> None:
        while True:
            try:
                problem = self._problems.get_nowait()
            except queue.Empty:
                return
            warnings.warn(f"W&B: {problem}", SinkWarning, stacklevel=3)

    def _remembered_id(self) -> str:
        path = self.folder / _ID_FILE
        with contextlib.suppress(FileNotFoundError):
            if known := path.read_text(encoding="utf-8").strip():
                return known
        made = secrets.token_hex(5)
        atomic_write_text(path, made + "\n")
        return made


class _Optional:
    """A task whose failure costs a picture or a table, not the run's log."""

    def __init__(self, task: Callable[[], None], what: str) -> None:
        self.task, self.what = task, what

    def __call__(self) -> None:
        self.task()


def choose_mode(explicit: str | None) -> tuple[str, str]:
    """The mode ("online", "offline" or "disabled") and a complaint or "": explicit, else WANDB_MODE, else by the key.

    Online without a key becomes offline: wandb would ask for one on the terminal and wait for ever.
    """
    asked = explicit if explicit is not None else os.environ.get("WANDB_MODE") or None
    if asked is None:
        return ("online" if _has_key() else "offline"), ""
    mode = _MODES.get(asked.lower())
    if mode is None:
        where = "mode" if explicit is not None else "WANDB_MODE"
        return "offline", f"{where}={asked!r} is none of {', '.join(sorted(set(_MODES.values())))}: going offline"
    if mode == "online" and not _has_key():
        return "offline", "online was asked for, but no API key is configured (`wandb login`): going offline"
    return mode, ""


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname
    names = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for name in names:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            hosts = netrc.netrc(os.path.expanduser(name)).hosts
            # Without an own server any wandb host counts; a wrong guess only costs the fall back to offline.
            if any(entry == host if host else "wandb" in entry for entry in hosts):
                return True
    return False


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
