"""Where reports go. A fan-out of sinks is a sink, and so is a guarded one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from ddp_streammon.report import Outcome, Report, RunInfo, Sink
from ddp_streammon.sinks.console import ConsoleSink
from ddp_streammon.sinks.jsonl import JsonlSink, read_jsonl
from ddp_streammon.sinks.memory import MemorySink
from ddp_streammon.sinks.wandb import WandbSink, active_wandb_run

__all__ = [
    "ConsoleSink",
    "FanOut",
    "Guarded",
    "JsonlSink",
    "MemorySink",
    "WandbSink",
    "active_wandb_run",
    "read_jsonl",
]

_log = logging.getLogger("ddp_streammon")


class Guarded:
    """A sink whose failures cost figures, never the job.

    `open` raises what the sink raises: training has not begun, and whoever asked for the sink wants to know
    (a service that cannot be reached is the sink's own business, see WandbSink). A `write` that raises is one
    warning and turns the sink off; its `close` is still tried, quietly, so that it releases what it holds.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.on = True

    def open(self, run: RunInfo) -> None:
        """Open the sink; its errors are raised."""
        self.sink.open(run)

    def write(self, report: Report) -> None:
        """Pass the report on, unless the sink is off."""
        if self.on:
            self._try(lambda: self.sink.write(report), "write")

    def close(self, outcome: Outcome) -> None:
        """Close the sink, whether it is on or off."""
        self._try(lambda: self.sink.close(outcome), "close")

    def _try(self, call: Callable[[], None], what: str) -> None:
        try:
            call()
        except Exception as error:
            level = logging.WARNING if self.on else logging.DEBUG
            self.on = False
            _log.log(
                level,
                "%s failed in %s (%s: %s): it is off for the rest of this run, all else goes on",
                type(self.sink).__name__,
                what,
                type(error).__name__,
                error,
            )


class FanOut:
    """Several sinks as one, each of them guarded, in their order (so a local file comes before a service)."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self.sinks: tuple[Guarded | FanOut, ...] = tuple(
            sink if isinstance(sink, (Guarded, FanOut)) else Guarded(sink) for sink in sinks
        )

    def open(self, run: RunInfo) -> None:
        """Open all; the first error is raised."""
        for sink in self.sinks:
            sink.open(run)

    def write(self, report: Report) -> None:
        """Pass the report to all."""
        for sink in self.sinks:
            sink.write(report)

    def close(self, outcome: Outcome) -> None:
        """Close all."""
        for sink in self.sinks:
            sink.close(outcome)
