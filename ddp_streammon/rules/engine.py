"""The engine of the evidence rules: warm-up, hold, hysteresis, consequences, and what cannot be evaluated.

A rule is a small pure object: it looks at a `View` and gives a `Signal` for every stream and rank that its condition is
about. Everything that needs patience or memory is done here, the same on every rank, since every rank sees the same
floats. A rule set of one's own is `default + yours`: see `Rule`.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, ClassVar

from ddp_streammon import keys
from ddp_streammon.config import Intent, Severity
from ddp_streammon.described import Setup
from ddp_streammon.rules.finding import Action, Finding
from ddp_streammon.rules.memory import WINDOW, Memory, Window
from ddp_streammon.rules.view import REQUIREMENTS, View
from ddp_streammon.stats import StepStats


class Kind(str, Enum):
    """What a rule's evidence is, in the order in which findings explain each other."""

    nonfinite = "nonfinite"
    configuration = "configuration"
    """Read from the model and the optimizer: nothing has to be waited for."""
    exact = "exact"
    """A relation that holds, or does not; no threshold but a bound for rounding."""
    input = "input"
    windowed = "windowed"
    """A statistic over a window of steps."""
    evaluated = "evaluated"
    """A claim from evaluations on held-out items."""

    @property
    def order(self) -> int:
        return _ORDER[self.value]


QUIET = 0.5
"""Rules need not signal a strength below it: none clears later."""
_ORDER = {kind.value: number for number, kind in enumerate(Kind)}


@dataclass(frozen=True)
class Signal:
    """A rule's condition as it is now, for one stream and rank (None: for no single one).

    `strength`: 1 and above raises, below the rule's `clear` clears. The texts are what the finding will say.
    """

    stream: str | None = None
    rank: int | None = None
    seen: str = ""
    likely: str = ""
    do: str = ""
    confirm: str = ""
    strength: float = 1.0
    evidence: Mapping[str, float] = field(default_factory=dict)
    action: Action | None = None
    severity: Severity | None = None
    """Other than the rule's."""
    patience: int = 0
    """Evaluations that it has to hold beyond the rule's `hold`."""
    first: bool = False
    """Whether it is the first of its causes for certain: no other finding explains it."""
    among: Sequence[int] = ()
    """Where no single rank is named, those that it is about: until one of them is heard again, which takes long where
    ranks are heard in turns, it neither holds nor is quiet."""


@dataclass(frozen=True)
class Rule(ABC):
    """What every rule has. One of your own is a subclass with `id`, `kind` and `check`, given to the monitor as
    `MonitorConfig(extra_rules=(Yours(),))`, or to the application as `rules.extra` with its `_target_`.

    Fields of a subclass are its thresholds: they can be set by `thresholds={"ID.field": value}`, and their docstrings
    say where they come from. `check` must be pure and depend on what it is shown alone.
    """

    id: ClassVar[str] = ""
    kind: ClassVar[Kind] = Kind.exact
    severity: ClassVar[Severity] = Severity.warning
    requires: ClassVar[tuple[str, ...]] = ()
    """Names of `REQUIREMENTS`: where one is not met the rule is not evaluated, and the reason is told."""
    intermittent: ClassVar[bool] = False
    """Whether the condition may come and go in a legal training (a batch without this input): where it has, it has to
    hold four times longer than ever before."""
    explains: ClassVar[bool] = True
    """Whether what it finds is a reason for later findings of other rules."""
    destabilises: ClassVar[bool] = False
    """Whether what it finds may end in dead units, or in anything that windows see, on every stream."""
    pointer: ClassVar[bool] = False
    """Whether it gives way to any other finding, since it says where to look and not what is wrong."""
    outcome: ClassVar[bool] = False
    """Whether what it finds may be what instability has left."""
    preflight: ClassVar[bool] = False
    """Whether it says that something does not train."""

    hold: int = 1
    """Evaluations in a row before it is raised, and before it is cleared."""
    clear: float = 1.0
    """A finding that stands is cleared where its strength falls below."""
    warm_up: int = 0
    """Measured steps before its first evaluation. After a restart, when windows begin anew, nothing of it is quiet for
    as many."""
    every: int = 1
    """Measured steps between two evaluations."""

    @abstractmethod
    def check(self, view: View) -> Iterable[Signal]:
        """The signals of the moment."""


