"""W&B as a sink: what it stored is read back from disk and matches the plain files; it never hangs nor ends a run."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from benchmarks.sinks import JsonlSink, MultiSink, SinkWarning, WandbSink
from benchmarks.sinks import wandb_sink as wandb_sink_module
from benchmarks.sinks.jsonl import read_run as read_plain
from benchmarks.sinks.wandb_reader import WandbRun, read_run
from benchmarks.sinks.wandb_sink import choose_mode

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR")


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nobody has logged in to wandb, and whose home stays clean."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    for name in FOLDERS:
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    # what the sink would set for the rest of the process; set here, it goes away with the test
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


class BlackHole:
    """A server that accepts connections and never answers, or hangs up at once; counts them."""

    def __init__(self) -> None:
        self.hang_up = False
        self.connections: list[socket.socket] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        try:
            while True:
                self.connections.append(self.socket.accept()[0])
                if self.hang_up:
                    self.connections[-1].close()
        except OSError:
            pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which would take one more connection otherwise
        self.socket.close()
        for connection in self.connections:
            connection.close()


@pytest.fixture
def hole() -> Iterator[BlackHole]:
    made = BlackHole()
    yield made
    made.close()


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots, as wandb stores them."""
    out: dict[str, Any] = {}
    for key, value in record.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value})
    return out


def text(value: Any) -> str:
    """Values as exact text, in which NaN equals NaN and, because wandb writes 2.0 as 2, whole floats are ints."""
    return json.dumps(whole(value), sort_keys=True)


def whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def ended(folder: Path) -> WandbRun:
    """A run that no sink of ours has finished, once its exit is on disk: wandb itself returns a moment too early."""
    for _ in range(200):
        try:
            if (run := read_run(folder)).exit_code is not None:
                return run
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    return read_run(folder)


def records(count: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "loss": 1 / (step + 3),
            "chi": {"gradient": math.nan if step == 4 else 0.1 * step, "update": -math.inf if step == 5 else 1e-300},
            "lambda": [2.5, -0.125 * step],
            "products": 30 * step,
            "phase": "NaN" if step == 6 else "train",
            "ok": step % 2 == 0,
            "none": None,
        }
        for step in range(count)
    ]


CONFIG = {"optimizer": {"name": "BulkSGD", "lr": 0.1, "betas": [0.9, 0.999]}, "seed": 3, "limit": None, "task": "mnist"}


