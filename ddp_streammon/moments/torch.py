"""The reference for the additive figures, on any device, in plain PyTorch.

On CPU float32 is used within rows of 128 elements only and float64 from there on: PyTorch's own float32 norm of one
tensor is 1e-3 off at 20 million elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ddp_streammon.shards import Piece, Share

SUM, SQ_SUM, NONFINITE, NANS, ELEMENTS, TENSORS, ABS_MAX = range(7)
COLUMNS = 7
"""The columns of the result: six that add up over ranks, and the abs-max, which does not. nan is non-finite too."""
LARGE = 131_072
"""Pieces from this many elements on are read in place; on CPU an operation costs as much as copying 100,000."""
BLOCK = 262_144
"""Elements read at a time: 1 MiB of float32, so that the second and the third reading find them in a cache."""
EXACT = 8_192
"""Up to so many elements, float64 throughout costs nothing."""
ROW = 128
"""Elements that are added in float32, in 8 or more lanes: the few additions of a lane round by about 1e-7."""
RANGE = (1e-15, 1e15)
"""Of the largest absolute value for which float32 squares neither vanish nor overflow."""
DEVICE_BLOCK = 4_194_304
"""The same on other devices, where it bounds the memory taken beside the gradients: 32 MiB a copy."""


Source: TypeAlias = Callable[[nn.Parameter], Tensor | None]
"""The tensor to read for a parameter: its gradient, or itself; None is "no gradient"."""


def moments(
    shares: Sequence[Share],
    num_streams: int,
    source: Source,
    device: torch.device,
) -> Tensor:
    """The figures of what this rank reads.

    Non-finite values are counted and left out of the sums and the abs-max.

    Shape: [S, 7] float64 on `device`: sum, sum of squares, non-finite and nan count, elements, tensors, abs-max.
    Comm: none. Sync: none on the parameters' device (on CPU there is nothing to wait for).
    """
    if device.type == "cpu":
        rows = [[0.0] * COLUMNS for _ in range(num_streams)]
        for share in shares:
            for stream, flat, elements, tensors in _blocks(share.pieces, source):
                _add(rows[stream], flat, share.weight)
                rows[stream][ELEMENTS] += elements * share.weight
                rows[stream][TENSORS] += tensors * share.weight
        return torch.tensor(rows, dtype=torch.float64, device="cpu")
    return _on_device(shares, num_streams, source, device)


def _on_device(
    shares: Sequence[Share],
    num_streams: int,
    source: Source,
    device: torch.device,
) -> Tensor:
    """`moments` without waiting for the device: every number but the counts stays there."""
    table = torch.zeros(num_streams, COLUMNS, dtype=torch.float64, device=device)
    counts = torch.zeros(num_streams, COLUMNS, dtype=torch.float64, device="cpu")
    for share in shares:
        for stream, flat, elements, tensors in _blocks(share.pieces, source):
            counts[stream, ELEMENTS] += elements * share.weight
            counts[stream, TENSORS] += tensors * share.weight
            for block in torch.split(flat, DEVICE_BLOCK):
                sums, abs_max = _device_block(block)
                table[stream, : len(sums)].add_(sums.to(device, non_blocking=True), alpha=share.weight)
                abs_max = abs_max.to(device, non_blocking=True)
                table[stream, ABS_MAX] = torch.maximum(table[stream, ABS_MAX], abs_max)
    return table + counts.to(device, non_blocking=True)


@dataclass
class _Group:
    """Pieces of one stream, dtype and device that are read as one."""

    tensors: list[Tensor] = field(default_factory=list)
    size: int = 0
    elements: int = 0
    count: int = 0

    def flat(self) -> Tensor:
        """All of them in whole rows; the zeros at the end change no sum and no largest value."""
        first = self.tensors[0]
        padding = -self.size % ROW
        if len(self.tensors) == 1 and not padding:
            return first
        return torch.cat([*self.tensors, first.new_zeros(padding)])


def _blocks(pieces: Iterable[Piece], source: Source) -> Iterable[tuple[int, Tensor, int, int]]:
    """(stream, flat values, elements, tensors) for what has a value: large pieces in place, others copied together.

    A large piece comes in whole rows, its rest with the others. A tensor is counted with the piece that begins with its
    first element.
    """
    groups: dict[tuple[int, torch.dtype, torch.device], _Group] = {}
    for piece in pieces:
        tensor = source(piece.parameter)
        if tensor is None:
            continue
        flat, elements = _values(tensor, piece)
        size = flat.numel()
        if size >= LARGE:
            rows = size // ROW * ROW
            yield piece.stream, flat[:rows], 0, 0
            flat = flat[rows:]
            size -= rows
        key = (piece.stream, flat.dtype, flat.device)
        group = groups.get(key)
        if group is None:
            group = groups[key] = _Group()
        group.tensors.append(flat)
        group.size += size
        group.elements += elements
        group.count += piece.counts
        if group.size >= BLOCK:
            yield piece.stream, group.flat(), group.elements, group.count
            del groups[key]
    for (stream, _, _), group in groups.items():
        yield stream, group.flat(), group.elements, group.count


def _values(tensor: Tensor, piece: Piece) -> tuple[Tensor, int]:
    """The piece's values, flat, and how many elements they stand for.

    A sparse tensor's stored values are read whole by the rank that owns its first element; the elements that it
    does not store are zeros, and count.
    """
    if tensor.layout == torch.strided and tensor.is_contiguous() and not tensor.is_complex():  # nearly always
        values = tensor.view(-1)
        return values if piece.whole else values[piece.start : piece.stop], piece.stop - piece.start
    elements = (piece.stop - piece.start) * (2 if tensor.is_complex() else 1)
    if tensor.layout != torch.strided:
        stored = _stored(tensor) if tensor.layout == torch.sparse_coo else tensor.to_dense()
        owned = stored.reshape(-1) if piece.start == 0 else stored.reshape(-1)[:0]
        return _real(owned), elements
    return _real(flat(tensor)[piece.start : piece.stop]), elements


def _stored(tensor: Tensor) -> Tensor:
    """The values of a sparse tensor, those of one place added up: at its first one's row, zeros in the others' rows.

    Sync: none, where `coalesce` waits for the number of places.
    """
    if tensor.is_coalesced():
        return tensor.values()
    indices, values = tensor._indices(), tensor._values()
    place = torch.zeros_like(indices[0])
    for index, size in zip(indices, tensor.shape, strict=False):  # dimensions that are not sparse have no index
        place = place * size + index
    return torch.zeros_like(values).index_add_(0, torch.searchsorted(place.sort().values, place), values)


def _real(values: Tensor) -> Tensor:
    """Complex values as their real and imaginary parts, which count as two elements."""
    return torch.view_as_real(values.resolve_conj()).reshape(-1) if values.is_complex() else values


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor as one dimension without a copy where its memory has no gaps (channels_last included)."""
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).reshape(-1)


