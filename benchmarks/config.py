"""Run configurations: hydra composes one YAML file a task and one an optimizer, dataclasses give names and types.

An optimizer's arguments are checked against its zoo entry, so that one YAML file is all that a new one takes. Order of
precedence, later wins: the optimizer's file, the values tuned for it in the task's file (``tuned:``), the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import II, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from curvopt import zoo

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# Keys that name the run's surroundings: they don't change a single number of its record.
_NOT_HASHED = ("out", "run_dir", "wandb", "checkpoint_every", "product_cost", "route", "jacobian_cost")
# Fields that came later: left out of the hash at their defaults.
_LATER_FIELDS = ("stop_hopeless", "max_seconds", "max_gradients", "stop_at", "eval_gradients")
# Arguments that are numbers wherever they occur; the others keep the type that YAML gives them.
_NUMBERS = {"lr", "momentum", "dampening", "weight_decay", "overhead", "damping", "tol"}
# What an optimizer's file says to the harness: its entry, its name, a control's trick, a schedule, the decay
# of an average, a first optimizer.
OWN_KEYS = ("zoo", "label", "control", "schedule", "average", "warmup")


class ConfigError(ValueError):
    """A configuration that can't be run; the text names the key and what would be right."""


@dataclass
class TaskConfig:
    """What every task has; a task's own dataclass adds the rest.

    Attributes:
        task: name of the class in benchmarks.tasks.
        title: for tables and figures.
        steps, batch_size, eval_every, measure_every, energy_every: defaults of the run's fields of these names.
        rank: dimension of the dominant subspace.
        curvature_examples: size of the fixed curvature batch, the first ones of the training set.
        target: train loss that counts as solved in "steps to target"; None leaves that column out.
        tuned: optimizer file -> arguments tuned for this task.
    """

    task: str = ""
    title: str = ""
    steps: int = 1000
    batch_size: int = 50
    eval_every: int = 50
    measure_every: int = 100
    energy_every: int = 0
    rank: int = 9
    curvature_examples: int = 1000
    target: float | None = None
    tuned: dict[str, Any] = field(default_factory=dict)


@dataclass
class WandbConfig:
    """W&B beside the plain files. mode: auto (online only with a login), offline, online or disabled."""

    mode: str = "auto"
    project: str = "curvopt"
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class RunConfig:
    """One training run.

    Attributes:
        task, optimizer: the composed files.
        seed: of initial weights, data order and dropout; the same for all optimizers.
        steps, batch_size: length of the run in optimizer steps, and its mini-batch.
        log_every: steps between two records of the mini-batch loss.
        eval_every: steps between evaluations on the training and the test set; 0 leaves only the first and the last.
        measure_every: steps between measurements of eigenvalues and alignment by the harness; 0 for none.
        energy_every: steps between measurements of the curvature energy; 0 for none.
        checkpoint_every: steps between checkpoints.
        device, threads: where it runs.
        out: folder of all runs; run_dir: the folder of this one, instead of the one named by the config's hash.
        max_seconds, max_gradients: of training, and of gradient-equivalents: the run ends after the first step at which
            one of them is spent.
        stop_at: column of the evaluation -> value; the run ends once all of them are at or below theirs; none by default.
        eval_gradients: gradient-equivalents between evaluations, beside ``eval_every``: methods that take from one to
            thousands of gradients a step are then looked at alike; 0 leaves it to ``eval_every``.
        stop_hopeless: end a run whose mini-batch loss lies above its first one a quarter of the way or later; for tuning.
        product_cost: gradients of a training batch that one curvature product costs; None measures it once.
        jacobian_cost: those that an iteration of a method on residuals costs; None measures it once.
        route: "loop" or "batched", how blocks of products are multiplied; None takes the loop on a CPU, where batching
            gains nothing, and elsewhere times both once.
        wandb: see WandbConfig.
    """

    task: Any = None
    optimizer: Any = None
    seed: int = 0
    steps: int = II("task.steps")
    batch_size: int = II("task.batch_size")
    log_every: int = 10
    eval_every: int = II("task.eval_every")
    measure_every: int = II("task.measure_every")
    energy_every: int = II("task.energy_every")
    checkpoint_every: int = 250
    device: str = "cpu"
    threads: int = 1
    out: str = "runs"
    run_dir: str | None = None
    max_seconds: float | None = None
    max_gradients: float | None = None
    stop_at: dict[str, float] = field(default_factory=dict)
    eval_gradients: int = 0
    stop_hopeless: bool = False
    product_cost: float | None = None
    jacobian_cost: float | None = None
    route: str | None = None
    wandb: WandbConfig = field(default_factory=WandbConfig)


