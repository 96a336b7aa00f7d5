"""The run in TensorBoard: the figures that W&B shows, and the findings as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddp_streammon import keys
from ddp_streammon.report import Outcome, Report, RunInfo, to_set
from ddp_streammon.sinks.ledger import Ledger

FLUSH_SECONDS = 1


class TensorboardSink:
    """Event files in `folder`, which `tensorboard --logdir FOLDER` shows: streams of one figure side by side, over
    optimizer steps; each finding when it is raised, with what to do and to set; the verdict at the end."""

    def __init__(self, folder: str | Path, log_every: int = 1) -> None:
        """`log_every`: write every n-th step report; epochs always. ImportError without the package tensorboard."""
        if log_every < 1:
            raise ValueError(f"tensorboard log_every must be at least 1 (every step report), got {log_every}")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("the TensorBoard sink needs the package tensorboard: pip install tensorboard") from error
        self._writer: Any = SummaryWriter(str(folder), flush_secs=FLUSH_SECONDS)
        self._log_every, self._steps, self._last = log_every, 0, 0
        self._streams: tuple[str, ...] = ()
        self._ledger = Ledger()

    def open(self, run: RunInfo) -> None:
        """Write the inventory."""
        self._streams = run.streams
        self._writer.add_text("run", f"```\n{run.inventory}\n```", 0)

    def write(self, report: Report) -> None:
        """Write the figures (step reports thinned by `log_every`) and what is new of the findings."""
        self._last, write = report.step, self._writer.add_scalar
        if report.kind == "epoch" or self._steps % self._log_every == 0:
            for key, value in report.values.items():
                if (name := keys.wandb_key(key, self._streams)) is not None:
                    write(name, value, report.step)
        self._steps += report.kind == "step"
        for finding in self._ledger.take(report.kind, report.step, report.findings):
            text = f"{finding.severity.value} {finding.rule}: {finding.told()} `{to_set(finding.action)}`"
            self._writer.add_text("findings", text.removesuffix(" ``"), report.step)

    def close(self, outcome: Outcome) -> None:
        """Write the verdict."""
        self._ledger.rest(outcome.findings)
        said = self._ledger.verdict(outcome.exit_code)
        self._writer.add_text(keys.VERDICT, said, self._last)
        self._writer.close()
