"""What monitoring costs the main job: `python -m tests.benchmarks.main_job [--steps 800] [overrides]`.

In one job of 2 ranks with all sinks on, monitored and unmonitored steps alternate, A B B A, so that what else the
machine does hits both alike. Each four give one ratio; the result is the median of the ratios with its 95 % bootstrap
interval. What a step leaves to be done later (a figure that arrives, a row on its way to disk) is done in monitored
steps, or beside whatever step comes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ddp_streammon.train.__main__ import composed, data_and_model
from ddp_streammon.train.config import load
from ddp_streammon.train.loop import Training, build, train_epoch, train_loader
from tests.benchmarks.timing import PATTERN, Alternation
from tests.ranks import run_ranks

DEFAULTS = ("sinks.console.enabled=false", "trainer.progress=false")


class Alternating:
    """A loader that goes round for `steps` batches, switches the monitor before each, and takes the time of each."""

    def __init__(self, loader: DataLoader[Any], training: Training, steps: int) -> None:
        self.loader, self.training, self.steps = loader, training, steps
        assert training.monitor is not None
        self.monitor = training.monitor
        self.seconds: list[float] = []
        self.calls: list[float] = []
        self._step = self.monitor.step
        self.monitor.step = self._timed  # type: ignore[method-assign]

    def _timed(self, **numbers: Any) -> Any:
        start = time.perf_counter()
        figures = self._step(**numbers)
        self.calls.append(time.perf_counter() - start)
        return figures

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        batches = itertools.chain.from_iterable(itertools.repeat(self.loader))
        for step, batch in zip(range(self.steps), batches, strict=False):
            watched = PATTERN[step % 4]
            self.training.monitor = self.monitor if watched else None
            self.monitor._meter.look_at_next(watched)  # in steps that are not, hooks do nothing, too
            start = time.perf_counter()
            yield batch
            self.seconds.append(time.perf_counter() - start)


def _job(steps: int, overrides: list[str], folder: str) -> tuple[list[float], list[float]]:
    """The seconds of each step, and of each call of `monitor.step`."""
    config = composed([*DEFAULTS, *overrides])
    settings = load(config)
    data, model = data_and_model(config, settings)
    training = build(settings, data, model, Path(folder), {}, torch.device("cpu"))
    loader, _ = train_loader(training)
    alternating = Alternating(loader, training, steps + 8)
    train_epoch(training, alternating, 0)  # type: ignore[arg-type]
    alternating.monitor.close()
    return alternating.seconds[8:], alternating.calls[4:]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("overrides", nargs="*", help="of the application, e.g. experiment=mfeat_six")
    given = parser.parse_args(arguments)
    steps = given.steps // 4 * 4
    with tempfile.TemporaryDirectory() as folder:
        seconds, calls = run_ranks(2, _job, steps, given.overrides, folder, timeout=3600)[0]
    found = Alternation.of(seconds)
    ratio = found.ratio
    print(f"2 CPU ranks, {' '.join(given.overrides) or 'the default job'}: {steps} steps, every second one monitored")
    print(f"step, monitored  {1e3 * found.monitored:8.2f} ms\nstep, not        {1e3 * found.plain:8.2f} ms")
    print(f"monitor.step     {1e3 * statistics.median(calls):8.2f} ms")
    print(f"ratio            {ratio.median:8.4f}   (95 % interval {ratio.low:.4f} to {ratio.high:.4f})")


if __name__ == "__main__":
    main()
