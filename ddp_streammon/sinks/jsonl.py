"""Every value of a run in a text file: one strict JSON object a line, on disk as soon as it is known."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from io import FileIO
from pathlib import Path
from typing import Any

from ddp_streammon.report import Outcome, Report, RunInfo
from ddp_streammon.rules.finding import Finding

_PLAIN = frozenset({int, str, bool, type(None)})
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlSink:
    """Appends to a file, each record written at once, so that a killed job loses at most the line in work.

    A record is `{"type": "run" | "step" | "epoch" | "outcome", "step", "epoch", "time" (of writing, unix seconds),
    "attempt", "values", "findings"}`; `step` also has `measured` (what the rules saw) and `monitor_seconds` (what calls
    of `StreamMonitor.step` have taken on rank 0 since the record before), `run` also `name`, `streams`, `config` and
    `inventory`, `outcome` also `text` and `exit_code`. A resumed run appends a `run` record of its own, and its records
    have the next number as their `attempt` (the first is 0). nan and infinities are the strings "NaN", "Infinity" and
    "-Infinity", which `read_jsonl` turns back.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        """Raises OSError with the path where it cannot be written; creates missing folders.

        `resume_step`: the step at which the run goes on. What the file holds of later steps will come again, so
        `open` moves it to `<path>.attempt-<N>` beside it. None: the file is left as it is.
        """
        self.path = Path(path)
        self._resume_step = resume_step
        self._attempt = 0
        self._file: FileIO | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("ab").close()
        except OSError as error:
            raise OSError(
                f"cannot write the JSONL file {str(self.path)!r} ({error.strerror or error}): "
                "give a path to a file in a folder that you may write to"
            ) from error

    def open(self, run: RunInfo) -> None:
        """Set aside what will come again, and append the run's description."""
        torn = False
        if self.path.is_file():
            self._attempt = _last_attempt(self.path) + 1
            if self._resume_step is not None:
                _set_aside(self.path, self._resume_step)
            torn = _ends_inside_a_line(self.path)
        self._file = FileIO(self.path, "a")  # no buffer: a process forked in the meantime has nothing to write twice
        if torn:
            self._write(b"\n")
        self._append(
            _record("run", None, None, {}, ())
            | {
                "name": run.name,
                "streams": list(run.streams),
                "config": run.config,
                "inventory": run.inventory,
            }
        )

    def write(self, report: Report) -> None:
        """Append the report."""
        record = _record(report.kind, report.step, report.epoch, report.values, report.findings)
        if report.stats is not None:
            record["measured"] = report.stats.to_dict()
        if report.monitor_seconds is not None:
            record["monitor_seconds"] = report.monitor_seconds
        self._append(record)

    def close(self, outcome: Outcome) -> None:
        """Append the outcome and close the file."""
        if self._file is None:
            return
        try:
            self._append(
                _record("outcome", None, None, outcome.summary, outcome.findings)
                | {"text": outcome.text, "exit_code": outcome.exit_code}
            )
        finally:
            self._file.close()
            self._file = None

    def _append(self, record: Mapping[str, Any]) -> None:
        numbered = {**record, "attempt": self._attempt}
        self._write((json.dumps(_strict(numbered), allow_nan=False, ensure_ascii=False) + "\n").encode())

    def _write(self, line: bytes) -> None:
        if self._file is None:
            raise RuntimeError(f"the JSONL file {str(self.path)!r} is not open: call open() before write()")
        while line:
            line = line[self._file.write(line) :]


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file, with nan and infinities as floats again.

    A line that a killed job left torn (the last one, or the one before a `run` record) is left out. Any other
    line that is no JSON raises ValueError with its number.
    """
    records: list[dict[str, Any]] = []
    broken: int | None = None
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if broken is not None and (record is None or record["type"] != "run"):
            raise ValueError(
                f"line {broken} of {str(path)!r} is not JSON although the run went on after it: "
                "the file was changed by something else; remove that line to read the rest"
            )
        broken = number if record is None else None
        if record is not None:
            records.append(_restored(record))
    return records


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Where each line begins, in bytes, and its record; empty for a torn line."""
    place = 0
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                record = {}
            yield place, record
            place += len(line)


@dataclass(frozen=True)
class Reported:
    """What a record says was found, and when it was written."""

    kind: str
    step: int
    """0 where the record is of no step."""
    time: float
    findings: tuple[Finding, ...]


def reported(path: Path) -> Iterator[Reported]:
    """The reports and outcomes of a file, in their order; nothing of a file that is not there."""
    for _, record in _lines(path) if path.is_file() else ():
        if record.get("type") in ("step", "epoch", "outcome"):
            found = _restored({"values": {}, "findings": record["findings"]})["findings"]
            findings = tuple(map(Finding.from_dict, found))
            yield Reported(record["type"], record["step"] or 0, record["time"], findings)


def _last_attempt(path: Path) -> int:
    """The largest number of an attempt in the file; -1 if it has no records, 0 for records without a number."""
    return max((record.get("attempt", 0) for _, record in _lines(path) if record), default=-1)


def _set_aside(path: Path, step: int) -> None:
    """Move everything from the first record of a later step on to a file beside it, and a torn line at the end."""
    cut = next((place for place, record in _lines(path) if (record.get("step") or 0) > step), None)
    if cut is None and _ends_inside_a_line(path):
        *_, (cut, _) = _lines(path)
    if cut is None:
        return
    with path.open("rb+") as file:
        file.seek(cut)
        rest = file.read()
        with path.with_name(f"{path.name}.attempt-{_last_attempt(path)}").open("ab") as aside:
            aside.write(rest)
        file.truncate(cut)


def _ends_inside_a_line(path: Path) -> bool:
    """Whether the last byte of the file is something other than a line end."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            return False
        file.seek(size - 1)
        return file.read(1) != b"\n"


def _record(
    kind: str, step: int | None, epoch: float | None, values: Mapping[str, float], findings: Iterable[Finding]
) -> dict[str, Any]:
    return {
        "type": kind,
        "step": step,
        "epoch": epoch,
        "time": time.time(),
        "values": values,
        "findings": [finding.to_dict() for finding in findings],
    }


def _strict(value: Any) -> Any:
    """`value` of types that strict JSON has; what it has no type for (a path, a class) becomes its text."""
    if type(value) in _PLAIN:  # nearly always, with floats
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Enum):
        return _strict(value.value)
    if isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_strict(item) for item in value]
    return str(value)


def _restored(record: dict[str, Any]) -> dict[str, Any]:
    """The record with floats where numbers belong; text elsewhere is left as it is, whatever it says."""
    findings = [
        finding
        | {"evidence": _floats(finding["evidence"])}
        | ({"action": _floats(finding["action"], only=("value", "old"))} if finding["action"] else {})
        for finding in record["findings"]
    ]
    whole = record | {"values": _floats(record["values"]), "findings": findings}
    return whole | {"measured": all_floats(record["measured"])} if "measured" in record else whole


def all_floats(value: Any) -> Any:
    """The same with floats for the names of nan and infinities, at any depth."""
    if isinstance(value, dict):
        return {key: all_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [all_floats(item) for item in value]
    return _NONFINITE.get(value, value) if isinstance(value, str) else value


def _floats(mapping: Mapping[str, Any], only: Iterable[str] | None = None) -> dict[str, Any]:
    wanted = set(mapping if only is None else only)
    return {
        key: _NONFINITE.get(item, item) if key in wanted and isinstance(item, str) else item
        for key, item in mapping.items()
    }