@dataclass(frozen=True)
class Preflight:
    """What the first steps say of a training: `findings` of what does not train, and the rules that could not be
    evaluated, with the reason. `ok` where nothing of it is an alarm; `str()` is a text for people."""

    steps: int
    findings: tuple[Finding, ...]
    not_evaluated: Mapping[str, str]
    summary: str

    @property
    def ok(self) -> bool:
        return not any(_is_alarm(finding) for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"preflight after {self.steps} measured steps:"]
        lines += [f"  {finding.severity.value:<8}{finding.rule:<8}{finding.told()}" for finding in self.findings]
        return "\n".join([*lines, f"  {self.summary}"])


@dataclass
class _Run:
    """How long a condition has held, or has been quiet."""

    held: int = 0
    longest: int = 0
    """The longest time that it held and went by without being raised."""
    quiet: int = 0
    finding: Finding | None = None
    began: int = 0
    """The step of the first evaluation in a row that it held."""
    among: Sequence[int] = ()
    """The ranks of its last signal."""


_Key = tuple[str, str | None, int | None]


class Engine:
    """Takes in steps and keeps one finding for each (rule, stream, rank) from raised to cleared.

    `findings` is what stands. State is in `state_dict`, equal on every rank. Comm, Sync: none.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        setup: Setup,
        intent: Intent,
        *,
        mute: Iterable[str] = (),
        thresholds: Mapping[str, float] | None = None,
        parameters: Sequence[str] = (),
    ) -> None:
        """`parameters`: the names of all, in the order of their numbers; without them numbers are told. Errors:
        ValueError for an id that is not there or twice, and for a threshold that a rule does not have."""
        self.rules = adjusted(rules, tuple(mute), thresholds or {})
        self.setup = setup
        self._intent = intent
        self._parameters = tuple(parameters)
        self._window = Window()
        self._memory = Memory()
        self._runs: dict[_Key, _Run] = {}
        self._standing: list[Finding] | None = []
        """`findings`, as long as nothing is raised or cleared."""
        self._evaluated: set[str] = set()
        self._failed: dict[str, str] = {}
        """Rules that have raised an error, and which; they are not asked again."""
        self._cleared: dict[_Key, int] = {}
        """Alarms that are over -> measured steps by then."""
        self._by_id = {rule.id: rule for rule in self.rules}
        self._required = sorted({name for rule in self.rules for name in rule.requires})
        self._place = {rule.id: number for number, rule in enumerate(self.rules)}

    @property
    def view(self) -> View | None:
        """What rules see now; None before the first step."""
        return self._see() if self._window.steps else None

    @property
    def findings(self) -> list[Finding]:
        """What stands, the earliest reasons first."""
        if self._standing is None:
            said = [run.finding for run in self._runs.values() if run.finding is not None]
            place = self._place
            said.sort(key=lambda f: (f.explained_by is not None, -f.severity.level, place.get(f.rule, 99)))
            self._standing = said
        return [*self._standing]

    def take(self, stats: StepStats) -> list[Finding]:
        """Take in a measured step; what stands then."""
        self._window.append(stats)
        self._memory.take(stats)
        view = self._see()
        followed: dict[str, list[tuple[str | None, int | None]]] = defaultdict(list)
        for name, stream, rank in self._runs:
            followed[name].append((stream, rank))
        unmet = {name for name in self._required if REQUIREMENTS[name](view)}
        count = self._memory.count
        for rule in self.rules:
            if count % rule.every or count <= rule.warm_up or not unmet.isdisjoint(rule.requires):
                continue
            if rule.id in self._failed:
                continue
            try:
                signals = list(rule.check(view))
            except Exception as error:  # a rule of one's own, too: it must not end the training that it looks at
                self._fail(rule, view.now.step, error)
                continue
            self._evaluated.add(rule.id)
            if signals or rule.id in followed:
                self._follow_all(rule, signals, followed[rule.id], view)
        return self.findings

    def declare_frozen(self, streams: Iterable[str]) -> None:
        """These streams, and no others, are no longer trained on purpose, whatever was declared at the start."""
        self._memory.frozen = sorted(streams)

    def claim(self, findings: Iterable[Finding]) -> list[Finding]:
        """Take in the findings of an evaluation, of the class `evaluated`: they stand until the next one."""
        for key in [key for key, run in self._runs.items() if run.finding is not None and self._is_claim(key[0])]:
            del self._runs[key]
        self._standing = None
        for finding in findings:
            cause = self._cause(Kind.evaluated, finding.rule, finding.stream, finding.rank)
            self._runs[finding.rule, finding.stream, finding.rank] = _Run(finding=_demoted(finding, cause))
        return self.findings

    def preflight(self) -> Preflight:
        """What does not train, as far as it was seen, and what could not be looked at."""
        said = tuple(
            f for f in self.findings if _is_alarm(f) or (f.rule in self._by_id and self._by_id[f.rule].preflight)
        )
        return Preflight(self._memory.count, said, self.not_evaluated(), str(self.nothing_found()))

    def not_evaluated(self) -> dict[str, str]:
        """Rule id -> why it could not be evaluated so far."""
        view = self.view
        missing = {
            rule.id: view.missing(rule.requires) if view is not None else "nothing was measured yet"
            for rule in self.rules
            if rule.id not in self._evaluated
        }
        return {name: reason or "not enough steps yet" for name, reason in missing.items()} | self._failed

    def nothing_found(self) -> Finding:
        """What is said where nothing stands: how many rules looked, and which could not."""
        missing = self.not_evaluated()
        step = self._window.steps[-1].step if self._window.steps else None
        because: dict[str, list[str]] = {}
        for name, reason in missing.items():
            because.setdefault(reason, []).append(name)
        why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in because.items())
        rest = f"; {len(missing)} not evaluated ({why})" if missing else ""
        alarms = sum(map(_is_alarm, self.findings))
        told = f"{alarms} alarm{'s' if alarms > 1 else ''}" if alarms else "no alarm"
        return Finding(f"{told} from {len(self.rules) - len(missing)} rules{rest}", rule="OK", step=step)

    def state_dict(self) -> dict[str, Any]:
        """Plain values: what stands, how long conditions have held, and what is remembered. Windows begin anew."""
        return {
            "memory": self._memory.state_dict(),
            "evaluated": sorted(self._evaluated),
            "cleared": [[*whom, count] for whom, count in self._cleared.items()],
            "runs": [
                {
                    "key": list(key),
                    "held": run.held,
                    "longest": run.longest,
                    "quiet": run.quiet,
                    "began": run.began,
                    "among": list(run.among),
                    "finding": None if run.finding is None else run.finding.to_dict(),
                }
                for key, run in self._runs.items()
            ],
            "world": self.setup.world,
            "start": {name: [stream.scale, stream.zeros] for name, stream in self.setup.streams.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; with another number of ranks what is known of single ranks is forgotten. It says
        how weights began: this process may have begun with trained ones."""
        same = state["world"] == self.setup.world
        began = state.get("start", {})
        streams = {
            name: replace(stream, scale=began[name][0], zeros=began[name][1]) if name in began else stream
            for name, stream in self.setup.streams.items()
        }
        self.setup = replace(self.setup, streams=streams)
        self._memory = Memory.of_state(state["memory"])
        if not same:
            self._memory.audit = []
        self._window.clear()
        self._standing = None
        self._evaluated = set(state["evaluated"])
        self._cleared = {(rule, stream, rank): count for rule, stream, rank, count in state["cleared"]}
        self._runs = {}
        for run in state["runs"]:
            rule, stream, rank = run["key"]
            finding = None if run["finding"] is None else Finding.from_dict(run["finding"])
            if same or rank is None:
                among = run.get("among", ()) if same else ()
                said = (run["held"], run["longest"], run["quiet"], finding, run["began"], among)
                self._runs[rule, stream, rank] = _Run(*said)

    def _fail(self, rule: Rule, step: int, error: Exception) -> None:
        reason = f"it failed at step {step}: {type(error).__name__}: {error}"
        self._failed[rule.id] = reason
        warnings.warn(f"rule {rule.id} is left out from now on: {reason}", stacklevel=2)

    def _see(self) -> View:
        return View(self._window, self._memory, self.setup, self._intent, self._parameters)

    def _follow_all(
        self, rule: Rule, found: Sequence[Signal], known: Sequence[tuple[str | None, int | None]], view: View
    ) -> None:
        """`known`: the streams and ranks of which a run of this rule is kept."""
        signals = {(signal.stream, signal.rank): signal for signal in found}
        compared = view.compared(rule.every)
        for stream, rank in dict.fromkeys((*signals, *known)):
            signal = signals.get((stream, rank))
            if signal is None:
                about = self._runs[rule.id, stream, rank].among if rank is None else (rank,)
                if about and compared.isdisjoint(about):
                    continue  # not their turn: nothing is known of it
            self._follow(rule, (stream, rank), signal, view)

    def _follow(self, rule: Rule, whom: tuple[str | None, int | None], signal: Signal | None, view: View) -> None:
        strength = 0.0 if signal is None or math.isnan(signal.strength) else signal.strength
        if strength < 1 and ((rule.id, *whom) not in self._runs or self._window.taken <= rule.warm_up):
            return
        run = self._runs.setdefault((rule.id, *whom), _Run())
        run.among = run.among if signal is None else signal.among
        if run.finding is not None:
            run.quiet = 0 if strength >= rule.clear else run.quiet + 1
            if run.quiet >= rule.hold:
                if _is_alarm(run.finding):
                    self._cleared[(rule.id, *whom)] = self._memory.count
                del self._runs[(rule.id, *whom)]
                self._standing = None
            return
        if strength < 1 or signal is None:
            run.longest = max(run.longest, run.held)
            run.held = 0
            return
        run.began = run.began if run.held else view.now.step
        run.held += 1
        wanted = rule.hold + signal.patience + (4 * run.longest if rule.intermittent else 0)
        if run.held >= wanted:
            finding = _finding(rule, signal, view.now.step, since=run.began)
            cause = None if signal.first else self._cause(rule.kind, rule.id, signal.stream, signal.rank)
            run.finding = _demoted(finding, cause)
            run.quiet = 0
            self._standing = None

    def _cause(self, kind: Kind, rule: str, stream: str | None, rank: int | None) -> str | None:
        """The rule whose alarm, of the last steps, is the reason for one of this kind; None without one."""
        effect = self._by_id.get(rule)
        late = kind.order >= Kind.windowed.order
        for name, of_stream, of_rank in self._reasons(rule):
            cause = self._by_id[name]
            apart = None not in (stream, of_stream) and stream != of_stream
            if name == rule:  # the same again, of nobody in particular, or what it has brought about elsewhere
                if (not apart and None in (rank, of_rank)) or cause.destabilises or cause.kind is Kind.nonfinite:
                    return name
                continue
            if not cause.explains:
                continue
            if cause.kind is Kind.nonfinite or (late and cause.kind.order < Kind.windowed.order):
                return name
            if cause.kind.order <= kind.order and not apart:
                return name
            if cause.destabilises and (late or (effect is not None and effect.outcome)):
                return name
            if effect is not None and effect.pointer:
                return name
        return None

    def _reasons(self, rule: str) -> Iterator[_Key]:
        """The alarms that stand, or were cleared within the window, and have no other reason; of `rule` itself those of
        earlier steps only."""
        now = self._window.steps[-1].step if self._window.steps else 0
        for (name, stream, rank), run in self._runs.items():
            finding = run.finding
            stands = finding is not None and _is_alarm(finding) and name in self._by_id
            if stands and finding is not None and (name != rule or (finding.step or 0) < now):
                yield name, stream, rank
        for (name, stream, rank), count in self._cleared.items():
            if self._memory.count - count <= WINDOW:
                yield name, stream, rank

    def _is_claim(self, rule: str) -> bool:
        return rule not in self._by_id


