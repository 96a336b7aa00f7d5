"""`sample.add_sample` on a CUDA device, for many batches in one launch, where PyTorch takes two dozen for each."""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor
from triton import language as tl

from ddp_streammon.moments.sample import ITEMS, feature_step
from ddp_streammon.moments.triton import dense

WIDTH, WARPS = 128, 16
"""Features that are read at a time, of all items."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.int32: 4, torch.int64: 5}
"""What the kernel reads, by the code that it knows it by; bool is read as uint8."""
PLACE_CELLS = 7


def can_add(device: torch.device, tensor: Tensor) -> bool:
    """Whether the kernel reads such a batch: of a known dtype, on that device, each item without gaps."""
    known = tensor.dtype in KINDS or tensor.dtype is torch.bool
    return known and tensor.device == device and dense(tensor[0])


def place(tensor: Tensor, *, compare: bool) -> list[float]:
    """Where a batch is and how it lies there, in `PLACE_CELLS` numbers; all exact in float64."""
    step = feature_step(tensor)
    items = min(len(tensor), ITEMS)
    kind = KINDS[torch.uint8 if tensor.dtype is torch.bool else tensor.dtype]
    several = float(compare and items > 1)
    return [tensor.data_ptr(), items, -(-tensor[0].numel() // step), tensor.stride(0), step, kind, several]


def add_samples(rows: Tensor, places: Tensor) -> None:
    """Add to each row [7] the figures of a sample of the batch at its place; nothing where it has no features.

    Shape: [N, 7], [N, 7] float64. Comm: none. Sync: none.
    """
    with torch.cuda.device(rows.device) if rows.is_cuda else nullcontext():
        _add[(len(rows),)](rows, places, ITEMS=ITEMS, WIDTH=WIDTH, num_warps=WARPS)


@triton.jit
def _add(rows, places, ITEMS: tl.constexpr, WIDTH: tl.constexpr):
    """One program a batch, which adds to the seven cells of its row, in the order of `moments.sample.COLUMNS`."""
    number = tl.program_id(0)
    row = rows + 7 * number
    of_place = places + 7 * number
    address = tl.load(of_place).to(tl.int64)
    items = tl.load(of_place + 1).to(tl.int64)
    features = tl.load(of_place + 2).to(tl.int64)
    stride = tl.load(of_place + 3).to(tl.int64)
    step = tl.load(of_place + 4).to(tl.int64)
    kind = tl.load(of_place + 5).to(tl.int32)
    several = tl.load(of_place + 6) > 0
    if features > 0:
        if kind == 0:
            _one(row, address, items, features, stride, step, several, tl.float32, tl.int32, True, ITEMS, WIDTH)
        elif kind == 1:
            _one(row, address, items, features, stride, step, several, tl.bfloat16, tl.int16, True, ITEMS, WIDTH)
        elif kind == 2:
            _one(row, address, items, features, stride, step, several, tl.float16, tl.int16, True, ITEMS, WIDTH)
        elif kind == 3:
            _one(row, address, items, features, stride, step, several, tl.uint8, tl.uint8, False, ITEMS, WIDTH)
        elif kind == 4:
            _one(row, address, items, features, stride, step, several, tl.int32, tl.int32, False, ITEMS, WIDTH)
        else:
            _one(row, address, items, features, stride, step, several, tl.int64, tl.int64, False, ITEMS, WIDTH)


@triton.jit
def _one(
    row,
    address,
    items,
    features,
    stride,
    step,
    several,
    DTYPE: tl.constexpr,
    WORD: tl.constexpr,
    FLOATS: tl.constexpr,
    ITEMS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    batch = address.to(tl.pointer_type(DTYPE))
    item = tl.arange(0, ITEMS)[:, None].to(tl.int64)
    total = tl.zeros([ITEMS, WIDTH], tl.float64)
    squares = tl.zeros([ITEMS, WIDTH], tl.float64)
    finite = tl.zeros([ITEMS, WIDTH], tl.int32)
    other = tl.zeros([ITEMS, WIDTH], tl.int32)
    bits = tl.zeros([ITEMS, WIDTH], tl.int64)
    top = tl.zeros([ITEMS, WIDTH], tl.float64)
    first = 0
    while first < features:
        feature = first + tl.arange(0, WIDTH)[None, :].to(tl.int64)
        inside = (item < items) & (feature < features)
        x = tl.load(batch + (item * stride + feature * step), mask=inside, other=0)
        of_first = tl.load(batch + (item * 0 + feature * step), mask=inside, other=0)
        other += (inside & ((x == of_first) == 0)).to(tl.int32)
        bits += tl.where(inside, x.to(WORD, bitcast=True).to(tl.int64) * (2 * (item * features + feature) + 1), 0)
        if FLOATS:
            narrow = x.to(tl.float32)
            good = inside & (tl.abs(narrow) < float("inf"))
            value = tl.where(good, narrow, 0.0).to(tl.float64)
            total += value
            squares += value * value
        else:
            good = inside
            value = x.to(tl.float64)
        finite += good.to(tl.int32)
        top = tl.maximum(top, tl.abs(value))
        first += WIDTH
    count = tl.sum(finite)
    if FLOATS:
        tl.store(row, tl.load(row) + tl.sum(total))
        tl.store(row + 1, tl.load(row + 1) + tl.sum(squares))
    else:
        tl.store(row, float("nan"))
        tl.store(row + 1, float("nan"))
    tl.store(row + 2, tl.load(row + 2) + count)
    tl.store(row + 3, tl.load(row + 3) + (items * features - count))
    constant = ((tl.sum(other) == 0) & several).to(tl.float64)
    tl.store(row + 4, tl.load(row + 4) + constant)
    tl.store(row + 5, tl.load(row + 5) + (tl.sum(bits) & 0xFFFFFFFF).to(tl.float64))
    tl.store(row + 6, tl.maximum(tl.load(row + 6), tl.max(top)))
