"""HTAD: home-task activities as audio and wrist acceleration, read from the installed package
multiviewstacking.

Garcia-Ceja et al., HTAD: A Home-Tasks Activities Dataset with Wrist-Accelerometer and Audio Features, MMM
2021, https://doi.org/10.1007/978-3-030-67835-7_17. Free for research and education; other uses need the
authors' permission, so the data are never copied into this repository.
"""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import torch

from ddp_streammon.train.data.base import StreamData, split_tensors

STREAMS = {"audio": "v1_", "accelerometer": "v2_"}
"""Stream -> prefix of its columns: 36 MFCC figures, 16 figures of the acceleration."""


def htad(seed: int = 0, train: int = 700, validation: int = 343) -> StreamData:
    """1,386 windows, 7 activities: `audio` [36] and `accelerometer` [16]; what is not train or validation is
    test.

    Raises ModuleNotFoundError when multiviewstacking is not installed, ValueError for sizes that do not fit.
    """
    with csv_path().open(newline="") as file:
        rows = list(csv.DictReader(file))
    inputs = {
        name: torch.tensor(
            [[float(row[column]) for column in row if column.startswith(prefix)] for row in rows],
            dtype=torch.float64,
        )
        for name, prefix in STREAMS.items()
    }
    classes = sorted({row["class"] for row in rows})
    labels = torch.tensor([classes.index(row["class"]) for row in rows])
    return split_tensors(inputs, labels, len(classes), (train, validation), seed)


def csv_path() -> Path:
    """Path of htad.csv in the installed package, found without importing it (it would import pandas and
    sklearn).
    """
    spec = importlib.util.find_spec("multiviewstacking")
    path = Path(spec.origin).parent / "data" / "htad.csv" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ModuleNotFoundError(
            "htad needs data/htad.csv of the package multiviewstacking, which is not installed: "
            "pip install --no-deps 'multiviewstacking<0.8' (or the extra ddp-streammon[htad])"
        )
    return path
