"""How the monitored step's host cost grows with tensors and ranks: `python -m tests.benchmarks.growth`.

One process. Ranks are those of PyTorch's fake process group, whose collectives return at once: what is left is what
this project does itself. It leaves the slots of other ranks empty; they are filled as a sum over healthy ranks would,
inputs of streams included. A step over ranks is a mean over `LAP` steps, since some rules look in every fifth. What is
done with the packet that has arrived is also timed alone. Every size is called once in each repeat; figures are medians
of host milliseconds, ratios are paired, with their 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from torch import nn

from ddp_streammon import StreamMonitor
from ddp_streammon.collective import Reduction
from ddp_streammon.moments import reader
from ddp_streammon.plan import Plan
from ddp_streammon.rank_facts import INPUT_CELLS
from ddp_streammon.stats import DETAIL, FACTS, step_stats
from tests.benchmarks import machine
from tests.benchmarks.counting import dispatched
from tests.benchmarks.gradients import whole
from tests.benchmarks.timing import Call, Ratio, Timer, Times, median, table

NAMES = ("rgb", "depth", "shared")
ELEMENTS = 64
"""Of a tensor: so few that what is seen is the cost of a tensor, not of its elements."""
BUSY = 4
"""Of the cells of a rank's facts: how long it is busy in a step."""
PARTS = ("unpack", "stats")
"""Of what is done with a packet that has arrived."""
DRAWN = 50
"""Steps after which ranks say the same again."""
LAP = 40
"""Steps whose mean is a time: a multiple of the steps between two evaluations of every rule."""


def network(tensors: int, device: torch.device) -> nn.Module:
    """So many tensors, with gradients, dealt out over three streams."""
    torch.manual_seed(0)
    model = nn.Module()
    for number, name in enumerate(NAMES):
        owned = range(number, tensors, len(NAMES))
        model.add_module(name, nn.ParameterList(torch.randn(ELEMENTS, device=device) for _ in owned))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def monitored(model: nn.Module, ranks: int | None = None) -> StreamMonitor:
    """A monitor of the model's streams, without a process group or on the last of so many ranks.

    The last, since it reads the last chunk of the gradients, which here is the only one. While it is built the fake
    group answers for the others what this rank says: that they all see the same data, which is taken back after it.
    """
    streams = {name: name for name in NAMES[:2]}
    if ranks is None:
        return StreamMonitor(model, streams=streams)
    last = dist.get_world_size()
    group = dist.new_group(list(range(last - ranks, last)))
    monitor = StreamMonitor(model, streams=streams, group=group, model_peers=range(ranks))
    answer(monitor, ranks)
    return monitor


def plan_of(monitor: StreamMonitor) -> Plan:
    """What the packets of its steps hold."""
    plan = monitor._steps._plan
    assert plan is not None
    return plan


def answer(monitor: StreamMonitor, ranks: int) -> None:
    """Let every rank say what this one says, but of a loss, a pace and inputs of its own; have rules compare them."""
    monitor._collective.share_data([(rank,) for rank in range(ranks)])
    monitor._engine.setup = replace(monitor._engine.setup, data_ranks=tuple(range(ranks)))
    monitor.step(loss=1.0, samples=8)  # the first one compares replicas
    layout, send = plan_of(monitor).layout, monitor._collective.all_reduce
    mine = layout.spans(ranks - 1, turn=(ranks - 1) % layout.turns)
    first = mine[layout.slots[0].name].start
    facts, detail = (range(mine[name].start - first, mine[name].stop - first) for name in (FACTS, DETAIL))
    said: list[torch.Tensor] = []
    turns = itertools.count()

    def reduced(packet: torch.Tensor) -> Reduction:
        if len(packet) == layout.size:
            shared = layout.size - layout.slot_size * len(layout.heard(0))
            packet[:shared] *= ranks
            slots = packet[shared:]
            if not said and slots.any():
                said.extend(others(packet[first : first + layout.slot_size]) for _ in range(DRAWN))
            if said:
                slots.copy_(said[next(turns) % DRAWN])
        return send(packet)

    def others(own: torch.Tensor) -> torch.Tensor:
        rows = own.repeat(len(layout.heard(0)), 1)
        rows[:, detail.start] *= 1 + 0.15 * torch.randn_like(rows[:, 0])
        rows[:, facts.start + BUSY] = 0.02 + 0.002 * torch.rand_like(rows[:, 0])
        for stream in range(len(NAMES)):
            start = detail.stop - (stream + 1) * INPUT_CELLS
            rows[:, start : start + INPUT_CELLS] = inputs(len(rows)).to(rows)
        return rows.flatten()

    monitor._collective.all_reduce = reduced  # type: ignore[method-assign]


def inputs(ranks: int) -> torch.Tensor:
    """What so many ranks say of batches of a stream: 8 items of 1,024 standardised numbers. Shape: [ranks, 11]."""
    drawn = torch.randn(ranks, 8 * 1024, dtype=torch.float64)
    one, none = torch.ones(ranks, dtype=torch.float64), torch.zeros(ranks, dtype=torch.float64)
    sums = (drawn.sum(1), drawn.square().sum(1), one * drawn.shape[1])
    bits = torch.randint(2**32, (ranks,)).double()
    return torch.stack((one, *sums, none, none, bits, drawn.abs().amax(1), *sums), 1)


