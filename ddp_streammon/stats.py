"""Global sums -> named floats. Plain maths; the numbers wait for their collective only when they are read.

What a step has several of is not frozen, as in ranks.py: it would take four times as long to make.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from ddp_streammon import keys
from ddp_streammon.moments import ABS_MAX, ELEMENTS, NONFINITE, SQ_SUM, SUM, TENSORS
from ddp_streammon.packet import Field, Layout
from ddp_streammon.rank_facts import RankDetail, RankFacts, Ranks
from ddp_streammon.ranks import LocalNorms, Replicas, compared
from ddp_streammon.shards import Family


class Total(NamedTuple):
    """A user's number that is added up over ranks, where a bare float would be averaged over samples."""

    value: float | Tensor


ScalarLike: TypeAlias = "float | Tensor | tuple[float | Tensor, float | Tensor] | Total"
"""A mean over the rank's samples (float), a count (int, added up), a pair (sum, weight), or a `Total`."""


@dataclass(slots=True)
class Scalar:
    """A user's number after the sum over ranks.

    `sum` adds the ranks' values, `mean` weighs them by their samples; `value` is the one that the number's kind
    asks for. `ranks` is how many ranks sent it. Non-finite values are left out of both.
    """

    sum: float
    mean: float
    ranks: int
    is_total: bool

    @property
    def value(self) -> float:
        return self.sum if self.is_total else self.mean


@dataclass(slots=True)
class Sample:
    """Figures of a stream from samples of its weights and gradients (sampled.py); nan where nothing was compared.

    `update`: norm of the last change of the sampled weights over their own; `moved`: share of them that
    changed; `weight`: their norm; `first`, `last`: root mean square of the gradient of the first and the last layer;
    `trainable`, `optimized`: tensors that require a gradient, and those of them in an optimizer, on average over ranks;
    `uncleared`: ranks on which a gradient of the step before was still there.
    """

    update: float
    moved: float
    weight: float
    first: float
    last: float
    trainable: float
    optimized: float
    uncleared: float

    @classmethod
    def of_sums(cls, sums: Sequence[float], ranks: float) -> Sample:
        """From `sampled.SUMS` over so many ranks."""
        moved_square, weight_square, moved, compared, first, last, trainable, optimized, uncleared = sums
        known = compared > 0
        return cls(
            update=math.sqrt(ratio(moved_square, weight_square)) if known else math.nan,
            moved=moved / compared if known else math.nan,
            weight=math.sqrt(weight_square / ranks),
            first=math.sqrt(first / ranks),
            last=math.sqrt(last / ranks),
            trainable=trainable / ranks,
            optimized=optimized / ranks,
            uncleared=uncleared,
        )


@dataclass(slots=True)
class StreamStats:
    """A stream's synced gradient: what the optimizer sees, unscaled, before clipping; over finite elements.

    `grad_norm` is the L2 norm, `grad_mean` the mean and `grad_max` the largest absolute value of its elements,
    `grad_share` its part of the model's squared norm (0 to 1). nan where no element has a gradient.
    Where ranks fill their slots in turn (packet.py) `grad_max` is the largest that the ranks heard in this packet have
    read since their last turn.
    """

    grad_norm: float
    grad_mean: float
    grad_max: float
    grad_share: float
    nonfinite: int
    elements: int
    tensors: int
    update_norm: float = math.nan
    """L2 norm of what the optimizer changed in the step that `update_every` looked at; nan where none was."""
    update_ratio: float = math.nan
    """The same over the norm of the weights before it."""
    sample: Sample | None = None
    """What the evidence rules ask for beside; None where they are off."""


