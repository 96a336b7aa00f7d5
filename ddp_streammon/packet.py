"""The layout of the one vector that carries everything of a monitored step across ranks: a frozen value."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

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
    """Which cell means what; both directions read it. Equal layouts have equal digests."""

    fields: tuple[Field, ...]
    world_size: int = 1

    def shape(self, field: Field) -> tuple[int, ...]:
        """The shape of a field in the vector: slots add a last dimension of `world_size`."""
        return (*field.shape, self.world_size) if field.per_rank else field.shape

    @property
    def size(self) -> int:
        """Cells (float64) of the vector."""
        return sum(math.prod(self.shape(field)) for field in self.fields)

    @property
    def digest(self) -> str:
        """Equal for equal layouts, on every machine."""
        return hashlib.sha256(repr((self.fields, self.world_size)).encode()).hexdigest()

    def zeros(self, device: torch.device | None = None) -> Tensor:
        """The packet of a rank that has nothing to say. Shape: [K] float64."""
        return torch.zeros(self.size, dtype=torch.float64, device=device)

    def pack(self, values: Mapping[str, Tensor], rank: int, device: torch.device | None = None) -> Tensor:
        """This rank's packet; a field that `values` lacks stays zero.

        Shape: values of each field's own shape in, [K] float64 out. Comm: none. Sync: none, unless values lie on
        another device than a packet on the host.
        """
        packet = self.zeros(device)
        start = 0
        for field in self.fields:
            shape = self.shape(field)
            stop = start + math.prod(shape)
            if field.name in values:
                cells = packet[start:stop].view(shape)
                (cells[..., rank] if field.per_rank else cells).copy_(values[field.name], non_blocking=packet.is_cuda)
            start = stop
        return packet

    def unpack(self, packet: Tensor) -> dict[str, Tensor]:
        """The fields of a packet, as views of their shapes."""
        fields = {}
        start = 0
        for field in self.fields:
            shape = self.shape(field)
            stop = start + math.prod(shape)
            fields[field.name] = packet[start:stop].view(shape)
            start = stop
        return fields
