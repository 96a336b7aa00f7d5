"""Whether a long job grows: `python -m tests.benchmarks.soak [--steps 1000000] [--ranks 8]`.

Monitored steps on PyTorch's fake process group, in ten parts: for each, the median time of a step and the memory that
the process holds at its end. Both should be flat once History is full.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.testing._internal.distributed.fake_pg
from torch import nn

from ddp_streammon import MonitorConfig, StreamMonitor
from tests.benchmarks import machine
from tests.benchmarks.timing import table

PARTS = 10


@dataclass(frozen=True)
class Part:
    """Steps of a job, one tenth of it."""

    steps: int
    microseconds: float
    """Median of a step."""
    megabytes: float
    """Resident memory at the end."""


def run(steps: int, history_limit: int) -> list[Part]:
    """A job of so many monitored steps on the process group at hand."""
    model = nn.ModuleDict({"rgb": nn.Linear(8, 8), "depth": nn.Linear(8, 8), "head": nn.Linear(8, 3)})
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    config = MonitorConfig(history_limit=history_limit)
    ranks = range(torch.distributed.get_world_size())
    monitor = StreamMonitor(model, streams={"rgb": "rgb", "depth": "depth"}, config=config, model_peers=ranks)
    parts = []
    for part in range(PARTS):
        seconds = []
        for number in range(steps // PARTS):
            start = time.perf_counter()
            monitor.step(loss=1.0 / (1 + part + number), samples=8)
            seconds.append(time.perf_counter() - start)
        parts.append(Part(len(seconds), 1e6 * statistics.median(seconds), _resident_megabytes()))
    monitor.close()
    return parts


def _resident_megabytes() -> float:
    """What Linux says this process holds."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(fields["VmRSS"].split()[0]) / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=machine.count, default=1_000_000)
    parser.add_argument("--ranks", type=machine.count, default=8, help="of the fake process group")
    parser.add_argument("--history", type=machine.count, default=10_000, help="values kept for each key")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with machine.process_group("fake", given.ranks):
        parts = run(given.steps, given.history)
    print(f"{machine.described(torch.device('cpu'))}; {given.ranks} ranks of the fake process group")
    rows, done = [], 0
    for part in parts:
        done += part.steps
        rows.append([f"{done:,}", f"{part.microseconds:.0f}", f"{part.megabytes:.1f}"])
    print(table(("steps", "step us", "memory MB"), rows))


if __name__ == "__main__":
    main()
