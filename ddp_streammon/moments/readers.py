"""The same tensors read again and again: by kernels on CUDA, by PyTorch operations elsewhere and where those fail."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ddp_streammon.moments import sample
from ddp_streammon.moments.torch import Source, moments
from ddp_streammon.shards import Share

if TYPE_CHECKING:
    from ddp_streammon.moments.triton import TritonMoments

T = TypeVar("T")


class SampleReader:
    """Adds figures of samples of batches to rows of [N, 7] float64 on `device`: at once, or with all others, later.

    Comm, Sync: none.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self.place_cells = 0
        """Numbers that say where a batch is; 0 where none can be read later."""
        if rows.is_cuda and _OneRead.works:
            try:
                from ddp_streammon.moments import sample_triton

                self._kernel = sample_triton
                self.place_cells = sample_triton.PLACE_CELLS
            except Exception as error:
                _OneRead.fail(error)

    def add(self, number: int, tensor: Tensor, *, compare: bool) -> None:
        """Now. See `sample.add_sample`."""
        place = self.place(tensor, compare=compare)
        if place is None:
            sample.add_sample(self._rows[number], tensor, compare=compare)
        else:
            said = torch.tensor(place, dtype=torch.float64, pin_memory=True, device="cpu")
            self._read(self._rows[number : number + 1], said.to(self._rows.device, non_blocking=True))

    def place(self, tensor: Tensor, *, compare: bool) -> list[float] | None:
        """Where the batch is, to be read later by `add_all`; None where that cannot read it."""
        if self.place_cells and self._kernel.can_add(self._rows.device, tensor):
            return self._kernel.place(tensor, compare=compare)
        return None

    def add_all(self, places: Tensor) -> None:
        """The batches at these places, of each row one; zeros where there is none. One launch, always the same.

        Shape: [N x place_cells].
        """
        if self.place_cells:
            self._read(self._rows, places)

    def _read(self, rows: Tensor, places: Tensor) -> None:
        try:
            self._kernel.add_samples(rows, places)
        except Exception as error:  # what was to be read in this step is not seen
            self.place_cells = 0
            _OneRead.fail(error)


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
