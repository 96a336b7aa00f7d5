"""A run in one line: the worst of what was found, or that nothing was."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ddp_streammon.config import Severity
from ddp_streammon.report import STOPPED
from ddp_streammon.report.story import Story


@dataclass(frozen=True)
class Verdict:
    """`level`: `ok` or a severity."""

    level: str
    headline: str
    detail: str


def verdict(story: Story) -> Verdict:
    """The worst finding of a run, and how it ended. Never "healthy": only what looked and what it saw."""
    alarms = [told for told in story.by_urgency() if told.is_alarm]
    counts = Counter(told.severity for told in story.findings.values())
    ended = ending(story)
    rest = ", ".join(_plural(counts[kind.value], kind.value) for kind in reversed(Severity) if counts[kind.value])
    if alarms:
        worst = max(alarms, key=lambda told: Severity(told.severity).level)
        sentence = plain(worst.latest["finding"])
        over = "" if worst.stands else f"It stood until step {worst.spans[-1][1]:,}. "
        return Verdict(worst.severity, f"{worst.latest.get('rule')}: {sentence}", f"{over}{rest}. {ended}")
    if story.outcome is not None and story.outcome.get("exit_code") not in (None, 0, STOPPED):
        return Verdict("error", f"The run failed; {_clear(story)}", f"{rest}. {ended}" if rest else ended)
    if not story.last_step:
        return Verdict("info", "Nothing was measured", ended)
    return Verdict("ok", _clear(story), f"{rest}. {ended}" if rest else ended)


def _clear(story: Story) -> str:
    """That nothing was found, in the rules' own words where they were recorded."""
    return story.all_clear or f"no alarm from the rule set {_rule_set(story)!r} and the plain checks"


def _rule_set(story: Story) -> str:
    config: Any = story.runs[-1].get("config") if story.runs else None
    monitor = config.get("monitor") if isinstance(config, dict) else None
    return str(monitor.get("rules", "off")) if isinstance(monitor, dict) else "off"


def ending(story: Story) -> str:
    """How far the run came, and how it ended."""
    if story.outcome is None:
        return f"No end is recorded: it goes on, or was killed; last record at step {story.last_step:,}."
    code = story.outcome.get("exit_code")
    if code == STOPPED:
        return f"Stopped after step {story.last_step:,}, as somebody had asked."
    return (
        f"It failed after step {story.last_step:,} (exit code {code})."
        if code
        else f"Ended at step {story.last_step:,}."
    )


def plain(sentence: Any) -> str:
    """A finding's sentence without its sign."""
    return str(sentence).lstrip("⚠️✓ℹ ").strip()


def _plural(count: int, kind: str) -> str:
    noun = {"info": "note"}.get(kind, kind)
    return f"{count} {noun}{'s' if count > 1 else ''}"
