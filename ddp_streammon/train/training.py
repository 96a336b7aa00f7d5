"""What training is made of, put together from a configuration: layout, optimizer, monitor, sinks, checkpoint."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from ddp_streammon.collective import Collective
from ddp_streammon.config import Intent
from ddp_streammon.monitor import StreamMonitor
from ddp_streammon.report import Sink, as_override
from ddp_streammon.report.page import REPORT
from ddp_streammon.sinks import ConsoleSink, FanOut, HtmlSink, JsonlSink, LiveSink, WandbSink, terminal_sink
from ddp_streammon.streams import StreamLike, StreamSet, StreamSpec
from ddp_streammon.train import checkpoint, parallel
from ddp_streammon.train.config import AppConfig, Precision, StreamSection, check_ranks, intent_of, monitor_config
from ddp_streammon.train.data import StreamData
from ddp_streammon.train.early_stopping import Criteria, StreamEarlyStopping
from ddp_streammon.train.optim import StreamOptim, StreamSchedulers, build_optimizer, stream_param_groups
from ddp_streammon.train.progress import Begun, Sums
from ddp_streammon.train.solo import SoloReferences
from ddp_streammon.train.stopping import StopRequest

_log = logging.getLogger("ddp_streammon")
JSONL = "metrics.jsonl"
"""The record of truth, in the run directory."""
_DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


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
    stop: StopRequest
    wandb: WandbSink | None = None
    solo: SoloReferences | None = None
    panel: bool = False
    """Whether the terminal shows the step already, so that a bar would be one too many."""
    epoch: int = 0
    """Epochs that are done."""
    steps: int = 0
    """Optimizer steps that are done."""
    begun: Begun | None = None
    """The epoch that a checkpoint has found begun."""
    figures: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""
    evaluated_at: int = -1
    """How many steps were done at the last evaluation."""
    new_figures: bool = False
    """Whether there was an evaluation, of those that come at regular intervals, since rates were last scheduled."""
    since: float = field(default_factory=time.monotonic)
    """When the last evaluation ended, on this rank's clock."""

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


def build(
    config: AppConfig,
    data: StreamData,
    model: nn.Module,
    run_dir: Path,
    settings: Mapping[str, Any],
    device: torch.device,
    solo: Mapping[str, Sequence[nn.Module]] | None = None,
) -> Training:
    """Everything that training is made of, on this rank; the checkpoint is read where there is one to go on from.

    `solo`: by stream models that were trained on it alone, to compare with.

    Errors: ConfigError for a number of ranks that cannot be laid out as asked for, and for a checkpoint that does not
    fit. Comm: the layout's (`parallel.wrap`), the monitor's, an all_gather_object.
    """
    collective = Collective()
    check_ranks(config, collective.topology.world_size)
    model.to(device)
    specs = stream_specs(config.streams)
    streams = StreamSet.resolve(model, specs)
    for name, section in config.streams.items():
        if section.frozen:
            for item in streams[name].parameters:
                item.parameter.requires_grad_(False)
    wrapped = parallel.wrap(streams, config, device, collective)
    streams = StreamSet.resolve(model, specs)  # sharded parameters are new objects
    claimed = {name: [item.parameter for item in streams[name].parameters] for name in streams.user_names}
    own = {name: StreamOptim(o.lr, o.weight_decay) for name, o in config.optim.streams.items()}
    groups = stream_param_groups(model, config.optim.lr, config.optim.weight_decay, own, claimed)
    optimizer = build_optimizer(
        config.optim.name.value, groups, config.optim.momentum, (config.optim.betas[0], config.optim.betas[1])
    )
    schedule = config.optim.schedule(config.trainer.epochs)
    patience = {n: Criteria(s.patience, s.min_delta) for n, s in config.streams.items() if s.patience is not None}
    modules = {name: [model.get_submodule(path) for path in streams[name].roots] for name in streams.user_names}
    source = checkpoint.find(config.trainer.resume, run_dir, collective)
    saved = checkpoint.load(source, model) if source else None
    monitor, sinks, wandb_sink = None, FanOut(()), None
    stop = StopRequest(config.monitor.delay)
    if config.monitor.enabled:
        if collective.topology.rank == 0:
            sinks, wandb_sink = _sinks(config, run_dir, saved, stop)
        monitor = StreamMonitor(
            wrapped,
            optimizer,
            specs,
            config=monitor_config(config, _intent(config, data, model, collective.topology.world_size)),
            sinks=[sinks],
            name=run_dir.name,
            wording=as_override,
            run={
                **settings,
                "run_dir": str(run_dir),
                "world_size": collective.topology.world_size,
            },
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
        stop=stop,
        wandb=wandb_sink,
        panel=any(isinstance(guarded.sink, LiveSink) for guarded in sinks.sinks),
        solo=SoloReferences(solo, specs, streams.user_names, device) if solo else None,
    )
    seed_all(config.trainer.seed + training.rank)  # dropout and augmentation differ between ranks
    if saved is not None:
        restore(training, saved)
        if training.rank == 0:
            _log.info("goes on after epoch %d, from %s", training.epoch, source)
    return training


