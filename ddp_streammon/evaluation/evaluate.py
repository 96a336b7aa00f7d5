"""One evaluation: what the head uses of each stream, what each stream knows, and how both differ from training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ddp_streammon import keys
from ddp_streammon.collective import Collective
from ddp_streammon.evaluation import readings
from ddp_streammon.evaluation.ablate import Means
from ddp_streammon.evaluation.claims import MIN_GROUPS, Claim, claims, look_of
from ddp_streammon.evaluation.evidence import Past, of_memory, of_overfitting, of_probe, of_use, remembered
from ddp_streammon.evaluation.exchange import Swap
from ddp_streammon.evaluation.intervals import Estimate, bounds
from ddp_streammon.evaluation.items import Items
from ddp_streammon.evaluation.knowledge import PROBE_ITEMS, Knowledge, Store, means_of, probed
from ddp_streammon.evaluation.measure import EvalStats, Plan, measure
from ddp_streammon.evaluation.scores import Score
from ddp_streammon.evaluation.table import Table
from ddp_streammon.streams import StreamSet

ITEMS = 512
"""How many items are tried with exchanged inputs."""
VARIANCE = "% of the variance"
LEAST = 64
"""Items below which nothing could be said."""


@dataclass(frozen=True)
class Request:
    """What is asked. `train`: un-augmented training items, of which a fixed choice is read; with them the means, the
    probe and the gaps are measured too. `limit`: items that are tried with exchanged inputs (None: all)."""

    split: str = "val"
    train: Items | None = None
    swap: Swap = field(default_factory=dict)
    reduce: Mapping[str, readings.Reduce] = field(default_factory=dict)
    limit: int | None = ITEMS

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 (or None for all), got {self.limit}")


def affordable(limit: int | None, seconds: float, pace: float) -> int | None:
    """How many items may be tried in `seconds` at `pace` seconds an item (0: not known yet); at least `LEAST`."""
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0 (or None for no limit), got {seconds}")
    if pace == 0:
        return limit
    count = max(int(seconds / pace), LEAST)
    return count if limit is None else min(count, limit)


@dataclass(frozen=True)
class Evaluation(Mapping[str, float]):
    """The figures of an evaluation by their keys, equal on every rank; a mapping of floats.

    `estimates` holds them with their 95 % intervals, which are also figures, `<key>_low` and `<key>_high`. `claims` is
    what may be said at this look of the training (`claims.claims`), empty between looks. `notes` says what could not be
    measured, and why. `str` gives sentences.
    """

    figures: Mapping[str, float]
    estimates: Mapping[str, Estimate]
    look: int | None
    """Which look at the training this was; None: claims are not made at this evaluation."""
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]
    streams: tuple[str, ...]
    split: str
    tried: int
    """How many items were tried with exchanged inputs."""
    seconds: float
    """What trying them took on the slowest rank."""
    replayed: bool
    """Whether every encoder was spared a second run."""
    past: Past
    classes: bool = True
    """Whether what is known was probed of classes, or of values (their variance)."""

    def __getitem__(self, key: str) -> float:
        return self.figures[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.figures)

    def __len__(self) -> int:
        return len(self.figures)

    @property
    def constant(self) -> str:
        """What a probe is compared with, in words."""
        return "the majority class" if self.classes else "the mean"

    @property
    def share(self) -> str:
        """The unit of what a probe knows, in words."""
        return "pp" if self.classes else VARIANCE

    def __str__(self) -> str:
        return "\n".join([*_sentences(self), *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class _Seen:
    """What the model makes of training items, and the streams whose features have a mean over them."""

    table: Table
    features: Store
    means: Means
    averaged: tuple[str, ...]


def evaluate(
    streams: StreamSet, collective: Collective, items: Items, score: Score, request: Request, past: Past
) -> Evaluation:
    """See `StreamMonitor.evaluate`. All ranks must call it.

    Comm: `measure`'s, once; with training items three times, and `means_of`'s and `probe_streams`'. Sync: blocks.
    """
    for name in request.swap:
        streams[name]
    names, split = streams.user_names, request.split
    usable = tuple(name for name in names if streams[name].roots or name in request.swap)
    measured = functools.partial(_measured, streams, collective, score)
    seen = None if request.train is None else _seen(streams, collective, measured, request.train)
    plan = Plan(readings.exchanges(usable, full=seen is not None), request.limit, request.swap)
    held_out: Store | None = None
    if seen is not None:
        held_out = Store()
        plan = replace(plan, variants={**plan.variants, **readings.ablations(seen.averaged, names)}, means=seen.means)
    found = measured(split, items.mixture(), plan, held_out)
    table = found.tables[split]
    clear = tuple(name for name in usable if name in request.swap or name not in found.readers)
    estimates = readings.whole(table, split) | readings.uses(table, clear, split)
    evidence = {name: of_use(table, estimates, name, split, clear) for name in clear}
    notes = _notes(streams, usable, clear, seen, alone=bool(clear) and not table.exchanged)
    notes += _notes_of_items(table, clear, found.moved)
    known: Knowledge | None = None
    if seen is not None and request.train is not None and held_out is not None:
        estimates |= readings.whole(seen.table, readings.TRAIN) | readings.ablated(table, seen.averaged, split)
        estimates |= readings.gaps(seen.table, table)
        tried = readings.exchanges(clear, full=False) | readings.others(seen.averaged, names)
        limited = request.train.first(request.limit or PROBE_ITEMS)
        again = measured(readings.TRAIN, limited, replace(plan, variants=tried)).tables[readings.TRAIN]
        estimates |= readings.uses(again, clear, readings.TRAIN) | readings.gaps_alone(again, table, names, split)
        evidence = {name: of_memory(own, estimates, name, split) for name, own in evidence.items()}
        evidence[keys.FULL] = of_overfitting(table, estimates, past)
        with_roots = [name for name in usable if streams[name].roots]
        known = probed(seen.features, held_out, with_roots, collective)
        if known.stats is None:
            notes.append(f"no probe: {known.why}")
        else:
            estimates |= readings.known_of(known.stats, known.classes)
            evidence |= {name: of_probe(evidence[name], known, past, name) for name in clear}
    for name, reduce in request.reduce.items():
        estimates |= readings.reduced(table, clear, name, reduce, split)
    look = look_of(past.count + 1)
    stated = None if look is None else claims(look, evidence, past.claimed)
    return Evaluation(
        readings.values(estimates, table, split),
        estimates,
        look,
        stated or (),
        tuple(notes),
        names,
        split,
        int(table.tried.sum()),
        found.seconds,
        found.replayed,
        remembered(past, known, table, stated),
        known is None or known.classes,
    )


def _measured(
    streams: StreamSet,
    collective: Collective,
    score: Score,
    split: str,
    items: Items,
    plan: Plan,
    observe: Store | None = None,
) -> EvalStats:
    return measure(streams, collective, {split: items}, score, plan, observe=observe)


def _seen(streams: StreamSet, collective: Collective, measured: Callable[..., EvalStats], train: Items) -> _Seen:
    """A pass over training items for what has to be known before the held-out ones: their features and the means."""
    store = Store()
    table = measured(readings.TRAIN, train.first(PROBE_ITEMS), Plan({}), store).tables[readings.TRAIN]
    means = means_of(store, collective)
    found: dict[str, bool] = {}
    for (path, _), own in means.items():
        found[path] = found.get(path, True) and any(mean is not None for mean in own)

    def has_means(name: str) -> bool:
        called = [found[root] for root in streams[name].roots if root in found]
        return bool(called) and all(called)

    averaged = filter(has_means, streams.user_names)
    return _Seen(table, store, means, tuple(averaged))


def _notes(
    streams: StreamSet, usable: Sequence[str], clear: Sequence[str], seen: _Seen | None, *, alone: bool
) -> list[str]:
    """What could not be measured of which stream, why, and the way out."""
    notes = []
    for name in streams.user_names:
        if name not in usable:
            why = "it has no module of its own, so its input is not exchanged"
        elif name not in clear:
            why = "its encoder reads other streams' features, so exchanging its own would exchange theirs too"
        else:
            continue
        notes.append(f"{name}: {why}; say where its input lies in the batch: swap={{{name!r}: <its key or position>}}")
    if seen is not None:
        notes += [
            f"{name}: its features have another shape in another batch, or no dimension of the items, so they have no "
            "mean to be ablated by"
            for name in streams.user_names
            if streams[name].roots and name not in seen.averaged
        ]
    if alone:
        notes.append("no item had another in its batch to exchange inputs with: evaluate in batches of two or more")
    return notes


def _notes_of_items(table: Table, streams: Sequence[str], moved: Collection[str]) -> list[str]:
    """What is odd about the items' losses."""
    notes = [
        f"{name}: exchanging its input changes the items' weights or targets too, so what it costs is not of the same "
        "targets; let the score read them from a part of the batch that is not exchanged ('labels' of their own)"
        for name in streams
        if name in moved
    ]
    if len(table) and not bool((table.weight > 0).any()):
        notes.append("every item has weight 0, so nothing is measured")
    losses = table.figures.get((keys.FULL, readings.LOSS), table.weight)
    wrong = int((~losses.isfinite() & (table.weight > 0)).sum())
    if wrong:
        notes.append(f"the loss of {wrong} of {len(table)} items is not finite, so no mean over them is")
    if readings.is_of_the_batch(table):
        notes.append(
            "all items of a batch have the same loss, so that intervals are too narrow if it is the batch's mean: give "
            "each item's (reduction='none'), or group='batch'"
        )
    groups = table.clusters(keys.FULL)
    tried, there = (len(set(rows.tolist())) for rows in (groups[table.tried], groups))
    if streams and tried < MIN_GROUPS <= there:
        notes.append(f"{tried} of {there} groups were tried, and claims need {MIN_GROUPS}: raise limit, or seconds")
    if readings.moves_with_its_input(table, streams):
        notes.append(
            "exchanging every stream only changes the items' places: the loss compares the streams with each other (or "
            "reads its target from what is exchanged), so Shapley values are 0 and no pair covers for itself"
        )
    return notes


