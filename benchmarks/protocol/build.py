"""What a run is put together from: its optimizer, and the costs that are measured once."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.config import OWN_KEYS, RunConfig
from benchmarks.progress import RunProgress
from benchmarks.protocol.checkpoint import RunFolder
from benchmarks.protocol.controls import RandomSubspace
from benchmarks.protocol.measure import measure_costs, measure_jacobian
from benchmarks.tasks import Task
from curvopt import zoo


def meters(config: RunConfig) -> bool:
    """Whether the harness itself looks at the run's curvature."""
    return config.measure_every > 0 or config.energy_every > 0


def _takes_products(config: RunConfig, entry: zoo.Entry) -> bool:
    exact = config.optimizer.get("control") == "exact"
    return bool(entry.needs_curvature or exact or entry.products_per_step or meters(config))


def known_cost(config: RunConfig, entry: zoo.Entry) -> float:
    """Gradients that a product costs; NaN where the run takes none."""
    return math.nan if config.product_cost is None or not _takes_products(config, entry) else config.product_cost


def with_costs(config: RunConfig, entry: zoo.Entry, task: Task, model: nn.Module, folder: RunFolder) -> RunConfig:
    """The configuration with the costs that its optimizer needs: those it has, else measured once and kept in the folder.

    What the clock decided is written into the folder's configuration, so that the run can be repeated.
    """
    products = _takes_products(config, entry)

    def measure() -> dict[str, Any]:
        found: dict[str, Any] = {}
        if products:
            found |= asdict(measure_costs(task, model, config.batch_size, route=config.route))
        if entry.needs_residuals:
            found["jacobian_cost"] = measure_jacobian(task, model, config.batch_size, entry.name)
        return found

    wanted = ["product_cost", "route"] if products else []
    wanted += ["jacobian_cost"] if entry.needs_residuals else []
    missing = [name for name in wanted if getattr(config, name) is None]
    if missing:
        found = folder.once(measure)
        config = replace(config, **{name: found[name] for name in missing})
        folder.pin(config)
    return config


def build_optimizer(config: RunConfig, entry: zoo.Entry, task: Task, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run, with the task's operator or curvature closure where it takes one."""
    given = {k: v for k, v in config.optimizer.items() if k not in ("file", *OWN_KEYS)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    params = [p for p in model.parameters() if p.requires_grad]
    if entry.needs_curvature and given.get("rank") != 0 and given.get("source") != "history":
        given["curvature"] = task.curvature(model, config.route)
        if config.optimizer.get("control") == "random":
            given["curvature"] = RandomSubspace(given["curvature"], int(given["rank"]), config.seed)
    defaults = entry.defaults
    if entry.needs_curvature or "curvature_closure" not in defaults or not given.get("rank", defaults["rank"]):
        return zoo.create(config.optimizer["zoo"], params, **given)
    if config.optimizer.get("control") == "exact":  # products by double backward in the place of differences
        given["curvature"] = task.curvature(model, config.route)
    else:
        batch = task.curvature_batch()

        def curvature_closure() -> Tensor:
            """Loss and gradient there; the optimizer's own count of these calls enters the account."""
            model.zero_grad()
            loss = task.loss(model, batch)
            loss.backward()
            return loss

        given["curvature_closure"] = curvature_closure
    return zoo.create(config.optimizer["zoo"], params, **given)


def announce_refreshes(optimizer: torch.optim.Optimizer, progress: RunProgress) -> None:
    """Let the bar say when the optimizer refreshes its basis."""
    subspace = getattr(optimizer, "subspace", None)
    if subspace is None:
        return
    refresh = subspace.refresh

    def announced(*args: Any, **kwargs: Any) -> Any:
        with progress.phase("refreshing the basis"):
            return refresh(*args, **kwargs)

    subspace.refresh = announced
