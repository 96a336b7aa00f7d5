"""What the evidence rules may look at: a window of measured steps, what is remembered of earlier ones, the set-up and
what was declared."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from ddp_streammon import keys
from ddp_streammon.config import Intent
from ddp_streammon.described import Setup
from ddp_streammon.rank_facts import RankDetail, RankFacts, StreamInput, alike
from ddp_streammon.ranks import Replicas
from ddp_streammon.stats import Sample, StepStats

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
        """Plain values; the batches' order is looked for anew."""
        return {**asdict(self), "batches": {}, "lag": 0, "lag_held": 0}

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
        self.lag_held = self.lag_held + 1 if lag and lag == self.lag else int(lag > 0)
        self.lag = lag
        if len(self.batches) >= BATCHES:
            self.batches.clear()
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
        self._taken = 0
        self._columns: dict[Hashable, _Column] = {}
        """By figure and what it is of."""
        self._turns: dict[Hashable, _Turns] = {}

    def append(self, stats: StepStats) -> None:
        """A measured step; one that does not come after the last begins anew."""
        if self.steps and self.steps[-1].step >= stats.step:
            self.clear()
        self.steps.append(stats)
        self._taken += 1

    def clear(self) -> None:
        """Forget everything."""
        self.steps.clear()
        self._columns.clear()
        self._turns.clear()

    def column(self, count: int, figure: Callable[..., T], *of: Hashable) -> Iterator[T]:
        """`figure(step, *of)` of the last `count` steps. Both are kept: a function of a module, not a lambda."""
        key = (figure, *of)
        column = self._columns.get(key)
        if column is None:
            column = self._columns[key] = _Column()
        new = _last(self.steps, self._taken - column.taken)
        column.values.extend([figure(step, *of) for step in new])
        column.taken = self._taken
        return _last(column.values, count)

    def by_turn(self, figure: Callable[..., T], *of: Hashable) -> Mapping[Sequence[int], deque[T]]:
        """The same by the ranks that were heard in a step: of each set of them the last `TURNS` steps."""
        kept = self._turns.setdefault((figure, *of), _Turns())
        for step in _last(self.steps, self._taken - kept.taken):
            ranks = _heard(step)
            values = kept.values.pop(ranks, None) or deque(maxlen=TURNS)
            values.append(figure(step, *of))
            kept.values[ranks] = values
            if len(kept.values) > SETS:
                del kept.values[next(iter(kept.values))]
        kept.taken = self._taken
        return kept.values


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


class View:
    """What a rule sees at one measured step."""

    def __init__(
        self, window: Window, memory: Memory, setup: Setup, intent: Intent, parameters: Sequence[str] = ()
    ) -> None:
        self._window = window
        self.memory = memory
        self.setup = setup
        self.intent = intent
        self._parameters = parameters
        self.steps = tuple(window.steps)
        """The last `WINDOW` measured ones, the present one last."""
        self.now = self.steps[-1]
        self.streams = tuple([name for name in self.now.streams if name != keys.SHARED])
        """The user's streams, without `shared`."""
        self._numbers = {name: number for number, name in enumerate(self.now.streams)}
        self._trained: dict[str, bool] = {}
        """Of the streams that were asked for."""
        self.ranks = self.now.rank_facts
        """What those that were heard say of themselves."""

    def number(self, stream: str) -> int:
        """Its place among all streams."""
        return self._numbers[stream]

    def of_data(self, by_rank: Mapping[int, T]) -> Mapping[int, T]:
        """What is known of ranks, of those alone that see data of their own: of others that do the first."""
        if len(self.setup.data_ranks) == self.setup.world:
            return by_rank
        return {rank: of for rank, of in by_rank.items() if rank in self._data_ranks}

    def parameter(self, number: int) -> str:
        """Its name; its number where names are not known, as in a replay."""
        return self._parameters[number] if self._parameters else f"parameter {number}"

    def sample(self, stream: str) -> Sample | None:
        return self.now.streams[stream].sample

    @cached_property
    def _data_ranks(self) -> frozenset[int]:
        return frozenset(self.setup.data_ranks)

    @cached_property
    def details(self) -> dict[int, RankDetail]:
        """What each rank that was heard says for itself; `ranks` has the same by figure, in a fraction of the time."""
        return {rank.rank: rank.detail for rank in self.ranks if rank.detail is not None}

    def inputs(self, stream: str) -> dict[int, StreamInput]:
        """Of each rank that was heard and has called the stream: its inputs; `ranks` has the same by figure."""
        return dict(self.ranks.inputs(self.number(stream)))

    def lr(self, stream: str) -> float:
        """The learning rate of most ranks; nan where it is not known."""
        return self.memory.last_lr.get(stream, math.nan)

    def base_lr(self, stream: str) -> float:
        """The learning rate that its schedule starts from, which is what a user sets, of most ranks that were heard;
        the present one where it is not known."""
        said = self.ranks.base_lr(self.number(stream))
        bases = [base for base in (said[:1] if alike(said) else said) if base > 0]
        return statistics.median_low(bases) if bases else self.lr(stream)

    def meant_frozen(self, stream: str) -> bool:
        """Whether it was declared that the stream is not trained now."""
        begins = self.intent.frozen_from.get(stream)
        told = (*(self.intent.frozen or ()), *self.memory.frozen)
        return stream in told or (begins is not None and self.now.step >= begins)

    def trained(self, stream: str) -> bool:
        """Whether the stream is to learn now: not declared frozen, it has trainable tensors, and a learning rate."""
        if stream not in self._trained:
            sample = self.sample(stream)
            trainable = sample.trainable if sample is not None else float(self.setup.streams[stream].trainable)
            self._trained[stream] = not self.meant_frozen(stream) and trainable > 0 and self.lr(stream) != 0
        return self._trained[stream]

    def series(self, figure: Callable[..., float], count: int = WINDOW, *of: Hashable) -> list[float]:
        """The finite values of a figure over the last `count` measured steps: of `figure(step)`, or, where they are to
        be kept from step to step, of `figure(step, *of)` (see `Window.column`)."""
        values = self._window.column(count, figure, *of) if of else map(figure, self.steps[-count:])
        return list(filter(math.isfinite, values))

    def median(self, figure: Callable[..., float], count: int, least: int = 1, *of: Hashable) -> float:
        """The median of a figure over the last `count` measured steps; nan with fewer than `least` values."""
        values = self.series(figure, count, *of)
        return statistics.median(values) if len(values) >= least else math.nan

    def losses(self, count: int) -> list[float]:
        """The mean loss over ranks in the last measured steps."""
        return self.series(_mean, count, "loss")

    def of_rank(self, rank: int, figure: Callable[[RankFacts], float], count: int) -> list[float]:
        """The finite values of a figure of one rank over the last `count` measured steps."""
        heard = [ranks for step in self.steps[-count:] if rank in (ranks := step.rank_facts).numbers]
        return list(filter(math.isfinite, [figure(ranks[ranks.numbers.index(rank)]) for ranks in heard]))

    def of_ranks(self, figure: Callable[[RankFacts], float], count: int) -> dict[int, list[float]]:
        """The finite values of a figure of each rank over the last `count` measured steps."""
        values: dict[int, list[float]] = {}
        for step in self.steps[-count:]:
            for facts in step.rank_facts:
                value = figure(facts)
                if math.isfinite(value):
                    values.setdefault(facts.rank, []).append(value)
        return values

    def together(
        self, every: int, count: int, figure: Callable[..., T], *of: Hashable
    ) -> Iterator[tuple[Sequence[int], list[T]]]:
        """Of each set of ranks that was heard together in the last `every` steps: `figure(step, *of)` of the last
        `count` of its steps, at most `TURNS`. One set, unless ranks are heard in turns."""
        by_turn = self._window.by_turn(figure, *of)
        for ranks in dict.fromkeys(self._window.column(every, _heard)):
            if ranks:
                yield ranks, [*by_turn[ranks]][-count:]

    def heard(self, count: int) -> set[int]:
        """The ranks that were heard in one of the last `count` measured steps."""
        return set().union(*set(self._window.column(count, _heard)))

    def missing(self, requires: Sequence[str]) -> str:
        """Why a rule that requires these cannot be evaluated; empty if it can."""
        return next((reason for name in requires if (reason := REQUIREMENTS[name](self))), "")


