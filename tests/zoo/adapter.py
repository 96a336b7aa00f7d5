"""How monitors are attached to a training: the interface, and ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ddp_streammon import MonitorConfig, StreamMonitor
from ddp_streammon.config import Intent, RuleSet, Severity
from ddp_streammon.keys import LEARNING_RATE
from ddp_streammon.rules.finding import Finding
from tests.zoo.scoring import Verdict

_RULES = {
    "nonfinite": "NF S-NF",
    "exploding": "EXP SPK S-GX",
    "vanishing": "VAN S-GV S-S1",
    "dead": "DET DEAD",
    "frozen": "FRZ OPT UNC LR0",
    "lr_high": "LRH",
    "lr_low": "LRL BF16",
    "lr_schedule": "LRS LRJ",
    "stalled": "STL REGRESSED S-ST S-WS S-NL",
    "diverging": "WGR DIV S-WD",
    "imbalance": "IMB UPD UNUSED IGNORED REDUNDANT S-GR S-WR S-S4",
    "overfitting": "OVF OVG MEMORISED OVERFITTING S-OF S-OM S-OR S-OB S-S2",
    "input": "INZ INC INN",
    "labels": "UNI MEM NOTHING",
    "config": "MODE MOD EVAL DECAY WSH CLP ZGR NEG S-PH",
    "init": "INI INIT LN0",
    "desync": "DESYNC SYNC LR",
    "rank_outlier": "OUTLIER LOS LOSS INR",
    "shard": "BATCH UNE",
    "sampler": "SAME EPO ORDER",
    "straggler": "SLOW",
}
FAMILY = {rule: family for family, rules in _RULES.items() for rule in rules.split()}
"""Rule -> the family of faults that it speaks of."""


class Adapter:
    """What a monitor is told, on every rank at the same moments; it overrides what it needs.

    Verdicts of rank 0 are scored. `rank0_only`: it lives on rank 0 alone, and must not use collectives.
    """

    name = "adapter"
    rank0_only = False
    all_ranks = False
    offline = False
    package: str | None = None
    """What has to be installed beside the project."""

    def start(self, ctx: Any) -> None:
        """`ctx`: `training.Context`."""

    def on_batch(self, step: int, *inputs_and_target: Any) -> None:
        """Before the forward."""

    def on_after_backward(self, model: nn.Module, step: int, loss: float, batch: Sequence[Any]) -> None:
        """Before clipping and the optimizer; once an optimizer step. `loss` is this rank's."""

    def on_after_step(self, model: nn.Module, step: int, loss: float, seconds: float) -> None:
        """After the optimizer."""

    def on_epoch_end(self, epoch: int, step: int, stats: Mapping[str, Any]) -> None:
        """After the validation."""

    def finish(self) -> list[Verdict]:
        return []


class StreamMonZoo(Adapter):
    """This project's monitor as a user would attach it."""

    name = "streammon"
    rules = RuleSet.evidence
    rule_severity = Severity.info

    def start(self, ctx: Any) -> None:
        self.ctx = ctx
        self.verdicts: dict[Any, Verdict] = {}
        self.monitor = StreamMonitor(
            ctx.ddp,
            ctx.optimizer,
            {name: _patterns(ctx.module, names) for name, names in ctx.streams.items()},
            config=self.config(ctx),
        )

    def config(self, ctx: Any) -> MonitorConfig:
        return MonitorConfig(
            local_gradients=True,
            update_every=10,
            audit_every=10,
            rules=self.rules,
            rule_severity=self.rule_severity,
            intent=intent(ctx.declared, tuple(ctx.streams)),
        )

    def on_after_backward(self, model: nn.Module, step: int, loss: float, batch: Sequence[Any]) -> None:
        self.monitor.step(
            loss=loss, samples=len(batch[-1]), scaler=getattr(self.ctx, "scaler", None), epoch=self.monitor.epoch or 0
        )
        self.listen(step)

    def on_epoch_end(self, epoch: int, step: int, stats: Mapping[str, Any]) -> None:
        score = getattr(self.ctx, "score", None)
        if score is not None or self.ctx.declared.get("task", "classification") == "classification":
            self.monitor.evaluate(self.ctx.val_loader, score, train=self.ctx.train_loader, sharded=True)
        self.monitor.epoch = epoch + 1
        self.listen(step)

    def listen(self, step: int) -> None:
        """Note what stands now; a finding that comes and goes counts from its first time."""
        for finding in self.monitor.get_recommendations():
            verdict = verdict_of(finding, step, self.ctx.world)
            if verdict is not None:
                self.verdicts.setdefault((*verdict.key(), verdict.severity), verdict)

    def finish(self) -> list[Verdict]:
        self.monitor.close()
        return list(self.verdicts.values())


