"""What docs/benchmarks.md tells a reader to write works when it is written."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def _copy(folder):
    """A checkout of one's own to add files to."""
    for name in ("benchmarks", "configs", "curvopt"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _section(title):
    return PAGE.partition(f"### {title}\n")[2].partition("\n## ")[0].partition("\n### ")[0]


def _blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def _run(command, folder):
    assert command.startswith("python -m benchmarks ")
    ran = subprocess.run(
        [sys.executable, *command.split()[1:]], cwd=folder, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def test_adding_a_task(tmp_path):
    text, folder = _section("Adding a task"), _copy(tmp_path)
    paths = re.findall(r"`((?:benchmarks|configs)/\S+\.(?:py|yaml))`", text)
    assert len(paths) == 2
    for path, language in zip(paths, ("python", "yaml"), strict=True):
        (block,) = _blocks(text, language)
        (folder / path).write_text(block, encoding="utf-8")
    (command,) = _blocks(text, "bash")
    out = _run(f"{command.strip()} wandb.mode=disabled", folder)
    assert "SGD: done after 60 steps" in out and "drawn from seed 0" in out


@pytest.mark.parametrize(
    ("title", "words"), [("Adding an optimizer", "heavy ball: done after 20 steps"), ("Adding a suite", "[2/2]")]
)
def test_adding_a_file(title, words, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    text, folder = _section(title), _copy(tmp_path)
    (path,) = re.findall(r"`(configs/\S+\.yaml)`", text)
    (block,) = _blocks(text, "yaml")
    (folder / path).write_text(block, encoding="utf-8")
    (command,) = _blocks(text, "bash")
    assert words in _run(command.strip(), folder)


def test_every_task_is_in_the_table():
    from benchmarks.config import available

    table = PAGE.partition("## Tasks\n")[2].partition("### Adding a task")[0]
    for name in available("task"):
        assert f"`{name}`" in table or (name.startswith("pinn_") and "`pinn_*`" in table), name