def _heard(step: StepStats) -> Sequence[int]:
    return step.rank_facts.numbers


def _mean(step: StepStats, scalar: str) -> float:
    return step.scalars[scalar].mean if scalar in step.scalars else math.nan


REQUIREMENTS: dict[str, Callable[[View], str]] = {
    "data ranks": lambda v: "" if len(v.setup.data_ranks) > 1 and len(v.ranks) > 1 else "one rank sees all data",
    "replicas": lambda v: "" if v.setup.replicated else "no rank holds what another one holds",
    "no model peers": lambda v: (
        "" if len(v.setup.data_ranks) == v.setup.world else "some ranks see the same data on purpose"
    ),
    "optimizer": lambda v: "" if v.setup.optimizers else "no optimizer is known: pass it to the monitor",
    "loss": lambda v: "" if "loss" in v.now.scalars else "no loss is given to monitor.step",
    "samples": lambda v: "" if "samples" in v.now.scalars else "no samples are given to monitor.step",
    "inputs": lambda v: "" if _inputs_seen(v) else "no stream's inputs can be seen (no module of its own, or compiled)",
    "samples of weights": lambda v: "" if _sampled(v) else "weights are not sampled",
    "consecutive steps": lambda v: "" if len(v.steps) < 2 or _moved(v) else "no two calls in a row were measured yet",
    "classification": lambda v: "" if v.intent.classes else "not declared as classification (intent.classes)",
    "clipping": lambda v: "" if v.intent.clip_norm else "no clipping is declared (intent.clip_norm)",
    "length": lambda v: (
        "" if v.intent.total_steps else "the length of the training is not declared (intent.total_steps)"
    ),
    "eval modules": lambda v: "" if v.setup.moded else "no module does something else in eval mode",
    "two streams": lambda v: "" if len(v.streams) > 1 else "there is one stream",
    "intent": lambda v: (
        "" if v.intent.frozen is not None else "nothing is declared about frozen streams (intent.frozen)"
    ),
    "rates": lambda v: "" if v.intent.lr else "no learning rates are declared (intent.lr)",
    "local gradients": lambda v: "" if v.now.local else "local gradients are not measured (local_gradients=True)",
}
"""Name -> why it is not met; empty where it is."""


def _sampled(view: View) -> bool:
    return any(stream.sample is not None for stream in view.now.streams.values())


def _moved(view: View) -> bool:
    return any(
        stream.sample is not None and not math.isnan(stream.sample.update)
        for step in view.steps[-2:]
        for stream in step.streams.values()
    )


def _inputs_seen(view: View) -> bool:
    return any(any(view.ranks.calls(view.number(stream))) for stream in view.now.streams)
