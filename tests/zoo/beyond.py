"""Faults and legal set-ups beyond the catalogue, to see how rules do on what they were not written for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DistributedSampler

from ddp_streammon.train.models import MultiStreamModel
from tests.zoo.cases import CULPRIT, FIRST, SECOND, control, fault
from tests.zoo.data import Data
from tests.zoo.models import FEATURES
from tests.zoo.training import HEAD, Groups, Training

Batch = tuple[list[Any], Tensor]


@fault("x_input_sticks_second", "input", accept=("dead", "stalled"), stream=SECOND, onset=100, exact=True, extra=True)
class InputSticks(Training):
    """From step 100 on a sensor repeats its last frame."""

    def batch(self, inputs: list[Any], target: Tensor) -> Batch:
        if self.step == 100:
            self.frame = inputs[1][:1].clone()
        if self.step >= 100:
            inputs = [inputs[0], self.frame.expand_as(inputs[1]).clone(), *inputs[2:]]
        return inputs, target


@fault("x_gain_first", "input", accept=("exploding", "imbalance", "diverging"), stream=FIRST, onset=100, extra=True)
class GainJumps(Training):
    """From step 100 on a sensor's values are 50 times larger."""

    def batch(self, inputs: list[Any], target: Tensor) -> Batch:
        return ([50 * inputs[0], *inputs[1:]] if self.step >= 100 else inputs), target


@fault(
    "x_rank_sticks_first",
    "input",
    "rank_outlier",
    accept=("dead", "shard"),
    stream=FIRST,
    rank=CULPRIT,
    onset=60,
    exact=True,
    extra=True,
)
class RankSticks(Training):
    """From step 60 on one rank reads the same item of a stream again and again."""

    def batch(self, inputs: list[Any], target: Tensor) -> Batch:
        if self.rank == CULPRIT and self.step >= 60:
            inputs = [self.data.train.inputs[0][:1].expand_as(inputs[0]).clone(), *inputs[1:]]
        return inputs, target


@fault("x_rank_decay_second", "desync", accept=("config",), stream=SECOND, rank=CULPRIT, exact=True, extra=True)
class RankDecay(Training):
    """One rank has another weight decay for a stream."""

    def groups(self) -> Groups:
        groups = super().groups()
        for group in groups:
            if self.rank == CULPRIT and group["name"] == self.names[1]:
                group["weight_decay"] = 0.1
        return groups


@fault(
    "x_rate_first",
    "lr_high",
    accept=("exploding", "diverging", "imbalance", "dead"),
    stream=FIRST,
    exact=True,
    extra=True,
)
class RateContradicts(Training):
    """A stream's parameter group has not the declared learning rate, but 20 times that."""

    def groups(self) -> Groups:
        first, *others = super().groups()
        return [{**first, "lr": 20 * first["lr"]}, *others]


@fault("x_head_perturbed", "desync", accept=("rank_outlier",), rank=CULPRIT, onset=90, exact=True, extra=True)
class HeadPerturbed(Training):
    """At step 90 one element of the head flips its sign on one rank."""

    def after_step(self) -> None:
        if self.rank == CULPRIT and self.step == 90:
            with torch.no_grad():
                self.model.fc.weight[0, 0].neg_()


@fault("x_no_sync", "desync", accept=("rank_outlier",), exact=True, extra=True)
class NeverSynchronised(Training):
    """no_sync() is left on for every step."""

    def backward(self, inputs: list[Any], target: Tensor) -> float:
        with self.ddp.no_sync():
            return super().backward(inputs, target)


@fault(
    "x_stream_stops_second", "lr_schedule", "frozen", accept=("lr_low", "stalled"), stream=SECOND, onset=100, extra=True
)
class RateGone(Training):
    """From step 100 on a scheduler gives one stream a learning rate of zero."""

    def rate(self, group: Mapping[str, Any]) -> float:
        return float(group["name"] != self.names[1] or self.step < 100)