def _intent(config: AppConfig, data: StreamData, model: nn.Module, world_size: int) -> Intent:
    """What the configuration declares; a loss of the model's own need not be a cross-entropy."""
    own = getattr(model, "criterion", None)
    classes = data.num_classes if own is None or isinstance(own, nn.CrossEntropyLoss) else None
    items: Any = data.train
    per_rank = -(-len(items) // world_size)
    drop_last = len(items) >= config.trainer.batch_size * world_size
    batches = per_rank // config.trainer.batch_size if drop_last else -(-per_rank // config.trainer.batch_size)
    steps = -(-batches // config.trainer.accumulate) * config.trainer.epochs
    return intent_of(config, classes, steps)


def stream_specs(sections: Mapping[str, StreamSection]) -> dict[str, StreamLike]:
    """Stream name -> its parameter patterns; the name itself where the configuration gives none."""
    return {name: StreamSpec(patterns=tuple(section.patterns or (name,))) for name, section in sections.items()}


def _sinks(
    config: AppConfig, run_dir: Path, saved: Mapping[str, Any] | None, stop: StopRequest
) -> tuple[FanOut, WandbSink | None]:
    """Rank 0's sinks, the record of truth first."""
    sinks: list[Sink] = []
    if config.sinks.jsonl.enabled:
        monitored = (saved or {}).get("monitor") or {"calls": 0}
        sinks.append(JsonlSink(run_dir / JSONL, resume_step=monitored["calls"]))
    if config.sinks.html.enabled:
        sinks.append(HtmlSink(run_dir / REPORT, record=run_dir / JSONL if config.sinks.jsonl.enabled else None))
    if config.sinks.console.enabled:
        sinks.append(terminal_sink() if config.sinks.console.live else ConsoleSink())
    section = config.sinks.wandb
    if not section.enabled:
        return FanOut(sinks), None
    wandb_sink = WandbSink(
        mode=section.mode,
        project=section.project,
        entity=section.entity,
        name=section.name,
        group=section.group,
        tags=tuple(section.tags),
        run_id=section.run_id or (saved or {}).get("wandb_run_id"),
        dir=run_dir,
        log_every=section.log_every,
        alerts=section.alerts,
        record=run_dir / JSONL if saved is not None else None,
        on_stop=stop.ask,
    )
    stop.possible = wandb_sink.is_online
    return FanOut([*sinks, wandb_sink]), wandb_sink


def state_of(training: Training) -> dict[str, Any]:
    """What a checkpoint holds: whole tensors, so that another layout or number of ranks can go on from it.

    Complete on rank 0 alone. Comm: one all_gather_object of what ranks have of their own, and all_gathers of what is
    sharded.
    """
    early_stopping, monitor, schedulers = training.early_stopping, training.monitor, training.schedulers
    begun = training.begun
    own = (
        None if begun is None else (begun.batches, begun.sums.loss.item(), begun.sums.correct.item(), begun.sums.items)
    )
    rng, of_epoch = zip(*training.collective.gather((checkpoint.rng_state(), own)), strict=True)
    return {
        "epoch": training.epoch,
        "steps": training.steps,
        "model": checkpoint.model_state(training.model),
        "optimizer": checkpoint.optimizer_state(training.optimizer),
        "scaler": training.scaler.state_dict(),
        "schedulers": schedulers.state_dict() if schedulers is not None else None,
        "early_stopping": early_stopping.state_dict() if early_stopping is not None else None,
        "monitor": monitor.state_dict() if monitor is not None else None,
        "rng": list(rng),
        "begun": None if begun is None else list(of_epoch),
        "figures": dict(training.figures),
        "wandb_run_id": training.wandb.run_id if training.wandb else None,
    }


def restore(training: Training, state: Mapping[str, Any]) -> None:
    """Go on from what `state_of` gave. Comm: scatters to ranks where parameters are sharded."""
    training.epoch, training.steps = state["epoch"], state["steps"]
    training.figures = dict(state["figures"])
    checkpoint.load_model(training.model, state["model"])
    checkpoint.load_optimizer(training.optimizer, state["optimizer"])
    training.scaler.load_state_dict(state["scaler"])
    parts = (("schedulers", training.schedulers), ("early_stopping", training.early_stopping))
    for name, part in (*parts, ("monitor", training.monitor)):
        if part is not None and state[name] is not None:
            part.load_state_dict(state[name])
    if training.rank < len(state["rng"]):
        checkpoint.set_rng_state(state["rng"][training.rank])
    if state.get("begun") is not None:
        _take_up(training, state)


def _take_up(training: Training, state: Mapping[str, Any]) -> None:
    """Go on within an epoch. With another number of ranks their shares are others: the epoch then begins anew."""
    if len(state["begun"]) != training.collective.topology.world_size:
        if training.rank == 0:
            _log.info("epoch %d begins anew: it was stopped on another number of ranks", training.epoch + 1)
        return
    batches, loss, correct, items = state["begun"][training.rank]
    sums = Sums.none(training.device)
    sums.loss += loss
    sums.correct += correct
    sums.items = items
    training.begun = Begun(batches, sums, state["rng"][training.rank])
