"""Tensors -> additive figures on their own device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddp_streammon.moments.torch import (
    ABS_MAX,
    COLUMNS,
    ELEMENTS,
    NANS,
    NONFINITE,
    SQ_SUM,
    SUM,
    TENSORS,
    Source,
    moments,
)
from ddp_streammon.shards import Share

__all__ = [
    "ABS_MAX",
    "COLUMNS",
    "ELEMENTS",
    "NANS",
    "NONFINITE",
    "SQ_SUM",
    "SUM",
    "TENSORS",
    "Reader",
    "Source",
    "moments",
    "reader",
]

Reader = Callable[[Source], Tensor]
"""Reads what it was made for: source -> [S, 7], as `moments` does."""


def reader(shares: Sequence[Share], num_streams: int, device: torch.device) -> Reader:
    """The fastest way to read `shares` again and again on `device`: on CUDA, a kernel that reads everything once.

    Comm: none. Sync: none.
    """
    return _OneRead(shares, num_streams, device) if device.type == "cuda" else _plain(shares, num_streams, device)


def _plain(shares: Sequence[Share], num_streams: int, device: torch.device) -> Reader:
    return lambda source: moments(shares, num_streams, source, device)


class _OneRead:
    """The Triton kernel; `moments` from its first failure on, for all readers: its cause is the machine's."""

    works = True

    def __init__(self, shares: Sequence[Share], num_streams: int, device: torch.device) -> None:
        self._arguments = (shares, num_streams, device)
        self._in_plain = _plain(*self._arguments)
        self._in_one: Reader | None = None

    def __call__(self, source: Source) -> Tensor:
        if _OneRead.works:
            try:
                if self._in_one is None:
                    from ddp_streammon.moments.triton import TritonMoments

                    self._in_one = TritonMoments(*self._arguments)
                return self._in_one(source)
            except Exception as error:
                _OneRead.works = False
                warnings.warn(
                    f"the Triton kernel that reads gradients in one pass failed: {type(error).__name__}: {error}. From "
                    "now on PyTorch operations read them: the same figures, more slowly. The kernel needs a C compiler "
                    "and the triton that torch was released with (Requires-Dist of its wheel)",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return self._in_plain(source)
