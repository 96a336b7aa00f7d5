"""Published tools that watch a training, fed as their README says, at their defaults. None is needed by the project.

`pip install gradsnitch traintools trainpulse trainspotter losslint`; a tool that is not installed is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.zoo.adapter import Adapter
from tests.zoo.scoring import Verdict


@dataclass
class Row:
    """What a training script would have logged of a step."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    update_ratio: float = math.nan


class LogReader(Adapter):
    """Keeps the log of rank 0, and reads it again after each epoch."""

    rank0_only = True

    def start(self, ctx: Any) -> None:
        optimizer = ctx.optimizer
        self.group = (optimizer[0] if isinstance(optimizer, tuple) else optimizer).param_groups[0]
        self.parameters = [parameter for parameter in ctx.module.parameters() if parameter.requires_grad]
        self.rows: list[Row] = []
        self.validation: dict[int, float] = {}
        self.verdicts: list[Verdict] = []

    @torch.no_grad()
    def on_after_backward(self, model: nn.Module, step: int, loss: float, batch: Sequence[Any]) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        self.rows.append(Row(step, loss, norm, float(self.group["lr"])))
        self.before = [parameter.clone() for parameter in self.parameters]

    @torch.no_grad()
    def on_after_step(self, model: nn.Module, step: int, loss: float, seconds: float) -> None:
        pairs = list(zip(self.parameters, self.before, strict=True))
        moved = torch.stack([(now - before).norm() for now, before in pairs]).norm()
        self.rows[-1].update_ratio = float(moved / torch.stack([before.norm() for _, before in pairs]).norm())

    def on_epoch_end(self, epoch: int, step: int, stats: Mapping[str, Any]) -> None:
        self.validation[self.rows[-1].step] = float(stats["val_loss"])
        self.verdicts += [
            Verdict(family, step=step, severity=severity, message=m) for family, severity, m in self.read()
        ]

    def read(self) -> Iterable[tuple[str, str, str]]:
        """(family, severity, message) of the log so far."""
        raise NotImplementedError

    def finish(self) -> list[Verdict]:
        return self.verdicts


class GradSnitch(LogReader):
    """gradsnitch 0.1.0."""

    package = "gradsnitch"
    families = (
        *("nonfinite", "nonfinite", "exploding", "overfitting", "stalled", "diverging", "vanishing", "lr_high"),
        *("lr_high", "lr_schedule"),
    )

    def read(self) -> Iterable[tuple[str, str, str]]:
        import gradsnitch

        log = gradsnitch.watch()
        for row in self.rows:
            log.log(
                row.step,
                row.loss,
                val_loss=self.validation.get(row.step),
                grad_norm=row.grad_norm,
                lr=row.lr,
                update_ratio=row.update_ratio,
            )
        for found in gradsnitch.lint(log.df()):
            family = "lr_low" if "low" in found.name else self.families[int(found.code[2:]) - 1]
            yield family, found.severity, f"{found.code} {found.name}"


class TrainSpotter(LogReader):
    """trainspotter 0.2.6."""

    package = "trainspotter"
    families: Mapping[str, str] = {
        "spikes": "exploding",
        "divergence": "diverging",
        "plateau": "stalled",
        "overfitting": "overfitting",
        "lr_schedule": "lr_schedule",
        "grad_norm": "exploding",
    }

    def read(self) -> Iterable[tuple[str, str, str]]:
        from trainspotter.detectors import run_all
        from trainspotter.model import Run

        run = Run()
        for row in self.rows:
            run.add_point("train/loss", row.step, row.loss)
            run.add_point("lr", row.step, row.lr)
            run.add_point("grad_norm", row.step, row.grad_norm)
        for step, loss in self.validation.items():
            run.add_point("eval/loss", step, loss)
        for found in run_all(run):
            family = "nonfinite" if "non-finite" in found.title else self.families.get(found.detector, "config")
            yield family, found.severity, found.title


class TrainPulse(LogReader):
    """trainpulse 0.4.0."""

    package = "trainpulse"
    families: Mapping[str, str] = {
        "nan_detector": "nonfinite",
        "loss_spike": "exploding",
        "learning_rate": "lr_schedule",
        "plateau": "stalled",
    }

    def read(self) -> Iterable[tuple[str, str, str]]:
        from trainpulse import Monitor

        monitor = Monitor()
        for row in self.rows:
            for name, value in (("loss", row.loss), ("grad_norm", row.grad_norm), ("learning_rate", row.lr)):
                for alert in monitor.log(name, row.step, value) or []:
                    family = "vanishing" if "anish" in alert.message else "exploding"
                    severity = {"critical": "error"}.get(alert.severity.value, alert.severity.value)
                    yield self.families.get(alert.detector, family), severity, alert.message


class LossLint(LogReader):
    """losslint 0.4.1."""

    package = "losslint"
    families: Mapping[str, str] = {
        "nan_inf": "nonfinite",
        "divergence": "diverging",
        "loss_spike": "exploding",
        "overfit_onset": "overfitting",
        "stagnation": "stalled",
    }

    def read(self) -> Iterable[tuple[str, str, str]]:
        from losslint.checks import run_all_checks
        from losslint.parsing import RunLog

        series = {
            "loss": [row.loss for row in self.rows],
            "grad_norm": [row.grad_norm for row in self.rows],
            "eval_loss": [self.validation.get(row.step) for row in self.rows],
        }
        for found in run_all_checks(RunLog([row.step for row in self.rows], series, Path("log.csv"))):
            yield self.families.get(found.check, "config"), found.severity, found.message


class TrainTools(Adapter):
    """traintools 0.6.2: it looks at gradients and batches itself, and names parameters."""

    package = "traintools"
    rank0_only = True
    words: Mapping[str, str] = {
        "non-finite": "nonfinite",
        "vanished": "vanishing",
        "very large": "exploding",
        "ratio is high": "lr_high",
        "tiny": "lr_low",
        "class": "labels",
        "constant": "input",
    }

    def start(self, ctx: Any) -> None:
        from traintools import BatchInspector, GradientHealthMonitor

        optimizer = ctx.optimizer
        self.group = (optimizer[0] if isinstance(optimizer, tuple) else optimizer).param_groups[0]
        self.ctx = ctx
        self.verdicts: list[Verdict] = []
        self.gradients = GradientHealthMonitor()
        self.batches = BatchInspector(expected_num_classes=10) if ctx.declared["num_classes"] else None

    def on_batch(self, step: int, *inputs_and_target: Any) -> None:
        *inputs, target = inputs_and_target
        if self.batches is not None:
            named = dict(zip(self.ctx.streams, inputs, strict=True))
            self.say(self.batches.inspect(named, target, step=step).warnings, step)

    def on_after_backward(self, model: nn.Module, step: int, loss: float, batch: Sequence[Any]) -> None:
        self.say(self.gradients.inspect(self.ctx.module, step=step, lr=self.group["lr"]).warnings, step)

    def say(self, warnings: Iterable[str], step: int) -> None:
        for warning in warnings:
            family = next((family for word, family in self.words.items() if word in warning), "dead")
            stream = next((name for name in self.ctx.streams if f".{name}." in warning or f"'{name}'" in warning), None)
            self.verdicts.append(Verdict(family, stream, step=step, message=warning))

    def finish(self) -> list[Verdict]:
        return self.verdicts
