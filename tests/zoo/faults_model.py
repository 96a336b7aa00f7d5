"""Faults in the network: initial values, activations, what is connected to what."""

from __future__ import annotations

import torch
from torch import nn

from ddp_streammon.train.models import MultiStreamModel
from tests.zoo.cases import FIRST, SECOND, fault
from tests.zoo.training import Training


def scale_(module: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)


@fault(
    "vanish_first",
    "vanishing",
    accept=("dead", "imbalance", "lr_low", "init", "stalled"),
    stream=FIRST,
    activation=("sigmoid", "relu"),
    depth=(7, 2),
)
class SigmoidStack(Training):
    """Seven sigmoid layers: hardly any gradient reaches the first."""


@fault(
    "init_large_second",
    "init",
    "exploding",
    accept=("imbalance", "lr_high", "diverging", "nonfinite", "stalled"),
    stream=SECOND,
)
class LargeInit(Training):
    """Weights start six times too large."""

    def network(self) -> MultiStreamModel:
        model = super().network()
        scale_(model.encoders[self.names[1]], 6.0)
        return model


@fault(
    "init_tiny_first",
    "init",
    "vanishing",
    accept=("dead", "imbalance", "stalled", "lr_low"),
    stream=FIRST,
    depth=(4, 2),
)
class TinyInit(Training):
    """Weights start a thousand times too small."""

    def network(self) -> MultiStreamModel:
        model = super().network()
        scale_(model.encoders[self.names[0]], 1e-3)
        return model


@fault("dead_second", "dead", accept=("vanishing", "imbalance", "frozen", "stalled"), stream=SECOND, exact=True)
class DeadUnits(Training):
    """Biases of -30 put every ReLU of a stream on its flat side."""

    def network(self) -> MultiStreamModel:
        model = super().network()
        with torch.no_grad():
            for name, parameter in model.encoders[self.names[1]].named_parameters():
                if name.endswith("bias"):
                    parameter.fill_(-30.0)
        return model


@fault("frozen_first", "frozen", accept=("dead", "vanishing", "stalled"), stream=FIRST, exact=True)
class LeftFrozen(Training):
    """requires_grad=False is left over from another experiment; the configuration gives the stream a learning rate."""

    def network(self) -> MultiStreamModel:
        model = super().network()
        model.encoders[self.names[0]].requires_grad_(False)
        return model


@fault("detached_second", "dead", "frozen", accept=("vanishing", "imbalance", "stalled"), stream=SECOND, exact=True)
class Detached(Training):
    """A stream's features are detached from the graph."""

    find_unused = True

    def network(self) -> MultiStreamModel:
        model = super().network()
        model.encoders[self.names[1]].register_forward_hook(lambda module, inputs, output: output.detach())
        return model


@fault("imbalance_first", "imbalance", accept=("lr_high", "exploding"), stream=FIRST)
class LoudFeatures(Training):
    """Features of one stream are eight times larger, and so is its share of the gradient."""

    def network(self) -> MultiStreamModel:
        model = super().network()
        model.encoders[self.names[0]].register_forward_hook(lambda module, inputs, output: 8.0 * output)
        return model


@fault(
    "fusion_zero_first",
    "dead",
    accept=("vanishing", "imbalance", "stalled", "frozen"),
    stream=FIRST,
    exact=True,
    fusion="weighted",
)
class FusedOut(Training):
    """The fusion gives a stream the weight zero and never learns it."""

    def network(self) -> MultiStreamModel:
        model = super().network()
        logits = model.fusion.logits
        assert isinstance(logits, nn.Parameter)
        with torch.no_grad():
            logits[0] = -1e4
        logits.requires_grad_(False)
        return model
