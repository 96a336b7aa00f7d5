"""Checkpoints: everything that a resumed run needs to go on exactly where the other stopped."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy
import torch


def rng_state() -> dict[str, Any]:
    """This process's random states (Python, NumPy, torch on the CPU and the current CUDA device), as plain values."""
    kind, words, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, numpy.asarray(words).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, words, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, numpy.array(words, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`; a reader sees the old file or the new one, never half of it."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load(path: str | Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values only, so that a file from elsewhere cannot run code."""
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state
