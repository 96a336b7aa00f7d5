"""Tensors -> additive figures on their own device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ddp_streammon.moments import sample
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

if TYPE_CHECKING:
    from ddp_streammon.moments.triton import TritonMoments

T = TypeVar("T")

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
    "add_sample",
    "moments",
    "reader",
    "sample",
]


def add_sample(row: Tensor, tensor: Tensor, *, compare: bool) -> None:
    """See `sample.add_sample`; on CUDA one launch where it can be. Comm: none. Sync: none."""
    if row.is_cuda and _OneRead.works:
        try:
            from ddp_streammon.moments import sample_triton

            if sample_triton.can_add(row, tensor):
                sample_triton.add_sample(row, tensor, compare=compare)
                return
        except Exception as error:
            _OneRead.fail(error)
    sample.add_sample(row, tensor, compare=compare)


class Reader:
    """Reads what it was made for, again and again, with PyTorch operations."""

    def __init__(self, shares: Sequence[Share], num_streams: int, device: torch.device) -> None:
        self._shares, self._num_streams, self._device = shares, num_streams, device

    def __call__(self, source: Source) -> Tensor:
        """source -> [S, 7], as `moments` does. Comm: none. Sync: none on CUDA."""
        return moments(self._shares, self._num_streams, source, self._device)

    def found(self, source: Source) -> Callable[[], Tensor] | None:
        """What reads the tensors where they are now, in launches that are the same from call to call; None where there
        is nothing of the kind. Comm: none. Sync: none."""
        return None


def reader(shares: Sequence[Share], num_streams: int, device: torch.device) -> Reader:
    """The fastest way to read `shares` again and again on `device`: on CUDA, a kernel that reads everything once.

    Comm: none. Sync: none.
    """
    return (_OneRead if device.type == "cuda" else Reader)(shares, num_streams, device)


class _OneRead(Reader):
    """The Triton kernel; `moments` from its first failure on, for all readers: its cause is the machine's."""

    works = True

    def __init__(self, shares: Sequence[Share], num_streams: int, device: torch.device) -> None:
        super().__init__(shares, num_streams, device)
        self._kernel: TritonMoments | None = None

    def __call__(self, source: Source) -> Tensor:
        table = self._try(lambda kernel: kernel(source))
        return super().__call__(source) if table is None else table

    def found(self, source: Source) -> Callable[[], Tensor] | None:
        if not self._try(lambda kernel: not kernel.find(source)):
            return None

        def read() -> Tensor:
            table = self._try(lambda kernel: kernel.read())
            return moments(self._shares, self._num_streams, source, self._device) if table is None else table

        return read

    def _try(self, call: Callable[[TritonMoments], T]) -> T | None:
        """The call's result; None once the kernel has failed."""
        if not _OneRead.works:
            return None
        try:
            if self._kernel is None:
                from ddp_streammon.moments.triton import TritonMoments

                self._kernel = TritonMoments(self._shares, self._num_streams, self._device)
            return call(self._kernel)
        except Exception as error:
            self.fail(error)
            return None

    @staticmethod
    def fail(error: Exception) -> None:
        """From now on without kernels."""
        _OneRead.works = False
        warnings.warn(
            f"the Triton kernel that reads gradients in one pass failed: {type(error).__name__}: {error}. From now on "
            "PyTorch operations read them: the same figures, more slowly. The kernel needs a C compiler and the triton "
            "that torch was released with (Requires-Dist of its wheel)",
            RuntimeWarning,
            stacklevel=4,
        )
