"""The evidence rules: every alarm has a reason, a condition with its source, and something to do.

| class | rules |
| --- | --- |
| non-finite | NF |
| configuration | FRZ, OPT, RATE, LR0, DECAY, INIT |
| exact | DET, DEAD, UNC, ZGR, EVAL, NEG, LR, MODE, BATCH, SYNC, DESYNC, LRJ, LRS |
| input | INZ, INC, INN, INR, SAME, ORDER |
| windowed | WGR, LRH, DIV, VAN, CLP, LRL, WSH, UPD, IMB, STL, BF16, LOSS, SLOW, OUTLIER |
| evaluated | what `evaluation.claims` says, told by `rules.evaluated` |

Each rule's class says when it fires, where its numbers come from, and what is legal. They are evaluated in this order,
which is that in which findings explain each other. `python -m ddp_streammon.reference rules` prints all of it. Where a
threshold is "a choice", nothing but this project's own runs says that it is a good one: `python -m tests.zoo` trains
planted faults and healthy controls and counts what is found, and said for nothing.
"""

from __future__ import annotations

from ddp_streammon.config import RuleSet
from ddp_streammon.rules import (
    of_inputs,
    of_own_gradients,
    of_ranks,
    of_rates,
    of_settings,
    of_training,
    of_weights,
    of_windows,
)
from ddp_streammon.rules.engine import Rule

RULES: tuple[Rule, ...] = (
    of_training.NonFinite(),
    of_settings.Frozen(),
    of_settings.NotOptimized(),
    of_settings.Rates(),
    of_settings.ZeroRate(),
    of_settings.Decay(),
    of_settings.Initial(),
    of_training.NoGradient(),
    of_training.Dead(),
    of_training.Unchanged(),
    of_training.NotCleared(),
    of_training.LeftInEval(),
    of_training.NegativeLoss(),
    of_ranks.OtherSettings(),
    of_ranks.OtherMode(),
    of_ranks.Uneven(),
    of_ranks.NotSynchronised(),
    of_ranks.Diverged(),
    of_inputs.SameBatch(),
    of_inputs.SameOrder(),
    of_rates.RateJump(),
    of_rates.RateGone(),
    of_inputs.ZeroInput(),
    of_inputs.ConstantInput(),
    of_inputs.Unscaled(),
    of_inputs.OtherScale(),
    of_ranks.OtherLoss(),
    of_ranks.Slow(),
    of_own_gradients.Outlier(),
    of_weights.WeightsGrow(),
    of_rates.RateHigh(),
    of_windows.Diverging(),
    of_windows.Vanishing(),
    of_windows.ClippedAway(),
    of_rates.RateLow(),
    of_weights.WeightsShrink(),
    of_weights.UpdatesApart(),
    of_windows.Imbalance(),
    of_windows.Stalled(),
    of_weights.Rounded(),
)
"""All of them, with their own thresholds."""
PLAIN = ("NF", "DET", "DEAD", "LR", "MODE", "BATCH", "SYNC", "DESYNC", "SAME", "OUTLIER", "SLOW")
"""Those that a step's plain figures are enough for: the only ones with `rules=guide` and `rules=off`, where nothing is
measured for rules."""


def quiet(rules: RuleSet) -> tuple[str, ...]:
    """The ids of the evidence rules that a rule set leaves out."""
    return () if rules is RuleSet.evidence else tuple(rule.id for rule in RULES if rule.id not in PLAIN)
