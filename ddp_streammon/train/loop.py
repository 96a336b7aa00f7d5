"""The training loop: autocast, accumulation, clipping, schedules, checkpoints, and the monitor beside it."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from ddp_streammon import keys
from ddp_streammon.report.page import REPORT
from ddp_streammon.rules.finding import Finding
from ddp_streammon.sinks.guard import EXIT_SECONDS
from ddp_streammon.train import checkpoint, parallel
from ddp_streammon.train.config import AppConfig
from ddp_streammon.train.data import StreamData
from ddp_streammon.train.evaluating import Sums, evaluate, evaluated
from ddp_streammon.train.process import process_group, sigterm_unwinds
from ddp_streammon.train.training import JSONL, Training, build, seed_all, state_of

__all__ = ["Result", "Training", "build", "run", "seed_all", "train_epoch", "train_loader"]

_log = logging.getLogger("ddp_streammon")


@dataclass(frozen=True)
class Result:
    """How a run ended; equal on every rank, but for `records`, which rank 0 alone has."""

    figures: Mapping[str, float]
    """Loss and accuracy of the whole model: `full_val_loss`, `full_test_acc` and their like."""
    findings: tuple[Finding, ...] = ()
    """What stood at the end."""
    records: Mapping[str, str] = field(default_factory=dict)
    """What was written, and where: `JSONL file`, `W&B run`."""


def run(config: AppConfig, data: StreamData, model: nn.Module, run_dir: Path, settings: Mapping[str, Any]) -> Result:
    """Train `model` on `data` in this process and, under torchrun, with its peers.

    Seed before the model is made (`seed_all`), or its first weights are others each time.

    `settings` is the resolved configuration, for the sinks. Every rank calls it with the same arguments. SIGTERM ends
    it as an exception would: records are brought to disk, and the process exits with code 143.
    """
    with sigterm_unwinds(), process_group(config.trainer) as device:
        return _run(config, data, model, run_dir, settings, device)


def _run(
    config: AppConfig,
    data: StreamData,
    model: nn.Module,
    run_dir: Path,
    settings: Mapping[str, Any],
    device: torch.device,
) -> Result:
    """`run` within its process group. What is wrapped around the model is gone when it returns: the last reference to
    a gloo group must not be DDP's, which drops it with the GIL held while the group's own threads may wait for that."""
    training = build(config, data, model, run_dir, settings, device)
    exit_code = 1
    try:
        _train(training)
        if data.test is not None:
            training.figures |= evaluated(training, "test", data.test)
        exit_code = 0
    finally:
        if training.monitor is not None:
            training.monitor.close(exit_code)
    monitor = training.monitor
    return Result(training.figures, tuple(monitor.get_recommendations()) if monitor else (), _records(training))


def _records(training: Training) -> dict[str, str]:
    if training.monitor is None or training.rank != 0:
        return {}
    files = {"JSONL file": str(training.run_dir / JSONL)} if training.config.sinks.jsonl.enabled else {}
    if training.config.sinks.html.enabled:
        files |= {"report": str(training.run_dir / REPORT)}
    location = training.wandb.location if training.wandb is not None else ""
    return files | ({"W&B run": location} if location else {})


def _train(training: Training) -> None:
    config = training.config.trainer
    loader, sampler = train_loader(training)
    for epoch in range(training.epoch, config.epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        assert loader.generator is not None
        loader.generator.manual_seed(config.seed * 1_000_003 + epoch)  # the order depends on seed and epoch alone
        sums = train_epoch(training, loader, epoch)
        training.epoch = epoch + 1
        last = training.epoch == config.epochs
        if last or training.epoch % training.config.monitor.evaluate_every == 0:
            evaluate(training, sums)
        _schedule(training)
        stop = training.all_stopped
        if config.checkpoint_every and (last or stop or training.epoch % config.checkpoint_every == 0):
            _save(training)
        if stop:
            _log.info("every stream has stopped after epoch %d: training ends", training.epoch)
            break


def train_loader(training: Training) -> tuple[DataLoader[Any], DistributedSampler[Any] | None]:
    config = training.config.trainer
    dataset: Any = training.data.train
    sampler: DistributedSampler[Any] | None = None
    if training.collective.distributed:
        sampler = DistributedSampler(dataset, seed=config.seed)
    loader = DataLoader(
        dataset,
        batch_size=config.batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=config.num_workers,
        collate_fn=training.data.collate,
        generator=torch.Generator(),
        pin_memory=training.device.type == "cuda",
        drop_last=len(dataset) >= config.batch_size * training.collective.topology.world_size,
    )
    return loader, sampler


def train_epoch(training: Training, loader: DataLoader[Any], epoch: int) -> Sums:
    config = training.config.trainer
    training.wrapped.train()
    if training.early_stopping is not None:
        training.early_stopping.apply_modes()
    parallel.share_buffers(training.wrapped, training.collective)
    zero = torch.zeros((), dtype=torch.float64, device=training.device)
    of_epoch = Sums(zero.clone(), zero.clone())
    micro_batches = len(loader)
    bar = tqdm(
        loader,
        desc=f"epoch {epoch + 1}/{config.epochs}",
        leave=False,
        disable=not (config.progress and training.rank == 0 and sys.stderr.isatty()),
    )
    of_step = Sums(zero.clone(), zero.clone())
    for number, batch in enumerate(bar):
        first = number - number % config.accumulate
        group = min(config.accumulate, micro_batches - first)
        at_boundary = number == first + group - 1
        *inputs, target = (tensor.to(training.device, non_blocking=True) for tensor in batch)
        sync = contextlib.nullcontext() if at_boundary else parallel.unsynchronised(training.wrapped)
        with sync:
            with training.autocast():
                logits = training.wrapped(*inputs)
                loss = training.criterion(logits, target)
            training.scaler.scale(loss / group).backward()
        of_step.add(loss, (logits.detach().argmax(1) == target).sum(), len(target))
        if at_boundary:
            _optimizer_step(training, of_step, epoch)
            of_epoch.add(of_step.loss / of_step.items, of_step.correct, of_step.items)
            of_step = Sums(zero.clone(), zero.clone())
    return of_epoch


def _optimizer_step(training: Training, of_step: Sums, epoch: int) -> None:
    if training.monitor is not None:
        training.monitor.step(
            loss=of_step.loss / of_step.items,
            samples=of_step.items,
            correct=of_step.correct.long(),
            scaler=training.scaler,
            epoch=epoch,
        )
    if training.config.trainer.clip_norm is not None:
        training.scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(training.model.parameters(), training.config.trainer.clip_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad(set_to_none=False)


def _schedule(training: Training) -> None:
    """Stream early stopping and the learning rates, from figures that are equal on every rank."""
    accuracy = {
        name: training.figures.get(keys.of_stream(name, keys.VAL_ACC), math.nan)
        for name in (keys.FULL, *training.streams.user_names)
    }
    evaluated = training.epoch % training.config.monitor.evaluate_every == 0
    if training.early_stopping is not None and evaluated:
        for name in training.early_stopping.update(accuracy, training.epoch):
            if training.rank == 0:
                _log.info("stream %s stopped after epoch %d: best weights restored", name, training.epoch)
    if training.schedulers is not None and (evaluated or not training.follows_metrics):
        training.schedulers.step(accuracy)


def _save(training: Training) -> None:
    """Write RUN_DIR/checkpoint.pt from rank 0, after the records of the steps that it holds. Comm: `state_of`'s."""
    state = state_of(training)
    if training.rank == 0:
        training.sinks.flush(EXIT_SECONDS)
        checkpoint.save(training.run_dir / checkpoint.FILE, state)
