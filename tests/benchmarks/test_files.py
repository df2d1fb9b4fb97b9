"""Atomic writes: right bytes, no leftovers, and a kill at any moment leaves an old or a new file that loads."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.files import (
    atomic_torch_save,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    remove_leftovers,
)

ROOT = Path(__file__).resolve().parents[2]


def test_bytes_text_and_json_arrive_as_given(tmp_path: Path) -> None:
    assert atomic_write_bytes(tmp_path / "a" / "b.bin", b"\x00\r\n").read_bytes() == b"\x00\r\n"
    assert atomic_write_text(tmp_path / "t.txt", "λ1\n").read_bytes() == "λ1\n".encode()
    value = {"x": [1, 2.5, None], "name": "χ"}
    assert json.loads(atomic_write_json(tmp_path / "v.json", value).read_text(encoding="utf-8")) == value
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "t.txt", "v.json"]


def test_torch_save_round_trip(tmp_path: Path) -> None:
    state = {"w": torch.arange(5.0), "step": 3}
    loaded = torch.load(atomic_torch_save(state, tmp_path / "c.pt"), weights_only=True)
    assert loaded["step"] == 3 and torch.equal(loaded["w"], state["w"])


def test_a_write_that_raises_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    atomic_torch_save({"step": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        atomic_torch_save({"bad": lambda: None}, path)
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic_write_json(path, {"x": float("nan")})
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_permissions_follow_the_umask_and_links_stay_links(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        path = atomic_write_text(tmp_path / "real.txt", "1")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    link = tmp_path / "link.txt"
    link.symlink_to(path)
    atomic_write_text(link, "2")
    assert link.is_symlink() and path.read_text() == "2"


def test_remove_leftovers_takes_only_this_targets_temporaries(tmp_path: Path) -> None:
    for name in (".c.pt.12.ab.tmp", ".c.pt.13.cd.tmp", ".d.pt.12.ab.tmp", "c.pt"):
        (tmp_path / name).write_text("x")
    assert {p.name for p in remove_leftovers(tmp_path / "c.pt")} == {".c.pt.12.ab.tmp", ".c.pt.13.cd.tmp"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".d.pt.12.ab.tmp", "c.pt"]
    assert remove_leftovers(tmp_path / "nowhere" / "c.pt") == []


# One process imports torch once and forks the writers that it kills, so that many kills cost little.
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from benchmarks.files import atomic_torch_save, atomic_write_json, remove_leftovers

torch.set_num_threads(1)
folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)
checkpoint, plain = folder / "c.pt", folder / "c.json"

def save(version):
    # All 40,000 entries of every tensor carry the version, so that a mixture of two files would show.
    blocks = [torch.full((40_000,), float(version)) for _ in range(8)]
    atomic_torch_save({"version": version, "blocks": blocks}, checkpoint)
    atomic_write_json(plain, {"version": version, "list": [version] * 20_000})

save(0)
last, interrupted = 0, 0
for _ in range(kills):
    child = os.fork()
    if child == 0:
        version = last
        while True:
            version += 1
            save(version)
    time.sleep(rng.uniform(0.005, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = torch.load(checkpoint, weights_only=True)
    assert state["version"] >= last, (state["version"], last)
    assert all(bool((block == state["version"]).all()) for block in state["blocks"])
    import json
    value = json.loads(plain.read_text())
    assert set(value["list"]) == {value["version"]} and len(value["list"]) == 20_000
    assert value["version"] <= state["version"]
    last = state["version"]
    interrupted += len(remove_leftovers(checkpoint)) + len(remove_leftovers(plain))
assert sorted(p.name for p in folder.iterdir()) == ["c.json", "c.pt"]
print(last, interrupted)
"""


def test_sigkill_at_random_moments_leaves_a_whole_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "40", "7"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    versions, interrupted = map(int, done.stdout.split())
    # The test is only worth something if writers got somewhere and were really caught in the middle of a write.
    assert versions > 0 and interrupted > 0
