"""What is kept of measured steps: the last ones, the figures of them that rules ask for, and few numbers of all."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from ddp_streammon.rank_facts import alike
from ddp_streammon.ranks import Replicas
from ddp_streammon.stats import StepStats

T = TypeVar("T")

WINDOW = 128
"""Measured steps that rules can look back."""
START = 5
"""Measured steps after which the start is taken to be over: a choice."""
JUMP = 5.0
"""A smaller factor between two steps' learning rates is no jump (half of what trainpulse calls one)."""
BATCHES = 65_536
"""Batches that are remembered, to see whether their order comes back."""


@dataclass
class Memory:
    """What is remembered of the steps before the window: few numbers, equal on every rank."""

    count: int = 0
    """Measured steps so far."""
    losses: list[float] = field(default_factory=list)
    """Of the first `START` steps."""
    best_loss: float = math.inf
    """Lowest mean of 10 losses in a row."""
    recent: list[float] = field(default_factory=list)
    peak_lr: dict[str, float] = field(default_factory=dict)
    """Of each stream, the largest learning rate before the present step."""
    last_lr: dict[str, float] = field(default_factory=dict)
    jumps: dict[str, tuple[int, float, float, float]] = field(default_factory=dict)
    """Of each stream, the last time that its learning rate was multiplied by `JUMP` or more: the count, the rate before
    and after, and its peak before."""
    start_grad: dict[str, float] = field(default_factory=dict)
    """Of each stream, the sum of its gradient's norms in the first `START` steps."""
    trained_mode: bool = False
    """Whether dropout or batch norm modules were in training mode in a step, on every rank."""
    start_weight: dict[str, float] = field(default_factory=dict)
    """Of each stream, the norm of its sampled weights at step `START`."""
    frozen: list[str] = field(default_factory=list)
    """Streams of which it was said meanwhile that they are no longer trained."""
    alive: dict[str, int] = field(default_factory=dict)
    """Of each stream, the steps in which it had a gradient other than zero."""
    low_lr: dict[str, int] = field(default_factory=dict)
    """Of each stream, the steps in a row with a learning rate of zero since the first one; -1 once it was not zero."""
    idle: dict[str, int] = field(default_factory=dict)
    """Of each stream, the steps with a learning rate of zero."""
    batches: dict[float, int] = field(default_factory=dict)
    """Number of a batch of the first rank heard -> the count at which it came last."""
    batches_since: int = 0
    """The count from which on they are remembered."""
    audit: list[Replicas] = field(default_factory=list)
    """What the last audit said."""
    unseen: list[str] = field(default_factory=list)
    """Streams of which whole weights, in that audit, were not alike on every rank, and samples were."""
    lag: int = 0
    """How many steps ago the present batch came before."""
    lag_held: int = 0
    """Steps in a row with the same lag."""

    def take(self, stats: StepStats) -> None:
        """A measured step, which becomes the present one."""
        self.count += 1
        loss = stats.scalars.get("loss")
        if loss is not None and math.isfinite(loss.mean):
            if len(self.losses) < START:
                self.losses.append(loss.mean)
            self.recent = [*self.recent[-9:], loss.mean]
            if len(self.recent) == 10:
                self.best_loss = min(self.best_loss, statistics.fmean(self.recent))
        for number, (name, stream) in enumerate(stats.streams.items()):
            if name in self.last_lr:
                self.peak_lr[name] = max(self.peak_lr.get(name, 0.0), self.last_lr[name])
            rates = stats.rank_facts.lr(number)
            if rates and not math.isnan(sum(rates)):
                rate = rates[0] if alike(rates) else statistics.median_low(rates)
                before = self.last_lr.get(name, 0.0)
                if before > 0 and rate >= JUMP * before:
                    self.jumps[name] = (self.count, before, rate, self.peak_lr.get(name, 0.0))
                self.last_lr[name] = rate
                self.idle[name] = self.idle.get(name, 0) + (rate == 0)
                so_far = self.low_lr.get(name, 0)
                self.low_lr[name] = so_far + 1 if rate == 0 and so_far >= 0 else -1
            if stream.grad_norm > 0:
                self.alive[name] = self.alive.get(name, 0) + 1
            if self.count <= START and stream.grad_norm > 0:
                self.start_grad[name] = self.start_grad.get(name, 0.0) + stream.grad_norm
            if stream.sample is not None and self.count <= START:
                self.start_weight[name] = stream.sample.weight
        if stats.replicas:
            self.audit = list(stats.replicas)
            self.unseen = [of.stream for of in self.audit if not of.weights and len(_prints(stats, of.stream)) < 2]
        inside = stats.rank_facts.in_eval
        self.trained_mode = self.trained_mode or (bool(inside) and max(inside) < 1)
        self._follow_batches(stats)

    def state_dict(self) -> dict[str, Any]:
        """Plain values; batches are remembered anew, and their order stands until one of the last lap is missed."""
        return {**asdict(self), "batches": {}, "batches_since": self.count}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Memory:
        """The inverse of `state_dict`."""
        memory = cls()
        for name, value in state.items():
            setattr(memory, name, dict(value) if isinstance(value, Mapping) else value)
        memory.audit = [Replicas(**{**of, "ranks": tuple(of["ranks"])}) for of in state["audit"]]
        memory.jumps = {name: (int(jump[0]), *map(float, jump[1:])) for name, jump in memory.jumps.items()}  # type: ignore[misc]
        return memory

    def _follow_batches(self, stats: StepStats) -> None:
        detail = stats.rank_facts[0].detail if 0 in stats.rank_facts.numbers[:1] else None
        batch = math.nan if detail is None else detail.batch
        if math.isnan(batch):
            return
        lag = self.count - self.batches[batch] if batch in self.batches else 0
        if lag or self.count - self.batches_since > self.lag:
            self.lag_held = self.lag_held + 1 if lag and lag == self.lag else int(lag > 0)
            self.lag = lag
        if len(self.batches) >= BATCHES:
            self.batches.clear()
            self.batches_since = self.count
        self.batches[batch] = self.count


