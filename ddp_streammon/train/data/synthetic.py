"""Synthetic streams: one random prototype per class and stream, plus noise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.utils.data import TensorDataset

from ddp_streammon.train.data.base import StreamData, standardised


def synthetic(
    streams: Mapping[str, tuple[int, ...]],
    num_classes: int = 10,
    train: int = 1024,
    validation: int = 256,
    seed: int = 0,
    noise: float = 1.0,
) -> StreamData:
    """Items prototype[class] + noise x normal, per stream of the given sample shape, standardised; no test
    items.

    Prototypes are standard normal, so `noise` is the ratio of the two standard deviations. Classes are as
    even as the sizes allow. Raises ValueError for no stream, an empty shape, a size or num_classes below 1,
    or a negative noise.
    """
    if not streams or any(not shape or min(shape) < 1 for shape in streams.values()):
        raise ValueError(f"streams must name at least one stream, with sizes of at least 1, got {dict(streams)}")
    if min(num_classes, train, validation) < 1 or noise < 0.0:
        raise ValueError(
            "num_classes, train and validation must be at least 1 and noise not negative, "
            f"got {num_classes}, {train}, {validation} and {noise}"
        )
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat(
        [torch.arange(size)[torch.randperm(size, generator=generator)] % num_classes for size in (train, validation)]
    )
    tensors = []
    for shape in streams.values():
        prototypes = torch.randn(num_classes, *shape, generator=generator)
        x = prototypes[labels] + noise * torch.randn(len(labels), *shape, generator=generator)
        tensors.append(standardised(x, torch.arange(train)))
    train_items = TensorDataset(*(x[:train] for x in tensors), labels[:train])
    return StreamData(
        train=train_items,
        validation=TensorDataset(*(x[train:] for x in tensors), labels[train:]),
        test=None,
        streams={name: tuple(shape) for name, shape in streams.items()},
        num_classes=num_classes,
        train_eval=train_items,
    )
