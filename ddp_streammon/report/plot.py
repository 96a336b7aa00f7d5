"""The guide's figure of a run with matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("a figure needs the package matplotlib: pip install 'ddp-streammon[plot]'") from error

from ddp_streammon import keys
from ddp_streammon.history import History

_PANELS = (
    ("Gradient norm", keys.GRAD_NORM),
    ("Accuracy of the stream alone, validation", keys.VAL_ACC),
    ("Overfitting score (guide)", keys.OVERFITTING_SCORE),
    ("Weight norm", keys.WEIGHT_NORM),
)
_STEP, _EPOCH = "optimizer step", "epoch"


class Watched(Protocol):
    """What a `StreamMonitor` has."""

    @property
    def history(self) -> History: ...
    @property
    def streams(self) -> Any: ...


def plot_history(monitor: Watched) -> Figure:
    """The guide's figure of what a monitor remembers, a panel a figure, its streams side by side.

    Panels without a value are left out. Save it by `figure.savefig("picture.png")`; no window is opened, and no state
    of pyplot's is touched. Comm: none, so rank 0 alone may call it.
    Errors: ValueError where nothing was logged.
    """
    return plot(monitor.history, monitor.streams.user_names)


def plot(history: History, streams: Sequence[str]) -> Figure:
    """`plot_history` of a History by itself."""
    panels = []
    for title, name in _PANELS:
        logged = {stream: key for stream in streams if (key := keys.of_stream(stream, name)) in history}
        panels += [(title, logged)] if logged else []
    if not panels:
        wanted = ", ".join(name for _, name in _PANELS)
        raise ValueError(f"nothing to plot: no stream of {', '.join(streams) or 'none'} has one of {wanted} yet")
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for number, (title, logged) in enumerate(panels, start=1):
        axis = figure.add_subplot(1, len(panels), number)
        for stream, key in logged.items():
            entries = history.series(key)
            by_step = title == _PANELS[0][0] or any(entry.epoch is None for entry in entries)
            x = [entry.step if by_step else entry.epoch for entry in entries]
            axis.plot(x, [entry.value for entry in entries], label=stream, marker="" if len(entries) > 50 else ".")
            axis.set_xlabel(_STEP if by_step else _EPOCH)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend()
    return figure
