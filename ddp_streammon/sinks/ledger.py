"""What was found over a run, as a table and in one line, and how often somebody is alerted of it. No service."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from ddp_streammon.config import Severity
from ddp_streammon.report import STOPPED, ReportKind, gist, to_set
from ddp_streammon.report.story import ALL_CLEAR
from ddp_streammon.report.verdict import plain
from ddp_streammon.rules.finding import Finding

COLUMNS = ("raised", "cleared", "times", "severity", "rule", "stream", "rank", "finding", "evidence", "override")
MOST_ENTRIES = 500
"""Findings that are kept of a run; one that differs from another in its numbers only is the same."""


@dataclass
class Entry:
    """One finding over a run, as it was last told."""

    finding: Finding
    raised: int | None
    by_step: bool
    """Whether reports of steps tell it too; others are told, and missed, by those of epochs alone."""
    times: int = 1
    """How often it was raised."""
    cleared: int | None = None
    """The step of the first report without it; None while it stands."""

    @property
    def level(self) -> int:
        return self.finding.severity.level

    def row(self) -> list[str | int | None]:
        """Its cells, as `COLUMNS` names them."""
        found = self.finding
        evidence = ", ".join(f"{name}={value:.4g}" for name, value in found.evidence.items())
        head = [self.raised, self.cleared, self.times, found.severity.value, found.rule, found.stream, found.rank]
        return [*head, str(found), evidence, to_set(found.action)]


class Ledger:
    """Filled report by report (`take`)."""

    def __init__(self) -> None:
        self.changes = 0
        """How often something was raised or cleared."""
        self._entries: dict[Hashable, Entry] = {}
        self._all_clear = ""

    def take(self, kind: ReportKind, step: int | None, findings: Iterable[Finding]) -> list[Finding]:
        """Those of `findings` that did not stand before; what stood and is not among them is cleared."""
        now = self._by_gist(findings)
        news = [finding for key, finding in now.items() if self._enter(key, finding, kind == "step", step)]
        for key, entry in self._entries.items():
            if key not in now and entry.cleared is None and entry.by_step == (kind == "step"):
                entry.cleared = step
                self.changes += 1
        return news

    def rest(self, findings: Iterable[Finding]) -> list[Finding]:
        """Those of a whole run's findings that no report had; they are kept as raised at their own step."""
        missing = [(k, found) for k, found in self._by_gist(findings).items() if k not in self._entries]
        return [found for k, found in missing if self._enter(k, found, False, found.step)]

    def rows(self) -> list[list[str | int | None]]:
        """The table, in the order in which the findings were first raised."""
        return [entry.row() for entry in self._entries.values()]

    def verdict(self, exit_code: int = 0) -> str:
        """A run in one line: the worst of what was found, or what looked and found nothing. Never "healthy"."""
        alarms = [entry for entry in self._entries.values() if entry.level >= Severity.warning.level]
        failed = {0: "", STOPPED: "the run was stopped; "}.get(exit_code, "the run failed; ")
        if not alarms:
            return f"{failed}{self._all_clear or 'no alarm'}"
        worst = min(alarms, key=lambda one: (-one.level, one.finding.explained_by is not None, one.raised or 0))
        counts = Counter(entry.finding.severity for entry in alarms)
        over = "" if worst.cleared is None else f" (until step {worst.cleared})"
        rest = ", ".join(
            f"{n} {kind.value}{'s' if n > 1 else ''}" for kind in reversed(Severity) if (n := counts[kind])
        )
        return f"{failed}{worst.finding.rule}: {plain(worst.finding)}{over} [{rest}]"

    def _by_gist(self, findings: Iterable[Finding]) -> dict[Hashable, Finding]:
        """By gist, without the sentence that says that nothing was found."""
        found = list(findings)
        self._all_clear = next((str(one) for one in found if one.rule == ALL_CLEAR), self._all_clear)
        return {gist(one): one for one in found if one.rule != ALL_CLEAR}

    def _enter(self, key: Hashable, finding: Finding, by_step: bool, step: int | None) -> bool:
        """Keep a finding; whether it is news."""
        entry = self._entries.get(key)
        if entry is None:
            if len(self._entries) >= MOST_ENTRIES:
                return False
            self._entries[key] = Entry(finding, step, by_step)
            self.changes += 1
            return True
        is_back = entry.cleared is not None
        entry.finding, entry.by_step, entry.cleared = finding, entry.by_step or by_step, None
        entry.times += is_back
        self.changes += is_back
        return is_back


@dataclass
class Pace:
    """How often somebody is alerted: once in `seconds` of one rule, stream and severity, `most` times of a severity."""

    seconds: float = 600.0
    most: int = 10
    _sent: dict[tuple[str, str | None, Severity], float] = field(default_factory=dict)

    def allows(self, finding: Finding, now: float) -> bool:
        """Whether an alert of this finding may go out at `now` (seconds of any clock); it then counts as sent."""
        self._sent = {what: sent for what, sent in self._sent.items() if now - sent < self.seconds}
        what = (finding.rule, finding.stream, finding.severity)
        if what in self._sent or [severity for _, _, severity in self._sent].count(finding.severity) >= self.most:
            return False
        self._sent[what] = now
        return True
