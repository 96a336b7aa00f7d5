"""The application's evaluations: each stream alone with a monitor, the whole model without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from ddp_streammon import keys
from ddp_streammon.evaluation import Items, Score, classification, measure
from ddp_streammon.train.training import Training


@dataclass
class Sums:
    """This rank's training items of an epoch, added up on the device."""

    loss: Tensor
    correct: Tensor
    items: int = 0

    def add(self, loss: Tensor, correct: Tensor, items: int) -> None:
        self.loss += loss.detach() * items
        self.correct += correct
        self.items += items


def _score(training: Training) -> Score:
    """The classifier's score under the training's autocast."""
    plain = classification(training.criterion)

    def score(model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        with training.autocast():
            return plain(model, batch)

    return score


def _eval_loader(training: Training, dataset: Any) -> DataLoader[Any]:
    config = training.config.trainer
    return DataLoader(dataset, config.batch_size, num_workers=config.num_workers, collate_fn=training.data.collate)


def evaluate(training: Training, sums: Sums) -> None:
    """The streams' figures (with a monitor) or the whole model's alone (without), into `training.figures`."""
    validation = _eval_loader(training, training.data.validation)
    items = max(sums.items, 1)
    train_loss, train_acc = (sums.loss.item(), items), (sums.correct.item(), items)
    monitor = training.monitor
    if monitor is None:
        needed = training.early_stopping is not None or training.follows_metrics
        training.figures = evaluated(training, "val", training.data.validation, alone=needed)
        return
    figures = monitor.compute_stream_overfitting_indicators(
        train_loss,
        None,
        train_acc,
        None,
        _eval_loader(training, training.data.train_eval),
        validation,
        training.config.monitor.max_batches,
        score=_score(training),
    ).to_dict()
    rates: dict[str, float] = {}
    for group in training.optimizer.param_groups:
        rates[keys.of_stream(group["stream"], keys.LEARNING_RATE)] = group["lr"]
        rates[keys.of_stream(group["stream"], keys.WEIGHT_DECAY)] = group["weight_decay"]
    monitor.log_metrics(training.epoch, {**figures, **monitor.compute_stream_weights(), **rates})
    training.figures = figures


def evaluated(training: Training, split: str, dataset: Any, *, alone: bool = False) -> dict[str, float]:
    """`full_<split>_loss` and `full_<split>_acc` over a sharded data set, and with `alone` each stream's.

    Comm: as `evaluation.measure`.
    """
    items = Items(_eval_loader(training, dataset), f"the {split} set")
    names = training.streams.user_names
    kept: dict[str, Sequence[str]] = {keys.FULL: names}
    if alone:
        kept |= {name: (name,) for name in names}
    result = measure(training.streams, training.collective, {split: items}, _score(training), kept=kept)
    values = {}
    for variant, figures in result.figures[split].items():
        values[keys.of_stream(variant, f"{split}_loss")] = figures["loss"]
        values[keys.of_stream(variant, f"{split}_acc")] = figures["correct"]
    return values
