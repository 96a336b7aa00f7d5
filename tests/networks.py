"""Small networks and batches that the tests of the monitor share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

STREAMS = {"rgb": "rgb", "depth": "depth"}


class TwoStreams(nn.Module):
    """rgb (9,696 elements) and depth (3,200), a fusion layer, and a layer that no forward uses."""

    def __init__(self, *, norm: bool = False, unused: bool = False) -> None:
        super().__init__()
        norms = [nn.BatchNorm1d(96) if norm else nn.Identity() for _ in range(2)]
        self.rgb = nn.Sequential(nn.Linear(4, 96), norms[0], nn.ReLU(), nn.Linear(96, 95))
        self.depth = nn.Sequential(nn.Linear(3, 96), norms[1], nn.ReLU(), nn.Dropout(0.2 if norm else 0.0))
        self.mix = nn.Linear(95 + 96, 3)
        if unused:
            self.unused = nn.Linear(7, 7)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        features: Tensor = torch.cat([self.rgb(rgb), self.depth(depth)], dim=1)
        logits: Tensor = self.mix(features)
        return logits


def network(seed: int = 0, **options: bool) -> TwoStreams:
    """The same weights on every rank."""
    torch.manual_seed(seed)
    return TwoStreams(**options)


def batch(items: int = 24, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(rgb, depth, target), the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    rgb, depth = torch.randn(items, 4, generator=generator), torch.randn(items, 3, generator=generator)
    return rgb, depth, torch.randint(3, (items,), generator=generator)


def part(tensors: tuple[Tensor, ...], rank: int, world: int) -> tuple[Tensor, ...]:
    """A rank's stride of a batch."""
    return tuple(tensor[rank::world] for tensor in tensors)


def loss_of(model: nn.Module, tensors: tuple[Tensor, ...]) -> Tensor:
    """The mean cross entropy of a batch."""
    *inputs, target = tensors
    return functional.cross_entropy(model(*(x.to(next(model.parameters()).dtype) for x in inputs)), target)
