"""Every optimizer of ours in one table, after torch.testing's OptimizerInfo: a new one meets all the contract's tests.

Each entry says how it is made, what base rule it splits, and what it can't do; ``INPUTS`` are the constructor arguments
that tests run through. ``World`` is the small problem that all of them train on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvopt.curvature.functional import FunctionalHessian
from curvopt.curvature.hessian import Hessian
from curvopt.curvature.second_moment import GradientSecondMoment
from curvopt.optim import BulkSGD, DomSGD, GGNProjectedSGD, InterpolatedSGD, SubspaceScaled

RANK, PERIOD = 2, 3


class Careless(torch.optim.Optimizer):
    """A user's own optimizer: sets its state up where ``len(state) == 0``, as torch's own do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["mean"] = torch.zeros_like(p)
                state["mean"].mul_(group["momentum"]).add_(p.grad)
                p.add_(state["mean"], alpha=-group["lr"])
        return loss


class World:
    """A tanh net on three classes with fixed mini-batches; the same at each call, and copyable."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
            self.x = torch.randn(12, 3, dtype=dtype)
            self.y = torch.randint(0, 3, (12,))
        self.loss_fn = nn.CrossEntropyLoss()

    def curvature(self, **options: Any) -> Hessian:
        """The Hessian of the whole data set's loss."""
        return Hessian(self.model, self.loss_fn, (self.x, self.y), **options)

    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def flat(self) -> Tensor:
        """All parameters in one vector, copied."""
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).clone()

    def loss(self, i: int) -> Tensor:
        """Loss of the mini-batch of step i."""
        return self.loss_fn(self.model(self.x[i % 3 :: 3]), self.y[i % 3 :: 3])

    def closure(self, optimizer: Any, i: int) -> Callable[[], Tensor]:
        """The closure of step i."""

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(i)
            loss.backward()
            return loss

        return evaluate

    def train(self, optimizer: Any, steps: int, start: int = 0, closure: bool = False) -> Tensor:
        """Take steps ``start`` to ``start + steps``; returns the parameters."""
        for i in range(start, start + steps):
            if closure:
                optimizer.step(self.closure(optimizer, i))
            else:
                self.closure(optimizer, i)()
                optimizer.step()
        return self.flat()


@dataclass(frozen=True)
class Entry:
    """One optimizer.

    Attributes:
        build: (params, curvature, base's keyword arguments, ours) -> optimizer.
        base: the rule that it splits, (params, **keyword arguments) -> torch optimizer.
        options: keyword arguments of ours that it always gets.
        wrapper: whether it wraps another optimizer.
        needs_closure: ``step`` can't do without one.
        one_group: the base takes a single parameter group.
        elementwise: each parameter moves by its own gradient alone.
        first_refresh: steps before the first refresh.
        products: whether a refresh multiplies with the curvature.
        copies: the base survives deepcopy and pickle.
        resumes: dtypes of parameters in which the base continues bit for bit from its own checkpoint.
    """

    name: str
    build: Callable[..., Any]
    base: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    wrapper: bool = False
    needs_closure: bool = False
    one_group: bool = False
    elementwise: bool = True
    first_refresh: int = 0
    products: bool = True
    copies: bool = True
    resumes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)

    @property
    def free(self) -> bool:
        """Whether both coefficients can be chosen."""
        return self.wrapper or self.name.startswith("Interpolated")

    def make(self, params: Any, curvature: Any, base: dict[str, Any] | None = None, **ours: Any) -> Any:
        """The optimizer, at rank 2 and a period of 3 steps unless told otherwise."""
        settings = {"rank": RANK, "refresh_every": PERIOD, **self.options, **ours}
        return self.build(params, curvature if self.products else None, base or {}, settings)

    def of(self, world: World, base: dict[str, Any] | None = None, **ours: Any) -> Any:
        """The optimizer over a world's parameters."""
        return self.make(world.params(), world.curvature() if self.products else None, base, **ours)

    def train(self, world: World, optimizer: Any, steps: int, start: int = 0) -> Tensor:
        """``World.train`` in the way that this optimizer needs."""
        return world.train(optimizer, steps, start, closure=self.needs_closure)


def _family(cls: Any, lr: float = 0.1) -> Callable[..., Any]:
    def build(params: Any, curvature: Any, base: dict[str, Any], ours: dict[str, Any]) -> Any:
        return cls(params, **{"lr": lr, **base}, curvature=curvature, **ours)

    return build


