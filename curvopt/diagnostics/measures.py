"""What a Probe measures: each name is a function from the probe to columns of its table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvopt._errors import CurvoptWarning, warn
from curvopt.diagnostics.alignment import dominant_share, effective_learning_rates, finite_gradient
from curvopt.diagnostics.displacement import Displacement, subspace_overlap
from curvopt.diagnostics.energy import MATRICES, curvature_energy
from curvopt.diagnostics.localization import localization
from curvopt.diagnostics.sharpness import batch_sharpness, sharpness, small_batch_threshold, thresholds
from curvopt.linalg.eigsh import eigsh
from curvopt.linalg.trace import trace

if TYPE_CHECKING:
    from curvopt.diagnostics.probe import Probe


class ProbeWarning(CurvoptWarning):
    """A measurement failed, or the probe's budget is spent; training goes on."""


DEFAULT = ("eigenvalues", "sharpness", "alignment", "rates", "displacement", "localization")
_PROBES = 16


def checked(names: Sequence[str], has_batches: bool, optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names, or an error that lists those that there are.

    Raises:
        ValueError: an unknown name, "batch_sharpness" without batches, or "preconditioned" without second moments.
    """
    known = list(BEFORE) + ["rates"]
    if isinstance(names, str):
        names = (names,)
    for name in names:
        if name not in known:
            raise ValueError(f"measure holds {name!r}; it may hold {', '.join(map(repr, known))}")
    if "batch_sharpness" in names and not has_batches:
        raise ValueError("measure='batch_sharpness' needs batches=, the mini-batches of the training loop")
    if "preconditioned" in names and not _adaptive(optimizer):
        raise ValueError(
            f"measure='preconditioned' needs an optimizer with second moments (Adam, RMSprop and their kin), got "
            f"{type(optimizer).__name__}"
        )
    return tuple(dict.fromkeys(names))


def _adaptive(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the rule divides by second moments: then its stability threshold is one of the preconditioned matrix."""
    return any("eps" in group for group in optimizer.param_groups)


def planned(probe: Probe) -> int:
    """The most products that one measurement takes."""
    count = probe.max_matvecs
    if "batch_sharpness" in probe.measure:
        count += len(probe.batches or ())
    if "preconditioned" in probe.measure:
        count += 2 * probe.max_matvecs
    if "sharpness" in probe.measure:
        count += 2 * probe.max_matvecs if _several_thresholds(probe) and not _adaptive(probe.optimizer) else 0
    if "trace" in probe.measure:
        count += _PROBES
    if "energy" in probe.measure:
        size = probe.layout.total
        count += 2 * (probe.rank + (size if size <= 256 else 32))
    return count


def before_step(probe: Probe) -> dict[str, Any]:
    """Everything that is measured at the weights before the step."""
    row: dict[str, Any] = {"loss": float(probe.view.loss())}
    previous = probe.eigen
    gradient = finite_gradient(probe.view)
    probe.spend(gradients=2)
    probe.keep_full_gradient(gradient)
    probe.eigen = eigsh(
        probe.view,
        probe.rank,
        tol=probe.tol,
        max_matvecs=probe.max_matvecs,
        v0=None if previous is None else previous.eigenvectors,
        extra=min(1, probe.layout.total - probe.rank),
        seed=probe.seed,
    )
    with torch.no_grad():
        for name, function in BEFORE.items():
            if name in probe.measure:
                row.update(function(probe, row, previous, gradient))
        if probe.extra is not None:
            row.update(probe.extra(probe))
    _record(probe)
    return row


def after_step(probe: Probe, update: Tensor, minibatch: Tensor | None, full: Tensor | None) -> dict[str, Any]:
    """What needs the step's own gradient and update."""
    assert probe.eigen is not None and full is not None
    row: dict[str, Any] = {}
    basis = probe.eigen.eigenvectors
    if "alignment" in probe.measure:
        row["chi_update"] = float(dominant_share(update, basis))
        if minibatch is not None:
            row["chi_minibatch"] = float(dominant_share(minibatch, basis))
            row["chi_noise"] = float(dominant_share(minibatch - full, basis))
        row["update_norm"] = float(update.double().norm())
    if "rates" in probe.measure:
        rates = effective_learning_rates(update, full, basis)
        row.update(rate_dominant=rates.dominant, rate_bulk=rates.bulk, rate_whole=rates.whole)
    return row


def _record(probe: Probe) -> None:
    assert probe.eigen is not None
    record = probe.displacement
    if not probe.keep and len(record) == 2:  # only the first and the last
        state = record.state_dict()
        record.load_state_dict({k: v[:1] for k, v in state.items()})
    values = torch.cat([probe.eigen.eigenvalues, probe.eigen.extra_eigenvalues])
    probe.eigen_step = probe.step
    if record.fits(probe.eigen.eigenvectors.numel()):
        record.record(probe.step, probe.eigen, values)
    elif probe.keep:  # a run must not end for that
        warn(f"no eigenvectors are kept from step {probe.step} on: {record.max_bytes} bytes are full", ProbeWarning)
        probe.keep = False


# ---- one function a name: (probe, row so far, previous eigenpairs, full gradient) -> columns
def _eigenvalues(probe: Probe, row: dict[str, Any], previous: Any, gradient: Tensor) -> dict[str, Any]:
    assert probe.eigen is not None
    values = probe.eigen.eigenvalues.double()
    out: dict[str, Any] = {f"lambda/{i + 1}": float(v) for i, v in enumerate(values)}
    scale = max(float(values.abs().max()), torch.finfo(torch.float64).tiny)
    out["residual"] = float(probe.eigen.residual_norms.double().max()) / scale
    following = probe.eigen.extra_eigenvalues
    gap = math.nan
    if len(following):
        gap = float(values[-1] / following[0].double()) if float(following[0]) > 0 else math.inf
    out["gap"] = gap
    out["converged"] = int(probe.eigen.converged)
    return out


def _several_thresholds(probe: Probe) -> bool:
    return len(set(thresholds(probe.optimizer, probe.layout))) > 1


def _sharpness(probe: Probe, row: dict[str, Any], previous: Any, gradient: Tensor) -> dict[str, Any]:
    assert probe.eigen is not None
    value = float(probe.eigen.eigenvalues[0])
    out = {"sharpness": value, "sharpness_over_loss": value / row["loss"] if row["loss"] else math.nan}
    limits = thresholds(probe.optimizer, probe.layout)
    if _adaptive(probe.optimizer):
        return out
    if len(set(limits)) == 1:
        out["threshold"] = limits[0]
        out["threshold_small_batch"] = small_batch_threshold(probe.optimizer.param_groups[0])
        out["sharpness_ratio"] = value / limits[0]
    else:
        found = sharpness(probe.view, probe.optimizer, tol=probe.tol, max_matvecs=probe.max_matvecs, seed=probe.seed)
        probe.spend(gradients=1)
        out["threshold"], out["sharpness_ratio"] = found.threshold, found.ratio
    return out


def _alignment(probe: Probe, row: dict[str, Any], previous: Any, gradient: Tensor) -> dict[str, Any]:
    assert probe.eigen is not None
    return {
        "chi_full": float(dominant_share(gradient, probe.eigen)),
        "chi_null": math.sqrt(probe.rank / probe.layout.total),
        "gradient_norm": float(gradient.double().norm()),
    }


def _displacement(probe: Probe, row: dict[str, Any], previous: Any, gradient: Tensor) -> dict[str, Any]:
    assert probe.eigen is not None
    record: Displacement = probe.displacement
    nothing = {"overlap_last": math.nan, "lag_last": math.nan, "overlap_first": math.nan, "overlap_null": math.nan}
    nothing["overlap_null"] = probe.rank / probe.layout.total
    if previous is None or probe.eigen_step is None or not len(record):
        return nothing
    first = record.basis(record.steps[0]).to(probe.eigen.eigenvectors)
    return nothing | {
        "overlap_last": subspace_overlap(previous, probe.eigen),
        "lag_last": probe.step - probe.eigen_step,
        "overlap_first": subspace_overlap(first, probe.eigen),
    }


def _localization(probe: Probe, row: dict[str, Any], previous: Any, gradient: Tensor) -> dict[str, Any]:
    assert probe.eigen is not None
    found = localization(probe.eigen)
    return {
        "ipr/1": float(found.ipr[0]),
        "ipr_mean": float(found.ipr.mean()),
        "ipr_relative": float(found.relative.mean()),
    }


def _batch_sharpness(probe: Probe, row: dict[str, Any], previous: Any, gradient: Tensor) -> dict[str, Any]:
    assert probe.batches is not None
    found = batch_sharpness(probe.view, probe.batches, max_batches=len(probe.batches))
    probe.spend(gradients=len(probe.batches), products=len(probe.batches))
    return {"batch_sharpness": found.value, "batch_sharpness_error": found.standard_error}


def _preconditioned(probe: Probe, row: dict[str, Any], previous: Any, gradient: Tensor) -> dict[str, Any]:
    names = ("preconditioned_sharpness", "preconditioned_threshold", "preconditioned_ratio")
    if not any(probe.optimizer.state.get(p) for p in probe.layout.params):
        return dict.fromkeys(names, math.nan)  # no second moments before the first step
    found = sharpness(
        probe.view,
        probe.optimizer,
        preconditioned=True,
        tol=probe.tol,
        max_matvecs=probe.max_matvecs,
        seed=probe.seed,
    )
    probe.spend(gradients=1)
    return dict(zip(names, (found.value, found.threshold, found.ratio), strict=True))


def _energy(probe: Probe, row: dict[str, Any], previous: Any, gradient: Tensor) -> dict[str, Any]:
    assert probe.eigen is not None
    found = curvature_energy(probe.view, probe.eigen, backend="autograd", seed=probe.seed)
    probe.spend(products=found.matvecs)
    out = {}
    for name in MATRICES:
        for kind in ("trace", "frobenius"):
            energy = getattr(getattr(found, name), kind)
            out[f"energy/{name}_{kind}"] = energy.dominant_share
            out[f"energy/{name}_{kind}_error"] = energy.share_error
            out[f"energy/{name}_{kind}_total"] = energy.total
    return out


def _trace(probe: Probe, row: dict[str, Any], previous: Any, gradient: Tensor) -> dict[str, Any]:
    found = trace(probe.view, probes=_PROBES, seed=probe.seed, deflate=probe.eigen)
    return {"trace": found.value, "trace_error": found.standard_error}


BEFORE: dict[str, Callable[[Probe, dict[str, Any], Any, Tensor], dict[str, Any]]] = {
    "eigenvalues": _eigenvalues,
    "sharpness": _sharpness,
    "alignment": _alignment,
    "displacement": _displacement,
    "localization": _localization,
    "batch_sharpness": _batch_sharpness,
    "preconditioned": _preconditioned,
    "energy": _energy,
    "trace": _trace,
}
