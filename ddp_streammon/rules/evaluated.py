"""What an evaluation may claim of a stream, as findings: what was seen, what it means, what to do."""

from __future__ import annotations

from collections.abc import Mapping

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.evaluation import LOSS, TRAIN, Claim, Estimate, Evaluation, Statement, bounds, margin
from ddp_streammon.rules.finding import Finding

UNUSED, IGNORED, REDUNDANT, KNOWS_NOTHING, REGRESSED = "UNUSED", "IGNORED", "REDUNDANT", "NOTHING", "REGRESSED"
MEMORISED, OVERFITTING = "MEMORISED", "OVERFITTING"
LEARNED = 10
"""Margins that some stream's use has to exceed: a tenth of the loss. Healthy trainings at a low learning rate had one
stream at 1 to 2 margins while the other was still below its own; a head that ignores a stream soon uses the other by
10 or more (this project)."""
EARLY = 100
"""Steps. Of healthy trainings whose streams have 4 and 1 layers, the deep one was still unused at step 38 in two of
three (this project)."""

SAYS: Mapping[str, tuple[Severity, str]] = {
    UNUSED: (
        Severity.warning,
        "Exchanging the stream's input costs less than the margin, and gains no more, while another stream's use is "
        "`LEARNED` margins or more: a model that uses nothing yet has simply not learned.",
    ),
    IGNORED: (Severity.warning, "Unused, and its features know what the others do not."),
    REDUNDANT: (
        Severity.info,
        "Its features know something, and add nothing to what the others know; told where the model has learned.",
    ),
    KNOWS_NOTHING: (Severity.warning, "A probe of the stream's features is no better than the majority class."),
    REGRESSED: (Severity.warning, "The probe of the stream's features fell below its own best."),
    MEMORISED: (
        Severity.warning,
        "Exchanging the stream's input costs less than half as much on held-out items as on training items.",
    ),
    OVERFITTING: (
        Severity.warning,
        "Of no stream: the held-out loss is a quarter above its best, and above the training loss; information where "
        "the accuracy is known, and not below what it was at that best: a model that grows too sure is not worse.",
    ),
}
"""What each says, and how loud it is."""


def findings(found: Evaluation, step: int) -> list[Finding]:
    """The claims of a look as sentences, see `SAYS`; good news, or that nothing can be told, is none. Pure.

    In the first `EARLY` steps of a training UNUSED and IGNORED are information: of two streams that both will be used,
    a deeper one, or one that thaws later, is used later. Without any step the model came trained. Where what the others
    are worth is not measured, nobody knows whether the model has learned: that is said, and UNUSED is information.
    """
    said: dict[str, dict[Statement, Claim]] = {}
    for claim in found.claims:
        said.setdefault(claim.stream, {})[claim.statement] = claim
    worth = {name: _worth(found, name) for name in found.streams}
    least = LEARNED * margin(found[keys.of_stream(keys.FULL, f"{found.split}_{LOSS}")], share=False)
    learned: bool | None = any(estimate is not None and estimate.low > least for estimate in worth.values())
    if not learned and None in worth.values():
        learned = None
    return [finding for name, claims in said.items() for finding in _of_stream(found, name, claims, learned, step)]


def _worth(found: Evaluation, name: str) -> Estimate | None:
    """What the stream is worth to the model: its use, or, where that is not measured, what its features' mean costs."""
    return found.estimates.get(
        keys.of_stream(name, f"{found.split}_{keys.USES}"),
        found.estimates.get(keys.of_stream(name, f"{found.split}_{keys.ABLATED}")),
    )