# In words ---------------------------------------------------------------------------------------------------------


def _sentences(found: Evaluation) -> Iterator[str]:
    """What was measured of each stream, then what may be said."""
    loss = "nats" if keys.of_stream(keys.FULL, f"{found.split}_{keys.shown(readings.CORRECT)}") in found else "of loss"
    for name in found.streams:
        parts = [
            _phrase(found.estimates.get(keys.of_stream(name, key)), text, unit)
            for key, text, unit in (
                (f"{found.split}_{keys.USES}", "exchanging its input costs", loss),
                (f"{found.split}_{keys.USES}_acc", "and of accuracy", "pp"),
                (keys.KNOWS, f"its features know, beyond {found.constant},", found.share),
                (keys.COMPLEMENT, "and what the others do not,", found.share),
            )
        ]
        told = [part for part in parts if part]
        if told:
            yield f"{name}: {', '.join(told)} (95 % intervals, {found.tried} items)"
    for claim in found.claims:
        yield f"{claim.stream}: {claim.statement.value} ({_why(claim)}at this look's level {claim.level:.2g})"


def _why(claim: Claim) -> str:
    """Of what cannot be told: why, or what would be."""
    told = [f"{name}: {why}; " for name, why in claim.unusable.items()]
    told += [f"{name} is seen from {value:.2g} beyond its margin on; " for name, value in claim.detectable.items()]
    return "".join(told)


def _phrase(estimate: Estimate | None, text: str, unit: str) -> str:
    if estimate is None or math.isnan(estimate.value):
        return ""
    scale, digits = (100, 1) if unit in ("pp", VARIANCE) else (1, 3)
    low, high = bounds(estimate)
    shown = f"{scale * estimate.value:.{digits}f} {unit} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
    return f"{text} {shown}"
