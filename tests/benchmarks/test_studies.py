"""The studies' framework: claims against thresholds, settings, parts that a kill leaves whole, pages."""

import json
import math
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.cli import main
from benchmarks.config import CONFIGS, ConfigError
from benchmarks.progress import RunProgress
from benchmarks.sinks.jsonl import decode
from benchmarks.studies import Lab, Part, PartResult, Value, all_studies
from benchmarks.studies.claims import judge, judge_all, markdown, spread_text, tally
from benchmarks.studies.config import ClaimSpec, load_study, read_file, resolve
from benchmarks.studies.folder import StudyFolder
from benchmarks.studies.report import publish
from benchmarks.studies.run import perform
from curvopt._errors import GapWarning
from tests.benchmarks import study_toy
from tests.benchmarks.study_toy import Toy, written

ROOT = Path(__file__).resolve().parents[2]


def values(*numbers):
    return [Value(n, 2 * n) for n in numbers]


# ---- verdicts
@pytest.mark.parametrize(
    ("low", "high", "numbers", "verdict"),
    [
        (1.0, None, (1.0, 2.0, 3.0), "reproduced"),
        (1.0, None, (0.9, 0.5, -1.0), "not reproduced"),
        (1.0, None, (0.9, 1.0, 2.0), "undecided"),
        (None, 1.0, (1.0, 0.5, -math.inf), "reproduced"),
        (None, 1.0, (1.1, math.inf, 2.0), "not reproduced"),
        (0.9, 1.1, (0.9, 1.0, 1.1), "reproduced"),
        (0.9, 1.1, (0.8, 1.2, 2.0), "not reproduced"),
        (1.0, None, (2.0, 3.0), "undecided"),  # two seeds decide nothing
        (1.0, None, (2.0, 3.0, math.nan), "undecided"),
        (1.0, None, (0.0, 0.0, math.nan), "undecided"),
    ],
)
def test_verdicts(low, high, numbers, verdict):
    spec = ClaimSpec("C1", "text", "m", at_least=low, at_most=high)
    claim = judge(spec, values(*numbers), "small")
    assert claim.verdict == verdict
    assert (claim.reason == "") == (verdict != "undecided")


def test_what_needs_the_full_set_up_is_not_run():
    spec = ClaimSpec("C1", "text", "unknown", at_least=1.0, sizes=["paper"])
    (claim,) = judge_all([spec], [{"m": Value(1.0)}], "small")
    assert claim.verdict == "not run at this size" and claim.values == ()
    with pytest.raises(ConfigError, match="claim C1 asks for the metric 'unknown', which is none of m"):
        judge_all([spec], [{"m": Value(1.0)}], "paper")


def test_the_table_by_hand():
    specs = [
        ClaimSpec("C1", "a|b", "m", at_least=1.0, source="me", baseline="chance"),
        ClaimSpec("C2", "range", "m", at_least=0.5, at_most=2.5, note="mind the gap"),
        ClaimSpec("C3", "big", "m", at_most=0.5, sizes=["paper"]),
    ]
    claims = judge_all(specs, [{"m": v} for v in values(1.0, 3.0, 2.0)], "small")
    rows = markdown(claims).splitlines()
    assert rows[2] == "| C1 | a\\|b | me | `m` | at least 1 | 2 (1 to 3) | chance: 4 (2 to 6) | **reproduced** |"
    assert rows[3] == (
        "| C2 | range (mind the gap) | - | `m` | 0.5 to 2.5 | 2 (1 to 3) | 4 (2 to 6) | **undecided** (met by 2 of 3 seeds) |"
    )
    assert rows[4] == "| C3 | big | - | `m` | at most 0.5 | - | - | **not run at this size** |"
    assert tally(claims) == "1 reproduced, 1 undecided, 1 not run at this size"
    found = claims[0].as_dict()
    assert (found["values"], found["median"], found["baseline_values"]) == ([1.0, 3.0, 2.0], 2.0, [2.0, 6.0, 4.0])


def test_spread_text():
    assert spread_text([1.0]) == "1" and spread_text([]) == "-" and spread_text([math.nan]) == "-"
    assert spread_text([1234567.0, 0.001, math.nan]) == "617,284 (0.001 to 1,234,567), 1 without a value"