@dataclass(frozen=True)
class StepStats:
    """Everything of one monitored step, equal on every rank."""

    step: int
    epoch: float | None
    streams: Mapping[str, StreamStats]
    scalars: Mapping[str, Scalar]
    ranks: int
    """Ranks that took part; fewer than the world where `Join` let some finish early."""
    nonfinite_ranks: tuple[int, ...]
    """Ranks that sent a non-finite number (a loss, say)."""
    scaled: bool
    """Whether a GradScaler was in charge: a non-finite gradient then means a skipped step, not a fault."""
    rank_facts: Ranks = field(default_factory=Ranks)
    """What the ranks that were heard say of themselves."""
    local: tuple[LocalNorms, ...] = ()
    """The ranks' own gradients, of those that were heard, where they are measured."""
    unplanned: tuple[str, ...] = ()
    """The streams of which a rank had gradients that the packet had no cells for: sums over ranks that come before the
    square. They were left out, so that these streams' norms, means and maxima are nan, and all streams' shares."""
    replicas: tuple[Replicas, ...] = ()
    """Of the steps that compare replicas: the families that several ranks hold."""

    def values(self) -> dict[str, float]:
        """The figures under their keys."""
        values: dict[str, float] = {}
        names = tuple(self.streams)
        for (of_gradient, of_update), stream in zip(_stream_keys(names), self.streams.values(), strict=True):
            figures = (
                stream.grad_norm,
                stream.grad_mean,
                stream.grad_max,
                stream.grad_share,
                stream.nonfinite,
                stream.elements,
                stream.tensors,
            )
            values.update(zip(of_gradient, figures, strict=True))
            if not math.isnan(stream.update_norm):
                values.update(zip(of_update, (stream.update_norm, stream.update_ratio), strict=True))
        for rank in self.local:
            if rank.rank < keys.MAX_RANKS:
                values.update(zip(_rank_keys(names, rank.rank), rank.norms, strict=True))
        for key, a, b in _ratio_keys(names):
            values[key] = ratio(self.streams[a].grad_norm, self.streams[b].grad_norm)
        if self.scaled:
            values[keys.SKIPPED] = float(any(stream.nonfinite for stream in self.streams.values()))
        for name, scalar in self.scalars.items():
            values[name] = scalar.value
        return values

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **{name: getattr(self, name) for name in _STEP},
            "streams": {
                name: _plain(of) | {"sample": None if of.sample is None else _plain(of.sample)}
                for name, of in self.streams.items()
            },
            "scalars": {name: _plain(scalar) for name, scalar in self.scalars.items()},
            "rank_facts": self.rank_facts.to_dict(),
            "local": [_plain(of) for of in self.local],
            "replicas": [asdict(of) for of in self.replicas],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepStats:
        """The inverse of `to_dict`."""
        return cls(
            **{
                **values,
                "streams": {
                    name: StreamStats(**{**of, "sample": None if of["sample"] is None else Sample(**of["sample"])})
                    for name, of in values["streams"].items()
                },
                "scalars": {name: Scalar(**scalar) for name, scalar in values["scalars"].items()},
                "nonfinite_ranks": tuple(values["nonfinite_ranks"]),
                "unplanned": tuple(values["unplanned"]),
                "rank_facts": Ranks.from_dict(values["rank_facts"]),
                "local": tuple(
                    LocalNorms(of["rank"], tuple(of["norms"]), tuple(of["nonfinite"]), of["parameter"])
                    for of in values["local"]
                ),
                "replicas": tuple(Replicas(**{**of, "ranks": tuple(of["ranks"])}) for of in values["replicas"]),
            }
        )


_STEP = tuple(item.name for item in fields(StepStats))


