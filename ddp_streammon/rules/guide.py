"""What the StreamMonitor guide would say about a History: its thresholds, its sentences, its order.

| rule | says | when |
| --- | --- | --- |
| S-NF | gradients or weights non-finite | a norm is nan or inf, or non-finite elements were counted |
| S-GV | no gradient; gradients vanishing | mean norm 0; below 1e-7 |
| S-GX | gradients exploding | mean norm above 1e3 |
| S-GR | gradients larger than another stream's; balanced | ratio of mean norms outside [0.33, 3.0]; inside |
| S-OF | overfitting | latest score > 1.0 |
| S-OM | mild overfitting | 0.5 < score <= 1.0 |
| S-OR | overfitting significantly more | largest score > 1.0 and > 2 x the second largest |
| S-OB | all streams overfitting | every stream's score > 1.0 |
| S-ST | learning stalled | train accuracy gains < 0.001 an entry and is below 0.99 |
| S-WR | weights larger than another stream's | ratio of latest norms outside [0.5, 2.0]; a norm of 0 |
| S-WD | weights diverging over time | the norm grew at each of the last 5 entries, and more than doubled |
| S-WS | weights stagnant | the norm stands still over 5 entries while another stream's moves |
| S-S1 | Scenario 1: vanishing, not contributing | S-GR outside, the weak stream's train accuracy below half |
| S-S2 | Scenario 2: memorizing training data | score > 1.0, validation accuracy below half of train's |
| S-NL | Scenario 3: balanced, too small globally | S-GR inside, every train accuracy below 0.15 |
| S-S4 | Scenario 4: dominating predictions | S-WR outside, the heavy one contributes over twice as much |
| S-PH | monitor more often, consider early stopping | a warning at epoch 50 or later |
| S-OK | all healthy; insufficient data | no rule said anything; nothing was logged |

A stream's gradient norm is the mean of its last 5. Of more than two streams the largest and the smallest
are compared, one sentence for all; a ratio is the stream named first over the other, as in the keys. A
stream whose learning rate is known to be 0 is frozen, hence neither stalled nor stagnant. The rules are in
`guide_gradients`, `guide_learning`, `guide_weights` and `guide_scenarios`; they see History and settings
through `guide_context`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.history import History
from ddp_streammon.rules import guide_gradients, guide_learning, guide_scenarios, guide_weights
from ddp_streammon.rules.finding import Finding, StreamSettings
from ddp_streammon.rules.guide_context import FINE, Context

INSUFFICIENT = "Insufficient data for recommendations"
"""Guide: said before anything is logged."""
HEALTHY = f"{FINE}All metrics look healthy"
"""Guide: said where there is nothing else to say."""


def recommend(
    history: History,
    streams: Sequence[str],
    settings: Mapping[str, StreamSettings],
    *,
    severity: Severity = Severity.info,
) -> list[Finding]:
    """The guide's findings; pure, so that every rank finds the same.

    `streams` are the user's, without `shared`. `settings` may hold `shared` for the base values.
    `severity` is that of the warnings.
    """
    context = Context(history, streams, settings, severity)
    if not _anything_logged(context):
        return [Finding(INSUFFICIENT, rule="S-OK")]
    rules = (*guide_gradients.RULES, *guide_learning.RULES, *guide_weights.RULES, *guide_scenarios.RULES)
    findings = [finding for rule in rules for finding in rule(context)]
    findings += guide_scenarios.late_training(context, findings)
    return findings or [Finding(HEALTHY, rule="S-OK", step=context.now())]


def _anything_logged(context: Context) -> bool:
    figures = (*keys.GRAD_FIGURES, *keys.WEIGHT_FIGURES, *keys.OVERFIT_FIGURES, keys.CONTRIBUTION)
    streams = (*context.streams, keys.SHARED)
    names = [keys.of_stream(stream, figure) for stream in streams for figure in figures]
    return any(name in context.history for name in (keys.EPOCH, *names))
