"""What is installed and what is shipped: torch untouched, nothing optional loaded, a complete wheel."""

import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import curvopt

ROOT = Path(__file__).resolve().parents[1]

# What users of the core need not have; torchvision may be installed and broken (a build for another torch).
NOT_LOADED = """
    torchvision wandb hydra omegaconf matplotlib backpack torch_optimizer pytorch_optimizer schedulefree
    tensorboard scipy pandas sklearn pooch rich benchmarks
""".split()


def run_python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter from the repository root; its standard output comes back."""
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition(";")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    return dict(pin.split("==") for pin in pins)


def test_installation_left_torch_at_the_pinned_version():
    # The public part only: +cpu or +cu130 is the machine's choice.
    installed, pinned = version("torch").partition("+")[0], constraints()["torch"]
    assert installed == pinned, f"torch {installed} is installed, constraints.txt pins {pinned}: run `make venv`"


def test_constraints_pin_each_package_once():
    names = [re.sub(r"[-_.]+", "-", name).lower() for name in constraints()]
    assert len(names) == len(set(names))
    assert "torchvision" in names, "without it pip walks through torchvision's releases one by one"


@pytest.mark.parametrize("module", ["curvopt", "curvopt.zoo"])
def test_import_loads_nothing_optional(module):
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in run_python(code, module).split()}
    assert {"curvopt", "torch"} <= loaded
    # torch itself may load some of these when they are installed: only what our import adds counts.
    by_torch = {name.partition(".")[0] for name in run_python("import sys, torch; print(*sys.modules)").split()}
    assert sorted(loaded & set(NOT_LOADED) - by_torch) == []
    assert "torchvision" not in loaded


def test_backpack_loads_no_torchvision():
    # The products and extensions that curvature energy uses; its module of examples is the one that needs torchvision.
    code = "import backpack, backpack.extensions, backpack.hessianfree.hvp, backpack.hessianfree.ggnvp, sys;"
    assert "torchvision" not in run_python(code + "print(*sys.modules)").split()


def test_import_leaves_global_state_alone():
    code = """
import random, numpy, torch, warnings
def state():
    return (random.getstate()[1][:3], numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
            torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), len(warnings.filters))
before = state()
import curvopt
assert state() == before
"""
    run_python(code)


def test_version_is_the_same_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", curvopt.__version__)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", citation, re.M)[1] == curvopt.__version__
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == "Unreleased"
    # A version under development has no heading of its own yet, then "Unreleased" speaks of it.
    assert curvopt.__version__ in headings or len(headings) == 1


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    ran = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_nothing_else(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    metadata = f"curvopt_torch-{curvopt.__version__}.dist-info"
    assert {name.partition("/")[0] for name in files} == {"curvopt", metadata}
    source = {str(p.relative_to(ROOT)) for p in (ROOT / "curvopt").rglob("*") if p.suffix != ".pyc" and p.is_file()}
    assert {name for name in files if name.startswith("curvopt/")} == source
    assert "curvopt/py.typed" in files
    assert f"{metadata}/licenses/LICENSE" in files


def test_wheel_promises_torch_and_numpy_alone(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(f"curvopt_torch-{curvopt.__version__}.dist-info/METADATA").decode()
    assert re.search(r"^Name: curvopt-torch$", metadata, re.M)
    assert re.search(r"^Version: (\S+)$", metadata, re.M)[1] == curvopt.__version__
    required = re.findall(r"^Requires-Dist: ([\w.-]+)(?![^\n]*extra ==)", metadata, re.M)
    assert sorted(required) == ["numpy", "torch"]
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", metadata, re.M))
    assert {"bench", "wandb", "backpack", "optimizers", "docs", "dev", "all"} <= extras


def test_wheel_imports_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # -I: neither the working folder nor PYTHONPATH, so that no module can come from the checkout.
    code = "import sys; sys.path.insert(0, sys.argv[1]); import curvopt, curvopt.zoo; print(curvopt.__file__)"
    ran = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()).is_relative_to(tmp_path)
