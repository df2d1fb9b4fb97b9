"""The training loop: one run, from its configuration to its outcome, resumable at every checkpoint bit for bit."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import tasks
from benchmarks.config import ConfigError, RunConfig, run_directory
from benchmarks.progress import RunProgress
from benchmarks.protocol.account import Account
from benchmarks.protocol.budget import Budget
from benchmarks.protocol.build import announce_refreshes, build_optimizer, known_cost, meters, with_costs
from benchmarks.protocol.checkpoint import VERSION, RunFolder
from benchmarks.protocol.clock import Stopwatch, clock_of
from benchmarks.protocol.environment import environment
from benchmarks.protocol.log import RunLog
from benchmarks.protocol.measure import CurvatureMeter
from benchmarks.protocol.order import DataOrder
from benchmarks.protocol.schedule import build_average, build_schedule
from benchmarks.protocol.warmup import WarmUp
from curvopt import zoo
from curvopt._errors import CurvoptWarning, NonFiniteError

# A mini-batch loss this many times the first one is not coming back.
_HOPELESS = 1e4
_ORDER_SEED, _NOISE_SEED = 1, 2  # apart from the seed of the weights


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        status: ``"done"`` or ``"diverged"``.
        reason: for a diverged run, why and where.
        folder: its files.
        record: what ``result.json`` holds: the last evaluation and the account.
        resumed: continued from a checkpoint, or found finished.
    """

    status: str
    reason: str
    folder: RunFolder
    record: dict[str, Any]
    resumed: bool


class _Diverged(Exception):
    pass


