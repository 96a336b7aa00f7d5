"""Small encoders under the project's own multi-stream classifier."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.zoo.data import CLASSES, Split

FEATURES = 64
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
}


def encoder(
    kind: str, shape: Sequence[int], *, width: int = 64, depth: int = 2, activation: str = "relu", dropout: float = 0.0
) -> nn.Sequential:
    """`mlp` of `depth` linear layers, or `conv` / `conv_bn` (two convolutions and a linear layer) for images; vectors
    always get an MLP. Gives [B, FEATURES]."""
    act = ACTIVATIONS[activation]
    layers: list[nn.Module] = []
    if kind == "mlp" or len(shape) == 1:
        layers.append(nn.Flatten())
        sizes = [math.prod(shape), *[width] * (depth - 1), FEATURES]
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), act(), *([nn.Dropout(dropout)] if dropout else [])]
        return nn.Sequential(*layers)
    channels, rows, columns = shape
    for outputs, stride in ((8, 1), (16, 2)):
        norm = [nn.BatchNorm2d(outputs)] if kind == "conv_bn" else []
        layers += [nn.Conv2d(channels, outputs, 3, stride, padding=1), *norm, act()]
        channels = outputs
    pooled = channels * ((rows + 1) // 2) * ((columns + 1) // 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(pooled, FEATURES), act())


class Checkpointed(nn.Module):
    """A module whose activations are computed again in the backward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = checkpoint(self.module, x, use_reentrant=False)
        return features


class LowRank(nn.Module):
    """A frozen linear layer and a trained update of rank 4 that starts at zero."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, 4, bias=False)
        self.up = nn.Linear(4, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


def pretrain(module: nn.Module, split: Split, stream: int, steps: int = 150) -> nn.Module:
    """The encoder after a training on its own, the same on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = nn.Linear(FEATURES, CLASSES)
        optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], 1e-3)
        for _ in range(steps):
            index = torch.randint(len(split), (64,))
            loss = functional.cross_entropy(head(module(split.inputs[stream][index])), split.target[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    return module
