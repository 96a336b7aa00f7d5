"""What the core can be told: plain frozen dataclasses, checked when they are made. No Hydra here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class RuleSet(str, Enum):
    """Which rules turn History into findings."""

    evidence = "evidence"
    """Rules built so that an alarm means something: each says what it requires, holds, and clears (`rules.engine`)."""
    guide = "guide"
    """The thresholds and sentences of the StreamMonitor guide. They are folklore, hence severity `info`."""
    off = "off"
    """No advice: non-finite or missing gradients and ranks that differ are still reported (`rules.evidence.PLAIN`)."""


class Severity(str, Enum):
    """How loud a finding is. Sinks send an alert from `warning` up."""

    info = "info"
    warning = "warning"
    error = "error"

    @property
    def level(self) -> int:
        """0 for info, 1 for warning, 2 for error."""
        return list(Severity).index(self)


@dataclass(frozen=True)
class Intent:
    """What is meant: what the rules cannot see, and what makes a legal set-up of what would be a fault otherwise.

    Everything is optional. Where nothing is declared, what may be meant is reported as information only.
    """

    frozen: tuple[str, ...] | None = None
    """Streams that are not trained; () says that all are, None that nobody said."""
    frozen_from: Mapping[str, int] = field(default_factory=dict)
    """Streams that are not trained from this call of `step` on."""
    auxiliary: tuple[str, ...] = ()
    """Streams that need not take part in every step: of optional inputs, or with losses of their own."""
    accumulate: int = 1
    """Micro-batches an optimizer step."""
    clip_norm: float | None = None
    """Where the gradient is clipped after `step`."""
    total_steps: int | None = None
    """Optimizer steps of the whole training."""
    lr: Mapping[str, float] = field(default_factory=dict)
    """The base learning rate of each stream, as far as it is declared."""
    weight_decay: Mapping[str, float] = field(default_factory=dict)
    """And its weight decay."""
    classes: int | None = None
    """The number of classes, where the loss is a cross-entropy: it is not negative then, and has a chance level."""
    schedule: str | None = None
    """The name of the learning rate's schedule; `restarts` in it says that the rate comes back up."""
    eval_modules: bool = False
    """Whether dropout or batch norm modules are left in eval mode on purpose."""

    def __post_init__(self) -> None:
        for name in ("accumulate", "total_steps", "classes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"intent.{name} must be an integer of at least 1, got {value!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"intent.clip_norm must be positive (or None), got {self.clip_norm!r}")


@dataclass(frozen=True)
class MonitorConfig:
    """How a `StreamMonitor` measures."""

    every: int = 1
    """Measure every n-th call of `step`. Counted in calls, so that it is the same on every rank."""
    delay: int = 1
    """The figures of call n enter History at call n + delay (on every rank alike), so that nobody waits."""
    audit_every: int = 1000
    """Measured steps between two comparisons of replicas (checksums of gradients and weights on every rank); the first
    step is always compared, and so is, at growing distances, one with gradients that were missing or zero before. Only
    what was equal, and neither missing nor zero, is shared out among the ranks for reading."""
    update_every: int = 0
    """Calls between two looks at what the optimizer really changes (`X_update_ratio`); 0: never. Takes the memory of a
    copy of this rank's share of the weights."""
    local_gradients: bool = False
    """Measure each rank's own gradient too, in the backward pass before DDP averages it: one more read of gradients.
    Names the rank and the parameter of a non-finite gradient, the outlier rank, and ranks fed the same batch."""
    history_limit: int = 10_000
    """Values kept for each key; 24 bytes each. Older ones are dropped (the JSONL sink has them all)."""
    rules: RuleSet = RuleSet.evidence
    """The rule set behind `get_recommendations`."""
    rule_severity: Severity = Severity.info
    """The severity of what the guide's rules find. All others have their own."""
    intent: Intent = field(default_factory=Intent)
    """What is meant, for the evidence rules."""
    mute: tuple[str, ...] = ()
    """Evidence rules, by id, that say nothing."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Other thresholds than the evidence rules' own: `{"STL.ratio": 0.9}`; a rule's fields are their names."""
    extra_rules: tuple[Any, ...] = ()
    """Rules of your own beside those of the set: see `rules.engine.Rule`."""

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("delay", 0), ("audit_every", 1), ("update_every", 0), ("history_limit", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"monitor.{name} must be an integer of at least {least}, got {value!r}")
        if not isinstance(self.local_gradients, bool):
            raise ValueError(f"monitor.local_gradients must be true or false, got {self.local_gradients!r}")
        if not isinstance(self.intent, Intent):
            raise ValueError(f"monitor.intent must be an Intent, got {self.intent!r}")
        for name, kind in (("rules", RuleSet), ("rule_severity", Severity)):
            value = getattr(self, name)
            if value not in list(kind):
                valid = ", ".join(item.value for item in kind)
                raise ValueError(f"monitor.{name} must be one of {valid}, got {value!r}")
            object.__setattr__(self, name, kind(value))
