"""Every gradient on a CUDA device read once, by one kernel; a second folds what it found into figures per stream.

A program of the first reads a chunk, a run of elements of one piece. Where the chunks begin within the pieces
never changes; where the pieces lie in memory, and as what, is a small table, sent again when one moved, came or went.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from operator import attrgetter
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor
from triton import language as tl

from ddp_streammon.moments.torch import ABS_MAX, COLUMNS, Source, moments
from ddp_streammon.shards import Piece, Share

CHUNKS = (16_384, 131_072)
"""Elements of a chunk, at least and at most. Within them the number of chunks is kept near `ENOUGH_CHUNKS`: on an H100
chunks of 65,536 were the fastest for 22 M elements, of 131,072 for 172 M (`python -m tests.benchmarks.statistics`)."""
ENOUGH_CHUNKS = 512
"""An H100 runs some 400 at a time."""
WARPS, FOLD_WARPS = 16, 8
MAX_CHUNKS = 8_192
"""Models with more have larger chunks still: so many go evenly over an H100, and are folded, 40 bytes each, in
microseconds."""
ROWS = 512
"""Words of 16 bytes, the widest load, that a program reads at a time: one a thread. With four a thread reading is a
third slower, since a multiprocessor of an H100 has no registers left for other programs."""
FOLD = 1_024
"""Chunks that a program folds at a time."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the kernel reads, by the code that it knows it by."""

_Places: TypeAlias = tuple[Any, ...]
"""Whatever changes when a tensor moves, comes, goes, or lies otherwise in its place."""


