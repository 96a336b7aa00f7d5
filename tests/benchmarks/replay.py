"""What trying streams costs beside a plain pass: `python -m tests.benchmarks.replay`.

Two streams, and the same items in every pass. "loop": a loader, the model, each item's loss and correctness, as a user
would write it. "plain": `evaluation.measure` of the whole model alone. "tried": with it each stream exchanged and each
stream's features at their mean: four variants of what follows the encoders. "pair": a fifth, both streams exchanged.
The passes take turns in an order drawn anew for each repeat, and ratios are paired by repeat: medians with their 95 %
bootstrap intervals, of the time that passes and, on CPU, of the processor's time alone, which other jobs on the machine
disturb less. Models: `mlp`, the application's multi_mlp (`--hidden`, vectors of mfeat), and `resnet`, two ResNet-18.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ddp_streammon.collective import Collective
from ddp_streammon.evaluation import Items, Plan, Replacement, classification, measure
from ddp_streammon.evaluation.readings import exchanges
from ddp_streammon.streams import StreamSet
from ddp_streammon.train.data.mfeat import mfeat
from ddp_streammon.train.models import multi_mlp
from tests.benchmarks import machine
from tests.benchmarks.gradients import CLASSES, resolved, two_streams
from tests.benchmarks.timing import WARM_UP, Ratio, table

ITEMS = {("cpu", "mlp"): 512, ("cpu", "resnet"): 32, ("cuda", "mlp"): 512, ("cuda", "resnet"): 512}
BATCH = {("cpu", "mlp"): 128, ("cpu", "resnet"): 16, ("cuda", "mlp"): 128, ("cuda", "resnet"): 128}
PIXELS = {"cpu": 32, "cuda": 224}
LOOP, PLAIN, TRIED, PAIR = "loop", "plain", "tried", "pair"


@dataclass(frozen=True)
class Job:
    """A model, its streams, a loader, and the shape of each stream's features."""

    model: nn.Module
    streams: StreamSet
    loader: DataLoader[Any]
    features: Mapping[str, int]
    device: torch.device


def mlp(items: int, batch: int, device: torch.device, hidden: Sequence[int]) -> Job:
    data = mfeat(("fou", "pix"), train=max(items, 1200), validation=100)
    torch.manual_seed(0)
    model = multi_mlp(data.streams, data.num_classes, hidden, device=device)
    assert isinstance(data.train, TensorDataset)
    chosen = TensorDataset(*(x[:items] for x in data.train.tensors))
    streams = StreamSet.resolve(model, dict(model.encoders.items()))
    paths = {f"encoders.{name}": hidden[-1] for name in data.streams}
    return Job(model, streams, DataLoader(chosen, batch), paths, device)


def resnet(items: int, batch: int, device: torch.device, _: Sequence[int]) -> Job:
    pixels = PIXELS[device.type]
    model = two_streams("resnet", device, pixels)
    chance = torch.Generator().manual_seed(0)
    images = [torch.randn(items, 3, pixels, pixels, generator=chance) for _ in range(2)]
    chosen = TensorDataset(*images, torch.randint(CLASSES, (items,), generator=chance))
    return Job(model, resolved(model), DataLoader(chosen, batch), {"rgb": 512, "depth": 512}, device)


JOBS: dict[str, Callable[[int, int, torch.device, Sequence[int]], Job]] = {"mlp": mlp, "resnet": resnet}


def passes(job: Job) -> dict[str, Callable[[], object]]:
    names = job.streams.user_names
    four = exchanges(names, full=False) | {f"mean:{name}": {name: Replacement.mean} for name in names}
    means: dict[tuple[str, int], Sequence[Tensor | None]] = {
        (path, 0): [torch.zeros(width)] for path, width in job.features.items()
    }
    collective, score = Collective(), classification()

    def loop() -> None:
        job.model.eval()
        with torch.no_grad():
            found = [score(job.model, [x.to(job.device) for x in batch]) for batch in job.loader]
        torch.stack([torch.cat([batch[of].double() for batch in found]) for of in ("loss", "correct")]).cpu()
        job.model.train()

    def measured(plan: Plan) -> Callable[[], object]:
        return lambda: measure(job.streams, collective, {"val": Items(job.loader)}, score, plan)

    return {
        LOOP: loop,
        PLAIN: measured(Plan({})),
        TRIED: measured(Plan(four, means=means)),
        PAIR: measured(Plan(exchanges(names, full=True) | four, means=means)),
    }


def report(job: Job, repeats: int) -> str:
    clocks = {"ms": time.perf_counter}
    if job.device.type == "cpu":
        clocks["CPU ms"] = time.process_time
    taken = round_robin(passes(job), list(clocks.values()), repeats)
    rows = []
    for number, unit in enumerate(clocks):
        for name, times in taken.items():
            own = [each[number] for each in times]
            ratios = [Ratio.of(own, [each[number] for each in taken[other]]) for other in (LOOP, PLAIN)]
            shown = [f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" for ratio in ratios]
            rows.append((name, f"{1e3 * statistics.median(own):.2f}", unit, *shown))
    return table(("pass", "median", "of", "to loop", "to plain"), rows)


def round_robin(
    calls: Mapping[str, Callable[[], object]], clocks: Sequence[Callable[[], float]], repeats: int
) -> dict[str, list[list[float]]]:
    """Seconds of each call by each clock; a call ends with a read from the device, so that its work is in them."""
    draw = random.Random(0)
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    taken: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name in draw.sample(list(calls), len(calls)):
            began = [clock() for clock in clocks]
            calls[name]()
            taken[name].append([clock() - start for clock, start in zip(clocks, began, strict=True)])
    return taken


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(JOBS), default="mlp")
    parser.add_argument("--device", type=machine.device, default="cpu")
    parser.add_argument("--repeats", type=machine.count, default=100)
    parser.add_argument("--items", type=machine.count)
    parser.add_argument("--batch", type=machine.count)
    parser.add_argument("--hidden", type=machine.count, nargs="+", default=[512, 256], help="layers of mlp")
    given = parser.parse_args(arguments)
    kind = given.device.type, given.model
    items, batch = given.items or ITEMS[kind], given.batch or BATCH[kind]
    job = JOBS[given.model](items, batch, given.device, given.hidden)
    print(machine.described(given.device))
    layers = f" {given.hidden}" if given.model == "mlp" else ""
    print(f"two streams of {given.model}{layers}, {items} items in batches of {batch}, {given.repeats} repeats")
    print(report(job, given.repeats))


if __name__ == "__main__":
    main()
