"""Each rank's items as rows of columns, and the one sum that makes them the same table on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ddp_streammon.collective import Collective
from ddp_streammon.evaluation.items import Items
from ddp_streammon.evaluation.scores import BATCH, Scored
from ddp_streammon.evaluation.table import Table
from ddp_streammon.stats import ratio

Column: TypeAlias = "tuple[str, ...]"
WEIGHT, TRIED = ("weight",), ("tried",)
_GROUP = (("group", "high"), ("group", "low"))
_WORD = 2**32
"""A group's 64 bits travel as two halves: float64 holds 53."""


@dataclass
class Rows:
    """A split's items on this rank: batches by place, each with its columns."""

    batches: list[tuple[int, int, dict[Column, Tensor]]] = field(default_factory=list)
    records: dict[str, dict[int, Sequence[Any]]] = field(default_factory=dict)

    def columns(self) -> tuple[Column, ...]:
        return tuple(dict.fromkeys(name for *_, columns in self.batches for name in columns))

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(place, items) of each batch."""
        return tuple((place, items) for place, items, _ in self.batches)

    def on_host(self) -> None:
        """Bring the columns to the host that are not there yet: one read from the device."""
        moved: list[tuple[int, int, dict[Column, Tensor]]] = []
        away = [tensor for *_, columns in self.batches for tensor in columns.values() if _away(tensor)]
        if away:
            flat = torch.cat([tensor.to(away[0].device) for tensor in away]).cpu()
            parts = iter(torch.split(flat, [len(tensor) for tensor in away]))
            for place, items, columns in self.batches:
                here = {name: next(parts) if _away(tensor) else tensor for name, tensor in columns.items()}
                moved.append((place, items, here))
            self.batches = moved


def _away(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


@dataclass(frozen=True)
class Told:
    """What a rank tells the others before the sum."""

    error: str | None
    place: int
    sizes: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    columns: Mapping[str, tuple[Column, ...]] = field(default_factory=dict)
    read: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Of each split that is shared out here: the data set's length, and the digest of what is shared out."""
    scalars: tuple[str, ...] = ()
    records: Mapping[str, Mapping[str, Mapping[int, Sequence[Any]]]] = field(default_factory=dict)
    readers: frozenset[str] = frozenset()
    replayed: bool = True
    seconds: float = 0.0
    moved: frozenset[str] = frozenset()


def columns_of(whole: Scored, place: int) -> dict[Column, Tensor]:
    columns: dict[Column, Tensor] = {WEIGHT: whole.weight}
    columns |= {("present", name): mask.double() for name, mask in whole.present.items()}
    group = torch.full((whole.items,), place, device="cpu") if whole.group == BATCH else whole.group
    if isinstance(group, Tensor):
        high = torch.div(group.long(), _WORD, rounding_mode="floor")
        columns |= {_GROUP[0]: high.double(), _GROUP[1]: (group.long() - high * _WORD).double()}
    return columns


def figures_of(variant: str, found: Scored) -> dict[Column, Tensor]:
    return {("figure", variant, figure): values for figure, values in found.figures.items()}


def note_records(rows: Rows, variant: str, place: int, found: Scored) -> None:
    if found.record is not None:
        rows.records.setdefault(variant, {})[place] = list(found.record)


def sum_up(
    collective: Collective,
    mine: Mapping[str, Rows],
    speakers: Sequence[Told],
    everyone: Sequence[Told],
    splits: Mapping[str, Items],
    own: Mapping[str, tuple[float, float]],
) -> tuple[dict[str, Table], dict[str, float]]:
    """Each rank writes its rows where they belong and leaves the others zero; the sum is the whole table.

    Of ranks that hold parts of one model, which evaluate the same items, the first one speaks.
    """
    rank = collective.topology.rank
    speaks = any(told is everyone[rank] for told in speakers)
    names = {s: tuple(dict.fromkeys(n for told in everyone for n in told.columns.get(s, ()))) for s in splits}
    starts, parts = {}, []
    for split in splits:
        sizes = sorted(size for told in speakers for size in told.sizes.get(split, ()))
        ends = list(itertools.accumulate(items for _, items in sizes))
        starts[split] = {place: end - items for (place, items), end in zip(sizes, ends, strict=True)}
        block = torch.zeros(ends[-1] if ends else 0, len(names[split]), dtype=torch.float64, device="cpu")
        for place, items, columns in mine[split].batches if speaks else ():
            start, unknown = starts[split][place], torch.full((items,), torch.nan, dtype=torch.float64, device="cpu")
            block[start : start + items] = torch.stack([columns.get(name, unknown) for name in names[split]], dim=1)
        parts.append(block)
    numbers = tuple(dict.fromkeys(name for told in everyone for name in told.scalars))
    part = 1.0 / sum(told.place == everyone[rank].place for told in everyone)
    pairs = [own.get(name, (0.0, 0.0)) for name in numbers]
    parts.append(part * torch.tensor(pairs, dtype=torch.float64, device="cpu").view(-1, 2))
    packet = torch.cat([block.reshape(-1) for block in parts])
    total = collective.all_reduce(packet.to(collective.device_for(packet.device))).wait()
    whole = [
        cells.view(block.shape)
        for cells, block in zip(torch.split(total, [b.numel() for b in parts]), parts, strict=True)
    ]
    tables = {
        split: replace(_table(names[split], block), records=_records(split, speakers))
        for split, block in zip(splits, whole, strict=False)
    }
    scalars = {name: ratio(*pair) for name, pair in zip(numbers, whole[-1].tolist(), strict=True)}
    return tables, scalars


def _table(names: Sequence[Column], block: Tensor) -> Table:
    of: dict[Column, Tensor] = dict(zip(names, block.T.contiguous().unbind(), strict=True))
    rows = torch.arange(len(block), device="cpu")
    groups = of[_GROUP[0]].long() * _WORD + of[_GROUP[1]].long() if _GROUP[0] in of else None
    met = {name[1]: values for name, values in of.items() if name[0] == "met"}
    return Table(
        of.get(WEIGHT, block.new_zeros(0)),
        {(name[1], name[2]): values for name, values in of.items() if name[0] == "figure"},
        of.get(TRIED, block.new_zeros(0)).bool(),
        groups,
        {name[1]: values.bool() for name, values in of.items() if name[0] == "present"},
        {name: rows + offset.nan_to_num().long() for name, offset in met.items()},
    )


def _records(split: str, speakers: Sequence[Told]) -> dict[str, Sequence[Any]]:
    found: dict[str, dict[int, Sequence[Any]]] = {}
    for told in speakers:
        for variant, by_place in told.records.get(split, {}).items():
            found.setdefault(variant, {}).update(by_place)
    return {variant: list(_in_order(by_place)) for variant, by_place in found.items()}


def _in_order(by_place: Mapping[int, Sequence[Any]]) -> Iterator[Any]:
    for place in sorted(by_place):
        yield from by_place[place]
