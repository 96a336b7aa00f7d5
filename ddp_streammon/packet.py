"""The layout of the one vector that carries everything of a monitored step across ranks: a frozen value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Field:
    """A named block of cells.

    A plain field adds up over ranks. A `per_rank` field has a slot for each rank: a rank writes its own and leaves
    the others zero, so that the sum gathers them exactly (NaN, Inf and subnormal numbers stay in their cells).
    """

    name: str
    shape: tuple[int, ...] = ()
    per_rank: bool = False


@dataclass(frozen=True)
class Layout:
    """Which cell means what; both directions read it.

    Plain fields come first, then the slots of rank 0, of rank 1 and so on: what a rank writes is two runs of cells.
    """

    fields: tuple[Field, ...]
    world_size: int = 1

    @property
    def plain(self) -> tuple[Field, ...]:
        """The fields that add up over ranks."""
        return tuple(field for field in self.fields if not field.per_rank)

    @property
    def slots(self) -> tuple[Field, ...]:
        """The fields of which each rank has its own."""
        return tuple(field for field in self.fields if field.per_rank)

    @property
    def size(self) -> int:
        """Cells (float64) of the vector."""
        return _cells(self.plain) + self.world_size * _cells(self.slots)

    def zeros(self, device: torch.device | None = None) -> Tensor:
        """The packet of a rank that has nothing to say. Shape: [K] float64."""
        return torch.zeros(self.size, dtype=torch.float64, device=device)

    def pack(self, values: Mapping[str, Tensor], rank: int, device: torch.device | None = None) -> Tensor:
        """This rank's packet.

        Shape: values of each field's own shape in, [K] float64 out. Comm: none. Sync: none, unless values lie on
        another device than a packet on the host.
        """
        shared, slot = _cells(self.plain), _cells(self.slots)
        start = shared + rank * slot
        if device is None or device.type == "cpu":  # one operation, where copying field by field takes a dozen
            packet = [0.0] * self.size
            packet[:shared] = (cell for field in self.plain for cell in values[field.name].reshape(-1).tolist())
            packet[start : start + slot] = (
                cell for field in self.slots for cell in values[field.name].reshape(-1).tolist()
            )
            return torch.tensor(packet, dtype=torch.float64)
        cells = self.zeros(device)
        for first, fields in ((0, self.plain), (start, self.slots)):
            runs = [values[field.name].to(device, torch.float64, non_blocking=True).reshape(-1) for field in fields]
            if runs:
                run = torch.cat(runs)
                cells[first : first + len(run)] = run
        return cells

    def unpack(self, packet: Tensor) -> dict[str, Any]:
        """The fields of a packet as floats in nested lists of their shapes; slots have ranks as a last dimension.

        Sync: waits for a packet that is not on the host.
        """
        cells = packet.tolist()
        shared, slot = _cells(self.plain), _cells(self.slots)
        fields: dict[str, Any] = {}
        start = 0
        for field in self.plain:
            stop = start + math.prod(field.shape)
            fields[field.name] = _shaped(cells[start:stop], field.shape)
            start = stop
        start = shared
        for field in self.slots:
            stop = start + math.prod(field.shape)
            fields[field.name] = _shaped([cells[cell::slot] for cell in range(start, stop)], field.shape)
            start = stop
        return fields


def _shaped(items: list[Any], shape: tuple[int, ...]) -> Any:
    """A flat list as nested lists of `shape`; the only item where the shape is ()."""
    if not shape:
        return items[0]
    if len(shape) == 1:
        return items
    step = math.prod(shape[1:])
    return [_shaped(items[row * step : (row + 1) * step], shape[1:]) for row in range(shape[0])]


def _cells(fields: Sequence[Field]) -> int:
    return sum(math.prod(field.shape) for field in fields)
