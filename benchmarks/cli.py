"""The command line: python -m benchmarks run | bench | tune | suite | target | report | study | perf | fetch | list."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.config import ConfigError, RunConfig, available, compose_run, repeat_run, run_directory
from benchmarks.files import no_room
from benchmarks.progress import RunProgress
from curvopt._errors import CurvoptError

_EXAMPLES = """examples:
  python -m benchmarks run digits_mlp bulk_sgd                      one run, settings tuned for the task
  python -m benchmarks run mnist5k_mlp sgd optimizer.lr=0.2 steps=500 seed=3
  python -m benchmarks bench                                        the comparison: table, plots, logs
  python -m benchmarks suite small --jobs 2                         tuned alike, six seeds, ranked
  python -m benchmarks tune digits_mlp adamw                        bracket the best learning rate
  python -m benchmarks study sharp-flat                             a paper's claims re-run: table, figures
  python -m benchmarks fetch mnist                                  bring a data set into the user's cache

The same command goes on where an interrupted one stopped, bit for bit. Data are looked for in the folder that
CURVOPT_DATA names, then in the user's cache; only `fetch` downloads."""


def _seeds(text: str) -> list[int]:
    try:
        return [int(s) for s in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Train, compare and tune optimizers, ours and others'.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    run = commands.add_parser("run", help="train one optimizer on one task")
    run.add_argument("task", nargs="?", help="a file in configs/task")
    run.add_argument("optimizer", nargs="?", help="a file in configs/optimizer")
    run.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="optimizer.lr=0.1 task.loss=mse steps=500 ...")
    run.add_argument(
        "--config", type=Path, metavar="FILE", help="repeat the run whose config.yaml this is (out=FOLDER: elsewhere)"
    )
    run.add_argument("--fresh", action="store_true", help="delete what an earlier call of the same run left")

    bench = commands.add_parser("bench", help="the main comparison, on MNIST-5k or else on the bundled digits")
    bench.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run")
    bench.add_argument("--seeds", type=_count, default=1, metavar="N", help="seeds 0 to N-1 (default: 1)")
    bench.add_argument("--task", help="a file in configs/task (default: the first whose data are at hand)")
    bench.add_argument(
        "--optimizers", help="files in configs/optimizer, separated by commas (default: configs/bench.yaml)"
    )
    bench.add_argument("--out", type=Path, default=Path("runs"), help="parent of the result's folder (default: runs)")
    bench.add_argument("--fresh", action="store_true", help="delete earlier results and start over")

    tune = commands.add_parser("tune", help="bracket the best value of one number of an optimizer on a task")
    tune.add_argument("task")
    tune.add_argument("optimizer")
    tune.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    tune.add_argument("--key", default="lr", help="the optimizer's argument (default: lr)")
    tune.add_argument("--factor", type=float, default=2.0, help="ratio of neighbouring values (default: 2)")
    tune.add_argument("--budget", type=_count, default=12, help="values to try at most (default: 12)")
    tune.add_argument("--seeds", type=_seeds, default=[100, 101], help="seeds of the trials (default: 100,101)")

    suite = commands.add_parser("suite", help="tune every optimizer alike on several tasks, run them, rank them")
    suite.add_argument("name", help="a file in configs/suite")
    suite.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the suite: trials=6 tasks=[digits_mlp]")
    suite.add_argument("--small", action="store_true", help="NAME_small in its place: what ends within two hours")
    suite.add_argument("--jobs", type=_count, default=1, metavar="N", help="processes, one thread each (default: 1)")
    suite.add_argument("--out", type=Path, default=Path("runs"), help="parent of its folder (default: runs)")

    target = commands.add_parser("target", help="the train loss that the tuned baselines reach: a task's target")
    target.add_argument("task")
    target.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the suite: trials=6 optimizers=[sgd]")
    target.add_argument("--jobs", type=_count, default=1, metavar="N", help="processes (default: 1)")
    target.add_argument("--out", type=Path, default=Path("runs"), help="parent of its folder (default: runs)")
    target.add_argument("--write", action="store_true", help="put it into configs/task/TASK.yaml")

    report = commands.add_parser("report", help="tables and figures of a suite or of runs that are there, as a page")
    report.add_argument("folder", type=Path, help="a suite's folder, or one with runs of one task below it")
    report.add_argument("--out", type=Path, help="where to write (default: FOLDER)")
    report.add_argument("--page", type=Path, metavar="FILE", help="of a suite with targets: write its report there too")
    report.add_argument("--target", type=float, help="train loss that counts as solved (default: the task's)")

    study = commands.add_parser("study", help="re-run what a paper claims: claims table, figures, logs")
    study.add_argument("name", help="a file in configs/study, or all")
    study.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the study's settings")
    study.add_argument("--seeds", type=_count, default=3, metavar="N", help="seeds 0 to N-1 (default: 3)")
    size = study.add_mutually_exclusive_group()
    size.add_argument(
        "--small", dest="size", action="store_const", const="small", help="minutes on two cores (default)"
    )
    size.add_argument(
        "--paper", dest="size", action="store_const", const="paper", help="the full set-up, CUDA if there"
    )
    study.set_defaults(size="small")
    study.add_argument("--out", type=Path, default=Path("runs/studies"), help="parent of its folder")
    study.add_argument("--page", type=Path, metavar="FILE", help="write the claims tables to a page, figures beside it")
    study.add_argument("--wandb", choices=("online", "offline", "disabled"), help="default: as the environment says")
    study.add_argument("--fresh", action="store_true", help="delete earlier results and start over")

    perf = commands.add_parser("perf", help="what curvature costs, beside the peers, in units of one gradient")
    perf.add_argument("rows", nargs="*", metavar="ROW", help="hessian_product cold_top_ten ... (default: all)")
    perf.add_argument("--rounds", type=_count, default=5, metavar="N", help="of each timing (default: 5)")
    perf.add_argument("--out", type=Path, metavar="FILE", help="the page (default: benchmarks/results/perf.md)")

    fetch = commands.add_parser("fetch", help="download a data set into the user's cache, checked by its checksum")
    fetch.add_argument("name", help="mnist, fashion-mnist, cifar-10, sst-2 or tinyshakespeare")

    commands.add_parser("list", help="tasks, optimizers and the zoo")
    return top


