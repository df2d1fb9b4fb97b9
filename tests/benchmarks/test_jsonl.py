"""The plain files of a run: exact values, strict JSON, torn tails, resume without duplicates, and sinks that fail."""

import dataclasses
import enum
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sinks import JsonlSink, MultiSink, SinkWarning, read_jsonl
from benchmarks.sinks.base import plain
from benchmarks.sinks.jsonl import decode, encode, read_run

ROOT = Path(__file__).resolve().parents[2]


def same(a: Any, b: Any) -> bool:
    """Equality in which NaN equals NaN, -0.0 differs from 0.0 and 1 from 1.0."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def strict(text: str | bytes) -> Any:
    """Parses JSON as other languages do: NaN and Infinity literals are errors."""

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is no JSON")

    return json.loads(text, parse_constant=refuse)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["NaN", "~NaN", "~~Infinity", "-Infinity", "nan", "~"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(VALUES)
def test_every_value_comes_back_exactly_through_strict_json(value: Any) -> None:
    text = json.dumps(encode(value), allow_nan=False)
    assert same(decode(strict(text)), value)


def test_what_torch_numpy_and_python_give_becomes_plain() -> None:
    class Phase(enum.Enum):
        TRAIN = 1

    @dataclasses.dataclass
    class Config:
        lr: float
        betas: tuple[float, float]

    given_values = {
        "f32": torch.tensor(0.1),
        "bf16": torch.tensor([1.5], dtype=torch.bfloat16, requires_grad=True),
        "np": np.float32(0.1),
        "array": np.arange(4).reshape(2, 2),
        "flag": np.bool_(True),
        "phase": Phase.TRAIN,
        "config": Config(0.1, (0.9, 0.99)),
        "set": {"b", "a"},
        "path": Path("a/b"),
        "dtype": torch.float64,
        7: float("nan"),
    }
    found = plain(given_values)
    # 0.1 in float32 is exactly this float64 number: nothing is rounded away
    assert found["f32"] == found["np"] == 0.10000000149011612
    assert found["bf16"] == [1.5] and found["array"] == [[0, 1], [2, 3]] and found["flag"] is True
    assert found["phase"] == "TRAIN" and found["config"] == {"lr": 0.1, "betas": [0.9, 0.99]}
    assert found["set"] == ["a", "b"] and found["path"] == "a/b" and found["dtype"] == "torch.float64"
    assert math.isnan(found["7"])
    with pytest.warns(SinkWarning, match=r"model\.act: object is stored as its text"):
        assert plain({"model": {"act": object()}})["model"]["act"].startswith("<object")


def test_a_run_is_read_back_as_it_was_logged(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "run")
    sink.start({"lr": 0.1, "seed": 0, "note": "NaN"})
    assert read_run(tmp_path / "run").status == "running"
    records = [{"loss": 0.1 + 0.2, "ok": True}, {"loss": math.nan, "eigenvalues": [math.inf, -math.inf, -0.0]}, {}]
    for step, record in enumerate(records):
        sink.log(record, step * 10)
        # each record is in the file as soon as log() returns
        assert len(read_jsonl(tmp_path / "run" / "log.jsonl")) == step + 1
    sink.summary({"best": 1})
    sink.summary({"best": 2.5, "χ": math.nan})
    (tmp_path / "run" / "plots").mkdir()
    sink.figure(tmp_path / "run" / "plots" / "loss.png")
    sink.figure(tmp_path / "elsewhere.png")
    sink.table("final", ("optimizer", "loss"), [["SGD", 0.5], ["λ", math.nan]])
    sink.finish()
    sink.finish()
    run = read_run(tmp_path / "run")
    assert same(run.records, [{"step": i * 10, **record} for i, record in enumerate(records)])
    assert run.config == {"lr": 0.1, "seed": 0, "note": "NaN"} and run.status == "finished"
    assert same(run.summary, {"best": 2.5, "χ": math.nan})
    assert run.figures == [os.path.join("plots", "loss.png"), str(tmp_path / "elsewhere.png")]
    assert same(run.tables["final"], {"columns": ["optimizer", "loss"], "rows": [["SGD", 0.5], ["λ", math.nan]]})
    for file in (tmp_path / "run").rglob("*.json*"):
        for line in file.read_bytes().splitlines() if file.suffix == ".jsonl" else [file.read_bytes()]:
            strict(line)


def test_torn_last_line_is_left_out_and_a_torn_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = b'{"step": 0, "x": 1}\n{"step": 1, "x": "NaN"}\n'
    for tail in (b'{"step": 2, "x', b"{", b"\x00\x00\x00", b"12", '{"step": 2, "x": "λ'.encode()[:-1]):
        path.write_bytes(whole + tail)
        records = read_jsonl(path)
        assert [r["step"] for r in records] == [0, 1] and math.isnan(records[1]["x"])
    path.write_bytes(b'{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"log.jsonl, line 2: "):
        read_jsonl(path)
    path.write_bytes(b"")
    assert read_jsonl(path) == []


def test_resume_cuts_the_records_that_will_come_again_and_the_torn_tail(tmp_path: Path) -> None:
    first = JsonlSink(tmp_path)
    first.start({"lr": 0.1})
    for step in range(10):
        first.log({"x": step / 7}, step)
        if step == 4:
            first.sync()
    first.summary({"epoch": 1})
    before = (tmp_path / "log.jsonl").read_bytes()
    with open(tmp_path / "log.jsonl", "ab") as handle:
        handle.write(b'{"step": 10, "x"')
    with pytest.raises(FileExistsError, match=r"log.jsonl holds the records of a run: give resume_step="):
        JsonlSink(tmp_path)
    second = JsonlSink(tmp_path, resume_step=4)
    second.start({"lr": 0.1})
    for step in range(5, 10):
        second.log({"x": step / 7}, step)
    second.finish()
    assert (tmp_path / "log.jsonl").read_bytes() == before
    run = read_run(tmp_path)
    assert run.summary == {"epoch": 1} and run.status == "finished"


def test_faults_of_the_calling_code_raise(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    with pytest.raises(RuntimeError, match="is not open: call start"):
        sink.log({}, 0)
    sink.start({})
    multi = MultiSink([])
    for target in (sink, multi):
        with pytest.raises(TypeError, match=r"step=1\.5 \(float\): expected a whole number"):
            target.log({}, 1.5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="step=-1: expected at least 0"):
            target.log({}, -1)
        with pytest.raises(ValueError, match="record has step=3, but was logged at step=4"):
            target.log({"step": 3}, 4)
    with pytest.raises(ValueError, match=r"table name '\.\./x': expected letters"):
        sink.table("../x", [], [])
    sink.finish()


KILLED = """
import sys
from benchmarks.sinks import JsonlSink
sink = JsonlSink(sys.argv[1])
sink.start({"seed": 3})
step = 0
while True:
    sink.log({"loss": step / 3, "pad": "x" * (step % 700)}, step)
    step += 1
