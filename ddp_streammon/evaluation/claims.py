"""What may be said of a stream after an evaluation, so that in a whole training a wrong word is said in 5 % at most."""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ddp_streammon.evaluation.intervals import Estimate

ALPHA = 0.05
"""The chance of any wrong claim in a training, over all looks, streams and statements."""
POWER = 0.8
MIN_GROUPS = 20
"""Clustered errors of fewer groups are too small (Cameron and Miller, J. Hum. Resour. 50, 2015, 317, VI)."""
MAX_SKEW = 0.5
"""Of a figure's error. Beyond it Hall's correction is not enough: where 2 % of 512 items carried a figure, a training
had a wrong claim in 87 % of the cases without the correction, in 20 % with it, in 1 % with this limit (simulated)."""
SHARE_MARGIN = 0.02
RELATIVE_MARGIN = 0.01
OVERFITTING_MARGIN = 0.25
"""Of the loss at its best. A healthy classifier that grows surer raises its held-out loss by some percent."""
WORTH = 0.5
"""A stream is memorised if it is worth less than this share of its worth in training."""
COMPLEMENT_MARGIN = 0.1
"""Of what the probe of all streams explains: more columns explain more of the classes' indicators from the same
information. Of one picture in two streams it was 1 to 9 %, of views that add accuracy 10 to 36 % (this project)."""


class Statement(enum.Enum):
    """All that is ever said. `unused` together with `complementary` means that the head ignores what the stream knows;
    `complementary` alone is good news."""

    unused = "unused"
    complementary = "complementary"
    redundant = "redundant, do nothing"
    knows_nothing = "knows nothing beyond the majority class"
    regressed = "regressed"
    memorised = "memorised: worth less than half on held-out items"
    overfitting = "overfitting"
    cannot_tell = "cannot tell"


@dataclass(frozen=True)
class Figure:
    """A paired difference, and how large it has to be to matter (see `margin`), in one unit.

    `view` is the same as a share of items (accuracy beside R^2): what is seen to be above 2 pp in it is not said to be
    small.
    """

    estimate: Estimate
    margin: float
    view: Estimate | None = None

    def __post_init__(self) -> None:
        if not self.margin > 0:
            raise ValueError(f"margin must be above 0, got {self.margin}; 2 pp of a share, 1 % of another metric")

    @property
    def unusable(self) -> str:
        """Why the figure may not be claimed from; empty where it may."""
        estimate = self.estimate
        if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
            return "it is undetermined"
        fewest = round(min(estimate.groups, estimate.dof + 1))  # of a difference: those of its smaller set
        if fewest < MIN_GROUPS:
            return f"{fewest} independent groups are fewer than {MIN_GROUPS}"
        if abs(estimate.skew) > MAX_SKEW:
            return f"too few of its {estimate.groups} groups carry it (skewness {estimate.skew:.2f} > {MAX_SKEW})"
        return ""

    def p_above(self) -> float:
        """Of "the truth is the margin or less"; 1 where the figure is unusable."""
        return 1.0 if self.unusable else self.estimate.p_above(self.margin)

    def p_below(self, edge: float) -> float:
        """Of "the truth is `edge` or more"; 1 where the figure is unusable, or where its other view is above 2 pp."""
        contradicted = self.view is not None and self.view.p_above(SHARE_MARGIN) < ALPHA
        return 1.0 if self.unusable or contradicted else self.estimate.p_below(edge)

    def p_small(self) -> float:
        """Of "the truth is the margin or more"; 1 where the figure is more than the margin below 0, since that is not
        small: a head that has learned a stream by heart loses by it on held-out items."""
        return self.p_below(self.margin) if self.estimate.value >= -self.margin else 1.0


FIGURES = ("uses", "knows", "complement", "change", "memory", "rise", "gap")


@dataclass(frozen=True)
class Evidence:
    """What an evaluation measured of one stream, or of the whole model; None for what it did not.

    `uses`: the loss rise when its input is exchanged. `knows`: what its probe explains. `complement`: what the probe of
    all explains beyond that of all others. `change`: what its probe explains now less what it did then; `choices`
    is how many earlier evaluations `then` was picked from (1: step 0; k: the best of k), which its p value pays for.
    `memory`: half (`WORTH`) of what its use is worth on training items less what it is worth on held-out ones. Of the
    whole model, `rise`: the held-out loss now less its best (`choices` as above), `gap`: held-out less training loss.
    `denied`: statements that something else measured speaks against; they are not made.
    """

    uses: Figure | None = None
    knows: Figure | None = None
    complement: Figure | None = None
    change: Figure | None = None
    memory: Figure | None = None
    rise: Figure | None = None
    gap: Figure | None = None
    choices: int = 1
    denied: Collection[Statement] = ()

    def __post_init__(self) -> None:
        if self.choices < 1:
            raise ValueError(f"choices must be at least 1, got {self.choices}")

    def figures(self) -> dict[str, Figure]:
        """What was measured, by name."""
        named = {name: getattr(self, name) for name in FIGURES}
        return {name: figure for name, figure in named.items() if figure is not None}


@dataclass(frozen=True)
class Claim:
    """A statement about a stream. By figure: `bounds` one-sided at `level`, each beyond its margin.

    Of `cannot_tell` instead, by figure: `unusable` says why it may not be claimed from, or `detectable` how far the
    truth would have to lie from the margin to be seen at this look with 80 % power. Its `p` is nan.
    """

    stream: str
    statement: Statement
    level: float
    p: float
    bounds: Mapping[str, float] = field(default_factory=dict)
    detectable: Mapping[str, float] = field(default_factory=dict)
    unusable: Mapping[str, str] = field(default_factory=dict)