def _register_schemas() -> None:
    from benchmarks import tasks

    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for name, cls in tasks.all_tasks().items():
        store.store(group="task_schema", name=name, node=cls.Config(task=name))


def available(group: str) -> list[str]:
    """Names of the files in ``configs/<group>``."""
    return sorted(p.stem for p in (CONFIGS / group).glob("*.yaml"))


def _nearest(key: str, known: Iterable[str]) -> str:
    pool = [str(k) for k in known]
    close = difflib.get_close_matches(key, pool, 1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(pool))}"


def _check_choice(group: str, name: str) -> None:
    known = available(group)
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"unknown {group} {name!r}: {hint}available: {', '.join(known)}")


def _compose(overrides: Sequence[str]) -> DictConfig:
    _register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose("run", overrides=list(overrides))


def _explain(error: Exception, groups: Sequence[str]) -> ConfigError:
    """Turn hydra's words into ours: name the nearest key."""
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"can't read {error.override.lstrip('+')!r}: {str(error).splitlines()[0]}; quote what is no number"
        )
    chain = [error, *(e for e in (error.__cause__, error.__context__) if e is not None)]
    text = " | ".join(str(e) for e in chain)
    missing = re.search(r"Key '([^']+)' (?:is )?not in", text)
    full = re.search(r"full_key: (\S+)", text)
    if missing and full:
        base = _compose(groups)
        parent = full.group(1).rpartition(".")[0]
        node = OmegaConf.select(base, parent) if parent else base
        known = [str(k) for k in node] if OmegaConf.is_dict(node) else []
        elsewhere = [f"{g}.{missing.group(1)}" for g in ("optimizer", "task") if missing.group(1) in base[g]]
        hint = f"did you mean {elsewhere[0]!r}?" if elsewhere else _nearest(missing.group(1), known)
        return ConfigError(f"unknown key {full.group(1)!r}: {hint}")
    wrong = re.search(r"(Value .+? could not be converted to \w+)", text)
    if wrong and full:
        return ConfigError(f"{full.group(1)}: {wrong.group(1)}")
    return ConfigError(str(error).strip().splitlines()[0])


def _split(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"expected KEY=VALUE, got {override!r} (for one: optimizer.lr=0.1)")
    return key.lstrip("+~"), value


def _optimizer_schema(entry: zoo.Entry) -> Any:
    fields: list[tuple[str, Any, Any]] = [("zoo", str, ""), ("label", str, ""), ("control", str | None, None)]
    fields += [("schedule", str | None, None), ("average", float | None, None), ("warmup", Any, None)]
    for key, default in entry.defaults.items():
        if key == "curvature":
            continue  # the harness gives the task's operator
        kind: Any = Any
        if isinstance(default, bool):
            kind = bool | None
        elif key in _NUMBERS:
            kind = float | None
        fields.append((key, kind, field(default=None)))
    return dataclasses.make_dataclass("Optimizer", fields)


