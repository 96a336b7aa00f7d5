"""Clipping by norms that the packet of the step already holds: the gradients are not read again for them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ddp_streammon.moments import NANS, NONFINITE, SQ_SUM
from ddp_streammon.shards import local
from ddp_streammon.streams import StreamSet

EPSILON = 1e-6
"""Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does (torch/nn/utils/clip_grad.py)."""


def norms_of(moments: Tensor) -> Tensor:
    """The L2 norm of each stream; inf or nan where an element is, as PyTorch has it.

    Shape: moments [S, M] over all ranks in, [S] float64 out. Comm, Sync: none.
    """
    norms = moments[:, SQ_SUM].sqrt()
    norms = torch.where(moments[:, NONFINITE] > 0, math.inf, norms)
    return torch.where(moments[:, NANS] > 0, math.nan, norms)


@torch.no_grad()
def clip_(streams: StreamSet, moments: Tensor, max_norm: float, *, per_stream: bool) -> Tensor:
    """Scale the gradients in place so that their norm is at most `max_norm`: of all together, or of each stream.

    Shape: moments [S, M] over all ranks in; the norm before, [] or [S], out, on the same device. Comm, Sync: none.
    """
    norms = norms_of(moments)
    if per_stream:
        for number, stream in enumerate(streams.streams):
            _scale([p.parameter.grad for p in stream.parameters], max_norm, norms[number])
        return norms
    total = norms.square().sum().sqrt()
    _scale([p.parameter.grad for stream in streams.streams for p in stream.parameters], max_norm, total)
    return total


def _scale(gradients: Iterable[Tensor | None], max_norm: float, norm: Tensor) -> None:
    coefficient = (max_norm / (norm + EPSILON)).clamp(max=1.0)
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        if gradient is None:
            continue
        gradient = local(gradient)
        if gradient.layout == torch.strided and not gradient.is_conj() and not gradient.is_neg():
            groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
        else:
            gradient.mul_(coefficient.to(gradient.device))
    for (device, dtype), members in groups.items():
        torch._foreach_mul_(members, coefficient.to(device, dtype.to_real()))
