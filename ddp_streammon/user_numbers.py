"""The user's own numbers as cells of the packet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ddp_streammon.stats import ScalarLike, Total


def scalar_cells(
    names: Sequence[str], values: Mapping[str, ScalarLike | None], samples: float | Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A rank's numbers as cells (sum, weighted sum, weight, present) and how many of them are not finite.

    Shape: [U, 4] and [] float64. Comm: none. Sync: none for numbers on `device` (those elsewhere are copied).
    """
    weight: float | Tensor = 1.0 if samples is None else samples
    if device.type == "cpu":
        rows = [_row(_floats(values.get(name)), _float(weight)) for name in names]
        finite = [all(math.isfinite(cell) for cell in row) for row in rows]
        cells = [row if good else _NOTHING for row, good in zip(rows, finite, strict=True)]
        bad = float(len(finite) - sum(finite))
        return torch.tensor(cells, dtype=torch.float64).view(-1, 4), torch.tensor(bad, dtype=torch.float64)
    matrix = _on_device([_row(values.get(name), weight) for name in names], device)
    good = torch.isfinite(matrix).all(dim=1, keepdim=True)
    return torch.where(good, matrix, 0.0), (~good).sum().double()


_Row: TypeAlias = "tuple[float | Tensor, float | Tensor, float | Tensor, float]"
_NOTHING = (0.0, 0.0, 0.0, 0.0)


def _row(value: ScalarLike | None, weight: float | Tensor) -> _Row:
    if value is None:
        return _NOTHING
    if isinstance(value, Total):
        return value.value, value.value, 1.0, 1.0
    if isinstance(value, tuple):
        return value[0], value[0], value[1], 1.0
    return value, value * weight, weight, 1.0


def _floats(value: ScalarLike | None) -> ScalarLike | None:
    """The same number with Python floats in place of tensors."""
    if value is None:
        return None
    if isinstance(value, Total):
        return Total(_float(value.value))
    return (_float(value[0]), _float(value[1])) if isinstance(value, tuple) else _float(value)


def _float(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _on_device(rows: Sequence[_Row], device: torch.device) -> Tensor:
    """Numbers and one-element tensors -> [U, 4] float64 on `device`, without waiting for it."""
    flat = [cell for row in rows for cell in row]
    if not any(isinstance(cell, Tensor) and cell.device != torch.device("cpu") for cell in flat):
        host = torch.tensor([_float(cell) for cell in flat], dtype=torch.float64)
        return host.to(device, non_blocking=True).view(-1, 4)
    cells = [
        cell.detach().double().reshape(()).to(device, non_blocking=True)
        if isinstance(cell, Tensor)
        else torch.full((), float(cell), dtype=torch.float64, device=device)
        for cell in flat
    ]
    return torch.stack(cells).view(-1, 4)
