"""The end of a job that somebody asks for on one rank: all ranks learn of it in the same step, and end after it."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from ddp_streammon import keys
from ddp_streammon.stats import Figures, Total


class StopRequest:
    """What one rank was asked, summed over all of them in the monitor's own packet.

    SIGTERM is another matter (`process.sigterm_unwinds`): it also comes where another rank is gone, so that nothing is
    left to agree with.
    """

    def __init__(self, delay: int) -> None:
        """`delay`: the monitor's; a step's figures are read so many calls later, when they have arrived."""
        self.possible = False
        """Whether anybody can ask on this rank; a job in which nobody can has no such number."""
        self.agreed = False
        """Whether the job is to end now: true from the same step on, on every rank."""
        self._asked = threading.Event()
        self._under_way: deque[Figures] = deque(maxlen=delay + 1)

    def ask(self) -> None:
        """End the job. From any thread of this rank."""
        self._asked.set()

    def number(self) -> dict[str, Any]:
        """What `StreamMonitor.step` is to take along."""
        return {keys.STOP: Total(float(self._asked.is_set()))} if self.possible else {}

    def take(self, figures: Figures) -> None:
        """The figures of this call of `StreamMonitor.step`. Comm: none. Sync: none, what is read has arrived."""
        self._under_way.append(figures)
        arrived = self._under_way[0]
        if len(self._under_way) == self._under_way.maxlen and keys.STOP in arrived:
            self.agreed = self.agreed or arrived[keys.STOP] > 0
