"""The run in a terminal: one table an epoch, and alarms when they are raised."""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import TextIO

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.report import Outcome, Report, RunInfo, Told, gist, to_set
from ddp_streammon.rules.finding import Finding

_COLUMNS = (
    keys.GRAD_NORM,
    keys.WEIGHT_NORM,
    keys.TRAIN_ACC,
    keys.VAL_ACC,
    keys.OVERFITTING_SCORE,
    keys.LEARNING_RATE,
)
NOTHING_FOUND = ("OK", "S-OK")
"""Rules that say that nothing was found, as of the last epoch."""
_WHOLE_MODEL = (keys.TRAIN_LOSS, keys.VAL_LOSS, keys.TRAIN_ACC, keys.VAL_ACC)


class ConsoleSink:
    """Plain lines (no cursor movement, so that `torchrun --tee` and log files stay readable).

    Step reports print nothing, except a finding of severity `warning` or `error`, once, when it is raised.
    Epoch reports print the table (with the last step's gradient norms) and the findings; those that stand since
    before are counted, not repeated. One that says what exchanging a stream's input costs prints a line of that in the
    table's place. Two reports of one moment have one heading. With `alarms_only` epochs print what steps do, and there
    is neither inventory nor summary.
    """

    in_callers_thread = True
    """The lines keep their place among the loop's own prints, which a stalled terminal would hold up as well."""

    def __init__(self, stream: TextIO | None = None, *, alarms_only: bool = False) -> None:
        """`stream`: standard output unless given."""
        self._stream, self._alarms_only = stream, alarms_only
        self._streams: tuple[str, ...] = ()
        self._told = Told()
        self._last_step: Mapping[str, float] = {}
        self._heading = ""
        self._said: set[Hashable] = set()
        """What was printed under this heading."""

    def open(self, run: RunInfo) -> None:
        """Print the inventory."""
        self._streams = run.streams
        if run.inventory and not self._alarms_only:
            self._print(run.inventory)

    def write(self, report: Report) -> None:
        """Print an epoch's table and findings, or a step's alarms."""
        if report.kind == "step" or self._alarms_only:
            self._last_step = report.values
            alarms = [f for f in report.findings if f.severity.level >= Severity.warning.level]
            news = self._told.news(report.kind, alarms)
            self._print(*(f"step {report.step}: {self._sentence(finding)}" for finding in news))
            return
        news = self._told.news("epoch", report.findings)
        when = f"step {report.step}" if report.epoch is None else f"epoch {report.epoch:.4g} (step {report.step})"
        self._said = set(map(gist, news)) | (self._said if when == self._heading else set())
        standing = sum(of.rule not in NOTHING_FOUND and gist(of) not in self._said for of in report.findings)
        uses = uses_lines(report.values, self._streams)
        self._print(
            *([when] if when != self._heading else []),
            *(uses or figure_table({**self._last_step, **report.values}, self._streams)),
            *(f"  {self._sentence(finding)}" for finding in news),
            *([f"  ({standing} unchanged)"] if standing and not uses else []),
        )
        self._heading = when

    def close(self, outcome: Outcome) -> None:
        """Print the summary."""
        if outcome.text and not self._alarms_only:
            self._print(outcome.text)

    def _sentence(self, finding: Finding) -> str:
        change = to_set(finding.action)
        return f"{finding} [{change}]" if change else str(finding)

    def _print(self, *lines: str) -> None:
        if lines:
            print("\n".join(lines), file=self._stream or sys.stdout, flush=True)


def figure_table(values: Mapping[str, float], streams: Sequence[str]) -> list[str]:
    """The lines of one epoch's table: streams down, their figures across, the whole model below."""
    names = [*streams, keys.SHARED]
    columns = [figure for figure in _COLUMNS if any(keys.of_stream(name, figure) in values for name in names)]
    rows = [
        [name, *(_cell(values.get(keys.of_stream(name, figure))) for figure in columns)]
        for name in names
        if any(keys.of_stream(name, figure) in values for figure in columns)
    ]
    lines = _aligned([["stream", *columns], *rows]) if rows else []
    of_model = {figure: values.get(keys.of_stream(keys.FULL, figure), values.get(figure)) for figure in _WHOLE_MODEL}
    whole = [f"{figure} {_cell(value)}" for figure, value in of_model.items() if value is not None]
    return [*lines, *([f"  whole model: {', '.join(whole)}"] if whole else [])]


def uses_lines(values: Mapping[str, float], streams: Sequence[str]) -> list[str]:
    """What exchanging each stream's input costs, a line for each set of items."""
    costs: dict[str, list[str]] = {}
    for key, value in values.items():
        parts = keys.parse(key, streams)
        if parts.stream in streams and parts.figure.endswith(f"_{keys.USES}"):
            low, high = (values.get(keys.bound(key, which), math.nan) for which in (keys.LOW, keys.HIGH))
            split = parts.figure.removesuffix(f"_{keys.USES}")
            costs.setdefault(split, []).append(f"{parts.stream} {value:.3g} [{low:.3g}, {high:.3g}]")
    return [f"  {split} loss that an exchanged input costs: {', '.join(told)}" for split, told in costs.items()]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return [("  " + "  ".join(row)).rstrip() for row in cells]
