"""What a benchmark runs on: its arguments, its process group, and the line that says so."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist


def count(text: str) -> int:
    """A command line's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def device(text: str) -> torch.device:
    """A command line's cpu or cuda."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("cuda was asked for, but PyTorch finds no CUDA device here; use cpu")
    return torch.device("cuda", 0) if text == "cuda" else torch.device("cpu")


def described(where: torch.device) -> str:
    """The device's name, the processor's cores, and PyTorch's version."""
    names = [_processor()] if where.type == "cpu" else [torch.cuda.get_device_name(where), _processor()]
    threads = f"{torch.get_num_threads()} thread(s)"
    return f"{', '.join(names)}, {os.cpu_count()} CPU cores, {threads}, torch {torch.__version__}"


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@contextmanager
def process_group(backend: str, world_size: int = 1) -> Iterator[None]:
    """This process alone, or as the last rank of the fake backend, which sends nothing and waits for nobody."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group(backend, store=store, rank=world_size - 1, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
