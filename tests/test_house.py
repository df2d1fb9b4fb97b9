"""The house rules that a reader would otherwise have to watch over: sizes, docstrings, words."""

import ast
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import curvopt

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 450
# Files that may be longer, each with the reason.
LONG: dict[str, str] = {}

# Put together from pieces, so that this file does not contain what it looks for.
WORDS = ["/wo" + "rk/", r"\.lib" + "rary", "fa" + "rm-", r"(developer|agent) ses" + "sion"]
FORBIDDEN = re.compile("|".join(WORDS), re.IGNORECASE)
BESIDE = "../sha" + "red"


def tracked_files() -> list[Path]:
    """Every text file under version control; in an unpacked archive, every file but caches and environments."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        hidden = re.compile(r"^(\.venv|\..*_cache|__pycache__|runs|outputs)$")
        paths = [p for p in ROOT.rglob("*") if not any(hidden.match(part) for part in p.relative_to(ROOT).parts)]
    return [p for p in paths if p.is_file() and b"\0" not in p.read_bytes()[:8000]]


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def modules_of(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


# The contract with users' scripts; the list may grow, none of these may go.
STABLE = """
    BulkSGD DomSGD InterpolatedSGD GGNProjectedSGD SubspaceScaled SubspaceLBFGS
    Hessian GGN FunctionalHessian GradientSecondMoment DominantSubspace
    eigsh spectral_density curvature_energy trace diagnostics zoo
""".split()


def test_no_module_is_too_long():
    lengths = {str(p.relative_to(ROOT)): len(text(p).splitlines()) for p in modules_of("curvopt")}
    too_long = {name: n for name, n in lengths.items() if n > MAX_LINES and name not in LONG}
    assert not too_long, f"split these, or list them in LONG with the reason: {too_long}"
    assert all(lengths.get(name, 0) > MAX_LINES for name in LONG), "LONG names a file that is short or gone"


def test_every_module_says_what_it_is_for():
    # An empty __init__ of a folder has nothing to say.
    silent = []
    for path in modules_of("curvopt", "benchmarks"):
        source = text(path)
        if source.strip() and not ast.get_docstring(ast.parse(source)):
            silent.append(str(path.relative_to(ROOT)))
    assert silent == []


def test_the_public_list():
    listed = curvopt.__all__
    assert len(listed) == len(set(listed))
    assert [name for name in listed if not hasattr(curvopt, name)] == []
    assert [name for name in STABLE if name not in listed] == []


def test_every_public_name_has_a_docstring():
    silent = []
    for name in curvopt.__all__:
        if name.startswith("__"):
            continue
        thing = getattr(curvopt, name)
        # thing.__doc__, not inspect.getdoc: a docstring inherited from torch.optim.Optimizer says nothing about ours.
        if not (thing.__doc__ or "").strip():
            silent.append(name)
        if inspect.isclass(thing):
            methods = [n for n, m in vars(thing).items() if inspect.isfunction(m) and not n.startswith("_")]
            silent += [f"{name}.{n}" for n in methods if not inspect.getdoc(getattr(thing, n))]
    assert silent == []


def test_no_file_names_the_place_where_it_was_written():
    found = []
    for path in tracked_files():
        for number, line in enumerate(text(path).splitlines(), 1):
            if match := FORBIDDEN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert found == []


def test_only_continuous_integration_knows_where_its_data_lie():
    named = [str(p.relative_to(ROOT)) for p in tracked_files() if BESIDE in text(p)]
    assert named == [".ci/run"]


@pytest.mark.parametrize("text", ["/wo" + "rk/main", "see .lib" + "rary", "fa" + "rm-3", "an agent ses" + "sion"])
def test_the_search_for_words_finds_them(text):
    assert FORBIDDEN.search(text)


def test_the_search_for_words_spares_plain_english():
    assert not FORBIDDEN.search("the library works; a training session; framework/optim")
