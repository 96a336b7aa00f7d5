"""The application's configuration: dataclasses are the schema, Hydra fills them, nobody else sees OmegaConf."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddp_streammon import keys
from ddp_streammon.config import MonitorConfig, RuleSet, Severity
from ddp_streammon.sinks.wandb import MODES
from ddp_streammon.train.early_stopping import Criteria
from ddp_streammon.train.optim import Schedule, StreamOptim

AUTO = "auto"
"""`trainer.resume`: the run directory's own checkpoint."""


class ConfigError(ValueError):
    """The configuration is wrong; the text says where, what is valid, and what to do."""


def _at_least(path: str, section: object, **bounds: int) -> None:
    for name, least in bounds.items():
        value = getattr(section, name)
        if value < least:
            raise ValueError(f"{path}.{name} must be at least {least}, got {value}")


class Optimizer(str, Enum):
    adamw = "adamw"
    adam = "adam"
    sgd = "sgd"


class Scheduler(str, Enum):
    none = "none"
    cosine = "cosine"
    step = "step"
    plateau = "plateau"


class Precision(str, Enum):
    off = "off"
    bf16 = "bf16"
    fp16 = "fp16"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass
class StreamSection:
    """One stream (`streams.<name>`)."""

    patterns: list[str] | None = None
    """Parameter patterns of the stream in the user's own model; None: the stream's name."""
    frozen: bool = False
    """Declared intent: the stream is not trained."""
    patience: int | None = None
    """Stream early stopping: evaluations without improvement of the stream's own accuracy; None: never."""
    min_delta: float = 0.0
    """Stream early stopping: what counts as an improvement, in accuracy (0 to 1)."""

    def __post_init__(self) -> None:
        if self.patience is not None:
            Criteria(self.patience, self.min_delta)


@dataclass
class StreamOptimSection:
    """What a stream's parameter group has of its own (`optim.streams.<name>`); null: the base value."""

    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        StreamOptim(self.lr, self.weight_decay)


@dataclass
class OptimSection:
    """The optimizer, and one parameter group a stream."""

    name: Optimizer = Optimizer.adamw
    lr: float = 1e-3
    weight_decay: float = 0.01
    momentum: float = 0.9
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    scheduler: Scheduler = Scheduler.cosine
    floor: float = 0.01
    """cosine, plateau: the lowest rate as a fraction of the group's base rate."""
    step_size: int = 10
    """step: epochs between two reductions."""
    factor: float = 0.1
    """step, plateau: what a reduction multiplies the rate by."""
    patience: int = 5
    """plateau: epochs without improvement that are tolerated."""
    streams: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        StreamOptim(self.lr, self.weight_decay)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must be two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum must be in [0, 1), got {self.momentum}")
        self.schedule(epochs=1)

    def schedule(self, epochs: int) -> Schedule | None:
        """The learning rate schedule over so many epochs."""
        if self.scheduler is Scheduler.none:
            return None
        return Schedule(
            self.scheduler.value,
            total=epochs,
            floor=self.floor,
            step_size=self.step_size,
            factor=self.factor,
            patience=self.patience,
        )


@dataclass
class MonitorSection:
    """What is measured, and how often."""

    enabled: bool = True
    every: int = 1
    """Optimizer steps between two measured ones."""
    delay: int = 1
    history_limit: int = 10_000
    evaluate_every: int = 1
    """Epochs between two evaluations of the streams."""
    max_batches: int | None = None
    """Limit of an evaluation, in batches of each split over all ranks; null: all."""

    def __post_init__(self) -> None:
        _at_least("monitor", self, every=1, evaluate_every=1)
        if self.max_batches is not None:
            _at_least("monitor", self, max_batches=1)


@dataclass
class RulesSection:
    """Which rules give recommendations, and how loud they are."""

    name: RuleSet = RuleSet.guide
    severity: Severity = Severity.info


@dataclass
class JsonlSection:
    enabled: bool = True


@dataclass
class ConsoleSection:
    enabled: bool = True


@dataclass
class WandbSection:
    enabled: bool = True
    mode: str = "offline"
    project: str = "ddp_streammon"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    run_id: str | None = None
    log_every: int = 10
    alerts: bool | None = None

    def __post_init__(self) -> None:
        _at_least("sinks.wandb", self, log_every=1)
        if self.mode not in MODES:
            raise ValueError(f"sinks.wandb.mode must be one of {', '.join(MODES)}, got {self.mode!r}")


@dataclass
class SinksSection:
    """Where reports go; on rank 0."""

    jsonl: JsonlSection = field(default_factory=JsonlSection)
    console: ConsoleSection = field(default_factory=ConsoleSection)
    wandb: WandbSection = field(default_factory=WandbSection)


