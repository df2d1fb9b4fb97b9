"""The zoo's page: its table is what the registry says, its examples run, and its counts are true."""

import re
import subprocess
import sys
from pathlib import Path

from curvopt.zoo import names
from curvopt.zoo.__main__ import markdown

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")


def test_the_table_is_the_registrys():
    written = PAGE.partition("<!-- entries: begin -->\n")[2].partition("<!-- entries: end -->")[0]
    assert written == markdown(), "write it again: python -m curvopt.zoo"


def test_every_entry_is_in_the_table():
    for name in [*names(), *names(excluded=True)]:
        assert f"| `{name}` |" in PAGE


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 3
    ran = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
