"""What monitoring adds to whole training steps: `python -m tests.benchmarks.whole_step`.

Two streams of ResNet-18 or ViT-B size under DistributedDataParallel: on CPU 2 gloo ranks and small batches, on CUDA one
NCCL rank and bfloat16 autocast. Blocks of steps, monitored (A) and not (B), alternate as A B B A; each four give one
ratio, and the result is the median of the ratios with its 95 % bootstrap interval. The device is waited for at the ends
of a block only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import MonitorConfig, StreamMonitor
from ddp_streammon.config import RuleSet
from tests.benchmarks import machine
from tests.benchmarks.counting import dispatched
from tests.benchmarks.gradients import CLASSES, PIXELS, STREAMS, size, two_streams
from tests.benchmarks.timing import PATTERN, Alternation
from tests.ranks import run_ranks

RANKS = {"cpu": 2, "cuda": 1}
SIZES = {
    ("cpu", "small"): (16, 8, 4),
    ("cpu", "resnet"): (4, 64, 1),
    ("cpu", "vit"): (2, 32, 1),
    ("cuda", "small"): (256, 8, 20),
    ("cuda", "resnet"): (256, 224, 5),
    ("cuda", "vit"): (64, 224, 5),
}
"""(device, model) -> items a rank, height and width of an image, steps a block."""


@dataclass(frozen=True)
class Job:
    """What is trained, and for how long. `blocks` and the warm-up are whole fours of blocks of `steps` steps."""

    model: str
    device: str
    items: int
    pixels: int
    steps: int
    blocks: int
    config: MonitorConfig | None = None
    warm_up: int = 4


@dataclass(frozen=True)
class Measured:
    """`seconds` of each block, `calls` of each monitor.step; collectives of one; the machine and the model in words."""

    seconds: list[float]
    calls: list[float]
    collectives: int
    machine: str
    size: str


def train(job: Job) -> Measured:
    """Train on one batch, again and again. Runs on every rank of the process group."""
    device = machine.device(job.device)
    network = two_streams(job.model, device, job.pixels)
    model = DistributedDataParallel(network, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    monitor = StreamMonitor(model, optimizer, {name: name for name in STREAMS}, config=job.config)
    inputs = [torch.randn(job.items, 3, job.pixels, job.pixels, device=device) for _ in STREAMS]
    target = torch.randint(CLASSES, (job.items,), device=device)
    seconds: list[float] = []
    calls: list[float] = []

    def step(watched: bool) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = cross_entropy(model(*inputs), target)
        loss.backward()  # type: ignore[no-untyped-call]
        if watched:
            start = time.perf_counter()
            monitor.step(loss=loss.detach(), samples=job.items)
            calls.append(time.perf_counter() - start)
        optimizer.step()

    for block in range(job.warm_up + job.blocks):
        watched = PATTERN[block % len(PATTERN)]
        monitor._meter.look_at_next(watched)  # in blocks that are not, hooks do nothing, too
        _wait(device)
        start = time.perf_counter()
        for _ in range(job.steps):
            step(watched)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    collectives = dispatched(lambda: monitor.step(loss=1.0, samples=job.items))["c10d"]
    monitor.close()
    monitored = sum(PATTERN) * job.warm_up // len(PATTERN) * job.steps
    return Measured(seconds[job.warm_up :], calls[monitored:], collectives, machine.described(device), size(network))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(job: Job, measured: Measured) -> str:
    """What was measured, and on what."""
    found = Alternation.of(measured.seconds)
    per_step = 1e3 / job.steps
    config = job.config or MonitorConfig()
    ratio = found.ratio
    return "\n".join(
        [
            f"{RANKS[job.device]} {job.device} rank(s) under DDP: {measured.machine}",
            f"two {job.model} streams: {measured.size}; {job.items} items a rank of 3 x {job.pixels} x {job.pixels}",
            f"rules={config.rules.value}, local_gradients={config.local_gradients}",
            f"{job.blocks} blocks of {job.steps} step(s), every second one monitored",
            f"step, monitored  {per_step * found.monitored:8.2f} ms",
            f"step, not        {per_step * found.plain:8.2f} ms",
            f"monitor.step     {1e3 * statistics.median(measured.calls):8.2f} ms, {measured.collectives} collective(s)",
            f"ratio            {ratio.median:8.4f}   (95 % interval {ratio.low:.4f} to {ratio.high:.4f})",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(PIXELS), default="resnet")
    parser.add_argument("--device", type=machine.device, default="cpu")
    parser.add_argument("--fours", type=machine.count, default=25, help="of blocks, A B B A")
    parser.add_argument("--steps", type=machine.count, help="of a block")
    parser.add_argument("--items", type=machine.count, help="of a rank's batch")
    parser.add_argument("--rules", type=RuleSet, default=RuleSet.evidence, help="evidence, guide or off")
    parser.add_argument("--local-gradients", action="store_true", help="read each rank's own gradient, too")
    given = parser.parse_args(arguments)
    kind: str = given.device.type
    items, pixels, steps = SIZES[kind, given.model]
    config = MonitorConfig(rules=given.rules, local_gradients=given.local_gradients)
    job = Job(given.model, kind, given.items or items, pixels, given.steps or steps, 4 * given.fours, config)
    if kind == "cpu":
        measured = run_ranks(RANKS[kind], train, job, timeout=3600)[0]
    else:
        with machine.process_group("nccl"):
            measured = train(job)
    print(report(job, measured))


if __name__ == "__main__":
    main()
