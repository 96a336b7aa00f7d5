"""What the statistics of one step cost, beside what others do: `python -m tests.benchmarks.statistics`.

One process with a process group of one rank (gloo on CPU, NCCL on CUDA) and random float32 gradients of two streams.
Every method is called once in each repeat, in an order drawn anew; figures are medians over the repeats, "to ours" is
the median of the paired ratios (host time on CPU, device time on CUDA) with its 95 % bootstrap interval.

host: until the call returns. device: CUDA events around it. queued: the same behind 20 ms of other work, which hides
the launches. blocked: host time in that case, near 20 ms where a call waits for the device. of read: the speed at which
the gradients' bytes are read (in queued time on CUDA, host time on CPU) as a share of what torch.sum over one large
buffer reaches in the same run. syncs: on CUDA the waits that PyTorch warns of, on CPU the numbers read by .item().
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ddp_streammon import StreamMonitor
from ddp_streammon.moments import reader
from ddp_streammon.stats import step_layout
from tests.benchmarks import machine, peers
from tests.benchmarks.counting import Counts, counts
from tests.benchmarks.gradients import PIXELS, STREAMS, Gradients, gradient_bytes, size, whole
from tests.benchmarks.timing import Call, Ratio, Timer, Times, median, table

OURS = "ours: moments.reader"
SENT = "all_reduce of its packet"
CEILING = "torch.sum, one buffer"
CEILING_MB = {"cpu": 256, "cuda": 4096}
COLUMNS = ("host ms", "device ms", "queued ms", "blocked ms", "to ours", "95 %", "of read")


def ours(gradients: Gradients, device: torch.device) -> dict[str, Call]:
    """Reading the gradients; the whole monitored step; and the all_reduce that a group of one rank spares it."""
    read = reader(whole(gradients.streams), len(gradients.streams.streams), device)
    monitor = StreamMonitor(gradients.model, streams={name: name for name in STREAMS})
    loss = torch.ones((), device=device)
    packet = step_layout(monitor.streams.names, ("loss", "samples"), 1).zeros(device)
    return {
        OURS: lambda: read(lambda parameter: parameter.grad),
        "ours: monitor.step": lambda: monitor.step(loss=loss, samples=8),
        SENT: lambda: dist.all_reduce(packet),
    }


def paired(times: Times) -> float:
    """What ratios are taken of."""
    return times.host if times.device is None else times.device


def working(times: Times) -> float:
    """What the speed of reading is taken of."""
    return times.host if times.queued is None else times.queued


def row(taken: Sequence[Times], reference: Sequence[Times], share: float | None, counted: Counts) -> list[str]:
    """A method's cells of the table."""
    columns = [[getattr(times, name) for times in taken] for name in ("host", "device", "queued", "blocked")]
    ratio = Ratio.of([paired(times) for times in taken], [paired(times) for times in reference])
    operations = next((number for number in (counted.kernels, counted.ops) if number is not None), "-")
    return [
        *(_number(median(column)) for column in columns),
        f"{ratio.median:.2f}",
        f"{ratio.low:.2f} to {ratio.high:.2f}",
        "-" if share is None else f"{100 * share:.1f} %",
        str(operations),
        str(counted.syncs),
        str(counted.collectives),
        "-" if counted.peak_bytes is None else f"{counted.peak_bytes / 1e6:.2f}",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def compare(gradients: Gradients, device: torch.device, repeats: int, ceiling_mb: int) -> str:
    """The table, and the read ceiling."""
    buffer = torch.rand(ceiling_mb * 1_000_000 // 4, device=device)
    calls: dict[str, Call] = {**ours(gradients, device), **peers.methods(gradients), CEILING: buffer.sum}
    taken = Timer(device).round_robin(calls, repeats)
    counted = {name: counts(call, device) for name, call in calls.items()}
    ceiling = [working(times) for times in taken[CEILING]]
    of_buffer = gradient_bytes(gradients.model) / buffer.nbytes

    def share(name: str) -> float | None:
        """Of the ceiling's speed; None where no gradient is read."""
        if name in (CEILING, SENT):
            return 1.0 if name == CEILING else None
        return of_buffer * Ratio.of(ceiling, [working(times) for times in taken[name]]).median

    rows = [[name, *row(taken[name], taken[OURS], share(name), counted[name])] for name in calls]
    operations = "aten ops" if device.type == "cpu" else "kernels"
    header = ("method", *COLUMNS, operations, "syncs", "collectives", "peak MB")
    speed = buffer.nbytes / 1e6 / statistics.median(ceiling)
    return f"{table(header, rows)}\nread ceiling: {speed:.1f} GB/s ({CEILING} of {buffer.nbytes / 1e6:.0f} MB)"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(PIXELS), default="resnet")
    parser.add_argument("--device", type=machine.device, default="cpu")
    parser.add_argument("--repeats", type=machine.count, default=20)
    parser.add_argument("--ceiling-mb", type=machine.count, help="of the buffer that torch.sum reads")
    given = parser.parse_args(arguments)
    device: torch.device = given.device
    with machine.process_group("gloo" if device.type == "cpu" else "nccl"):
        gradients = Gradients.random(given.model, device)
        print(f"{machine.described(device)}\ntwo {given.model} streams, float32: {size(gradients.model)}")
        print(f"medians of {given.repeats} repeats, methods interleaved\n")
        print(compare(gradients, device, given.repeats, given.ceiling_mb or CEILING_MB[device.type]))


if __name__ == "__main__":
    main()