def _wrapped(rule: Callable[..., torch.optim.Optimizer]) -> Callable[..., Any]:
    def build(params: Any, curvature: Any, base: dict[str, Any], ours: dict[str, Any]) -> Any:
        return SubspaceScaled(rule(params, **base), curvature=curvature, **ours)

    return build


def _rule(cls: Any, **defaults: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda params, **given: cls(params, **{**defaults, **given})


SGD = _rule(torch.optim.SGD, lr=0.1)
ADAMW = _rule(torch.optim.AdamW, lr=0.02)
NADAM = _rule(torch.optim.NAdam, lr=0.02)
RMSPROP = _rule(torch.optim.RMSprop, lr=0.01)
CARELESS = _rule(Careless, lr=0.05)
LBFGS = _rule(torch.optim.LBFGS, lr=0.2, max_iter=3, history_size=4)
# A border so low that the leading eigenvalues of ``World`` lie beyond it at lr 0.1.
EDGE = {"dominant": "edge", "rank": "edge", "max_rank": 3, "edge": 0.01}
HALF = {"dominant": 0.5, "bulk": 1.5}

ENTRIES: list[Entry] = [
    Entry("BulkSGD", _family(BulkSGD), SGD),
    Entry("DomSGD", _family(DomSGD), SGD),
    Entry("InterpolatedSGD", _family(InterpolatedSGD), SGD, HALF),
    Entry("InterpolatedSGD-edge", _family(InterpolatedSGD), SGD, EDGE),
    Entry("InterpolatedSGD-history", _family(InterpolatedSGD), SGD, {**HALF, "source": "history"}, products=False),
    Entry("GGNProjectedSGD", _family(GGNProjectedSGD), SGD),
    Entry("SubspaceScaled(SGD)", _wrapped(SGD), SGD, HALF, wrapper=True),
    Entry("SubspaceScaled(AdamW)", _wrapped(ADAMW), ADAMW, HALF, wrapper=True),
    Entry(
        "SubspaceScaled(AdamW)-preconditioner",
        _wrapped(ADAMW),
        ADAMW,
        {**HALF, "metric": "preconditioner"},
        wrapper=True,
        first_refresh=10,
    ),
    # NAdam keeps a float32 scalar in its state, which load_state_dict casts to the parameter's dtype.
    Entry("SubspaceScaled(NAdam)", _wrapped(NADAM), NADAM, HALF, wrapper=True, resumes=(torch.float32,)),
    Entry("SubspaceScaled(RMSprop)", _wrapped(RMSPROP), RMSPROP, HALF, wrapper=True),
    Entry("SubspaceScaled(Careless)", _wrapped(CARELESS), CARELESS, HALF, wrapper=True),
    Entry(
        "SubspaceScaled(LBFGS)",
        _wrapped(LBFGS),
        LBFGS,
        HALF,
        wrapper=True,
        needs_closure=True,
        one_group=True,
        elementwise=False,
        copies=False,  # LBFGS._params is not among what __getstate__ returns
    ),
]
BY_NAME = {entry.name: entry for entry in ENTRIES}
FAMILY = [entry for entry in ENTRIES if not entry.wrapper]
WRAPPERS = [entry for entry in ENTRIES if entry.wrapper]

# What torch.optim.SGD can be told; every combination is also told to ours, under the same flags on both sides.
SGD_INPUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight decay": {"weight_decay": 0.1},
    "nesterov and weight decay": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
    "maximize": {"maximize": True, "lr": 0.01, "momentum": 0.5, "weight_decay": 0.05},
    "for loop": {"foreach": False, "momentum": 0.9},
    "foreach": {"foreach": True, "momentum": 0.9, "weight_decay": 0.1},
    "fused": {"fused": True, "momentum": 0.9, "weight_decay": 0.1},
    "tensor lr": {"lr": torch.tensor(0.1), "momentum": 0.9},
}


