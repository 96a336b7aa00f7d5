"""Items -> per-item figures of the whole model and of streams -> sums -> one all_reduce -> EvalStats."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddp_streammon.collective import Collective
from ddp_streammon.evaluation.ablate import Features, map_tensors, variants
from ddp_streammon.evaluation.harmless import undisturbed
from ddp_streammon.evaluation.items import Items, Share, share
from ddp_streammon.evaluation.scores import Score, to_device
from ddp_streammon.evaluation.together import Apart, Stranded, describe, pace_of, raise_together
from ddp_streammon.packet import Field, Layout
from ddp_streammon.stats import ratio
from ddp_streammon.streams import StreamSet

WEIGHT = "weight"


@dataclass(frozen=True)
class EvalStats:
    """Weighted means over all ranks' items, equal on every rank.

    `figures[split][variant][figure]`: a variant is `full`, a stream's name (that stream alone, the features of all
    others zero), or, from three streams on, `without_<stream>`. `items[split]` is how many items there were,
    `scalars` the weighted means of the caller's own numbers.
    """

    items: Mapping[str, int]
    figures: Mapping[str, Mapping[str, Mapping[str, float]]]
    scalars: Mapping[str, float]


@dataclass(frozen=True)
class _Local:
    """What one rank found: sums by (split, variant, figure), or why it could not."""

    sums: dict[tuple[str, str, str], float]
    items: dict[str, int]
    read: dict[str, tuple[int, str]]
    """Of each split that is shared out here: the data set's length, and the digest of what is shared out."""
    error: str | None = None


def measure(
    streams: StreamSet,
    collective: Collective,
    splits: Mapping[str, Items],
    score: Score,
    *,
    scalars: Mapping[str, tuple[float, float]] | None = None,
    kept: Mapping[str, Sequence[str]] | None = None,
) -> EvalStats:
    """Score every item of every split once on some rank: whole, and under each variant.

    `kept` maps variants to the streams whose features they keep (default `ablate.variants`); `scalars` are the
    rank's own numbers as (sum, weight), which ride along; a rank may leave some out.

    The model is left as it was (harmless.undisturbed). All ranks must call it. Errors: an exception on any rank is
    raised on every rank as a RuntimeError that names the rank; ValueError for items that cannot be shared out. Where
    parameters are sharded ranks go in step, see `together.Lockstep`.

    Comm: a broadcast of the buffers, one all_gather_object (names and errors), one all_reduce(SUM) of the sums;
    none in a single process. With sharded parameters also one all_reduce(SUM) a batch, and one for each replay of an
    encoder. Sync: blocks; one read of the sums from the device a split.
    """
    kept = variants(streams.user_names) if kept is None else kept
    loaders = [items.loader for items in splits.values()]
    failure: Exception | None = None
    pace = pace_of(streams.model, collective)
    own = scalars or {}
    with pace.following():
        with undisturbed(streams.model, collective, loaders):
            try:
                local = _score_splits(streams, collective, splits, score, kept, pace)
            except Stranded:
                raise
            except Exception as error:  # raised on every rank below, so that none waits for this one
                failure = error
                local = _Local({}, {}, {}, describe(error))
        place = collective.topology.data_rank
        everyone = collective.gather((local.error, tuple(local.sums), local.read, tuple(own), place))
    raise_together([error for error, *_ in everyone], failure)
    _check_same([read for _, _, read, *_ in everyone], splits)
    names = tuple(dict.fromkeys(name for _, found, *_ in everyone for name in found))
    numbers = tuple(dict.fromkeys(name for _, _, _, given, _ in everyone for name in given))
    part = 1.0 / sum(other == place for *_, other in everyone)  # ranks that hold parts of one model count as one
    layout = Layout((Field("sums", (len(names),)), Field("items", (len(splits),)), Field("scalars", (len(numbers), 2))))
    packet = layout.pack(
        {
            "sums": part * torch.tensor([local.sums.get(name, 0.0) for name in names], dtype=torch.float64),
            "items": part * torch.tensor([local.items.get(split, 0) for split in splits], dtype=torch.float64),
            "scalars": part * torch.tensor([own.get(n, (0.0, 0.0)) for n in numbers], dtype=torch.float64).view(-1, 2),
        },
        collective.topology.rank,
    )
    device = collective.device_for(packet.device)
    fields = layout.unpack(collective.all_reduce(packet.to(device)).wait())
    sums = dict(zip(names, fields["sums"], strict=True))
    figures: dict[str, dict[str, dict[str, float]]] = {split: {variant: {} for variant in kept} for split in splits}
    for (split, variant, figure), value in sums.items():
        if figure != WEIGHT:
            figures[split][variant][figure] = ratio(value, sums[split, variant, WEIGHT])
    counts = {split: round(count) for split, count in zip(splits, fields["items"], strict=True)}
    for split, count in counts.items():
        if count == 0:
            raise ValueError(
                f"{splits[split].name} is empty: there is no item to evaluate; pass a loader with at least one batch"
            )
    totals = zip(numbers, fields["scalars"], strict=True)
    return EvalStats(counts, figures, {name: ratio(total, weight) for name, (total, weight) in totals})


