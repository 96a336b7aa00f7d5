"""Verdicts against the ground truth: what was found, how well it was told, and what was said of healthy runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ddp_streammon.evaluation import Estimate, wilson
from tests.zoo.cases import CASES, Case

SEVERITIES = ("info", "warning", "error")
NOISY = 0.1
"""A family that a monitor raises on a larger share of healthy runs tells nothing: a hit needs another one."""
SOON, LATER = 5, 100
"""Steps within which an exact fault, and any other, is to be named."""


@dataclass(frozen=True)
class Verdict:
    """What a monitor said, in the terms of the zoo. `step` is when it said so."""

    family: str
    stream: str | None = None
    rank: int | None = None
    step: int = 0
    severity: str = "warning"
    victim: str | None = None
    """Of an imbalance: the stream that suffers."""
    message: str = ""
    undecided: bool = False
    """Both of two ranks are named, because two cannot outvote each other."""

    def key(self) -> tuple[str, str | None, int | None]:
        return self.family, self.stream, self.rank


@dataclass
class Run:
    """One case under one seed, and the verdicts of each monitor."""

    case: str
    seed: int
    world: int
    streams: Sequence[str]
    steps: int
    loss: float
    accuracy: float
    seconds: float
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    """Monitor -> the traceback of what it raised."""


@dataclass(frozen=True)
class Judgement:
    """`right` and `wrong` are distinct verdicts of at least a warning; of a healthy run all are wrong."""

    right: tuple[Verdict, ...]
    wrong: tuple[Verdict, ...]
    strict: bool = False
    """One right verdict has a primary family, the right stream and the right rank."""
    stream: bool = False
    """One right verdict names the stream, where the fault has one."""
    rank: bool = False
    """The same of the rank; both ranks, where two cannot outvote each other."""
    delay: int | None = None
    """Steps from the onset to the first right verdict."""

    @property
    def hit(self) -> bool:
        return bool(self.right)

    @property
    def alarm(self) -> bool:
        return bool(self.right or self.wrong)


def judge(case: Case, streams: Sequence[str], verdicts: Iterable[Verdict], least: str = "warning") -> Judgement:
    """Hold what a monitor said of a run against the case. The first of equal verdicts counts."""
    distinct: dict[tuple[str, str | None, int | None], Verdict] = {}
    for verdict in sorted(verdicts, key=lambda verdict: verdict.step):
        if SEVERITIES.index(verdict.severity) >= SEVERITIES.index(least):
            distinct.setdefault(verdict.key(), verdict)
    expect = case.expect
    if expect is None:
        return Judgement((), tuple(distinct.values()))
    blamed = {streams[place] for place in expect.stream}

    def names_stream(verdict: Verdict) -> bool:
        return not blamed or bool(blamed & {verdict.stream, verdict.victim})

    def names_rank(verdict: Verdict) -> bool:
        return expect.rank is None or verdict.rank == expect.rank or verdict.undecided

    def is_right(verdict: Verdict) -> bool:
        family = verdict.family in (*expect.families, *expect.accept)
        stream = verdict.stream is None or names_stream(verdict)
        rank = verdict.rank is None or verdict.rank == expect.rank
        return family and stream and rank and verdict.step >= expect.onset

    right = tuple(verdict for verdict in distinct.values() if is_right(verdict))
    whole = [v for v in right if v.family in expect.families and names_stream(v) and names_rank(v)]
    return Judgement(
        right,
        tuple(verdict for verdict in distinct.values() if not is_right(verdict)),
        strict=bool(whole),
        stream=any(names_stream(verdict) for verdict in right),
        rank=any(names_rank(verdict) for verdict in right),
        delay=min((verdict.step - expect.onset for verdict in right), default=None),
    )


@dataclass(frozen=True)
class Score:
    """A monitor's figures over a set of runs."""

    monitor: str
    faults: int
    recall: Estimate
    informative: Estimate
    """Recall without the families that are raised on more than a tenth of the healthy runs."""
    strict: Estimate
    stream: Estimate
    """Of the runs whose fault has a stream: those in which it is named."""
    rank: Estimate
    healthy: Estimate
    """Share of ordinary healthy runs with an alarm."""
    legal: Estimate
    """The same of unusual ones."""
    false: Estimate
    """Share of wrong verdicts among all, over all runs."""
    delay: float | None
    """Median steps from onset to verdict."""
    exact: Estimate
    """Of the exact faults' runs: those named within SOON steps."""
    windowed: Estimate
    """Of the other faults' runs: those named within LATER steps."""
    majority: int
    """Faults found in most of their runs."""
    kinds: int
    """Faults that were run at all."""
    errors: int