def _check_optimizer(node: DictConfig) -> dict[str, Any]:
    """The optimizer's node, checked against its zoo entry; only what was given, not the defaults."""
    given = OmegaConf.to_container(node, resolve=True)
    assert isinstance(given, dict)
    try:
        entry = zoo.describe(str(given["zoo"]))
    except zoo.UnknownOptimizerError as error:
        raise ConfigError(f"optimizer.zoo: {error}") from error
    schema = _optimizer_schema(entry)
    known = {f.name for f in dataclasses.fields(schema)}
    for key in given:
        if entry.available and key not in known:
            raise ConfigError(f"unknown key 'optimizer.{key}': {_nearest(str(key), known - set(OWN_KEYS))}")
    if not entry.available:
        return {str(k): v for k, v in given.items()}  # the run itself says why it can't be built
    try:
        typed = OmegaConf.merge(OmegaConf.structured(schema), given)
    except OmegaConfBaseException as error:
        raise ConfigError(f"optimizer.{error.full_key}: {str(error).splitlines()[0]}") from error
    if given.get("warmup") is not None:
        _check_warmup(given["warmup"], entry)
        if given.get("schedule") is not None or given.get("average") is not None:
            raise ConfigError("optimizer.warmup goes with neither schedule nor average")
    return {str(k): OmegaConf.to_container(typed, resolve=True)[k] for k in given}  # type: ignore[index,call-overload]


