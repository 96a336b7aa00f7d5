"""The layout of the one vector that carries everything of a monitored step across ranks: a frozen value."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

LIMIT_BYTES = 65_536
"""Beyond this size ranks fill their slots in turn. Up to it the latency of a sum counts, not its size."""
CELL_BYTES = 8
ASIDE = "aside"
_ZERO = array("d", [0.0])


@dataclass(frozen=True)
class Field:
    """A named block of cells.

    A plain field adds up over ranks. A `per_rank` field has a slot for each rank: a rank writes its own and leaves
    the others zero, so that the sum gathers them exactly (NaN, Inf and subnormal numbers stay in their cells). A
    `raw` field is a plain one that stays a tensor when it is unpacked.
    """

    name: str
    shape: tuple[int, ...] = ()
    per_rank: bool = False
    raw: bool = False


@dataclass(frozen=True)
class Layout:
    """Which cell means what; both directions read it.

    Plain fields come first, then the slots of one rank, of the next and so on: what a rank writes is two runs of
    cells. Where slots would take more than `LIMIT_BYTES`, the ranks r with r % turns == turn have one in the packets
    of that turn, and the packets are smaller by that factor.
    """

    fields: tuple[Field, ...]
    world_size: int = 1
    limit_bytes: int = LIMIT_BYTES

    @cached_property
    def plain(self) -> tuple[Field, ...]:
        """The fields that add up over ranks."""
        return tuple(field for field in self.fields if not field.per_rank)

    @cached_property
    def slots(self) -> tuple[Field, ...]:
        """The fields of which each rank has its own."""
        return tuple(field for field in self.fields if field.per_rank)

    @cached_property
    def slot_size(self) -> int:
        """Cells of one rank's slots."""
        return _cells(self.slots)

    @cached_property
    def turns(self) -> int:
        """In how many packets every rank has had its slots once; 1 where they all fit."""
        slot = self.slot_size
        room = self.limit_bytes // CELL_BYTES - sum(math.prod(field.shape) for field in self.plain if not field.raw)
        at_once = max(room // slot, 1) if slot else self.world_size
        return -(-self.world_size // at_once)

    @cached_property
    def size(self) -> int:
        """Cells (float64) of the vector."""
        return _cells(self.plain) + -(-self.world_size // self.turns) * self.slot_size

    def heard(self, turn: int) -> range:
        """The ranks that have slots in the packets of `turn` (any count of packets sent before)."""
        return range(turn % self.turns, self.world_size, self.turns)

    def spans(self, rank: int, turn: int = 0) -> dict[str, slice]:
        """Where the cells of each plain field are, and those of this rank's slots; where it is not its turn the slots
        lie behind the packet's end, and are not sent."""
        in_turn = rank in self.heard(turn)
        if (rank, in_turn) not in self._spans:
            own = _cells(self.plain) + rank // self.turns * self.slot_size
            starts = (0, own if in_turn else self.size)
            found = self._spans[rank, in_turn] = {}
            for start, fields in zip(starts, (self.plain, self.slots), strict=True):
                for field in fields:
                    found[field.name] = slice(start, start + math.prod(field.shape))
                    start = found[field.name].stop
        return self._spans[rank, in_turn]

    @cached_property
    def _spans(self) -> dict[tuple[int, bool], dict[str, slice]]:
        """Those that were asked for."""
        return {}

    def zeros(self, device: torch.device | None = None) -> Tensor:
        """The packet of a rank that has nothing to say. Shape: [K] float64."""
        return torch.zeros(self.size, dtype=torch.float64, device=device)

    def view(self, packet: Tensor, name: str) -> Tensor:
        """A plain field of a packet, in its shape, where it lies. Comm, Sync: none."""
        start = 0
        for field in self.plain:
            stop = start + math.prod(field.shape)
            if field.name == name:
                return packet[start:stop].view(field.shape)
            start = stop
        raise KeyError(f"no plain field {name!r}; plain fields: {', '.join(field.name for field in self.plain)}")

    def pack(
        self, values: Mapping[str, Tensor], rank: int, device: torch.device | None = None, turn: int = 0
    ) -> Tensor:
        """This rank's packet; its slots are left out where it is not its turn.

        Shape: values of each field's own shape in, [K] float64 out. Comm: none. Sync: none, unless values lie on
        another device than a packet on the host.
        """
        shared, slot = _cells(self.plain), _cells(self.slots)
        start = shared + rank // self.turns * slot
        slots = self.slots if rank in self.heard(turn) else ()
        on_host = device is None or device.type == "cpu"
        if on_host and not any(field.raw for field in self.plain):
            # One operation, where copying field by field takes a dozen.
            packet = [0.0] * self.size
            packet[:shared] = (cell for field in self.plain for cell in values[field.name].reshape(-1).tolist())
            if slots:
                packet[start : start + slot] = (
                    cell for field in slots for cell in values[field.name].reshape(-1).tolist()
                )
            return torch.tensor(packet, dtype=torch.float64, device="cpu")
        cells = self.zeros(device)
        for first, fields in ((0, self.plain), (start, slots)):
            runs = [
                values[field.name].to(cells.device, torch.float64, non_blocking=not on_host).reshape(-1)
                for field in fields
            ]
            if runs:
                run = torch.cat(runs)
                cells[first : first + len(run)] = run
        return cells

    def unpack(self, packet: Tensor, turn: int = 0) -> dict[str, Any]:
        """The fields of a packet as floats in nested lists of their shapes, raw ones as tensors.

        Slots have the ranks that were heard, in their order, as a last dimension; of the shape (n,) they are `Slots`.
        Sync: waits for a packet that is not on the host.
        """
        cells = _ZERO * len(packet)
        torch.frombuffer(cells, dtype=torch.float64).copy_(packet)
        plain, slots = self._runs
        fields: dict[str, Any] = {
            field.name: packet[start:stop].view(field.shape)
            if field.raw
            else _shaped(cells[start:stop].tolist(), field.shape)
            for field, start, stop in plain
        }
        first, ranks = plain[-1][2] if plain else 0, len(self.heard(turn))
        for field, start, stop in slots:
            own = Slots(cells, first + start, self.slot_size, columns=stop - start, ranks=ranks)
            fields[field.name] = own if len(field.shape) == 1 else _shaped([*own], field.shape)
        return fields

    @cached_property
    def _runs(self) -> tuple[list[tuple[Field, int, int]], list[tuple[Field, int, int]]]:
        """Where the plain fields are, and where the others are within a rank's slots."""
        return _placed(self.plain), _placed(self.slots)


class Slots(Sequence["array[float]"]):
    """A field of the slots of several ranks: for each of its cells the ranks' numbers, read when they are asked for.

    Shape: [cells][ranks]; cells are counted from 0 alone.
    """

    def __init__(self, cells: array[float], first: int, step: int, *, columns: int, ranks: int) -> None:
        """The `columns` cells from `first` on are the first rank's, those from `first` + `step` on the next one's."""
        self._cells = cells
        self._first = first
        self._step = step
        self._columns = columns
        self._ranks = ranks

    @classmethod
    def of_ranks(cls, rows: Sequence[Sequence[float]]) -> Slots:
        """From each rank's cells, equally many."""
        columns = len(rows[0]) if rows else 0
        cells = array("d", [cell for row in rows for cell in row])
        return cls(cells, 0, columns, columns=columns, ranks=len(rows))

    def __len__(self) -> int:
        return self._columns

    def __getitem__(self, column: Any) -> Any:
        if not 0 <= column < self._columns:
            raise IndexError(f"no cell {column} in slots of {self._columns}")
        first = self._first + column
        return self._cells[first : first + self._step * self._ranks : self._step]

    def of_rank(self, place: int) -> array[float]:
        """The cells of the rank at that place among those heard."""
        first = self._first + place * self._step
        return self._cells[first : first + self._columns]


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


def _placed(fields: Sequence[Field]) -> list[tuple[Field, int, int]]:
    """Fields that follow each other, with their first cells and the ones behind their last."""
    stops = list(accumulate(math.prod(field.shape) for field in fields))
    return list(zip(fields, [0, *stops], stops, strict=False))


class Draft:
    """A rank's packet as it is written: what the host knows first, in one copy, then what the device knows, in place.

    `say` before `send`, `put` after it.
    """

    def __init__(self, layout: Layout, rank: int, turn: int = 0, aside: int = 0) -> None:
        """`aside`: cells of the field "aside", which are written like the others and not sent."""
        self.layout = layout
        first = layout.size + (layout.slot_size if layout.turns > 1 else 0)
        self.spans = layout.spans(rank, turn) | {ASIDE: slice(first, first + aside)}
        self._said = _ZERO * (first + aside)
        self._cells = torch.empty(0, dtype=torch.float64, device="cpu")

    def say(self, name: str, values: Sequence[float], start: int = 0) -> None:
        """Numbers of the host for a field's cells, from its cell number `start` on."""
        first = self.spans[name].start + start
        self._said[first : first + len(values)] = array("d", values)

    def send(self, cells: Tensor | None) -> None:
        """What was said goes into `cells`, on their device; without them it stays on the host. Sync: none."""
        said = torch.frombuffer(self._said, dtype=torch.float64)  # in a tenth of the time of a list
        if cells is None:
            self._cells = said
        else:
            self._cells = cells.copy_(said.pin_memory() if cells.is_cuda else said, non_blocking=True)

    def at(self, name: str) -> Tensor:
        """The cells of a field, flat, to be written in place."""
        return self._cells[self.spans[name]]

    def put(self, name: str, values: Tensor, start: int = 0) -> None:
        """Numbers of the device for a field's cells, from its cell number `start` on."""
        first = self.spans[name].start + start
        flat = values if values.dim() < 2 else values.reshape(-1)
        self._cells[first : first + values.numel()].copy_(flat, non_blocking=True)

    @property
    def cell_count(self) -> int:
        """Of all that is written, sent or not."""
        return len(self._said)

    @property
    def packet(self) -> Tensor:
        """What is sent. Shape: [K] float64."""
        return self._cells[: self.layout.size]