def score(monitor: str, runs: Sequence[Run]) -> Score:
    """The figures of one monitor. Intervals are Wilson's, 95 %; runs count as independent."""
    runs = [run for run in runs if monitor in run.verdicts]
    judged = [(CASES[run.case], judge(CASES[run.case], run.streams, run.verdicts[monitor])) for run in runs]
    faulty = [(case, said) for case, said in judged if case.expect is not None]
    controls = [(case, said) for case, said in judged if case.expect is None]
    healthy = [said for case, said in controls if not case.legal]
    legal = [said for case, said in controls if case.legal]
    noisy = _noisy([said for _, said in controls])
    by_case: dict[str, list[bool]] = {}
    for case, said in faulty:
        by_case.setdefault(case.name, []).append(said.hit)
    right = sum(len(said.right) for _, said in judged)
    wrong = sum(len(said.wrong) for _, said in judged)
    delays = [said.delay for _, said in faulty if said.delay is not None]
    return Score(
        monitor,
        len(faulty),
        recall=_share(said.hit for _, said in faulty),
        informative=_share(any(v.family not in noisy for v in said.right) for _, said in faulty),
        strict=_share(said.strict for _, said in faulty),
        stream=_share(said.stream for case, said in faulty if case.expect and case.expect.stream),
        rank=_share(said.rank for case, said in faulty if case.expect and case.expect.rank is not None),
        healthy=_share(said.alarm for said in healthy),
        legal=_share(said.alarm for said in legal),
        false=wilson(wrong, right + wrong),
        delay=statistics.median(delays) if delays else None,
        exact=_share(_within(said, SOON) for case, said in faulty if case.expect and case.expect.exact),
        windowed=_share(_within(said, LATER) for case, said in faulty if case.expect and not case.expect.exact),
        majority=sum(2 * sum(hits) > len(hits) for hits in by_case.values()),
        kinds=len(by_case),
        errors=sum(monitor in run.errors for run in runs),
    )


def _within(said: Judgement, steps: int) -> bool:
    return said.delay is not None and said.delay <= steps


def _noisy(controls: Sequence[Judgement]) -> set[str]:
    raised = [{verdict.family for verdict in said.wrong} for said in controls]
    return {family for said in raised for family in said if sum(family in r for r in raised) > NOISY * len(raised)}


def _share(outcomes: Iterable[bool]) -> Estimate:
    known = list(outcomes)
    return wilson(sum(known), len(known))


def monitors(runs: Iterable[Run]) -> list[str]:
    """The monitors of these runs, in order."""
    return list(dict.fromkeys(name for run in runs for name in run.verdicts))


