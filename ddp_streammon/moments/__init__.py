"""Tensors -> additive figures on their own device."""

from ddp_streammon.moments.torch import ABS_MAX, COLUMNS, ELEMENTS, NONFINITE, SQ_SUM, SUM, TENSORS, moments

__all__ = ["ABS_MAX", "COLUMNS", "ELEMENTS", "NONFINITE", "SQ_SUM", "SUM", "TENSORS", "moments"]
