"""Items -> figures of each item, whole and under variants -> one all_reduce -> the same table on every rank."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ddp_streammon import keys
from ddp_streammon.collective import Collective
from ddp_streammon.evaluation.ablate import Features, Means, Replacement, Variant, map_tensors, on_device, tensors_of
from ddp_streammon.evaluation.exchange import Swap, exchanged, partners
from ddp_streammon.evaluation.harmless import undisturbed
from ddp_streammon.evaluation.items import Items, Share, share
from ddp_streammon.evaluation.rows import (
    TRIED,
    Column,
    Rows,
    Told,
    columns_of,
    figures_of,
    note_records,
    sum_up,
)
from ddp_streammon.evaluation.scores import Score, Scored, scored, to_device
from ddp_streammon.evaluation.table import Table
from ddp_streammon.evaluation.together import Apart, Lockstep, Stranded, describe, pace_of, raise_together
from ddp_streammon.streams import StreamSet

Observer: TypeAlias = "Callable[[Items, int, Features, Scored], None]"
"""Shown each batch that counts, after it went through the whole model: whose, its place, the features, the score."""


@dataclass(frozen=True)
class EvalStats:
    """What was found of each split, equal on every rank; `scalars` are weighted means of the caller's own numbers.

    `readers` are streams whose encoders read other streams' features, `replayed` says whether every encoder was spared
    a second run; `seconds` is what the variants took on the slowest rank. `moved` are streams whose exchange in the
    batch took the items' weights or targets along.
    """

    tables: Mapping[str, Table]
    scalars: Mapping[str, float]
    readers: frozenset[str] = frozenset()
    replayed: bool = True
    seconds: float = 0.0
    moved: frozenset[str] = frozenset()

    def means(self, split: str) -> dict[str, dict[str, float]]:
        """The weighted mean of each figure, by variant."""
        table = self.tables[split]
        found: dict[str, dict[str, float]] = {}
        for variant, figure in table.figures:
            found.setdefault(variant, {})[figure] = table.value(variant, figure)
        return found


@dataclass(frozen=True)
class Plan:
    """What is tried of every batch: `variants` by name, of the first `limit` items alone (None: of all).

    `swap`: streams that are exchanged in the batch, not in their features. `means`: for `Replacement.mean`.
    """

    variants: Mapping[str, Variant]
    limit: int | None = None
    swap: Swap = field(default_factory=dict)
    means: Means = field(default_factory=dict)

    def replaced(self) -> tuple[str, ...]:
        """The streams that some variant replaces."""
        return tuple(dict.fromkeys(name for variant in self.variants.values() for name in variant))


def measure(
    streams: StreamSet,
    collective: Collective,
    splits: Mapping[str, Items],
    score: Score,
    plan: Plan,
    *,
    scalars: Mapping[str, tuple[float, float]] | None = None,
    observe: Observer | None = None,
) -> EvalStats:
    """Score every item of every split once on some rank: whole, and under each variant of the plan.

    `scalars` are the rank's own numbers as (sum, weight), which ride along; a rank may leave some out.

    The model is left as it was (harmless.undisturbed). All ranks must call it. Errors: an exception on any rank is
    raised on every rank as a RuntimeError that names the rank; ValueError for items that cannot be shared out. Where
    parameters are sharded ranks go in step, see `together.Lockstep`.

    Memory: 8 bytes an item and figure on every rank. Comm: a broadcast of the buffers, one all_gather_object (names and
    errors), one all_reduce(SUM) of the tables; none in a single process. With sharded parameters also one
    all_reduce(SUM) a batch, and one for each replay of an encoder. Sync: blocks; one read from the device a split.
    """
    loaders = [items.loader for items in splits.values()]
    failure: Exception | None = None
    pace = pace_of(streams.model, collective)
    own = scalars or {}
    mine = _Pass(streams, collective, score, plan, pace, observe)
    with pace.following():
        with undisturbed(streams.model, collective, loaders):
            try:
                mine.run(splits)
            except Stranded:
                raise
            except Exception as error:  # raised on every rank below, so that none waits for this one
                failure = error
        everyone = collective.gather(mine.told(failure, tuple(own)))
    raise_together([told.error for told in everyone], failure)
    _check_same([told.read for told in everyone], splits)
    first = {told.place: rank for rank, told in reversed(list(enumerate(everyone)))}
    speakers = [told for rank, told in enumerate(everyone) if first[told.place] == rank]
    tables, totals = sum_up(collective, mine.rows, speakers, everyone, splits, own)
    for split, table in tables.items():
        if not len(table):
            raise ValueError(
                f"{splits[split].name} is empty: there is no item to evaluate; pass a loader with at least one batch"
            )
    return EvalStats(
        tables,
        totals,
        frozenset().union(*(told.readers for told in everyone)),
        all(told.replayed for told in everyone),
        max(told.seconds for told in everyone),
        frozenset().union(*(told.moved for told in everyone)),
    )


class _Pass:
    """One walk over the splits on this rank."""

    def __init__(
        self,
        streams: StreamSet,
        collective: Collective,
        score: Score,
        plan: Plan,
        pace: Apart,
        observe: Observer | None,
    ) -> None:
        self._streams, self._topology, self._score, self._plan = streams, collective.topology, score, plan
        self._pace, self._observe = pace, observe
        self._device = to_device(streams.model)
        self._features: Features | None = None
        self._read: dict[str, tuple[int, str]] = {}
        self._seconds = 0.0
        self._moved: set[str] = set()
        self._writes: bool | None = None
        """Whether forwards write into their batch; None before the first."""
        self.rows: dict[str, Rows] = {}

    def run(self, splits: Mapping[str, Items]) -> None:
        plan = self._plan
        names = self._streams.user_names if self._observe else plan.replaced()
        with_roots = [name for name in names if self._streams[name].roots or name in plan.replaced()]
        by_input = frozenset(plan.swap)
        means = {call: [self._on_device(mean) for mean in own] for call, own in plan.means.items()}
        self._features = features = Features(
            self._streams,
            with_roots,
            self._pace.agree,
            by_input=by_input,
            means=means,
            in_step=isinstance(self._pace, Lockstep),
        )
        with features.installed():
            for split, items in splits.items():
                rows = self.rows[split] = Rows()
                shared_out = functools.partial(self._shared_out, split, items)
                for place, batch in self._pace.rounds(shared_out, self._on_device, items.name):
                    self._batch(rows, items, place, batch)
                rows.on_host()
        if self._pace.failure is not None:
            raise self._pace.failure
        if any(rows.batches for rows in self.rows.values()):
            features.check_called()

    def told(self, failure: Exception | None, scalars: tuple[str, ...]) -> Told:
        if failure is not None:
            return Told(describe(failure), self._topology.data_rank)
        assert self._features is not None
        return Told(
            None,
            self._topology.data_rank,
            {split: rows.sizes() for split, rows in self.rows.items()},
            {split: rows.columns() for split, rows in self.rows.items()},
            self._read,
            scalars,
            {split: rows.records for split, rows in self.rows.items() if rows.records},
            frozenset(self._features.readers),
            self._features.replayed,
            self._seconds,
            frozenset(self._moved),
        )

    def _shared_out(self, split: str, items: Items) -> Share:
        mine = share(items, self._topology)
        if mine.length is not None:
            self._read[split] = mine.length, mine.digest
        return mine

    def _on_device(self, batch: Any) -> Any:
        return on_device(batch, self._device)

    def _batch(self, rows: Rows, items: Items, place: int | None, batch: object) -> None:
        """The batch whole and, if it is one of the first, under each variant; columns of what counts."""
        plan, features = self._plan, self._features
        assert features is not None
        batch, whole = self._whole(batch, features)
        columns: dict[Column, Tensor] = {}
        if whole is not None and place is not None:
            columns |= columns_of(whole, place) | figures_of(keys.FULL, whole)
            note_records(rows, keys.FULL, place, whole)
            if self._observe is not None:
                self._observe(items, place, features, whole)
        wanted = place is not None and whole is not None and items.among(plan.limit, place, whole.items)
        if plan.variants and not self._pace.agree(not wanted):
            began = self._now()
            exchanges = _exchanges(whole, plan.variants, features.items(), self._device)
            for name, variant in plan.variants.items():
                exchange = exchanges[name]
                with features.replacing(variant, exchange.order):
                    found = self._attempt(batch, variant, exchange.order)
                if found is not None and wanted and place is not None:
                    columns |= figures_of(name, found)
                    note_records(rows, name, place, found)
                    alone = [stream for stream in variant if [stream] == list(variant) and stream in plan.swap]
                    if alone and whole is not None and not rows.batches and _took_along(whole, found):
                        self._moved.update(alone)
                    if exchange.met is not None:
                        columns["met", name] = exchange.met
            self._seconds += self._now() - began
        if columns and whole is not None and place is not None:
            columns[TRIED] = torch.full((whole.items,), float(wanted), dtype=torch.float64, device="cpu")
            rows.batches.append((place, whole.items, columns))

    def _whole(self, batch: Any, features: Features) -> tuple[Any, Scored | None]:
        """The batch to go on with, and what it gives as it is. The first one shows whether forwards write into their
        batch (`x.div_(255)`); from then on each has a copy of it."""
        if self._writes is None:
            first = map_tensors(batch, Tensor.clone)
            with features.recording():
                whole = self._attempt(first)
            self._writes = not self._pace.agree(not any(map(_written, tensors_of(first))))
            if not self._writes:
                return first, whole
            features.copies_inputs = True
        with features.recording():
            return batch, self._attempt(batch)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _attempt(self, batch: Any, variant: Variant | None = None, order: Tensor | None = None) -> Scored | None:
        def run(given: Any) -> Scored:
            # Containers of its own: a score may pop its target.
            given = map_tensors(given, Tensor.clone if self._writes else lambda tensor: tensor)
            for name, how in (variant or {}).items():
                if how is Replacement.exchange and name in self._plan.swap and order is not None:
                    given = exchanged(given, self._plan.swap[name], order)
            found = scored(self._score, self._streams.model, given)
            for name in found.present:
                self._streams[name]
            return found

        return self._pace.attempt(run, batch)


def _written(tensor: Tensor) -> bool:
    """Whether a fresh tensor was written into; under `torch.inference_mode` that is not known."""
    return not tensor.is_inference() and tensor._version > 0


def _took_along(whole: Scored, found: Scored) -> bool:
    """Whether the items have another weight or target than before. Sync: one read from the device."""
    pairs = ((whole.weight, found.weight), (whole.target, found.target))
    return any(a is not None and b is not None and not torch.equal(a, b) for a, b in pairs)


@dataclass(frozen=True)
class _Exchange:
    """Whose features each item of a batch gets under a variant, and, where it exchanges any, how many rows further on
    those are. Shape: [B] each, `met` on the host."""

    order: Tensor
    met: Tensor | None = None


def _exchanges(
    whole: Scored | None, variants: Mapping[str, Variant], items: int, device: torch.device
) -> dict[str, _Exchange]:
    """By variant; those whose streams the same items have share one. Sync: as if there were a single variant."""
    kept = _Exchange(torch.arange(items if whole is None else whole.items, device=device))
    known: dict[frozenset[str], _Exchange] = {}
    found: dict[str, _Exchange] = {}
    for name, variant in variants.items():
        streams = [stream for stream, how in variant.items() if how is Replacement.exchange]
        if whole is None or not streams:
            found[name] = kept
            continue
        masked = frozenset(stream for stream in streams if stream in whole.present)
        if masked not in known:
            known[masked] = _exchange(whole, masked, device)
        found[name] = known[masked]
    return found


def _exchange(whole: Scored, masked: frozenset[str], device: torch.device) -> _Exchange:
    """Of items that count and have the streams in `masked`."""
    eligible = whole.weight > 0
    for stream in masked:
        eligible = eligible & whole.present[stream].bool()
    order = partners(eligible, whole.group if isinstance(whole.group, Tensor) else None)
    return _Exchange(order.to(device), (order - torch.arange(len(order), device="cpu")).double())


def _check_same(read: Sequence[Mapping[str, tuple[int, str]]], splits: Mapping[str, Items]) -> None:
    for split, items in splits.items():
        found = [mine[split] for mine in read if split in mine]
        lengths = [length for length, _ in found]
        if len(set(lengths)) > 1:
            counts = ", ".join(map(str, lengths))
            raise ValueError(
                f"{items.name}: the data sets have {counts} items on ranks 0 to {len(found) - 1}; "
                "give every rank the whole set, or say sharded=True if each rank holds its own part"
            )
        if len(set(found)) > 1:
            raise ValueError(
                f"{items.name}: its sampler gives different items on different ranks, so they cannot be shared out; "
                "seed it alike on every rank, or say sharded=True if each rank's own items come out of it"
            )
