"""The training loop: autocast, accumulation, clipping, schedules, checkpoints, and the monitor beside it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from ddp_streammon import keys
from ddp_streammon.report import STOPPED
from ddp_streammon.report.page import REPORT
from ddp_streammon.rules.finding import Finding
from ddp_streammon.sinks.guard import EXIT_SECONDS
from ddp_streammon.train import checkpoint, parallel
from ddp_streammon.train.config import CHECKPOINT, AppConfig, ConfigError
from ddp_streammon.train.data import StreamData
from ddp_streammon.train.evaluating import evaluate, tested
from ddp_streammon.train.process import process_group, sigterm_unwinds
from ddp_streammon.train.progress import Begun, Sums
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
    """What was written, and where: `JSONL file`, `W&B run`, `report`."""
    preflight: str | None = None
    """What a preflight says, where that was asked for."""
    stopped: int | None = None
    """The step after which it ended because somebody had asked for that; None: it came to its end."""


def run(
    config: AppConfig,
    data: StreamData,
    model: nn.Module,
    run_dir: Path,
    settings: Mapping[str, Any],
    solo: Mapping[str, Sequence[nn.Module]] | None = None,
) -> Result:
    """Train `model` on `data` in this process and, under torchrun, with its peers.

    Seed before the model is made (`seed_all`), or its first weights are others each time.

    `settings` is the resolved configuration, for the sinks; `solo` are models of one stream each, by stream. Every
    rank calls it with the same arguments. SIGTERM ends it as an exception would: records are brought to disk, and the
    process exits with code 143. "Stop run" in W&B's page ends it on all ranks after the same step, with a checkpoint
    and without an error, so that torchrun does not start it again; its records have the exit code 255.
    """
    with sigterm_unwinds(), process_group(config.trainer) as device:
        return _run(config, data, model, run_dir, settings, device, solo)


def _run(
    config: AppConfig,
    data: StreamData,
    model: nn.Module,
    run_dir: Path,
    settings: Mapping[str, Any],
    device: torch.device,
    solo: Mapping[str, Sequence[nn.Module]] | None,
) -> Result:
    """`run` within its process group. What is wrapped around the model is gone when it returns: the last reference to
    a gloo group must not be DDP's, which drops it with the GIL held while the group's own threads may wait for that."""
    training = build(config, data, model, run_dir, settings, device, solo)
    exit_code = 1
    said = None
    try:
        if config.trainer.preflight is not None:
            said = _preflight(training, config.trainer.preflight)
        else:
            _train(training)
            if not training.stop.agreed:
                training.figures |= tested(training)
        exit_code = STOPPED if training.stop.agreed else 0
    finally:
        if training.monitor is not None:
            training.monitor.close(exit_code)
    monitor = training.monitor
    findings = tuple(monitor.get_recommendations()) if monitor else ()
    stopped = training.steps if training.stop.agreed else None
    return Result(training.figures, findings, _records(training), said, stopped)


def _records(training: Training) -> dict[str, str]:
    if training.monitor is None or training.rank != 0:
        return {}
    files = {"JSONL file": str(training.run_dir / JSONL)} if training.config.sinks.jsonl.enabled else {}
    if training.config.sinks.html.enabled:
        files |= {"report": str(training.run_dir / REPORT)}
    location = training.wandb.location if training.wandb is not None else ""
    return files | ({"W&B run": location} if location else {})


def _train(training: Training) -> None:
    config, evaluation = training.config.trainer, training.config.evaluation
    loader, sampler = train_loader(training)
    for epoch in range(training.epoch, config.epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        assert loader.generator is not None
        loader.generator.manual_seed(config.seed * 1_000_003 + epoch)  # the order depends on seed and epoch alone
        sums = train_epoch(training, loader, epoch)
        if training.stop.agreed:
            _log.info("asked to stop: training ends after step %d", training.steps)
            if config.checkpoint_every:
                _save(training)
            return
        training.epoch = epoch + 1
        last = training.epoch == config.epochs
        if evaluation.ends(training.epoch):
            _evaluate(training, sums, training.epoch)
        elif last and training.evaluated_at != training.steps:
            evaluate(training, sums, training.epoch)
        _schedule(training)
        stop = training.all_stopped
        if config.checkpoint_every and (last or stop or training.epoch % config.checkpoint_every == 0):
            _save(training)
        if stop:
            _log.info("every stream has stopped after epoch %d: training ends", training.epoch)
            break


class _First:
    """The first batches of a loader."""

    def __init__(self, loader: DataLoader[Any], batches: int) -> None:
        self._loader, self._batches = loader, min(batches, len(loader))

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._loader), self._batches)


def _preflight(training: Training, steps: int) -> str:
    """Train so many steps; what the monitor then says of what does not train."""
    if training.monitor is None:
        raise ConfigError("trainer.preflight needs monitor.enabled=true")
    loader, sampler = train_loader(training)
    accumulate = training.config.trainer.accumulate
    epoch, done = 0, 0
    while done < steps and not training.stop.agreed:
        if sampler is not None:
            sampler.set_epoch(epoch)
        first = _First(loader, (steps - done) * accumulate)
        train_epoch(training, first, epoch)
        done += -(-len(first) // accumulate)
        epoch += 1
    return str(training.monitor.preflight())


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


def train_epoch(training: Training, loader: DataLoader[Any] | _First, epoch: int) -> Sums:
    config = training.config.trainer
    training.wrapped.train()
    if training.early_stopping is not None:
        training.early_stopping.apply_modes()
    parallel.share_buffers(training.wrapped, training.collective)
    begun, training.begun = training.begun, None
    of_epoch = Sums.none(training.device) if begun is None else begun.sums
    micro_batches = len(loader)
    bar = tqdm(
        loader,
        desc=f"epoch {epoch + 1}/{config.epochs}",
        leave=False,
        disable=not (config.progress and training.rank == 0 and sys.stderr.isatty()) or training.panel,
    )
    of_step = Sums.none(training.device)
    for number, batch in enumerate(bar):
        if begun is not None and number < begun.batches:
            if number == begun.batches - 1:  # what reading them again has drawn is put back
                checkpoint.set_rng_state(begun.rng)
            continue
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
            if training.config.evaluation.due(training.steps):
                _evaluate(training, of_epoch, epoch + (number + 1) / micro_batches)
            if training.stop.agreed:
                training.begun = Begun(number + 1, of_epoch, checkpoint.rng_state())
                break
            of_step = Sums.none(training.device)
    return of_epoch


def _optimizer_step(training: Training, of_step: Sums, epoch: int) -> None:
    if training.monitor is not None:
        figures = training.monitor.step(
            loss=of_step.loss / of_step.items,
            samples=of_step.items,
            correct=of_step.correct.long(),
            scaler=training.scaler,
            epoch=epoch,
            **training.stop.number(),
        )
        training.stop.take(figures)
    if training.config.trainer.clip_norm is not None:
        training.scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(training.model.parameters(), training.config.trainer.clip_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad(set_to_none=False)
    training.steps += 1


def _evaluate(training: Training, sums: Sums, epoch: float) -> None:
    """An evaluation at its regular time, and what follows from it: streams that have stopped improving stop."""
    evaluate(training, sums, epoch)
    training.new_figures = True
    if training.early_stopping is None:
        return
    stopped = training.early_stopping.update(_accuracy(training), training.epoch)
    if training.monitor is not None:
        training.monitor.declare_frozen(training.early_stopping.frozen)
    for name in stopped if training.rank == 0 else ():
        _log.info("stream %s stopped after epoch %.4g: best weights restored", name, epoch)
    if stopped:
        parallel.share_buffers(training.wrapped, training.collective)


def _accuracy(training: Training) -> dict[str, float]:
    return {
        name: training.figures.get(keys.of_stream(name, keys.VAL_ACC), math.nan)
        for name in (keys.FULL, *training.streams.user_names)
    }


def _schedule(training: Training) -> None:
    """The learning rates of the next epoch, from figures that are equal on every rank."""
    if training.schedulers is not None and (training.new_figures or not training.follows_metrics):
        training.schedulers.step(_accuracy(training))
    training.new_figures = False


def _save(training: Training) -> None:
    """Write RUN_DIR/checkpoint.pt from rank 0, after the records of the steps that it holds. Comm: `state_of`'s."""
    state = state_of(training)
    if training.rank == 0:
        training.sinks.flush(EXIT_SECONDS)
        checkpoint.save(training.run_dir / CHECKPOINT, state)
