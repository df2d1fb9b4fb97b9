"""A character-level GPT and a small transformer that judges sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import data
from benchmarks.config import TaskConfig
from benchmarks.models.transformer import CharGPT, SentenceTransformer
from benchmarks.tasks.base import Task, register
from benchmarks.tasks.metrics import classification


@dataclass
class CharGPTConfig(TaskConfig):
    """dataset: a text; context: characters a window; width, layers, heads: of the network; windows of each split."""

    dataset: str = "tinyshakespeare"
    context: int = 64
    width: int = 64
    layers: int = 2
    heads: int = 4
    train_windows: int = 5000
    test_windows: int = 500


@register("char_gpt")
class CharGPTTask(Task):
    """Next characters in windows that don't overlap; cross-entropy a character, accuracy on the text's last tenth."""

    Config = CharGPTConfig

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        self.loss_fn = nn.CrossEntropyLoss()
        train, test = data.load_chars(config.dataset, train=True), data.load_chars(config.dataset, train=False)
        self.symbols, self.data_source = len(train.alphabet), train.describe()
        inputs, targets = data.char_windows(train.ids, config.context, limit=config.train_windows)
        self.train = inputs.to(device), targets.to(device)
        inputs, targets = data.char_windows(test.ids, config.context, limit=config.test_windows)
        self.test = inputs.to(device), targets.to(device)

    def build_model(self) -> nn.Module:
        """The network, weights as its class says."""
        c = self.config
        return CharGPT(self.symbols, c.context, c.width, c.layers, c.heads)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``train_loss``, ``test_loss`` and ``test_accuracy`` a character."""
        return classification(self, model, chunk=250)


@dataclass
class SentencesConfig(TaskConfig):
    """dataset: labelled sentences; words: size of the vocabulary; length: words a sentence; the network's sizes."""

    dataset: str = "sst-2"
    words: int = 4000
    length: int = 32
    width: int = 64
    layers: int = 2
    heads: int = 4
    train_examples: int = 5000


@register("sentence_transformer")
class Sentences(Task):
    """Sentences as word numbers of the training vocabulary; softmax cross-entropy, accuracy on the dev set."""

    Config = SentencesConfig

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        self.loss_fn = nn.CrossEntropyLoss()
        train = data.load_sentences(config.dataset, train=True, limit=config.train_examples)
        test = data.load_sentences(config.dataset, train=False)
        self.classes, self.data_source = train.classes, train.describe()
        self.vocabulary = data.Vocabulary.build(train.sentences, max_words=config.words)
        ids, _ = self.vocabulary.encode(train.sentences, length=config.length)
        self.train = ids.to(device), train.targets.to(device)
        ids, _ = self.vocabulary.encode(test.sentences, length=config.length)
        self.test = ids.to(device), test.targets.to(device)

    def build_model(self) -> nn.Module:
        """The network, weights as its class says."""
        c = self.config
        return SentenceTransformer(len(self.vocabulary), c.length, c.width, c.layers, c.heads, self.classes)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``train_loss``, ``test_loss`` and ``test_accuracy``."""
        return classification(self, model)
