"""Sinks behind a guard: what goes wrong in them, or takes its time, costs figures and never the job."""

from __future__ import annotations

import atexit
import errno
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from ddp_streammon.report import Outcome, Report, RunInfo, Sink

CLOSE_SECONDS = 20.0
"""What all sinks together may take to end. torchrun kills 30 s after its SIGTERM."""
EXIT_SECONDS = 1.0
"""What a sink that nobody closed may take when the process ends, and what a checkpoint waits for its records."""
QUEUE_LENGTH = 4096
"""Reports that wait for a slow sink: about 20 MB at 50 values each."""
_FULL = (errno.ENOSPC, errno.EDQUOT)

_log = logging.getLogger("ddp_streammon")


class Guarded:
    """A sink whose failures cost figures, never the job, and whose delays cost the job nothing.

    `open` raises what the sink raises: training has not begun, and whoever asked for the sink wants to know (a
    service that cannot be reached is the sink's own business, see WandbSink; a full disk, which may come at any
    restart, is a warning). After it the sink lives in a thread of its own: `write` hands the report over and returns.
    A sink that raises is one warning and off, and its `close` is still tried, quietly, so that it releases what it
    holds. Reports that come while `QUEUE_LENGTH` others wait are dropped, counted, and told at the end. The order is
    kept. A sink with `in_callers_thread` true (after `open`) is called directly, guarded but not waited around.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.on = True
        self._tasks: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._given = self._done = self._dropped = 0

    def open(self, run: RunInfo) -> None:
        """Open the sink, here and now; its errors are raised."""
        try:
            self.sink.open(run)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._give_up("open", error)

    def write(self, report: Report) -> None:
        """Hand the report over, unless the sink is off or too many are waiting. Never blocks."""
        if not self.on:
            return
        self._given += 1
        if self._tasks.qsize() >= QUEUE_LENGTH:
            self._dropped += 1
        else:
            self._submit(lambda: self._write(report))

    def flush(self, seconds: float) -> bool:
        """Wait until what was handed over is written, at most so long. Returns whether it is."""
        if self._thread is None or not self._thread.is_alive():
            return True
        written = threading.Event()
        self._submit(written.set)
        return written.wait(seconds)

    def close(self, outcome: Outcome) -> None:
        """Close the sink, whether it is on or off, after what waits: at most `CLOSE_SECONDS`."""
        close_together([self], outcome)

    def _write(self, report: Report) -> None:
        if self.on:
            self._try(lambda: self.sink.write(report), "write")
            self._done += 1

    def _submit(self, task: Callable[[], Any]) -> None:
        if getattr(self.sink, "in_callers_thread", False):
            task()
            return
        if self._thread is None:
            name = f"ddp_streammon {type(self.sink).__name__}"
            self._thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._thread.start()
            atexit.register(self.flush, EXIT_SECONDS)
        self._tasks.put(task)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def _begin_close(self, outcome: Outcome) -> None:
        self._submit(lambda: self._try(lambda: self.sink.close(outcome), "close"))
        self._tasks.put(None)

    def _end_close(self, deadline: float) -> None:
        atexit.unregister(self.flush)
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._warn(f"did not end within {CLOSE_SECONDS:g} s and is left behind")
                return
        if self._dropped:
            self._warn("was too slow")

    def _warn(self, what: str) -> None:
        lost = self._given - self._done
        _log.warning("%s %s: %d of %d reports are not written", type(self.sink).__name__, what, lost, self._given)

    def _try(self, call: Callable[[], None], what: str) -> None:
        try:
            call()
        except Exception as error:
            self._give_up(what, error)

    def _give_up(self, what: str, error: Exception) -> None:
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
        self.sinks: tuple[Guarded, ...] = tuple(guarded for sink in sinks for guarded in _guarded(sink))

    def open(self, run: RunInfo) -> None:
        """Open all; the first error is raised."""
        for sink in self.sinks:
            sink.open(run)

    def write(self, report: Report) -> None:
        """Hand the report to all. Never blocks."""
        for sink in self.sinks:
            sink.write(report)

    def flush(self, seconds: float) -> bool:
        """Wait until all have written what they were given, at most so long in all. Returns whether they have."""
        deadline = time.monotonic() + seconds
        return all(sink.flush(max(0.0, deadline - time.monotonic())) for sink in self.sinks)

    def close(self, outcome: Outcome) -> None:
        """Close all at once: at most `CLOSE_SECONDS` in all."""
        close_together(self.sinks, outcome)


def _guarded(sink: Sink) -> tuple[Guarded, ...]:
    if isinstance(sink, FanOut):
        return sink.sinks
    return (sink if isinstance(sink, Guarded) else Guarded(sink),)


def close_together(sinks: Sequence[Guarded], outcome: Outcome) -> None:
    """Close the sinks side by side, and let no SIGTERM break into it."""
    deadline = time.monotonic() + CLOSE_SECONDS
    with sigterm_deferred():
        for sink in sinks:
            sink._begin_close(outcome)
        for sink in sinks:
            sink._end_close(deadline)


@contextmanager
def sigterm_deferred() -> Iterator[None]:
    """SIGTERM takes effect at the end of the block: torchrun asks rank 0 to go when another rank has died.

    Signals can be set in the main thread only; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
        if arrived:
            signal.raise_signal(signal.SIGTERM)
