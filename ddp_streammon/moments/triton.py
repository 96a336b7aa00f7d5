"""Every gradient on a CUDA device read once, by one kernel; a second folds what it found into figures per stream.

A program of the first reads a chunk, up to `CHUNK` elements of one piece. Where the chunks begin within the pieces
never changes; where the pieces lie in memory, and as what, is a small table, sent again when one moved, came or went.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import torch
import triton
from torch import Tensor
from triton import language as tl

from ddp_streammon.moments.torch import ABS_MAX, COLUMNS, Source, moments
from ddp_streammon.shards import Piece, Share

CHUNK = 32_768
"""Elements of a chunk; with `WARPS` the fastest of those tried with a prototype on an H100, for 94 MB of gradients."""
WARPS, FOLD_WARPS = 16, 8
MAX_CHUNKS = 8_192
"""Models with more have larger chunks: so many still go evenly over an H100, which runs some 400 at a time, and are
folded, 40 bytes each, in microseconds."""
ROWS = 1_024
"""Words of 16 bytes, the widest load, that a program reads at a time. Two a thread: with more, `WARPS` warps need so
many registers that a multiprocessor of an H100 holds one program, not three, and idles while that one adds up."""
FOLD = 1_024
"""Chunks that a program folds at a time."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the kernel reads, by the code that it knows it by."""

_Place: TypeAlias = "tuple[int, torch.dtype, tuple[int, ...]] | torch.layout | None"
"""Address, dtype and strides of a tensor; the layout alone where it is not strided; None without a tensor."""


@dataclass(frozen=True)
class _Chunks:
    """What never changes, as CUDA stream number `stream` was sent it."""

    stream: int
    chunks: Tensor
    """[C, 2] int64, by stream: the piece's number, the first element within the piece."""
    firsts: Tensor
    """[S + 1] int64: where each stream's chunks begin, and where the last one's end."""
    weights: Tensor
    """[P] float64."""


@dataclass(frozen=True)
class _Pieces:
    """Where the tensors were when the device was told."""

    places: list[_Place]
    pieces: Tensor
    """[P, 3] int64: address, elements (0 where there is nothing to read), kind."""
    counts: Tensor
    """[S, 2] float64: elements and tensors that the kernel reads, weighed."""
    others: tuple[Share, ...]
    """What the kernel cannot read."""


