"""Faults in learning rates, weight decays, schedules, clipping, and in what the optimizer is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.zoo.cases import BOTH, FIRST, SECOND, fault
from tests.zoo.training import Groups, Training


@fault("not_in_optimizer_second", "frozen", accept=("stalled", "lr_low"), stream=SECOND, exact=True)
class LeftOut(Training):
    """The optimizer was built without a stream's parameters; their gradients pile up."""

    def groups(self) -> Groups:
        return [group for group in super().groups() if group["name"] != self.names[1]]


@fault(
    "lr_high_first",
    "lr_high",
    accept=("exploding", "diverging", "imbalance", "nonfinite", "stalled", "dead"),
    stream=FIRST,
    lr_scale=(40.0, 1.0),
)
class HighRate(Training):
    """A stream's learning rate is 40 times too high."""


@fault("lr_low_second", "lr_low", accept=("stalled", "frozen", "imbalance"), stream=SECOND, lr_scale=(1.0, 2e-6, 1.0))
class LowRate(Training):
    """A stream's learning rate is 1e-7."""


@fault("lr_low_all", "lr_low", "stalled", lr=5e-6)
class LowRates(Training):
    """The guide's Scenario 3: gradients are balanced, and nothing is learned."""


@fault("lr_collapse", "lr_schedule", accept=("lr_low", "stalled", "frozen"), onset=34)
class ShortSchedule(Training):
    """The schedule was told too few steps: the rate is zero from 15 % of the run on."""

    def rate(self, group: Mapping[str, Any]) -> float:
        return max(0.0, 1 - self.step / (0.15 * self.total))


@fault("lr_bump", "lr_schedule", "lr_high", accept=("diverging", "exploding", "nonfinite"), onset=120)
class Bump(Training):
    """A hundred times the learning rate from step 120 on."""

    def rate(self, group: Mapping[str, Any]) -> float:
        return 100.0 if self.step >= 120 else 1.0


@fault(
    "decay_huge_second",
    "config",
    "stalled",
    accept=("vanishing", "dead", "imbalance", "lr_low", "diverging"),
    stream=SECOND,
    weight_decay=(1e-4, 1.0, 1e-4),
)
class HugeDecay(Training):
    """A weight decay of 1.0 takes a stream's weights to zero."""


@fault(
    "diverging_second",
    "diverging",
    accept=("exploding", "lr_high", "imbalance", "nonfinite"),
    stream=SECOND,
)
class GrowingWeights(Training):
    """The decay of a home-made optimizer has the wrong sign: weights grow by 4 % a step."""

    def after_step(self) -> None:
        with torch.no_grad():
            for parameter in self.encoder_of(1).parameters():
                parameter.mul_(1.04)


@fault(
    "dominating_first",
    "imbalance",
    accept=("lr_high", "lr_low", "stalled", "diverging", "vanishing"),
    stream=BOTH,
    lr_scale=(6.0, 1e-3, 1.0),
    weight_decay=(0.0, 1e-4),
)
class Dominating(Training):
    """The guide's Scenario 4: one stream learns fast and without decay, the other not at all."""


@fault("clip_tiny", "config", "lr_low", accept=("stalled", "vanishing"), clip=1e-4, momentum=0.0)
class TinyClip(Training):
    """Every gradient is clipped to a thousandth of its length and below."""