def _run(options: argparse.Namespace, console: Console) -> int:
    from benchmarks.protocol.repeat import in_words, verdict
    from benchmarks.protocol.suite import fresh
    from benchmarks.protocol.train import execute

    first: Path | None = None
    if options.config is not None:
        given = [word for word in (options.task, options.optimizer, *options.overrides) if word is not None]
        if any("=" not in word for word in given):
            raise ConfigError("--config takes everything from the saved file: name no task beside it")
        config = repeat_run(options.config, given)
        first = options.config.parent
    else:
        if options.task is None or options.optimizer is None:
            raise ConfigError(
                f"run needs TASK and OPTIMIZER; tasks: {', '.join(available('task'))}; "
                f"optimizers: {', '.join(available('optimizer'))}"
            )
        config = compose_run(options.task, options.optimizer, options.overrides)
    if options.fresh:
        fresh(config)
    console.print(f"Run folder: {run_directory(config)}", soft_wrap=True)
    with RunProgress() as progress:
        outcome = execute(config, progress)
    _say_how_it_went(config, outcome.record, console)
    if first is not None and first.resolve() != run_directory(config).resolve() and (first / "DONE").exists():
        console.print(
            f"Beside {first}: {in_words(verdict(config, first, run_directory(config)))}.",
            soft_wrap=True,
            highlight=False,
        )
    return 0


def _say_how_it_went(config: RunConfig, r: Mapping[str, Any], console: Console) -> None:
    for text in r.get("warnings", []):
        console.print(text, soft_wrap=True, highlight=False)
    console.print(f"Data: {r['data']}", soft_wrap=True)
    if r.get("log"):
        console.print(r["log"], soft_wrap=True, highlight=False)
    if r["status"] != "done":
        console.print(f"{config.optimizer['label']}: {r['status']} at step {r['step']}: {r['reason']}", soft_wrap=True)
        return
    words = ", ".join(
        f"{k.replace('_', ' ')} {float(r[k]):.4g}" for k in ("train_loss", "test_loss", "test_accuracy") if k in r
    )
    cost = f"{r['gradients']:,} gradients, {r['products']:,} curvature products, {float(r['seconds']):.2f} s"
    cost += f" of CPU ({float(r['wall_seconds']):.2f} s of wall clock)" if r["clock"] == "process" else ""
    console.print(
        f"{config.optimizer['label']}: {r['status']} after {r['step']:,} steps: {words}; {cost}", soft_wrap=True
    )


