"""What monitoring costs the main job: `python -m tests.benchmarks.main_job [--pairs 40] [overrides]`.

In one job of 2 ranks, epochs with every step monitored (all sinks on) alternate with epochs without a monitor, in
the order A B B A. A pair's ratio is of two neighbouring epochs, so that what else the machine does hits both; the
result is the median of the ratios with its 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ddp_streammon.train.__main__ import composed, data_and_model
from ddp_streammon.train.config import load
from ddp_streammon.train.loop import Training, build, train_epoch, train_loader
from tests.ranks import run_ranks

DEFAULTS = ("sinks.console.enabled=false", "trainer.progress=false")


def _epoch_seconds(training: Training, rounds: int) -> float:
    """Seconds of `rounds` epochs. Both ranks step together, so one rank's clock will do."""
    loader, _ = train_loader(training)
    torch.distributed.barrier()
    start = time.perf_counter()
    for _ in range(rounds):
        train_epoch(training, loader, 0)
    return time.perf_counter() - start


def _job(pairs: int, rounds: int, overrides: list[str], folder: str) -> tuple[list[tuple[float, float]], int]:
    """(seconds monitored, seconds not) of each pair, and the optimizer steps in each."""
    config = composed([*DEFAULTS, *overrides])
    settings = load(config)
    data, model = data_and_model(config, settings)
    training = build(settings, data, model, Path(folder), {}, torch.device("cpu"))
    monitor = training.monitor
    assert monitor is not None
    steps = len(train_loader(training)[0]) * rounds // settings.trainer.accumulate
    _epoch_seconds(training, rounds)
    result = []
    for pair in range(pairs):
        seconds = {}
        for monitored in (True, False) if pair % 2 == 0 else (False, True):
            training.monitor = monitor if monitored else None
            seconds[monitored] = _epoch_seconds(training, rounds)
        result.append((seconds[True], seconds[False]))
    monitor.close()
    return result, steps


def _interval(values: list[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=4, help="epochs in each half of a pair")
    parser.add_argument("overrides", nargs="*", help="of the application, e.g. experiment=mfeat_six")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pairs, steps = run_ranks(2, _job, given.pairs, given.rounds, given.overrides, folder, timeout=3600)[0]
    ratios = [monitored / plain for monitored, plain in pairs]
    low, high = _interval(ratios)
    step = [1e3 * statistics.median(column) / steps for column in zip(*pairs, strict=True)]
    print(f"2 CPU ranks, {' '.join(given.overrides) or 'the default job'}: {len(pairs)} pairs of {steps} steps")
    print(f"step, monitored  {step[0]:8.3f} ms\nstep, not         {step[1]:8.3f} ms")
    print(f"ratio            {statistics.median(ratios):8.4f}   (95 % interval {low:.4f} to {high:.4f})")


if __name__ == "__main__":
    main()
