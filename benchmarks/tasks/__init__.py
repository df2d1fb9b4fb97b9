"""Tasks: one small class here and one YAML file in ``configs/task`` each. Every module of this folder is looked at."""

from benchmarks.tasks.base import Task as Task
from benchmarks.tasks.base import all_tasks as all_tasks
from benchmarks.tasks.base import build as build
from benchmarks.tasks.base import register as register

__all__ = ["Task", "all_tasks", "build", "register"]