def margin(metric: float, *, share: bool) -> float:
    """2 pp of a share (accuracy, R^2), 1 % of any other metric (the whole model's loss)."""
    return SHARE_MARGIN if share else RELATIVE_MARGIN * abs(metric)


def look_of(evaluation: int) -> int | None:
    """Which look the evaluation is (counted from 1): 1, 2, 4, 8, ... are looks 1, 2, 3, 4; None claims nothing."""
    if evaluation < 1:
        raise ValueError(f"evaluations are counted from 1, got {evaluation}")
    return evaluation.bit_length() if evaluation & (evaluation - 1) == 0 else None


def level_of(look: int) -> float:
    """What look j may err: 0.05 * 6 / (pi^2 j^2), which adds up to 0.05 over any number of looks.

    Bonferroni by the series of 1 / j^2, so valid however the looks depend on each other.
    """
    if look < 1:
        raise ValueError(f"looks are counted from 1, got {look}")
    return ALPHA * 6 / (math.pi * look) ** 2


def claims(
    look: int, evidence: Mapping[str, Evidence], standing: Collection[tuple[str, str]] = ()
) -> tuple[Claim, ...]:
    """Which statements hold of which streams at this look: Holm over all of them (Scand. J. Stat. 6, 1979, 65).

    unused: uses below its margin (see `Figure.p_small`). complementary: complement above it. redundant: complement
    below and knows above, both at the level (an intersection-union test: Berger, Technometrics 24, 1982, 295).
    knows_nothing: knows below. regressed: change below minus the margin. memorised: memory above it. overfitting: rise
    and gap above theirs, both at the level. What was said at the look before (`standing`) is said again while its p
    value is at most 0.05: levels fall from look to look, and a finding is not to vanish for that.

    Of a stream of which nothing holds, cannot_tell, unless its use is above the margin at the look's level: then there
    is nothing to say. Figures of fewer than 20 groups, or that a handful of items carry, claim nothing. A statement is
    tested where its figures were measured. Pure.
    """
    tests = {(stream, said): p for stream, own in evidence.items() for said, p in _tests(own).items()}
    level = level_of(look)
    said: list[Claim] = []
    for done, ((stream, statement), p) in enumerate(sorted(tests.items(), key=lambda item: item[1])):
        step = level / (len(tests) - done)
        if p > step:
            break
        said.append(Claim(stream, statement, step, p, _bounds(evidence[stream], statement, step)))
    news = {(claim.stream, claim.statement) for claim in said}
    for (stream, statement), p in tests.items():
        if (stream, statement.value) in standing and (stream, statement) not in news and p <= ALPHA:
            said.append(Claim(stream, statement, ALPHA, p, _bounds(evidence[stream], statement, ALPHA)))
    for stream, own in evidence.items():
        if own.uses is None and own.knows is None:
            continue
        if all(claim.stream != stream for claim in said) and not (own.uses and own.uses.p_above() <= level):
            step, figures = level / max(len(tests), 1), own.figures()
            unusable = {name: figure.unusable for name, figure in figures.items() if figure.unusable}
            usable = {name: figure.estimate for name, figure in figures.items() if name not in unusable}
            detectable = {name: estimate.detectable(step, POWER) for name, estimate in usable.items()}
            said.append(Claim(stream, Statement.cannot_tell, step, math.nan, {}, detectable, unusable))
    places = list(evidence)
    return tuple(sorted(said, key=lambda claim: places.index(claim.stream)))


def _tests(own: Evidence) -> dict[Statement, float]:
    """One-sided p values of the statements that can be tested; 1 of what is denied."""
    tests = {}
    if own.uses:
        tests[Statement.unused] = own.uses.p_small()
    if own.complement:
        tests[Statement.complementary] = own.complement.p_above()
    if own.complement and own.knows:
        tests[Statement.redundant] = max(own.complement.p_below(own.complement.margin), own.knows.p_above())
    if own.knows:
        tests[Statement.knows_nothing] = own.knows.p_below(own.knows.margin)
    if own.memory:
        tests[Statement.memorised] = own.memory.p_above()
    if own.rise and own.gap:
        tests[Statement.overfitting] = max(min(own.choices * own.rise.p_above(), 1.0), own.gap.p_above())
    if own.change:
        tests[Statement.regressed] = min(own.choices * own.change.p_below(-own.change.margin), 1.0)
    return {statement: 1.0 if statement in own.denied else p for statement, p in tests.items()}


def _bounds(own: Evidence, statement: Statement, alpha: float) -> dict[str, float]:
    figures = {name: figure.estimate for name, figure in own.figures().items()}
    if statement is Statement.unused:
        return {"uses": figures["uses"].upper(alpha)}
    if statement is Statement.complementary:
        return {"complement": figures["complement"].lower(alpha)}
    if statement is Statement.redundant:
        return {"complement": figures["complement"].upper(alpha), "knows": figures["knows"].lower(alpha)}
    if statement is Statement.knows_nothing:
        return {"knows": figures["knows"].upper(alpha)}
    if statement is Statement.memorised:
        return {"memory": figures["memory"].lower(alpha)}
    if statement is Statement.overfitting:
        return {"rise": figures["rise"].lower(alpha / own.choices), "gap": figures["gap"].lower(alpha)}
    return {"change": figures["change"].upper(alpha / own.choices)}
