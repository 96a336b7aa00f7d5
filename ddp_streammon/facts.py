"""What a rank reads off its own optimizers, modes and clock for a step's packet; all of it host numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddp_streammon.rank_facts import RankFacts
from ddp_streammon.ranks import Clock
from ddp_streammon.streams import StreamSet

MODED = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
"""Modules that do something else in eval mode."""


class Facts:
    """A rank's `RankFacts` of the moment. Comm, Sync: none."""

    def __init__(
        self, rank: int, streams: StreamSet, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self.clock = Clock(model)
        self._rank = rank
        self._models = (model, streams.model)
        self._optimizers = optimizers
        self._groups = _groups_of(streams, optimizers)
        self._moded = [module for module in model.modules() if isinstance(module, MODED)]

    def now(self, samples: float | Tensor | None) -> RankFacts:
        """The facts of this step, of so many samples; starts the clock anew."""
        step, busy = self.clock.take()
        settings = self._settings()
        return RankFacts(
            rank=self._rank,
            lr=tuple(_on_host(group.get("lr")) for group in settings),
            weight_decay=tuple(_on_host(group.get("weight_decay")) for group in settings),
            training=float(all(model.training for model in self._models)),
            samples=_on_host(samples),
            step_seconds=step,
            busy_seconds=busy,
        )

    def base_rates(self) -> list[float]:
        """For each stream the learning rate that a scheduler started from."""
        return [_on_host(group.get("initial_lr", group.get("lr"))) for group in self._settings()]

    def share_in_eval(self) -> float:
        """Of the modules that do something else in eval mode, how many are in it; nan without such modules."""
        return sum(not module.training for module in self._moded) / len(self._moded) if self._moded else math.nan

    def _settings(self) -> list[Mapping[str, Any]]:
        """Each stream's parameter group; empty where it has none."""
        return [self._optimizers[place[0]].param_groups[place[1]] if place else {} for place in self._groups]


def _groups_of(streams: StreamSet, optimizers: Sequence[torch.optim.Optimizer]) -> list[tuple[int, int] | None]:
    """For each stream the place (optimizer, group) of the first parameter group that holds any of its tensors."""
    places: dict[int, tuple[int, int]] = {}
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                places.setdefault(id(parameter), (i, j))
    found = [[places[id(p.parameter)] for p in s.parameters if id(p.parameter) in places] for s in streams.streams]
    return [min(of_stream, default=None) for of_stream in found]


def _on_host(value: float | Tensor | None) -> float:
    """A number; nan where it is not known without waiting for a device."""
    if value is None or (isinstance(value, Tensor) and value.device.type != "cpu"):
        return math.nan
    return float(value)