# ---- settings
def test_settings_in_their_order(tmp_path):
    path = written(tmp_path)
    assert load_study("toy", path=path).study.settings == study_toy.Settings(6, 1.0)
    assert load_study("toy", "paper", path=path).study.settings.steps == 600
    changed = load_study("toy", "paper", overrides=["steps=7", "scale=0.5"], path=path)
    assert changed.study.settings == study_toy.Settings(7, 0.5)
    path.write_text(path.read_text() + "per_data: {digits: {steps: 9}}\n")
    assert load_study("toy", "paper", path=path).study.settings.steps == 9


def test_the_hash_stands_for_settings_not_for_seeds_and_claims(tmp_path):
    path = written(tmp_path)
    one = load_study("toy", path=path)
    assert load_study("toy", seeds=7, path=path).hash() == one.hash()
    assert load_study("toy", overrides=["scale=2"], path=path).hash() != one.hash()
    path.write_text(path.read_text().replace("at_least: 1000", "at_least: 5"))
    assert load_study("toy", path=path).hash() == one.hash()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"name": "tyo"}, "unknown study 'tyo': available: alignment"),
        ({"size": "huge"}, "size must be small or paper, got 'huge'"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"overrides": ["stps=3"]}, "unknown setting 'stps' of study toy: known: scale, steps"),
        ({"overrides": ["steps=many"]}, "steps: Value 'many'"),
        ({"overrides": ["steps"]}, "expected KEY=VALUE, got 'steps'"),
        ({"at_hand": lambda name: False}, "study toy needs one of digits: python -m benchmarks fetch digits"),
        ({"path": Path("nowhere.yaml")}, "no study at nowhere.yaml"),
    ],
)
def test_bad_requests(tmp_path, arguments, text):
    with pytest.raises(ConfigError, match=text):
        load_study(**{"name": "toy", "path": written(tmp_path), **arguments})


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("- {id: T9, text: x, metric: m}", "claim T9 has no threshold"),
        ("- {id: T1, text: x, metric: m, at_least: 1}", "claims need ids of their own"),
        (
            "- {id: T9, text: x, metric: m, at_least: 1, sizes: [huge]}",
            "claim T9: sizes are small and paper, got 'huge'",
        ),
        ("- {id: T9, text: x, metric: m, at_last: 1}", "at_last"),
    ],
)
def test_bad_files(tmp_path, line, text):
    path = written(tmp_path)
    path.write_text(f"{path.read_text()}  {line}\n")
    with pytest.raises(ConfigError, match=text):
        load_study("toy", path=path)


def test_every_study_has_a_file_and_the_sizes():
    for name, cls in all_studies().items():
        if name == "toy":
            continue
        path = CONFIGS / "study" / f"{name}.yaml"
        file = read_file(path)
        assert file.title and file.paper and file.question and len(file.claims) >= 3, name
        for size in ("small", "paper"):
            layers = [file.settings, file.sizes.get(size) or {}]
            settings = resolve(cls, layers, [], path)
            assert isinstance(settings, cls.Settings)


# ---- runs
def run(tmp_path, **keywords):
    config = load_study("toy", path=written(tmp_path), **keywords)
    lines = []
    with RunProgress() as progress:
        report = perform(config, tmp_path, progress, lines.append, wandb="disabled", command="python toy")
    return report, lines


def unmeasured(folder):
    """Everything that must repeat."""
    claims = json.loads((folder / "claims.json").read_text())
    claims.pop("measured")
    parts = {}
    for path in sorted((folder / "parts").glob("*/result.json")):
        parts[path.parent.name] = json.loads(path.read_text())
        parts[path.parent.name].pop("measured")
    return claims, parts


