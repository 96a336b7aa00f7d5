"""Faults in the training loop and in the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.zoo.cases import fault
from tests.zoo.training import Training


@fault(
    "missing_zero_grad",
    "config",
    accept=("exploding", "diverging", "lr_high", "nonfinite", "stalled"),
    exact=True,
    momentum=0.0,
)
class GradientsPileUp(Training):
    """Nobody calls zero_grad."""

    def zero_grad(self) -> None:
        pass


@fault("double_softmax", "labels", "config", "stalled", accept=("lr_low", "vanishing"))
class DoubleSoftmax(Training):
    """The loss gets probabilities where it expects logits, twice over."""

    def loss(self, outputs: Any, target: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.softmax(1).softmax(1), target)


@fault("wrong_sign", "labels", "config", "diverging", accept=("exploding", "lr_high", "nonfinite", "stalled"), lr=0.05)
class WrongSign(Training):
    """The loss of three of ten classes has the wrong sign."""

    def loss(self, outputs: Any, target: Tensor) -> Tensor:
        items = functional.cross_entropy(outputs, target, reduction="none")
        return torch.where(target < 3, -0.5 * items, items).mean()


@fault("bn_eval", "config", accept=("exploding", "stalled", "diverging"), onset=19, exact=True, encoder="conv_bn")
class LeftInEval(Training):
    """Nobody calls train() after the first validation: BatchNorm uses its running figures from then on."""

    def set_mode(self) -> None:
        if self.epoch == 0:
            self.ddp.train()
