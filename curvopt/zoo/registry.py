"""The zoo's registry: every optimizer under one name, with its facts and its search space."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal, overload

import torch

from curvopt._errors import CurvoptError, MissingExtraError


class UnknownOptimizerError(CurvoptError, KeyError):
    """No optimizer of this name; the text names the nearest ones."""

    def __str__(self) -> str:
        return str(self.args[0])


class UnavailableOptimizerError(CurvoptError, RuntimeError):
    """The optimizer is known, but does not work here; the text says why."""


@dataclass(frozen=True)
class Range:
    """A search range of a number, ``low`` and ``high`` included; ``log`` asks for a logarithmic scale."""

    low: float
    high: float
    log: bool = True

    @classmethod
    def around(cls, middle: float) -> Range:
        """Two decades to either side of ``middle``."""
        return cls(float(f"{middle / 100:.6g}"), float(f"{middle * 100:.6g}"))


@dataclass(frozen=True)
class Choice:
    """A search range of named or discrete values."""

    values: tuple[Any, ...]


SearchSpace = Mapping[str, Range | Choice]


@dataclass(frozen=True)
class Entry:
    """What the zoo knows of one optimizer.

    Attributes:
        name: the name that ``create`` takes.
        target: ``"module:Class"``, imported when first needed.
        family: ``"sgd"``, ``"adaptive"``, ``"sign"``, ``"quasi-newton"``, ``"matrix"`` (whole weight matrices at a time),
            ``"curvature"`` (Hessian products), ``"lr-free"`` (estimates its learning rate), ``"averaging"`` (schedule-free
            and lookahead) or ``"subspace"`` (ours).
        package: the one that must be installed; empty where it is the target's own.
        fixed: keyword arguments that make this entry of the class (momentum for one).
        omits: arguments of the parent class that this one fixes and refuses.
        required: arguments without a default that ``create`` must be given.
        needs_closure: ``step`` must be given a closure.
        needs_residuals: that closure returns the residuals themselves, without ``backward()``.
        needs_create_graph: gradients must come from ``backward(create_graph=True)``.
        needs_curvature: ``create`` must be given ``curvature=``.
        needs_train_mode: the optimizer has ``train()`` and ``eval()`` that must be called.
        matrices_only: takes two-dimensional parameters alone.
        param_groups: takes several groups with settings of their own.
        adds_groups: ``add_param_group`` works after the first step too.
        schedulable: ``group["lr"]`` scales the update, so that schedulers work and 0 freezes the parameters.
        safe_load: a saved state loads with ``torch.load(weights_only=True)``.
        holds_parameters_copy: keeps a copy of the parameters, so that a change behind its back is pulled back.
        memory: numbers of state a parameter, by count of its tensors; None where it depends on shapes or rank.
        products_per_step: Hessian products a step, outside refreshes.
        paper: where the method comes from.
        licence: of the code that runs.
        defaults: the constructor's keyword arguments, ``fixed`` put in (empty while the library is not installed).
        search: what a fair tuning varies.
        remarks: what a user should know.
        available: works here and now.
        reason: why it does not, or an empty string.
    """

    name: str
    target: str
    family: str
    package: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    omits: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    needs_closure: bool = False
    needs_residuals: bool = False
    needs_create_graph: bool = False
    needs_curvature: bool = False
    needs_train_mode: bool = False
    matrices_only: bool = False
    param_groups: bool = True
    adds_groups: bool = True
    schedulable: bool = True
    safe_load: bool = True
    holds_parameters_copy: bool = False
    memory: float | None = None
    products_per_step: float = 0.0
    paper: str = ""
    licence: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    search: SearchSpace = field(default_factory=dict)
    remarks: str = ""
    available: bool = True
    reason: str = ""


_ENTRIES: dict[str, Entry] = {}
_EXTRAS = {"torch_optimizer": "optimizers", "pytorch_optimizer": "optimizers", "schedulefree": "optimizers"}

# How a base is split when it is written "bulk+adamw": the two coefficients of SubspaceScaled.
COMPOSED: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {"scaled": {}, "bulk": {"dominant": 0.0, "bulk": 1.0}, "dom": {"dominant": 1.0, "bulk": 0.0}}
)


_WRAPPER = Entry("scaled", "curvopt.optim.wrapper:SubspaceScaled", "subspace")
_WRAPPER_OWN = ("curvature", "rank", "dominant", "bulk", "check_finite", "curvature_closure")


def register(*entries: Entry) -> None:
    """Add entries; a name that is taken is a ValueError."""
    for entry in entries:
        if entry.name in _ENTRIES:
            raise ValueError(f"the zoo already has an optimizer named {entry.name!r}")
        _ENTRIES[entry.name] = entry


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names closest to ``name``, judged by the whole or by the part behind the source's ``/``.

    Where several sources have one method, torch's or ours is named, else the maintained one, unless ``name`` has a source.
    """

    def likeness(candidate: str) -> float:
        forms = {candidate, candidate.rpartition("/")[2]}
        return max(difflib.SequenceMatcher(None, name.lower(), form).ratio() for form in forms)

    scores = {candidate: likeness(candidate) for candidate in known}
    ranked = sorted((c for c in scores if scores[c] >= 0.6), key=lambda c: (-scores[c], "/" in c, c))
    first = {c.rpartition("/")[2]: c for c in reversed(ranked)}
    return [c for c in ranked if "/" in name or first[c.rpartition("/")[2]] == c][:count]