class Guide(StreamMonZoo):
    """The guide's thresholds alone, as the seed had them, taken as warnings."""

    name = "guide"
    rules = RuleSet.guide
    rule_severity = Severity.warning

    def config(self, ctx: Any) -> MonitorConfig:
        return dataclasses.replace(super().config(ctx), local_gradients=False, update_every=0)

    def on_after_backward(self, model: nn.Module, step: int, loss: float, batch: Sequence[Any]) -> None:
        self.gradients = self.monitor.compute_stream_gradients()

    def on_epoch_end(self, epoch: int, step: int, stats: Mapping[str, Any]) -> None:
        figures = {**self.gradients, **self.monitor.compute_stream_weights()}
        if self.ctx.declared.get("task", "classification") == "classification":
            figures |= self.monitor.compute_stream_overfitting_indicators(
                *(None, None, None, None), self.ctx.train_loader, self.ctx.val_loader, sharded=True
            )
        self.monitor.log_metrics(epoch, figures)
        self.listen(step)


def intent(declared: Mapping[str, Any], streams: Sequence[str]) -> Intent:
    """What a training declares, in the monitor's terms; what it leaves out stays unknown."""
    micro = int(declared.get("accum") or 1)
    total = declared.get("total_steps")
    classes = declared.get("num_classes") if declared.get("task", "classification") == "classification" else None
    frozen = declared.get("frozen_streams")
    begins = declared.get("frozen_from") or {}

    def of_streams(name: str) -> dict[str, float]:
        values = declared.get(name) or {}
        return {stream: float(values[stream]) for stream in streams if values.get(stream) is not None}

    return Intent(
        frozen=None if frozen is None else tuple(frozen),
        frozen_from={stream: int(step) // micro + 1 for stream, step in begins.items()},
        auxiliary=tuple(declared.get("auxiliary_streams") or ()),
        accumulate=micro,
        clip_norm=declared.get("clip") or None,
        total_steps=None if total is None else int(total) // micro,
        lr=of_streams("lr"),
        weight_decay=of_streams("weight_decay"),
        classes=classes,
        schedule=declared.get("schedule"),
    )


def verdict_of(finding: Finding, step: int, world: int) -> Verdict | None:
    """What a finding says, in the zoo's terms; None where all is well."""
    if not finding.startswith("⚠️"):
        return None
    return Verdict(
        family_of(finding),
        None if finding.stream == "shared" else finding.stream,
        finding.rank,
        step,
        finding.severity.value,
        message=str(finding),
        undecided=world == 2 and finding.rank is None and "two ranks" in f"{finding} {finding.likely}",
    )


def family_of(finding: Finding) -> str:
    """The family of a finding; of a rate that is not the declared one it depends on which is larger."""
    if finding.rule != "RATE":
        return FAMILY[finding.rule]
    assert finding.action is not None
    if finding.action.setting != LEARNING_RATE:
        return "config"
    return "lr_high" if finding.action.old > finding.action.value else "lr_low"


def _patterns(module: nn.Module, names: Sequence[str]) -> Any:
    """The module that holds exactly these parameters, or else their names."""
    parts = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    prefix = ".".join(common)
    inside = [name for name, _ in module.named_parameters() if name.startswith(f"{prefix}.")]
    return module.get_submodule(prefix) if prefix and sorted(inside) == sorted(names) else list(names)
