"""What the evidence rules cost the host: `python -m tests.benchmarks.rules [--ranks 2] [--steps 600]`.

CPU time of `Engine.take` for steps of a healthy training of two streams, apart from what is measured for it; where the
steps come from does not matter, so they are made by hand (tests/steps.py).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence

from ddp_streammon.config import Intent
from ddp_streammon.rules import evidence
from ddp_streammon.rules.engine import Engine
from tests.benchmarks import machine
from tests.steps import setup, step


def measured(ranks: int, steps: int) -> list[float]:
    """Milliseconds of CPU time of each step, windows full before the first."""
    engine = Engine(evidence.RULES, setup(ranks), Intent(frozen=(), classes=10, total_steps=10 * steps, clip_norm=1.0))
    made = [step(n, ranks, loss=0.2 + 2.1 * math.exp(-n / 40)) for n in range(1, steps + 201)]
    taken = []
    for stats in made:
        start = time.process_time()
        engine.take(stats)
        taken.append(1e3 * (time.process_time() - start))
    return taken[200:]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=machine.count, default=2)
    parser.add_argument("--steps", type=machine.count, default=600)
    given = parser.parse_args(arguments)
    taken = sorted(measured(given.ranks, given.steps))
    print(f"{len(evidence.RULES)} rules, {given.ranks} rank(s), {given.steps} steps of two streams")
    figures = (statistics.fmean(taken), statistics.median(taken), taken[int(0.99 * len(taken))])
    print("CPU ms a step: mean {:.3f}, median {:.3f}, 99 % {:.3f}".format(*figures))


if __name__ == "__main__":
    main()
