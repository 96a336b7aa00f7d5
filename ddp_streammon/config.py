"""What the core can be told: plain frozen dataclasses, checked when they are made. No Hydra here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class RuleSet(str, Enum):
    """Which rules turn History into findings."""

    guide = "guide"
    """The thresholds and sentences of the StreamMonitor guide. They are folklore, hence severity `info`."""
    off = "off"
    """No advice. Non-finite and missing gradients are still reported."""


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
class MonitorConfig:
    """How a `StreamMonitor` measures."""

    every: int = 1
    """Measure every n-th call of `step`. Counted in calls, so that it is the same on every rank."""
    delay: int = 1
    """The figures of call n enter History at call n + delay (on every rank alike), so that nobody waits."""
    audit_every: int = 1000
    """Measured steps between two comparisons of replicas (checksums of gradients and weights on every rank); the first
    step is always compared. Their gradients are shared out among the ranks for reading only where they were equal."""
    update_every: int = 0
    """Calls between two looks at what the optimizer really changes (`X_update_ratio`); 0: never. Takes the memory of a
    copy of this rank's share of the weights."""
    local_gradients: bool = False
    """Measure each rank's own gradient too, in the backward pass before DDP averages it: one more read of gradients.
    Names the rank and the parameter of a non-finite gradient, the outlier rank, and ranks fed the same batch."""
    history_limit: int = 10_000
    """Values kept for each key; 24 bytes each. Older ones are dropped (the JSONL sink has them all)."""
    rules: RuleSet = RuleSet.guide
    """The rule set behind `get_recommendations`."""
    rule_severity: Severity = Severity.info
    """The severity of what the guide's rules find. Exact rules have their own."""

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("delay", 0), ("audit_every", 1), ("update_every", 0), ("history_limit", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"monitor.{name} must be an integer of at least {least}, got {value!r}")
        if not isinstance(self.local_gradients, bool):
            raise ValueError(f"monitor.local_gradients must be true or false, got {self.local_gradients!r}")
        for name, kind in (("rules", RuleSet), ("rule_severity", Severity)):
            value = getattr(self, name)
            if value not in list(kind):
                valid = ", ".join(item.value for item in kind)
                raise ValueError(f"monitor.{name} must be one of {valid}, got {value!r}")
            object.__setattr__(self, name, kind(value))