class TritonMoments:
    """`moments` of the same shares again and again, in two launches.

    The kernel reads float32, bfloat16 and float16 without gaps in memory, whatever their alignment; the rest (sparse,
    complex, float64, strided, on another device) goes to `moments`. While nothing moves nothing is sent to the
    device. No tensor is kept. Runs on the current CUDA stream. The same input gives the same bits.

    Accuracy: float64 throughout, where squares of float32 neither vanish nor overflow.
    """

    def __init__(self, shares: Sequence[Share], num_streams: int, device: torch.device) -> None:
        self._device = torch.empty(0, dtype=torch.uint8, device=device).device  # "cuda" gets its number
        self._num_streams = num_streams
        entries = sorted(((p, share.weight) for share in shares for p in share.pieces), key=lambda e: e[0].stream)
        self._pieces = [piece for piece, _ in entries]
        self._parameters = [piece.parameter for piece in self._pieces]
        self._weights = [weight for _, weight in entries]
        self._chunk_size = chunk_size([piece.stop - piece.start for piece in self._pieces])
        chunks, firsts = _chunks(self._pieces, num_streams, self._chunk_size)
        self._chunks, self._firsts = chunks.to(self._device), firsts.to(self._device)
        """[C, 2] int64, by stream: the piece's number, the first element within the piece; and [S + 1] int64: where
        each stream's chunks begin, and where the last one's end."""
        self._weight_of = torch.tensor(self._weights, dtype=torch.float64, device=self._device)
        # The counts, 16 bytes a stream, go first: what follows is then aligned as kernels are compiled for.
        self._table = torch.zeros(2 * num_streams + 3 * len(entries), dtype=torch.int64, device=self._device)
        """What changes: of each stream two float64, the elements and tensors that the kernel reads, weighed; of each
        piece its address, elements (0 where there is nothing to read), and kind."""
        self._places: _Places | None = None
        self._others: tuple[Share, ...] = ()
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, source: Source) -> Tensor:
        """The figures now.

        Shape: [S, 7] float64 on the device, as `moments`.
        Comm: none. Sync: none.
        """
        others = self.find(source)
        result = self.read()
        if not others:
            return result
        rest = moments(others, self._num_streams, source, self._device)
        abs_max = torch.maximum(result[:, ABS_MAX], rest[:, ABS_MAX])
        return torch.cat([(result + rest)[:, :ABS_MAX], abs_max[:, None]], dim=1)

    def find(self, source: Source) -> tuple[Share, ...]:
        """Tell the device where the tensors are, if any has moved. What `read` leaves out. Sync: none."""
        self._follow_stream()
        tensors = list(map(source, self._parameters))
        places = _places(tensors)
        if places != self._places:
            self._others = self._send(tensors)
            self._places = places
        return self._others

    def read(self) -> Tensor:
        """The figures of what `find` found, as `moments`. Two launches, always the same. Comm, Sync: none."""
        streams = self._num_streams
        partials = torch.empty(len(self._chunks), 5, dtype=torch.float64, device=self._device)
        result = torch.empty(streams, COLUMNS, dtype=torch.float64, device=self._device)
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            if len(self._chunks):
                pieces = self._table[2 * streams :]
                _read[(len(self._chunks),)](
                    self._chunks, self._weight_of, pieces, partials, self._chunk_size, ROWS=ROWS, num_warps=WARPS
                )
            if streams:
                counts = self._table[: 2 * streams].view(torch.float64)
                _fold[(streams,)](partials, self._firsts, counts, result, FOLD=FOLD, num_warps=FOLD_WARPS)
        return result

    def _follow_stream(self) -> None:
        """What the last CUDA stream is at goes before what this one will be sent."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)
            self._stream = stream

    def _send(self, tensors: Sequence[Tensor | None]) -> tuple[Share, ...]:
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
        numbers = torch.tensor(counts, dtype=torch.float64, device="cpu").view(torch.int64).view(-1)
        host = torch.cat([numbers, torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1)])
        # From pinned memory, which PyTorch reuses only after it was sent.
        self._table.copy_(host.pin_memory() if self._device.type == "cuda" else host, non_blocking=True)
        return tuple(Share(tuple(pieces), weight) for weight, pieces in others.items())

    def _readable(self, tensor: Tensor) -> bool:
        known = tensor.layout is torch.strided and tensor.dtype in KINDS
        return known and tensor.device == self._device and dense(tensor)


def _places(tensors: Sequence[Tensor | None]) -> _Places:
    """Where tensors are and how they lie there, in few calls: strides of those alone that are not contiguous."""
    present = [tensor for tensor in tensors if tensor is not None]
    missing = tuple(n for n, t in enumerate(tensors) if t is None) if len(present) < len(tensors) else ()
    dtypes = list(map(attrgetter("dtype"), present))
    try:
        contiguous = list(map(Tensor.is_contiguous, present))
        addresses = list(map(Tensor.data_ptr, present))
    except RuntimeError:  # sparse tensors have neither
        dense = [tensor if tensor.layout is torch.strided else None for tensor in present]
        return (missing, *_places(dense), [tensor.layout for tensor in present])
    strides = [t.stride() for t, simple in zip(present, contiguous, strict=True) if not simple]
    return missing, dtypes, contiguous, strides, addresses


def chunk_size(sizes: Sequence[int]) -> int:
    """Elements of a chunk for pieces of these sizes: see `CHUNKS` and `MAX_CHUNKS`."""
    size, largest = CHUNKS
    while (size < largest and sum(sizes) > size * ENOUGH_CHUNKS) or sum(sizes) > size * MAX_CHUNKS:
        size *= 2
    return size


def _chunks(pieces: Sequence[Piece], num_streams: int, size: int) -> tuple[Tensor, Tensor]:
    """Where chunks begin, for pieces in the order of their streams: see `TritonMoments._chunks` and `_firsts`."""
    counts = torch.tensor([-(-(piece.stop - piece.start) // size) for piece in pieces], dtype=torch.int64, device="cpu")
    piece = torch.repeat_interleave(counts)
    start = (torch.arange(len(piece), device="cpu") - (counts.cumsum(0) - counts)[piece]) * size
    stream = torch.tensor([piece.stream for piece in pieces], dtype=torch.int64, device="cpu")[piece]
    return torch.stack([piece, start], dim=1), torch.searchsorted(stream, torch.arange(num_streams + 1, device="cpu"))


def dense(tensor: Tensor) -> bool:
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
    tensors, which are masked; no memory is given out in smaller parts. Only where a sum shows that something is not
    finite is the chunk read again, from a cache, to count it and to leave it out.
    """
    tile: tl.constexpr = ROWS * WIDTH
    before = ((address % 16) // (16 // WIDTH)).to(tl.int32)
    words = tl.multiple_of((address - address % 16).to(tl.pointer_type(DTYPE)), 16)
    stop = before + count
    offsets = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([ROWS], tl.float64)
    squares = tl.zeros([ROWS], tl.float64)
    top = tl.zeros([ROWS], tl.float32)
    first = 0
    last = (stop - 1) // tile * tile
    while first < stop:  # the first tile and the last, whose ends are masked
        x = _masked(words, first + offsets, before, stop, WIDTH)
        total, squares, top = _add(x, total, squares, top)
        first = tl.where(first == last, stop, last)
    first = tile
    while first < last:
        x = tl.load(words + (first + offsets)).to(tl.float32)
        total, squares, top = _add(x, total, squares, top)
        first += tile
    bad = tl.zeros([ROWS], tl.int32)
    nans = tl.zeros([ROWS], tl.int32)
    if (tl.sum(squares, axis=0) < float("inf")) == 0:
        total = tl.zeros([ROWS], tl.float64)
        squares = tl.zeros([ROWS], tl.float64)
        top = tl.zeros([ROWS], tl.float32)
        first = 0
        while first < stop:
            x = _masked(words, first + offsets, before, stop, WIDTH)
            finite = tl.abs(x) < float("inf")
            bad += tl.sum((finite == 0).to(tl.int32), axis=1)
            nans += tl.sum((x != x).to(tl.int32), axis=1)
            total, squares, top = _add(tl.where(finite, x, 0.0), total, squares, top)
            first += tile
    return (
        tl.sum(total, axis=0),
        tl.sum(squares, axis=0),
        tl.sum(bad, axis=0),
        tl.sum(nans, axis=0),
        tl.max(top, axis=0),
    )


@triton.jit
def _masked(words, at, before, stop, WIDTH: tl.constexpr):
    """The elements from `before` to `stop` among those at these places, as float32; zeros for the others."""
    end = (stop + WIDTH - 1) // WIDTH * WIDTH
    x = tl.load(words + at, mask=at < end, other=0.0).to(tl.float32)
    return tl.where((at >= before) & (at < stop), x, 0.0)


@triton.jit
def _add(x, total, squares, top):
    """Adds a tile to sums of each row; squares of float32 neither vanish nor overflow in float64."""
    wide = x.to(tl.float64)
    total += tl.sum(wide, axis=1)
    squares += tl.sum(wide * wide, axis=1)
    return total, squares, tl.maximum(top, tl.max(tl.abs(x), axis=1))


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
