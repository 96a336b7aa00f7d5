"""Features on their way from the encoders to the probe, and their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddp_streammon.collective import Collective
from ddp_streammon.evaluation.ablate import Features, Means, item_dim, tensors_of
from ddp_streammon.evaluation.items import Items
from ddp_streammon.evaluation.probe import COLUMNS, ITEMS_PER_COLUMN, Labelled, Probe, ProbeStats, probe_streams
from ddp_streammon.evaluation.scores import Scored

PROBE_ITEMS = COLUMNS * ITEMS_PER_COLUMN
"""Enough for a probe of the most columns; as many are held out at most."""
_NONE = (0,)
"""The shape of a sum that there is none of: the features have no items in front, or another shape in another batch."""
_PLACE = 2**24
"""More items than a batch has."""


def pooled(feature: Tensor) -> Tensor:
    """One vector an item: [B, C] as it is, [B, T, C] averaged over tokens, [B, C, H, W] over places.

    Shape: [B, ...] in, [B, width] float32 out.
    """
    if feature.dim() == 3:
        feature = feature.mean(1)
    if feature.dim() > 2:
        feature = feature.flatten(2).mean(2)
    return (feature if feature.dim() == 2 else feature.unsqueeze(1)).float()


@dataclass
class Store:
    """An observer of a pass: each item's features, and their sums (`measure.Observer`).

    An item counts where all streams have data and its weight is not 0, among the first `PROBE_ITEMS`. Memory: a vector
    of float32 an item and stream, on the loss's device.
    """

    features: dict[str, list[Tensor]] = field(default_factory=dict)
    targets: list[Tensor] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    groups: list[Tensor] = field(default_factory=list)
    order: list[Tensor] = field(default_factory=list)
    sums: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    count: int = 0

    def __call__(self, items: Items, place: int, features: Features, found: Scored) -> None:
        if not items.among(PROBE_ITEMS, place, found.items):
            return
        counted = found.weight > 0
        for mask in found.present.values():
            counted = counted & mask.bool()
        rows = counted.nonzero().squeeze(1)
        self.count += len(rows)
        vectors: dict[str, list[Tensor]] = {}
        for encoder in features.encoders:
            for number, call in enumerate(encoder.record):
                tensors = tensors_of(call.output)
                self._add((encoder.path, number), _sums(tensors, rows, found.items))
                in_front = (t for t in tensors if t.dim() and len(t) == found.items and t.is_floating_point())
                first = next(in_front, None)
                if first is not None:
                    vector = pooled(first[rows.to(first.device)]).to(rows.device)
                    vectors.setdefault(encoder.stream, []).append(vector)
        for name, parts in vectors.items():
            self.features.setdefault(name, []).append(torch.cat(parts, 1))
        if found.target is not None:
            self.targets.append(found.target[rows])
            if isinstance(found.prediction, Tensor):
                self.predictions.append(found.prediction[rows])
            if isinstance(found.group, Tensor):
                self.groups.append(found.group[rows].cpu())
            elif found.group is not None:
                self.groups.append(torch.full((len(rows),), place, device="cpu"))
            self.order.append(place * _PLACE + rows.cpu())

    def _add(self, call: tuple[str, int], added: list[Tensor]) -> None:
        known = self.sums.setdefault(call, added)
        if known is not added:
            fits = [tensor.shape for tensor in known] == [tensor.shape for tensor in added]
            self.sums[call] = [a + b for a, b in zip(known, added, strict=True)] if fits else []

    def labelled(self, widths: Mapping[str, int], outputs: int, classes: bool) -> Labelled:
        """This rank's items, for a probe of these widths."""
        if not self.targets:
            shape, dtype = ((0,), torch.long) if classes else ((0, outputs), torch.float32)
            return Labelled({}, torch.zeros(shape, dtype=dtype, device="cpu"))
        targets = torch.cat(self.targets)
        shape = (len(targets),) if classes else (len(targets), outputs)
        predictions = torch.cat(self.predictions).reshape(shape) if self.predictions else None
        return Labelled(
            {name: torch.cat(self.features[name]) for name in widths},
            targets.reshape(shape),
            predictions,
            torch.cat(self.groups) if self.groups else None,
            torch.cat(self.order),
        )