def test_a_study_end_to_end(tmp_path):
    Toy.done.clear()
    report, lines = run(tmp_path)
    assert [c.verdict for c in report.claims] == [
        "reproduced",
        "not reproduced",
        "not run at this size",
        "undecided",
        "undecided",
    ]
    assert len(lines) == 10 and lines[-1].startswith("toy: 1 reproduced, 1 not reproduced")
    folder = report.folder
    assert {p.suffix for p in (folder / "figures").iterdir()} == {".png", ".pdf", ".csv", ".txt"}
    assert (folder / "figures" / "toy.command.txt").read_text() == "python toy\n"
    head = decode(json.loads((folder / "claims.json").read_text()))
    assert head["settings"] == {"steps": 6, "scale": 1.0} and head["seeds"] == [0, 1, 2]
    assert {"seconds", "cpu_seconds", "commits", "date", "processor", "torch"} <= set(head["measured"])
    page = (folder / "claims.md").read_text()
    assert "| T2 | it flies |" in page and "figures/toy.png" in page and "Made by `python toy`" in page
    log = [json.loads(line) for line in (folder / "parts/seed-0-walk/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(6)) and log[0]["strange"] == "NaN"
    assert len(Toy.done) == 6


def test_what_is_finished_is_not_done_again(tmp_path):
    run(tmp_path)
    Toy.done.clear()
    first = unmeasured(run(tmp_path)[0].folder)
    assert Toy.done == []
    report, _ = run(tmp_path, seeds=4)
    assert Toy.done == ["seed-3-walk", "seed-3-other"]
    assert {k: v for k, v in unmeasured(report.folder)[1].items() if "seed-3" not in k} == first[1]


def test_a_kill_costs_only_the_part_at_work(tmp_path, part="seed-1-other"):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    expected = unmeasured(run(whole)[0].folder)
    script = [sys.executable, "-m", "tests.benchmarks.study_toy", str(broken), part]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    config = load_study("toy", path=written(broken))
    folder = StudyFolder(config.folder(broken))
    parts = [p for seed in range(3) for p in config.study.parts(seed)]
    finished = [p.name for p in parts if folder.finished(p) is not None]
    assert finished == [p.name for p in parts][: [p.name for p in parts].index(part)]
    Toy.done.clear()
    assert unmeasured(run(broken)[0].folder) == expected
    left = [p.name for p in parts if p.name not in finished and p.arm != "start"]
    assert Toy.done == left


def test_half_written_parts_are_cleared_away(tmp_path):
    config = load_study("toy", path=written(tmp_path))
    folder = StudyFolder(config.folder(tmp_path))
    with folder.lock():
        folder.claim(config)
    begun = folder.begin(Part("walk", 0))
    (begun / "log.jsonl").write_text('{"step": 99}\n')
    report, _ = run(tmp_path)
    assert '"step": 99' not in (report.folder / "parts/seed-0-walk/log.jsonl").read_text()


def test_folders_of_others_are_left_alone(tmp_path):
    report, _ = run(tmp_path)
    config = report.config
    folder = StudyFolder(report.folder)
    with folder.lock(), pytest.raises(ConfigError, match="another process is working in"):
        perform(config, tmp_path, RunProgress(), wandb="disabled")
    folder.head.write_text(folder.head.read_text().replace('"scale": 1.0', '"scale": 3.0'))
    with pytest.raises(ConfigError, match=r"holds another study \(scale: 3.0 there, 1.0 asked for\)"):
        perform(config, tmp_path, RunProgress(), wandb="disabled")
    folder.head.unlink()
    with pytest.raises(ConfigError, match="holds parts but no study.json"):
        perform(config, tmp_path, RunProgress(), wandb="disabled")
    with pytest.raises(ConfigError, match="holds files but no study: it is left alone"):
        perform(config, tmp_path, RunProgress(), fresh=True, wandb="disabled")


def test_torch_threads_are_as_they_were(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(tmp_path, seeds=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_warnings_of_refreshes_are_counted_and_others_shown(tmp_path, monkeypatch):
    plain = Toy.run

    def warning(self, part, lab):
        if part.arm == "walk":
            for _ in range(3):
                warnings.warn("no gap", GapWarning, stacklevel=1)
        if part.name == "seed-0-other":
            warnings.warn("look here", UserWarning, stacklevel=1)
        return plain(self, part, lab)

    monkeypatch.setattr(Toy, "run", warning)
    with pytest.warns(UserWarning, match="look here") as seen:
        report, _ = run(tmp_path)
    assert not [w for w in seen if w.category is GapWarning]
    assert report.warnings == {"GapWarning": 3} and "GapWarning in 3 parts" in (report.folder / "claims.md").read_text()


def test_fresh_starts_over(tmp_path):
    report, _ = run(tmp_path)
    Toy.done.clear()
    with RunProgress() as progress:
        perform(report.config, tmp_path, progress, fresh=True, wandb="disabled")
    assert len(Toy.done) == 6


def test_a_damaged_result_is_named(tmp_path):
    report, _ = run(tmp_path)
    (report.folder / "parts/seed-1-walk/result.json").write_text("{")
    with pytest.raises(ConfigError, match=r"seed-1-walk/result.json can't be read: delete the folder"):
        run(tmp_path)


def test_parts_must_come_after_what_they_need(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "parts", lambda self, seed: [Part("walk", seed, ("start",)), Part("start", seed)])
    with pytest.raises(ConfigError, match="part seed-0-walk needs 'start', which does not come before it"):
        run(tmp_path)
    monkeypatch.setattr(Toy, "parts", lambda self, seed: [Part("start", seed), Part("start", seed)])
    with pytest.raises(ConfigError, match="part seed-0-start is there twice"):
        run(tmp_path)


def test_a_failing_part_leaves_the_finished_ones(tmp_path, monkeypatch):
    plain = Toy.run

    def failing(self, part, lab):
        if part.name == "seed-1-walk":
            raise RuntimeError("no")
        return plain(self, part, lab)

    monkeypatch.setattr(Toy, "run", failing)
    with pytest.raises(RuntimeError, match="no"):
        run(tmp_path)
    monkeypatch.setattr(Toy, "run", plain)
    Toy.done.clear()
    run(tmp_path)
    assert Toy.done[0] == "seed-1-walk"


def test_the_page_of_all_studies(tmp_path):
    report, _ = run(tmp_path)
    path = publish([report, report], tmp_path / "results" / "studies.md")
    text = path.read_text()
    assert text.startswith("# Studies") and text.count("## toy: a toy") == 2 and "studies/toy.png" in text
    assert (path.parent / "studies" / "toy.png").exists()
    assert json.loads((path.parent / "studies" / "toy.json").read_text())["study"] == "toy"


def test_wandb_holds_the_curves(tmp_path):
    config = load_study("toy", path=written(tmp_path), seeds=1)
    with RunProgress() as progress:
        report = perform(config, tmp_path, progress, wandb="offline")
    assert list((report.folder / "parts/seed-0-walk/wandb").glob("offline-run-*/*.wandb"))


def test_results_of_a_part():
    rows = [{"step": 0, "a": 1.0}, {"step": 5, "a": 3.0, "b": None}, {"step": 9, "a": 5.0, "b": 2.0}]
    part = PartResult({}, rows, dict)
    assert part.column("a") == ([0, 5, 9], [1.0, 3.0, 5.0]) and part.column("b") == ([9], [2.0])
    assert part.last("a") == 5.0 and math.isnan(part.last("c"))
    assert part.tail("a", 2 / 3) == 4.0 and part.tail("a", 0.01) == 5.0 and math.isnan(part.tail("c"))


def test_steps_of_a_lab_need_no_log():
    lab = Lab(torch.device("cpu"), "digits", {})
    lab.log(3, x=1.0)
    assert lab.rows == [{"step": 3, "x": 1.0}]


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["study", "sharp-flta"], "error: unknown study 'sharp-flta'"),
        (["study", "sharp-flat", "stps=3"], "error: unknown setting 'stps' of study sharp-flat"),
        (
            ["study", "sharp-flat", "switch_after=900"],
            "error: switch_after must lie between 1 and switch_by=800, got 900",
        ),
        (["study", "sharp-flat", "side=5"], "error: side=5 does not divide the images of digits, 8 x 8"),
        (["study", "sharp-flat", "examples=99999"], "error: examples must lie between 1 and"),
        (["study", "displacement", "lag=30"], "error: lag must be a multiple of record_every=50, got 30"),
        (["study", "displacement", "steps=200"], "error: burn_in + lag must be at most steps=200, got 300"),
        (["study", "alignment", "xor_runs=[1]"], "error: xor_neurons and xor_runs must have the same length"),
        (["study", "alignment", "poor_step=500"], "error: poor_step must lie between 1 and steps=500, got 500"),
    ],
)
def test_requests_that_cannot_be_met(command, text, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("CURVOPT_DATA", raising=False)
    monkeypatch.setenv("CURVOPT_CACHE", str(tmp_path))
    assert main([*command, "--out", str(tmp_path / "out"), "--wandb", "disabled"]) == 2
    assert text in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("result.json")), "the error must come before any work"


def test_small_and_paper_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        main(["study", "sharp-flat", "--small", "--paper"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_list_names_the_studies(capsys):
    assert main(["list"]) == 0
    assert "studies: alignment" in capsys.readouterr().out
