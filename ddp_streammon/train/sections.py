"""The schema of the application's configuration: dataclasses that check themselves, filled by `config.load`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from ddp_streammon.config import RuleSet, Severity
from ddp_streammon.evaluation import ITEMS
from ddp_streammon.sinks.wandb import MODES
from ddp_streammon.train.early_stopping import Criteria
from ddp_streammon.train.optim import Schedule, StreamOptim

AUTO = "auto"
"""`trainer.resume`: the run directory's own checkpoint."""


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


class Layout(str, Enum):
    ddp = "ddp"
    fsdp2 = "fsdp2"
    hsdp = "hsdp"


class Effort(str, Enum):
    off = "off"
    fast = "fast"
    full = "full"


@dataclass
class StreamSection:
    """One stream (`streams.<name>`)."""

    patterns: list[str] | None = None
    """Parameter patterns of the stream in the user's own model; None: the stream's name."""
    frozen: bool = False
    """Declared intent: the stream is not trained."""
    auxiliary: bool = False
    """Declared intent: the stream need not take part in every step (an optional input, a loss of its own)."""
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
    audit_every: int = 1000
    """Measured steps between two comparisons of replicas."""
    update_every: int = 0
    """Steps between two looks at what the optimizer changes; 0: never."""
    local_gradients: bool = False
    """Measure each rank's own gradient too (parallel=ddp)."""
    history_limit: int = 10_000

    def __post_init__(self) -> None:
        _at_least("monitor", self, every=1)


@dataclass
class EvaluationSection:
    """What is evaluated, how often, and at which cost."""

    name: Effort = Effort.fast
    """off: loss and accuracy of the whole model; fast: each stream alone, and what exchanging its input costs; full:
    with the training items, what each stream knows too."""
    every_epochs: int | None = None
    """Epochs between two evaluations; null: 1, unless `every_steps` is given."""
    every_steps: int | None = None
    """Optimizer steps between two evaluations, counted over the whole run. The last epoch always ends in one."""
    limit: int | None = ITEMS
    """Items tried with exchanged inputs; null: all."""
    seconds: float | None = None
    """What trying them may take, from the second evaluation on; null: no budget."""
    share: float | None = None
    """The same as a share of the wall time since the last evaluation."""
    max_batches: int | None = None
    """Limit of an evaluation, in batches of each split over all ranks; null: all."""
    solo: Any = None
    """full: by stream the run directories (or checkpoints) of models of it alone, at least two seeds of each."""

    def __post_init__(self) -> None:
        for name in ("every_epochs", "every_steps", "limit", "max_batches"):
            if getattr(self, name) is not None:
                _at_least("evaluation", self, **{name: 1})
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError(
                f"evaluation.every_epochs={self.every_epochs} and evaluation.every_steps={self.every_steps} exclude "
                "each other: say one of them"
            )
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"evaluation.seconds must be a positive number (or null), got {self.seconds}")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"evaluation.share must be above 0 and at most 1 (or null), got {self.share}")
        if self.seconds is not None and self.share is not None:
            raise ValueError("evaluation.seconds and evaluation.share are two budgets for the same: say one of them")
        if self.solo is not None and self.name is not Effort.full:
            raise ValueError(f"evaluation.solo needs evaluation=full, got evaluation={self.name.value}")

    def ends(self, epochs: int) -> bool:
        """Whether the end of epoch number `epochs` is a time to evaluate."""
        return self.every_steps is None and epochs % (self.every_epochs or 1) == 0

    def due(self, steps: int) -> bool:
        """Whether there is to be an evaluation after so many optimizer steps."""
        return self.every_steps is not None and steps % self.every_steps == 0


@dataclass
class RulesSection:
    """Which rules give recommendations, and how loud they are."""

    name: RuleSet = RuleSet.evidence
    severity: Severity = Severity.info
    """guide: how loud its warnings are."""
    mute: list[str] = field(default_factory=list)
    """evidence: rules, by id, that say nothing."""
    thresholds: dict[str, float] = field(default_factory=dict)
    """evidence: other thresholds, `STL.ratio: 0.9`; a rule's fields are their names."""
    extra: list[Any] = field(default_factory=list)
    """evidence: rules of your own, each with its `_target_`: a subclass of `ddp_streammon.rules.engine.Rule`."""


@dataclass
class JsonlSection:
    enabled: bool = True


@dataclass
class HtmlSection:
    enabled: bool = True


@dataclass
class ConsoleSection:
    enabled: bool = True
    live: bool = True
    """A panel where standard output is a terminal, plain lines elsewhere; false: plain lines everywhere."""


@dataclass
class WandbSection:
    enabled: bool = True
    mode: str = "offline"
    project: str = "ddp_streammon"
    entity: str | None = None
    name: str | None = None
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
    html: HtmlSection = field(default_factory=HtmlSection)
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
    preflight: int | None = None
    """Train so many optimizer steps, say what will not train and which rules cannot be evaluated, and end; nothing is
    saved. null: train."""
    find_unused_parameters: bool = False
    timeout_s: float = 600.0
    """Seconds after which a collective that another rank does not join ends the job."""

    def __post_init__(self) -> None:
        _at_least("trainer", self, epochs=1, batch_size=1, accumulate=1, num_workers=0, checkpoint_every=0)
        if self.preflight is not None:
            _at_least("trainer", self, preflight=1)
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
class ParallelSection:
    """How the ranks share the model: a copy each (ddp), one over all (fsdp2), one over `shard_size` ranks (hsdp)."""

    name: Layout = Layout.ddp
    shard_size: int | None = None
    """hsdp: ranks that hold one copy together, those of a host, say; it divides the number of ranks."""

    def __post_init__(self) -> None:
        if (self.name is Layout.hsdp) != (self.shard_size is not None):
            wanted = "a number of ranks for parallel=hsdp" if self.name is Layout.hsdp else "for parallel=hsdp alone"
            raise ValueError(f"parallel.shard_size is {wanted}, got {self.shard_size} for parallel={self.name.value}")
        if self.shard_size is not None:
            _at_least("parallel", self, shard_size=1)

    def check(self, world_size: int) -> None:
        """ValueError unless so many ranks can be laid out like this."""
        if self.shard_size is not None and world_size % self.shard_size:
            valid = ", ".join(str(size) for size in range(1, world_size + 1) if world_size % size == 0)
            raise ValueError(
                f"parallel.shard_size={self.shard_size} does not divide the number of ranks, {world_size}; choose one "
                f"of {valid}, or start another number of ranks (torchrun --nproc-per-node)"
            )


@dataclass
class AppConfig:
    """Everything the application can be told."""

    data: dict[str, Any] = MISSING
    model: dict[str, Any] = MISSING
    streams: dict[str, Any] = MISSING
    optim: OptimSection = field(default_factory=OptimSection)
    monitor: MonitorSection = field(default_factory=MonitorSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    rules: RulesSection = field(default_factory=RulesSection)
    sinks: SinksSection = field(default_factory=SinksSection)
    trainer: TrainerSection = field(default_factory=TrainerSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)


ConfigStore.instance().store(name="schema", node=AppConfig)