class Run:
    """One run in memory: model, optimizer, data order, account; everything that a checkpoint holds.

    Args:
        config: of the run.
        folder: where it writes.
        progress: a bar that names the phase.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, progress: RunProgress) -> None:
        self.config = config
        self.folder = folder
        self.progress = progress
        self.device = _device(config.device)
        self.step = 0
        with progress.phase("loading data"):
            self.task = tasks.build(config.task, self.device)
        self.model = self.task.model(config.seed)
        self.order = DataOrder(self.task.examples, config.batch_size, 1000 * config.seed + _ORDER_SEED)
        torch.manual_seed(1000 * config.seed + _NOISE_SEED)
        self.entry = zoo.describe(config.optimizer["zoo"])
        with progress.phase("timing a product"):
            self.config = config = with_costs(config, self.entry, self.task, self.model, folder)
        self.route = config.route
        first = config.optimizer.get("warmup")
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.warm_up = WarmUp(first, params) if first is not None and first["steps"] else None
        self.optimizer = build_optimizer(config, self.entry, self.task, self.model)
        schedule = config.optimizer.get("schedule")
        self.schedule = build_schedule(schedule, self.optimizer, config.steps, self.entry.schedulable)
        self.average = build_average(config.optimizer.get("average"), self.model)
        announce_refreshes(self.optimizer, progress)
        share = config.batch_size / len(self.task.curvature_batch()[0])
        self.account = Account(self.optimizer, self.entry, known_cost(config, self.entry), share, config.jacobian_cost)
        self.budget = Budget(config)
        self.ended = ""  # why, once it has
        self.meter = (
            CurvatureMeter(self.task, self.model, self.task.config.rank, self.route) if meters(config) else None
        )
        self.watch = Stopwatch(self.device)
        self.loss_sum = torch.zeros((), device=self.device)
        self.loss_count = 0
        self.first_loss: float | None = None

    @property
    def _at_work(self) -> torch.optim.Optimizer:
        first = None if self.warm_up is None else self.warm_up.at(self.step)
        return self.optimizer if first is None else first

    # ---- state
    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "order": self.order.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "account": self.account.state_dict(),
            "meter": None if self.meter is None else self.meter.state_dict(),
            "watch": self.watch.state_dict(),
            "loss": (self.loss_sum, self.loss_count, self.first_loss),
            "warm_up": None if self.warm_up is None else self.warm_up.state_dict(),
            "looked_at": self.budget.looked_at,
        }

    def final_state(self) -> dict[str, Any]:
        """What is kept of a run that has ended: its weights, not the optimizer's state, which may be P times as large."""
        left_out = ("optimizer", "warm_up")
        return {**{k: v for k, v in self.state_dict().items() if k not in left_out}, "ended": self.ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the run that saved this."""
        self.step = int(state["step"])
        self.ended = str(state.get("ended", ""))
        self.model.load_state_dict(state["model"])
        if not self.ended:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.warm_up is not None:
                self.warm_up.load_state_dict(state["warm_up"])
            if self.schedule is not None:
                self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.budget.looked_at = float(state["looked_at"])
        self.order.load_state_dict(state["order"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["rng_cuda"])
        self.account.load_state_dict(state["account"])
        if self.meter is not None:
            self.meter.load_state_dict(state["meter"])
        self.watch.load_state_dict(state["watch"])
        loss_sum, count, first = state["loss"]
        self.loss_sum, self.loss_count, self.first_loss = loss_sum.to(self.device), int(count), first

    # ---- the loop
    def train(self, log: RunLog) -> None:
        """Go on to the end; one record a step at which something is due.

        Raises:
            _Diverged: the loss is not finite any more, or hopeless.
        """
        config = self.config
        start = self.step
        while not self.ended:
            if self.step >= config.steps:
                self.ended = "steps"
                return
            if self.step % config.checkpoint_every == 0 and self.step > start:
                self._save(log)
            record = self._look()
            if self.budget.reached(record):
                self.ended = "stop_at"
                return
            index = self.order.next().to(self.device)
            measuring = "lambda/1" in record
            batch = self.task.batch(index)
            if measuring:
                record |= self._measure_gradient(batch)
            before = self.meter.snapshot() if measuring and self.meter is not None else None
            with self.watch.lap("train"):
                self._step(batch)
            if before is not None and self.meter is not None:
                record["chi_update"] = self.meter.share_of_update(before)
            if record:
                log.write(self.step, record)
                self.progress.advance(
                    self.step, f"training, loss {record.get('batch_loss', record.get('train_loss', math.nan)):.3g}"
                )
            self.step += 1
            self.ended = self.budget.spent(self.watch.get("train"), self._gradients_spent())

    def _gradients_spent(self) -> float:
        return self.account.equivalents() if self.budget.counts else 0.0

    def last_look(self, log: RunLog) -> dict[str, Any]:
        """The record at the end of the run: evaluated whatever is due."""
        record = self._look(last=True)
        log.write(self.step, record)
        self.progress.advance(self.step, "done")
        return record

    def _due(self, every: int, last: bool) -> bool:
        return last or self.step == 0 or (every > 0 and self.step % every == 0)

    def _look(self, last: bool = False) -> dict[str, Any]:
        config = self.config
        record: dict[str, Any] = {}
        if self.loss_count and (last or self.step % config.log_every == 0):
            record["batch_loss"] = self._take_loss()
        if self._due(config.eval_every, last) or self.budget.due(self._gradients_spent()):
            self.budget.looked_at = self._gradients_spent()
            with self.progress.phase("evaluating"), self._evaluating():
                record |= self.task.evaluate(self.model if self.average is None else self.average.module)
        if self.meter is not None:
            with self.watch.lap("measure"):
                record |= self._look_at_curvature(last)
        if record:
            record |= self._rate() | self.account.columns(self.watch)
        return record

    def _look_at_curvature(self, last: bool) -> dict[str, float]:
        config, meter = self.config, self.meter
        assert meter is not None
        record: dict[str, float] = {}
        measures = config.measure_every > 0 and self._due(config.measure_every, last)
        energy = config.energy_every > 0 and self._due(config.energy_every, last)
        if measures or energy:
            with self.progress.phase("measuring curvature"):
                record |= meter.update()
                record["chi_full_gradient"] = meter.share(self._gradient(self.task.curvature_batch()))
        if energy:
            with self.progress.phase("measuring curvature energy"):
                record |= meter.energy()
        return record

    def _measure_gradient(self, batch: Any) -> dict[str, float]:
        assert self.meter is not None
        with self.watch.lap("measure"):
            return {"chi_gradient": self.meter.share(self._gradient(batch))}

    def _gradient(self, batch: Any) -> list[Tensor | None]:
        """The gradient of a batch for the record: random numbers and running statistics stay as they were."""
        assert self.meter is not None
        buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        with torch.random.fork_rng(devices=_cuda_devices(self.device)):
            gradient = self.meter.gradient(self.task.loss(self.model, batch))
        for buffer, before in buffers:
            buffer.copy_(before)
        return gradient

    def _rate(self) -> dict[str, float]:
        lr = self._at_work.param_groups[0].get("lr")
        lr = math.nan if lr is None else float(lr)  # 0 at the end of a schedule
        return {"lr": lr, "edge": 2.0 / lr if lr > 0 else math.inf}

    def _evaluating(self) -> ExitStack:
        """Model in eval mode, and an optimizer that keeps its answer elsewhere (schedule-free) too."""
        stack = ExitStack()
        modes = [(m, m.training) for m in self.model.modules()]

        def restore() -> None:
            for module, training in modes:
                module.training = training
            if self.entry.needs_train_mode:
                self.optimizer.train()  # type: ignore[attr-defined]

        stack.callback(restore)
        self.model.eval()
        if self.entry.needs_train_mode:
            self.optimizer.eval()  # type: ignore[attr-defined]
        return stack

    def _step(self, batch: Any) -> None:
        optimizer = self._at_work
        warming = optimizer is not self.optimizer

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.task.loss(self.model, batch)
            loss.backward(create_graph=self.entry.needs_create_graph)
            self.account.gradients += 1
            return loss

        def residuals() -> list[Tensor]:
            self.account.gradients += 1  # the forward pass alone: counted as a whole one, above its cost
            return self.task.residuals(self.model, batch)

        if self.entry.needs_closure and not warming:
            loss = optimizer.step(residuals if self.entry.needs_residuals else closure)  # type: ignore[arg-type]
        else:
            loss = closure()
            optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.loss_sum += loss.detach()  # type: ignore[union-attr]
        self.loss_count += 1
        if self.entry.needs_create_graph:  # a gradient that holds its own graph holds the whole step
            self.optimizer.zero_grad(set_to_none=True)

    def _take_loss(self) -> float:
        """Mean mini-batch loss since the last call; the one place where the loop waits for the device."""
        loss = float(self.loss_sum) / self.loss_count
        self.loss_sum.zero_()
        self.loss_count = 0
        if self.first_loss is None:
            self.first_loss = loss
        if not math.isfinite(loss):
            raise _Diverged(f"the loss was not finite before step {self.step}")
        if loss > _HOPELESS * max(self.first_loss, 1e-3):
            raise _Diverged(f"the loss was {loss:.3g} before step {self.step}, {self.first_loss:.3g} at the start")
        if self.config.stop_hopeless and 4 * self.step >= self.config.steps and loss > self.first_loss:
            raise _Diverged(f"hopeless: a quarter through the loss was {loss:.3g}, {self.first_loss:.3g} at the start")
        return loss

    def _save(self, log: RunLog) -> None:
        with self.progress.phase("writing a checkpoint"):
            log.sync()
            self.folder.save(self.state_dict())


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={name} can't be used with torch {torch.__version__}: {reason}") from error
    return device


def _cuda_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


def execute(config: RunConfig, progress: RunProgress | None = None) -> Outcome:
    """Do a run, go on with one that was interrupted, or give the outcome of one that is done.

    Args:
        config: of the run.
        progress: the bar to use; None makes none.

    Warnings do not interrupt the bar: they are kept, each once, in the result's ``warnings``.

    Raises:
        ConfigError: the folder holds another configuration's results, or the task and the config don't fit.
        DataMissingError: the task's data are not at hand.
    """
    folder = RunFolder(run_directory(config))
    bar = progress if progress is not None else RunProgress(enabled=False)
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.enter_context(folder.lock())
        finished = folder.finished()
        meta = folder.claim(config, {"version": VERSION, **environment()})
        if finished is not None:
            return Outcome(finished["status"], finished["reason"], folder, finished, resumed=True)
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(config.threads)
        heard = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always", CurvoptWarning)
        return _execute(config, folder, bar, heard, meta)


def _execute(
    config: RunConfig,
    folder: RunFolder,
    bar: RunProgress,
    heard: Sequence[warnings.WarningMessage],
    meta: dict[str, Any],
) -> Outcome:
    bar.begin(f"{config.task['title']}: {config.optimizer['label']}, seed {config.seed}", config.steps)
    try:
        run = Run(config, folder, bar)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{config.optimizer['file']} on {config.task['file']}: {error}") from error
    state = folder.load()
    if state is not None:
        run.load_state_dict(state)
    bar.advance(run.step)
    started = time.time()
    status, reason = "done", ""
    with RunLog(folder.path, run.config, meta, checkpoint_step=None if state is None else run.step) as log:
        try:
            run.train(log)
            last = run.last_look(log)
            log.sync()
            folder.save(run.final_state())
        except (_Diverged, NonFiniteError) as error:
            status, reason = "diverged", str(error)
            last = run.account.columns(run.watch)
        result = {
            "status": status,
            "reason": reason,
            "step": run.step,
            "ended": run.ended or status,
            "product_cost": run.account.cost,
            "route": run.route,
            "clock": clock_of(run.device),
            "data": run.task.data_source,
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "finished_after": time.time() - started,
            "warnings": _texts(heard),
            "log": log.note,
            **last,
        }
        log.finish(result)
    result["warnings"] = _texts(heard)  # closing the log may have had something to say
    folder.finish(result)
    return Outcome(status, reason, folder, result, resumed=state is not None)


def _texts(heard: Sequence[warnings.WarningMessage]) -> list[str]:
    """Each warning once, a line each."""
    return list(dict.fromkeys(f"{w.category.__name__}: {w.message}" for w in heard))
