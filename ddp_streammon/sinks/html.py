"""The report of a run, written when it ends: one HTML file that needs nothing else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ddp_streammon.report import Outcome, Report, RunInfo
from ddp_streammon.report.page import write
from ddp_streammon.report.story import BUSY_SECONDS, Story, read


class HtmlSink:
    """Keeps what the report shows, in bounded memory, and writes it at the end: also when training failed.

    What a job that is killed cannot write, `python -m ddp_streammon.report RUN_DIR` writes from its JSONL file.
    """

    def __init__(self, path: str | Path, record: str | Path | None = None) -> None:
        """Raises OSError with the path where it cannot be written; creates missing folders.

        `record`: the JSONL file of the same run, from which a resumed run takes what came before. Its sink is to stand
        before this one, so that it has set aside what will come again.
        """
        self.path = Path(path)
        self._record = None if record is None else Path(record)
        self._story = Story()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("ab").close()
        except OSError as error:
            raise OSError(
                f"cannot write the report {str(self.path)!r} ({error.strerror or error}): "
                "give a path to a file in a folder that you may write to"
            ) from error
        if not self.path.stat().st_size:
            self.path.unlink()

    def open(self, run: RunInfo) -> None:
        """Take in what the run's record holds of earlier starts, and the run's description."""
        if self._record is not None and self._record.is_file():
            self._story = read(self._record)
        if not self._story.runs or self._story.outcome is not None:
            described = {"streams": run.streams, "config": run.config, "inventory": run.inventory, "name": run.name}
            self._add("run", None, None, **described)

    def write(self, report: Report) -> None:
        """Take in the report."""
        found = [finding.to_dict() for finding in report.findings]
        told: dict[str, Any] = {"findings": found, "monitor_seconds": report.monitor_seconds}
        if report.stats is not None:
            ranks = report.stats.rank_facts
            told["measured"] = {"rank_facts": {"rank": list(ranks.numbers), BUSY_SECONDS: list(ranks.busy_seconds)}}
        self._add(report.kind, report.step, report.epoch, values=report.values, **told)

    def close(self, outcome: Outcome) -> None:
        """Write the file."""
        self._add("outcome", None, None, text=outcome.text, exit_code=outcome.exit_code)
        write(self._story, self.path)

    def _add(self, kind: str, step: int | None, epoch: float | None, **fields: Any) -> None:
        self._story.add({"type": kind, "step": step, "epoch": epoch, "time": time.time(), **fields})
