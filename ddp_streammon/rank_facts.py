"""What the ranks that were heard say of themselves in a step.

It comes as the cells of a packet and is read by figure, a number of each rank, or by rank, as `RankFacts`. Rules ask by
figure first: a step of a thousand ranks has tens of thousands of numbers, and all but a few are as they should be. Rows
are not frozen: making a frozen dataclass takes four times as long. Nobody changes them.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddp_streammon.moments.sample import ABS_MAX, BAD, BITS, COUNT, MODULUS
from ddp_streammon.packet import Slots

_FACTS = ("training", "samples", "step_seconds", "busy_seconds")
_INPUTS = (
    *("calls", "sum", "sq_sum", "count", "nonfinite", "constant", "bits", "abs_max"),
    *("first_sum", "first_sq_sum", "first_count"),
)
_NOBODY = array("d")
_OTHERS = 5
"""Cells of `RankFacts` beside the streams' learning rates and weight decays."""


@dataclass(slots=True)
class StreamInput:
    """A rank's inputs of one stream in a step, from samples (inputs.py); nan where there were none.

    `calls` of the stream's root module; mean and standard deviation (nan for integers), and the largest absolute value,
    of its finite inputs; how many are not finite; 1 where all items of each call are equal; and mean and standard
    deviation of what its first linear or convolution layer sees.
    """

    calls: float = 0.0
    mean: float = math.nan
    std: float = math.nan
    abs_max: float = math.nan
    nonfinite: float = math.nan
    constant: float = math.nan
    first_mean: float = math.nan
    first_std: float = math.nan

    @classmethod
    def of_cells(cls, cells: Sequence[float]) -> StreamInput:
        """From `INPUT_CELLS` cells: calls, the figures of the root's samples (`moments.sample`), and the first three of
        those of the first layer's."""
        calls, total, squares, count, bad, constant, _, abs_max, first_total, first_squares, first_count = cells
        if not count + bad:
            return cls(calls)
        mean, std = _mean_and_std(total, squares, count)
        first_mean, first_std = _mean_and_std(first_total, first_squares, first_count)
        return cls(calls, mean, std, abs_max, bad, float(constant == calls), first_mean, first_std)


def _mean_and_std(total: float, squares: float, count: float) -> tuple[float, float]:
    if not count:
        return math.nan, math.nan
    mean = total / count
    square = squares / count - mean * mean
    return mean, 0.0 if square < 0 else math.sqrt(square)


INPUT_CELLS = 11
"""Of each stream's inputs."""


@dataclass(slots=True)
class RankDetail:
    """What the evidence rules ask of a rank beside its `RankFacts`. nan: not known.

    `loss`: its own mean; `in_eval`: the share of its dropout and batch norm modules that are in eval mode (nan without
    such modules); `batch`: a number that is the same for the same batch; of each stream `base_lr`: the learning rate
    that a scheduler started from; `weights`: a number that is the same for the same sampled weights; `moved`: the norm
    of their last change; `inputs`.
    """

    loss: float
    in_eval: float
    batch: float
    base_lr: tuple[float, ...]
    weights: tuple[float, ...]
    moved: tuple[float, ...]
    inputs: tuple[StreamInput, ...]

    @staticmethod
    def cell_count(streams: int) -> int:
        """How many cells it takes."""
        return _DETAILS + streams * (3 + INPUT_CELLS)

    @classmethod
    def of_cells(cls, cells: Sequence[float], streams: int) -> RankDetail:
        """From loss, share in eval mode, base learning rates, (weights, moved) of each stream, and inputs."""
        of_weights = 2 + streams
        of_inputs = of_weights + 2 * streams
        base = tuple(cells[2:of_weights])
        weights, moved = tuple(cells[of_weights:of_inputs:2]), tuple(cells[of_weights + 1 : of_inputs : 2])
        rows = [cells[start : start + INPUT_CELLS] for start in range(of_inputs, len(cells), INPUT_CELLS)]
        seen = [row for row in rows if row[1 + COUNT] + row[1 + BAD]]
        batch = sum(row[1 + BITS] for row in seen) % MODULUS if seen else math.nan
        return cls(cells[0], cells[1], batch, base, weights, moved, tuple(map(StreamInput.of_cells, rows)))


