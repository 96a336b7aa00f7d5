"""A finding: a sentence that carries its numbers and what to do about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ddp_streammon.config import Severity


@dataclass(frozen=True)
class Action:
    """A change of one setting of one stream (`stream="shared"`: of everything that is no stream's; `"full"`: of the
    whole model, so that it reaches every group without a value of its own)."""

    setting: str
    """`lr` (what a schedule starts from), `weight_decay` or another setting of the stream's parameter group."""
    stream: str
    value: float
    """What to set it to."""
    old: float
    """What it is set to now."""
    how: str = field(default="", compare=False)
    """The same as the loop says it that is watched, such as an override of the application; filled by the monitor."""


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
    since: int | None = None
    likely: str = ""
    do: str = ""
    confirm: str = ""
    explained_by: str | None = None


class Finding(str):
    """What a rule found. It *is* its sentence (so `'⚠️' in finding` works) and has fields.

    `rule` (id), `severity`, `stream`, `rank`, `step` (None where it concerns no single one), `evidence` (the
    numbers by name) and `action` (None where there is nothing to set). Those of the evidence rules also say what was
    `seen` (the sentence), what is `likely`, what to `do` and what would `confirm` it, `since` when it stands, and
    which finding it is `explained_by`. Equal on every rank.
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

    @property
    def since(self) -> int | None:
        """The step from which it stands; that of the finding where its rule keeps no record."""
        return self.step if self.fields.since is None else self.fields.since

    @property
    def seen(self) -> str:
        """What was seen: the sentence without its sign."""
        return self.removeprefix("⚠️").strip()

    @property
    def likely(self) -> str:
        return self.fields.likely

    @property
    def do(self) -> str:
        return self.fields.do

    @property
    def confirm(self) -> str:
        return self.fields.confirm

    @property
    def explained_by(self) -> str | None:
        return self.fields.explained_by

    def worded(self, wording: Callable[[Action], str]) -> Finding:
        """The same, its action's `how` as `wording` says it."""
        if self.action is None:
            return self
        action = replace(self.action, how=wording(self.action))
        return Finding(str(self), **vars(self.fields) | {"action": action})

    def told(self) -> str:
        """Everything that it says, in one line."""
        parts = (("Likely", self.likely), ("Do", self.do), ("Confirm", self.confirm))
        text = " ".join(f"{name}: {words}." for name, words in parts if words)
        because = f" Explained by {self.explained_by}." if self.explained_by else ""
        return f"{self}. {text}{because}" if text else f"{self}{because}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for sinks (`SCHEMA`): the sentence under `finding`, and the fields."""
        return {
            "finding": str(self),
            **asdict(self.fields),
            "severity": self.severity.value,
            "since": self.since,
            "seen": self.seen,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Finding:
        """The finding that gave `values` by `to_dict`."""
        action = None if values["action"] is None else Action(**values["action"])
        fields = {name: value for name, value in values.items() if name not in ("finding", "seen")}
        return cls(values["finding"], **fields | {"severity": Severity(values["severity"]), "action": action})


_TEXT, _NUMBER = {"type": "string"}, {"type": ["number", "string"]}
SCHEMA: Mapping[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Finding",
    "type": "object",
    "required": [
        "finding",
        "seen",
        "likely",
        "do",
        "confirm",
        "rule",
        "severity",
        "stream",
        "rank",
        "since",
        "evidence",
    ],
    "properties": {
        **dict.fromkeys(("finding", "seen", "likely", "do", "confirm", "rule"), _TEXT),
        "severity": {"enum": [severity.value for severity in Severity]},
        **{name: {"type": ["string", "null"]} for name in ("stream", "explained_by")},
        **{name: {"type": ["integer", "null"]} for name in ("rank", "step", "since")},
        "evidence": {"type": "object", "additionalProperties": _NUMBER},
        "action": {
            "type": ["object", "null"],
            "required": ["setting", "stream", "value", "old"],
            "properties": {"setting": _TEXT, "stream": _TEXT, "value": _NUMBER, "old": _NUMBER, "how": _TEXT},
        },
    },
    "additionalProperties": False,
}
"""The JSON Schema of `Finding.to_dict` as the JSONL sink writes it (nan and infinities are strings there)."""
