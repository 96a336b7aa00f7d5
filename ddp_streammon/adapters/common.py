"""What the adapters share: the monitor's life in another's loop, and figures and actions in that loop's words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddp_streammon import keys
from ddp_streammon.config import MonitorConfig, Severity
from ddp_streammon.evaluation import Items, Score
from ddp_streammon.evaluation.scores import classified, split_batch
from ddp_streammon.monitor import StreamMonitor, watch
from ddp_streammon.report import Outcome, Report, RunInfo, Sink, Told, to_set
from ddp_streammon.rules.finding import Action, Finding
from ddp_streammon.streams import StreamLike

_Self = TypeVar("_Self", bound="Guest")
Log: TypeAlias = "Callable[[dict[str, float], int], Any]"


@dataclass(frozen=True)
class Words:
    """How a framework calls what an action changes."""

    groups: str
    """Where a stream is given a parameter group of its own."""
    clip: str
    """What holds the limit that gradients are clipped to."""


def change(action: Action, monitor: StreamMonitor, optimizers: Iterable[Optimizer], words: Words) -> str:
    """What to set, and where: `param_groups[1]['lr']: 0.0005 -> 5e-05`.

    A group that a stream shares with others is not to be changed for its sake: it is said what else is in it.
    """
    value = f"{action.value:.4g}"
    if action.setting == "clip_norm":
        return f"{words.clip}={value}"
    owners = {id(item.parameter): stream.name for stream in monitor.streams.streams for item in stream.parameters}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    whole = action.stream == keys.FULL
    holding = {
        number: sorted({owners[id(p)] for p in group["params"] if id(p) in owners})
        for number, group in enumerate(groups)
        if whole or any(owners.get(id(p)) == action.stream for p in group["params"])
    }
    if holding and (whole or all(names == [action.stream] for names in holding.values())):
        places = ", ".join(f"param_groups[{number}][{action.setting!r}]" for number in holding)
        return f"{places}: {action.old:.4g} -> {value}"
    others = sorted({name for names in holding.values() for name in names} - {action.stream})
    beside = f", now in one group with {', '.join(others)}" if others else ""
    return f"{action.setting}={value} for {action.stream!r} in a parameter group of its own ({words.groups}){beside}"


def sentence(finding: Finding) -> str:
    """All that a finding says, with what to set."""
    what = to_set(finding.action)
    return f"{finding.severity.value} {finding.rule}: {finding.told()}{f' [{what}]' if what else ''}"


class LoggerSink:
    """Figures to the framework's own logger, and findings as lines when they are raised (below `warning` with an
    epoch's report only). The monitor uses it on rank 0 alone, with numbers that have arrived."""

    in_callers_thread = True
    """Where the framework itself logs from."""

    def __init__(self, log: Log, say: Callable[[Finding], None], every: int = 1) -> None:
        """`log(figures, step)` takes each `every`-th step's figures, and each epoch's."""
        self._log, self._say, self._every = log, say, max(every, 1)
        self._streams: tuple[str, ...] = ()
        self._told = Told()

    def open(self, run: RunInfo) -> None:
        """Learn the streams' names."""
        self._streams = run.streams

    def write(self, report: Report) -> None:
        """Log the figures, streams of one figure side by side, and say what is new."""
        if report.kind == "epoch" or report.step % self._every == 0:
            named = ((keys.wandb_key(key, self._streams), value) for key, value in report.values.items())
            self._log({key: float(value) for key, value in named if key is not None}, report.step)
        quiet = Severity.warning.level if report.kind == "step" else Severity.info.level
        loud = [finding for finding in report.findings if finding.severity.level >= quiet]
        for finding in self._told.news(report.kind, loud):
            self._say(finding)

    def close(self, outcome: Outcome) -> None:
        """Nothing: the framework ends its own logger."""


