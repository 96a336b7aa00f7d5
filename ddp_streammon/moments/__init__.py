"""Tensors -> additive figures on their own device."""

from __future__ import annotations

from ddp_streammon.moments import sample
from ddp_streammon.moments.readers import Reader, SampleReader, reader
from ddp_streammon.moments.torch import (
    ABS_MAX,
    COLUMNS,
    ELEMENTS,
    NANS,
    NONFINITE,
    SQ_SUM,
    SUM,
    TENSORS,
    Source,
    moments,
)

__all__ = [
    "ABS_MAX",
    "COLUMNS",
    "ELEMENTS",
    "NANS",
    "NONFINITE",
    "SQ_SUM",
    "SUM",
    "TENSORS",
    "Reader",
    "SampleReader",
    "Source",
    "moments",
    "reader",
    "sample",
]
