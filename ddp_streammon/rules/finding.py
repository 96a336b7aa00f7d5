"""A finding: a sentence that carries its numbers and what to do about them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ddp_streammon.config import Severity


@dataclass(frozen=True)
class Action:
    """A change of one setting of one stream (`stream="shared"`: of everything that is no stream's)."""

    setting: str
    """`lr`, `weight_decay` or another optimizer setting of the stream's parameter group."""
    stream: str
    value: float
    """What to set it to."""
    old: float
    """What it is now."""


@dataclass(frozen=True)
class StreamSettings:
    """The learning rate and weight decay that a stream's parameters have now (nan: no optimizer is known)."""

    lr: float = math.nan
    weight_decay: float = math.nan


@dataclass(frozen=True)
class _Fields:
    rule: str
    severity: Severity = Severity.info
    stream: str | None = None
    rank: int | None = None
    step: int | None = None
    evidence: Mapping[str, float] = field(default_factory=dict)
    action: Action | None = None


class Finding(str):
    """What a rule found. It *is* its sentence (so `'⚠️' in finding` works) and has fields.

    `rule` (id), `severity`, `stream`, `rank`, `step` (None where it concerns no single one), `evidence` (the
    numbers by name) and `action` (None where there is nothing to set). Equal on every rank.
    """

    fields: _Fields

    def __new__(cls, sentence: str, **fields: Any) -> Finding:
        finding = super().__new__(cls, sentence)
        finding.fields = _Fields(**fields)
        return finding

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        return (str(self),), vars(self.fields)

    @property
    def rule(self) -> str:
        return self.fields.rule

    @property
    def severity(self) -> Severity:
        return self.fields.severity

    @property
    def stream(self) -> str | None:
        return self.fields.stream

    @property
    def rank(self) -> int | None:
        return self.fields.rank

    @property
    def step(self) -> int | None:
        return self.fields.step

    @property
    def evidence(self) -> Mapping[str, float]:
        return self.fields.evidence

    @property
    def action(self) -> Action | None:
        return self.fields.action

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for sinks: the sentence under `finding`, and the fields."""
        return {"finding": str(self), **asdict(self.fields), "severity": self.severity.value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Finding:
        """The finding that gave `values` by `to_dict`."""
        action = None if values["action"] is None else Action(**values["action"])
        fields = {name: value for name, value in values.items() if name != "finding"}
        return cls(values["finding"], **fields | {"severity": Severity(values["severity"]), "action": action})
