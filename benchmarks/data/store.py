"""Where a data set lies: an explicit folder, the folder named by CURVOPT_DATA, or the user's cache."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .catalog import Spec, spec_of
from .errors import DataMissingError

__all__ = ["Place", "available", "cache_folder", "find"]


@dataclass(frozen=True)
class Place:
    """The folder that holds a data set, and in words where that is ("folder /data/mnist", "cache /home/...")."""

    folder: Path
    source: str

    def file(self, alternatives: tuple[str, ...]) -> Path:
        """The first of the alternative file names that is there."""
        return next(self.folder / name for name in alternatives if (self.folder / name).is_file())


def cache_folder() -> Path:
    """The folder that `fetch` writes to: CURVOPT_CACHE, else the user's cache folder of the operating system."""
    given = os.environ.get("CURVOPT_CACHE")
    if given:
        return Path(given).expanduser()
    try:
        import platformdirs
    except ImportError:  # comes with pooch; without it nothing was ever fetched, so the guess only has to be sane
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "curvopt"
    return Path(platformdirs.user_cache_dir("curvopt", appauthor=False))


def find(spec: Spec, *, train: bool, root: str | os.PathLike[str] | None = None) -> Place:
    """The place that holds every file of a split.

    Args:
        spec: The data set.
        train: Which split.
        root: A folder that is the only one looked at (its subfolders are named as in `Spec.folders`); None looks
            at CURVOPT_DATA, then at the cache.

    Raises:
        DataMissingError: If no place holds the files; the text names the first missing file of each place.
    """
    missing: list[str] = []
    for base, kind in _bases(root):
        if not base.is_dir():
            missing.append(f"{base} is no folder" if kind != "cache" else f"{base / spec.folders[0]} is absent")
            continue
        for name in spec.folders:
            folder = base / name
            lacking = _lacking(folder, spec.train if train else spec.test)
            if lacking is None:
                return Place(folder, f"{kind} {folder}")
            if folder.is_dir() or name == spec.folders[0]:
                missing.append(f"{folder / lacking} is absent")
    split = "training" if train else "test"
    if root is None and not os.environ.get("CURVOPT_DATA"):
        missing.insert(0, "CURVOPT_DATA is not set")
    raise DataMissingError(
        f"{spec.name} ({split} files) was not found: {'; '.join(missing)}. Set CURVOPT_DATA to a folder that holds "
        f"{spec.folders[0]}/{_first_file(spec, train)}, or run: python -m benchmarks fetch {spec.name}"
    )


def available(name: str, *, root: str | os.PathLike[str] | None = None) -> bool:
    """Whether both splits of a data set are at hand, without a download and without a look into the files."""
    spec = spec_of(name)
    if not spec.folders:
        return True
    try:
        for train in (True, False):
            find(spec, train=train, root=root)
    except DataMissingError:
        return False
    return True


def _bases(root: str | os.PathLike[str] | None) -> list[tuple[Path, str]]:
    # A folder given by name is binding: silently training on the copy in the cache would be worse than an error.
    if root is not None:
        return [(Path(root).expanduser(), "folder")]
    bases = [(cache_folder(), "cache")]
    named = os.environ.get("CURVOPT_DATA")
    if named:
        bases.insert(0, (Path(named).expanduser(), "folder"))
    return bases


def _lacking(folder: Path, files: tuple[tuple[str, ...], ...]) -> str | None:
    for alternatives in files:
        if not any((folder / name).is_file() for name in alternatives):
            return alternatives[0]
    return None


def _first_file(spec: Spec, train: bool) -> str:
    return (spec.train if train else spec.test)[0][0]