@dataclass
class TrainerSection:
    """The training loop."""

    epochs: int = 12
    batch_size: int = 128
    """Samples a rank and micro-batch."""
    accumulate: int = 1
    """Micro-batches an optimizer step."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; measured before clipping. null: no clipping."""
    precision: Precision = Precision.off
    """Autocast; fp16 with a GradScaler."""
    device: Device = Device.auto
    num_workers: int = 0
    seed: int = 0
    resume: str | None = AUTO
    """`auto`: goes on from the run directory's checkpoint if there is one; a checkpoint file; null: starts anew."""
    checkpoint_every: int = 5
    """Epochs between two checkpoints; the last epoch always has one. 0: none."""
    progress: bool = True
    """A progress bar on rank 0, where the terminal can show one."""
    find_unused_parameters: bool = False
    timeout_s: float = 600.0
    """Seconds after which a collective that another rank does not join ends the job."""

    def __post_init__(self) -> None:
        _at_least("trainer", self, epochs=1, batch_size=1, accumulate=1, num_workers=0, checkpoint_every=0)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"trainer.clip_norm must be positive (or null), got {self.clip_norm}")
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"trainer.timeout_s must be a positive number of seconds, got {self.timeout_s}")
        if self.resume not in (None, AUTO) and not Path(self.resume).is_file():
            raise ValueError(
                f"trainer.resume: there is no file {self.resume!r}; give the path of a checkpoint.pt, "
                f"{AUTO} (the run directory's own) or null (start anew)"
            )


@dataclass
class AppConfig:
    """Everything the application can be told."""

    data: dict[str, Any] = MISSING
    model: dict[str, Any] = MISSING
    streams: dict[str, Any] = MISSING
    optim: OptimSection = field(default_factory=OptimSection)
    monitor: MonitorSection = field(default_factory=MonitorSection)
    rules: RulesSection = field(default_factory=RulesSection)
    sinks: SinksSection = field(default_factory=SinksSection)
    trainer: TrainerSection = field(default_factory=TrainerSection)


ConfigStore.instance().store(name="schema", node=AppConfig)


def monitor_config(config: AppConfig) -> MonitorConfig:
    """What the core's monitor is told."""
    return MonitorConfig(
        every=config.monitor.every,
        delay=config.monitor.delay,
        history_limit=config.monitor.history_limit,
        rules=config.rules.name,
        rule_severity=config.rules.severity,
    )


def load(config: DictConfig) -> AppConfig:
    """The composed configuration as checked dataclasses. Errors: ConfigError, one sentence each."""
    try:
        streams = _entries("streams", config.streams, StreamSection)
        stream_optims = _entries("optim.streams", config.optim.streams, StreamOptimSection)
        loaded = OmegaConf.to_object(config)
        assert isinstance(loaded, AppConfig)
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not streams:
        raise ConfigError("streams is empty: name at least one, e.g. streams=mfeat_two or '+streams.rgb={}'")
    strangers = [name for name in stream_optims if name not in (*streams, keys.SHARED)]
    if strangers:
        raise ConfigError(
            f"optim.streams.{strangers[0]}: there is no such stream; streams: {', '.join(streams)}, {keys.SHARED}"
        )
    for name, section in streams.items():
        if section.frozen and stream_optims.get(name, StreamOptimSection()) != StreamOptimSection():
            raise ConfigError(
                f"optim.streams.{name} has settings, but streams.{name}.frozen says that it is not trained: "
                "drop one of them"
            )
    loaded.streams = streams
    loaded.optim.streams = stream_optims
    try:
        monitor_config(loaded)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return loaded


Section = TypeVar("Section")


def _entries(path: str, node: Mapping[str, Any] | None, section: type[Section]) -> dict[str, Section]:
    """An open mapping's entries, each checked against `section`."""
    result: dict[str, Section] = {}
    for name, entry in (node or {}).items():
        given = {} if entry is None else entry
        valid = [item.name for item in fields(section)]  # type: ignore[arg-type]
        if not isinstance(given, Mapping):
            raise ConfigError(f"{path}.{name} must be a mapping with {', '.join(valid)}, got {given!r}")
        for key in given:
            if key not in valid:
                raise ConfigError(f"{path}.{name}.{key}: no such key; valid keys: {', '.join(valid)}")
        try:
            merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), given))
        except (OmegaConfBaseException, ValueError) as error:
            first = str(error).splitlines()[0]
            raise ConfigError(f"{path}.{name}: {first}; valid keys: {', '.join(valid)}") from error
        assert isinstance(merged, section)
        result[str(name)] = merged
    return result
