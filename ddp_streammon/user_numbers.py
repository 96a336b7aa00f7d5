"""The user's own numbers as cells of the packet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddp_streammon.stats import ScalarLike, Total

_NOTHING = [0.0, 0.0, 0.0, 0.0]


@dataclass(frozen=True)
class Numbers:
    """A rank's numbers, as cells (sum, weighted sum, weight, present) each.

    Where some are on a device, those are `waiting`, by the place of their cell, and the second cell of every row is
    what the first is to be multiplied by (`finish_`).
    """

    cells: list[float]
    """[U x 4]"""
    bad: float
    """How many numbers are not finite; they count for nothing."""
    waiting: tuple[tuple[int, Tensor], ...] = ()


def user_numbers(
    names: Sequence[str], values: Mapping[str, ScalarLike | None], samples: float | Tensor | None, device: torch.device
) -> Numbers:
    """A rank's numbers in the order of `names`.

    Comm: none. Sync: none where `device` is not the CPU (there numbers of another device are read)."""
    weight: float | Tensor = 1.0 if samples is None else samples
    rows = [_row(values.get(name), weight) for name in names]
    cells = [cell for row in rows for cell in row]
    waiting = tuple(
        (place, cell) for place, cell in enumerate(cells) if isinstance(cell, Tensor) and cell.device.type != "cpu"
    )
    if device.type == "cpu" or not waiting:
        known = [list(map(float, row)) for row in rows]
        finished = [[value, value * factor, of, present] for value, factor, of, present in known]
        good = [all(map(math.isfinite, row)) for row in finished]
        kept = [row if is_good else _NOTHING for row, is_good in zip(finished, good, strict=True)]
        return Numbers([cell for row in kept for cell in row], float(good.count(False)))
    places = {place for place, _ in waiting}
    return Numbers([0.0 if place in places else float(cell) for place, cell in enumerate(cells)], 0.0, waiting)


def finish_(cells: Tensor) -> Tensor:
    """Cells of `Numbers` of which some came from a device, in place; how many are not finite, [] float64.

    Shape: [U, 4] float64. Comm, Sync: none.
    """
    cells[:, 1] *= cells[:, 0]
    good = torch.isfinite(cells).all(dim=1, keepdim=True)
    cells.copy_(torch.where(good, cells, 0.0))
    return (~good).sum().double()


def _row(value: ScalarLike | None, weight: float | Tensor) -> Sequence[float | Tensor]:
    """(value, what it is multiplied by for the weighted sum, weight, present)."""
    if value is None:
        return _NOTHING
    if isinstance(value, Total):
        return _plain(value.value), 1.0, 1.0, 1.0
    if isinstance(value, tuple):
        return _plain(value[0]), 1.0, _plain(value[1]), 1.0
    return _plain(value), _plain(weight), _plain(weight), 1.0


def _plain(value: float | Tensor) -> float | Tensor:
    return value.detach() if isinstance(value, Tensor) else value
