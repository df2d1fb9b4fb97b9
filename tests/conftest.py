"""What holds for every test: one thread, fixed seeds, no network, no writing outside temporary folders."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# Figures are drawn without a display. Set before anything imports matplotlib.
os.environ["MPLBACKEND"] = "Agg"

# The test processes share the cores (pytest -n): more threads than cores only wait for each other, and the order of
# summation, hence the last bits, would depend on the machine.
torch.set_num_threads(1)

# The same examples on every run: a failure that nobody can repeat helps nobody. No deadline: the machine is shared.
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same random numbers, whatever ran before it in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def wandb_offline(tmp_path_factory):
    """No test, and no process that it starts, logs in to W&B or writes into the user's folders."""
    root = tmp_path_factory.mktemp("wandb")
    patch = pytest.MonkeyPatch()
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("WANDB_SILENT", "true")
    patch.delenv("WANDB_API_KEY", raising=False)
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        folder = root / name.lower()
        folder.mkdir()
        patch.setenv(name, str(folder))
    yield root
    patch.undo()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the public data sets, named by CURVOPT_DATA.

    Without it the test is skipped; where CURVOPT_REQUIRE_DATA=1 promises that the data are there, it fails.
    """
    named = os.environ.get("CURVOPT_DATA")
    if not named:
        if os.environ.get("CURVOPT_REQUIRE_DATA") == "1":
            pytest.fail("CURVOPT_REQUIRE_DATA=1, but CURVOPT_DATA is not set: name the folder with the data sets")
        pytest.skip("CURVOPT_DATA is not set")
    folder = Path(named).expanduser()
    if not folder.is_dir():
        pytest.fail(f"CURVOPT_DATA={named!r} is not a folder")
    return folder
