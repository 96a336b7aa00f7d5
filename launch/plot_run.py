"""Draw a run from its record: python launch/plot_run.py RUN_DIR_OR_JSONL picture.png (needs the extra `plot`)."""

from __future__ import annotations

import sys
from pathlib import Path

from ddp_streammon.history import History
from ddp_streammon.report.plot import plot
from ddp_streammon.sinks import read_jsonl


def load(path: Path) -> tuple[History, list[str]]:
    """The history and the streams of a run, from its JSONL file."""
    history, streams = History(limit=1_000_000), []
    for record in read_jsonl(path / "metrics.jsonl" if path.is_dir() else path):
        if record["type"] == "run":
            streams = record["streams"]
        elif record["type"] in ("step", "epoch"):
            history.append(record["step"], record["epoch"], record["values"])
    return history, streams


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    plot(*load(Path(sys.argv[1]))).savefig(sys.argv[2], dpi=80)