def table(scores: Iterable[Score]) -> str:
    """Markdown, a line a monitor."""
    head = (
        *("monitor", "found", "informative", "strict", "stream", "rank", "healthy alarmed", "legal alarmed"),
        *("false verdicts", f"exact <= {SOON} steps", f"others <= {LATER}", "median delay"),
    )
    lines = [head, ("---",) * len(head)]
    for s in scores:
        lines.append(
            (
                s.monitor,
                f"{s.majority} of {s.kinds}",
                _plain(s.informative),
                _plain(s.strict),
                _plain(s.stream),
                _plain(s.rank),
                _counted(s.healthy),
                _counted(s.legal),
                _plain(s.false),
                _plain(s.exact),
                _plain(s.windowed),
                "-" if s.delay is None else f"{s.delay:g}",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_part(monitor: str, runs: Iterable[Run]) -> str:
    """Markdown, a line for each part of a training that faults are planted in: how many runs are found, of those that
    have one the stream and the rank named, and the steps until then."""
    parts: dict[str, list[tuple[Case, Judgement]]] = {}
    for run in runs:
        case = CASES[run.case]
        if monitor in run.verdicts and case.expect is not None:
            part = case.program.__module__.rpartition(".")[2].removeprefix("faults_")
            parts.setdefault(part, []).append((case, judge(case, run.streams, run.verdicts[monitor])))
    head = ("fault in", "faults", "runs found", "stream named", "rank named", "median delay")
    lines = [head, ("---",) * len(head)]
    for part, judged in sorted(parts.items()):
        delays = [said.delay for _, said in judged if said.delay is not None]
        lines.append(
            (
                *(part, str(len({case.name for case, _ in judged})), _of(said.hit for _, said in judged)),
                _of(said.stream for case, said in judged if case.expect and case.expect.stream),
                _of(said.rank for case, said in judged if case.expect and case.expect.rank is not None),
                f"{statistics.median(delays):g}" if delays else "-",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _of(outcomes: Iterable[bool]) -> str:
    known = list(outcomes)
    return f"{sum(known)} of {len(known)}" if known else "-"


def _plain(share: Estimate) -> str:
    return f"{share.value:.2f}" if share.items else "-"


def _counted(share: Estimate) -> str:
    if not share.items:
        return "-"
    return f"{round(share.value * share.items)} of {share.items} [{share.low:.2f}, {share.high:.2f}]"


def detail(monitor: str, runs: Iterable[Run], *, everything: bool = False) -> str:
    """A line for each run that went wrong (or for each): misses, late or incomplete verdicts, false alarms."""
    lines = []
    for run in runs:
        if monitor not in run.verdicts:
            continue
        case = CASES[run.case]
        said = judge(case, run.streams, run.verdicts[monitor])
        expect = case.expect
        marks = []
        if monitor in run.errors:
            marks.append("ERROR " + run.errors[monitor].strip().splitlines()[-1])
        if expect is not None:
            late = SOON if expect.exact else LATER
            marks += [] if said.hit else ["MISS"]
            marks += [] if said.strict or not said.hit else ["not strict"]
            marks += [] if said.rank or not said.hit or expect.rank is None else ["no rank"]
            marks += [] if said.stream or not said.hit or not expect.stream else ["no stream"]
            marks += [f"late {said.delay}"] if said.delay is not None and said.delay > late else []
        marks += [f"{len(said.wrong)} false"] if said.wrong else []
        if marks or everything:
            lines.append(f"{run.case} seed {run.seed}: {', '.join(marks) or 'ok'}")
            lines += [f"    {'  ' if v in said.right else '! '}{_told(v)}" for v in (*said.right, *said.wrong)]
    return "\n".join(lines)


def _told(verdict: Verdict) -> str:
    where = f"{verdict.stream or '-'}/{'both' if verdict.undecided else verdict.rank}"
    return f"{verdict.severity} {verdict.family} {where} @{verdict.step}: {verdict.message[:180]}"


def listing(cases: Mapping[str, Case]) -> str:
    """The cases with what is expected of each."""
    lines = []
    for case in cases.values():
        expect, note = case.expect, (case.program.__doc__ or "").strip()
        where = "healthy"
        if expect is not None:
            stream = f" stream {'/'.join(str(place + 1) for place in expect.stream)}" if expect.stream else ""
            where = "/".join(expect.families) + stream + ("" if expect.rank is None else f" rank {expect.rank}")
        lines.append(f"{case.name:24s} {where:36s} {note if case.program.__name__ != 'Training' else ''}".rstrip())
    return "\n".join(lines)