_DETAILS = 2
"""Cells of `RankDetail` beside the streams'."""


@dataclass(slots=True)
class RankFacts:
    """What a rank says of itself. nan: it did not say.

    `lr` and `weight_decay` of each stream; `training`: 1 in training mode, 0 in eval mode; `samples` of this step;
    `step_seconds` since its last measured call of `step` (nan at the first), of which `busy_seconds` until the last
    forward of each call had ended: data, forward and the optimizer, before it could wait for others.
    """

    rank: int
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    training: float
    samples: float
    step_seconds: float
    busy_seconds: float
    detail: RankDetail | None = None
    """What the evidence rules ask for beside; None where they are off."""

    def cells(self) -> list[float]:
        """As slots of a packet: 2 S + 5 cells."""
        others = (self.training, self.samples, self.step_seconds, self.busy_seconds)
        return [1.0, *others, *self.lr, *self.weight_decay]

    @classmethod
    def of_cells(cls, rank: int, cells: Sequence[float], detail: Sequence[float] | None = None) -> RankFacts:
        """The inverse of `cells`, with the cells of its `RankDetail` where there are any."""
        _, training, samples, step_seconds, busy_seconds = cells[:_OTHERS]
        streams = (len(cells) - _OTHERS) // 2
        lr, weight_decay = tuple(cells[_OTHERS : _OTHERS + streams]), tuple(cells[_OTHERS + streams :])
        of_detail = None if detail is None else RankDetail.of_cells(detail, streams)
        return cls(rank, lr, weight_decay, training, samples, step_seconds, busy_seconds, of_detail)

    @staticmethod
    def cell_count(streams: int) -> int:
        """How many cells the facts of a rank take."""
        return 2 * streams + _OTHERS


def alike(column: array[float]) -> bool:
    """Whether all ranks say one number, bit for bit (nan is one; 0.0 and -0.0 are two), or nobody says any."""
    return column.tobytes() == column[:1].tobytes() * len(column)


