"""What the evidence rules cost the host: `python -m tests.benchmarks.rules [--ranks 1 8 64] [--steps 600]`.

Steps of a healthy training of two streams, apart from what is measured for it; where they come from does not matter, so
they are made by hand (tests/steps.py) and packed as they arrive, with the slots of every rank filled. Beyond 64 KiB
ranks are heard in turns: what follows is that of so many ranks at once. CPU time of a packet's way into figures and of
`Engine.take`, windows full before the first.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Sequence

import torch

from ddp_streammon.config import Intent
from ddp_streammon.packet import Layout
from ddp_streammon.rules import evidence
from ddp_streammon.rules.engine import Engine
from ddp_streammon.stats import BAD, DETAIL, FACTS, StepStats, step_layout, step_stats
from tests.benchmarks import machine
from tests.benchmarks.timing import table
from tests.steps import STREAMS, cells_of, setup, step

NAMES = (*STREAMS, "shared")
SCALARS = {"loss": False, "samples": True}
WARM = 200


def healthy(number: int, ranks: int) -> StepStats:
    """A step in which the ranks' losses, inputs and times differ as those of batches of 32 items and of one machine."""
    draw = random.Random(number).gauss
    loss = 0.2 + 2.1 * math.exp(-number / 40)
    details = {rank: {"loss": loss * (1 + draw(0, 0.15))} for rank in range(ranks)}
    facts = {rank: {"busy_seconds": 0.02 + abs(draw(0, 0.002))} for rank in range(ranks)}
    seen = {(name, rank): (draw(0, 0.05), draw(1, 0.05)) for name in STREAMS for rank in range(ranks)}
    inputs = {place: {"mean": mean, "std": std} for place, (mean, std) in seen.items()}
    return step(number, ranks, loss=loss, details=details, facts=facts, inputs=inputs)


def packed(stats: StepStats, layout: Layout) -> torch.Tensor:
    """The packet of which a step's facts of ranks come, with other cells as they are in any packet."""
    packets = []
    for facts in stats.rank_facts:
        assert facts.detail is not None
        values = {field.name: torch.full(field.shape, 1 / len(stats.rank_facts)) for field in layout.fields}
        values |= {BAD: torch.zeros(()), FACTS: torch.tensor(facts.cells(), dtype=torch.float64)}
        values[DETAIL] = torch.tensor(cells_of(facts.detail), dtype=torch.float64)
        packets.append(layout.pack(values, facts.rank))
    return torch.stack(packets).sum(0)


def measured(ranks: int, steps: int) -> tuple[list[float], list[float]]:
    """Milliseconds of CPU time of each step: from the packet to its figures, and of the rules."""
    engine = Engine(evidence.RULES, setup(ranks), Intent(frozen=(), classes=10, total_steps=10 * steps, clip_norm=1.0))
    layout = step_layout(NAMES, tuple(SCALARS), ranks, evidence=True)
    made = [healthy(n, ranks) for n in range(1, steps + WARM + 1)]
    of_packet, of_rules = [], []
    for stats in made:
        packet = packed(stats, layout)
        start = time.process_time()
        read = step_stats(layout.unpack(packet), NAMES, SCALARS, stats.step, layout.heard(0), ranks)
        middle = time.process_time()
        engine.take(StepStats(**{**vars(stats), "rank_facts": read.rank_facts}))
        of_packet.append(1e3 * (middle - start))
        of_rules.append(1e3 * (time.process_time() - middle))
    return of_packet[WARM:], of_rules[WARM:]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=machine.count, nargs="+", default=[1, 2, 8, 64])
    parser.add_argument("--steps", type=machine.count, default=600)
    given = parser.parse_args(arguments)
    rows = []
    for ranks in given.ranks:
        of_packet, of_rules = measured(ranks, given.steps)
        last = sorted(of_rules)[int(0.99 * len(of_rules))]
        figures = (statistics.fmean(of_packet), statistics.fmean(of_rules), statistics.median(of_rules), last)
        rows.append([str(ranks), *(f"{figure:.3f}" for figure in figures)])
    print(f"{len(evidence.RULES)} rules, {given.steps} steps of two streams; CPU ms a step")
    print(table(("ranks heard", "packet, mean", "rules, mean", "rules, median", "rules, 99 %"), rows))


if __name__ == "__main__":
    main()
