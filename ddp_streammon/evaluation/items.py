"""The items of an evaluation, each on one rank, whatever the number of ranks."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from ddp_streammon.shards import Topology

_SEED = 0
"""Of everything random here, so that ranks agree, evaluations are comparable, and the global state is left alone."""


@dataclass(frozen=True)
class Items:
    """Where an evaluation reads: a loader, the name to call it by in errors, and how it is to be shared out.

    Batch number b belongs to rank b modulo their number: each item once, no padding, and every batch the same whatever
    the number of ranks, since a contrastive loss, the padding of a sequence and an exchange of inputs depend on who is
    in it. A map-style DataLoader is re-made over its rank's batches (`sharded=True` says that its items are this rank's
    own already; a DistributedSampler's never are). Anything else must say, under several ranks, whether its batches are
    this rank's own (True) or the same on every rank (False).

    Ranks means data-parallel ranks: those that hold parts of one model (tensor parallel) evaluate the same items, and
    count as one. With `sharded=True` they have to be given the same.

    `max_batches` limits the evaluation to so many batches of the whole, whatever the number of ranks; `max_items`,
    of a map-style DataLoader, to so many items. They are the first ones, or of a loader that shuffles a choice that
    is always the same. Of these `drawn` takes so many, of a map-style DataLoader, in an order drawn once and always
    the same: a set that is sorted by class has nothing to exchange within a batch.
    """

    loader: Iterable[Any]
    name: str = "items"
    sharded: bool | None = None
    max_batches: int | None = None
    max_items: int | None = None
    drawn: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_batches", "max_items", "drawn"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 (or None for all), got {value}")

    @property
    def batch_size(self) -> int | None:
        """How many items a batch has, where the loader says so."""
        size = getattr(self.loader, "batch_size", None) or getattr(
            getattr(self.loader, "batch_sampler", None), "batch_size", None
        )
        return size if isinstance(size, int) else None

    def among(self, limit: int | None, place: int, count: int) -> bool:
        """Whether the batch of `count` items at `place` begins among the first `limit` items."""
        return limit is None or place * (self.batch_size or count) < limit

    def mixture(self) -> Items:
        """The same in an order drawn once, where the order can be chosen; else itself."""
        return self.first(sys.maxsize)

    def first(self, count: int) -> Items:
        """`count` items of it, drawn once, where they can be chosen (a map-style DataLoader); else all."""
        return replace(self, drawn=count) if _shared_out_here(self) else self


@dataclass(frozen=True)
class Share:
    """This rank's batches; `length` of the data set and `digest` of what is shared out have to agree over ranks.

    A batch comes with its place, by which all ranks' batches are put in one order, the same for any number of ranks
    (but for `sharded=True`). `spare` gives a batch of another rank's items for a rank that has none itself; None where
    there is none to be had.
    """

    batches: Iterable[tuple[int, Any]]
    spare: Callable[[], Any]
    length: int | None = None
    digest: str = ""


def share(items: Items, topology: Topology) -> Share:
    """What this rank evaluates. Errors: ValueError, naming the loader, for one that cannot be shared out."""
    loader, rank, ranks, limit = items.loader, topology.data_rank, topology.data_size, items.max_batches
    given: object = loader
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        raise ValueError(
            f"{items.name}: a {type(given).__name__} gives single items, and batches are needed; pass a DataLoader "
            "over it (batch_size=None where its items are batches)"
        )
    if _shared_out_here(items):
        assert isinstance(loader, DataLoader)
        units = _units(loader, items)
        digest = hashlib.sha256(repr(units).encode()).hexdigest()
        size = 1 if _has_custom_batches(loader) else _items_of(loader, 1)
        assert size is not None
        places = range(rank, math.ceil(len(units) / size), ranks)
        mine = _remade(loader, [unit for place in places for unit in units[place * size : (place + 1) * size]])
        spare = _remade(loader, units[:size])
        batches = zip(places, mine, strict=True)
        return Share(batches, lambda: next(iter(spare), None), len(loader.dataset), digest)  # type: ignore[arg-type]
    if items.max_items is not None:
        raise ValueError(
            f"{items.name}: a number of items can only be asked of a DataLoader over a map-style data set that is not "
            f"sharded yet, got a {type(loader).__name__}; ask for a number of batches"
        )
    if items.sharded is None and ranks > 1:
        raise ValueError(
            f"{items.name}: a {type(loader).__name__} over an iterable source cannot be shared out among "
            f"{ranks} ranks by itself; say sharded=True if each rank's own items come out of it, "
            "or sharded=False if every rank sees the same batches"
        )
    if not items.sharded:
        seen = _Stride(loader, rank, ranks, limit)
        return Share(seen, lambda: seen.last)
    own = None if limit is None else len(range(rank, limit, ranks))  # this rank's part of `limit` batches in all
    return Share(zip(itertools.count(rank, ranks), itertools.islice(loader, own), strict=False), lambda: None)


class _Stride:
    """Every `step`-th of the first `limit` batches, from number `start` on; `last` is the last one seen of all."""

    def __init__(self, loader: Iterable[Any], start: int, step: int, limit: int | None) -> None:
        self._loader, self._start, self._step, self._limit = loader, start, step, limit
        self.last: Any = None

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, batch in enumerate(itertools.islice(self._loader, self._limit)):
            self.last = batch
            if number % self._step == self._start:
                yield number, batch


def _shared_out_here(items: Items) -> bool:
    loader = items.loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return not items.sharded or type(_sampler(loader)) is DistributedSampler


def _sampler(loader: DataLoader[Any]) -> Any:
    """What gives the loader its indices, also where the user made the BatchSampler."""
    own = loader.batch_sampler
    return own.sampler if type(own) is BatchSampler else loader.sampler


def _units(loader: DataLoader[Any], items: Items) -> Sequence[Any]:
    """What is shared out, in an order that is the same on every rank: indices, or a custom batch sampler's batches."""
    if _has_custom_batches(loader):
        _seed()
        batches = list(_cut(itertools.islice(loader.batch_sampler or (), items.max_batches), items.max_items))
        return batches if items.drawn is None else list(_cut(_in_drawn_order(batches), items.drawn))
    indices, shuffled = _indices(loader, items)
    limits = (len(indices), items.max_items, _items_of(loader, items.max_batches))
    count = min(limit for limit in limits if limit is not None)
    if shuffled and count < len(indices):
        indices = _in_drawn_order(indices)
    indices = indices[:count]
    return indices if items.drawn is None else _in_drawn_order(indices)[: items.drawn]


