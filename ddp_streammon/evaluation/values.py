"""EvalStats under the metric keys: each stream alone, the whole model, gaps and the guide's score."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ddp_streammon import keys
from ddp_streammon.evaluation.measure import EvalStats
from ddp_streammon.stats import ratio


def split_values(result: EvalStats, split: str) -> dict[str, float]:
    """`{"full": {"loss": 1.2}, "rgb": ...}` of a split as `full_val_loss`, `rgb_val_loss`, `rgb_without_val_loss`."""
    values = {}
    for variant, figures in result.means(split).items():
        without = variant.startswith(keys.WITHOUT)
        stream = variant.removeprefix(keys.WITHOUT)
        for figure, value in figures.items():
            name = f"{split}_{keys.shown(figure)}"
            values[keys.of_stream(stream, keys.WITHOUT + name if without else name)] = value
    return values


def overfitting_values(result: EvalStats, names: Sequence[str]) -> dict[str, float]:
    """The figures of the splits `train` and `val` with their gaps, the guide's score, and ratios of scores."""
    values: dict[str, float] = {}
    for split in ("train", "val"):
        values |= split_values(result, split)
    for figure in keys.SPLIT_FIGURES:
        values[figure] = result.scalars.get(figure, values.get(keys.of_stream(keys.FULL, figure), math.nan))
    for name in (keys.FULL, *names):
        split_figures = (values.get(keys.of_stream(name, of), math.nan) for of in keys.SPLIT_FIGURES)
        train_acc, val_acc, train_loss, val_loss = split_figures
        acc_gap, loss_gap = train_acc - val_acc, val_loss - train_loss
        values[keys.of_stream(name, keys.ACC_GAP)] = acc_gap
        values[keys.of_stream(name, keys.LOSS_GAP)] = loss_gap
        score = loss_gap if math.isnan(acc_gap) else acc_gap + loss_gap  # no accuracy: a regression, say
        values[keys.of_stream(name, keys.OVERFITTING_SCORE)] = score
    for a, b in keys.pairs(names):
        scores = [values[keys.of_stream(name, keys.OVERFITTING_SCORE)] for name in (a, b)]
        values[keys.overfit_ratio(a, b)] = ratio(*scores) if min(scores) > 0 else math.nan
    values[keys.FULL_MODEL_LOSS_GAP] = values[keys.VAL_LOSS] - values[keys.TRAIN_LOSS]
    values[keys.FULL_MODEL_ACC_GAP] = values[keys.TRAIN_ACC] - values[keys.VAL_ACC]
    return values
