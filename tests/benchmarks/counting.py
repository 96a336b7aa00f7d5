"""What a call does, counted: operations, kernels, waits, collectives, memory."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks.timing import Call

READ = "aten::_local_scalar_dense"
"""What `.item()` and everything like it ends in."""
WAIT = "synchronizing CUDA operation"
"""What PyTorch's warning of a wait says."""


@dataclass(frozen=True)
class Counts:
    """Of one call. `ops` are counted on CPU, the others that may be None on CUDA.

    `kernels` is None too where the profiler is not allowed to see the device. `peak_bytes`: above what was allocated.
    """

    ops: int | None
    kernels: int | None
    syncs: int
    """On CUDA the waits that PyTorch warns of; on CPU the numbers read by `.item()`, where nothing waits."""
    collectives: int
    peak_bytes: int | None


class _Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts dispatched operations by namespace, numbers that are read apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.namespaces: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is not torch.ops.aten._local_scalar_dense.default:
            self.namespaces[function.namespace] += 1
        return function(*args, **(kwargs or {}))


def dispatched(call: Call) -> Counter[str]:
    """Operations of one call by namespace: `aten` computes, `c10d` are collectives. Hidden ones are not seen."""
    mode = _Dispatched()
    with mode:
        call()
    return mode.namespaces


def traced(call: Call, activities: list[ProfilerActivity]) -> Counter[tuple[str, str]]:
    """(category, name) of everything in the profiler's trace of one call."""
    with profile(activities=activities) as profiled:
        call()
        if ProfilerActivity.CUDA in activities:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return Counter((event["cat"], event["name"]) for event in events if "cat" in event)


def counts(call: Call, device: torch.device) -> Counts:
    """Runs the call a few times and counts."""
    call()
    namespaces = dispatched(call)
    if device.type == "cpu":
        reads = traced(call, [ProfilerActivity.CPU])["cpu_op", READ]
        return Counts(namespaces["aten"], None, reads, namespaces["c10d"], None)
    torch.cuda.synchronize()
    waits, peak = _waits(call), _peak(call)
    trace = traced(call, [ProfilerActivity.CPU, ProfilerActivity.CUDA])
    kernels = sum(number for (category, _), number in trace.items() if category == "kernel")
    return Counts(None, kernels or None, waits, namespaces["c10d"], peak)


def _waits(call: Call) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return sum(WAIT in str(warning.message) for warning in caught)


def _peak(call: Call) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