def test_wandbs_file_matches_the_plain_files_record_for_record(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    wandb_sink = WandbSink(folder, project="proj", name="bulk", group="g", tags=["t"])
    sink = MultiSink([wandb_sink, JsonlSink(folder)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", SinkWarning)
        sink.start(CONFIG)
        assert wandb_sink.mode == "offline" and wandb_sink.note.startswith(f"W&B: offline, run {wandb_sink.run_id}")
        for i, record in enumerate(records()):
            sink.log(record, i * 10)
        sink.summary({"best": {"loss": 0.1}, "nan": math.nan})
        sink.summary({"status": "ok"})
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(1, 1))
        axes.plot([0, 1])
        figure.savefig(folder / "loss.png")
        pyplot.close(figure)
        sink.figure(folder / "loss.png")
        sink.table("final", ["optimizer", "loss"], [["SGD", 0.5], ["AdamW", math.nan], ["none", "text"]])
        sink.finish()
    plain, logged = read_plain(folder), read_run(folder)
    assert [row["step"] for row in logged.history] == [row["step"] for row in plain.records] == list(range(0, 120, 10))
    for ours, theirs in zip(plain.records, logged.history, strict=True):
        assert text(flat(ours)) == text(theirs)
    assert text(logged.config) == text(plain.config) == text(CONFIG)
    # wandb adds the last value of each history key to the summary, so ours is part of it
    summary = flat(logged.summary)
    for key, value in flat(plain.summary).items():
        assert text(summary[key]) == text(value)
    assert (logged.project, logged.name, logged.run_id) == ("proj", "bulk", wandb_sink.run_id)
    assert logged.exit_code == 0 and not logged.torn and plain.status == "finished"
    assert set(logged.media) == {"figure/loss", "table/final"}
    stored = logged.files[0].parent / "files" / logged.media["table/final"]["path"]
    table = json.loads(stored.read_text())
    assert table["columns"] == ["optimizer", "loss"] and text(table["data"][1]) == '["AdamW", NaN]'
    assert (logged.files[0].parent / "files" / logged.media["figure/loss"]["path"]).read_bytes().startswith(b"\x89PNG")


def test_a_failed_run_and_a_resumed_one_share_the_id_and_the_reader_merges_them(tmp_path: Path) -> None:
    values = records(20)
    first = WandbSink(tmp_path, mode="offline")
    first.start(CONFIG)
    for step in range(14):
        first.log({**values[step], "attempt": 1}, step)
    first.finish("failed")
    assert read_run(tmp_path).exit_code == 1
    second = WandbSink(tmp_path, mode="offline", resume_step=9)
    second.start({**CONFIG, "resumed": True})
    with pytest.warns(SinkWarning, match="step 7 came after step 9: wandb takes no falling steps"):
        second.log({"loss": 0.0}, 7)
    for step in range(10, 20):
        second.log({**values[step], "attempt": 2}, step)
    second.finish()
    run = read_run(tmp_path)
    assert first.run_id == second.run_id == run.run_id and len(run.files) == 2
    assert [row["step"] for row in run.history] == list(range(20))
    for row in run.history:
        expected = {**values[row["step"]], "attempt": 1 if row["step"] < 10 else 2, "step": row["step"]}
        assert text(row) == text(flat(expected))
    assert run.exit_code == 0 and run.config == {**CONFIG, "resumed": True}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


QUIET = """
import json, sys, warnings
from benchmarks.sinks import WandbSink
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    sink = WandbSink(sys.argv[1], init_timeout=float(sys.argv[2]), finish_timeout=float(sys.argv[2]))
    sink.start({"a": 1})
    for step in range(5):
        sink.log({"x": step / 3}, step)
    sink.finish()
print(json.dumps({"mode": sink.mode, "note": sink.note, "seen": [str(w.message) for w in seen]}))
"""


def run_quiet(folder: Path, timeout: str, **env: str) -> dict[str, Any]:
    """Runs QUIET in a new process; its end is awaited too, because wandb waits for its server there."""
    full = environment()
    full.pop("WANDB_ERROR_REPORTING")  # the sink has to see to this by itself
    full.update(env)
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(folder), timeout], env=full, capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # the one line that wandb can't be kept from writing, when a key is there
    assert [line for line in done.stderr.splitlines() if "Loaded credentials for" not in line] == []
    return dict(json.loads(done.stdout))


def test_no_login_and_no_mode_means_offline_and_nothing_is_contacted(tmp_path: Path, hole: BlackHole) -> None:
    proxies = {name: hole.url for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY")}
    told = run_quiet(tmp_path / "run", "30", **proxies, NO_PROXY="", no_proxy="")
    assert told["mode"] == "offline" and told["seen"] == [] and told["note"].startswith("W&B: offline, run ")
    assert hole.connections == []
    hole.hang_up = True
    # the proxy would have seen it: with wandb's own error reports switched on, it does
    run_quiet(tmp_path / "control", "30", **proxies, NO_PROXY="", no_proxy="", WANDB_ERROR_REPORTING="true")
    assert hole.connections != []
    assert [row["x"] for row in read_run(tmp_path / "run").history] == [step / 3 for step in range(5)]


@pytest.mark.parametrize("kind", ["silent", "down"])
def test_a_key_without_a_server_that_answers_goes_offline_in_time(tmp_path: Path, hole: BlackHole, kind: str) -> None:
    if kind == "down":
        hole.close()
    told = run_quiet(tmp_path / "run", "2", WANDB_API_KEY="a" * 40, WANDB_BASE_URL=hole.url)
    assert told["mode"] == "offline" and len(told["seen"]) == 1
    assert "wandb could not start online, continuing offline: " in told["seen"][0]
    run = read_run(tmp_path / "run")
    assert [row["x"] for row in run.history] == [step / 3 for step in range(5)] and run.exit_code == 0
    assert (len(hole.connections) > 0) == (kind == "silent")


def test_which_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_mode(None) == ("offline", "")
    assert choose_mode("disabled") == ("disabled", "")
    assert choose_mode("dryrun") == ("offline", "")
    assert choose_mode("online")[0] == "offline" and "no API key is configured" in choose_mode("online")[1]
    assert (
        choose_mode("onlin")[0] == "offline" and "mode='onlin' is none of disabled, offline" in choose_mode("onlin")[1]
    )
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode(None) == ("disabled", "") and choose_mode("offline") == ("offline", "")
    monkeypatch.setenv("WANDB_MODE", "never")
    assert choose_mode(None)[0] == "offline" and "WANDB_MODE='never'" in choose_mode(None)[1]
    monkeypatch.delenv("WANDB_MODE")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password " + "b" * 40 + "\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert choose_mode(None) == ("online", "") and choose_mode("online") == ("online", "")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert choose_mode(None) == ("offline", "")
    monkeypatch.setenv("WANDB_API_KEY", "c" * 40)
    assert choose_mode(None) == ("online", "") and choose_mode("offline") == ("offline", "")


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    sink = WandbSink(tmp_path / "run", mode="disabled")
    sink.start({})
    sink.log({"x": 1}, 0)
    sink.summary({"x": 1})
    sink.finish()
    assert sink.note == "W&B: disabled" and not (tmp_path / "run").exists()


def test_a_picture_that_is_not_there_costs_the_picture_only(tmp_path: Path) -> None:
    sink = WandbSink(tmp_path)
    sink.start({})
    sink.log({"x": 1}, 0)
    with pytest.warns(SinkWarning, match="W&B: wandb took no figure: "):
        sink.figure(tmp_path / "nowhere.png")
        sink.log({"x": 2}, 1)
        sink.finish()
    assert [row["x"] for row in read_run(tmp_path).history] == [1, 2]


def break_log(monkeypatch: pytest.MonkeyPatch, breaks: Any) -> None:
    """Lets the third record of the first run fail inside wandb, as a lost service would."""
    from wandb.sdk.wandb_run import Run

    real = Run.log

    def log(run: Any, data: dict[str, Any], step: int | None = None, **more: Any) -> None:
        if step is not None and step >= 2:
            breaks(run)
        real(run, data, step=step, **more)

    monkeypatch.setattr(Run, "log", log)


def test_wandb_raising_in_log_never_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_always(run: Any) -> None:
        raise RuntimeError("the service is gone")

    break_log(monkeypatch, raise_always)
    wandb_sink = WandbSink(tmp_path, mode="offline")
    sink = MultiSink([JsonlSink(tmp_path), wandb_sink])
    sink.start(CONFIG)
    with pytest.warns(SinkWarning, match="failed and is switched off: RuntimeError: the service is gone") as seen:
        for step in range(50):
            sink.log({"x": step}, step)
        sink.summary({"x": 49})
        sink.finish()
    assert len(seen) == 1 and wandb_sink.mode == "disabled"
    assert [row["x"] for row in read_plain(tmp_path).records] == list(range(50))
    before = ended(tmp_path)
    assert [row["x"] for row in before.history] == [0, 1] and before.exit_code == 1


def test_a_wandb_that_hangs_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    break_log(monkeypatch, lambda run: release.wait(60))
    monkeypatch.setattr(wandb_sink_module, "_GRACE", 0.15)
    sink = WandbSink(tmp_path, mode="offline", finish_timeout=0.2)
    sink.start(CONFIG)
    try:
        with pytest.warns(SinkWarning, match=r"did not finish within 0\.5 s and is left behind; its files are in"):
            for step in range(50):
                sink.log({"x": step}, step)
            sink.finish()
        sink.finish()
        sink.log({"x": 50}, 50)
    finally:
        release.set()
        assert sink._done.wait(30)


MISSING = """
import sys, warnings
import importlib.machinery
real = importlib.machinery.PathFinder.find_spec
def without_wandb(name, path=None, target=None):
    return None if name.split(".")[0] == "wandb" else real(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(without_wandb)
warnings.simplefilter("error")
from benchmarks.sinks import JsonlSink, MultiSink, WandbSink
sink = MultiSink([JsonlSink(sys.argv[1]), WandbSink(sys.argv[1])])
sink.start({"a": 1})
sink.log({"x": 1}, 0)
sink.finish()
print(sink.note)
from benchmarks.sinks.wandb_reader import read_run
open(sys.argv[1] + "/run-x.wandb", "wb").close()
try:
    read_run(sys.argv[1])
except ImportError as error:
    print(type(error).__name__, error)
"""


def test_without_wandb_everything_works_and_a_note_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MISSING, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith('W&B: not installed (pip install "curvopt-torch[wandb]" brings it)')
    assert second.startswith("MissingExtraError") and 'pip install "curvopt-torch[wandb]"' in second
    assert read_plain(tmp_path).records == [{"step": 0, "x": 1}]


def test_a_wandb_that_cannot_be_imported_is_switched_off(tmp_path: Path) -> None:
    (tmp_path / "path" / "wandb").mkdir(parents=True)
    (tmp_path / "path" / "wandb" / "__init__.py").write_text("raise RuntimeError('protobuf too old')\n")
    env = environment(PYTHONPATH=f"{tmp_path / 'path'}{os.pathsep}{ROOT}")
    command = [sys.executable, "-c", QUIET, str(tmp_path / "run"), "5"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["mode"] == "disabled" and told["note"] == ""
    assert told["seen"] == ["W&B: wandb could not start and is switched off: RuntimeError: protobuf too old"]


KILLED = """
import sys
from benchmarks.sinks import JsonlSink, MultiSink, WandbSink
sink = MultiSink([JsonlSink(sys.argv[1]), WandbSink(sys.argv[1], mode="offline")])
sink.start({"seed": 3})
step = 0
while True:
    sink.log({"loss": step / 3, "pad": "x" * (step * 7919 % 40_000)}, step)
    step += 1
    if step == 60:
        print("far enough", flush=True)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed in the middle of its logging."""
    folder = tmp_path_factory.mktemp("killed")
    env = {**environment(), **{name: str(folder / name.lower()) for name in FOLDERS}}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], env=env, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"far enough\n"
        file = next(folder.rglob("*.wandb"))
        while file.stat().st_size < 700_000 and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
    # wandb's service, a process of its own, ends by itself and may still write until then
    size, quiet = -1, 0
    while quiet < 5:
        quiet = quiet + 1 if file.stat().st_size == size else 0
        size = file.stat().st_size
        time.sleep(0.2)
    return folder


def test_a_killed_run_is_readable_up_to_its_tail(killed: Path) -> None:
    run, plain = read_run(killed), read_plain(killed)
    assert run.exit_code is None and run.config == {"seed": 3} and plain.status == "running"
    assert len(run.history) > 10 and len(plain.records) > len(run.history)
    for ours, theirs in zip(plain.records, run.history, strict=False):
        assert text(ours) == text(theirs)


def test_every_cut_of_a_file_gives_the_records_before_it(killed: Path, tmp_path: Path) -> None:
    """Records span several 32 KiB blocks here; cuts at block borders, inside heads and inside payloads."""
    data = next(killed.rglob("*.wandb")).read_bytes()
    whole = read_run(killed).history
    counts = []
    borders = [block * 32768 + offset for block in range(1, 5) for offset in (-8, -7, -1, 0, 1, 3, 7, 8, 500)]
    for size in sorted([*borders, len(data) // 2, 20_000]):
        (tmp_path / "run-cut.wandb").write_bytes(data[:size])
        cut = read_run(tmp_path / "run-cut.wandb").history
        assert text(cut) == text(whole[: len(cut)])
        counts.append(len(cut))
    assert counts == sorted(counts) and 0 < counts[-1] < len(whole)
    # a damaged byte ends the reading where it stands
    damaged = bytearray(data)
    damaged[100_000] ^= 0xFF
    (tmp_path / "run-cut.wandb").write_bytes(damaged)
    broken = read_run(tmp_path / "run-cut.wandb")
    assert broken.torn and 0 < len(broken.history) < len(whole)
    assert text(broken.history) == text(whole[: len(broken.history)])


def test_the_readers_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \.wandb file below this folder"):
        read_run(tmp_path)
    (tmp_path / "run-a.wandb").write_bytes(b"PK\x03\x04 something")
    with pytest.raises(ValueError, match="no wandb file: it starts with 50 4b 03 04"):
        read_run(tmp_path)
    (tmp_path / "run-a.wandb").unlink()
    for name in ("a", "b"):
        sink = WandbSink(tmp_path / name, run_id=f"id{name}")
        sink.start({"name": name})
        sink.log({"x": 1}, 0)
        sink.finish()
    with pytest.raises(ValueError, match="holds 2 runs, name one as run_id: ida, idb"):
        read_run(tmp_path)
    assert read_run(tmp_path, "idb").config == {"name": "b"}
    with pytest.raises(FileNotFoundError, match="no run 'idc'; there are: ida, idb"):
        read_run(tmp_path, "idc")


def test_a_run_of_the_users_own_in_this_process_stays_untouched(tmp_path: Path) -> None:
    import wandb

    own = wandb.init(project="mine", mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True, console="off"))
    sink = WandbSink(tmp_path / "ours")
    sink.start({"a": 1})
    sink.log({"x": 1}, 0)
    own.log({"y": 2})
    sink.finish()
    assert wandb.run is own
    own.log({"y": 3})
    own.finish()
    assert [row["y"] for row in ended(tmp_path / "wandb").history] == [2, 3]
    assert read_run(tmp_path / "ours").history == [{"step": 0, "x": 1}]
