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

    Comm: none. Sync: none where `device` is not the CPU (there numbers of another device are read). Errors: ValueError
    for what is no number, by name."""
    weight = 1.0 if samples is None else _plain("samples", samples)
    if not isinstance(weight, Tensor) and weight < 0:
        raise ValueError(f"samples must be at least 0, got {samples}")
    rows = [_row(name, values.get(name), weight) for name in names]
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


def _row(name: str, value: ScalarLike | None, weight: float | Tensor) -> Sequence[float | Tensor]:
    """(value, what it is multiplied by for the weighted sum, weight, present)."""
    if value is None:
        return _NOTHING
    if isinstance(value, Total):
        return _plain(name, value.value), 1.0, 1.0, 1.0
    if isinstance(value, tuple):
        if len(value) != 2:
            raise ValueError(f"{name} must be a number, or (sum, weight), got {value!r}")
        return _plain(name, value[0]), 1.0, _plain(f"the weight of {name}", value[1]), 1.0
    return _plain(name, value), weight, weight, 1.0


def _plain(name: str, value: float | Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}; give its mean")
        return value.detach()
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number or a tensor of one element, got {value!r}") from None
