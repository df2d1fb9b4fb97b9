"""``python -m curvopt.zoo``: the table of docs/zoo.md, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from curvopt.zoo.registry import Entry, Range, describe, names


def _needs(entry: Entry) -> Iterator[str]:
    if entry.needs_closure:
        yield "closure of residuals" if entry.needs_residuals else "closure"
    if entry.needs_create_graph:
        yield "create_graph"
    if entry.needs_curvature:
        yield "curvature"
    if entry.needs_train_mode:
        yield "train(), eval()"
    if entry.matrices_only:
        yield "matrices"
    yield from (f"{key}=" for key in entry.required)


def _limits(entry: Entry) -> Iterator[str]:
    if entry.holds_parameters_copy:
        yield "keeps a copy"
    if not entry.schedulable:
        yield "no schedule"
    if not entry.param_groups:
        yield "one group"
    elif not entry.adds_groups:
        yield "no later groups"
    if not entry.safe_load:
        yield "weights_only=False"
    if entry.products_per_step:
        yield f"{entry.products_per_step:g} products a step"
    if entry.licence.startswith("CC"):
        yield entry.licence


def _search(entry: Entry) -> Iterator[str]:
    for key, space in entry.search.items():
        yield f"{key} {space.low:g} to {space.high:g}" if isinstance(space, Range) else f"{key} in {space.values}"


def markdown() -> str:
    """Two tables: the entries that work, and the others with their reasons."""
    lines = ["| name | family | state | needs | limits | search | paper |", "|---|---|---:|---|---|---|---|"]
    for name in names():
        e = describe(name)
        state = "shapes" if e.memory is None else f"{e.memory:g}"
        cells = [f"`{name}`", e.family, state, *(", ".join(f(e)) for f in (_needs, _limits, _search)), e.paper]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| not available | reason |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in names(excluded=True).items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
