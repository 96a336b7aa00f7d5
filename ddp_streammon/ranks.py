"""Ranks' own gradients, whether those that should hold the same numbers do, and how long their steps take."""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddp_streammon.moments.sample import MODULUS
from ddp_streammon.shards import Family

_FACTOR = 1_000_003


@dataclass(slots=True)
class LocalNorms:
    """A rank's own gradients, before the average: each stream's L2 norm over finite elements (nan: not read), and count
    of non-finite elements; `parameter`: the number of the first of the backward pass that has some."""

    rank: int
    norms: tuple[float, ...]
    nonfinite: tuple[int, ...]
    parameter: int | None

    @classmethod
    def of_cells(cls, rank: int, cells: Sequence[float]) -> LocalNorms:
        """From the cells that `LocalGradients.take` gives."""
        streams = (len(cells) - 1) // 2
        norms = tuple(math.sqrt(square) for square in cells[:streams])
        bad = tuple(round(count) for count in cells[streams : 2 * streams])
        return cls(rank, norms, bad, round(cells[-1]) - 1 if cells[-1] else None)


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
    """The ranks whose value is not that of more than half; all of them where values differ and none has more than half.

    An empty list where all values are equal.
    """
    if len(set(values)) < 2:
        return []
    value, votes = Counter(values).most_common(1)[0]
    majority = 2 * votes > len(ranks)
    return [rank for rank, its in zip(ranks, values, strict=True) if not majority or its != value]


def bit_sum(tensors: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """A checksum of the bits of `tensors` in their order.

    A changed bit changes it, and so does 0.0 for -0.0. The elements of one tensor are added up, so its strides do not
    matter, and changes that cancel in the sum (elements that changed places, or signs) are not seen.

    Shape: [] float64, an integer below 2^32. Comm: none. Sync: none. Every element is read once.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        bits = total.new_ones(()) if tensor is None else _bits(tensor.detach()).sum(dtype=torch.int64).to(device)
        for word in (bits, bits >> 32):  # both halves: the upper one holds the exponents of float64
            total = (total * _FACTOR + word).remainder(MODULUS)
    return total.double()


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers of its elements' size."""
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().view(_INTEGERS[tensor.element_size()])


class Clock:
    """How long this rank's steps take, and how long it is busy in them before it can wait for others.

    Host time: where work is queued on a device, what the host does until the forward is queued.
    """

    def __init__(self, model: nn.Module) -> None:
        self._last: float | None = None
        self._step = self._busy = 0.0
        self._forward_ended = time.perf_counter()
        self._hook = model.register_forward_hook(_ForwardEnded(self))

    def lap(self) -> None:
        """Another call of `step`; the first one starts the clock."""
        now = time.perf_counter()
        last, self._last = self._last, now
        if last is not None:
            self._step += now - last
            self._busy += max(self._forward_ended - last, 0.0)

    def pause(self) -> None:
        """What passes until the next lap is no step's."""
        self._last = None

    def take(self) -> tuple[float, float]:
        """(seconds of the laps since it was last taken, of each of them until its last forward ended); nan for none."""
        step, busy = self._step, self._busy
        self._step = self._busy = 0.0
        return (step, busy) if step else (math.nan, math.nan)

    def stop(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()


class _ForwardEnded:
    """The forward hook of a clock, which it does not keep alive."""

    def __init__(self, clock: Clock) -> None:
        self._clock = weakref.ref(clock)

    def __call__(self, *_: Any) -> None:
        if torch.compiler.is_compiling():  # nn.Module.compile traces hooks, and cannot trace a clock
            return
        if (clock := self._clock()) is not None:
            clock._forward_ended = time.perf_counter()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model, or one read from a file, has a callable without effect that needs no clock and no
        ddp_streammon."""
        return getattr, (contextlib.nullcontext(), "__exit__")
