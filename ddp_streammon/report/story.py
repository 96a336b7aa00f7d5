"""A run as its record tells it, in one pass and in bounded memory: curves, findings and how it ended."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.report import gist
from ddp_streammon.report.curves import Curve
from ddp_streammon.report.pictures import is_shown
from ddp_streammon.rules.finding import Finding

ALL_CLEAR = "OK"
"""The rule id of the sentence that says how many rules found nothing; it is the verdict, no finding."""
MOST_CURVES, MOST_FINDINGS, MOST_SPANS = 1_000, 500, 100
"""What is kept of a record that names ever new figures, findings, or times at which one of them stood."""
MOST_RANKS = 64
"""More ranks are drawn only if a finding names them, from then on."""
BUSY_SECONDS = "busy_seconds"
_COLUMNS = 240
"""Columns of a heat map."""
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass
class Told:
    """One finding over a run: as it was last told, and when it stood."""

    latest: Mapping[str, Any]
    spans: list[list[int]]
    """[first step, last step] of each time it stood."""
    by_step: bool
    """Whether reports of steps tell it too; others are told by those of epochs alone."""
    stands: bool = True

    @property
    def severity(self) -> str:
        found = self.latest.get("severity")
        return str(found) if found in Severity.__members__ else Severity.info.value

    @property
    def since(self) -> int:
        own = self.latest.get("since")
        return min(own, self.spans[0][0]) if isinstance(own, int) else self.spans[0][0]

    @property
    def is_alarm(self) -> bool:
        return Severity(self.severity).level >= Severity.warning.level


@dataclass
class Story:
    """Filled record by record (`add`), those of the JSONL file or of a sink. Unknown fields are let be."""

    runs: list[Mapping[str, Any]] = field(default_factory=list)
    """The `run` records: one for each time that the job was started."""
    starts: list[int] = field(default_factory=list)
    """The last step before each of them."""
    outcome: Mapping[str, Any] | None = None
    """The last `outcome` record; None while the run goes on, and for one that was killed."""
    curves: dict[str, Curve] = field(default_factory=dict)
    ranks: dict[str, dict[int, Curve]] = field(default_factory=dict)
    """What is known of each rank, figure -> rank -> curve."""
    epochs: Curve = field(default_factory=Curve)
    findings: dict[Any, Told] = field(default_factory=dict)
    all_clear: str = ""
    step_times: Curve = field(default_factory=Curve)
    """Seconds a step, by the times at which records were written."""
    monitor_times: Curve = field(default_factory=Curve)
    """Of them what `StreamMonitor.step` takes on rank 0's host."""
    last_step: int = 0
    last_time: float = math.nan
    _unshown: set[str] = field(default_factory=set)
    _before: tuple[int, float] | None = None

    @property
    def streams(self) -> list[str]:
        """The user's streams, in their order."""
        return [str(name) for name in self.runs[-1].get("streams", ())] if self.runs else []

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a record. One of an unknown type, or without what its type has, changes nothing."""
        kind, step = record.get("type"), record.get("step")
        if _is_number(record.get("time")):
            self.last_time = record["time"]
        if kind == "run":
            self.runs.append(record)
            self.starts.append(self.last_step)
            self.outcome, self._before = None, None
        elif kind == "outcome":
            self.outcome = record
        elif kind in ("step", "epoch") and isinstance(step, int):
            self.last_step = max(self.last_step, step)
            self._take_values(step, record.get("values"))
            self._take_findings(kind, step, record.get("findings"))
            if _is_number(record.get("epoch")):
                self.epochs.add(step, record["epoch"])
            if kind == "step":
                self._take_time(step, record.get("time"), record.get("monitor_seconds"))
                self._take_ranks(step, record.get("measured"))
            else:
                self._before = None  # an evaluation is no step

    def _take_values(self, step: int, values: Any) -> None:
        if not isinstance(values, Mapping):
            return
        for key, value in values.items():
            number = _number(value)
            if number is None:
                continue
            curve = self.curves.get(key)
            if curve is None:
                curve = self._new_curve(key)
            if curve is not None:
                curve.add(step, number)

    def _new_curve(self, key: str) -> Curve | None:
        """A curve for a figure that a picture shows; None for others."""
        if key in self._unshown:
            return None
        if (rank := keys.rank_of(key)) is not None:
            curve = self.ranks.setdefault(rank[0], {})[rank[1]] = Curve(_COLUMNS)
            self.curves[key] = curve
            return curve
        if len(self.curves) >= MOST_CURVES or not is_shown(key, self.streams):
            if len(self._unshown) < MOST_CURVES:
                self._unshown.add(key)
            return None
        curve = self.curves[key] = Curve()
        return curve

    def _take_time(self, step: int, time: Any, of_monitor: Any) -> None:
        if not _is_number(time):
            return
        if self._before is not None and step > self._before[0]:
            steps = step - self._before[0]
            self.step_times.add(step, max(0.0, time - self._before[1]) / steps)
            if _is_number(of_monitor) and of_monitor > 0:
                self.monitor_times.add(step, of_monitor / steps)
        self._before = (step, time)

    def _take_ranks(self, step: int, measured: Any) -> None:
        """What the `measured` field, where there is one, says of each rank's time."""
        facts = measured.get("rank_facts") if isinstance(measured, Mapping) else None
        if not isinstance(facts, Mapping):
            return  # records of earlier versions have a list
        ranks, said = facts.get("rank", ()), facts.get(BUSY_SECONDS)
        named = {told.latest.get("rank") for told in self.findings.values()}
        for rank, seconds in zip(ranks, said if isinstance(said, list) else [said] * len(ranks), strict=False):
            if (rank < MOST_RANKS or rank in named) and _is_number(seconds) and math.isfinite(seconds):
                of_ranks = self.ranks.setdefault(BUSY_SECONDS, {})
                of_ranks.setdefault(rank, Curve(_COLUMNS)).add(step, seconds)

    def _take_findings(self, kind: str, step: int, findings: Any) -> None:
        now: dict[Any, Mapping[str, Any]] = {}
        for found in findings if isinstance(findings, list) else ():
            if isinstance(found, Mapping) and "finding" in found:
                if found.get("rule") == ALL_CLEAR:
                    self.all_clear = str(found["finding"])
                else:
                    now[_gist(found)] = found
        for key, found in now.items():
            told = self.findings.get(key)
            if told is None:
                if len(self.findings) < MOST_FINDINGS:
                    self.findings[key] = Told(found, [[step, step]], kind == "step")
                continue
            told.latest, told.by_step = found, told.by_step or kind == "step"
            if told.stands or len(told.spans) >= MOST_SPANS:
                told.spans[-1][1] = step
            else:
                told.spans.append([step, step])
            told.stands = True
        for key, told in self.findings.items():
            if key not in now and told.by_step == (kind == "step"):
                told.stands = False

    def by_urgency(self) -> list[Told]:
        """The findings: what stands before what does not, the severe before the rest, causes before consequences."""

        def urgency(told: Told) -> tuple[Any, ...]:
            level = Severity(told.severity).level
            return (not (told.stands or told.is_alarm), -level, bool(told.latest.get("explained_by")), told.since)

        return sorted(self.findings.values(), key=urgency)


def read(path: Path) -> Story:
    """The story that a JSONL file tells, read line by line. A line that is no JSON object (torn by a kill) is left out.

    Errors: FileNotFoundError for a file that is not there.
    """
    story = Story()
    try:
        for record in _records(path):
            story.add(record)
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(
            f"there is no record {str(path)!r}: give a run directory that holds metrics.jsonl, or a JSONL file"
        ) from None
    return story


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _number(value: Any) -> float | None:
    """A record's value as a float, also where it is the name of nan or an infinity; None for what is no number."""
    if isinstance(value, str):
        return _NONFINITE.get(value)
    return value if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _gist(found: Mapping[str, Any]) -> Any:
    severity = found.get("severity")
    return gist(
        Finding(
            str(found["finding"]),
            rule=str(found.get("rule")),
            severity=Severity(severity) if severity in Severity.__members__ else Severity.info,
            stream=found.get("stream"),
            rank=found.get("rank"),
        )
    )


def floats(mapping: Any) -> dict[str, float]:
    """The numbers of a record's mapping, nan and infinities as floats again."""
    if not isinstance(mapping, Mapping):
        return {}
    numbers = {str(key): _number(value) for key, value in mapping.items()}
    return {key: value for key, value in numbers.items() if value is not None}