def _score_splits(
    streams: StreamSet,
    collective: Collective,
    splits: Mapping[str, Items],
    score: Score,
    kept: Mapping[str, Sequence[str]],
    pace: Apart,
) -> _Local:
    everything = tuple(streams.user_names)
    replaced = any(tuple(names) != everything for names in kept.values())
    features = Features(streams, everything if replaced else (), pace.agree)
    device = to_device(streams.model)
    local = _Local({}, {}, {})

    def shared_out(split: str) -> Share:
        mine = share(splits[split], collective.topology)
        if mine.length is not None:
            local.read[split] = mine.length, mine.digest
        return mine

    def on_device(batch: Any) -> Any:
        return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))

    with features.installed():
        for split, items in splits.items():
            totals: dict[tuple[str, str, str], Tensor] = {}
            for batch, counts in pace.rounds(functools.partial(shared_out, split), on_device, items.name):
                count, sums = _score_batch(streams, features, batch, score, kept, pace)
                if counts:
                    local.items[split] = local.items.get(split, 0) + count
                    for (variant, figure), value in sums.items():
                        key = (split, variant, figure)
                        totals[key] = totals[key] + value if key in totals else value
            if totals:
                values = torch.stack(list(totals.values())).tolist()
                local.sums.update(zip(totals, values, strict=True))
    if pace.failure is not None:
        raise pace.failure
    if any(local.items.values()):
        features.check_called()
    return local


def _score_batch(
    streams: StreamSet,
    features: Features,
    batch: object,
    score: Score,
    kept: Mapping[str, Sequence[str]],
    pace: Apart,
) -> tuple[int, dict[tuple[str, str], Tensor]]:
    """The batch's number of items, and its weighted sums by (variant, figure)."""
    count = 0
    found: dict[tuple[str, str], Tensor] = {}
    everything = tuple(streams.user_names)
    scored = functools.partial(_scored, score, streams.model)
    for variant, names in sorted(kept.items(), key=lambda item: tuple(item[1]) != everything):
        with features.recording() if tuple(names) == everything else features.keeping(names):
            result = pace.attempt(scored, batch)
        if result is not None:
            count, sums = result
            found |= {(variant, figure): value for figure, value in sums.items()}
    return count, found


def _scored(score: Score, model: nn.Module, batch: object) -> tuple[int, dict[str, Tensor]]:
    """How many items there are, and the weighted sums of their figures."""
    result = dict(score(model, batch))
    if "loss" not in result:
        raise ValueError(f"score must give 'loss' per item, got {', '.join(map(repr, result)) or 'nothing'}")
    loss = result["loss"]
    for figure, values in result.items():
        if values.dim() != 1 or len(values) != len(loss):
            raise ValueError(
                f"score must give one {figure} per item, shape [{len(loss) if loss.dim() else 'items'}], "
                f"got shape {tuple(values.shape)}"
            )
    weight = result.pop(WEIGHT, torch.ones_like(loss)).double()
    sums = {figure: (values.double() * weight).sum() for figure, values in result.items()}
    return len(loss), sums | {WEIGHT: weight.sum()}


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
