"""What a measurement's packet holds, and a measurement whose sum is under way."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddp_streammon import linear, stats
from ddp_streammon.collective import Reduction
from ddp_streammon.linear import Linear
from ddp_streammon.moments import ABS_MAX
from ddp_streammon.packet import Layout
from ddp_streammon.shards import Family
from ddp_streammon.stats import LINEAR, MAXIMA, MOMENTS, SHOWN, STATE, Figures, StepStats


@dataclass(frozen=True)
class Plan:
    """What a measurement's packet holds; fixed, so worked out once."""

    streams: tuple[str, ...]
    scalars: Mapping[str, bool]
    """The user's numbers, and whether each is added up."""
    tensors: tuple[Linear, ...]
    """Gradients that are squared after the sum."""
    families: tuple[Family, ...]
    """Those whose checksums the packet of an audit holds."""
    layout: Layout
    audit_layout: Layout
    names: tuple[str, ...]
    """The keys of its figures."""
    of_step: bool
    """Whether it is a step's; one beside the steps leaves what waits for the next step's packet alone."""

    @classmethod
    def of(
        cls,
        streams: tuple[str, ...],
        scalars: Mapping[str, bool],
        tensors: tuple[Linear, ...],
        families: tuple[Family, ...],
        world_size: int,
        *,
        updates: bool,
        local: bool,
        of_step: bool,
        evidence: bool = False,
    ) -> Plan:
        """The plan for these streams, numbers and tensors."""
        cells = linear.cell_count(tensors)
        parameters = sum(family.size for family in families)
        made = functools.partial(
            stats.step_layout,
            *(streams, tuple(scalars), world_size),
            linear=cells,
            updates=updates and of_step,
            local=local and of_step,
            of_step=of_step,
            evidence=evidence,
        )
        names = stats.step_keys(streams, scalars)
        audit = made(families=len(families), parameters=parameters)
        return cls(streams, scalars, tensors, families, made(), audit, names, of_step)


@dataclass
class Measurement:
    """A measured step whose sum over ranks is under way."""

    call: int
    plan: Plan
    reduction: Reduction
    world_size: int
    turn: int
    audit: bool
    """Whether the packet compares replicas."""
    shadow: bool
    """Whether this rank had nothing to measure, and only took part."""
    updates: bool
    """Whether the packet holds figures of an update."""
    result: StepStats | None = None
    asks: bool = False
    """Once it is read: whether a rank had gradients that no audit had compared."""
    shown: tuple[float, ...] = ()
    """Once an audit is read: the sums of `proof.shown_cells`."""

    @property
    def layout(self) -> Layout:
        """Of its packet."""
        return self.plan.audit_layout if self.audit else self.plan.layout

    def read(self) -> StepStats:
        """The step's figures; waits for the collective the first time."""
        if self.result is None:
            sums = self.layout.unpack(self.reduction.wait(), self.turn)
            if self.plan.tensors:
                _add_linear(sums, linear.moments(self.plan.tensors, sums[LINEAR], len(self.plan.streams)))
            heard = self.layout.heard(self.turn)
            compared = self.plan.families if self.audit else ()
            self.asks = sums[STATE][-1] > 0
            self.shown = tuple(sums.get(SHOWN, ()))
            self.result = stats.step_stats(
                sums, self.plan.streams, self.plan.scalars, self.call, heard, self.world_size, compared
            )
        return self.result

    def moments(self) -> Tensor:
        """The streams' additive figures over all ranks, [S, M] without the abs-max, where the packet lies.

        Sync: none on CUDA with NCCL; waits for the collective on CPU.
        """
        packet = self.reduction.summed()
        table = self.layout.view(packet, MOMENTS)
        if self.plan.tensors:
            cells = self.layout.view(packet, LINEAR)
            table = table + linear.moments(self.plan.tensors, cells, len(self.plan.streams))[:, :ABS_MAX]
        return table

    def figures(self) -> Figures:
        """The same under their keys; waits when read."""
        names = stats.update_keys(self.plan.streams) if self.updates else ()
        return Figures((*self.plan.names, *names), lambda: dict.fromkeys(names, math.nan) | self.read().values())


def _add_linear(sums: dict[str, Any], table: Tensor) -> None:
    """Add the figures of tensors that were squared after the sum to the fields of a packet."""
    sums[MOMENTS] = (torch.tensor(sums[MOMENTS], dtype=torch.float64, device="cpu") + table[:, :ABS_MAX]).tolist()
    largest = table[:, ABS_MAX].tolist()
    sums[MAXIMA] = [[max(*ranks, own)] for ranks, own in zip(sums[MAXIMA], largest, strict=True)]