def _add(row: list[float], flat: Tensor, weight: float) -> None:
    """Add the sums of a CPU tensor of whole rows to `row`."""
    in_rows = len(flat) > EXACT and flat.dtype != torch.float64
    for block in (flat,) if len(flat) <= BLOCK else torch.split(flat, BLOCK):
        if not (in_rows and _add_rows(row, block.view(-1, ROW), weight)):
            _add_exactly(row, block, weight)


def _add_rows(row: list[float], table: Tensor, weight: float) -> bool:
    """Add the sums of [N, ROW] values: float32 within a row, float64 from there on; a third of the time.

    False, and nothing is added, where float32 would not do: non-finite values, and those whose squares leave its
    range.
    """
    table = table.float()
    low, high = torch.aminmax(table)
    abs_max = max(-low.item(), high.item())
    if not RANGE[0] < abs_max < RANGE[1]:  # nan is in no range
        return False
    norms = torch.linalg.vector_norm(table, dim=1).double()
    row[SUM] += table.sum(dim=1).sum(dtype=torch.float64).item() * weight
    row[SQ_SUM] += torch.dot(norms, norms).item() * weight
    row[ABS_MAX] = max(row[ABS_MAX], abs_max)
    return True


def _add_exactly(row: list[float], block: Tensor, weight: float) -> None:
    """Add the sums of a block in float64, its non-finite values counted and left out."""
    wide = block.double()
    sq_sum = torch.dot(wide, wide).item()
    if not math.isfinite(sq_sum):
        finite = torch.isfinite(block)
        row[NONFINITE] += (block.numel() - int(finite.sum())) * weight
        row[NANS] += int(torch.isnan(block).sum()) * weight
        block = block[finite]
        wide = block.double()
        sq_sum = torch.dot(wide, wide).item()
    if block.numel():
        low, high = torch.aminmax(block)
        row[SUM] += wide.sum().item() * weight
        row[SQ_SUM] += sq_sum * weight
        row[ABS_MAX] = max(row[ABS_MAX], -low.item(), high.item())


def _device_block(flat: Tensor) -> tuple[Tensor, Tensor]:
    """([4] sum, sum of squares, non-finite and nan count, [] abs-max), float64, without waiting for the device."""
    finite = torch.isfinite(flat)
    values = torch.where(finite, flat, 0).double()
    counts = (~finite).sum().double(), flat.isnan().sum().double()
    sums = torch.stack([values.sum(), values.square().sum(), *counts])
    return sums, torch.linalg.vector_norm(values, math.inf) if values.numel() else values.sum()
