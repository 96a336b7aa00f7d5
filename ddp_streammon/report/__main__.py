"""`python -m ddp_streammon.report RUN_DIR [report.html]`: the report of a run, from its JSONL file alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ddp_streammon.report.page import REPORT, write
from ddp_streammon.report.story import read
from ddp_streammon.version import __version__

RECORD = "metrics.jsonl"
"""The record's name in a run directory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="streammon-report")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("run", type=Path, help=f"a run directory that holds {RECORD}, or a JSONL file")
    parser.add_argument(
        "target", type=Path, nargs="?", help=f"the file to write; {REPORT} beside the record by default"
    )
    given = parser.parse_args(arguments)
    record = given.run / RECORD if given.run.is_dir() else given.run
    target = given.target or record.with_name(REPORT)
    try:
        story = read(record)
        if not story.runs and not story.last_step:
            raise ValueError(f"{str(record)!r} holds no record of a run: give the file that the JSONL sink writes")
        write(story, target)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
