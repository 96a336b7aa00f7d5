"""A batch on any device -> figures of a sample of it, added up where they are."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

ITEMS, FEATURES = 32, 1024
"""Of a batch: the first items, and of each at most so many features at equal distances."""
SUM, SQ_SUM, COUNT, BAD, CONSTANT, BITS, ABS_MAX = range(7)
COLUMNS = 7
"""Sum and sum of squares (nan for integers) of the finite elements, their number, that of the others; 1 where all items
of several are equal; a number below 2^32 that is the same for the same bits in the same order; and the largest absolute
value, which does not add up."""
MODULUS = 2**32
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def add_sample(row: Tensor, tensor: Tensor, *, compare: bool) -> None:
    """Add the figures of a sample of `tensor` to `row`, with PyTorch operations.

    `compare`: whether to look if all items are equal. Shape: [7] float64, [B, ...]. Comm: none. Sync: none.
    """
    sample = _sample(tensor)
    several = compare and len(sample) > 1
    if sample.device.type == "cpu" and row.device.type == "cpu" and _add_finite(row, sample, several):
        return
    numbers = sample.is_floating_point()
    bits = _bits(sample)
    constant = (sample == sample[:1]).all().double() if several else torch.zeros_like(bits)
    values = sample.float() if numbers else sample.double().abs()
    finite = torch.isfinite(values)
    values = torch.where(finite, values, 0)
    count = finite.sum().double()
    if numbers:
        wide = values.double()
        sums = (wide.sum(), torch.linalg.vector_norm(wide).square())
    else:
        sums = (torch.full_like(count, math.nan), torch.full_like(count, math.nan))
    figures = torch.stack([*sums, count, values.numel() - count, constant, bits])
    later = row.device.type != "cpu"  # a copy to the host that is not waited for has not arrived when it is read
    row[:ABS_MAX] += figures.to(row.device, non_blocking=later)
    largest = torch.linalg.vector_norm(values, math.inf).double().to(row.device, non_blocking=later)
    row[ABS_MAX] = torch.maximum(row[ABS_MAX], largest)


def _add_finite(row: Tensor, sample: Tensor, several: bool) -> bool:
    """The same on the host, a quarter of the time; False, and nothing is added, for what is not all finite numbers."""
    if not sample.is_floating_point():
        return False
    wide = sample.float().double().reshape(-1)
    squares = torch.dot(wide, wide).item()
    if not math.isfinite(squares):
        return False
    low, high = torch.aminmax(wide)
    constant = float(several and torch.equal(sample, sample[:1].expand_as(sample)))
    figures = [wide.sum().item(), squares, float(len(wide)), 0.0, constant, _bits(sample).item()]
    row[:ABS_MAX] += torch.tensor(figures, dtype=torch.float64, device="cpu")
    row[ABS_MAX] = max(row[ABS_MAX].item(), -low.item(), high.item())
    return True


def feature_step(tensor: Tensor) -> int:
    """The distance between the features that are looked at."""
    return max(1, -(-(tensor[0].numel()) // FEATURES))


def _sample(tensor: Tensor) -> Tensor:
    """[items, features] of a batch, in memory order, without a copy of more than that where memory has no gaps."""
    few = tensor[:ITEMS]
    inner = sorted(range(1, few.dim()), key=few.stride, reverse=True)
    return few.permute(0, *inner).reshape(len(few), -1)[:, :: feature_step(few)]


def _bits(sample: Tensor) -> Tensor:
    """A sum of the sample's bits that depends on their order, [] float64 below 2^32."""
    whole = sample.contiguous()
    words = whole.view(INTEGERS.get(whole.element_size(), whole.dtype)).reshape(-1).to(torch.int32)
    return (
        (words * _odd_numbers(len(words), words.device)).sum().remainder(MODULUS).double()
    )  # int32 wraps, which changes nothing below 2^32


@functools.lru_cache(maxsize=32)
def _odd_numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, 2 * count, 2, dtype=torch.int32, device=device)
