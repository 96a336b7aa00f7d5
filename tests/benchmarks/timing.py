"""Times that are taken in pairs, because a machine's noise is larger than what is measured."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
PATTERN = (True, False, False, True)
"""Which of four blocks of steps are monitored: a drift of the machine hits both kinds alike."""
QUEUED_MS = 20.0
"""Work that a GPU has in hand while a call is issued, to see whether the call waits for it."""
WARM_UP = 3


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, with its 95 % interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], reference: Sequence[float]) -> Ratio:
        """values / reference, pair by pair."""
        ratios = [value / other for value, other in zip(values, reference, strict=True)]
        return cls(statistics.median(ratios), *interval(ratios))


@dataclass(frozen=True)
class Alternation:
    """Medians of monitored and plain blocks (seconds), and the ratio of the two."""

    monitored: float
    plain: float
    ratio: Ratio

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Alternation:
        """`seconds` of blocks in the order of `PATTERN`; what is left over after whole fours does not count."""
        fours = [seconds[start : start + 4] for start in range(0, len(seconds) // 4 * 4, 4)]
        monitored = [second for a, _, _, d in fours for second in (a, d)]
        plain = [second for _, b, c, _ in fours for second in (b, c)]
        ratio = Ratio.of([a + d for a, _, _, d in fours], [b + c for _, b, c, _ in fours])
        return cls(statistics.median(monitored), statistics.median(plain), ratio)


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call. The last three exist on CUDA only."""

    host: float
    """Until the call returns."""
    device: float | None = None
    """From the start to the end of its work on an idle device, launches included."""
    queued: float | None = None
    """The same on a device that has `QUEUED_MS` of other work in hand, so that launches are hidden."""
    blocked: float | None = None
    """Until the call returns in that case: near `QUEUED_MS` where it waits for the device."""


class Timer:
    """Takes the times of calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self._cycles = _cycles(QUEUED_MS) if device.type == "cuda" else 0

    def take(self, call: Call) -> Times:
        """The times of one call (of two, on CUDA). Sync: waits before and after."""
        if not self._cycles:
            start = time.perf_counter()
            call()
            return Times(1e3 * (time.perf_counter() - start))
        host, device = _on_cuda(call, 0)
        blocked, queued = _on_cuda(call, self._cycles)
        return Times(host, device, queued, blocked)

    def round_robin(self, calls: Mapping[str, Call], repeats: int) -> dict[str, list[Times]]:
        """Every call once a repeat, in an order drawn anew, so that none always follows the same neighbour."""
        draw = random.Random(0)
        for call in calls.values():
            for _ in range(WARM_UP):
                call()
        taken: dict[str, list[Times]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name in draw.sample(list(calls), len(calls)):
                taken[name].append(self.take(calls[name]))
        return taken


def _on_cuda(call: Call, cycles: int) -> tuple[float, float]:
    """Milliseconds until the call returns, and of its work on the device, behind `cycles` of sleep."""
    first, last = _event(), _event()
    torch.cuda.synchronize()
    if cycles:
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
    first.record()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    last.record()
    torch.cuda.synchronize()
    return 1e3 * host, first.elapsed_time(last)


def _cycles(milliseconds: float) -> int:
    """The clock cycles for which a GPU sleeps so long."""
    cycles = 10_000_000
    rates: list[float] = []
    for _ in range(WARM_UP):
        first, last = _event(), _event()
        first.record()
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
        last.record()
        torch.cuda.synchronize()
        rates.append(cycles / first.elapsed_time(last))
    return int(milliseconds * rates[-1])


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def median(values: Sequence[float | None]) -> float | None:
    """The median; None where there is nothing to measure."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for first, *others in (header, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)
