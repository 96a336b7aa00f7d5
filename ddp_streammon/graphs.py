"""Device work that is the same at every step, recorded once as a CUDA graph: one launch instead of dozens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch

WARM_UP = 2
"""Times that work is done as it comes before it is recorded: kernels are compiled and chosen in the first."""
KEPT = 8
"""Graphs that are kept at a time; each holds the memory of its intermediate results."""


class Graphs:
    """Runs work of which a key says that it is the same: the same operations on the same memory.

    Each rank records for itself, nothing that communicates is recorded, and what other threads do in the meantime is
    left alone (capture mode `thread_local`). On CPU work is done as it comes. Where recording fails there is one
    warning, and from then on it is done as it comes, too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._works = device.type == "cuda"
        self._times: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, key: Hashable, work: Callable[[], object]) -> None:
        """Do the work, which is queued on the current stream. Comm: none. Sync: none (recording may wait, once)."""
        graph = self._graphs.get(key)
        if graph is None and self._works:
            graph = self._recorded(key, work)
        if graph is None:
            work()
        else:
            graph.replay()

    def _recorded(self, key: Hashable, work: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
        times = self._times[key] = self._times.get(key, 0) + 1
        if times <= WARM_UP:
            return None
        if len(self._graphs) >= KEPT:
            self._graphs.clear()
            self._times.clear()
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(side):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
        except Exception as error:
            self._works = False
            warnings.warn(
                f"a monitored step could not be recorded as a CUDA graph: {type(error).__name__}: {error}. From now on "
                "its kernels are launched one by one: the same figures, with more time on the host",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        self._graphs[key] = graph
        return graph
