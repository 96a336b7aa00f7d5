"""Which rules alarm on the better of two models: `python -m tests.benchmarks.better`.

Two ways to train the same encoders: the loss of the whole model alone (`joint`), or with a loss of its own for each
stream beside it (`own losses`), which makes the better model on HTAD; there the guide's overfitting score calls the
better one sick and the other one healthy. On HTAD (the package multiviewstacking) and on pairs of the digits' views, by
random split: 300 training items, 60 epochs, an evaluation after each. The better model is the one with the higher mean
accuracy on the test items; it is trained again, and watched (`--both`: so is the other). An alarm is a finding of
severity warning or error that stood at any time; it counts once a training and rule. Splits 0 to 29
are reported; splits from 100 on are for development.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ddp_streammon import MonitorConfig, StreamMonitor
from ddp_streammon.config import Intent, Severity
from ddp_streammon.train.data import StreamData
from ddp_streammon.train.data.htad import htad
from ddp_streammon.train.data.mfeat import mfeat
from ddp_streammon.train.models import multi_mlp
from tests.benchmarks import machine
from tests.benchmarks.timing import table

TRAIN, EPOCHS, BATCH, LR, DECAY = 300, 60, 64, 0.05, 1e-4
HIDDEN = (128, 64)
DATA = {"htad": None, "pix+mor": ("pix", "mor"), "fou+zer": ("fou", "zer"), "fou+mor": ("fou", "mor")}
ARMS = ("joint", "own losses")


@dataclass(frozen=True)
class Trained:
    """One training: on which data, how, its accuracy on the test items, and, if watched, which rules alarmed."""

    data: str
    arm: str
    seed: int
    accuracy: float
    alarms: frozenset[str] = frozenset()


def items(name: str, seed: int) -> StreamData:
    views = DATA[name]
    return htad(seed, TRAIN, 343) if views is None else mfeat(views, seed, TRAIN, 500, pix_as_image=False)


class OwnLosses(nn.Module):
    """A linear head for each stream, beside the model's, which reads the same features."""

    def __init__(self, streams: Sequence[str], classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(HIDDEN[-1], classes) for name in streams})

    def forward(self, features: Mapping[str, Tensor], target: Tensor) -> Tensor:
        losses = [cross_entropy(head(features[name]), target) for name, head in self.heads.items()]
        return torch.stack(losses).sum()


def train(name: str, arm: str, seed: int, watched: bool) -> Trained:
    """One training in this process."""
    torch.set_num_threads(1)
    data = items(name, seed)
    torch.manual_seed(seed)
    model = multi_mlp({s: math.prod(shape) for s, shape in data.streams.items()}, data.num_classes, HIDDEN, norm=False)
    own = OwnLosses(model.stream_names, data.num_classes) if arm == ARMS[1] else None
    parameters = [*model.parameters(), *(own.parameters() if own else ())]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    *inputs, target = _tensors(data.train)
    watch = _Watch(model, optimizer, data, classification=own is None) if watched else None
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(target)).split(BATCH):
            features = model.encode(*(x[rows] for x in inputs))
            loss = cross_entropy(model.head(*features), target[rows])
            if own is not None:
                loss = loss + own(dict(zip(model.stream_names, features, strict=True)), target[rows])
            optimizer.zero_grad()
            loss.backward()
            if watch is not None:
                watch.step(loss, len(rows))
            optimizer.step()
        schedule.step()
        if watch is not None:
            watch.evaluate()
    *inputs, target = _tensors(data.test)
    with torch.no_grad():
        accuracy = float((model.eval()(*inputs).argmax(1) == target).double().mean())
    return Trained(name, arm, seed, accuracy, frozenset(watch.alarms) if watch is not None else frozenset())


class _Watch:
    """The monitor as a user would attach it; `alarms`: the rules that raised a warning or an error."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, data: StreamData, *, classification: bool) -> None:
        intent = Intent(
            frozen=(),
            total_steps=EPOCHS * math.ceil(TRAIN / BATCH),
            lr=dict.fromkeys(data.streams, LR),
            weight_decay=dict.fromkeys(data.streams, DECAY),
            classes=data.num_classes if classification else None,
            schedule="cosine",
        )
        config = MonitorConfig(update_every=10, intent=intent)
        self.monitor = StreamMonitor(model, optimizer, dict(model.encoders.items()), config=config)
        self.loaders = [DataLoader(part, batch_size=512) for part in (data.validation, data.train_eval)]
        self.alarms: set[str] = set()

    def step(self, loss: Tensor, items: int) -> None:
        self.monitor.step(loss=loss, samples=items)
        self._listen()

    def evaluate(self) -> None:
        held_out, shown = self.loaders
        self.monitor.evaluate(held_out, train=shown)
        self._listen()

    def _listen(self) -> None:
        standing = self.monitor.get_recommendations()
        self.alarms |= {finding.rule for finding in standing if finding.severity is not Severity.info}


def _tensors(part: object) -> tuple[Tensor, ...]:
    assert isinstance(part, TensorDataset)
    return part.tensors


def row(runs: Sequence[Trained], better: str) -> tuple[str, ...]:
    """Of the watched trainings of one kind: accuracy, and in how many splits anything, and each rule, alarmed."""
    rules = Counter(rule for run in runs for rule in run.alarms)
    told = ", ".join(f"{rule} {count}" for rule, count in rules.most_common()) or "none"
    alarmed = f"{sum(bool(run.alarms) for run in runs)} of {len(runs)}"
    mark = "better" if runs[0].arm == better else "worse"
    return runs[0].data, runs[0].arm, mark, f"{_mean(runs):.2f} %", alarmed, told


def _mean(runs: Sequence[Trained]) -> float:
    return 100 * statistics.fmean(run.accuracy for run in runs)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=machine.count, default=30)
    parser.add_argument("--first", type=int, default=0, help="seed of the first split")
    parser.add_argument("--data", default=",".join(DATA), help="of these, with commas")
    parser.add_argument("--both", action="store_true", help="watch the worse model, too")
    parser.add_argument("--jobs", type=machine.count, default=1, help="trainings at the same time")
    given = parser.parse_args(arguments)
    seeds = range(given.first, given.first + given.splits)
    print(f"splits {seeds[0]} to {seeds[-1]}; {machine.described(torch.device('cpu'))}")
    rows = []
    with ProcessPoolExecutor(given.jobs, get_context("forkserver")) as pool:

        def trained(name: str, arm: str, watched: bool) -> list[Trained]:
            return list(pool.map(train, *zip(*[(name, arm, seed, watched) for seed in seeds], strict=True)))

        for name in given.data.split(","):
            means = {arm: _mean(trained(name, arm, watched=False)) for arm in ARMS}
            better = max(means, key=means.__getitem__)
            print(name, *(f"{arm} {mean:.2f} %" for arm, mean in means.items()), sep=", ", flush=True)
            for arm in ARMS if given.both else (better,):
                rows.append(row(trained(name, arm, watched=True), better))
                print(*rows[-1], sep=", ", flush=True)
    print(table(("data", "trained by", "which", "test accuracy", "splits with an alarm", "by rule"), rows))


if __name__ == "__main__":
    main()
