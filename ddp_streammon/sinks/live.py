"""The run as a panel at the bottom of a terminal: streams by figures, and the findings that stand."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.report import Outcome, Report, RunInfo, Sink, gist
from ddp_streammon.report.curves import Curve
from ddp_streammon.rules.finding import Finding
from ddp_streammon.sinks.console import NOTHING_FOUND, ConsoleSink

REFRESH_SECONDS = 1.0
"""At least so long between two drawings, of about 10 ms of the interpreter's time each."""
POINTS = 64
"""Stretches of steps that are kept of a curve: more than a line of a terminal shows."""
SPARK, CELL, NAME = 12, 9, 16
"""Characters of a curve, of a number, and of a stream's name at most."""
STREAMS, FINDINGS = 10, 6
"""Rows that are shown, at most."""
BARS = "▁▂▃▄▅▆▇█"
SPAN = 100.0
"""A curve that spans more is drawn by its logarithm."""


@dataclass(frozen=True)
class _Column:
    head: str
    figure: str
    curve: bool = False


_COLUMNS = (
    _Column("gradient", keys.GRAD_NORM, curve=True),
    _Column("val acc", keys.VAL_ACC, curve=True),
    _Column("share", keys.GRAD_SHARE),
    _Column("val uses", f"val_{keys.USES}"),
    _Column("weights", keys.WEIGHT_NORM),
    _Column("rate", keys.LEARNING_RATE),
)
"""From the first to the one that a narrow terminal leaves out first."""
_LOSS, _OF_MODEL = "loss", (keys.of_stream(keys.FULL, keys.VAL_LOSS), keys.of_stream(keys.FULL, keys.VAL_ACC))
_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}


def fits(stream: TextIO) -> bool:
    """Whether a panel can be drawn on `stream`: a terminal that moves its cursor and shows Unicode, with rich
    installed."""
    try:
        terminal = stream.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")
    except ValueError:  # it is closed
        return False
    unicode = (getattr(stream, "encoding", None) or "").lower().startswith("utf")
    return terminal and unicode and importlib.util.find_spec("rich") is not None


def terminal_sink() -> Sink:
    """The panel where standard output is a terminal that fits, else plain lines."""
    return LiveSink() if fits(sys.stdout) else ConsoleSink()


