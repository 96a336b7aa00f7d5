"""Faults in what is fed: inputs, labels, too few items."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.zoo.cases import FIRST, SECOND, fault
from tests.zoo.data import Data
from tests.zoo.training import Training


@fault(
    "overfit_second",
    "overfitting",
    accept=("labels", "input"),
    stream=SECOND,
    items=160,
    epochs=70,
    width=(64, 256, 64),
    lr=0.1,
    lr_scale=(0.1, 1.0),
)
class RandomCode(Training):
    """A stream sees noise that names the item and nothing else: it can only memorise."""

    def read(self) -> Data:
        data = super().read()
        generator = torch.Generator().manual_seed(7 + self.setup.seed)
        for split in (data.train, data.validation):
            split.inputs[1] = 2.0 * torch.randn(split.inputs[1].shape, generator=generator)
        return data


@fault("overfit_both", "overfitting", accept=("labels",), items=120, epochs=80, width=(256,))
class NoisyLabels(Training):
    """Few items, a third of them labelled at random, many epochs."""

    def read(self) -> Data:
        data = super().read()
        generator = torch.Generator().manual_seed(9 + self.setup.seed)
        chosen = torch.randperm(len(data.train), generator=generator)[: int(0.3 * len(data.train))]
        data.train.target[chosen] = torch.randint(10, (len(chosen),), generator=generator)
        return data


@fault("misaligned_first", "labels", accept=("overfitting", "stalled", "imbalance", "input"), stream=FIRST)
class WrongJoin(Training):
    """One stream's items are joined with the wrong rows."""

    def read(self) -> Data:
        data = super().read()
        generator = torch.Generator().manual_seed(11 + self.setup.seed)
        for split in (data.train, data.validation):
            split.inputs[0] = split.inputs[0][torch.randperm(len(split), generator=generator)]
        return data


@fault("labels_shuffled", "labels", "stalled", accept=("overfitting",))
class ShuffledLabels(Training):
    """No label belongs to its item."""

    def read(self) -> Data:
        data = super().read()
        generator = torch.Generator().manual_seed(13 + self.setup.seed)
        data.train.target = data.train.target[torch.randperm(len(data.train), generator=generator)]
        return data


@fault(
    "input_zero_second",
    "input",
    "dead",
    accept=("vanishing", "imbalance", "stalled"),
    stream=SECOND,
    exact=True,
)
class NoInput(Training):
    """A stream is fed zeros: the sensor is off, or the key is wrong."""

    def read(self) -> Data:
        data = super().read()
        for split in (data.train, data.validation):
            split.inputs[1] = torch.zeros_like(split.inputs[1])
        return data


@fault("input_constant_first", "input", accept=("dead", "stalled", "imbalance", "vanishing"), stream=FIRST, exact=True)
class OneFrame(Training):
    """A stream is fed the same item for ever."""

    def read(self) -> Data:
        data = super().read()
        frame = data.train.inputs[0][0].clone()
        for split in (data.train, data.validation):
            split.inputs[0] = frame.expand_as(split.inputs[0]).clone()
        return data


@fault(
    "unnormalised_first",
    "input",
    accept=("exploding", "imbalance", "diverging", "nonfinite", "lr_high", "init", "stalled", "dead"),
    stream=FIRST,
)
class RawInput(Training):
    """A stream is fed bytes, 0 to 255, instead of standardised values."""

    def read(self) -> Data:
        data = super().read()
        for split in (data.train, data.validation):
            x = split.inputs[0]
            split.inputs[0] = 255.0 * (x - x.min()) / (x.max() - x.min())
        return data


@fault("nan_batch", "nonfinite", accept=("exploding", "input", "diverging"), onset=80, exact=True)
class CorruptItem(Training):
    """At step 80 an item that is not a number in any stream reaches every rank."""

    def batch(self, inputs: list[Any], target: Tensor) -> tuple[list[Any], Tensor]:
        if self.step == 80:
            inputs = [x.clone() for x in inputs]
            for x in inputs:
                x[0] = float("nan")
        return inputs, target