def step(monitor: StreamMonitor) -> Call:
    """One monitored step."""
    return lambda: monitor.step(loss=1.0, samples=8)


def lap(monitor: StreamMonitor) -> Call:
    """`LAP` monitored steps."""

    def run() -> None:
        for _ in range(LAP):
            monitor.step(loss=1.0, samples=8)

    return run


def reading(monitor: StreamMonitor, device: torch.device) -> Call:
    """The gradients' moments alone."""
    read = reader(whole(monitor.streams), len(NAMES), device)
    return lambda: read(lambda parameter: parameter.grad)


def arrival_parts(plan: Plan) -> dict[str, Call]:
    """What is done with a packet that has arrived, each alone; one in which every cell is filled."""
    layout = plan.layout
    full = torch.ones(layout.size, dtype=torch.float64)
    sums = layout.unpack(full)
    return {
        "unpack": lambda: layout.unpack(full),
        "stats": lambda: step_stats(sums, NAMES, plan.scalars, 1, layout.heard(0), layout.world_size),
    }


def grown_tensors(sizes: Sequence[int], device: torch.device, repeats: int) -> str:
    """A table over numbers of tensors, in a single process."""
    calls: dict[str, Call] = {}
    built: dict[int, float] = {}
    for tensors in sizes:
        model = network(tensors, device)
        start = time.perf_counter()
        monitor = monitored(model)
        built[tensors] = 1e3 * (time.perf_counter() - start)
        calls |= {f"step {tensors}": step(monitor), f"reading {tensors}": reading(monitor, device)}
    taken = _host(Timer(device).round_robin(calls, repeats))
    rows = []
    for tensors in sizes:
        steps, readings = taken[f"step {tensors}"], taken[f"reading {tensors}"]
        rest = [step_ms - reading_ms for step_ms, reading_ms in zip(steps, readings, strict=True)]
        figures = (*(_median(values) for values in (steps, readings, rest)), built[tensors])
        each = 1e3 * _median(readings) / tensors
        rows.append([f"{tensors:,}", *(f"{value:.3f}" for value in figures), f"{each:.2f}"])
    return table(("tensors", "step ms", "reading ms", "all else ms", "building ms", "reading us a tensor"), rows)


def grown_ranks(sizes: Sequence[int], tensors: int, device: torch.device, repeats: int) -> str:
    """A table over numbers of ranks, which are subgroups of the fake world.

    Turns: in how many packets every rank has sent its slots. Audits compare replicas, and hold all slots at once.
    """
    model = network(tensors, device)
    calls: dict[str, Call] = {}
    monitors = {ranks: monitored(model, ranks) for ranks in sizes}
    plans = {ranks: plan_of(monitor) for ranks, monitor in monitors.items()}
    for ranks, monitor in monitors.items():
        calls[f"lap {ranks}"] = lap(monitor)
        calls |= {f"{part} {ranks}": call for part, call in arrival_parts(plans[ranks]).items()}
    taken = _host(Timer(device).round_robin(calls, repeats))
    rows = []
    for ranks, plan in plans.items():
        ratio = Ratio.of(taken[f"lap {ranks}"], taken[f"lap {sizes[0]}"])
        parts = [_median(taken[f"lap {ranks}"]) / LAP, *(_median(taken[f"{part} {ranks}"]) for part in PARTS)]
        collectives = dispatched(step(monitors[ranks]))["c10d"]
        figures = (*(f"{part:.3f}" for part in parts), f"{ratio.median:.2f}", f"{ratio.low:.2f} to {ratio.high:.2f}")
        sent = (f"{8 * plan.layout.size:,}", str(plan.layout.turns), f"{8 * plan.audit_layout.size:,}")
        rows.append([f"{ranks:,}", *sent, *figures, str(collectives)])
    sizes_of = ("packet bytes", "turns", "audit bytes")
    header = ("ranks", *sizes_of, "step ms", *(f"{part} ms" for part in PARTS), f"to {sizes[0]}", "95 %")
    return table((*header, "collectives"), rows)


def _host(taken: dict[str, list[Times]]) -> dict[str, list[float]]:
    return {name: [times.host for times in values] for name, values in taken.items()}


def _median(values: Sequence[float]) -> float:
    middle = median(values)
    assert middle is not None
    return middle


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=machine.device, default="cpu")
    parser.add_argument("--repeats", type=machine.count, default=50)
    parser.add_argument("--tensors", type=machine.count, nargs="+", default=[10, 100, 1_000, 10_000])
    parser.add_argument("--ranks", type=machine.count, nargs="+", default=[1, 4, 16, 64, 256, 1_024, 4_096])
    given = parser.parse_args(arguments)
    tensors = given.tensors[0]
    print(machine.described(given.device))
    print(f"{given.repeats} repeats; {len(NAMES)} streams, tensors of {ELEMENTS} elements\n")
    print(grown_tensors(given.tensors, given.device, given.repeats))
    print(f"\n{tensors} tensors, fake process group:\n")
    with machine.process_group("fake", max(given.ranks)):
        print(grown_ranks(given.ranks, tensors, given.device, given.repeats))


if __name__ == "__main__":
    main()
