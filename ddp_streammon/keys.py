"""Every metric key of the project, and nothing else.

A figure of one stream is `<stream>_<figure>` (the seed interface's form, `stream1_grad_norm`), a figure of two
streams is `<a>_to_<b>_ratio` and its like. Sinks that group show the same value under `<figure>/<stream>`, and W&B
a choice of them under `<section>/<figure>/<stream>`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

SHARED = "shared"
"""The implicit stream of every trainable parameter that no stream claims."""
FULL = "full"
"""The whole model, where a figure is also taken for each stream."""
RESERVED = frozenset({SHARED, FULL, "full_model", "epoch", "step"})
"""Names that a stream cannot have, since keys would become ambiguous."""

GRAD_NORM = "grad_norm"
GRAD_MEAN = "grad_mean"
GRAD_MAX = "grad_max"
GRAD_SHARE = "grad_share"
GRAD_NONFINITE = "grad_nonfinite"
GRAD_ELEMENTS = "grad_elements"
GRAD_TENSORS = "params"
SKIPPED = "step_skipped"
"""1 where a GradScaler skips the step for its non-finite gradients, else 0; only where there is one."""
GRAD_FIGURES = (GRAD_NORM, GRAD_MEAN, GRAD_MAX, GRAD_SHARE, GRAD_NONFINITE, GRAD_ELEMENTS, GRAD_TENSORS)

GRAD_POWER = "grad_power"

UPDATE_NORM, UPDATE_RATIO = "update_norm", "update_ratio"
UPDATE_FIGURES = (UPDATE_NORM, UPDATE_RATIO)

NOISE_SCALE = "noise_scale"
"""Gradient noise scale, in samples; where it is determined."""
LOCAL_NORM = "local_grad_norm"
MAX_RANKS = 16
"""Ranks that have keys of their own; of more, findings speak."""

WEIGHT_NORM = "weight_norm"
WEIGHT_MEAN = "weight_mean"
WEIGHT_ELEMENT_MEAN = "weight_element_mean"
WEIGHT_FIGURES = (WEIGHT_NORM, WEIGHT_MEAN, WEIGHT_ELEMENT_MEAN)
WEIGHT_NORM_RATIO = "weight_norm_ratio"

TRAIN_ACC, VAL_ACC, TRAIN_LOSS, VAL_LOSS = "train_acc", "val_acc", "train_loss", "val_loss"
ACC_GAP, LOSS_GAP, OVERFITTING_SCORE = "acc_gap", "loss_gap", "overfitting_score"
WITHOUT = "without_"
"""Prefix of a figure taken with the stream's features replaced and all others kept."""
SPLIT_FIGURES = (TRAIN_ACC, VAL_ACC, TRAIN_LOSS, VAL_LOSS)
OVERFIT_FIGURES = (*SPLIT_FIGURES, ACC_GAP, LOSS_GAP, OVERFITTING_SCORE)
FULL_MODEL_LOSS_GAP, FULL_MODEL_ACC_GAP = "full_model_loss_gap", "full_model_acc_gap"

USES = "uses"
"""How much the loss rises when a stream's input is exchanged with another item's."""
ABLATED = "ablated"
"""How much the loss rises when a stream's features are replaced by their mean over training items."""
ALONE = "alone"
"""With the features of all other streams replaced by their mean."""
COVER = "cover"
"""What exchanging two streams costs beyond exchanging the one and the other: above 0 each covers for the other."""
SHAPLEY = "shapley"
KNOWS, KNOWS_SCORE = "knows", "knows_score"
"""What a ridge probe of the features scores beyond the majority class (or the mean), and what it scores."""
COMPLEMENT = "complement"
"""The probe of all streams less that of all others."""
HEAD_GAP = "head_gap"
"""The probe of all streams less the model."""
LAZINESS = "laziness"
"""The probe of the features of models trained on the stream alone less that of its features in this model."""
ENSEMBLE_GAP = "ensemble_gap"
"""The accuracy of models of one stream each, averaged, less the model's."""
LOW, HIGH, DETECTABLE = "low", "high", "detectable"
"""Bounds of a figure's 95 % interval; the effect that is seen with 80 % power."""

FULL_MODEL, ONLY, FEATURE_NORM = "full_model", "only", "feature_norm"