def errors(world: World) -> Iterator[tuple[str, Callable[[], Any], type[Exception], str]]:
    """(description, call, error, regular expression of its text) of constructor arguments that are wrong."""
    params, op = world.params(), world.curvature()
    other = World().curvature()
    total = sum(p.numel() for p in params)
    adamw = ADAMW(world.params())

    def bulk(**given: Any) -> Callable[[], Any]:
        return lambda: BulkSGD(params, **{"lr": 0.1, "curvature": op, "rank": RANK, **given})

    def mixed(**given: Any) -> Callable[[], Any]:
        return lambda: InterpolatedSGD(params, **{"lr": 0.1, "curvature": op, "rank": RANK, **given})

    def scaled(**given: Any) -> Callable[[], Any]:
        return lambda: SubspaceScaled(adamw, **{"curvature": op, "rank": RANK, **given})

    yield "rank < 0", bulk(rank=-1), ValueError, r"rank must be at least 0, got -1"
    yield "rank > P", bulk(rank=total + 1), ValueError, rf"rank={total + 1} is larger than .* parameters .*{total}"
    yield "rank no int", bulk(rank=2.5), TypeError, r"rank must be an int, None or 'edge', got 2\.5"
    yield "rank a bool", bulk(rank=True), TypeError, r"rank must be an int, None or 'edge', got True"
    yield "rank an unknown name", bulk(rank="egde"), TypeError, r"rank must be an int, None or 'edge', got 'egde'"
    yield "no operator", bulk(curvature=None), ValueError, r"curvature=None with rank > 0: give curvature=.*Hessian"
    yield "unknown curvature", bulk(curvature="hessian"), ValueError, r"curvature must be .*'closure'.* got 'hessian'"
    yield "curvature a model", bulk(curvature=world.model), TypeError, r"curvature must be an operator .*got Sequential"
    yield "foreign operator", bulk(curvature=other), ValueError, r"parameter '0\.weight', .* subset .* fully_shard"
    yield "closure without rank", bulk(curvature="closure", rank=None), ValueError, r"rank=None .* closure: give rank="
    yield "history without rank", mixed(source="history", rank=None, **HALF), ValueError, r"source='history': give rank"
    yield "refresh_every", bulk(refresh_every=0), ValueError, r"refresh_every must be at least 1 step, got 0"
    yield "refresh_every a name", bulk(refresh_every="never"), ValueError, r"'auto' or 'frozen', got 'never'"
    yield "refresh_every a float", bulk(refresh_every=1.5), TypeError, r"refresh_every must be an int.* got 1\.5"
    yield "overhead", bulk(overhead=0.0), ValueError, r"overhead must be above 0"
    for name in ("start_threshold", "tol", "edge", "overhead", "damping", "costs"):
        yield f"{name} a word", bulk(**{name: "much"}), TypeError, rf"{name} must be a number.*, got 'much'"
    for name in ("start_timeout", "max_matvecs", "max_rank", "seed"):
        yield f"{name} a float", bulk(**{name: 2.5}), TypeError, rf"{name} must be an int.*, got 2\.5"
    yield "alpha a word", mixed(path="convex", alpha="half"), TypeError, r"alpha must be a number, got 'half'"
    yield (
        "history per layer",
        bulk(source="history", layout="layer", curvature=None),
        ValueError,
        r"source='history' keeps one basis over all parameters",
    )
    yield "start", bulk(start=-1), ValueError, r"start must be a step >= 0 or 'aligned', got -1"
    yield "start a name", bulk(start="late"), ValueError, r"start must be one of 'aligned', got 'late'"
    yield "start_threshold", bulk(start_threshold=1.5), ValueError, r"start_threshold must lie in \(0, 1\], got 1\.5"
    yield "start_timeout", bulk(start_timeout=-2), ValueError, r"start_timeout must be a step >= 0 or None, got -2"
    yield "project", bulk(project="both"), ValueError, r"project must be one of 'update', 'gradient', got 'both'"
    yield "layout", bulk(layout="block"), ValueError, r"layout must be one of 'whole', 'layer', got 'block'"
    yield "source", bulk(source="past"), ValueError, r"source must be one of 'curvature', 'history', got 'past'"
    yield "metric", bulk(metric="fisher"), ValueError, r"metric must be one of 'euclidean', 'preconditioner', got 'fish"
    yield (
        "metric of SGD",
        bulk(metric="preconditioner"),
        ValueError,
        r"needs exp_avg_sq .* SubspaceScaled\(torch\.optim",
    )
    yield "max_matvecs", bulk(max_matvecs=1), ValueError, r"max_matvecs=1 is below rank=2"
    yield "tol", bulk(tol=0), ValueError, r"tol must be above 0, got 0"
    yield "edge", bulk(edge=0), ValueError, r"edge must be above 0, got 0"
    yield "damping", bulk(damping=-1.0), ValueError, r"damping must be at least 0 .*, got -1"
    yield "max_rank", bulk(max_rank=0), ValueError, r"max_rank must be at least 1, got 0"
    yield "costs", bulk(costs=0.0), ValueError, r"costs, seconds of a product over seconds of a step, .* got 0"
    yield "basis_dtype", bulk(basis_dtype=torch.int8), ValueError, r"basis_dtype must be a floating-point .*torch\.int8"
    yield "unknown argument", bulk(refresh_evry=3), TypeError, r"unexpected keyword argument 'refresh_evry'"
    yield "Bulk with dominant", bulk(dominant=0.5), TypeError, r"BulkSGD fixes dominant; use InterpolatedSGD"
    yield "Dom at rank 0", lambda: DomSGD(params, lr=0.1, rank=0), ValueError, r"rank=0 leaves DomSGD no direction"
    yield "nothing moves", mixed(rank=0, dominant=1.0, bulk=0.0), ValueError, r"rank=0 with bulk=0 leaves no direction"
    yield "no coefficients", mixed(), ValueError, r"InterpolatedSGD needs dominant= and bulk=, or path= and alpha="
    yield "both forms", mixed(path="convex", alpha=0.5, bulk=1.0), ValueError, r"either path= and alpha=, or dominant="
    yield "path alone", mixed(path="convex"), ValueError, r"path and alpha belong together"
    yield "unknown path", mixed(path="zigzag", alpha=0.5), ValueError, r"path must be one of 'convex', .*got 'zigzag'"
    yield "alpha", mixed(path="convex", alpha=2.0), ValueError, r"alpha must lie in \[0, 1\] for path='convex', got 2"
    yield "alpha amplified", mixed(path="amplified", alpha=0.5), ValueError, r"alpha must lie in \[1, inf\]"
    yield "dominant a name", mixed(dominant="newtn"), ValueError, r"dominant must be one of 'newton', 'edge', got 'newt"
    yield "dominant NaN", mixed(dominant=float("nan")), ValueError, r"dominant must be a finite number, got nan"
    yield "bulk infinite", mixed(bulk=float("inf")), ValueError, r"bulk must be a finite number, got inf"
    yield (
        "history and newton",
        mixed(source="history", dominant="newton"),
        ValueError,
        r"source='history' gives directions without curvature",
    )
    yield (
        "GGN from a closure",
        lambda: GGNProjectedSGD(params, lr=0.1, rank=1, curvature="closure"),
        ValueError,
        r"GGNProjectedSGD needs outputs and loss apart.*curvopt\.GGN",
    )
    for made, kind in (
        (lambda: op.shift(0.1), "Hessian"),
        (lambda: FunctionalHessian(world.model, world.loss_fn, (world.x, world.y)), "FunctionalHessian"),
        (
            lambda: op.ggn() + GradientSecondMoment(world.model, world.loss_fn, (world.x, world.y)),
            "GradientSecondMoment",
        ),
    ):
        yield (
            f"GGN from a {kind}",
            lambda made=made: GGNProjectedSGD(params, lr=0.1, rank=1, curvature=made()),
            ValueError,
            rf"GGNProjectedSGD needs a GGN, but its curvature holds a {kind}: give curvature=curvopt\.GGN",
        )
    yield (
        "base no optimizer",
        lambda: SubspaceScaled(world.model, rank=0),
        TypeError,
        r"base must be a .*got Sequential",
    )
    yield (
        "base one of ours",
        lambda: SubspaceScaled(BulkSGD(params, lr=0.1, rank=0), rank=0),
        TypeError,
        r"base is a BulkSGD, which splits its updates itself",
    )
    yield (
        "wrapper's unknown argument",
        scaled(refresh_evry=3),
        TypeError,
        r"SubspaceScaled got an unexpected keyword argument 'refresh_evry'; did you mean 'refresh_every'\?",
    )
    yield "border of Adam", scaled(dominant="edge"), ValueError, r"border of AdamW is known only in its own metric"
    yield "edge rank of Adam", scaled(rank="edge"), ValueError, r"AdamW is known only in .*metric='preconditioner'"
    yield (
        "preconditioner per layer",
        scaled(metric="preconditioner", layout="layer"),
        ValueError,
        r"metric='preconditioner' works on the whole network: use layout='whole'",
    )
    yield (
        "curvature_closure beside an operator",
        bulk(curvature_closure=lambda: None),
        ValueError,
        r"curvature_closure is for curvature='closure' and has no effect otherwise",
    )
    yield "no parameters", lambda: BulkSGD([], lr=0.1, rank=0), ValueError, r"optimizer got an empty parameter list"
    yield "lr a string", bulk(lr="0.1"), TypeError, r"'<' not supported between instances of 'str' and 'float'"
    yield "lr below 0", bulk(lr=-0.1), ValueError, r"Invalid learning rate: -0\.1"
    yield "nesterov alone", bulk(nesterov=True), ValueError, r"Nesterov momentum requires a momentum and zero dampening"
