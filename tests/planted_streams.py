"""Short trainings of two streams, healthy ones and such with something wrong; what evaluations say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ddp_streammon import StreamMonitor
from ddp_streammon.evaluation import Evaluation
from ddp_streammon.rules.finding import Finding
from ddp_streammon.train.data import StreamData
from ddp_streammon.train.data.htad import htad
from ddp_streammon.train.data.mfeat import mfeat
from ddp_streammon.train.models import multi_mlp

Planted = tuple[StreamData, str | None]
"""The items, and the stream that the head does not see."""


@dataclass(frozen=True)
class Case:
    """What is trained, by seed, and which findings name what is wrong with it; none of a healthy one."""

    planted: Callable[[int], Planted]
    named: frozenset[tuple[str, str]] = frozenset()
    epochs: int = 10
    lr: float = 0.05


@dataclass(frozen=True)
class Said:
    """One evaluation, and what stood after it."""

    found: Evaluation
    findings: tuple[Finding, ...]


class Blind(nn.Module):
    """A fusion that sees some features and passes zeros for the others."""

    def __init__(self, fusion: nn.Module, hidden: int) -> None:
        super().__init__()
        self.fusion, self.hidden = fusion, hidden

    def forward(self, *features: Tensor) -> Tensor:
        seen = [0 * feature if place == self.hidden else feature for place, feature in enumerate(features)]
        fused: Tensor = self.fusion(*seen)
        return fused


def train(case: Case, seed: int) -> Iterator[Said]:
    """Train and evaluate after every epoch, as a user would."""
    data, hidden = case.planted(seed)
    torch.manual_seed(seed)
    widths = {name: shape[0] for name, shape in data.streams.items()}
    model = multi_mlp(widths, data.num_classes, hidden=(128, 64), norm=False)
    if hidden is not None:
        model.fusion = Blind(model.fusion, list(widths).index(hidden))
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr, momentum=0.9, weight_decay=1e-4)
    monitor = StreamMonitor(model, optimizer, dict(model.encoders.items()))
    held_out = DataLoader(data.validation, batch_size=128)
    shown = DataLoader(data.train_eval, batch_size=128)
    *inputs, target = tensors(data.train)
    for _ in range(case.epochs):
        for rows in torch.randperm(len(target)).split(64):
            loss = cross_entropy(model(*(x[rows] for x in inputs)), target[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        found = monitor.evaluate(held_out, train=shown)
        yield Said(found, tuple(monitor.get_recommendations()))


def tensors(items: object) -> tuple[Tensor, ...]:
    assert isinstance(items, TensorDataset)
    return items.tensors


Change = Callable[[dict[str, Tensor], torch.Generator], Mapping[str, Tensor]]


def changed(data: StreamData, change: Change, seed: int) -> StreamData:
    """The same items with other inputs; `change` is given training and validation items apart."""
    chance = torch.Generator().manual_seed(seed)
    parts = []
    for items in (data.train, data.validation):
        *inputs, target = tensors(items)
        given = dict(zip(data.streams, inputs, strict=True))
        parts.append((change(given, chance), target))
    train_items, validation = (TensorDataset(*inputs.values(), target) for inputs, target in parts)
    streams = {name: tuple(x.shape[1:]) for name, x in parts[0][0].items()}
    return StreamData(train_items, validation, None, streams, data.num_classes, train_items)


# What is planted --------------------------------------------------------------------------------------------------

Source = Callable[[int], StreamData]


def views(*names: str, items: int = 1200, validation: int = 400) -> Source:
    return lambda seed: mfeat(names, seed, items, validation)


def windows(items: int, validation: int) -> Source:
    return lambda seed: htad(seed, items, validation)


def complementary(items: int = 600, validation: int = 400, classes: int = 4) -> Source:
    """Each stream tells half of the classes apart: both are needed."""

    def made(seed: int) -> StreamData:
        chance = torch.Generator().manual_seed(seed)
        target = torch.arange(items + validation)[torch.randperm(items + validation, generator=chance)] % classes
        digits = {"left": target % 2, "right": torch.div(target, 2, rounding_mode="floor")}
        inputs = []
        for digit in digits.values():
            centres = torch.randn(int(digit.max()) + 1, 16, generator=chance)
            inputs.append(centres[digit] + torch.randn(len(target), 16, generator=chance))
        parts = [TensorDataset(*(x[rows] for x in inputs), target[rows]) for rows in (slice(items), slice(items, None))]
        return StreamData(parts[0], parts[1], None, dict.fromkeys(digits, (16,)), classes, parts[0])

    return made


def healthy(source: Source) -> Callable[[int], Planted]:
    return lambda seed: (source(seed), None)


def ignored(source: Source, stream: str) -> Callable[[int], Planted]:
    return lambda seed: (source(seed), stream)


def noise(source: Source, stream: str) -> Callable[[int], Planted]:
    def drawn(inputs: dict[str, Tensor], chance: torch.Generator) -> dict[str, Tensor]:
        return {n: torch.randn(x.shape, generator=chance) if n == stream else x for n, x in inputs.items()}

    return lambda seed: (changed(source(seed), drawn, seed), None)


def misaligned(source: Source, stream: str) -> Callable[[int], Planted]:
    def shuffled(inputs: dict[str, Tensor], chance: torch.Generator) -> dict[str, Tensor]:
        return {n: x[torch.randperm(len(x), generator=chance)] if n == stream else x for n, x in inputs.items()}

    return lambda seed: (changed(source(seed), shuffled, seed), None)


def copied(source: Source, stream: str, spread: float = 0.3) -> Callable[[int], Planted]:
    """One stream, and the same turned and a little blurred."""

    def turned(inputs: dict[str, Tensor], chance: torch.Generator) -> dict[str, Tensor]:
        x = inputs[stream]
        turn = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=torch.Generator().manual_seed(1)))[0]
        return {stream: x, "copy": x @ turn + spread * torch.randn(x.shape, generator=chance)}

    return lambda seed: (changed(source(seed), turned, seed), None)


def same(items: int = 600, validation: int = 400, classes: int = 4) -> Callable[[int], Planted]:
    """Two streams that see the same thing, turned differently and a little blurred."""

    def made(seed: int) -> Planted:
        chance = torch.Generator().manual_seed(seed)
        target = torch.arange(items + validation)[torch.randperm(items + validation, generator=chance)] % classes
        centres = torch.randn(classes, 16, generator=chance)
        x = centres[target] + torch.randn(len(target), 16, generator=chance)
        turns = [torch.linalg.qr(torch.randn(16, 16, generator=chance))[0] for _ in range(2)]
        inputs = [x @ turn + 0.2 * torch.randn(x.shape, generator=chance) for turn in turns]
        parts = [TensorDataset(*(x[rows] for x in inputs), target[rows]) for rows in (slice(items), slice(items, None))]
        return StreamData(parts[0], parts[1], None, {"left": (16,), "right": (16,)}, classes, parts[0]), None

    return made


def rules(stream: str, *names: str) -> frozenset[tuple[str, str]]:
    return frozenset((name, stream) for name in names)


def _unseen(stream: str) -> frozenset[tuple[str, str]]:
    return rules(stream, "UNUSED", "IGNORED")


FOU_ZER, FOU_KAR, HTAD = views("fou", "zer"), views("fou", "kar"), windows(700, 343)
PLANTED = {
    "ignored zer": Case(ignored(FOU_ZER, "zer"), _unseen("zer")),
    "ignored right": Case(ignored(complementary(), "right"), _unseen("right")),
    "ignored audio": Case(ignored(HTAD, "audio"), _unseen("audio"), 16),
    "noise for zer": Case(noise(FOU_ZER, "zer"), rules("zer", "NOTHING")),
    "noise for right": Case(noise(complementary(), "right"), rules("right", "NOTHING")),
    "noise for accelerometer": Case(noise(HTAD, "accelerometer"), rules("accelerometer", "NOTHING"), 16),
    "misaligned kar": Case(misaligned(FOU_KAR, "kar"), rules("kar", "NOTHING")),
    "misaligned audio": Case(misaligned(HTAD, "audio"), rules("audio", "NOTHING"), 16),
    "pix twice": Case(copied(views("pix"), "pix", 0.0), rules("pix", "REDUNDANT") | rules("copy", "REDUNDANT")),
    "the same twice": Case(same(), rules("left", "REDUNDANT") | rules("right", "REDUNDANT")),
}
HEALTHY = {
    "fou, zer": Case(healthy(FOU_ZER)),
    "fou, kar": Case(healthy(FOU_KAR)),
    "pix, mor": Case(healthy(views("pix", "mor"))),
    "fou, zer, 300 items": Case(healthy(views("fou", "zer", items=300, validation=300)), epochs=16),
    "complementary": Case(healthy(complementary())),
    "complementary, learning slowly": Case(healthy(complementary()), lr=0.003),
    "fou, zer, learning slowly": Case(healthy(FOU_ZER), lr=0.003),
    "HTAD, 300 items": Case(healthy(windows(300, 300)), epochs=30),
    "HTAD, learning slowly": Case(healthy(windows(300, 300)), lr=0.01, epochs=16),
    "HTAD, 700 items": Case(healthy(HTAD), epochs=16),
}