def _in_drawn_order(units: Sequence[Any]) -> list[Any]:
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(_SEED), device="cpu").tolist()
    return [units[place] for place in order]


def _cut(batches: Iterable[Iterable[Any]], count: int | None) -> Iterable[list[Any]]:
    """The batches up to `count` items in all."""
    for batch in batches:
        members = list(batch)[:count]
        if members:
            yield members
        if count is not None:
            count -= len(members)


def _indices(loader: DataLoader[Any], items: Items) -> tuple[Sequence[Any], bool]:
    """The data set's indices that the loader stands for, and whether it would shuffle them."""
    sampler = _sampler(loader)
    if type(sampler) is DistributedSampler:
        if sampler.drop_last:
            raise ValueError(
                f"{items.name}: its DistributedSampler has drop_last=True, which leaves items out depending on the "
                "number of ranks; build it with drop_last=False"
            )
        return range(len(sampler.dataset)), sampler.shuffle  # type: ignore[arg-type]
    if type(sampler) is SubsetRandomSampler:
        return list(sampler.indices), True
    if type(sampler) is SequentialSampler:
        return range(len(sampler)), False
    if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(sampler.data_source):
        return range(len(sampler)), True
    _seed()
    return list(sampler), False


def _seed() -> None:
    """Make a random sampler draw the same on every rank; `undisturbed` puts the states back."""
    torch.default_generator.manual_seed(_SEED)
    random.seed(_SEED)


def _has_custom_batches(loader: DataLoader[Any]) -> bool:
    return loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler


def _items_of(loader: DataLoader[Any], num_batches: int | None) -> int | None:
    """How many items so many batches hold; without automatic batching an item is a batch."""
    size: int = getattr(loader.batch_sampler, "batch_size", 1)
    return None if num_batches is None else num_batches * size


def _remade(loader: DataLoader[Any], units: Sequence[Any]) -> DataLoader[Any]:
    """The same loader over these indices or batches, in order, with its own generator."""
    if _has_custom_batches(loader):
        order: dict[str, Any] = {"batch_sampler": units}
    else:
        order = {"sampler": units, "batch_size": getattr(loader.batch_sampler, "batch_size", None)}
    return DataLoader(
        loader.dataset,
        **order,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if loader.num_workers else None,
        generator=torch.Generator().manual_seed(_SEED),
        prefetch_factor=loader.prefetch_factor,
    )
