"""What rules do with their signals: ranks in words, and one signal in place of every stream's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ddp_streammon.rules.engine import Signal
from ddp_streammon.rules.view import View


def few(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 1`."""
    told = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {told}" if len(ranks) == 1 else f"ranks {told}"


def single(ranks: Sequence[int]) -> int | None:
    """The rank where there is one only."""
    return ranks[0] if len(ranks) == 1 else None


def together(view: View, signals: Iterable[Signal], whole: Callable[[], Signal]) -> list[Signal]:
    """The signals; where all trained streams of several have the same, `whole` in their place."""
    found = list(signals)
    if not found:
        return found
    raised = {signal.stream for signal in found if signal.strength >= 1}
    trained = [stream for stream in view.streams if view.trained(stream)]
    return [whole()] if len(trained) > 1 and raised >= set(trained) else found
