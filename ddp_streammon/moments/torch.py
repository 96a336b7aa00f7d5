"""The reference for the additive figures, on any device, in plain PyTorch.

Accumulation is in float64: a float32 norm of one tensor is 1e-3 off at 20 million elements on CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ddp_streammon.shards import Piece, Share

SUM, SQ_SUM, NONFINITE, ELEMENTS, TENSORS, ABS_MAX = range(6)
COLUMNS = 6
"""The columns of the result: five that add up over ranks, and the abs-max, which does not."""
SMALL = 16_384
"""Pieces up to this many elements are read as one: on CPU an operation costs 1.5 us, as much as 10,000 elements."""
BLOCK = 65_536
"""Elements converted to float64 at a time: 512 KiB, so that the three reads of a block stay in the cache."""
DEVICE_BLOCK = 4_194_304
"""The same on other devices, where it bounds the memory taken beside the gradients: 32 MiB a copy."""


def moments(
    shares: Sequence[Share],
    num_streams: int,
    source: Callable[[torch.nn.Parameter], Tensor | None],
    device: torch.device,
) -> Tensor:
    """The figures of what this rank reads.

    `source` gives the tensor to read for a parameter: its gradient, or itself; None is "no gradient". Non-finite
    values are counted and left out of the sums and the abs-max.

    Shape: [S, 6] float64 on `device`: sum, sum of squares, non-finite count, elements, tensors, abs-max.
    Comm: none. Sync: none on the parameters' device (on CPU there is nothing to wait for).
    """
    if device.type == "cpu":
        rows = [[0.0] * COLUMNS for _ in range(num_streams)]
        for share in shares:
            for stream, flat, elements, tensors in _blocks(share.pieces, source):
                _add_block(rows[stream], flat, share.weight)
                rows[stream][ELEMENTS] += elements * share.weight
                rows[stream][TENSORS] += tensors * share.weight
        return torch.tensor(rows, dtype=torch.float64)
    return _on_device(shares, num_streams, source, device)


def _on_device(
    shares: Sequence[Share],
    num_streams: int,
    source: Callable[[torch.nn.Parameter], Tensor | None],
    device: torch.device,
) -> Tensor:
    """`moments` without waiting for the device: every number but the counts stays there."""
    table = torch.zeros(num_streams, COLUMNS, dtype=torch.float64, device=device)
    counts = torch.zeros(num_streams, COLUMNS, dtype=torch.float64)
    for share in shares:
        for stream, flat, elements, tensors in _blocks(share.pieces, source):
            counts[stream, ELEMENTS] += elements * share.weight
            counts[stream, TENSORS] += tensors * share.weight
            for block in torch.split(flat, DEVICE_BLOCK):
                sums, abs_max = _device_block(block)
                table[stream, : len(sums)].add_(sums, alpha=share.weight)
                table[stream, ABS_MAX] = torch.maximum(table[stream, ABS_MAX], abs_max)
    return table + counts.to(device, non_blocking=True)


def _blocks(
    pieces: Iterable[Piece], source: Callable[[torch.nn.Parameter], Tensor | None]
) -> Iterable[tuple[int, Tensor, int, int]]:
    """(stream, flat values, elements, tensors) for what has a value; small pieces of one stream as one block.

    A tensor is counted by the rank that reads its first element.
    """
    small: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    counts: dict[tuple[int, torch.dtype], tuple[int, int]] = {}
    for piece in pieces:
        tensor = source(piece.parameter)
        if tensor is None:
            continue
        first = int(piece.start == 0)
        flat, elements = _values(tensor, piece)
        if flat.numel() > SMALL:
            yield piece.stream, flat, elements, first
        else:
            key = (piece.stream, flat.dtype)
            small.setdefault(key, []).append(flat)
            known = counts.get(key, (0, 0))
            counts[key] = (known[0] + elements, known[1] + first)
    for key, tensors in small.items():
        flat = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        yield key[0], flat, *counts[key]


def _values(tensor: Tensor, piece: Piece) -> tuple[Tensor, int]:
    """The piece's values, flat, and how many elements they stand for.

    A sparse tensor's stored values are read whole by the rank that owns its first element; the elements that it
    does not store are zeros, and count.
    """
    elements = (piece.stop - piece.start) * (2 if tensor.is_complex() else 1)
    if tensor.layout != torch.strided:
        stored = tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor.to_dense()
        owned = stored.reshape(-1) if piece.start == 0 else stored.reshape(-1)[:0]
        return _real(owned), elements
    return _real(_flat(tensor)[piece.start : piece.stop]), elements


def _real(flat: Tensor) -> Tensor:
    """Complex values as their real and imaginary parts, which count as two elements."""
    return torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor as one dimension without a copy where its memory has no gaps (channels_last included)."""
    tensor = tensor.detach()
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return tensor.reshape(-1)


def _add_block(row: list[float], flat: Tensor, weight: float) -> None:
    """Add the sums of a CPU tensor to `row`."""
    for start in range(0, flat.numel(), BLOCK):
        block = flat[start : start + BLOCK]
        wide = block.double()
        sq_sum = torch.dot(wide, wide).item()
        if not math.isfinite(sq_sum):
            finite = torch.isfinite(block)
            row[NONFINITE] += (block.numel() - int(finite.sum())) * weight
            block = block[finite]
            wide = block.double()
            sq_sum = torch.dot(wide, wide).item()
        if block.numel():
            low, high = torch.aminmax(block)
            row[SUM] += wide.sum().item() * weight
            row[SQ_SUM] += sq_sum * weight
            row[ABS_MAX] = max(row[ABS_MAX], -low.item(), high.item())


def _device_block(flat: Tensor) -> tuple[Tensor, Tensor]:
    """([3] sum, sum of squares and non-finite count, [] abs-max), float64, without waiting for the device."""
    finite = torch.isfinite(flat)
    values = torch.where(finite, flat, 0).double()
    sums = torch.stack([values.sum(), values.square().sum(), (~finite).sum().double()])
    return sums, torch.linalg.vector_norm(values, math.inf) if values.numel() else values.sum()
