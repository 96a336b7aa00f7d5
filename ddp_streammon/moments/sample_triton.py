"""`add_sample` on a CUDA device in one launch, where it takes PyTorch two dozen."""

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
WORDS = {
    torch.float32: tl.int32,
    torch.bfloat16: tl.int16,
    torch.float16: tl.int16,
    torch.float64: tl.int64,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}
"""What the kernel reads, and as what it looks at its bits."""


def can_add(row: Tensor, tensor: Tensor) -> bool:
    """Whether the kernel reads such a batch: of a known dtype, on the row's device, each item without gaps."""
    known = tensor.dtype in WORDS or tensor.dtype is torch.bool
    return known and tensor.device == row.device and dense(tensor[0])


def add_sample(row: Tensor, tensor: Tensor, *, compare: bool) -> None:
    """As `moments.sample.add_sample`, for what `can_add` says. Comm: none. Sync: none."""
    batch = tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor
    step = feature_step(batch)
    items = min(len(batch), ITEMS)
    features = -(-batch[0].numel() // step)
    with torch.cuda.device(row.device) if row.is_cuda else nullcontext():
        _add[(1,)](
            *(row, batch, items, features, batch.stride(0), step),
            WORD=WORDS[batch.dtype],
            FLOATS=batch.is_floating_point(),
            COMPARE=compare and items > 1,
            ITEMS=ITEMS,
            WIDTH=WIDTH,
            num_warps=WARPS,
        )


@triton.jit
def _add(
    row,
    batch,
    items,
    features,
    stride,
    step,
    WORD: tl.constexpr,
    FLOATS: tl.constexpr,
    COMPARE: tl.constexpr,
    ITEMS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program, which adds to the seven cells of `row`, in the order of `moments.sample.COLUMNS`."""
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
        x = tl.load(batch + item * stride + feature * step, mask=inside, other=0)
        if COMPARE:
            of_first = tl.load(batch + item * 0 + feature * step, mask=inside, other=0)
            other += (inside & ((x == of_first) == 0)).to(tl.int32)
        place = 2 * (item * features + feature) + 1
        bits += tl.where(inside, x.to(WORD, bitcast=True).to(tl.int64) * place, 0)
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
    if COMPARE:
        tl.store(row + 4, tl.load(row + 4) + (tl.sum(other) == 0).to(tl.float64))
    tl.store(row + 5, tl.load(row + 5) + (tl.sum(bits) & 0xFFFFFFFF).to(tl.float64))
    tl.store(row + 6, tl.maximum(tl.load(row + 6), tl.max(top)))