@functools.cache
def _names(streams: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the cells of facts and of details, of so many streams, which are told apart by their number."""
    facts = [f"{name}.{stream}" for name in ("lr", "weight_decay") for stream in range(streams)]
    base = [f"base_lr.{stream}" for stream in range(streams)]
    own = [f"{name}.{stream}" for stream in range(streams) for name in ("weights", "moved")]
    inputs = [f"input_{name}.{stream}" for stream in range(streams) for name in _INPUTS]
    return ("present", *_FACTS, *facts), ("loss", "in_eval", *base, *own, *inputs)


class Ranks(Sequence[RankFacts]):
    """The facts of the ranks that were heard and took part, in their order: rows that are made when they are asked for,
    and columns of one figure, a number of each rank. Columns of details are empty where the evidence rules are off."""

    def __init__(self, numbers: Sequence[int] = (), facts: Slots | None = None, details: Slots | None = None) -> None:
        """`numbers`: the ranks that took part; `facts`, `details`: their cells."""
        self.numbers = numbers if isinstance(numbers, range) else tuple(numbers)
        self._facts = facts or Slots.of_ranks(())
        self._details = details
        self._streams = max(len(self._facts) - _OTHERS, 0) // 2
        self._rows: dict[int, RankFacts] = {}

    @classmethod
    def of_packet(cls, heard: Sequence[int], facts: Slots, details: Slots | None) -> Ranks:
        """From the slots of a packet, of which those that took no part are left out."""
        took_part = facts[0]
        if 0.0 not in took_part:
            return cls(heard, facts, details)
        places = [place for place, present in enumerate(took_part) if present]
        rest = [slots and Slots.of_ranks([slots.of_rank(place) for place in places]) for slots in (facts, details)]
        return cls([heard[place] for place in places], rest[0], rest[1])

    def to_dict(self) -> dict[str, Any]:
        """Plain values: of each figure a list over ranks, or the one number that all of them say."""
        told: dict[str, Any] = {"rank": list(self.numbers)}
        for names, slots in zip(_names(self._streams), (self._facts, self._details), strict=True):
            if self.numbers and slots is not None:
                told |= {
                    name: column[0] if alike(column) else list(column)
                    for name, column in zip(names, slots, strict=True)
                }
        return told

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ranks:
        """The inverse of `to_dict`."""
        numbers = values["rank"]
        slots = []
        for names in _names(sum(name.startswith("lr.") for name in values)):
            if names[0] in values:
                columns = [of if isinstance(of := values[name], list) else [of] * len(numbers) for name in names]
                slots.append(Slots.of_ranks([*zip(*columns, strict=True)]))
        return cls(numbers, *slots)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        place = range(len(self))[place]
        if isinstance(place, range):
            return [self[own] for own in place]
        if place not in self._rows:
            detail = None if self._details is None else self._details.of_rank(place)
            self._rows[place] = RankFacts.of_cells(self.numbers[place], self._facts.of_rank(place), detail)
        return self._rows[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranks) and [*self] == [*other]

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Ranks({[*self]})"

    @property
    def training(self) -> array[float]:
        return self._fact(1)

    @property
    def samples(self) -> array[float]:
        return self._fact(2)

    @property
    def step_seconds(self) -> array[float]:
        return self._fact(3)

    @property
    def busy_seconds(self) -> array[float]:
        return self._fact(4)

    def lr(self, stream: int) -> array[float]:
        return self._fact(_OTHERS + stream)

    def weight_decay(self, stream: int) -> array[float]:
        return self._fact(_OTHERS + self._streams + stream)

    @property
    def loss(self) -> array[float]:
        return self._detail(0)

    @property
    def in_eval(self) -> array[float]:
        return self._detail(1)

    def base_lr(self, stream: int) -> array[float]:
        return self._detail(_DETAILS + stream)

    def weights(self, stream: int) -> array[float]:
        return self._detail(_DETAILS + self._streams + 2 * stream)

    def calls(self, stream: int) -> array[float]:
        return self._input(stream, 0)

    def of_input(self, stream: int, figure: int) -> array[float]:
        """A figure of `moments.sample` of each rank's inputs of a stream, as a sum over its calls."""
        return self._input(stream, 1 + figure)

    def inputs(self, stream: int) -> Iterator[tuple[int, StreamInput]]:
        """Of each rank that has called the stream: its inputs."""
        if self._details is not None:
            first = self._of_inputs(stream)
            for place, (rank, calls) in enumerate(zip(self.numbers, self.calls(stream), strict=True)):
                if calls > 0:
                    own = self._details.of_rank(place)[first : first + INPUT_CELLS]
                    yield rank, StreamInput.of_cells(own)

    def without_input(self, stream: int) -> list[int]:
        """The ranks whose inputs of a stream were seen and all zeros."""
        if 0.0 not in self.of_input(stream, ABS_MAX):
            return []
        return [rank for rank, given in self.inputs(stream) if given.abs_max == 0]

    def _of_inputs(self, stream: int) -> int:
        return _DETAILS + 3 * self._streams + INPUT_CELLS * stream

    def _input(self, stream: int, cell: int) -> array[float]:
        return self._detail(self._of_inputs(stream) + cell)

    def _fact(self, cell: int) -> array[float]:
        return self._facts[cell] if self.numbers else _NOBODY

    def _detail(self, cell: int) -> array[float]:
        return self._details[cell] if self._details is not None and self.numbers else _NOBODY
