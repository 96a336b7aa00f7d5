"""Two or three views of the project's numerals, and a loader that does nothing but index."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler, TensorDataset

from ddp_streammon.train.data.base import split_tensors
from ddp_streammon.train.data.mfeat import IMAGE, labels, views

CLASSES = 10
VALIDATION = 600


@dataclass
class Split:
    """Inputs of each stream [N, ...], in the order of the streams, and the targets [N] or [N, values]."""

    inputs: list[Tensor]
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def batch(self, index: Tensor) -> list[Tensor]:
        """The streams' inputs of these items, and their targets."""
        return [*(x[index] for x in self.inputs), self.target[index]]


@dataclass
class Data:
    streams: dict[str, tuple[int, ...]]
    """Name -> shape of one item."""
    train: Split
    validation: Split


def load(name: str, items: int, seed: int, *, regression: bool = False) -> Data:
    """`items` training items and 600 others of the views; `regression`: the six shape measures as targets."""
    source = split_tensors(_inputs(name), labels(), CLASSES, (items, VALIDATION), seed)
    parts = []
    for part in (source.train, source.validation):
        assert isinstance(part, TensorDataset)
        *inputs, target = part.tensors
        parts.append(Split(list(inputs), target))
    data = Data(source.streams, *parts)
    if regression:
        measures = split_tensors({"mor": views()["mor"]}, labels(), CLASSES, (items, VALIDATION), seed)
        for split, part in ((data.train, measures.train), (data.validation, measures.validation)):
            assert isinstance(part, TensorDataset)
            split.target = part.tensors[0]
    return data


def _inputs(name: str) -> dict[str, Tensor]:
    pixels = views()["pix"].reshape(-1, 1, *IMAGE)
    left, right = pixels[..., :8].contiguous(), pixels[..., 7:].contiguous()
    down, across = torch.gradient(pixels, dim=(2, 3))
    known = {
        "halves": {"left": left, "right": right},
        "edges": {"pixels": pixels, "edges": torch.hypot(down, across)},
        "vectors": {"fou": views()["fou"], "kar": views()["kar"]},
        "three": {"left": left, "right": right, "fou": views()["fou"]},
    }
    if name not in known:
        raise ValueError(f"views must be one of {', '.join(known)}, got {name!r}")
    return known[name]


class Loader:
    """Batches of a split in the order of a sampler, or of a sequence of indices."""

    def __init__(self, split: Split, sampler: Sampler[int] | Sequence[int], batch_size: int) -> None:
        self.split, self.sampler, self.batch_size = split, sampler, batch_size

    def __iter__(self) -> Iterator[list[Tensor]]:
        for index in torch.tensor(list(self.sampler)).split(self.batch_size):
            yield self.split.batch(index)

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.batch_size)  # type: ignore[arg-type]
