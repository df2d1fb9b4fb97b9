"""Where a run's records go: plain JSON Lines first, Weights & Biases beside them."""

from .base import Sink as Sink
from .base import SinkWarning as SinkWarning
from .jsonl import JsonlRun as JsonlRun
from .jsonl import JsonlSink as JsonlSink
from .jsonl import read_jsonl as read_jsonl
from .multi import MultiSink as MultiSink
from .wandb_sink import WandbSink as WandbSink

__all__ = ["JsonlRun", "JsonlSink", "MultiSink", "Sink", "SinkWarning", "WandbSink", "read_jsonl"]
