"""How far an epoch has come, on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddp_streammon import keys


@dataclass
class Sums:
    """This rank's training items of an epoch, added up on the device."""

    loss: Tensor
    correct: Tensor
    items: int = 0

    @classmethod
    def none(cls, device: torch.device) -> Sums:
        """Of no item."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return cls(zero, zero.clone())

    def add(self, loss: Tensor, correct: Tensor, items: int) -> None:
        self.loss += loss.detach() * items
        self.correct += correct
        self.items += items

    def means(self) -> dict[str, tuple[float, float]]:
        """Loss and accuracy as (sum, weight). Sync: waits for them."""
        items = max(self.items, 1)
        return {keys.TRAIN_LOSS: (self.loss.item(), items), keys.TRAIN_ACC: (self.correct.item(), items)}


@dataclass
class Begun:
    """An epoch that is under way, on this rank."""

    batches: int
    """Micro-batches that are done."""
    sums: Sums
    """Of them."""
    rng: dict[str, Any]
    """The random states after them."""
