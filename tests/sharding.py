"""What FSDP2 is needed for: on CPU, tests of it are skipped under a PyTorch that cannot (see FSDP2_ON_CPU)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from ddp_streammon.train.parallel import FSDP2_ON_CPU

needs_fsdp2 = pytest.mark.skipif(not FSDP2_ON_CPU, reason="FSDP2 on CPU needs PyTorch 2.9")


def possible(layouts: Iterable[str]) -> tuple[str, ...]:
    """Those of `layouts`, known by their names, in which this PyTorch trains on CPU."""
    return tuple(name for name in layouts if FSDP2_ON_CPU or not name.startswith(("fsdp2", "hsdp", "mixed by stream")))


def cases(layouts: Iterable[str]) -> list[Any]:
    """The layouts as parameters of a test, which is skipped for those that are not possible."""
    return [pytest.param(name, marks=() if possible([name]) else needs_fsdp2) for name in layouts]
