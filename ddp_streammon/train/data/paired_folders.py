"""Images of the same scene in one folder a stream: root/rgb/<class>/x.png beside root/depth/<class>/x.png."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from ddp_streammon.train.data.base import Item, StreamData
from ddp_streammon.train.data.splits import stratified

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
FULL_SCALE = {"L": 255.0, "I;16": 65535.0, "I;16B": 65535.0, "I": 65535.0, "F": 1.0}
"""Modes of one channel -> the value that becomes 1 (depth in mode F is taken as scaled already)."""
SHOWN = 5
"""How many files an error lists."""


def paired_folders(
    root: str | Path,
    streams: Sequence[str] = ("rgb", "depth"),
    size: int = 64,
    seed: int = 0,
    validation: float = 0.2,
    augment: bool = True,
) -> StreamData:
    """One image stream per folder of `root`, matched by class folder and file stem; no test items.

    A stream whose first image is of mode L, I;16, I or F has one channel, any other three (RGB); values are
    scaled to [0, 1] and resized to `size` x `size` (aspect not kept). `validation` is the share of items held
    back, stratified by class. With `augment`, a training item is mirrored with probability 1/2, all streams
    alike, drawn from torch's global generator (which a DataLoader seeds per worker).

    Raises ValueError when a folder is missing or empty, when the streams' files do not match, or for figures
    out of range; ModuleNotFoundError when Pillow is not installed.
    """
    if not streams or len(set(streams)) != len(streams):
        raise ValueError(f"streams must name at least one folder of {root}, each once, got {tuple(streams)}")
    if size < 1 or not 0.0 < validation < 1.0:
        raise ValueError(f"size must be at least 1 and validation in (0, 1), got {size} and {validation}")
    files = {name: _index(Path(root) / name) for name in streams}
    _check_match(files)
    keys = sorted(files[streams[0]])
    classes = sorted({label for label, _ in keys})
    labels = torch.tensor([classes.index(label) for label, _ in keys])
    paths = [tuple(files[name][key] for name in streams) for key in keys]
    channels = tuple(_channels(path) for path in paths[0])
    held_back = round(validation * len(keys))
    if not 0 < held_back < len(keys):
        raise ValueError(f"validation={validation} of {len(keys)} items leaves no validation or no training items")
    train, rest = stratified(labels, [len(keys) - held_back], torch.Generator().manual_seed(seed))

    def part(index: Tensor, flip: bool) -> FolderDataset:
        chosen = index.tolist()
        return FolderDataset([paths[i] for i in chosen], labels[index], channels, size, flip)

    return StreamData(
        train=part(train, augment),
        validation=part(rest, False),
        test=None,
        streams={name: (count, size, size) for name, count in zip(streams, channels, strict=True)},
        num_classes=len(classes),
        train_eval=part(train, False),
    )


class FolderDataset(Dataset[Item]):
    """Items read from image files: paths[i] holds one file per stream, labels [N] the classes."""

    def __init__(
        self,
        paths: Sequence[tuple[Path, ...]],
        labels: Tensor,
        channels: tuple[int, ...],
        size: int,
        flip: bool = False,
    ) -> None:
        self.paths = paths
        self.labels = labels
        self.channels = channels
        self.size = size
        self.flip = flip

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        images = [read_image(path, c, self.size) for path, c in zip(self.paths[index], self.channels, strict=True)]
        if self.flip and bool(torch.rand(()) < 0.5):
            images = [image.flip(-1) for image in images]
        return (*images, self.labels[index])


def read_image(path: Path, channels: int, size: int) -> Tensor:
    """[channels, size, size], float32 in [0, 1]; channels 3 (RGB) or 1 (see FULL_SCALE), not a number becomes
    0.

    Raises ValueError when one channel is wanted and the file is of another mode.
    """
    with _pillow().open(path) as image:
        if channels == 1 and image.mode not in FULL_SCALE:
            raise ValueError(
                f"{path} is of mode {image.mode}, but its stream's first image has one channel: "
                f"convert it to one of {', '.join(FULL_SCALE)}"
            )
        scale = 255.0 if channels == 3 else FULL_SCALE[image.mode]
        values = np.array(image.convert("RGB") if channels == 3 else image, dtype=np.float32)
    pixels = torch.from_numpy(values).reshape(*values.shape[:2], channels).permute(2, 0, 1)
    scaled = (pixels / scale).nan_to_num(nan=0.0).clamp(0.0, 1.0)
    return interpolate(scaled[None], (size, size), mode="bilinear", antialias=True)[0]


def _index(folder: Path) -> dict[tuple[str, str], Path]:
    """(class, stem) -> file, of the images in the folder's class folders."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.glob("*/*")):
        if path.suffix.lower() in SUFFIXES:
            key = (path.parent.name, path.stem)
            if key in found:
                raise ValueError(f"two files of one stem, {found[key]} and {path}: the stem pairs the streams")
            found[key] = path
    if not found:
        raise ValueError(f"no image ({', '.join(SUFFIXES)}) in {folder}/<class>/")
    return found


def _check_match(files: dict[str, dict[tuple[str, str], Path]]) -> None:
    """Raise ValueError that lists files of one stream that another lacks."""
    everything = sorted(set().union(*files.values()))
    missing = [
        f"{name}/{label}/{stem}" for label, stem in everything for name in files if (label, stem) not in files[name]
    ]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise ValueError(
            f"every stream needs the same classes and file stems; missing {', '.join(missing[:SHOWN])}{more}"
        )


def _channels(path: Path) -> int:
    """1 for the modes of FULL_SCALE, else 3."""
    with _pillow().open(path) as image:
        return 1 if image.mode in FULL_SCALE else 3


def _pillow() -> Any:
    """The module PIL.Image, imported when first needed: Pillow is an optional extra."""
    try:
        return importlib.import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "paired_folders reads images with Pillow, which is not installed: "
            "pip install pillow (or the extra ddp-streammon[images])"
        ) from error
