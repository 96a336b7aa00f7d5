"""Gradients that are sums still to be taken over ranks: they travel as they are, and are squared after the sum.

Sequence parallelism leaves the gradients of norm weights `Partial`: each rank holds a summand, and the square of a sum
is not the sum of squares. Such tensors are small, so their elements have cells of their own in the packet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard

from ddp_streammon.moments import ABS_MAX, COLUMNS, ELEMENTS, NANS, NONFINITE, SQ_SUM, SUM, TENSORS
from ddp_streammon.streams import StreamSet

LIMIT = 262_144
"""Elements that may travel this way, all tensors together: 2 MiB of packet."""


@dataclass(frozen=True, order=True)
class Linear:
    """A parameter whose gradient is summed before it is squared; `size` is its number of elements on all ranks."""

    name: str
    stream: int
    size: int


def find(streams: StreamSet) -> tuple[Linear, ...]:
    """The parameters whose present gradients are `Partial`. Comm: none.

    Errors: ValueError, by name, where there are too many elements or a gradient is laid out in another way than its
    parameter.
    """
    found = []
    for number, stream in enumerate(streams.streams):
        for item in stream.parameters:
            if _partial_dimensions(item.name, item.parameter):
                _offset(item.name, item.parameter)
                found.append(Linear(item.name, number, item.parameter.numel()))
    check_size(found)
    return tuple(found)


def check_size(tensors: Sequence[Linear]) -> None:
    """ValueError where more than `LIMIT` elements would travel."""
    total = sum(tensor.size for tensor in tensors)
    if total > LIMIT:
        largest = max(tensors, key=lambda tensor: tensor.size)
        raise ValueError(
            f"{len(tensors)} parameters with {total} elements have Partial gradients, the largest is {largest.name} "
            f"with {largest.size}; at most {LIMIT} elements can be summed in the packet. Reduce these gradients in the "
            "backward pass (parameters that a tensor parallel style places Shard or Replicate), or leave them out"
        )


def cells(
    tensors: Sequence[Linear],
    parameters: Mapping[str, nn.Parameter],
    copies: Mapping[int, int],
    inverse_scale: float | Tensor,
    device: torch.device,
) -> Tensor:
    """This rank's summands. `copies`: how many ranks hold the same part, by the parameter's id.

    Shape: [sum of (size + 1)] float64: the elements, and one cell that says that there is a gradient. Comm, Sync: none.
    """
    result = torch.zeros(cell_count(tensors), dtype=torch.float64, device=device)
    start = 0
    for tensor in tensors:
        stop = start + tensor.size + 1
        parameter = parameters.get(tensor.name)
        if parameter is not None and isinstance(parameter.grad, DTensor):
            partial = _partial_dimensions(tensor.name, parameter)
            summed = math.prod(parameter.grad.device_mesh.shape[dimension] for dimension in partial)
            part = parameter.grad.to_local().reshape(-1)
            first = start + _offset(tensor.name, parameter)
            result[first : first + len(part)] = part.double() * (inverse_scale * (summed / copies[id(parameter)]))
            result[stop - 1] = 1.0
        start = stop
    return result


def cell_count(tensors: Sequence[Linear]) -> int:
    """Cells of the packet that these tensors take."""
    return sum(tensor.size + 1 for tensor in tensors)


def moments(tensors: Sequence[Linear], summed: Tensor, num_streams: int) -> Tensor:
    """The additive figures of the tensors, from the cells' sum over ranks.

    Shape: [sum of (size + 1)] in, [S, M] float64 out, on the same device. Comm, Sync: none.
    """
    table = summed.new_zeros(num_streams, COLUMNS)
    parts = torch.split(summed, [size for tensor in tensors for size in (tensor.size, 1)])
    for tensor, values, present in zip(tensors, parts[::2], parts[1::2], strict=True):
        finite = values.isfinite()
        kept = torch.where(finite, values, 0.0)
        row = table[tensor.stream]
        row[SUM] += kept.sum()
        row[SQ_SUM] += kept.square().sum()
        row[NONFINITE] += (~finite).sum()
        row[NANS] += values.isnan().sum()
        row[ELEMENTS] += (present[0] > 0) * tensor.size
        row[TENSORS] += present[0] > 0
        row[ABS_MAX] = torch.maximum(row[ABS_MAX], kept.abs().max() if tensor.size else row[ABS_MAX])
    return table


def _partial_dimensions(name: str, parameter: nn.Parameter) -> tuple[int, ...]:
    """The mesh dimensions along which the gradient of `parameter` is still to be summed."""
    gradient = parameter.grad
    if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
        return ()
    pairs = enumerate(zip(parameter.placements, gradient.placements, strict=True))
    differing = [(dimension, mine, its) for dimension, (mine, its) in pairs if mine != its]
    for _, mine, its in differing:
        if not (isinstance(its, Partial) and its.reduce_op == "sum"):
            raise ValueError(
                f"the gradient of {name} is placed {its} where the parameter is placed {mine}: only gradients that are "
                "placed like their parameter, or Partial(sum), can be measured; redistribute it, or leave it out"
            )
    return tuple(dimension for dimension, _, _ in differing)


def _offset(name: str, parameter: nn.Parameter) -> int:
    """Where this rank's part begins among the parameter's elements."""
    assert isinstance(parameter, DTensor)
    rows, offset = parameter.shape[0] if parameter.dim() else 1, 0
    coordinate = parameter.device_mesh.get_coordinate() or ()
    for placement, parts, index in zip(parameter.placements, parameter.device_mesh.shape, coordinate, strict=True):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard or placement.dim != 0:
            raise ValueError(
                f"the gradient of {name} is Partial and the parameter is placed {placement}: a part that is no run of "
                "rows cannot be summed in the packet; shard it along its first dimension"
            )
        size = -(-rows // parts)  # as torch.chunk cuts
        first = min(index * size, rows)
        offset, rows = offset + first, min(size, rows - first)
    return offset * math.prod(parameter.shape[1:])
