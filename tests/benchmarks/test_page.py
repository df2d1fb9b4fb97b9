"""The HTML page of a report: needs nothing beside it, and says what the Markdown says."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser

import pytest
from rich.console import Console

from benchmarks.cli import main
from benchmarks.progress import RunProgress
from benchmarks.protocol.comparison import Comparison, load_comparison
from benchmarks.report.html import render
from benchmarks.report.page import write_leaderboard
from benchmarks.report.write import write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}
COMMAND = "python -m benchmarks suite smoke"


class Page(HTMLParser):
    """What a page holds; tags that do not match raise."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.figures, self.addresses, self.ids, self.text = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [attrs[k] for k in ("src", "href", "srcset", "data", "poster", "action") if k in attrs]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "figure":
            self.figures.append({"caption": "", "code": []})
        elif tag == "img":
            self.figures[-1] |= {"alt": attrs["alt"], "src": attrs["src"]}
        elif tag == "code" and "figcaption" in self.open:
            self.figures[-1]["code"].append("")
        assert tag not in ("script", "iframe", "object", "link"), tag

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if "figcaption" in self.open:
            self.figures[-1]["caption"] += data
            if "code" in self.open:
                self.figures[-1]["code"][-1] += data


def tables_of(markdown):
    """The tables of a Markdown text, read without a Markdown library."""
    found, inside = [], False
    for line in markdown.splitlines():
        if line.startswith("|"):
            cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not inside:
                found.append([])
            if not all(re.fullmatch(r"-+:?", c) for c in cells):
                found[-1].append([re.sub(r"\\(.)", r"\1", c).replace("`", "") for c in cells])
        inside = line.startswith("|")
    return found


def check(page, markdown):
    """The same tables and figures, and nothing from elsewhere."""
    assert page.tables == tables_of(markdown) and page.tables
    assert len(page.figures) == len(re.findall(r"^!\[", markdown, re.M))
    for figure in page.figures:
        assert len(figure["alt"]) > 15 and figure["src"].startswith("data:image/svg+xml;base64,")
        assert b"<svg" in base64.b64decode(figure["src"].partition(",")[2])
        assert figure["code"] and figure["code"][-1].startswith("python -m benchmarks ")
    for address in page.addresses:
        if address.startswith("#"):
            assert address[1:] in page.ids
        else:
            assert re.match(r"data:(image/svg\+xml|text/csv);base64,", address), address[:80]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A finished suite whose runs measured their curvature."""
    out = tmp_path_factory.mktemp("suite")
    given = ["trials=3", "seeds=2", "optimizers=[sgd_momentum,interpolated_sgd]", "baselines=[sgd_momentum]"]
    given += ["overrides=[steps=30,product_cost=3.0,route=loop,wandb.mode=disabled,measure_every=10,task.target=30.0]"]
    config = load_comparison("smoke", given)
    Comparison(config, out, command=COMMAND).perform(RunProgress(enabled=False))
    write_leaderboard(config, out, COMMAND)
    return out


def test_the_page_of_a_suite(suite):
    markdown = (suite / "report.md").read_text()
    text = (suite / "report.html").read_text()
    page = Page(text)
    check(page, markdown)
    assert [f["src"] for f in page.figures] == list(dict.fromkeys(f["src"] for f in page.figures))
    captions = [f["caption"] for f in page.figures]
    for words in ("share of tasks", "bands from the lowest", "trial of the tuning", "step costs", "dominant subspace"):
        assert any(words in caption for caption in captions), words
    assert all(f["code"][-1] == COMMAND for f in page.figures)
    # machine, date, commit
    assert re.search(r"Measured on .+, torch 2\..+, commit \w+", text) and re.search(
        r"Dates: 20\d\d-\d\d-\d\d to", text
    )
    for tag in ('lang="en"', 'charset="utf-8"', 'name="viewport"', "prefers-color-scheme: dark", "<title>smoke test<"):
        assert tag in text
    assert "http://" not in text and "https://" not in text  # nothing is fetched


def test_the_report_is_made_again_from_the_folder_alone(suite, tmp_path, capsys, monkeypatch):
    before = (suite / "report.html").read_text()
    done = {p: p.stat().st_mtime_ns for p in (suite / "runs").rglob("*")}
    (suite / "report.html").unlink()
    monkeypatch.chdir(suite.parent)
    assert main(["report", suite.name]) == 0  # by another name than the one it was made by
    assert "report.md" in capsys.readouterr().out and (suite / "report.html").read_text() == before
    assert {p: p.stat().st_mtime_ns for p in (suite / "runs").rglob("*")} == done  # no run was done or written
    copy = tmp_path / "copy"
    shutil.copytree(suite, copy)
    (copy / "suite.json").write_text('{"version": 99}')
    assert main(["report", str(copy)]) == 2 and "holds a suite of format 99" in capsys.readouterr().err


def test_a_report_runs_nothing_where_the_tuning_is_anothers(suite, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(suite, copy)
    path = copy / "tuning" / "noisy_quadratic" / "sgd_momentum.json"
    found = path.read_text()
    path.write_text(re.sub(r'"stamp": "\w+"', '"stamp": "another"', found))
    assert main(["report", str(copy)]) == 2
    assert "sgd_momentum was tuned with other settings or by another version on noisy_quadratic: run the" in (
        capsys.readouterr().err
    )


def test_the_page_of_a_comparison_on_one_task(suite, tmp_path):
    folders = [p.parent for p in sorted((suite / "runs").rglob("config.yaml")) if p.parent.name == "seed-0"]
    path = write_report(folders, tmp_path, Console(file=io.StringIO()))
    check(Page(path.with_suffix(".html").read_text()), path.read_text())


def test_what_a_run_said_is_text_not_markup(tmp_path):
    text = "# a <b>title</b>\n\n- failed: <script>alert(1)</script> & [x](http://a.org)\n\n## two\n\n## two\n"
    page = Page(render(text, tmp_path))
    assert "<script>alert(1)</script> & " in "".join(page.text)
    assert page.ids == ["two", "two-2"] and page.addresses == ["#two", "#two-2", "http://a.org"]


def test_a_figure_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lost\.png"):
        render("![x](lost.png)", tmp_path)