LEARNING_RATE, WEIGHT_DECAY = "lr", "weight_decay"
CONTRIBUTION = "contribution"
PRESENT = "present"
EPOCH = "epoch"
STOP = "stop_asked"
"""Ranks of the application that were asked to end the job; only where somebody can ask."""


def of_stream(stream: str, figure: str) -> str:
    """`of_stream("rgb", GRAD_NORM)` is `rgb_grad_norm`."""
    return f"{stream}_{figure}"


def of_rank(stream: str, figure: str, rank: int) -> str:
    """`of_rank("rgb", LOCAL_NORM, 3)` is `rgb_local_grad_norm_rank3`."""
    return f"{of_stream(stream, figure)}_rank{rank}"


def rank_of(key: str) -> tuple[str, int] | None:
    """The inverse of `of_rank`: ("rgb_local_grad_norm", 3); None for a key that is no rank's."""
    figure, found, rank = key.rpartition("_rank")
    return (figure, int(rank)) if found and rank.isdecimal() and figure.endswith(LOCAL_NORM) else None


def pairs(streams: Iterable[str]) -> list[tuple[str, str]]:
    """Every two streams once, in their order; `shared` is nobody's partner."""
    return list(combinations([name for name in streams if name != SHARED], 2))


def grad_ratio(a: str, b: str) -> str:
    """Norm of a's gradient over b's."""
    return f"{a}_to_{b}_ratio"


def feature_ratio(a: str, b: str) -> str:
    """Mean norm of a's features over b's, in `analyze_pathways`."""
    return f"{a}_to_{b}_ratio"


def weight_ratio(a: str, b: str, streams: Sequence[str]) -> str:
    """Norm of a's weights over b's; the guide's `weight_norm_ratio` where there are two streams."""
    return WEIGHT_NORM_RATIO if len(streams) == 2 else f"{a}_to_{b}_{WEIGHT_NORM_RATIO}"


def shown(figure: str) -> str:
    """What a mean of a score's figure is called: of `correct` it is an accuracy, `acc`."""
    return "acc" if figure == "correct" else figure


def bound(key: str, which: str) -> str:
    """`bound("rgb_val_uses", LOW)` is `rgb_val_uses_low`."""
    return f"{key}_{which}"


def cover(a: str, b: str, split: str) -> str:
    """How far streams a and b cover for each other."""
    return f"{a}_to_{b}_{split}_{COVER}"


def overfit_ratio(a: str, b: str) -> str:
    """Overfitting score of a over b's."""
    return f"{a}_vs_{b}_overfit_ratio"


def activation(stage: str, stream: str | None, moment: str) -> str:
    """`layer1_stream1_mean`, or `layer1_mean` where an output belongs to no stream."""
    return "_".join(part for part in (stage, stream, moment) if part is not None)


@dataclass(frozen=True)
class Parts:
    """A key taken apart: what is measured, and of which stream (None: of no single stream)."""

    figure: str
    stream: str | None


def parse(key: str, streams: Iterable[str]) -> Parts:
    """The figure and the stream of a key; the longest stream name that fits wins (`stream10` over `stream1`)."""
    names = sorted({*streams, SHARED, FULL}, key=len, reverse=True)
    name = next((name for name in names if key.startswith(f"{name}_")), None)
    if name is None or key.startswith((f"{name}_to_", f"{name}_vs_", "full_model_")):
        return Parts(figure=key, stream=None)
    return Parts(figure=key[len(name) + 1 :], stream=name)


