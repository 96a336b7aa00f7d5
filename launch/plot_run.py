"""Draw a run from its record: python launch/plot_run.py RUN_DIR_OR_JSONL picture.png (needs the extra `plot`)."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ddp_streammon import keys
from ddp_streammon.history import History
from ddp_streammon.sinks import read_jsonl

PANELS = (
    ("Gradient norm", keys.GRAD_NORM, "optimizer step"),
    ("Accuracy of the stream alone, validation", keys.VAL_ACC, "epoch"),
    ("Overfitting score (guide)", keys.OVERFITTING_SCORE, "epoch"),
    ("Weight norm", keys.WEIGHT_NORM, "epoch"),
)


def load(path: Path) -> tuple[History, list[str]]:
    """The history and the streams of a run, from its JSONL file."""
    history, streams = History(limit=1_000_000), []
    for record in read_jsonl(path / "metrics.jsonl" if path.is_dir() else path):
        if record["type"] == "run":
            streams = record["streams"]
        elif record["type"] in ("step", "epoch"):
            history.append(record["step"], record["epoch"], record["values"])
    return history, streams


def draw(history: History, streams: list[str], target: Path) -> None:
    """One panel a figure, the streams side by side in it."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.2), layout="constrained")
    for axis, (title, name, unit) in zip(axes, PANELS, strict=True):
        for stream in streams:
            entries = history.series(keys.of_stream(stream, name))
            x = [entry.step if unit == "optimizer step" else entry.epoch for entry in entries]
            axis.plot(x, [entry.value for entry in entries], label=stream, marker="." if unit == "epoch" else "")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(unit)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(target, dpi=80)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    draw(*load(Path(sys.argv[1])), Path(sys.argv[2]))