def _prints(stats: StepStats, stream: str) -> set[float]:
    """The numbers of the ranks' samples of a stream's weights."""
    number = list(stats.streams).index(stream)
    return set(stats.rank_facts.weights(number))


TURNS = 40
"""Steps of ranks that are heard together that rules can look back, however many turns lie between them."""
SETS = 256
"""Sets of ranks of which such steps are kept: more than there are turns."""


class Window:
    """The last `WINDOW` measured steps, and the figures of them that rules ask for again and again: worked out once."""

    def __init__(self) -> None:
        self.steps: deque[StepStats] = deque(maxlen=WINDOW)
        self.taken = 0
        """How many it has taken in since it began."""
        self._heard: deque[tuple[Sequence[int], int]] = deque(maxlen=WINDOW)
        """The ranks that were heard in each, and in how many steps they were by then."""
        self._times: dict[Sequence[int], int] = {}
        self._columns: dict[Hashable, _Column] = {}
        """By figure and what it is of."""
        self._turns: dict[Hashable, _Turns] = {}

    def append(self, stats: StepStats) -> None:
        """A measured step; one that does not come after the last begins anew."""
        if self.steps and self.steps[-1].step >= stats.step:
            self.clear()
        self.steps.append(stats)
        self.taken += 1
        ranks = stats.rank_facts.numbers
        times = self._times.pop(ranks, 0) + 1
        _keep(self._times, ranks, times)
        self._heard.append((ranks, times))

    def clear(self) -> None:
        """Forget everything."""
        self.steps.clear()
        self.taken = 0
        self._heard.clear()
        self._times.clear()
        self._columns.clear()
        self._turns.clear()

    def column(self, count: int, figure: Callable[..., T], *of: Hashable) -> Iterator[T]:
        """`figure(step, *of)` of the last `count` steps. Both are kept: a function of a module, not a lambda."""
        key = (figure, *of)
        column = self._columns.get(key)
        if column is None:
            column = self._columns[key] = _Column()
        new = _last(self.steps, self.taken - column.taken)
        column.values.extend([figure(step, *of) for step in new])
        column.taken = self.taken
        return _last(column.values, count)

    def by_turn(self, figure: Callable[..., T], *of: Hashable) -> Mapping[Sequence[int], deque[T]]:
        """The same by the ranks that were heard in a step: of each set of them the last `TURNS` steps."""
        kept = self._turns.setdefault((figure, *of), _Turns())
        for step in _last(self.steps, self.taken - kept.taken):
            ranks = step.rank_facts.numbers
            values = kept.values.pop(ranks, None) or deque(maxlen=TURNS)
            values.append(figure(step, *of))
            _keep(kept.values, ranks, values)
        kept.taken = self.taken
        return kept.values

    def due(self, every: int) -> list[Sequence[int]]:
        """The sets of ranks that were heard together in the last `every` steps, and of whose own steps one in these was
        an `every`-th: where all ranks are heard in every step this set, where they are heard in turns few."""
        own = _last(self._heard, every)
        return [*dict.fromkeys(ranks for ranks, times in own if ranks and not times % every)]


@dataclass
class _Column:
    """A figure's values in the window, up to the step at which it was asked for last."""

    taken: int = 0
    values: deque[Any] = field(default_factory=lambda: deque(maxlen=WINDOW))


@dataclass
class _Turns:
    """A figure's values by the ranks that were heard, those heard last at the end."""

    taken: int = 0
    values: dict[Sequence[int], deque[Any]] = field(default_factory=dict)


def _last(items: deque[T], count: int) -> Iterator[T]:
    return itertools.islice(items, max(len(items) - count, 0), None)


def _keep(of_sets: dict[Sequence[int], T], ranks: Sequence[int], value: T) -> None:
    """Put in what was taken out; of too many sets the one that was not heard for longest is left out."""
    of_sets[ranks] = value
    if len(of_sets) > SETS:
        del of_sets[next(iter(of_sets))]