def _of_stream(
    found: Evaluation, name: str, claims: dict[Statement, Claim], learned: bool | None, step: int
) -> list[Finding]:
    said = []
    whom = None if name == keys.FULL else name

    def add(rule: str, statement: Statement, sentence: str) -> None:
        claim = claims[statement]
        evidence = {**claim.bounds, "level": claim.level, "p": claim.p}
        early = rule in (UNUSED, IGNORED) and 0 < step < EARLY
        severity = Severity.info if early or not sentence.startswith("⚠️") else SAYS[rule][0]
        said.append(Finding(sentence, rule=rule, severity=severity, stream=whom, step=step, evidence=evidence))

    uses = _shown(found, keys.of_stream(name, f"{found.split}_{keys.USES}"), "", 1, 4)
    knows = _shown(found, keys.of_stream(name, keys.KNOWS), f" {found.share}", 100, 1)
    complement = _shown(found, keys.of_stream(name, keys.COMPLEMENT), f" {found.share}", 100, 1)
    if Statement.unused in claims and learned is None:
        text = "what it uses else is not measured, so it may not have learned anything yet"
        add(UNUSED, Statement.unused, f"the model does not use {name}: {_cost(uses)}; {text}")
    if Statement.unused in claims and learned:
        if Statement.complementary in claims:
            text = f"although its features add {complement} to what the others know: the head ignores it"
            add(IGNORED, Statement.unused, f"⚠️  the model does not use {name}: {_cost(uses)}, {text}")
        elif Statement.knows_nothing not in claims:  # which is why it is not used
            add(UNUSED, Statement.unused, f"⚠️  the model does not use {name}: {_cost(uses)}")
    if Statement.redundant in claims and learned:
        add(
            REDUNDANT,
            Statement.redundant,
            f"{name} is redundant: its features know {knows} beyond {found.constant}, but add {complement} to what "
            "the others know; do nothing",
        )
    if Statement.knows_nothing in claims:
        add(
            KNOWS_NOTHING,
            Statement.knows_nothing,
            f"⚠️  {name} knows nothing of the target: a probe of its features is {knows} above {found.constant}; "
            "check that its samples belong to the labels, and that its input is not constant",
        )
    if Statement.regressed in claims:
        add(
            REGRESSED,
            Statement.regressed,
            f"⚠️  {name} knows less than it did: a probe of its features explains at least "
            f"{-100 * claims[Statement.regressed].bounds['change']:.1f} % of the target's variance less than at its "
            f"best, and is now {knows} above {found.constant}",
        )
    if Statement.memorised in claims:
        trained = _shown(found, keys.of_stream(name, f"{TRAIN}_{keys.USES}"), "", 1, 3)
        add(
            MEMORISED,
            Statement.memorised,
            f"⚠️  the model has memorised {name}: {_cost(trained)} on training items, but {uses} on held-out ones; "
            "regularise or augment that stream (untested on your data)",
        )
    if Statement.overfitting in claims:
        now = _shown(found, keys.of_stream(keys.FULL, f"{found.split}_{LOSS}"), "", 1, 3)
        risen = (
            f"the held-out loss is {now}, at least {claims[Statement.overfitting].bounds['rise']:.3f} above its best, "
            "and above the training loss"
        )
        if _as_right_as_at_its_best(found):
            text = f"the model grows too sure: {risen}, but it is right as often as then; calibrate its probabilities"
        else:
            text = f"⚠️  the model overfits: {risen}; stop at the best evaluation, or regularise (untested on your data)"
        add(OVERFITTING, Statement.overfitting, text)
    return said


def _as_right_as_at_its_best(found: Evaluation) -> bool:
    """Whether the accuracy is known, and not below that of the evaluation with the best loss."""
    now, then = found.estimates.get(keys.of_stream(keys.FULL, f"{found.split}_acc")), found.past.accuracy
    return now is not None and then is not None and now.value >= then


def _cost(uses: str) -> str:
    return f"exchanging its input with another item's costs {uses} of loss"


def _shown(found: Evaluation, key: str, unit: str, scale: float, digits: int) -> str:
    estimate: Estimate | None = found.estimates.get(key)
    if estimate is None:
        return "nothing measured"
    low, high = bounds(estimate)
    return f"{scale * estimate.value:.{digits}f}{unit} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
