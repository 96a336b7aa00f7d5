"""Reports kept in a list: for notebooks and for tests."""

from __future__ import annotations

from ddp_streammon.report import Outcome, Report, RunInfo


class MemorySink:
    """Keeps everything it is told. Unbounded: one Report for each monitored step."""

    in_callers_thread = True
    """It never waits, and its reader wants a report as soon as it is given."""

    def __init__(self) -> None:
        self.run: RunInfo | None = None
        self.reports: list[Report] = []
        self.outcome: Outcome | None = None

    def open(self, run: RunInfo) -> None:
        """Keep the run's description."""
        self.run = run

    def write(self, report: Report) -> None:
        """Keep the report."""
        self.reports.append(report)

    def close(self, outcome: Outcome) -> None:
        """Keep the outcome."""
        self.outcome = outcome
