"""Scores as users write them, one for each kind of task, each through `monitor.evaluate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ddp_streammon import StreamMonitor
from ddp_streammon.evaluation import Evaluation
from tests.ranks import run_ranks

ITEMS, TRAIN = 96, 160


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int, count: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))


def parts(*tensors: Tensor) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Held-out and training items."""
    return tuple(
        DataLoader(TensorDataset(*(x[rows] for x in tensors)), 32) for rows in (slice(ITEMS), slice(ITEMS, None))
    )


class TwoStreams(nn.Module):
    """rgb [B, 6] and depth [B, 5] -> [B, outputs]."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rgb = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.depth = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.head = nn.Linear(16, outputs)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([self.rgb(rgb), self.depth(depth)], 1))
        return out


def watched(model: nn.Module, *names: str) -> StreamMonitor:
    return StreamMonitor(model, streams={name: name for name in names or ("rgb", "depth")})


def check(found: Evaluation, *streams: str) -> None:
    """Every stream's use has an interval that holds it."""
    for stream in streams or ("rgb", "depth"):
        low, value, high = (found[f"{stream}_val_uses{end}"] for end in ("_low", "", "_high"))
        assert math.isfinite(value)
        assert low < value < high
        assert value != 0


INPUTS = normal(ITEMS + TRAIN, 6), normal(ITEMS + TRAIN, 5, seed=1)


# Classification and regression -------------------------------------------------------------------------------------


def evaluate_classification() -> dict[str, float]:
    val_loader, train_loader = parts(*INPUTS, classes(ITEMS + TRAIN))
    monitor = watched(TwoStreams(4))
    return dict(monitor.evaluate(val_loader, train=train_loader))


def test_classification() -> None:
    found = evaluate_classification()
    assert {"full_val_acc", "rgb_val_uses_acc", "rgb_knows", "full_head_gap", "rgb_alone_acc_gap"} <= set(found)
    for other in run_ranks(2, evaluate_classification):
        assert other == pytest.approx(found, rel=1e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression(outputs: int) -> None:
    def score(model, batch):
        *inputs, target = batch
        prediction = model(*inputs).view_as(target)
        loss = (prediction - target).square().reshape(len(target), -1).mean(1)
        return {"loss": loss, "target": target, "prediction": prediction}

    target = INPUTS[0][:, 0] if outputs == 1 else INPUTS[0][:, :outputs]
    val_loader, train_loader = parts(*INPUTS, target)
    found = watched(TwoStreams(outputs)).evaluate(val_loader, score, train=train_loader)
    check(found)
    assert found["rgb_knows"] > 0.5 > found["depth_knows"]
    assert found["rgb_complement_low"] > 0.3


# Language ----------------------------------------------------------------------------------------------------------


class Captioner(nn.Module):
    """A vision tower whose output is put before the words of a small causal language model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vision = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.Tanh())
        self.words = nn.Embedding(30, 16)
        self.language = nn.GRU(16, 16, batch_first=True)
        self.out = nn.Linear(16, 30)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        prefix = self.vision(pixel_values).unsqueeze(1)
        hidden, _ = self.language(torch.cat([prefix, self.words(input_ids)], 1))
        logits: Tensor = self.out(hidden[:, :-1])  # what comes before each word
        return logits


def caption_loader() -> DataLoader[Any]:
    ids = classes(ITEMS, 7, count=29) + 1
    ids[::3, 5:] = 0  # padding
    pixels, document = normal(ITEMS, 3, 8, 8), torch.arange(ITEMS) // 2
    items = [
        {"pixel_values": p, "input_ids": i, "labels": i.clone(), "document": d}  # labels stay when input_ids change
        for p, i, d in zip(pixels, ids, document, strict=True)
    ]
    return DataLoader(items, 16)


def caption_score(model, batch):
    labels, logits = batch["labels"], model(batch["pixel_values"], batch["input_ids"])
    loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=0, reduction="none")
    tokens = (labels != 0).sum(1)
    return {"loss": loss.sum(1) / tokens, "weight": tokens, "group": batch["document"]}


def evaluate_captions() -> dict[str, float]:
    monitor = StreamMonitor(Captioner(), streams={"image": "vision", "text": ["words", "language", "out"]})
    return dict(monitor.evaluate(caption_loader(), caption_score, swap={"image": "pixel_values", "text": "input_ids"}))


def test_next_token_loss_of_a_captioning_model() -> None:
    found = evaluate_captions()
    assert found["full_val_loss"] == pytest.approx(math.log(30), abs=0.3)
    assert found["image_val_uses_low"] < found["image_val_uses"] < found["image_val_uses_high"]
    assert math.isfinite(found["text_val_uses"])
    for other in run_ranks(2, evaluate_captions):
        assert other == pytest.approx(found, rel=1e-4, abs=1e-6, nan_ok=True)


# Contrastive -------------------------------------------------------------------------------------------------------


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 8), nn.Linear(5, 8)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return 5 * F.normalize(self.image(image), dim=1) @ F.normalize(self.text(text), dim=1).T


def test_contrastive_loss() -> None:
    def score(model, batch):
        similarity = model(*batch)
        pairs = torch.arange(len(similarity))
        losses = [F.cross_entropy(logits, pairs, reduction="none") for logits in (similarity, similarity.T)]
        return {"loss": sum(losses) / 2, "group": "batch"}

    model = Towers()
    items = TensorDataset(*INPUTS)
    found = watched(model, "image", "text").evaluate(DataLoader(items, 8), score)
    check(found, "image", "text")
    assert found.estimates["image_val_uses"].groups == (ITEMS + TRAIN) / 8


# Several labels ----------------------------------------------------------------------------------------------------


def mean_average_precision(records: Sequence[tuple[list[float], list[int]]]) -> float:
    found = []
    for label in range(len(records[0][0])):
        ranked = sorted(((scores[label], truth[label]) for scores, truth in records), reverse=True)
        hits = [rank for rank, (_, truth) in enumerate(ranked, 1) if truth]
        found += [sum(number / rank for number, rank in enumerate(hits, 1)) / len(hits)] if hits else []
    return sum(found) / len(found)


def test_several_labels_and_mean_average_precision() -> None:
    def score(model, batch):
        *inputs, labels = batch
        logits = model(*inputs)
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        record = list(zip(logits.tolist(), labels.tolist(), strict=True))
        return {"loss": loss, "target": labels, "prediction": logits.sigmoid(), "record": record}

    model = TwoStreams(3)
    rgb, depth = INPUTS
    labels = (model(rgb, depth).detach() > 0).float()
    val_loader, train_loader = parts(rgb, depth, labels)
    monitor = watched(model)
    found = monitor.evaluate(val_loader, score, train=train_loader, reduce={"mAP": mean_average_precision})
    check(found)
    assert found["rgb_val_uses_mAP_low"] > 0
    assert found["rgb_knows"] > 0


# A stream that is missing in some items, and batches of other kinds -------------------------------------------------


def test_a_mask_of_what_is_present() -> None:
    def score(model, batch):
        rgb, depth, here, target = batch
        logits = model(rgb, depth * here[:, None])
        return {"loss": F.cross_entropy(logits, target, reduction="none"), "present": {"depth": here}, "target": target}

    here = torch.arange(ITEMS + TRAIN) % 3 > 0
    val_loader, train_loader = parts(*INPUTS, here, classes(ITEMS + TRAIN))
    found = watched(TwoStreams(4)).evaluate(val_loader, score, train=train_loader)
    check(found)
    assert found["depth_val_present"] == pytest.approx(2 / 3)
    assert found.estimates["depth_val_uses"].items == 2 * ITEMS // 3


@dataclass
class Sample:
    rgb: Tensor
    depth: Tensor
    label: Tensor


class Loose:
    """A batch of a class of one's own."""

    def __init__(self, rgb: Tensor, depth: Tensor, label: Tensor) -> None:
        self.rgb, self.depth, self.label = rgb, depth, label

    def to(self, device: Any) -> Loose:
        return Loose(self.rgb.to(device), self.depth.to(device), self.label.to(device))


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, row: int) -> Any:
        return INPUTS[0][row], INPUTS[1][row], classes(ITEMS)[row]