"""


def test_a_killed_run_keeps_every_record_that_was_logged(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "run")], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    log = tmp_path / "run" / "log.jsonl"
    try:
        while not (log.exists() and log.stat().st_size > 200_000) and child.poll() is None:
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    run = read_run(tmp_path / "run")
    assert run.status == "running" and run.config == {"seed": 3} and len(run.records) > 300
    assert [r["step"] for r in run.records] == list(range(len(run.records)))
    assert all(r["loss"] == r["step"] / 3 and len(r["pad"]) == r["step"] % 700 for r in run.records)


class Failing:
    """A sink whose named call raises; counts what reaches it."""

    note = "a failing sink"

    def __init__(self, what: str) -> None:
        self.what = what
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.what:
            raise OSError(28, "No space left on device")

    def start(self, config: Mapping[str, Any]) -> None:
        self._call("start")

    def log(self, record: Mapping[str, Any], step: int) -> None:
        self._call("log")

    def summary(self, values: Mapping[str, Any]) -> None:
        self._call("summary")

    def figure(self, path: Any, name: str | None = None) -> None:
        self._call("figure")

    def table(self, name: str, columns: Any, rows: Any) -> None:
        self._call("table")

    def sync(self) -> None:
        self._call("sync")

    def finish(self, status: str = "finished") -> None:
        self._call("finish")


CALLS = ["start", "log", "summary", "figure", "table", "sync", "finish"]


@pytest.mark.parametrize("what", CALLS)
def test_a_failing_sink_is_switched_off_and_the_others_go_on(tmp_path: Path, what: str) -> None:
    failing, jsonl = Failing(what), JsonlSink(tmp_path)
    sink = MultiSink([failing, jsonl])
    assert sink.sinks[0] is jsonl and sink.note == "a failing sink"
    with pytest.warns(SinkWarning, match=rf"Failing is switched off .*{what}\(\) failed: OSError: .*No space") as seen:
        sink.start({"a": 1})
        sink.log({"x": 1}, 0)
        sink.summary({"y": 2})
        sink.figure(tmp_path / "f.png")
        sink.table("t", ["a"], [[1]])
        sink.sync()
        sink.log({"x": 2}, 1)
        sink.finish("failed")
    assert len(seen) == 1
    # nothing reaches it after its failure but the attempt to close it
    order = [*CALLS[:-1], "log", "finish"]
    assert failing.calls == (order if what == "finish" else [*order[: order.index(what) + 1], "finish"])
    run = read_run(tmp_path)
    assert run.records == [{"step": 0, "x": 1}, {"step": 1, "x": 2}]
    assert run.status == "failed" and run.summary == {"y": 2} and run.figures == ["f.png"] and "t" in run.tables


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """A real limit of the file size, in a process of its own: the write that breaks off leaves no torn line behind."""
    code = f"""
import resource, signal, warnings
from benchmarks.sinks import JsonlSink, MultiSink, SinkWarning
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sink = MultiSink([JsonlSink({str(tmp_path)!r})])
sink.start({{}})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for step in range(100):
        sink.log({{"pad": "x" * 50}}, step)
assert [w.category for w in seen] == [SinkWarning] and "File too large" in str(seen[0].message), seen
print(step)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "99\n", done.stderr
    content = (tmp_path / "log.jsonl").read_bytes()
    assert 900 < len(content) <= 1000 and content.endswith(b"\n")
    assert len(read_jsonl(tmp_path / "log.jsonl")) == content.count(b"\n")