class TritonMoments:
    """`moments` of the same shares again and again, in two launches.

    The kernel reads float32, bfloat16 and float16 without gaps in memory, whatever their alignment; the rest (sparse,
    complex, float64, strided, on another device) goes to `moments`. While nothing moves nothing is sent to the
    device. No tensor is kept. Runs on the current CUDA stream. The same input gives the same bits.

    Accuracy: float32 within 1,024 words of 16 bytes, where at most 17 additions follow each other, in units of their
    abs-max, so that squares neither vanish nor overflow; float64 from there on.
    """

    def __init__(self, shares: Sequence[Share], num_streams: int, device: torch.device) -> None:
        self._device = torch.empty(0, device=device).device  # "cuda" gets its number
        self._num_streams = num_streams
        entries = sorted(((p, share.weight) for share in shares for p in share.pieces), key=lambda e: e[0].stream)
        self._pieces = [piece for piece, _ in entries]
        self._parameters = [piece.parameter for piece in self._pieces]
        self._weights = [weight for _, weight in entries]
        sizes = [piece.stop - piece.start for piece in self._pieces]
        self._chunk_size = chunk_size(sizes)
        self._chunks, self._firsts = _chunks(self._pieces, num_streams, self._chunk_size)
        self._told: _Chunks | None = None
        self._table: _Pieces | None = None

    def __call__(self, source: Source) -> Tensor:
        """The figures now.

        Shape: [S, 7] float64 on the device, as `moments`.
        Comm: none. Sync: none.
        """
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            told, table = self._up_to_date([source(parameter) for parameter in self._parameters])
            result = self._launch(told, table)
        if not table.others:
            return result
        rest = moments(table.others, self._num_streams, source, self._device)
        abs_max = torch.maximum(result[:, ABS_MAX], rest[:, ABS_MAX])
        return torch.cat([(result + rest)[:, :ABS_MAX], abs_max[:, None]], dim=1)

    def _launch(self, told: _Chunks, table: _Pieces) -> Tensor:
        chunks, streams = len(self._chunks), self._num_streams
        partials = torch.empty(chunks, 5, dtype=torch.float64, device=self._device)
        result = torch.empty(streams, COLUMNS, dtype=torch.float64, device=self._device)
        if chunks:
            _read[(chunks,)](
                told.chunks, told.weights, table.pieces, partials, self._chunk_size, ROWS=ROWS, num_warps=WARPS
            )
        if streams:
            _fold[(streams,)](partials, told.firsts, table.counts, result, FOLD=FOLD, num_warps=FOLD_WARPS)
        return result

    def _up_to_date(self, tensors: Sequence[Tensor | None]) -> tuple[_Chunks, _Pieces]:
        """What the device holds, after it was told what changed.

        What one CUDA stream was sent may be under way when another runs, so that one is sent everything.
        """
        stream = torch.cuda.current_stream().cuda_stream if self._device.type == "cuda" else 0
        strided = torch.strided
        places: list[_Place] = [
            None if t is None else (t.data_ptr(), t.dtype, t.stride()) if t.layout is strided else t.layout
            for t in tensors
        ]
        told, table = self._told, self._table
        if told is None or told.stream != stream:
            weights = torch.tensor(self._weights, dtype=torch.float64)
            told = _Chunks(stream, *map(self._send, (self._chunks, self._firsts, weights)))
            table = None
        if table is None or table.places != places:
            table = self._send_pieces(places, tensors)
        self._told, self._table = told, table
        return told, table

    def _send_pieces(self, places: list[_Place], tensors: Sequence[Tensor | None]) -> _Pieces:
        rows = [(0, 0, 0)] * len(tensors)
        counts = [[0.0, 0.0] for _ in range(self._num_streams)]
        others: dict[float, list[Piece]] = {}
        for number, (piece, weight, tensor) in enumerate(zip(self._pieces, self._weights, tensors, strict=True)):
            if tensor is None:
                continue
            if not self._readable(tensor):
                others.setdefault(weight, []).append(piece)
                continue
            address = tensor.data_ptr() + piece.start * tensor.element_size()
            rows[number] = (address, piece.stop - piece.start, KINDS[tensor.dtype])
            counts[piece.stream][0] += (piece.stop - piece.start) * weight
            counts[piece.stream][1] += piece.counts * weight
        # The counts, 16 bytes a stream, go first: what follows is then aligned as kernels are compiled for.
        numbers = torch.tensor(counts, dtype=torch.float64).view(torch.int64).view(-1)
        sent = self._send(torch.cat([numbers, torch.tensor(rows, dtype=torch.int64).view(-1)]))
        return _Pieces(
            places,
            sent[len(numbers) :].view(-1, 3),
            sent[: len(numbers)].view(torch.float64).view(-1, 2),
            tuple(Share(tuple(pieces), weight) for weight, pieces in others.items()),
        )

    def _readable(self, tensor: Tensor) -> bool:
        known = tensor.layout is torch.strided and tensor.dtype in KINDS
        return known and tensor.device == self._device and _dense(tensor)

    def _send(self, host: Tensor) -> Tensor:
        """A copy on the device, from pinned memory that PyTorch reuses only after it was sent."""
        return host if self._device.type == "cpu" else host.pin_memory().to(self._device, non_blocking=True)


def chunk_size(sizes: Sequence[int]) -> int:
    """Elements of a chunk for pieces of these sizes: `CHUNK`, or so much more that there are `MAX_CHUNKS` or so."""
    size = CHUNK
    while sum(sizes) > size * MAX_CHUNKS:
        size *= 2
    return size