@dataclass
class State:
    """What the panel shows, in bounded memory."""

    streams: tuple[str, ...] = ()
    name: str = ""
    step: int = 0
    epoch: float | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    of_step: tuple[Finding, ...] = ()
    of_epoch: tuple[Finding, ...] = ()
    """What the last epoch report said beyond the steps'."""

    def __post_init__(self) -> None:
        names = (*self.streams, keys.SHARED)
        figures = {keys.of_stream(name, column.figure) for name in names for column in _COLUMNS}
        self._wanted = figures | {_LOSS, *_OF_MODEL}

    def take(self, report: Report) -> None:
        """Take in a report."""
        self.step = report.step
        self.epoch = self.epoch if report.epoch is None else report.epoch
        for key in self._wanted & report.values.keys():
            self.curves.setdefault(key, Curve(POINTS)).add(report.step, report.values[key])
        if report.kind == "step":
            self.of_step = report.findings
        else:
            told = set(map(gist, self.of_step))
            self.of_epoch = tuple(finding for finding in report.findings if gist(finding) not in told)

    def last(self, key: str) -> float:
        """The last value of a figure; nan where there is none."""
        curve = self.curves.get(key)
        return math.nan if curve is None or curve.last is None else curve.last[1]

    def course(self, key: str) -> list[float]:
        """The means of a figure over stretches of the whole run."""
        curve = self.curves.get(key)
        return [] if curve is None else list(curve.means(curve.width).values())


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of finite values in at most `width` characters, from the least to the largest; by their logarithm
    where they are positive and span more than `SPAN`."""
    if not values:
        return ""
    if min(values) > 0 and max(values) > SPAN * min(values):
        values = [math.log(value) for value in values]
    count = min(width, len(values))
    edges = [number * len(values) // count for number in range(count + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if not high > low:
        return BARS[3] * count
    return "".join(BARS[min(7, int(8 * (mean - low) / (high - low)))] for mean in means)


def panel(state: State, width: int) -> Any:
    """The panel, a rich renderable of `width` columns."""
    from rich import box
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    names = [*state.streams[:STREAMS], keys.SHARED]
    present = [name for name in names if any(keys.of_stream(name, of.figure) in state.curves for of in _COLUMNS)]
    columns = _columns(state, present, width)
    table = Table(box=None, pad_edge=False, padding=(0, 1), expand=False)
    table.add_column("stream", no_wrap=True, max_width=NAME, overflow="ellipsis")
    for column, curve in columns:
        table.add_column(column.head, no_wrap=True, justify="right", overflow="ellipsis")
        if curve:
            table.add_column("", no_wrap=True, width=SPARK)
    for name in present:
        cells = [Text(name)]
        for column, curve in columns:
            key = keys.of_stream(name, column.figure)
            cells.append(Text(_number(state.last(key))))
            cells += [Text(sparkline(state.course(key), SPARK), style="cyan")] if curve else []
        table.add_row(*cells)
    lines = [Text(_whole(state), no_wrap=True, overflow="ellipsis"), table]
    if len(state.streams) > STREAMS:
        lines.append(Text(f"and {len(state.streams) - STREAMS} more streams", style="dim"))
    lines += [
        Text(_line(finding), style=_COLOURS[finding.severity.value], no_wrap=True, overflow="ellipsis")
        for finding in _shown([*state.of_step, *state.of_epoch])
    ]
    title = Text(state.name or "ddp_streammon", no_wrap=True, overflow="ellipsis")
    return Panel(Group(*lines), title=title, box=box.ROUNDED, width=width, title_align="left")


def _columns(state: State, names: Sequence[str], width: int) -> list[tuple[_Column, bool]]:
    """The columns that have a value and for which there is room, and whether there is room for the curve."""
    left = width - 4 - max([len("stream"), *(min(NAME, len(name)) for name in names)])
    found: list[tuple[_Column, bool]] = []
    for column in _COLUMNS:
        if not any(keys.of_stream(name, column.figure) in state.curves for name in names):
            continue
        with_curve = column.curve and left >= CELL + SPARK + 4
        left -= CELL + 2 + (SPARK + 2 if with_curve else 0)
        if left < 0 and found:
            break
        found.append((column, with_curve))
    return found


def _whole(state: State) -> str:
    """The line of the whole model."""
    of_val, accuracy = _OF_MODEL
    loss = _LOSS if _LOSS in state.curves else of_val
    parts = [f"step {state.step:,}"]
    parts += [] if state.epoch is None else [f"epoch {state.epoch:.4g}"]
    parts += (
        [f"loss {_number(state.last(loss))} {sparkline(state.course(loss), SPARK)}"] if loss in state.curves else []
    )
    parts += [f"val acc {_number(state.last(accuracy))}"] if accuracy in state.curves else []
    return "  ".join(parts)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _shown(findings: Sequence[Finding]) -> list[Finding]:
    """The most urgent ones; that nothing was found is not said beside an alarm."""
    alarm = any(finding.severity.level >= Severity.warning.level for finding in findings)
    told = (finding for finding in findings if not (alarm and finding.rule in NOTHING_FOUND))
    return sorted(told, key=lambda of: (of.explained_by is not None, -of.severity.level))[:FINDINGS]


def _line(finding: Finding) -> str:
    whose = [finding.stream or "", "" if finding.rank is None else f"rank {finding.rank}"]
    return " ".join(part for part in (finding.rule, *whose) if part) + f": {finding.seen}"


class LiveSink(ConsoleSink):
    """A panel at the bottom of the terminal, drawn anew at most every `REFRESH_SECONDS`, by the sink's own thread.

    What this process prints meanwhile goes above it (rich stands in for sys.stdout and sys.stderr, except in forked
    workers); so does every finding of severity `warning` or `error` when it is raised, and the summary at the end. The
    cursor stays visible, so that a job that is killed leaves a terminal in order. A terminal that goes away is a sink
    that failed. NO_COLOR is heeded, and what does not fit in a narrow window is left out.
    """

    in_callers_thread = False

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stream`: a terminal; standard output unless given. Raises ModuleNotFoundError without rich."""
        import rich.console
        import rich.live

        super().__init__(stream)
        own = stream is None or stream is sys.stdout
        self._console = rich.console.Console(
            file=stream or sys.stdout, force_terminal=True, highlight=False, emoji=False
        )
        self._live = rich.live.Live(console=self._console, auto_refresh=False, redirect_stdout=own, redirect_stderr=own)
        self._clock = clock
        self._drawn = -math.inf
        self.state = State()

    def open(self, run: RunInfo) -> None:
        """Print the inventory; the panel begins."""
        self.state = State(run.streams, run.name or "")
        streams = sys.stdout, sys.stderr
        try:
            super().open(run)
            self._live.start()
            self._console.show_cursor(True)
        except OSError:  # the terminal is gone already: the first report says so
            self._stop()
        os.register_at_fork(after_in_child=lambda: _give_back(*streams))

    def write(self, report: Report) -> None:
        """Take in the report; draw, unless that was done just now."""
        try:
            self.state.take(report)
            news = self._told.news(report.kind, report.findings)
            alarms = (finding for finding in news if finding.severity.level >= Severity.warning.level)
            self._print(*(f"step {report.step}: {self._sentence(finding)}" for finding in alarms))
            if self._clock() - self._drawn >= REFRESH_SECONDS:
                self._draw()
        except OSError:
            self._stop()
            raise

    def close(self, outcome: Outcome) -> None:
        """Draw the last state, which stays, and print the summary below it."""
        try:
            if self._live.is_started:
                self._draw()
        finally:
            self._stop()
        super().close(outcome)

    def _draw(self) -> None:
        self._live.update(panel(self.state, self._console.width), refresh=True)
        self._drawn = self._clock()

    def _stop(self) -> None:
        """The panel ends and gives the standard streams back, also where the terminal is gone."""
        with contextlib.suppress(OSError):
            self._live.stop()

    def _print(self, *lines: str) -> None:
        from rich.text import Text

        if lines:
            self._console.print(Text("\n".join(lines)), soft_wrap=True)


def _give_back(stdout: TextIO, stderr: TextIO) -> None:
    """In a forked process, where a thread of the panel's that is not there may hold its lock: print past it."""
    from rich.file_proxy import FileProxy

    if isinstance(sys.stdout, FileProxy):
        sys.stdout = stdout
    if isinstance(sys.stderr, FileProxy):
        sys.stderr = stderr
