"""The training loop: DDP, autocast, accumulation, clipping, schedules, checkpoints, and the monitor beside it."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from ddp_streammon import keys
from ddp_streammon.collective import Collective
from ddp_streammon.evaluation import Items, Score, classification, measure
from ddp_streammon.monitor import StreamMonitor
from ddp_streammon.report import Sink
from ddp_streammon.rules.finding import Finding
from ddp_streammon.sinks import ConsoleSink, FanOut, JsonlSink, WandbSink
from ddp_streammon.sinks.guard import EXIT_SECONDS
from ddp_streammon.streams import StreamLike, StreamSet, StreamSpec
from ddp_streammon.train import checkpoint
from ddp_streammon.train.config import AppConfig, Precision, StreamSection, monitor_config
from ddp_streammon.train.data import StreamData
from ddp_streammon.train.early_stopping import Criteria, StreamEarlyStopping
from ddp_streammon.train.optim import StreamOptim, StreamSchedulers, build_optimizer, stream_param_groups
from ddp_streammon.train.process import process_group, sigterm_unwinds

_log = logging.getLogger("ddp_streammon")
JSONL = "metrics.jsonl"
"""The record of truth, in the run directory."""
_DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


@dataclass(frozen=True)
class Result:
    """How a run ended; equal on every rank, but for `records`, which rank 0 alone has."""

    figures: Mapping[str, float]
    """Loss and accuracy of the whole model: `full_val_loss`, `full_test_acc` and their like."""
    findings: tuple[Finding, ...] = ()
    """What stood at the end."""
    records: Mapping[str, str] = field(default_factory=dict)
    """What was written, and where: `JSONL file`, `W&B run`."""


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


@dataclass
class Training:
    """What training is made of; built once, all of it saved in checkpoints."""

    config: AppConfig
    run_dir: Path
    device: torch.device
    data: StreamData
    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedulers: StreamSchedulers | None
    early_stopping: StreamEarlyStopping | None
    streams: StreamSet
    collective: Collective
    monitor: StreamMonitor | None
    criterion: nn.Module
    sinks: FanOut
    wandb: WandbSink | None = None
    epoch: int = 0
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.collective.topology.rank

    @property
    def all_stopped(self) -> bool:
        """Whether no stream is trained any more: each has stopped early or was declared frozen."""
        stopped = set(self.early_stopping.frozen) if self.early_stopping is not None else set()
        return bool(stopped) and all(name in stopped or stream.frozen for name, stream in self.config.streams.items())

    @property
    def follows_metrics(self) -> bool:
        """Whether the learning rates follow figures, which are new in epochs with an evaluation only."""
        return self.schedulers is not None and self.schedulers.schedule.kind == "plateau"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = _DTYPES.get(self.config.trainer.precision)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's random states."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def run(config: AppConfig, data: StreamData, model: nn.Module, run_dir: Path, settings: Mapping[str, Any]) -> Result:
    """Train `model` on `data` in this process and, under torchrun, with its peers.

    Seed before the model is made (`seed_all`), or its first weights are others each time.

    `settings` is the resolved configuration, for the sinks. Every rank calls it with the same arguments. SIGTERM ends
    it as an exception would: records are brought to disk, and the process exits with code 143.
    """
    with sigterm_unwinds(), process_group(config.trainer) as device:
        training = build(config, data, model, run_dir, settings, device)
        exit_code = 1
        try:
            _train(training)
            if data.test is not None:
                training.figures |= _evaluated(training, "test", data.test)
            exit_code = 0
        finally:
            if training.monitor is not None:
                training.monitor.close(exit_code)
        monitor = training.monitor
        return Result(
            training.figures,
            tuple(monitor.get_recommendations()) if monitor else (),
            _records(training),
        )


def _records(training: Training) -> dict[str, str]:
    if training.monitor is None or training.rank != 0:
        return {}
    jsonl = {"JSONL file": str(training.run_dir / JSONL)} if training.config.sinks.jsonl.enabled else {}
    location = training.wandb.location if training.wandb is not None else ""
    return jsonl | ({"W&B run": location} if location else {})


def build(
    config: AppConfig,
    data: StreamData,
    model: nn.Module,
    run_dir: Path,
    settings: Mapping[str, Any],
    device: torch.device,
) -> Training:
    model.to(device)
    specs = stream_specs(config.streams)
    streams = StreamSet.resolve(model, specs)
    for name, section in config.streams.items():
        if section.frozen:
            for item in streams[name].parameters:
                item.parameter.requires_grad_(False)
    claimed = {name: [item.parameter for item in streams[name].parameters] for name in streams.user_names}
    own = {name: StreamOptim(o.lr, o.weight_decay) for name, o in config.optim.streams.items()}
    groups = stream_param_groups(model, config.optim.lr, config.optim.weight_decay, own, claimed)
    optimizer = build_optimizer(
        config.optim.name.value, groups, config.optim.momentum, (config.optim.betas[0], config.optim.betas[1])
    )
    schedule = config.optim.schedule(config.trainer.epochs)
    collective = Collective()
    wrapped: nn.Module = model
    if collective.distributed:
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=config.trainer.find_unused_parameters,
        )
    patience = {n: Criteria(s.patience, s.min_delta) for n, s in config.streams.items() if s.patience is not None}
    modules = {name: [model.get_submodule(path) for path in streams[name].roots] for name in streams.user_names}
    source = checkpoint.find(config.trainer.resume, run_dir, collective)
    saved = checkpoint.load(source, device, model) if source else None
    monitor, sinks, wandb_sink = None, FanOut(()), None
    if config.monitor.enabled:
        if collective.topology.rank == 0:
            sinks, wandb_sink = _sinks(config, run_dir, saved)
        monitor = StreamMonitor(
            wrapped,
            optimizer,
            specs,
            config=monitor_config(config),
            sinks=[sinks],
            name=run_dir.name,
            run={**settings, "run_dir": str(run_dir), "world_size": collective.topology.world_size},
        )
    training = Training(
        config=config,
        run_dir=run_dir,
        device=device,
        data=data,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=config.trainer.precision is Precision.fp16),
        schedulers=StreamSchedulers(optimizer, schedule) if schedule else None,
        early_stopping=StreamEarlyStopping(model, optimizer, patience, modules) if patience else None,
        streams=streams,
        collective=collective,
        monitor=monitor,
        criterion=getattr(model, "criterion", None) or nn.CrossEntropyLoss(),
        sinks=sinks,
        wandb=wandb_sink,
    )
    seed_all(config.trainer.seed + training.rank)  # dropout and augmentation differ between ranks
    if saved is not None:
        _restore(training, saved)
        if training.rank == 0:
            _log.info("goes on after epoch %d, from %s", training.epoch, source)
    return training


def stream_specs(sections: Mapping[str, StreamSection]) -> dict[str, StreamLike]:
    """Stream name -> its parameter patterns; the name itself where the configuration gives none."""
    return {name: StreamSpec(patterns=tuple(section.patterns or (name,))) for name, section in sections.items()}


def _sinks(config: AppConfig, run_dir: Path, saved: Mapping[str, Any] | None) -> tuple[FanOut, WandbSink | None]:
    """Rank 0's sinks, the record of truth first."""
    sinks: list[Sink] = []
    if config.sinks.jsonl.enabled:
        monitored = (saved or {}).get("monitor") or {"calls": 0}
        sinks.append(JsonlSink(run_dir / JSONL, resume_step=monitored["calls"]))
    if config.sinks.console.enabled:
        sinks.append(ConsoleSink(action_style="hydra"))
    section = config.sinks.wandb
    if not section.enabled:
        return FanOut(sinks), None
    wandb_sink = WandbSink(
        mode=section.mode,
        project=section.project,
        entity=section.entity,
        group=section.group,
        tags=tuple(section.tags),
        run_id=section.run_id or (saved or {}).get("wandb_run_id"),
        dir=run_dir,
        log_every=section.log_every,
        alerts=section.alerts,
    )
    return FanOut([*sinks, wandb_sink]), wandb_sink


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
        sync = contextlib.nullcontext() if at_boundary else _no_sync(training.wrapped)
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