class MicroBatches:
    """Loss and samples of the micro-batches of one optimizer step; sums stay on their device."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor | float, float, float | None]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, loss: Tensor | float, weight: float, samples: float | None) -> None:
        """`loss` is a sum over `weight`. Comm, Sync: none."""
        self._rows.append((_copied(loss), weight, samples))

    def mean(self, loss: Tensor | float, samples: float | None) -> None:
        """`add`, of a loss that is a mean over `samples` (each micro-batch counts alike where they are not known)."""
        weight = samples or 1.0
        self.add(_copied(loss) * weight, weight, samples)

    def take(self) -> dict[str, Any]:
        """`loss` and `samples` for `StreamMonitor.step`; begins anew."""
        rows, self._rows = self._rows, []
        if not rows:
            return {"loss": None, "samples": None}
        losses, weights, samples = zip(*rows, strict=True)
        known = None if None in samples else sum(samples)
        return {"loss": (sum(losses), sum(weights)), "samples": known}


def _copied(loss: Tensor | float) -> Tensor | float:
    """In float64, and out of reach of what the framework does to it in place."""
    return loss.detach().to(torch.float64, copy=True) if isinstance(loss, Tensor) else loss


def items_in(batch: object) -> int | None:
    """The length of the first tensor of a batch, however it is nested; None where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else None
    parts: Iterable[object] = ()
    if isinstance(batch, Mapping):
        parts = batch.values()
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        parts = batch
    return next((count for part in parts if (count := items_in(part)) is not None), None)


def declared(config: MonitorConfig | None, **intent: Any) -> MonitorConfig:
    """The configuration with what the framework knows of the training, where the user has declared nothing."""
    config = config or MonitorConfig()
    default = type(config.intent)()
    open_ = {name: value for name, value in intent.items() if getattr(config.intent, name) == getattr(default, name)}
    return replace(config, intent=replace(config.intent, **{k: v for k, v in open_.items() if v is not None}))


class Guest:
    """A monitor in another's training loop. `monitor` is there from the start of training on.

    `streams`, `config` and `sinks` are those of `watch`; the framework's logger is one sink more. With a `score`
    (`evaluation.Score`, such as `streammon.classification()`) validations evaluate what the head uses of each stream.
    As a context manager it is closed at the end of the block. Comm: what `watch`, `step`, `evaluate` of the monitor
    say, nothing beside them.
    """

    words: Words

    def __init__(
        self,
        streams: Mapping[str, StreamLike] | None = None,
        *,
        score: Score | None = None,
        config: MonitorConfig | None = None,
        sinks: Iterable[Sink] = (),
    ) -> None:
        self.monitor: StreamMonitor | None = None
        self._streams, self._score, self._config, self._sinks = streams, score, config, tuple(sinks)
        self._optimizers: tuple[Optimizer, ...] = ()
        self._micro = MicroBatches()
        self._undo: Callable[[], None] | None = None
        self._open = self._main = False

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(0 if kind is None else 1)

    @property
    def running(self) -> StreamMonitor:
        """The monitor. Errors: RuntimeError before training has begun."""
        if self.monitor is None:
            raise RuntimeError("there is no monitor yet: it is made when training begins")
        return self.monitor

    def _begin(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        log: Log,
        *,
        every: int,
        main: bool,
        saved: Mapping[str, Any] | None = None,
        undo: Callable[[], None] | None = None,
        **intent: Any,
    ) -> None:
        """Watch `model`, and go on from `saved`. `main`: whether this rank prints. `undo` is called at the end."""
        self._close(1)
        self._micro.take()
        self._optimizers, self._main, self._undo = tuple(optimizers), main, undo
        sinks = [*self._sinks, LoggerSink(log, self._say, every)]
        config = declared(self._config, **intent)
        self.monitor = watch(model, self._optimizers, self._streams, config=config, sinks=sinks, wording=self._change)
        self._open = True
        if saved:
            self.monitor.load_state_dict(saved)

    def _step(self, **numbers: Any) -> None:
        """`StreamMonitor.step`, with loss and samples of the micro-batches since the last one."""
        self.running.step(**self._micro.take(), **numbers)

    def _evaluate(self, items: Items | Iterable[Any]) -> None:
        """`StreamMonitor.evaluate`, where there is a score and training is under way."""
        if self._open and self._score is not None:
            self.running.evaluate(items, self._score)

    def _close(self, exit_code: int = 0) -> None:
        """Close the monitor, and say what stands. A second call does nothing."""
        if not self._open:
            return
        self._open = False
        if self._undo is not None:
            self._undo()
        self.running.close(exit_code)
        if self._main:
            for finding in self.running.get_recommendations():
                self._say(finding)

    def _change(self, action: Action) -> str:
        return change(action, self.running, self._optimizers, self.words)

    def _say(self, finding: Finding) -> None:
        print(sentence(finding), flush=True)


def of_logits() -> Score:
    """`streammon.classification()` for models whose output holds `logits`, as those of transformers do."""

    def score(model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        inputs, named, target = split_batch(batch)
        logits = model(*inputs, **named)["logits"]
        return classified(model, logits, target) | {"target": target, "prediction": logits.argmax(1)}

    return score
