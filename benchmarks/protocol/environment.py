"""Where a run was made: what its record must name to be repeated."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch

import curvopt


def commit() -> str:
    """The commit of this checkout, with ``+`` where files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as handle:
            return next(line.partition(":")[2].strip() for line in handle if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _optional_versions() -> dict[str, str]:
    """Of the libraries whose optimizers or data a run may have used, where they are installed."""
    found = {}
    for name in ("torch-optimizer", "pytorch_optimizer", "schedulefree", "scikit-learn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Versions, machine, commit and date."""
    return {
        "curvopt": getattr(curvopt, "__version__", "unknown"),
        "commit": commit(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        **_optional_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
