"""How often a 95 % interval of an evaluation holds the truth: `python -m tests.benchmarks.coverage`.

On HTAD (the package multiviewstacking): a random split into 300 training items, some for validation, and the rest, the
test set. Two small encoders are trained for 60 epochs, `monitor.evaluate` sees training and validation items, and its
intervals are compared with what the test set gives: for `uses` the mean over many random partners, for gaps the test
set less all training items. Nothing here was tuned on the seeds that are reported, 100 and up.

Three columns, since the test set is a sample itself. "test set": the interval holds its value. "and its noise": the
value lies within the interval and 1.96 standard errors of its own, added as squares; that is what an interval at 95 %
promises. "all": it holds the value of validation and test items together, of which the validation items are a part.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ddp_streammon import StreamMonitor
from ddp_streammon.train.data.htad import htad
from ddp_streammon.train.models import MultiStreamModel, multi_mlp
from tests.benchmarks import machine
from tests.benchmarks.timing import table

TRAIN, EPOCHS, BATCH, LR = 300, 60, 64, 0.05
PARTNERS = 200
FIRST_SEED = 100
ERRORS = 1.96


@dataclass(frozen=True)
class Truth:
    """A figure of each test item, and of each item that was not trained on; `less` is subtracted from its mean."""

    test: Tensor
    everything: Tensor
    less: float = 0.0

    @property
    def value(self) -> float:
        return float(self.test.mean()) - self.less

    @property
    def of_all(self) -> float:
        return float(self.everything.mean()) - self.less

    @property
    def error(self) -> float:
        return float(self.test.std()) / math.sqrt(len(self.test))


@dataclass
class Count:
    """Of one figure: how many intervals there were, and how many held what."""

    cases: int = 0
    test: int = 0
    noisy: int = 0
    everything: int = 0
    widths: list[float] = field(default_factory=list)

    def add(self, value: float, low: float, high: float, truth: Truth) -> None:
        self.cases += 1
        self.test += low <= truth.value <= high
        side = value - low if truth.value < value else high - value
        self.noisy += abs(truth.value - value) <= math.hypot(side, ERRORS * truth.error)
        self.everything += low <= truth.of_all <= high
        self.widths.append(high - low)


def trained(inputs: Mapping[str, Tensor], target: Tensor, classes: int, seed: int) -> MultiStreamModel:
    torch.manual_seed(seed)
    model = multi_mlp({name: x.shape[1] for name, x in inputs.items()}, classes, hidden=(128, 64), norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(target)).split(BATCH):
            loss = cross_entropy(model(*(x[rows] for x in inputs.values())), target[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    return model.eval()


def scores(model: MultiStreamModel, features: Sequence[Tensor], target: Tensor) -> dict[str, Tensor]:
    """Loss and correctness of each item, [N] float64."""
    logits = model.head(*features)
    return {
        "loss": cross_entropy(logits, target, reduction="none").double(),
        "acc": (logits.argmax(1) == target).double(),
    }


def truths(
    model: MultiStreamModel, train: Sequence[Tensor], validation: Sequence[Tensor], test: Sequence[Tensor]
) -> dict[str, Truth]:
    """The figures of the test set under their keys, computed apart from the package."""
    everything = [torch.cat(both) for both in zip(validation, test, strict=True)]
    held_back = slice(len(validation[-1]), None)
    (*seen, seen_target), (*inputs, target) = train, everything
    with torch.no_grad():
        own, features = model.encode(*seen), model.encode(*inputs)
        means = [feature.mean(0) for feature in own]
        found: dict[str, Truth] = {}

        def gap(name: str, kept: Sequence[int]) -> None:
            """Only these streams keep their features; the others are at their training mean."""
            shown, trained_on = (
                [x if place in kept else means[place].expand_as(x) for place, x in enumerate(of)]
                for of in (features, own)
            )
            new, known = scores(model, shown, target), scores(model, trained_on, seen_target)
            found[f"{name}_loss_gap"] = _truth(new["loss"], held_back, float(known["loss"].mean()))
            found[f"{name}_acc_gap"] = _truth(-new["acc"], held_back, -float(known["acc"].mean()))

        gap("full", range(len(features)))
        plain = scores(model, features, target)
        for place, name in enumerate(model.stream_names):
            gap(f"{name}_alone", [place])
            rises = {"loss": [], "acc": []}  # type: dict[str, list[Tensor]]
            rest = [_partners(model, place, features, target, rows) for rows in (slice(None), held_back)]
            for figure in rises:
                among_all, among_test = (costs[figure] for costs in rest)
                sign = 1 if figure == "loss" else -1
                cost = sign * (among_all - plain[figure])
                of_test = sign * (among_test - plain[figure][held_back])
                found[f"{name}_val_uses" + ("" if figure == "loss" else "_acc")] = Truth(of_test, cost)
    return found


def _truth(values: Tensor, held_back: slice, less: float) -> Truth:
    return Truth(values[held_back], values, less)


def _partners(
    model: MultiStreamModel, place: int, features: Sequence[Tensor], target: Tensor, rows: slice
) -> dict[str, Tensor]:
    """What each of these items scores with other items' features of a stream, averaged over random partners."""
    chance = torch.Generator().manual_seed(0)
    own, wanted = [feature[rows] for feature in features], target[rows]
    sums: dict[str, Tensor] = {}
    for _ in range(PARTNERS):
        given = list(own)
        given[place] = own[place].roll(int(torch.randint(1, len(wanted), (), generator=chance)), 0)
        for figure, values in scores(model, given, wanted).items():
            sums[figure] = sums.get(figure, torch.zeros_like(values)) + values / PARTNERS
    return sums