def _bench_task(names: Sequence[str], console: Console) -> str:
    from benchmarks import data

    for name in names:
        dataset = compose_run(name, "sgd").task["dataset"]
        if data.available(dataset):
            console.print(f"Task: {name}, on {dataset}.", highlight=False)
            return name
        console.print(
            f"{name} is left out: {dataset} is neither in the folder that CURVOPT_DATA names nor in the cache "
            f"(to bring it there: python -m benchmarks fetch {dataset}).",
            soft_wrap=True,
            highlight=False,
        )
    raise ConfigError(f"no data for any of {', '.join(names)}")


def _bench(options: argparse.Namespace, console: Console) -> int:
    from benchmarks.protocol.suite import fresh, load_suite, perform, plan
    from benchmarks.report.write import write_report

    suite = load_suite("bench")
    optimizers = list(dict.fromkeys(options.optimizers.split(","))) if options.optimizers else suite.optimizers
    task = options.task or _bench_task(suite.tasks, console)
    out = options.out / f"bench-{task}"
    overrides = [*suite.overrides, *options.overrides, f"out={out / 'runs'}"]
    configs = plan(task, optimizers, range(options.seeds), overrides)
    configs = [replace(c, wandb=replace(c.wandb, group=f"bench-{task}")) for c in configs]
    if options.fresh:
        for config in configs:
            fresh(config)
    with RunProgress() as progress:
        folders = perform(configs, progress, lambda text: progress.print(text))
    write_report(folders, out, console)
    return 0


def _tune(options: argparse.Namespace, console: Console) -> int:
    from benchmarks.protocol.tune import tune

    with RunProgress() as progress:
        found = tune(
            options.task,
            options.optimizer,
            [f"out=runs/tune-{options.task}", *options.overrides],
            options.seeds,
            progress,
            key=options.key,
            factor=options.factor,
            limit=options.budget,
            say=progress.print,
        )
    state = "bracketed on both sides" if found.bracketed else "NOT bracketed: at the edge of the values tried"
    console.print(
        f"best {found.key}={found.best:g} (train loss {found.scores[found.best]:.4g}), {state}", soft_wrap=True
    )
    return 0


def _suite(options: argparse.Namespace, console: Console) -> int:
    from benchmarks.protocol.comparison import Comparison, load_comparison
    from benchmarks.report.leaderboard import markdown, profile_table
    from benchmarks.report.page import write_leaderboard
    from benchmarks.report.standings import standings
    from benchmarks.report.targets import write_targets

    name = f"{options.name}_small" if options.small else options.name
    config = load_comparison(name, options.overrides)
    out = options.out / f"suite-{name}"
    flags = ["--small"] if options.small else []
    command = shlex.join(["python", "-m", "benchmarks", "suite", options.name, *flags, *options.overrides])
    with RunProgress() as progress:
        Comparison(config, out, progress.print, command).perform(progress, options.jobs)
    if config.targets:
        console.print(f"Report: {write_targets(config, out, command)}", soft_wrap=True)
        return 0
    path = write_leaderboard(config, out, command)
    table = profile_table(standings(config, out), {"step": "steps"})
    if table[0]:
        console.print(markdown(*table), soft_wrap=True, highlight=False)
    console.print(f"Report: {path}", soft_wrap=True)
    return 0


def _target(options: argparse.Namespace, console: Console) -> int:
    from benchmarks.protocol.target import find_target, write_target

    with RunProgress() as progress:
        found = find_target(options.task, options.overrides, options.out, progress, options.jobs, progress.print)
    console.print(f"target of {options.task}: {found:g}", highlight=False)
    if options.write:
        command = " ".join(["python -m benchmarks target", options.task, *options.overrides])
        console.print(f"written to {write_target(options.task, found, command)}", soft_wrap=True)
    return 0