def _check_warmup(given: Any, main: zoo.Entry) -> None:
    """``warmup: {zoo: adam, steps: 300, lr: 0.01}``: an optimizer of gradients alone that goes before.

    Raises:
        ConfigError: names the key, and what would be right.
    """
    if not isinstance(given, dict) or not {"zoo", "steps"} <= set(given):
        raise ConfigError(f"optimizer.warmup must hold zoo and steps, as in {{zoo: adam, steps: 300}}, got {given!r}")
    steps = given["steps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ConfigError(f"optimizer.warmup.steps must be a whole number of at least 0 (none), got {steps!r}")
    try:
        first = zoo.describe(str(given["zoo"]))
    except zoo.UnknownOptimizerError as error:
        raise ConfigError(f"optimizer.warmup.zoo: {error}") from error
    for key in given:
        if key not in ("zoo", "steps") and first.available and key not in first.defaults:
            raise ConfigError(f"unknown key 'optimizer.warmup.{key}': {_nearest(str(key), first.defaults)}")
    if first.needs_closure or first.needs_curvature or first.needs_train_mode or first.needs_create_graph:
        raise ConfigError(
            f"optimizer.warmup.zoo must need nothing but gradients, as adam does; {first.name} needs more"
        )
    if main.holds_parameters_copy or main.needs_train_mode or main.products_per_step:
        raise ConfigError(f"{main.name} takes no optimizer.warmup: it must see the weights from the first step on")


def compose_run(task: str, optimizer: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of one run.

    Args:
        task: a file in ``configs/task``.
        optimizer: a file in ``configs/optimizer``.
        overrides: ``key=value``; ``optimizer.lr=0.1``, ``task.loss=mse``, ``steps=100``.

    Raises:
        ConfigError: unknown task, optimizer or key (the nearest one is named), or a value of the wrong type.
    """
    _check_choice("task", task)
    _check_choice("optimizer", optimizer)
    groups = [f"task={task}", f"optimizer={optimizer}"]
    given = []
    for override in overrides:
        key, value = _split(override)
        if key in ("task", "optimizer"):
            raise ConfigError(f"{override!r}: the {key} is named before the overrides, as in: run {task} {optimizer}")
        # An optimizer's file need not list every argument: they are checked against the zoo afterwards.
        given.append(f"++{key}={value}" if key.startswith(("optimizer.", "stop_at")) else f"{key}={value}")
    tuned = OmegaConf.select(OmegaConf.load(CONFIGS / "task" / f"{task}.yaml"), f"tuned.{optimizer}") or {}
    values = [f"++optimizer.{key}={json.dumps(value)}" for key, value in tuned.items()]
    try:
        whole = _compose([*groups, *values, *given])
        node = _check_optimizer(whole.optimizer)
        resolved = OmegaConf.to_container(whole, resolve=True)
    except (HydraException, ConfigCompositionException, OmegaConfBaseException) as error:
        raise _explain(error, groups) from error
    assert isinstance(resolved, dict)
    resolved["optimizer"] = {"file": optimizer, **node}
    resolved["task"] = {"file": task, **resolved["task"]}  # type: ignore[dict-item]
    resolved["task"].pop("tuned")
    return _from_dict(resolved)


def _from_dict(values: Mapping[str, Any]) -> RunConfig:
    known = {f.name for f in dataclasses.fields(RunConfig)}
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {key!r}: {_nearest(key, known)}")
    config = RunConfig(**{**values, "wandb": WandbConfig(**values.get("wandb", {}))})
    for name, least in (("steps", 1), ("batch_size", 1), ("log_every", 1), ("checkpoint_every", 1), ("threads", 1)):
        if getattr(config, name) < least:
            raise ConfigError(f"{name} must be at least {least}, got {getattr(config, name)}")
    for name in ("eval_every", "measure_every", "energy_every", "eval_gradients"):
        if getattr(config, name) < 0:
            raise ConfigError(f"{name} must not be negative, got {getattr(config, name)} (0 turns it off)")
    for name in ("max_seconds", "max_gradients"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be above 0, or null for no limit, got {value}")
    if config.route not in (None, "loop", "batched"):
        raise ConfigError(f"route must be loop or batched, or null to measure it, got {config.route!r}")
    if config.wandb.mode not in ("auto", "offline", "online", "disabled"):
        raise ConfigError(f"wandb.mode must be auto, offline, online or disabled, got {config.wandb.mode!r}")
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain numbers, strings, lists and dicts."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, as it is saved with the run."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def load_run(path: str | Path) -> RunConfig:
    """The configuration that a run saved.

    Raises:
        ConfigError: no such file, or not a run's configuration.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError as error:
        raise ConfigError(f"no configuration at {path}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} can't be read: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict) or "task" not in values or "optimizer" not in values:
        raise ConfigError(f"{path} is not the saved configuration of a run")
    return _from_dict({str(k): v for k, v in values.items()})


def config_hash(config: RunConfig) -> str:
    """Eight hexadecimal digits that stand for all that determines the numbers of a run, but for its seed."""
    values = {k: v for k, v in to_dict(config).items() if k not in (*_NOT_HASHED, "seed")}
    for name in _LATER_FIELDS:
        if not values[name]:
            del values[name]  # so that runs from before this field keep their folders
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def settings(config: RunConfig) -> dict[str, Any]:
    """All that determines the numbers of a run but for its seed, flat, by dotted names."""
    values = {k: v for k, v in to_dict(config).items() if k not in (*_NOT_HASHED, "seed")}
    return flatten(values)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted names."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out


def repeat_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a run saved, to be repeated, elsewhere if asked for.

    Args:
        path: its ``config.yaml``.
        overrides: ``key=value`` of the run's surroundings alone, ``out=elsewhere`` or ``wandb.mode=disabled``.

    Raises:
        ConfigError: no such file, or an override that would make it another run.
    """
    config = load_run(path)
    for override in overrides:
        key, _ = _split(override)
        if key.partition(".")[0] not in _NOT_HASHED:
            raise ConfigError(
                f"--config repeats a saved run, so {key!r} can't change; what can: {', '.join(_NOT_HASHED)}"
            )
    values = to_dict(config)
    if any(_split(o)[0] == "out" for o in overrides):
        values["run_dir"] = None
    merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(values), OmegaConf.from_dotlist(list(overrides))))
    assert isinstance(merged, dict)
    return _from_dict({str(k): v for k, v in merged.items()})


def run_directory(config: RunConfig) -> Path:
    """The folder of this run: ``out/TASK/OPTIMIZER-HASH/seed-N``, or ``run_dir`` where that is given."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    name = f"{config.optimizer['file']}-{config_hash(config)}"
    return Path(config.out) / config.task["file"] / name / f"seed-{config.seed}"