def _plain(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that has slots; `dataclasses.asdict` takes ten times as long."""
    return {name: getattr(value, name) for name in value.__slots__}


@functools.cache
def _stream_keys(streams: tuple[str, ...]) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """Of each stream the keys of its gradient's figures, and those of its update's."""
    return tuple((_figure_keys(name, keys.GRAD_FIGURES), _figure_keys(name, keys.UPDATE_FIGURES)) for name in streams)


def _figure_keys(stream: str, figures: Iterable[str]) -> tuple[str, ...]:
    return tuple(keys.of_stream(stream, figure) for figure in figures)


@functools.cache
def _rank_keys(streams: tuple[str, ...], rank: int) -> tuple[str, ...]:
    return tuple(keys.of_rank(name, keys.LOCAL_NORM, rank) for name in streams)


@functools.cache
def _ratio_keys(streams: tuple[str, ...]) -> tuple[tuple[str, str, str], ...]:
    return tuple((keys.grad_ratio(a, b), a, b) for a, b in keys.pairs(streams))


def step_keys(streams: Sequence[str], scalars: Iterable[str]) -> tuple[str, ...]:
    """The keys of `StepStats.values`, known before the numbers are."""
    figures = [key for name in streams for key in _figure_keys(name, keys.GRAD_FIGURES)]
    return (*figures, *(key for key, _, _ in _ratio_keys(tuple(streams))), *scalars)


def update_keys(streams: Sequence[str]) -> tuple[str, ...]:
    """The keys of an update's figures, in the steps that have them."""
    return tuple(key for name in streams for key in _figure_keys(name, keys.UPDATE_FIGURES))


def ratio(a: float, b: float) -> float:
    """a / b; nan where it means nothing: a denominator that is zero, or a number that is not finite."""
    return a / b if math.isfinite(a) and math.isfinite(b) and b != 0 else math.nan


STATE, MOMENTS, SCALARS, LINEAR, UPDATES, SAMPLES = "state", "moments", "scalars", "linear", "updates", "samples"
"""Plain fields: ranks that take part, those with a GradScaler in charge, the sum of their epochs, and those with
gradients that no audit has compared; the streams' additive figures; the user's numbers; gradients to be squared after
the sum; squares of updates and of weights; the sums of `sampled.SUMS`."""
UNPLANNED, SHOWN = "unplanned", "shown"
"""Plain, too: of each stream the ranks that have left out gradients; and of audits, of each parameter of the families,
those that have something to compare (proof.py)."""
MAXIMA, BAD, FACTS, LOCAL, CHECKSUMS, DETAIL = (
    *("abs_max", "nonfinite_scalars", "facts"),
    *("local", "checksums", "detail"),
)
"""Slots of each rank: the streams' abs-max; how many of its numbers are not finite; its `RankFacts`; its `LocalNorms`;
bit-sums of the gradients and of the weights of each family; its `RankDetail`."""
SAMPLE_CELLS = 9
"""Of each stream: `sampled.SUMS`."""


def step_layout(
    streams: Sequence[str],
    scalars: Sequence[str],
    world_size: int,
    *,
    linear: int = 0,
    updates: bool = False,
    local: bool = False,
    families: int = 0,
    parameters: int = 0,
    of_step: bool = True,
    evidence: bool = False,
) -> Layout:
    """The packet of a monitored step: 7 S + 4 U + 4 plain cells and 3 S + 6 slots a rank.

    `linear` cells, and those of the `updates`, of `local` gradients and of what the rules ask as `evidence` (9 S plain
    cells, 14 S + 2 slots), where there are any; a packet with checksums of
    `families`, of so many `parameters`, has the slots of all ranks at once, and so has one that is not `of_step`, which
    holds no facts.
    """
    fields = [
        Field(STATE, (4,)),
        Field(UNPLANNED, (len(streams),)),
        Field(MOMENTS, (len(streams), ABS_MAX)),
        Field(SCALARS, (len(scalars), 4)),
        Field(MAXIMA, (len(streams),), per_rank=True),
        Field(BAD, per_rank=True),
    ]
    if of_step:
        fields.append(Field(FACTS, (RankFacts.cell_count(len(streams)),), per_rank=True))
    if updates:
        fields.append(Field(UPDATES, (len(streams), 2)))
    if evidence and of_step:
        fields.append(Field(SAMPLES, (len(streams), SAMPLE_CELLS)))
        fields.append(Field(DETAIL, (RankDetail.cell_count(len(streams)),), per_rank=True))
    if local:
        fields.append(Field(LOCAL, (2 * len(streams) + 1,), per_rank=True))
    if linear:
        fields.append(Field(LINEAR, (linear,), raw=True))
    if of_step and not families:
        return Layout(tuple(fields), world_size)
    if families:
        fields.append(Field(CHECKSUMS, (families, 2), per_rank=True))
        fields.append(Field(SHOWN, (parameters,)))
    return Layout(tuple(fields), world_size, limit_bytes=sys.maxsize)


def is_total(value: ScalarLike) -> bool:
    """Whether a user's number is added up over ranks: counts (int, bool, integer tensors) and `Total`s."""
    if isinstance(value, Tensor):
        return not value.is_floating_point()
    return isinstance(value, Total | numbers.Integral)


def step_stats(
    sums: Mapping[str, Any],
    streams: Sequence[str],
    scalars: Mapping[str, bool],
    step: int,
    heard: Sequence[int],
    world_size: int,
    families: Sequence[Family] = (),
) -> StepStats:
    """The fields of a summed step packet, on the host, as floats.

    `scalars`: names, and whether each is a total. `heard`: the ranks whose slots the packet holds. `families`: those
    whose checksums it holds. Where ranks are missing (`Join`) those that are left have read in full, for 1 / world
    size each: the moments are their mean.
    """
    alive, scaled, epochs, _ = sums[STATE]
    unplanned = tuple(name for name, ranks in zip(streams, sums[UNPLANNED], strict=True) if ranks)
    ranks = max(alive, 1.0)
    missing = world_size / ranks
    table = [[cell * missing for cell in row] for row in sums[MOMENTS]]
    maxima = [max(of_ranks) for of_ranks in sums[MAXIMA]]
    for name, row in zip(streams, table, strict=True):
        if name in unplanned:
            row[SUM] = row[SQ_SUM] = math.nan
    model_sq_norm = sum(row[SQ_SUM] for row in table)
    updates = sums.get(UPDATES, [(0.0, 0.0)] * len(streams))
    samples = sums.get(SAMPLES, [None] * len(streams))
    per_stream = {}
    for name, row, abs_max, update, sampled in zip(streams, table, maxima, updates, samples, strict=True):
        has_gradient, finite = row[ELEMENTS] > 0, row[ELEMENTS] - row[NONFINITE]
        per_stream[name] = StreamStats(
            grad_norm=math.sqrt(row[SQ_SUM]) if has_gradient else math.nan,
            grad_mean=row[SUM] / finite if finite > 0 else math.nan,
            grad_max=abs_max if has_gradient and name not in unplanned else math.nan,
            grad_share=ratio(row[SQ_SUM], model_sq_norm) if has_gradient else math.nan,
            nonfinite=_at_least_one(row[NONFINITE]),
            elements=_at_least_one(row[ELEMENTS]),
            tensors=_at_least_one(row[TENSORS]),
            update_norm=math.sqrt(update[0]) if update[1] else math.nan,
            update_ratio=math.sqrt(ratio(*update)) if update[1] else math.nan,
            sample=None if sampled is None else Sample.of_sums(sampled, ranks),
        )
    present = Ranks.of_packet(heard, sums[FACTS], sums.get(DETAIL)) if FACTS in sums else Ranks()
    epoch = float(f"{epochs / ranks:.12g}")  # the mean of equal numbers, without what adding them rounds
    return StepStats(
        step=step,
        epoch=None if math.isnan(epoch) else epoch,
        streams=per_stream,
        scalars={
            name: Scalar(row[0] if row[3] else math.nan, ratio(row[1], row[2]), ranks=round(row[3]), is_total=total)
            for (name, total), row in zip(scalars.items(), sums[SCALARS], strict=True)
        },
        ranks=round(alive),
        nonfinite_ranks=tuple(itertools.compress(heard, sums[BAD])),
        scaled=scaled > 0,
        unplanned=unplanned,
        rank_facts=present,
        local=tuple(
            LocalNorms.of_cells(rank, sums[LOCAL].of_rank(heard.index(rank)))
            for rank in (present.numbers if LOCAL in sums else ())
        ),
        replicas=compared(families, sums.get(CHECKSUMS, ()), streams, set(present.numbers)) if families else (),
    )


def _at_least_one(count: float) -> int:
    """A count, which is a mean over ranks where they differ: rounded, but what one rank has is not nothing."""
    return round(count) or int(count > 0)


class Figures(Mapping[str, float]):
    """Figures whose names are known and whose numbers may still be under way; reading one waits for them.

    `a | b` merges without waiting, `to_dict()` gives a plain dict.
    """

    def __init__(self, names: Iterable[str], resolve: Callable[[], Mapping[str, float]]) -> None:
        self._names = tuple(names)
        self._resolve: Callable[[], Mapping[str, float]] | None = resolve
        self._values: Mapping[str, float] = {}

    def _read(self) -> Mapping[str, float]:
        if self._resolve is not None:
            self._values = self._resolve()
            self._resolve = None
        return self._values

    def __getitem__(self, key: str) -> float:
        if key not in self._names:
            near = ", ".join(keys.nearest(key, self._names)) or "none: this step was not measured (see `every`)"
            raise KeyError(f"no figure {key!r}; nearest: {near}")
        return self._read()[key]

    def __contains__(self, key: object) -> bool:
        return key in self._names  # Mapping's own would read, hence wait

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __or__(self, other: Mapping[str, float]) -> Figures:
        return Figures(dict.fromkeys((*self, *other)), lambda: {**self, **other})

    def __ror__(self, other: Mapping[str, float]) -> Figures:
        return Figures(dict.fromkeys((*other, *self)), lambda: {**other, **self})

    def __repr__(self) -> str:
        return f"Figures({self.to_dict() if self._resolve is None else 'under way: ' + ', '.join(self)})"

    def to_dict(self) -> dict[str, float]:
        """The figures as a plain dict; waits."""
        return {key: self._read()[key] for key in self._names}