@fault("x_head_not_in_optimizer", "frozen", accept=("stalled", "lr_low"), exact=True, extra=True)
class HeadLeftOut(Training):
    """The optimizer was built without the head."""

    def groups(self) -> Groups:
        return [group for group in super().groups() if group["name"] != HEAD]


@fault(
    "x_dies_first", "dead", accept=("vanishing", "frozen", "imbalance"), stream=FIRST, onset=110, exact=True, extra=True
)
class Dies(Training):
    """After step 110 no unit of a stream is active any more."""

    def after_step(self) -> None:
        if self.step == 110:
            with torch.no_grad():
                for name, parameter in self.encoder_of(0).named_parameters():
                    if name.endswith("bias"):
                        parameter.fill_(-100.0)


@fault(
    "x_lr_high_all", "lr_high", accept=("diverging", "exploding", "nonfinite", "stalled", "dead"), lr=3.0, extra=True
)
class HighRates(Training):
    """Every learning rate is 60 times too high."""


@fault("x_loss_scaled", "lr_low", "stalled", accept=("config", "vanishing"), extra=True)
class SmallLoss(Training):
    """The loss is divided by the number of items once too often."""

    def loss(self, outputs: Any, target: Tensor) -> Tensor:
        return super().loss(outputs, target) / 1200


@control("e_modality_dropout", legal=True, extra=True)
class ModalityDropout(Training):
    """Streams' features are left out at random."""

    def network(self) -> MultiStreamModel:
        encoders = {name: self.encoder(place) for place, name in enumerate(self.data.streams)}
        return MultiStreamModel(encoders, FEATURES, self.outputs(), modality_dropout=0.3)

    def declared(self) -> dict[str, Any]:
        return {**super().declared(), "modality_dropout": 0.3}


@control("e_mixup", legal=True, extra=True)
class Mixup(Training):
    """Items and their labels are mixed in pairs."""

    def batch(self, inputs: list[Any], target: Tensor) -> Batch:
        generator = torch.Generator().manual_seed(7919 * self.rank + self.step)
        self.share = float(torch.rand(1, generator=generator))
        self.other = torch.randperm(len(target), generator=generator)
        return [self.share * x + (1 - self.share) * x[self.other] for x in inputs], target

    def loss(self, outputs: Any, target: Tensor) -> Tensor:
        losses = [functional.cross_entropy(outputs, wanted) for wanted in (target, target[self.other])]
        return self.share * losses[0] + (1 - self.share) * losses[1]

    def declared(self) -> dict[str, Any]:
        return {**super().declared(), "mixup": True}


@control("e_one_cycle", legal=True, extra=True, lr=0.1)
class OneCycle(Training):
    """The rate climbs from a 25th to its peak at 30 % of the run and falls to a 10,000th."""

    def rate(self, group: Mapping[str, Any]) -> float:
        done = self.step / self.total
        return 0.04 + 0.96 * done / 0.3 if done < 0.3 else max(1e-4, 1 - (done - 0.3) / 0.7)


@control("e_steps", legal=True, extra=True)
class RateInSteps(Training):
    """The rate falls to a tenth at half of the run and to a hundredth at three quarters."""

    def rate(self, group: Mapping[str, Any]) -> float:
        return 0.1 ** ((self.step >= self.total / 2) + (self.step >= 3 * self.total / 4))

    def declared(self) -> dict[str, Any]:
        return {**super().declared(), "schedule": "step"}


@control("e_frozen_from", legal=True, extra=True)
class FrozenFrom(Training):
    """A stream is frozen from step 120 on, as declared."""

    def rate(self, group: Mapping[str, Any]) -> float:
        return float(group["name"] != self.names[0] or self.step < 120)

    def declared(self) -> dict[str, Any]:
        return {**super().declared(), "frozen_from": {self.names[0]: 120}}