def adjusted(rules: Sequence[Rule], mute: Sequence[str], thresholds: Mapping[str, float]) -> tuple[Rule, ...]:
    """The rules without the muted ones, with other thresholds. Errors: ValueError for names that are not there."""
    names = [rule.id for rule in rules]
    twice = [name for name in names if names.count(name) > 1 or not name]
    if twice:
        raise ValueError(f"two rules have the id {twice[0]!r}, or one has none; ids: {', '.join(sorted(set(names)))}")
    for name in (*mute, *(path.split(".")[0] for path in thresholds)):
        if name not in names:
            near = ", ".join(keys.nearest(name, names))
            raise ValueError(f"there is no rule {name!r}; nearest: {near}; rules: {', '.join(names)}")
    adjusted = {rule.id: rule for rule in rules if rule.id not in mute}
    for path, value in thresholds.items():
        name, _, threshold = path.partition(".")
        if name in mute:
            continue
        valid = [item.name for item in fields(adjusted[name])]
        if threshold not in valid:
            raise ValueError(f"rule {name} has no threshold {threshold!r}; it has {', '.join(valid)}")
        changed: dict[str, Any] = {threshold: value}
        adjusted[name] = replace(adjusted[name], **changed)
    return tuple(adjusted.values())


def _finding(rule: Rule, signal: Signal, step: int, *, since: int) -> Finding:
    return Finding(
        f"⚠️  {signal.seen}",
        rule=rule.id,
        severity=signal.severity or rule.severity,
        stream=signal.stream,
        rank=signal.rank,
        step=step,
        evidence=dict(signal.evidence),
        action=signal.action,
        since=since,
        likely=signal.likely,
        do=signal.do,
        confirm=signal.confirm,
    )


def _is_alarm(finding: Finding) -> bool:
    """Whether it is more than information."""
    return finding.severity is not Severity.info and finding.explained_by is None


def _demoted(finding: Finding, cause: str | None) -> Finding:
    """The finding as a consequence of another: information only."""
    if cause is None or finding.severity is Severity.info:
        return finding
    fields_ = {**vars(finding.fields), "severity": Severity.info, "explained_by": cause}
    return Finding(str(finding), **fields_)