def _sums(tensors: Sequence[Tensor], rows: Tensor, items: int) -> list[Tensor]:
    """Of what a call gave, the sums over these of its items, empty for what is no feature; nothing at all where a
    feature has no dimension of the items: a part of the features would be ablated, and the rest not."""
    found = []
    for tensor in tensors:
        dim = item_dim(tensor, items) if tensor.is_floating_point() else None
        if dim is not None:
            found.append(tensor.index_select(dim, rows.to(tensor.device)).double().sum(dim))
        elif tensor.is_floating_point() and tensor.numel() > 1:
            return []
        else:
            found.append(tensor.new_zeros(0))
    return found


def means_of(store: Store, collective: Collective) -> Means:
    """The mean of every feature over all ranks' items; nothing of a call whose shapes differ between batches or ranks.

    Comm: one all_gather_object (shapes), one all_reduce(SUM). Sync: blocks.
    """
    shapes = {call: [tuple(tensor.shape) for tensor in tensors] for call, tensors in store.sums.items()}
    place = collective.topology.data_rank
    everyone = collective.gather((place, store.count, shapes))
    first = {place: rank for rank, (place, *_) in reversed(list(enumerate(everyone)))}
    calls: dict[tuple[str, int], list[tuple[int, ...]]] = {}
    for _, count, found in everyone:
        for call, given in found.items() if count else ():
            calls[call] = given if calls.setdefault(call, given) == given else []
    total = sum(count for rank, (place, count, _) in enumerate(everyone) if first[place] == rank)
    speaks = first[place] == collective.topology.rank and store.count
    cells = [torch.zeros(0, dtype=torch.float64, device="cpu")]
    for call, wanted in calls.items():
        own = store.sums.get(call, ()) if speaks else ()
        parts = own or [torch.zeros(shape, dtype=torch.float64, device="cpu") for shape in wanted]
        cells += [p.reshape(-1).double().cpu() for p, shape in zip(parts, wanted, strict=False) if shape != _NONE]
    packet = torch.cat(cells)
    summed = collective.all_reduce(packet.to(collective.device_for(packet.device))).wait() / max(total, 1)
    means: dict[tuple[str, int], list[Tensor | None]] = {}
    for call, wanted in calls.items():
        means[call] = []
        for shape in wanted:
            size = torch.Size(shape).numel()
            means[call].append(summed[:size].view(shape) if shape != _NONE else None)
            summed = summed[size:]
    return means


@dataclass(frozen=True)
class Knowledge:
    """What the probe found, or why there is none."""

    stats: ProbeStats | None
    why: str = ""
    classes: bool = True


def probed(train: Store, held_out: Store, streams: Sequence[str], collective: Collective) -> Knowledge:
    """The ridge probe of these streams' features. Comm: one all_gather_object and `probe_streams`'. Sync: blocks."""

    def widths(store: Store) -> dict[str, set[int]]:
        return {name: {part.shape[1] for part in store.features.get(name, ())} for name in streams}

    targets = [target for target in (*train.targets, *held_out.targets) if len(target)]
    whole = all(not target.is_floating_point() and target.dim() == 1 for target in targets)
    outputs = max((int(t.max()) + 1 if whole else t[0].numel() for t in targets), default=0)
    told = (collective.topology.data_rank, len(targets), whole, outputs, train.count, widths(train), widths(held_out))
    everyone = collective.gather(told)
    counts = {place: count for place, _, _, _, count, *_ in everyone}
    speaking = [given for given in everyone if given[1]]
    if not speaking:
        return Knowledge(None, "the score gives no 'target'")
    if not streams:
        return Knowledge(None, "no stream has modules of its own")
    if len({classes for _, _, classes, *_ in speaking}) > 1:
        return Knowledge(None, "targets are classes on some ranks and values on others")
    classes = speaking[0][2]
    found = {name: set().union(*(w[name] for *_, a, b in everyone for w in (a, b))) for name in streams}
    unclear = [name for name, sizes in found.items() if len(sizes) != 1]
    if unclear:
        return Knowledge(None, f"the features of {', '.join(unclear)} have no one width")
    items = sum(counts.values())
    limit = min(COLUMNS, items // ITEMS_PER_COLUMN)
    if limit < len(streams):
        return Knowledge(None, f"{items} training items are fewer than {ITEMS_PER_COLUMN} for each stream")
    size = max(outputs for *_, outputs, _, _, _ in speaking)
    try:
        probe = Probe({name: found[name].pop() for name in streams}, max(size, 2) if classes else size, classes, limit)
    except ValueError as too_large:
        return Knowledge(None, str(too_large))
    own, other = (store.labelled(probe.widths, probe.outputs, classes) for store in (train, held_out))
    return Knowledge(probe_streams(probe, collective, own, other), classes=classes)
