"""Which variants are tried, and the estimates that are read off the table of what they gave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, TypeAlias

import torch

from ddp_streammon import keys
from ddp_streammon.evaluation.ablate import Replacement, Variant
from ddp_streammon.evaluation.intervals import Estimate, bounds, negated, paired_bootstrap
from ddp_streammon.evaluation.probe import ProbeStats
from ddp_streammon.evaluation.shapley import coalitions, shapley
from ddp_streammon.evaluation.table import LEVEL, Table, gap

Reduce: TypeAlias = "Callable[[Sequence[Any]], float]"
"""A figure of many items that is no mean (mAP, F1), from the `record`s of a score."""

LOSS, CORRECT, TRAIN = "loss", "correct", "train"
_MOST_PAIRS, MOST_COALITIONS = 4, 3
"""Streams up to which pairs and all coalitions are tried."""
_SAME = 1e-3
"""Of a loss: what another order of the items changes by rounding."""


def _name(how: Replacement, replaced: Sequence[str]) -> str:
    return f"{how.value}:{'+'.join(replaced)}"


def exchanges(streams: Sequence[str], *, full: bool) -> dict[str, Variant]:
    """Each stream exchanged; in full also each pair, and every set of streams, where there are few."""
    sets: list[Sequence[str]] = [(name,) for name in streams]
    if full and len(streams) <= _MOST_PAIRS:
        sets += combinations(streams, 2)
    if full and len(streams) == MOST_COALITIONS:
        sets.append(tuple(streams))
    return {_name(Replacement.exchange, own): dict.fromkeys(own, Replacement.exchange) for own in sets}


def ablations(streams: Sequence[str], everything: Sequence[str]) -> dict[str, Variant]:
    """Each stream's features at their mean, and those of all others."""
    return _averaged([(name,) for name in streams]) | others(streams, everything)


def others(streams: Sequence[str], everything: Sequence[str]) -> dict[str, Variant]:
    """The features of all streams but one at their mean, where that can be done with each."""
    if tuple(streams) != tuple(everything) or len(streams) < 2:
        return {}
    return _averaged([tuple(other for other in streams if other != name) for name in streams])


def _averaged(sets: Iterable[Sequence[str]]) -> dict[str, Variant]:
    return {_name(Replacement.mean, own): dict.fromkeys(own, Replacement.mean) for own in sets}


def _figures(table: Table) -> list[str]:
    return [figure for variant, figure in table.figures if variant == keys.FULL]


def _called(figure: str, what: str) -> str:
    """`uses` of the loss is `uses`, of correctness `uses_acc`."""
    return what if figure == LOSS else f"{what}_{keys.shown(figure)}"


def whole(table: Table, split: str) -> dict[str, Estimate]:
    return {
        keys.of_stream(keys.FULL, f"{split}_{keys.shown(figure)}"): table.mean(keys.FULL, figure)
        for figure in _figures(table)
    }


def _worse(estimate: Estimate, figure: str) -> Estimate:
    """A rise of the loss, or of anything else but correctness, of which the fall is shown."""
    return negated(estimate) if figure == CORRECT else estimate


def uses(table: Table, streams: Sequence[str], split: str) -> dict[str, Estimate]:
    """What exchanges cost: of each stream, of pairs beyond their parts, and each stream's share of the whole."""
    found: dict[str, Estimate] = {}
    for figure in _figures(table):
        for name in streams:
            variant = _name(Replacement.exchange, [name])
            if table.has(variant, figure):
                key = keys.of_stream(name, _called(figure, f"{split}_{keys.USES}"))
                found[key] = _worse(table.rise(variant, figure, [name]), figure)
    values, share = table.figures, table.is_share
    for a, b in keys.pairs(streams):
        single, both = [_name(Replacement.exchange, [name]) for name in (a, b)], _name(Replacement.exchange, [a, b])
        if table.has(both, LOSS):
            more = values[both, LOSS] + values[keys.FULL, LOSS] - sum(values[name, LOSS] for name in single)
            found[keys.cover(a, b, split)] = table.contrast(more, [*single, both], [a, b])
    everything = _name(Replacement.exchange, streams)
    if 1 < len(streams) <= MOST_COALITIONS and table.has(everything, LOSS):
        for figure in [name for name in _figures(table) if name in (LOSS, CORRECT)]:
            sign = 1 if figure == CORRECT else -1
            named = {c: _name(Replacement.exchange, [n for n in streams if n not in c]) for c in coalitions(streams)}
            named[frozenset(streams)] = keys.FULL
            worth = {coalition: sign * values[variant, figure] for coalition, variant in named.items()}
            for name, part in shapley(worth).items():
                key = keys.of_stream(name, _called(figure, f"{split}_{keys.SHAPLEY}"))
                found[key] = table.contrast(part, list(named.values()), streams, unit_range=share(figure))
    return found


