"""The direction of imports: a layer of curvopt sees only those below it, and the core needs only torch and numpy.

Read from the source, not from what happens to be loaded: imports inside functions and under TYPE_CHECKING count too.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "curvopt"

# Who may import whom: only a strictly lower level, or the own layer.
LEVEL = {
    "_errors": 0,
    "_params": 0,
    "_stability": 0,
    "curvature": 1,
    "linalg": 2,
    "subspace": 3,
    "optim": 4,
    "diagnostics": 4,
    "zoo": 5,
}
CORE = {"torch", "numpy"}
# What the extras of pyproject.toml bring to the package, imported only inside the function that needs it.
OPTIONAL = {"backpack", "torch_optimizer", "pytorch_optimizer", "schedulefree", "matplotlib", "pandas", "wandb"}


@dataclass(frozen=True)
class Import:
    """One imported name: where it stands, its full dotted name, and whether importing the module executes it."""

    line: int
    name: str
    at_module_level: bool


def imports_of(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of a module, relative ones resolved; `from a import b` gives a.b (b may be a module)."""
    here = module if is_package else module.rpartition(".")[0]

    def visit(node: ast.AST, executed: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, executed) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = here.split(".")
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*parents, base] if base else parents)
            yield from (Import(node.lineno, f"{base}.{alias.name}", executed) for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            executed = False
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, executed)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, executed)

    return visit(ast.parse(source), True)


def faults_of(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of `module` (dotted name) that run against the order of the layers."""
    parts = module.split(".")
    layer = parts[1] if len(parts) > 1 else None
    faults = []
    for found in imports_of(source, module, is_package):
        top, *rest = found.name.split(".")
        where = f"{module}:{found.line} imports {found.name}"
        if top == "curvopt":
            if layer is None:
                continue
            target = rest[0] if rest else None
            if target not in LEVEL:
                faults.append(f"{where}: the public list; import the module itself")
            elif target == layer:
                continue
            elif LEVEL[target] >= LEVEL[layer]:
                faults.append(f"{where}: {layer} lies below or beside {target}")
            elif layer == "linalg" and target == "curvature" and rest[1:2] != ["operator"]:
                faults.append(f"{where}: linalg knows only curvature.operator")
        elif top in sys.stdlib_module_names or top in CORE:
            continue
        elif top not in OPTIONAL:
            faults.append(f"{where}: neither torch, numpy nor an extra of the package")
        elif found.at_module_level:
            faults.append(f"{where}: an optional dependency, import it inside the function that needs it")
    return faults


def dotted(path: Path) -> tuple[str, bool]:
    """The dotted name of a file of the package, and whether it is a package's __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    return ".".join(parts[:-1] if is_package else parts), is_package


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=[dotted(p)[0] for p in MODULES])
def test_imports_run_downwards(path):
    assert faults_of(path.read_text(encoding="utf-8"), *dotted(path)) == []


def test_every_layer_has_a_level():
    layers = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir()} - {"__init__", "__pycache__", "py"}
    assert layers - {"py.typed"} <= LEVEL.keys()


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("curvopt.curvature.hessian", "from curvopt.linalg.lanczos import eigsh", "curvature lies below"),
        ("curvopt.linalg.lanczos", "from ..subspace import dominant", "linalg lies below"),
        ("curvopt.linalg.lanczos", "from curvopt.curvature.hessian import Hessian", "only curvature.operator"),
        ("curvopt.linalg.lanczos", "from curvopt.curvature import Hessian", "only curvature.operator"),
        ("curvopt.optim.sgd", "import curvopt.diagnostics.probe", "beside diagnostics"),
        ("curvopt.diagnostics.probe", "def f():\n    from curvopt.optim.base import B", "beside optim"),
        ("curvopt.subspace.dominant", "if TYPE_CHECKING:\n    from curvopt.zoo import registry", "below or beside zoo"),
        ("curvopt._params", "from . import _errors", "_params lies below or beside _errors"),
        ("curvopt.optim.base", "import curvopt", "the public list"),
        ("curvopt.optim.base", "from curvopt import Hessian", "the public list"),
        ("curvopt.zoo.registry", "def f():\n    import benchmarks.tasks", "neither torch, numpy"),
        (
            "curvopt.zoo.registry",
            "try:\n    import torch_optimizer\nfinally:\n    pass",
            "inside the function",
        ),
        ("curvopt.curvature.backpack", "class A:\n    from backpack import extend", "inside the function"),
        ("curvopt.linalg.trace", "import scipy.sparse", "neither torch, numpy"),
        ("curvopt.linalg.trace", "def f():\n    import torchvision", "neither torch, numpy"),
    ],
)
def test_the_check_sees_a_wrong_arrow(module, source, fault):
    (found,) = faults_of(source, module)
    assert fault in found


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        ("curvopt.linalg.lanczos", False, "from ..curvature.operator import SymmetricOperator"),
        ("curvopt.linalg.lanczos", False, "from .result import EigResult\nimport math, numpy as np, torch.nn"),
        ("curvopt.linalg", True, "from .lanczos import eigsh as eigsh"),
        ("curvopt.zoo", True, "from ..optim import BulkSGD\nfrom .._errors import MissingExtraError"),
        ("curvopt.curvature.backpack", False, "def f():\n    from backpack import extend"),
        ("curvopt.curvature.backpack", False, "if TYPE_CHECKING:\n    import backpack"),
        ("curvopt", True, "from .zoo import registry as registry\nfrom . import diagnostics as diagnostics"),
    ],
)
def test_the_check_passes_a_right_arrow(module, is_package, source):
    assert faults_of(source, module, is_package) == []
