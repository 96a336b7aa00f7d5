"""The application's evaluations: of the whole model, of each stream, and of what the head uses."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from ddp_streammon import keys
from ddp_streammon.evaluation import Evaluation, Items, Plan, Replacement, Score, classification, each_alone, measure
from ddp_streammon.monitor import StreamMonitor
from ddp_streammon.train.config import Effort
from ddp_streammon.train.progress import Sums
from ddp_streammon.train.solo import SoloReferences
from ddp_streammon.train.training import Training


def _score(training: Training) -> Score:
    """The classifier's score under the training's autocast."""
    plain = classification(training.criterion)

    def score(model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        with training.autocast():
            return plain(model, batch)

    return score


def _train_items(training: Training) -> Items:
    return Items(
        _loader(training, training.data.train_eval), "the training set", None, training.config.evaluation.max_batches
    )


def _validation_items(training: Training) -> Items:
    return Items(
        _loader(training, training.data.validation), "the validation set", None, training.config.evaluation.max_batches
    )


def _loader(training: Training, dataset: Any) -> DataLoader[Any]:
    config = training.config.trainer
    return DataLoader(dataset, config.batch_size, num_workers=config.num_workers, collate_fn=training.data.collate)


def evaluate(training: Training, sums: Sums, epoch: float) -> None:
    """What the configuration asks for, into `training.figures`, History and the sinks; equal on every rank.

    `epoch` is how many are done, a part of one included. Comm: that of `StreamMonitor.evaluate` and
    `compute_stream_overfitting_indicators`; with `evaluation.share` an all_gather_object.
    """
    monitor = training.monitor
    if monitor is None or training.config.evaluation.name is Effort.off:
        needed = training.early_stopping is not None or training.follows_metrics
        figures = _whole(training, "val", _validation_items(training), alone=needed, sums=sums)
        if monitor is not None:
            monitor.log_metrics(epoch, {**figures, **_settings(training, monitor)})
        training.figures = figures
    else:
        monitor.epoch = epoch
        found = _in_use(training, monitor)
        figures = _alone(training, monitor, sums)
        if training.solo is not None:
            figures |= _against_solo(training, training.solo)
        news = {key: value for key, value in figures.items() if key not in found}
        monitor.log_metrics(epoch, {**news, **_settings(training, monitor)})
        training.figures = {**figures, **found}
    training.evaluated_at, training.since = training.steps, time.monotonic()


def _in_use(training: Training, monitor: StreamMonitor) -> Evaluation:
    """What exchanging each stream's input costs; with evaluation=full, from training items, what each knows."""
    section, full = training.config.evaluation, training.config.evaluation.name is Effort.full
    found = monitor.evaluate(
        _validation_items(training),
        _score(training),
        train=_train_items(training) if full else None,
        limit=section.limit,
        seconds=budget(training),
    )
    if full:
        _say(training, str(found))
    return found


def budget(training: Training) -> float | None:
    """Seconds for what is tried; of a share of the time that passed, rank 0's clock counts on every rank."""
    section = training.config.evaluation
    if section.share is None:
        return section.seconds
    return section.share * training.collective.gather(time.monotonic() - training.since)[0]


def _alone(training: Training, monitor: StreamMonitor, sums: Sums) -> dict[str, float]:
    """Each stream alone, on training and validation items."""
    means = sums.means()
    return monitor.compute_stream_overfitting_indicators(
        means[keys.TRAIN_LOSS],
        None,
        means[keys.TRAIN_ACC],
        None,
        _loader(training, training.data.train_eval),
        _loader(training, training.data.validation),
        training.config.evaluation.max_batches,
        score=_score(training),
    ).to_dict()


def _against_solo(training: Training, solo: SoloReferences) -> dict[str, float]:
    found = solo.compare(
        training.streams,
        training.collective,
        _train_items(training),
        _validation_items(training),
        _score(training),
        training.autocast,
    )
    _say(training, found.text)
    return found.values()


def _say(training: Training, text: str) -> None:
    if training.rank == 0 and training.config.sinks.console.enabled and text:
        print(text, flush=True)


def _settings(training: Training, monitor: StreamMonitor) -> dict[str, float]:
    """Weights, learning rates and weight decay."""
    found = monitor.compute_stream_weights().to_dict()
    for group in training.optimizer.param_groups:
        found[keys.of_stream(group["stream"], keys.LEARNING_RATE)] = group["lr"]
        found[keys.of_stream(group["stream"], keys.WEIGHT_DECAY)] = group["weight_decay"]
    return found


def tested(training: Training) -> dict[str, float]:
    """`full_test_loss` and `full_test_acc` over all test items; nothing where none are held back.

    Comm: as `evaluation.measure`.
    """
    if training.data.test is None:
        return {}
    return _whole(training, "test", Items(_loader(training, training.data.test), "the test set"))


def _whole(
    training: Training, split: str, items: Items, *, alone: bool = False, sums: Sums | None = None
) -> dict[str, float]:
    """`full_<split>_loss` and `full_<split>_acc`; with `alone` each stream's, with `sums` `train_loss` and `train_acc`
    of these."""
    variants = each_alone(training.streams.user_names, Replacement.zero) if alone else {}
    means = None if sums is None else sums.means()
    result = measure(
        training.streams, training.collective, {split: items}, _score(training), Plan(variants), scalars=means
    )
    values = dict(result.scalars)
    for variant, figures in result.means(split).items():
        values[keys.of_stream(variant, f"{split}_loss")] = figures["loss"]
        values[keys.of_stream(variant, f"{split}_acc")] = figures["correct"]
    return values