def moves_with_its_input(table: Table, streams: Sequence[str]) -> bool:
    """Whether each item has its partner's loss when all streams are exchanged: as if its place alone had changed."""
    everything = _name(Replacement.exchange, streams)
    if len(streams) < 2 or not table.has(everything, LOSS):
        return False
    partner = table.partner[everything]
    rows = partner != torch.arange(len(partner), device="cpu")
    found, expected = table.figures[everything, LOSS][rows], table.figures[keys.FULL, LOSS][partner][rows]
    same = (found - expected).abs() <= _SAME * (1 + expected.abs())
    return bool(same.all()) and bool((expected != expected[:1]).any())


def is_of_the_batch(table: Table) -> bool:
    """Whether items that met, of one batch but not of one group, all have each other's loss, while others do not."""
    losses = table.figures.get((keys.FULL, LOSS))
    if losses is None or not table.partner or bool((losses == losses[0]).all()):
        return False
    partner = next(iter(table.partner.values()))
    met = partner != torch.arange(len(partner), device="cpu")
    if table.groups is not None:
        met &= table.groups != table.groups[partner]
    return bool(met.any()) and bool((losses == losses[partner])[met].all())


def ablated(table: Table, streams: Sequence[str], split: str) -> dict[str, Estimate]:
    return {
        keys.of_stream(name, _called(figure, f"{split}_{keys.ABLATED}")): _worse(
            table.rise(_name(Replacement.mean, [name]), figure, [name]), figure
        )
        for figure in _figures(table)
        for name in streams
    }


def gaps(train: Table, held_out: Table) -> dict[str, Estimate]:
    """How much worse held-out items are than training items, accuracy and loss apart."""
    return _gaps(train, held_out, keys.FULL, keys.FULL, "")


def gaps_alone(train: Table, held_out: Table, names: Sequence[str], split: str) -> dict[str, Estimate]:
    """The same of each stream alone, all others at their mean; and both sides of it."""
    found: dict[str, Estimate] = {}
    for name in names:
        variant = _name(Replacement.mean, [other for other in names if other != name])
        found |= _gaps(train, held_out, name, variant, f"{keys.ALONE}_")
        for table, of in ((train, TRAIN), (held_out, split)):
            for figure in (LOSS, CORRECT):
                if table.has(variant, figure):
                    key = keys.of_stream(name, f"{of}_{keys.ALONE}_{keys.shown(figure)}")
                    found[key] = table.mean(variant, figure)
    return found


def _gaps(train: Table, held_out: Table, name: str, variant: str, what: str) -> dict[str, Estimate]:
    found: dict[str, Estimate] = {}
    for figure, key, first, second in (
        (LOSS, keys.LOSS_GAP, held_out, train),
        (CORRECT, keys.ACC_GAP, train, held_out),
    ):
        if train.has(variant, figure) and held_out.has(variant, figure):
            found[keys.of_stream(name, what + key)] = gap(first, second, variant, figure)
    return found


def known_of(stats: ProbeStats, classes: bool) -> dict[str, Estimate]:
    found = {keys.of_stream(name, keys.KNOWS): own.advantage for name, own in stats.alone.items()}
    found |= {keys.of_stream(name, keys.KNOWS_SCORE): own.score for name, own in stats.alone.items()}
    found |= {keys.of_stream(name, keys.COMPLEMENT): own for name, own in stats.complement.items()}
    found[keys.of_stream(keys.FULL, keys.KNOWS)] = stats.everything.advantage
    found[keys.of_stream(keys.FULL, keys.KNOWS_SCORE)] = stats.everything.score
    found[keys.of_stream(keys.FULL, keys.HEAD_GAP)] = stats.head_gap
    return found


def reduced(table: Table, streams: Sequence[str], name: str, reduce: Reduce, split: str) -> dict[str, Estimate]:
    """The user's own figure: how far it falls when a stream is exchanged."""
    if keys.FULL not in table.records:
        raise ValueError(f"reduce={name!r} needs the items' records: let the score give 'record', one object an item")
    rows = table.tried.nonzero().squeeze(1).tolist()
    whole = [table.records[keys.FULL][row] for row in rows]
    found: dict[str, Estimate] = {}
    for stream in streams:
        variant = _name(Replacement.exchange, [stream])
        labels = table.clusters(variant)[table.tried].tolist()
        drop = paired_bootstrap(reduce, whole, table.records[variant], labels, level=LEVEL)
        found[keys.of_stream(stream, f"{split}_{keys.USES}_{name}")] = drop
    return found


def values(estimates: Mapping[str, Estimate], table: Table, split: str) -> dict[str, float]:
    """Each figure with its bounds, what a use could be seen from, and the share of items that have a stream."""
    values: dict[str, float] = {}
    for key, estimate in estimates.items():
        values[key] = estimate.value
        values[keys.bound(key, keys.LOW)], values[keys.bound(key, keys.HIGH)] = bounds(estimate)
        if key.endswith(f"_{split}_{keys.USES}"):
            values[keys.bound(key, keys.DETECTABLE)] = estimate.detectable((1 - LEVEL) / 2)
    for name, mask in table.present.items():
        values[keys.of_stream(name, f"{split}_{keys.PRESENT}")] = float(mask.double().mean())
    return values