def _plain(name: str) -> Entry:
    try:
        return _ENTRIES[name]
    except KeyError:
        close = nearest(name, _ENTRIES)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "curvopt.zoo.names() lists them"
        raise UnknownOptimizerError(f"unknown optimizer {name!r}: {hint}") from None


def _wrapped(how: str, base: Entry) -> Entry:
    """The entry of ``how+base``: the base's facts, the wrapper's needs."""
    name = f"{how}+{base.name}"
    if base.available and (base.needs_curvature or base.family == "subspace"):
        base = replace(base, available=False, reason="splits its own updates already")
    elif base.available and base.needs_train_mode:
        base = replace(base, available=False, reason="moves the parameters between two points in train() and eval()")
    elif base.available and "lr" not in base.search:
        base = replace(base, available=False, reason="has no learning rate in its param groups")
    return replace(
        base,
        name=name,
        family="subspace",
        fixed={**base.fixed, **COMPOSED[how]},
        needs_curvature=True,
        memory=None,
        remarks=f"SubspaceScaled around {base.name}: its memory plus rank numbers a parameter. {base.remarks}".strip(),
    )


def _parts(name: str) -> tuple[str, str]:
    how, _, base = name.partition("+")
    if how not in COMPOSED:
        known = ", ".join(f"'{c}+NAME'" for c in COMPOSED)
        close = nearest(how, COMPOSED, 1)
        hint = f"did you mean {close[0] + '+' + base!r}?" if close else f"it must be one of {known}"
        raise UnknownOptimizerError(f"unknown wrapper {how!r} in {name!r}: {hint}")
    return how, base


def _package(entry: Entry) -> str:
    return entry.package or entry.target.partition(":")[0].partition(".")[0]


def _load(entry: Entry) -> Any:
    module, _, attribute = entry.target.partition(":")
    package = _package(entry)
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        if package not in _EXTRAS:
            raise
        extra = _EXTRAS[package]
        raise MissingExtraError(f'{entry.name!r} needs {package}: pip install "curvopt-torch[{extra}]"') from error
    except AttributeError as error:
        raise UnavailableOptimizerError(f"{entry.name!r}: the installed {package} has no {attribute}") from error


