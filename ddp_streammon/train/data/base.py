"""What every data source returns, and what the sources share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ddp_streammon.train.data.splits import stratified

Item = tuple[Tensor, ...]
"""(x_stream1, ..., x_streamS, target): float32 tensors of the streams' shapes, and a 0-d int64 class
index."""


@dataclass(frozen=True)
class StreamData:
    """A classification task with one input per stream; items follow the order of `streams`."""

    train: Dataset[Item]
    validation: Dataset[Item]
    test: Dataset[Item] | None
    """None where nothing is held back."""
    streams: dict[str, tuple[int, ...]]
    """Stream name -> shape of one sample."""
    num_classes: int
    train_eval: Dataset[Item]
    """The training items without augmentation."""
    collate: Callable[[list[Any]], Any] | None = None
    """collate_fn of a DataLoader; None is torch's default."""

    def only(self, stream: str) -> StreamData:
        """The same items with this stream's input alone."""
        place = list(self.streams).index(stream)
        return replace(
            self,
            train=_OneStream(self.train, place),
            validation=_OneStream(self.validation, place),
            test=None if self.test is None else _OneStream(self.test, place),
            train_eval=_OneStream(self.train_eval, place),
            streams={stream: self.streams[stream]},
        )


class _OneStream(Dataset[Item]):
    """The items of a map-style data set as (x of one stream, target)."""

    def __init__(self, items: Dataset[Item], place: int) -> None:
        self._items, self._place = items, place

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Item:
        item = self._items[index]
        return item[self._place], item[-1]


def standardised(x: Tensor, train: Tensor) -> Tensor:
    """Zero mean and unit standard deviation over the items x[train], per feature or per channel.

    x [N, F] or [N, C, ...], any real dtype; train [n], int64 indices. What is constant over x[train] becomes
    x - mean. Computed in float64, returned in float32.
    """
    x = x.double()
    axes = [dim for dim in range(x.dim()) if dim != 1]
    seen = x[train]
    mean = seen.mean(dim=axes, keepdim=True)
    std = seen.std(dim=axes, keepdim=True, unbiased=False)
    constant = seen.amax(dim=axes, keepdim=True) == seen.amin(dim=axes, keepdim=True)
    return ((x - mean) / torch.where(constant, torch.ones_like(std), std)).float()


def split_tensors(
    inputs: Mapping[str, Tensor], labels: Tensor, num_classes: int, sizes: Sequence[int], seed: int
) -> StreamData:
    """Stratified train, validation and test (the rest) of tensors [N, ...] per stream and labels [N].

    `sizes` are those of train and validation. Streams are standardised on the training items.
    """
    train, validation, rest = stratified(labels, sizes, torch.Generator().manual_seed(seed))
    tensors = [*(standardised(x, train) for x in inputs.values()), labels.long()]

    def part(index: Tensor) -> TensorDataset:
        return TensorDataset(*(tensor[index] for tensor in tensors))

    train_items = part(train)
    return StreamData(
        train=train_items,
        validation=part(validation),
        test=part(rest) if len(rest) else None,
        streams={name: tuple(x.shape[1:]) for name, x in inputs.items()},
        num_classes=num_classes,
        train_eval=train_items,
    )