@control("e_rare_stream", legal=True, extra=True)
class RareStream(Training):
    """Most batches are without the second stream, which is declared as auxiliary."""

    def batch(self, inputs: list[Any], target: Tensor) -> Batch:
        rare = self.step % 8 == 0
        return (inputs if rare else [inputs[0], torch.zeros_like(inputs[1]), *inputs[2:]]), target

    def declared(self) -> dict[str, Any]:
        return {**super().declared(), "auxiliary_streams": [self.names[1]]}


@control("e_imbalanced", legal=True, extra=True)
class Imbalanced(Training):
    """Two of ten classes make up most of the items."""

    def read(self) -> Data:
        data = super().read()
        kept = (data.train.target < 2) | (torch.arange(len(data.train)) % 8 == 0)
        index = kept.nonzero().flatten().repeat(3)
        *data.train.inputs, data.train.target = data.train.batch(index)
        return data


@control("e_growing_batch", legal=True, extra=True)
class GrowingBatch(Training):
    """Batches grow from an eighth to the whole over the run."""

    def batch(self, inputs: list[Any], target: Tensor) -> Batch:
        count = max(4, round(len(target) * (1 + 7 * self.step / self.total) / 8))
        return [x[:count] for x in inputs], target[:count]


@control("e_large_loss", legal=True, extra=True, optimizer="adam", lr=1e-3)
class LargeLoss(Training):
    """The loss is in other units: a thousand times larger, which Adam does not mind."""

    def loss(self, outputs: Any, target: Tensor) -> Tensor:
        return 1000 * super().loss(outputs, target)


@control("e_auxiliary_heads", legal=True, extra=True)
class AuxiliaryHeads(Training):
    """Each stream has a loss of its own beside the common one."""

    def network(self) -> MultiStreamModel:
        model = super().network()
        model.heads = nn.ModuleList(nn.Linear(FEATURES, self.outputs()) for _ in self.data.streams)
        for name, head in zip(self.data.streams, model.heads, strict=True):
            model.encoders[name].register_forward_hook(lambda module, x, out, head=head: self.own.append(head(out)))
        return model

    def groups(self) -> Groups:
        *streams, head = super().groups()
        return [*streams, {**head, "params": [*head["params"], *self.model.get_submodule("heads").parameters()]}]

    def forward(self, *inputs: Any) -> Any:
        self.own: list[Tensor] = []
        return super().forward(*inputs)

    def loss(self, outputs: Any, target: Tensor) -> Tensor:
        return super().loss(outputs, target) + 0.3 * sum(super(AuxiliaryHeads, self).loss(z, target) for z in self.own)


@control("e_rank0_saves", legal=True, extra=True)
class RankZeroSaves(Training):
    """Rank 0 writes a checkpoint every 19 steps, which takes 60 ms."""

    def after_step(self) -> None:
        if self.rank == 0 and self.step % 19 == 18:
            time.sleep(0.06)


@control("e_with_replacement", legal=True, extra=True)
class WithReplacement(Training):
    """Items are drawn with replacement, by each rank for itself."""

    def make_sampler(self) -> DistributedSampler[Any]:
        sampler = super().make_sampler()
        count, whole = len(sampler), len(self.data.train)

        class Drawn(DistributedSampler[Any]):
            def __iter__(self) -> Any:
                generator = torch.Generator().manual_seed(1000 * self.epoch + self.rank)
                return iter(torch.randint(whole, (count,), generator=generator).tolist())

        return Drawn(self.data.train, self.world, self.rank)  # type: ignore[arg-type]


@control("e_noisy_labels", legal=True, extra=True, epochs=8)
class SomeNoise(Training):
    """One in twenty labels is wrong."""

    def read(self) -> Data:
        data = super().read()
        wrong = torch.arange(len(data.train)) % 20 == 0
        data.train.target = torch.where(wrong, (data.train.target + 3) % 10, data.train.target)
        return data