def _signature(cls: type, fixed_by_class: Iterable[str] = ()) -> dict[str, Any]:
    """Keyword arguments and defaults; a class of ours that passes ``**kwargs`` on takes those of its parent too.

    Other libraries' classes that take ``**kwargs`` swallow what they don't know: theirs end at what is named.
    """
    empty, forbidden = inspect.Parameter.empty, set(fixed_by_class)
    found: dict[str, Any] = {}
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[
            2:
        ]  # self, then params or base
        named = (p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        found = {**{p.name: None if p.default is empty else p.default for p in named}, **found}
        ours = owner.__module__.partition(".")[0] == "curvopt"
        if not ours or not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return {name: value for name, value in found.items() if name not in forbidden}


def _status(entry: Entry) -> Entry:
    """The entry with ``available`` and ``reason`` as they are here and now."""
    package = _package(entry)
    if not entry.available:
        return entry
    if package in _EXTRAS and importlib.util.find_spec(package) is None:
        reason = f'{package} is not installed: pip install "curvopt-torch[{_EXTRAS[package]}]"'
        return replace(entry, available=False, reason=reason)
    if package in ("torch", "curvopt"):
        module, _, attribute = entry.target.partition(":")
        if not hasattr(importlib.import_module(module), attribute):
            return replace(entry, available=False, reason=f"{module} {torch.__version__} has no {attribute}")
    return entry


def wrapper_defaults() -> dict[str, Any]:
    """Keyword arguments of ``SubspaceScaled`` and their defaults."""
    from curvopt.optim.config import SubspaceConfig

    own = _signature(_load(_WRAPPER))
    return {
        **{f.name: f.default for f in fields(SubspaceConfig)},
        **{k: v for k, v in own.items() if k in _WRAPPER_OWN},
    }


def describe(name: str) -> Entry:
    """Everything known of one optimizer, ``"bulk+NAME"`` and its like included.

    Raises:
        UnknownOptimizerError: naming the nearest names.
    """
    if "+" in name:
        how, base_name = _parts(name)
        base = describe(base_name)
        entry = _wrapped(how, base)
        defaults = {**base.defaults, **wrapper_defaults(), **COMPOSED[how]} if entry.available else {}
        return replace(entry, fixed=MappingProxyType(dict(entry.fixed)), defaults=MappingProxyType(defaults))
    entry = _status(_plain(name))
    found = _signature(_load(entry), entry.omits) if entry.available else {}
    return replace(
        entry,
        fixed=MappingProxyType(dict(entry.fixed)),
        defaults=MappingProxyType({**found, **entry.fixed}),
        search=MappingProxyType(dict(entry.search)),
    )


@overload
def names(pattern: str | None = None, excluded: Literal[False] = False) -> list[str]: ...
@overload
def names(pattern: str | None = None, *, excluded: Literal[True]) -> dict[str, str]: ...
def names(pattern: str | None = None, excluded: bool = False) -> list[str] | dict[str, str]:
    """Names of the optimizers that work here, or with ``excluded=True`` the others with the reason for each.

    Args:
        pattern: a shell pattern (``"adam*"``); one with a ``+`` (``"bulk+*"``) lists wrapped optimizers too.
        excluded: give a dict from name to reason, of those that don't work here.
    """
    entries = [_status(e) for e in _ENTRIES.values()]
    if pattern is not None and "+" in pattern:
        entries = [_wrapped(how, e) for how in COMPOSED for e in entries]
    chosen = [e for e in entries if pattern is None or fnmatchcase(e.name, pattern)]
    if excluded:
        return {e.name: e.reason for e in sorted(chosen, key=lambda e: e.name) if not e.available}
    return sorted(e.name for e in chosen if e.available)


def search_space(name: str) -> dict[str, Range | Choice]:
    """What a fair tuning of this optimizer varies: argument -> ``Range`` or ``Choice``."""
    return dict(describe(name).search)


def _check_keys(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    pool = set(known)
    for key in given:
        if key not in pool:
            close = difflib.get_close_matches(key, pool, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(sorted(pool))}"
            raise TypeError(f"optimizer {name!r} takes no argument {key!r}: {hint}")


def create(name: str, params: Any, **kw: Any) -> torch.optim.Optimizer:
    """Build an optimizer by its name.

    Args:
        name: one of ``names()``; ``"bulk+NAME"``, ``"dom+NAME"`` and ``"scaled+NAME"`` wrap another one, and then
            keyword arguments of ``SubspaceScaled`` go to the wrapper and all others to the base.
        params: parameters or param groups.
        **kw: the optimizer's arguments; they override the entry's ``fixed`` ones.

    Raises:
        UnknownOptimizerError: no such name; the nearest ones are named.
        UnavailableOptimizerError: it is known not to work here, with the reason.
        MissingExtraError: its library is not installed.
        TypeError: an argument that it does not take; the nearest one is named.
    """
    if "+" in name:
        how, base_name = _parts(name)
        _refuse(_wrapped(how, _status(_plain(base_name))))
        own = wrapper_defaults()
        _check_keys(name, kw, {**own, **describe(base_name).defaults})
        mine = {k: v for k, v in kw.items() if k in own}
        base = create(base_name, params, **{k: v for k, v in kw.items() if k not in own})
        wrapper: Any = _load(_WRAPPER)
        return wrapper(base, **{**COMPOSED[how], **mine})
    entry = _status(_plain(name))
    _refuse(entry)
    cls = _load(entry)
    _check_keys(name, kw, _signature(cls, entry.omits))
    missing = [key for key in entry.required if key not in kw]
    if missing:
        raise TypeError(f"optimizer {name!r} needs {', '.join(f'{key}=' for key in missing)}")
    # A list: some classes go through a generator of parameters twice.
    given = params if isinstance(params, torch.Tensor) else list(params)
    return cls(given, **{**entry.fixed, **kw})


def _refuse(entry: Entry) -> None:
    """Raise where the entry is not available."""
    if entry.available:
        return
    if "pip install" in entry.reason:
        raise MissingExtraError(f"{entry.name!r}: {entry.reason}")
    raise UnavailableOptimizerError(f"{entry.name!r} does not work here: {entry.reason}")
