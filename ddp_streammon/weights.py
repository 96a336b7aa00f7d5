"""Norms and means of the streams' weights: each tensor read by one rank only, one all_reduce."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ddp_streammon import keys
from ddp_streammon.collective import Collective
from ddp_streammon.moments import ELEMENTS, NONFINITE, SQ_SUM, SUM, reader
from ddp_streammon.packet import Field, Layout
from ddp_streammon.shards import Share, local
from ddp_streammon.stats import Figures, ratio
from ddp_streammon.streams import StreamSet

_SQ_SUM, _TENSOR_MEANS, _MATRIX_SUM, _MATRIX_ELEMENTS, _ELEMENTS, _NONFINITE = range(6)


@dataclass(frozen=True)
class _Tensor:
    """A weight, and the stream (by number) that it counts for."""

    stream: int
    parameter: nn.Parameter


def weight_figures(
    streams: StreamSet, shares: Sequence[Share], collective: Collective, device: torch.device
) -> Figures:
    """Figures of the tensors whose own name holds `weight`: kernels, matrices and norm layers' gammas, no biases.

    `X_weight_norm` is the L2 norm over all of them; `X_weight_mean` the mean over tensors of each tensor's mean,
    which on a fresh model is near 0.5 where half of the tensors are gammas (all ones); `X_weight_element_mean` the
    mean over the elements of matrices and kernels. The ratio is a's norm over b's. nan: no such tensor, or one
    of its elements is not finite. All of them change when a layer is scaled up and the next one down, though the
    function stays the same (the ratio went from 0.96 to 2.86, measured on HTAD in this project): they rank no streams.

    Comm: one all_reduce(SUM). Sync: none until a figure is read.
    """
    tensors = [
        _Tensor(number, item.parameter)
        for number, stream in enumerate(streams.streams)
        for item in stream.parameters
        if "weight" in item.name.rsplit(".", 1)[-1]
    ]
    index = {id(tensor.parameter): place for place, tensor in enumerate(tensors)}
    by_tensor = [
        Share(
            tuple(replace(p, stream=index[id(p.parameter)]) for p in share.pieces if id(p.parameter) in index),
            share.weight,
        )
        for share in shares
    ]
    table = reader(by_tensor, len(tensors), device)(lambda parameter: local(parameter.detach()))
    shape = (len(streams.streams), 6)
    cells = torch.zeros(shape, dtype=torch.float64, device=device)
    if tensors:
        cells.index_add_(0, torch.tensor([t.stream for t in tensors], device=device), _cells(tensors, table))
    names = streams.user_names
    layout = Layout((Field("weights", shape),))
    packet = layout.pack({"weights": cells}, collective.topology.rank, device)
    reduction = collective.all_reduce(packet.to(collective.device_for(device)))

    def resolve() -> Mapping[str, float]:
        rows = layout.unpack(reduction.wait())["weights"]
        return _named(names, rows[: len(names)])

    return Figures(_keys(names), resolve)


def _cells(tensors: Sequence[_Tensor], table: Tensor) -> Tensor:
    """[P, 7] moments of what this rank read of each tensor -> [P, 6] cells that add up over tensors and ranks."""
    counts: dict[int, int] = {}
    for tensor in tensors:
        counts[tensor.stream] = counts.get(tensor.stream, 0) + 1
    mean_weights = [1.0 / (max(t.parameter.numel(), 1) * counts[t.stream]) for t in tensors]
    constants = torch.tensor(
        [[mean, float(t.parameter.dim() > 1)] for mean, t in zip(mean_weights, tensors, strict=True)],
        dtype=table.dtype,
        device=table.device,
    )
    is_matrix = constants[:, 1]
    columns = [
        table[:, SQ_SUM],
        table[:, SUM] * constants[:, 0],
        table[:, SUM] * is_matrix,
        table[:, ELEMENTS] * is_matrix,
        table[:, ELEMENTS],
        table[:, NONFINITE],
    ]
    return torch.stack(columns, dim=1)


def _keys(names: Sequence[str]) -> list[str]:
    figures = [keys.of_stream(name, figure) for name in names for figure in keys.WEIGHT_FIGURES]
    return figures + [keys.weight_ratio(a, b, names) for a, b in keys.pairs(names)]


def _named(names: Sequence[str], rows: Sequence[Sequence[float]]) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, row in zip(names, rows, strict=True):
        defined = row[_ELEMENTS] > 0 and not row[_NONFINITE]
        values[keys.of_stream(name, keys.WEIGHT_NORM)] = math.sqrt(row[_SQ_SUM]) if defined else math.nan
        values[keys.of_stream(name, keys.WEIGHT_MEAN)] = row[_TENSOR_MEANS] if defined else math.nan
        element_mean = ratio(row[_MATRIX_SUM], row[_MATRIX_ELEMENTS]) if defined else math.nan
        values[keys.of_stream(name, keys.WEIGHT_ELEMENT_MEAN)] = element_mean
    for a, b in keys.pairs(names):
        norms = (values[keys.of_stream(name, keys.WEIGHT_NORM)] for name in (a, b))
        values[keys.weight_ratio(a, b, names)] = ratio(*norms)
    return values
