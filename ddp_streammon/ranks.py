"""What ranks say of themselves, and whether those that should hold the same numbers do."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddp_streammon.shards import Family

_OTHERS = 5
"""Cells of `RankFacts` beside the streams' learning rates and weight decays."""
_MODULUS = 2**32


@dataclass(frozen=True)
class RankFacts:
    """What a rank says of itself. nan: it did not say.

    `lr` and `weight_decay` of each stream; `training`: 1 in training mode, 0 in eval mode; `samples` of this step;
    `step_seconds` since its last call of `step`, of which `busy_seconds` until its last forward had ended: data,
    forward and the optimizer, before it could wait for others.
    """

    rank: int
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    training: float
    samples: float
    step_seconds: float
    busy_seconds: float

    def cells(self) -> list[float]:
        """As slots of a packet: 2 S + 5 cells."""
        others = (self.training, self.samples, self.step_seconds, self.busy_seconds)
        return [1.0, *others, *self.lr, *self.weight_decay]

    @classmethod
    def of_cells(cls, rank: int, cells: Sequence[float]) -> RankFacts | None:
        """The inverse of `cells`; None for a rank that took no part."""
        streams = (len(cells) - _OTHERS) // 2
        present, training, samples, step_seconds, busy_seconds = cells[:_OTHERS]
        lr, weight_decay = tuple(cells[_OTHERS : _OTHERS + streams]), tuple(cells[_OTHERS + streams :])
        return cls(rank, lr, weight_decay, training, samples, step_seconds, busy_seconds) if present else None

    @staticmethod
    def cell_count(streams: int) -> int:
        """How many cells the facts of a rank take."""
        return 2 * streams + _OTHERS


@dataclass(frozen=True)
class Replicas:
    """Whether the ranks that hold the same parameters hold the same numbers: of one family, bit for bit.

    `ranks` are those that the others outvote; all of a set where there is no majority.
    """

    stream: str
    gradients: bool
    weights: bool
    ranks: tuple[int, ...]


def compared(
    families: Sequence[Family], checksums: Sequence[Any], streams: Sequence[str], ranks: Collection[int]
) -> tuple[Replicas, ...]:
    """What the checksums of a packet say of each family of which several ranks hold the same part.

    `checksums`: for each family the gradients' and the weights', each a list over all ranks; `ranks`: those that took
    part.
    """
    result = []
    for family, per_kind in zip(families, checksums, strict=True):
        sets = [[rank for rank in held if rank in ranks] for held in family.sets if len(held) > 1]
        out = [
            {rank for held in sets for rank in outvoted(held, [values[rank] for rank in held])} for values in per_kind
        ]
        if sets:
            result.append(Replicas(streams[family.stream], not out[0], not out[1], tuple(sorted(out[0] | out[1]))))
    return tuple(result)


def outvoted(ranks: Sequence[int], values: Sequence[float]) -> list[int]:
    """The ranks whose value is not that of more than half; all of them where values differ and no half agrees."""
    counts = Counter(values)
    if len(counts) < 2:
        return []
    value, votes = counts.most_common(1)[0]
    majority = 2 * votes > len(ranks)
    return [rank for rank, its in zip(ranks, values, strict=True) if not majority or its != value]


def bit_sum(tensors: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """A checksum of the bits of `tensors` in their order; equal for equal numbers, in whatever order they are read.

    Shape: [] float64, an integer below 2^32. Comm: none. Sync: none. Every element is read once.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        bits = 1 if tensor is None else _bits(tensor.detach()).sum(dtype=torch.int64).to(device)
        total = (total * 1_000_003 + bits).remainder(_MODULUS)
    return total.double()


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers of its elements' size."""
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.element_size()])


class Clock:
    """How long this rank's steps take, and how long it is busy in them before it can wait for others.

    Host time: where work is queued on a device, what the host does until the forward is queued.
    """

    def __init__(self, model: nn.Module) -> None:
        self._last = self._forward_ended = time.perf_counter()
        clock = weakref.ref(self)

        def forward_ended(*_: Any) -> None:
            if (alive := clock()) is not None:
                alive._forward_ended = time.perf_counter()

        self._hook = model.register_forward_hook(forward_ended)

    def lap(self) -> tuple[float, float]:
        """(seconds since the last lap, of them until the last forward ended)."""
        now = time.perf_counter()
        lap = now - self._last, max(self._forward_ended - self._last, 0.0)
        self._last = now
        return lap

    def stop(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()