def _no_sync(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


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
        training.figures = _evaluated(training, "val", training.data.validation, alone=needed)
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


def _evaluated(training: Training, split: str, dataset: Any, *, alone: bool = False) -> dict[str, float]:
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
    """Write RUN_DIR/checkpoint.pt from rank 0, after the records of the steps that it holds.

    Comm: one all_gather_object of the random states.
    """
    rng = training.collective.gather(checkpoint.rng_state())
    monitor_state = training.monitor.state_dict() if training.monitor is not None else None
    if training.rank != 0:
        return
    training.sinks.flush(EXIT_SECONDS)
    state = {
        "epoch": training.epoch,
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "schedulers": training.schedulers.state_dict() if training.schedulers else None,
        "early_stopping": training.early_stopping.state_dict() if training.early_stopping else None,
        "monitor": monitor_state,
        "rng": rng,
        "figures": dict(training.figures),
        "wandb_run_id": training.wandb.run_id if training.wandb else None,
    }
    checkpoint.save(training.run_dir / checkpoint.FILE, state)


def _restore(training: Training, state: Mapping[str, Any]) -> None:
    training.epoch = state["epoch"]
    training.figures = dict(state["figures"])
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.scaler.load_state_dict(state["scaler"])
    parts = (("schedulers", training.schedulers), ("early_stopping", training.early_stopping))
    for name, part in (*parts, ("monitor", training.monitor)):
        if part is not None and state[name] is not None:
            part.load_state_dict(state[name])
    if training.rank < len(state["rng"]):
        checkpoint.set_rng_state(state["rng"][training.rank])