VERDICT = "health/verdict"
"""W&B's one key for what was found, a sentence."""
RANK_FIGURES = ("min", "max", "loudest")
"""What W&B shows of the ranks' own gradient norms: the least, the greatest, and the rank that has the greatest."""
WANDB_FIGURES: Mapping[str, str] = {
    GRAD_NORM: GRAD_NORM,
    GRAD_SHARE: GRAD_SHARE,
    GRAD_NONFINITE: GRAD_NONFINITE,
    UPDATE_RATIO: UPDATE_RATIO,
    LEARNING_RATE: LEARNING_RATE,
    WEIGHT_NORM: WEIGHT_NORM,
    **{
        figure: f"overfit/{figure}"
        for figure in (TRAIN_LOSS, VAL_LOSS, TRAIN_ACC, VAL_ACC, LOSS_GAP, OVERFITTING_SCORE)
    },
    f"val_{USES}": f"probe/{USES}",
    f"val_{USES}_{LOW}": f"probe/{USES}_{LOW}",
    f"val_{USES}_{HIGH}": f"probe/{USES}_{HIGH}",
    f"val_{ABLATED}": f"probe/{ABLATED}",
    KNOWS: f"probe/{KNOWS}",
}
"""Figure of a stream (or of `full`) -> its place in W&B. With the ranks' three these are 20 for each stream."""
WANDB_FIGURES_OF_FULL: Mapping[str, str] = {
    "test_loss": "overfit/test_loss",
    "test_acc": "overfit/test_acc",
    HEAD_GAP: f"probe/{HEAD_GAP}",
    ENSEMBLE_GAP: f"probe/{ENSEMBLE_GAP}",
}
"""What W&B shows of `full` beside those."""
_RECORD_ONLY = frozenset(
    {
        *GRAD_FIGURES,
        *UPDATE_FIGURES,
        *WEIGHT_FIGURES,
        *OVERFIT_FIGURES,
        *WANDB_FIGURES_OF_FULL,
        GRAD_POWER,
        NOISE_SCALE,
        WEIGHT_DECAY,
        KNOWS,
        KNOWS_SCORE,
        COMPLEMENT,
        LAZINESS,
    }
)
_RECORD_ONLY_PARTS = frozenset({USES, ABLATED, ALONE, SHAPLEY, PRESENT, WITHOUT.rstrip("_")})
"""Parts of a figure's name: `val_shapley_acc`, `train_alone_loss`, `without_val_acc`, `val_present`."""


def wandb_key(key: str, streams: Sequence[str]) -> str | None:
    """The key under which W&B shows the value; None for a figure that is in the JSONL record only.

    W&B makes a section of what comes before a key's first `/` (or before its last, as its user prefers), with the keys
    in alphabetical order: both ways the streams of one figure are side by side. `rgb_grad_norm` -> `grad_norm/rgb`,
    `rgb_val_acc` -> `overfit/val_acc/rgb`, `rgb_val_uses` -> `probe/uses/rgb`. Figures of two streams are shown where
    there are no more than two (`ratio/...`), those of ranks by `wandb_rank_key`. Numbers of the user's own are all
    shown: `loss` -> `train/loss`, `rgb_mae` -> `mae/rgb`.
    """
    if rank_of(key) is not None:
        return None
    parts = parse(key, streams)
    if parts.stream is not None:
        places = {**WANDB_FIGURES, **WANDB_FIGURES_OF_FULL} if parts.stream == FULL else WANDB_FIGURES
        if parts.figure in places:
            return f"{places[parts.figure]}/{parts.stream}"
        return None if _is_record_only(parts.figure) else f"{parts.figure}/{parts.stream}"
    pair = _figure_of_two(key, streams)
    if pair is not None:
        return f"ratio/{key}" if pair and len(streams) == 2 else None
    return key if "/" in key else f"train/{key}"


def wandb_rank_key(which: str, stream: str) -> str:
    """`wandb_rank_key("max", "rgb")` is `rank/local_grad_norm_max/rgb`."""
    return f"rank/{LOCAL_NORM}_{which}/{stream}"


def _is_record_only(figure: str) -> bool:
    """Whether a figure is the monitor's own; what no one here knows is the user's."""
    inner, _, which = figure.rpartition("_")
    if inner and which in (LOW, HIGH, DETECTABLE):
        return _is_record_only(inner)
    return figure in _RECORD_ONLY or not _RECORD_ONLY_PARTS.isdisjoint(figure.split("_"))


def _figure_of_two(key: str, streams: Sequence[str]) -> bool | None:
    """None for a key that is not of two streams, else whether it is a figure (and no bound of one)."""
    for a, b in pairs(streams):
        if key in (grad_ratio(a, b), weight_ratio(a, b, streams), overfit_ratio(a, b)):
            return True
        if key.startswith(f"{a}_to_{b}_") and COVER in key.split("_"):
            return key.endswith(f"_{COVER}")
    return None


def nearest(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """The valid names that look most like `name`, for error messages; never empty unless `valid` is."""
    choices = list(dict.fromkeys(valid))
    return difflib.get_close_matches(name, choices, n=count, cutoff=0.3) or choices[:count]