def _report(options: argparse.Namespace, console: Console) -> int:
    from benchmarks.protocol.comparison import load_folder
    from benchmarks.report.page import write_leaderboard
    from benchmarks.report.targets import write_targets
    from benchmarks.report.write import write_report

    if (options.folder / "suite.json").exists():
        config, command = load_folder(options.folder)
        command = command or f"python -m benchmarks report {options.folder}"
        if options.page is not None and not config.targets:
            raise ConfigError(f"--page is for a suite with targets, and {config.title!r} has none")
        found = (
            write_targets(config, options.folder, command, options.page)
            if config.targets
            else write_leaderboard(config, options.folder, command)
        )
        console.print(f"Report: {found}", soft_wrap=True)
        return 0
    files = sorted(options.folder.rglob("config.yaml"))
    if not files:
        raise ConfigError(f"no runs below {options.folder}")
    write_report([f.parent for f in files], options.out or options.folder, console, options.target)
    return 0


def _study(options: argparse.Namespace, console: Console) -> int:
    from benchmarks.studies.claims import markdown
    from benchmarks.studies.config import load_study, study_names
    from benchmarks.studies.report import publish
    from benchmarks.studies.run import perform

    names = study_names() if options.name == "all" else [options.name]
    configs = [load_study(n, options.size, options.seeds, options.overrides) for n in names]  # all errors come first
    reports = []
    for config in configs:
        console.print(f"Study {config.name} ({config.size}): {config.folder(options.out)}", soft_wrap=True)
        command = f"python -m benchmarks study {config.name} --{config.size} --seeds {len(config.seeds)}"
        with RunProgress() as progress:
            report = perform(
                config,
                options.out,
                progress,
                progress.print,
                fresh=options.fresh,
                wandb=options.wandb,
                command=" ".join((command, *config.overrides)),
            )
        console.print(markdown(report.claims), soft_wrap=True, highlight=False)
        reports.append(report)
    if options.page is not None:
        console.print(f"Page: {publish(reports, options.page)}", soft_wrap=True)
    return 0


def _perf(options: argparse.Namespace, console: Console) -> int:
    from benchmarks.perf.run import DEFAULT_OUT, perform

    perform(options.rows, options.rounds, options.out or DEFAULT_OUT, console)
    return 0


def _fetch(options: argparse.Namespace, console: Console) -> int:
    from benchmarks import data

    with RunProgress() as bar:
        at_work: list[str] = []

        def show(file: str, received: int, expected: int) -> None:
            if file not in at_work:
                bar.finish_run()
                at_work.append(file)
                bar.begin(f"{options.name}: {file} (KiB)", max(expected >> 10, 1))
            bar.advance(received >> 10, "downloading")

        folder = data.fetch(options.name, progress=show)
    console.print(f"{options.name}: {folder}", soft_wrap=True)
    return 0


def _list(options: argparse.Namespace, console: Console) -> int:
    from curvopt import zoo

    console.print(f"tasks: {', '.join(available('task'))}", soft_wrap=True)
    console.print(f"optimizers (files): {', '.join(available('optimizer'))}", soft_wrap=True)
    console.print(f"suites: {', '.join(available('suite'))}", soft_wrap=True)
    console.print(f"studies: {', '.join(available('study'))}", soft_wrap=True)
    console.print(
        f"zoo: {', '.join(zoo.names())}; bulk+NAME, dom+NAME and scaled+NAME wrap any of them", soft_wrap=True
    )
    for name, reason in zoo.names(excluded=True).items():
        console.print(f"  not available: {name}: {reason}", soft_wrap=True)
    return 0


_COMMANDS = {
    "run": _run,
    "bench": _bench,
    "tune": _tune,
    "report": _report,
    "suite": _suite,
    "target": _target,
    "study": _study,
    "perf": _perf,
    "fetch": _fetch,
    "list": _list,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 for success, 2 for a request that can't be met, 130 for an interruption."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    # argparse gives up on KEY=VALUE that come after an option.
    if any("=" not in word or word.startswith("-") for word in rest) or (rest and not hasattr(options, "overrides")):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    if options.command is None:
        top.print_help()
        return 2
    # Tables keep their figures whole in files and pipes, whose width nobody knows.
    console = Console() if sys.stdout.isatty() else Console(width=110)
    try:
        return _COMMANDS[options.command](options, console)
    except (ConfigError, CurvoptError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if no_room(error):
            print("once there is room, the same command goes on where this one stopped", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return 130
