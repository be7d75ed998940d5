"""A model that is benchmarked: built from a job, it does the trainer's own optimizer step.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from mor.config import ModelConfig
from mor.data.loader import Batch
from mor.model.mor import MoR, MoROutput
from mor.ops.device import autocast, pick_device
from mor.train.config import Recipe, TrainConfig
from mor.train.metrics import RoutingMeter
from mor.train.optim import build_optimizer
from mor.train.trainer import train_step


class Job(NamedTuple):
    """One model and its batch; plain values, so that a child process can be told it."""

    name: str
    model: dict[str, Any]
    """ModelConfig.to_dict() of the row"""
    context: int
    batch_rows: int
    dtype: str
    device: str
    seed: int
    is_peer: bool
    """transformers' Llama of this shape instead of ours"""


class RandomBatches:
    """Rows of random tokens, one document each: a function of seed and sample number."""

    def __init__(self, vocab_size: int, context: int, seed: int) -> None:
        self.vocab_size, self.context, self.seed = vocab_size, context, seed

    def batch(self, first_sample: int, count: int) -> Batch:
        """Return samples first_sample to first_sample + count."""
        seed = (self.seed * 1_000_003 + first_sample) % 2**63
        token_BT = torch.randint(
            self.vocab_size,
            (count, self.context + 1),
            generator=torch.Generator().manual_seed(seed),
        )
        return Batch(token_BT[:, :-1].contiguous(), token_BT[:, 1:].contiguous(), None)


class Contender(ABC):
    """What is timed and measured: a model in training mode, and steps of it."""

    def __init__(self, job: Job) -> None:
        self.name = job.name
        self.recipe = recipe_of(job)
        train = self.recipe.train
        self.device = pick_device(train.device)
        self.dtype: torch.dtype = getattr(torch, train.dtype)
        self.batches = RandomBatches(self.recipe.model.vocab_size, train.context, train.seed)
        torch.manual_seed(train.seed)

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The model, whatever its kind."""

    @abstractmethod
    def step(self, step: int) -> float:
        """Do optimizer step number `step`; returns its loss."""

    @abstractmethod
    def forward(self) -> object:
        """Run the forward pass of step 0; the result keeps the graph alive."""


class OurContender(Contender):
    """A MoR, or its twin, stepped by `mor train`'s own step."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.model = MoR(self.recipe.model).to(self.device).train()
        self.optimizer = build_optimizer(self.model, self.recipe.train)
        self.meter = RoutingMeter(self.model, self.recipe.train.context)

    @property
    def module(self) -> nn.Module:
        return self.model

    def step(self, step: int) -> float:
        losses = train_step(
            self.model,
            self.optimizer,
            self.batches,
            step,
            self.recipe,
            self.device,
            self.dtype,
            self.meter,
        )
        return losses["loss"]

    def forward(self) -> MoROutput:
        batch = self.batches.batch(0, self.recipe.train.batch_rows).to(self.device)
        with autocast(self.device, self.dtype):
            return self.model(batch.input_ids_BT, labels=batch.labels_BT, rule="train")


def recipe_of(job: Job) -> Recipe:
    """Return the recipe that the job's model is trained from."""
    train: Mapping[str, Any] = {"dtype": job.dtype, "device": job.device, "seed": job.seed}
    tokens = job.context * job.batch_rows
    return Recipe(
        model=ModelConfig.from_dict(job.model),
        train=TrainConfig(budget_tokens=tokens, batch_tokens=tokens, context=job.context, **train),
    )


def build_contender(job: Job) -> Contender:
    """Build a job's model with fresh weights, on its device."""
    if not job.is_peer:
        return OurContender(job)
    from mor.bench.peers import LlamaContender

    return LlamaContender(job)
