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
        family: ``"sgd"``, ``"adaptive"``, ``"sign"``, ``"quasi-newton"``, ``"matrix"``, ``"curvature"`` or ``"subspace"``.
        fixed: keyword arguments that make this entry of the class (momentum for one).
        omits: arguments of the parent class that this one fixes and refuses.
        needs_closure: ``step`` must be given a closure.
        needs_create_graph: gradients must come from ``backward(create_graph=True)``.
        needs_curvature: ``create`` must be given ``curvature=``.
        needs_train_mode: the optimizer has ``train()`` and ``eval()`` that must be called.
        matrices_only: takes two-dimensional parameters alone.
        holds_parameters_copy: keeps a copy of the parameters, so that a change behind its back is pulled back.
        memory: numbers of state a parameter; None where it depends on shapes or rank.
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
    fixed: Mapping[str, Any] = field(default_factory=dict)
    omits: tuple[str, ...] = ()
    needs_closure: bool = False
    needs_create_graph: bool = False
    needs_curvature: bool = False
    needs_train_mode: bool = False
    matrices_only: bool = False
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
    """The known names closest to ``name``, judged by the whole or by the part behind the source's ``/``."""

    def likeness(candidate: str) -> float:
        forms = {candidate, candidate.rpartition("/")[2]}
        return max(difflib.SequenceMatcher(None, name.lower(), form).ratio() for form in forms)

    scores = {candidate: likeness(candidate) for candidate in known}
    return sorted((c for c in scores if scores[c] >= 0.6), key=lambda c: (-scores[c], "/" in c))[:count]


def _plain(name: str) -> Entry:
    try:
        return _ENTRIES[name]
    except KeyError:
        close = nearest(name, _ENTRIES)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "curvopt.zoo.names() lists them"
        raise UnknownOptimizerError(f"unknown optimizer {name!r}: {hint}") from None


def _parts(name: str) -> tuple[str, str]:
    how, _, base = name.partition("+")
    if how not in COMPOSED:
        known = ", ".join(f"'{c}+NAME'" for c in COMPOSED)
        close = nearest(how, COMPOSED, 1)
        hint = f"did you mean {close[0] + '+' + base!r}?" if close else f"it must be one of {known}"
        raise UnknownOptimizerError(f"unknown wrapper {how!r} in {name!r}: {hint}")
    return how, base


def _load(entry: Entry) -> Any:
    module, _, attribute = entry.target.partition(":")
    root = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        if root not in _EXTRAS:
            raise
        raise MissingExtraError(f'{entry.name!r} needs {root}: pip install "curvopt-torch[{_EXTRAS[root]}]"') from error


def _signature(cls: type, fixed_by_class: Iterable[str] = ()) -> dict[str, Any]:
    """Keyword arguments and defaults; a class that passes ``**kwargs`` on takes those of its parent too."""
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
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return {name: value for name, value in found.items() if name not in forbidden}


def _status(entry: Entry) -> Entry:
    """The entry with ``available`` and ``reason`` as they are here and now."""
    root = entry.target.partition(":")[0].partition(".")[0]
    if not entry.available:
        return entry
    if root in _EXTRAS and importlib.util.find_spec(root) is None:
        reason = f'{root} is not installed: pip install "curvopt-torch[{_EXTRAS[root]}]"'
        return replace(entry, available=False, reason=reason)
    if root in ("torch", "curvopt"):
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
        defaults = {**base.defaults, **wrapper_defaults(), **COMPOSED[how]}
        return replace(
            base,
            name=name,
            family="subspace",
            fixed={**base.fixed, **COMPOSED[how]},
            needs_curvature=True,
            memory=None,
            defaults=MappingProxyType(defaults),
            remarks=f"SubspaceScaled around {base_name}: its memory plus rank numbers a parameter. {base.remarks}".strip(),
        )
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
        entries = [replace(e, name=f"{how}+{e.name}") for how in COMPOSED for e in entries if not e.needs_curvature]
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
        _plain(base_name)
        own = wrapper_defaults()
        _check_keys(name, kw, {**own, **describe(base_name).defaults})
        mine = {k: v for k, v in kw.items() if k in own}
        base = create(base_name, params, **{k: v for k, v in kw.items() if k not in own})
        wrapper: Any = _load(_WRAPPER)
        return wrapper(base, **{**COMPOSED[how], **mine})
    entry = _status(_plain(name))
    if not entry.available:
        if entry.reason.endswith("installed") or "pip install" in entry.reason:
            raise MissingExtraError(f"{name!r}: {entry.reason}")
        raise UnavailableOptimizerError(f"{name!r} does not work here: {entry.reason}")
    cls = _load(entry)
    _check_keys(name, kw, _signature(cls, entry.omits))
    return cls(params, **{**entry.fixed, **kw})
