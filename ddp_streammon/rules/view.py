"""What the evidence rules may look at: a window of measured steps, what is remembered of earlier ones, the set-up and
what was declared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TypeVar

from ddp_streammon import keys
from ddp_streammon.config import Intent
from ddp_streammon.described import Setup
from ddp_streammon.rank_facts import RankDetail, RankFacts, StreamInput, alike
from ddp_streammon.rules.memory import WINDOW, Memory, Window
from ddp_streammon.stats import Sample, StepStats

T = TypeVar("T")


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
        """`figure(step, *of)` of the last `count` steps, at most `TURNS`, of each set of ranks whose turn it is to be
        compared, which is every `every`-th of their own steps. One set, unless ranks are heard in turns."""
        by_turn = self._window.by_turn(figure, *of)
        for ranks in self._window.due(every):
            yield ranks, [*by_turn[ranks]][-count:]

    def compared(self, every: int) -> set[int]:
        """The ranks of these sets."""
        return set().union(*self._window.due(every))

    def missing(self, requires: Sequence[str]) -> str:
        """Why a rule that requires these cannot be evaluated; empty if it can."""
        return next((reason for name in requires if (reason := REQUIREMENTS[name](self))), "")


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