def split(seed: int, validation: int) -> Iterator[tuple[str, float, float, float, Truth]]:
    """Train and evaluate on one split: each figure with its interval and the truth."""
    data = htad(seed, TRAIN, validation)
    parts = [_tensors(part) for part in (data.train, data.validation, data.test)]
    (*inputs, target), *_ = parts
    model = trained(dict(zip(data.streams, inputs, strict=True)), target, data.num_classes, seed)
    monitor = StreamMonitor(model, streams=dict(model.encoders.items()))
    found = monitor.evaluate(DataLoader(data.validation, 128), train=DataLoader(data.train_eval, 128))
    for key, truth in truths(model, *parts).items():
        yield key, found[key], found[f"{key}_low"], found[f"{key}_high"], truth


def _tensors(items: object) -> tuple[Tensor, ...]:
    assert isinstance(items, TensorDataset)
    return items.tensors


def covered(seeds: Sequence[int], validation: int) -> dict[str, Count]:
    counts: dict[str, Count] = {}
    for seed in seeds:
        for key, value, low, high, truth in split(seed, validation):
            counts.setdefault(key, Count()).add(value, low, high, truth)
    return counts


def report(counts: Mapping[str, Count]) -> str:
    rows = [(key, *_cells(count)) for key, count in counts.items()]
    for name, part in (("all uses", "_uses"), ("all gaps", "_gap")):
        chosen = [count for key, count in counts.items() if part in key]
        total = Count(*(sum(getattr(count, of) for count in chosen) for of in ("cases", "test", "noisy", "everything")))
        rows.append((name, *_cells(total)))
    return table(("figure", "intervals", "test set", "and its noise", "all", "mean width"), rows)


def _cells(count: Count) -> tuple[str, ...]:
    shares = (count.test, count.noisy, count.everything)
    width = f"{sum(count.widths) / len(count.widths):.3f}" if count.widths else "-"
    return (str(count.cases), *(f"{100 * share / count.cases:.0f} %" for share in shares), width)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=machine.count, default=30)
    parser.add_argument("--first", type=machine.count, default=FIRST_SEED, help="seed of the first split")
    parser.add_argument("--validation", type=machine.count, default=300, help="items")
    given = parser.parse_args(arguments)
    seeds = range(given.first, given.first + given.splits)
    rest = 1386 - TRAIN - given.validation
    print(
        f"HTAD: {given.splits} splits from seed {given.first}: {TRAIN} training, {given.validation} validation", end=""
    )
    print(f" and {rest} test items; {PARTNERS} partners; {machine.described(torch.device('cpu'))}")
    print(report(covered(seeds, given.validation)))


if __name__ == "__main__":
    main()
