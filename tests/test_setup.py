"""The set-up itself, from a bare clone, as the README has it: slow, and the one test that needs the package index."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def readme_commands() -> list[list[str]]:
    """The set-up commands of the README's first shell block, without their comments."""
    block = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    return [line.partition("#")[0].split() for line in block[1].splitlines() if line.strip()]


def test_the_readme_sets_up_by_two_commands():
    assert readme_commands() == [["make", "bench"], ["make", "test"]]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_bare_clone_installs_and_tests_itself(tmp_path):
    clone = tmp_path / "curvopt"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    # Neither the environment around this test nor its data may help.
    inside = ("CURVOPT_", "PYTHON", "VIRTUAL_ENV", "PYTEST_", "MAKE", "MFLAGS", "OMP_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(inside)}

    def run(*command: str, rc: int = 0) -> str:
        ran = subprocess.run(command, cwd=clone, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert ran.returncode == rc, ran.stdout[-4000:] + ran.stderr[-4000:]
        return ran.stdout

    run("make", "venv")
    versions = run(".venv/bin/python", "-m", "pip", "list", "--format=freeze")
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert any(line.partition("+")[0] == pinned for line in versions.splitlines())
    assert "torchvision" not in versions
    # BackPACK's unused requirement is the only one that is missing.
    broken = run(".venv/bin/python", "-m", "pip", "check", rc=1).splitlines()
    assert len(broken) == 1 and "torchvision" in broken[0]

    assert "pip" not in run("make", "venv"), "the second run installs again"
    os.utime(clone / "pyproject.toml")
    assert "pip" in run("make", "-n", "venv"), "a changed pyproject.toml is not installed"

    printed = [run(*command) for command in readme_commands()]
    assert "digits" in printed[0] and "Report" in printed[0]
    assert " passed" in printed[1]
    assert list((clone / "runs").rglob("report.md"))
    run("make", "clean")
    assert run("git", "status", "--short") == ""
