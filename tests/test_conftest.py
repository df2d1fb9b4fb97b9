"""The rules of conftest.py: what is absent may be skipped only where nobody promised that it is there."""

import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

PROBE = textwrap.dedent("""
    def test_probe(data_root):
        assert data_root.is_dir()
""")


def run_probe(folder: Path, **env: str) -> str:
    """Run one test that asks for data under the project's conftest; the summary line comes back."""
    (folder / "test_probe.py").write_text(PROBE)
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CURVOPT_", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", folder]
    ran = subprocess.run(
        [*command, "-c", os.devnull, folder / "test_probe.py"],
        env=clean | env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return ran.stdout


def test_data_that_nobody_named_are_skipped(tmp_path):
    out = run_probe(tmp_path)
    assert "1 skipped" in out and "CURVOPT_DATA is not set" in out


def test_data_that_were_promised_are_required(tmp_path):
    out = run_probe(tmp_path, CURVOPT_REQUIRE_DATA="1")
    assert "1 error" in out and "CURVOPT_REQUIRE_DATA=1, but CURVOPT_DATA is not set" in out


def test_a_wrong_data_folder_is_a_failure(tmp_path):
    out = run_probe(tmp_path, CURVOPT_DATA=str(tmp_path / "nowhere"))
    assert "1 error" in out and "is not a folder" in out


def test_a_data_folder_is_used(tmp_path):
    assert "1 passed" in run_probe(tmp_path, CURVOPT_DATA=str(tmp_path), CURVOPT_REQUIRE_DATA="1")


@pytest.mark.parametrize("run", [1, 2])
def test_seeds_are_fixed(run):
    # Both runs draw the same numbers although the first one has moved all three generators.
    drawn = (random.random(), np.random.rand(), torch.rand(()).item())
    generators = (random.Random(0).random(), np.random.RandomState(0).rand())
    assert drawn[:2] == generators
    assert drawn[2] == torch.rand((), generator=torch.Generator().manual_seed(0)).item()
    assert torch.get_num_threads() == 1


def test_wandb_writes_into_temporary_folders(wandb_offline):
    assert os.environ["WANDB_MODE"] == "offline" and "WANDB_API_KEY" not in os.environ
    assert Path(os.environ["WANDB_DIR"]).is_relative_to(wandb_offline)