@pytest.mark.parametrize("kind", [Sample, Loose])
def test_batches_of_a_class_of_ones_own(kind: Any) -> None:
    def score(model, batch):
        return {"loss": F.cross_entropy(model(batch.rgb, batch.depth), batch.label, reduction="none")}

    def collate(items: list[Any]) -> Any:
        return kind(*map(torch.stack, zip(*items, strict=True)))

    monitor = watched(TwoStreams(4))
    loader = DataLoader(Rows(), 32, collate_fn=collate)
    found = monitor.evaluate(loader, score)
    check(found)
    swapped = watched(TwoStreams(4)).evaluate(loader, score, swap={"rgb": "rgb", "depth": "depth"})
    assert swapped["depth_val_uses"] == pytest.approx(found["depth_val_uses"], rel=1e-4)


def test_a_mapping_needs_no_score() -> None:
    rows = [{"rgb": rgb, "depth": depth, "label": label} for rgb, depth, label in Rows()]
    check(watched(TwoStreams(4)).evaluate(DataLoader(rows, 32)))


# Outputs as transformers gives them ---------------------------------------------------------------------------------


@dataclass
class Output:
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class Encoder(nn.Module):
    """Its features come in an object, token by token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Output:
        return Output(torch.tanh(self.linear(x)).unsqueeze(1).expand(-1, 3, -1))


class WithOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rgb, self.depth, self.head = Encoder(6), Encoder(5), nn.Linear(16, 4)

    def forward(self, rgb: Tensor, depth: Tensor) -> dict[str, Tensor]:
        features = [self.rgb(rgb).logits.mean(1), self.depth(depth).logits.mean(1)]
        return {"logits": self.head(torch.cat(features, 1))}


def test_encoders_and_models_that_give_objects() -> None:
    def score(model, batch):
        logits = model(*batch[:-1])["logits"]
        return {"loss": F.cross_entropy(logits, batch[-1], reduction="none"), "target": batch[-1]}

    val_loader, train_loader = parts(*INPUTS, classes(ITEMS + TRAIN))
    found = watched(WithOutputs()).evaluate(val_loader, score, train=train_loader)
    check(found)
    assert found.replayed
    assert math.isfinite(found["rgb_knows"])
    assert math.isfinite(found["rgb_val_ablated"])