def _chunks(pieces: Sequence[Piece], num_streams: int, size: int) -> tuple[Tensor, Tensor]:
    """`_Chunks.chunks` and `_Chunks.firsts` for pieces in the order of their streams."""
    counts = torch.tensor([-(-(piece.stop - piece.start) // size) for piece in pieces], dtype=torch.int64)
    piece = torch.repeat_interleave(counts)
    start = (torch.arange(len(piece)) - (counts.cumsum(0) - counts)[piece]) * size
    stream = torch.tensor([piece.stream for piece in pieces], dtype=torch.int64)[piece]
    return torch.stack([piece, start], dim=1), torch.searchsorted(stream, torch.arange(num_streams + 1))


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill their memory, in whatever order of dimensions."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != filled:
            return tensor.numel() == 0
        filled *= size
    return True


@triton.jit
def _read(chunks, weights, pieces, partials, chunk_size, ROWS: tl.constexpr):
    """One program a chunk, which writes its row of `partials`.

    Shape: [C, 5] float64: sum, sum of squares, non-finite and nan count, all weighed; abs-max.
    """
    chunk = tl.program_id(0).to(tl.int64)
    piece = tl.load(chunks + 2 * chunk)
    start = tl.load(chunks + 2 * chunk + 1)
    address = tl.load(pieces + 3 * piece)
    count = tl.load(pieces + 3 * piece + 1) - start
    count = tl.maximum(tl.minimum(count, chunk_size), 0).to(tl.int32)
    kind = tl.load(pieces + 3 * piece + 2)
    if kind == 0:
        total, squares, bad, nans, top = _moments(address + 4 * start, count, tl.float32, 4, ROWS)
    elif kind == 1:
        total, squares, bad, nans, top = _moments(address + 2 * start, count, tl.bfloat16, 8, ROWS)
    else:
        total, squares, bad, nans, top = _moments(address + 2 * start, count, tl.float16, 8, ROWS)
    weight = tl.load(weights + piece)
    row = partials + 5 * chunk
    tl.store(row, total * weight)
    tl.store(row + 1, squares * weight)
    tl.store(row + 2, bad.to(tl.float64) * weight)
    tl.store(row + 3, nans.to(tl.float64) * weight)
    tl.store(row + 4, top.to(tl.float64))


@triton.jit
def _moments(address, count, DTYPE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Sum, sum of squares (float64), non-finite and nan count (int32) and abs-max (float32) of `count` elements.

    Whole words of 16 bytes are read, `WIDTH` elements each. The first and the last may hold elements of other
    tensors, which are masked; no memory is given out in smaller parts.
    """
    before = ((address % 16) // (16 // WIDTH)).to(tl.int32)
    words = tl.multiple_of((address - address % 16).to(tl.pointer_type(DTYPE)), 16)
    stop = before + count
    end = (stop + WIDTH - 1) // WIDTH * WIDTH
    offsets = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.full([], 0.0, tl.float64)
    squares = tl.full([], 0.0, tl.float64)
    bad = tl.zeros([ROWS], tl.int32)
    nans = tl.zeros([ROWS], tl.int32)
    top = tl.full([], 0.0, tl.float32)
    first = 0
    while first < stop:
        at = first + offsets
        x = tl.load(words + at, mask=at < end, other=0.0).to(tl.float32)
        x = tl.where((at >= before) & (at < stop), x, 0.0)
        finite = tl.abs(x) < float("inf")
        bad += tl.sum((finite == 0).to(tl.int32), axis=1)
        nans += tl.sum((x != x).to(tl.int32), axis=1)
        x = tl.where(finite, x, 0.0)
        abs_max = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
        # Its power of two; within the range where the inverse is a normal number of float32, too.
        exponent = (abs_max.to(tl.int32, bitcast=True) >> 23) - 127
        exponent = tl.minimum(tl.maximum(exponent, -126), 126)
        unit = ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
        y = x * ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        total += tl.sum(tl.sum(y, axis=1), axis=0).to(tl.float64) * unit
        squares += tl.sum(tl.sum(y * y, axis=1), axis=0).to(tl.float64) * (unit * unit)
        top = tl.maximum(top, abs_max)
        first += ROWS * WIDTH
    return total, squares, tl.sum(bad, axis=0), tl.sum(nans, axis=0), top


@triton.jit
def _fold(partials, firsts, counts, result, FOLD: tl.constexpr):
    """One program a stream, which writes its row of the result, in the order of the columns."""
    stream = tl.program_id(0).to(tl.int64)
    stop = tl.load(firsts + stream + 1)
    total = tl.zeros([FOLD], tl.float64)
    squares = tl.zeros([FOLD], tl.float64)
    bad = tl.zeros([FOLD], tl.float64)
    nans = tl.zeros([FOLD], tl.float64)
    top = tl.zeros([FOLD], tl.float64)
    first = tl.load(firsts + stream)
    while first < stop:
        chunk = first + tl.arange(0, FOLD)
        row = partials + 5 * chunk
        total += tl.load(row, mask=chunk < stop, other=0.0)
        squares += tl.load(row + 1, mask=chunk < stop, other=0.0)
        bad += tl.load(row + 2, mask=chunk < stop, other=0.0)
        nans += tl.load(row + 3, mask=chunk < stop, other=0.0)
        top = tl.maximum(top, tl.load(row + 4, mask=chunk < stop, other=0.0))
        first += FOLD
    row = result + 7 * stream
    tl.store(row, tl.sum(total, axis=0))
    tl.store(row + 1, tl.sum(squares, axis=0))
    tl.store(row + 2, tl.sum(bad, axis=0))
    tl.store(row + 3, tl.sum(nans, axis=0))
    tl.store(row + 4, tl.load(counts + 2 * stream))
    tl.store(row + 5, tl.load(counts + 2 * stream + 1))
    tl.store(row + 6, tl.max(top, axis=0))
