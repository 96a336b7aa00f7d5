"""Faults of one rank among others, and of how ranks work together."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from tests.zoo.cases import CULPRIT, FIRST, SECOND, fault
from tests.zoo.training import Groups, Training

Batch = tuple[list[Any], Tensor]


@fault(
    "rank_nan_first",
    "nonfinite",
    accept=("input", "exploding", "rank_outlier", "diverging"),
    stream=FIRST,
    rank=CULPRIT,
    onset=70,
    exact=True,
)
class RankNan(Training):
    """At step 70 one rank alone reads an item that is not a number, in one stream."""

    def batch(self, inputs: list[Any], target: Tensor) -> Batch:
        if self.rank == CULPRIT and self.step == 70:
            inputs = [inputs[0].clone(), *inputs[1:]]
            inputs[0][0] = float("nan")
        return inputs, target


@fault(
    "rank_scaled_second",
    "rank_outlier",
    accept=("input", "exploding", "shard", "imbalance"),
    stream=SECOND,
    rank=CULPRIT,
)
class RankScaled(Training):
    """One rank's shard of a stream was written without normalisation: 20 times too large."""

    def batch(self, inputs: list[Any], target: Tensor) -> Batch:
        if self.rank == CULPRIT:
            inputs = [inputs[0], 20.0 * inputs[1], *inputs[2:]]
        return inputs, target


@fault("rank_labels", "rank_outlier", accept=("labels", "shard", "desync"), rank=CULPRIT)
class RankLabels(Training):
    """The labels of one rank's shard are shuffled."""

    def batch(self, inputs: list[Any], target: Tensor) -> Batch:
        if self.rank == CULPRIT:
            target = target[torch.randperm(len(target), generator=torch.Generator().manual_seed(self.step))]
        return inputs, target


@fault("rank_zero_shard", "rank_outlier", "input", accept=("shard", "dead"), rank=CULPRIT, onset=40, exact=True)
class RankZeros(Training):
    """From step 40 on one rank reads empty records for every stream."""

    def batch(self, inputs: list[Any], target: Tensor) -> Batch:
        if self.rank == CULPRIT and self.step >= 40:
            inputs = [torch.zeros_like(x) for x in inputs]
        return inputs, target


@fault("desync_no_ddp", "desync", accept=("rank_outlier",), exact=True)
class Unwrapped(Training):
    """The loop calls the model inside of DDP: gradients are never averaged."""

    def forward(self, *inputs: Any) -> Any:
        return self.model(*inputs)


@fault("desync_perturbed_second", "desync", accept=("rank_outlier",), stream=SECOND, rank=CULPRIT, onset=90, exact=True)
class Perturbed(Training):
    """At step 90 the first weights of a stream grow by a fifth on one rank."""

    def after_step(self) -> None:
        if self.rank == CULPRIT and self.step == 90:
            with torch.no_grad():
                next(self.encoder_of(1).parameters()).mul_(1.2)


@fault("desync_clipping", "desync", accept=("config", "rank_outlier"), rank=0, exact=True)
class ClipsAlone(Training):
    """Only rank 0 clips."""

    def before_step(self) -> None:
        if self.rank == 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)


@fault("same_data", "sampler", accept=("shard",), exact=True)
class SameData(Training):
    """The sampler was built without the rank: every rank sees the same batches."""

    def make_sampler(self) -> DistributedSampler[Any]:
        return DistributedSampler(self.data.train, 1, 0, seed=self.setup.seed)  # type: ignore[arg-type]


@fault("no_set_epoch", "sampler", onset=19, exact=True)
class SameOrder(Training):
    """Nobody calls set_epoch: every epoch has the order of the first."""

    def set_epoch(self) -> None:
        pass


@fault("uneven_shard", "shard", accept=("rank_outlier", "sampler", "straggler"), rank=CULPRIT, exact=True)
class UnevenShard(Training):
    """One rank gets six items a step and the others about twice their share; DDP weighs all ranks alike."""

    def batch(self, inputs: list[Any], target: Tensor) -> Batch:
        if self.rank == CULPRIT:
            return [x[:6] for x in inputs], target[:6]
        generator = torch.Generator().manual_seed(self.step)
        more = self.data.train.batch(torch.randint(len(self.data.train), (26,), generator=generator))
        both = [torch.cat(pair) for pair in zip([*inputs, target], more, strict=True)]
        return both[:-1], both[-1]


@fault(
    "rank_rate_first",
    "desync",
    accept=("lr_high", "config", "rank_outlier"),
    stream=FIRST,
    rank=CULPRIT,
    exact=True,
)
class RankRate(Training):
    """One rank has ten times the learning rate of the others for a stream."""

    def groups(self) -> Groups:
        groups = super().groups()
        for group in groups:
            if self.rank == CULPRIT and group["name"] == self.names[0]:
                group["lr"] *= 10.0
        return groups


@fault("rank_eval_mode", "config", accept=("rank_outlier", "desync"), rank=CULPRIT, onset=19, exact=True, dropout=0.3)
class RankInEval(Training):
    """One rank stays in eval mode after the first validation."""

    def set_mode(self) -> None:
        if self.rank != CULPRIT or self.epoch == 0:
            self.ddp.train()


@fault("straggler", "straggler", accept=("shard",), rank=CULPRIT)
class Straggler(Training):
    """One rank needs 25 ms more for each batch."""

    def batch(self, inputs: list[Any], target: Tensor) -> Batch:
        if self.rank == CULPRIT:
            time.sleep(0.025)
        return inputs, target
