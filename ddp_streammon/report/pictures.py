"""What the report draws: which figures make a picture, and how it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ddp_streammon import keys

USER_NUMBERS = 12
"""Numbers of the user's own that are drawn, at most."""


@dataclass(frozen=True)
class Line:
    """A figure in a picture: one line for each stream that has it."""

    figure: str
    label: str = ""
    """What tells it from the picture's other lines of the same stream."""
    of: str = "streams"
    """`streams`: each stream's own; `full`: the whole model's; `pairs`: what two cover for each
    other, the figure being the split; `none`: of no stream."""
    dashed: bool = False


@dataclass(frozen=True)
class Picture:
    """Lines over the steps of the run."""

    title: str
    unit: str
    note: str
    """How to read it, in two or three sentences."""
    lines: tuple[Line, ...]
    log: bool = False
    zero: bool = False
    """Whether zero is worth a line of its own."""
    open_ended: bool = False
    """Whether nan says that too little was seen to tell, and nothing is wrong."""


@dataclass(frozen=True)
class Whiskers:
    """The last value of figures of one unit, with intervals, stream by stream."""

    title: str
    unit: str
    note: str
    """How to read it."""
    lines: tuple[Line, ...]


def _val(figure: str) -> str:
    return f"val_{figure}"


PICTURES = (
    Picture(
        "Loss of the whole model",
        "loss",
        "The loss of every step, and of the evaluations. Validation that rises while training falls is "
        "overfitting; a step curve that jumps and does not come back is a rate that is too high. Both flat near "
        "ln(classes): nothing is learned.",
        (
            Line("loss", "each step", "none"),
            Line(keys.TRAIN_LOSS, "training items", "full", dashed=True),
            Line(keys.VAL_LOSS, "validation", "full"),
        ),
    ),
    Picture(
        "Accuracy of the whole model",
        "0 to 1",
        "Of evaluations. The band is the 95 % interval: a change within it may be chance. Dashed: training items, "
        "whose distance to the solid line is the gap.",
        (
            Line(keys.TRAIN_ACC, "training items", "full", dashed=True),
            Line(keys.VAL_ACC, "validation", "full"),
        ),
    ),
    Picture(
        "Gradient norm",
        "L2 norm, averaged gradient before clipping",
        "Compare a line with its own past: a fall by orders of magnitude while the loss is high is a stream that "
        "dies, a rise one that diverges. How far lines lie apart depends on widths and scales, and says little. "
        "Logarithmic.",
        (Line(keys.GRAD_NORM),),
        log=True,
    ),
    Picture(
        "Share of the gradient",
        "of the squared gradient norm",
        "Which parameters the gradient falls on; all shares add up to 1. A share says nothing of who needs it: "
        "small streams are often done early. One that goes to 0 and stays there is worth a look.",
        (Line(keys.GRAD_SHARE),),
        zero=True,
    ),
    Picture(
        "Gradient noise scale",
        "samples",
        "About how many samples a batch can have before more of them add little: one far below it is noisy, one far "
        "above it wastes samples. It usually grows as the loss falls. Over the last 500 steps, with its 95 % interval; "
        "from local gradients of 8 ranks and more. Logarithmic.",
        (Line(keys.NOISE_SCALE),),
        log=True,
        open_ended=True,
    ),
    Picture(
        "Update ratio",
        "norm of the change / norm of the weights, a step",
        "How fast the optimizer really moves a stream. About 0.001 is usual, above 0.1 is too fast, 0 is frozen, "
        "and below 0.000001 as good as frozen. Logarithmic.",
        (Line(keys.UPDATE_RATIO),),
        log=True,
    ),
    Picture(
        "Weight norm",
        "L2 norm, without biases",
        "Growth without end: too high a rate, or too little decay. A steady fall: the decay is stronger than the "
        "gradients. A line that is flat from the start: nothing is learned.",
        (Line(keys.WEIGHT_NORM),),
    ),
    Picture(
        "Learning rate",
        "of the stream's parameter group",
        "Read it beside the update ratio, which says what came of it. A "
        "jump up, or a fall to nothing long before the end, is a schedule that counts other steps than the "
        "training.",
        (Line(keys.LEARNING_RATE),),
        log=True,
    ),
    Picture(
        "What the head uses: loss that an exchanged input costs",
        "loss",
        "How much the loss rises when the stream's input is another item's. A band that holds zero: no use is "
        "seen. One that stays there while another stream's rises is a stream that the head leaves aside.",
        (Line(_val(keys.USES)),),
        zero=True,
    ),
    Picture(
        "Loss that mean features cost",
        "loss",
        "The second view of use: the stream's features are replaced by their mean over training items. Where it "
        "and the first view disagree, trust neither alone. Negative: the model does better without the stream.",
        (Line(_val(keys.ABLATED)),),
        zero=True,
    ),
    Picture(
        "What each stream knows: ridge probe of its features",
        "score beyond the majority class",
        "What a linear probe can read off the frozen features, whatever the head makes of them. At zero the "
        "encoder knows nothing beyond the most frequent class. Do not rank streams by it: their inputs hold "
        "different amounts.",
        (Line(keys.KNOWS),),
        zero=True,
        open_ended=True,
    ),
    Picture(
        "What only this stream knows, and what the head leaves",
        "score",
        "Complement: what the probe of all streams loses without this one. At zero the others know all that it "
        "knows. Head gap: what the model loses against the probe of all; above zero the head leaves something.",
        (Line(keys.COMPLEMENT, "complement"), Line(keys.HEAD_GAP, "head gap", "full", dashed=True)),
        zero=True,
        open_ended=True,
    ),
    Picture(
        "Accuracy of each stream alone",
        "0 to 1",
        "Through the model's own head, with the other features at zero: it says as much of the head as of the "
        "stream. Use the probe to say what a stream knows. Dashed: training items.",
        (Line(keys.TRAIN_ACC, "training", dashed=True), Line(keys.VAL_ACC, "validation")),
    ),
    Picture(
        "Loss of each stream alone",
        "loss",
        "Through the model's own head, too. Dashed: training items; the distance to the solid line is how much "
        "the stream has learned by heart. A level far above ln(classes) is a head that is lost without the "
        "others.",
        (Line(keys.TRAIN_LOSS, "training", dashed=True), Line(keys.VAL_LOSS, "validation")),
    ),
    Picture(
        "Generalisation gap in the loss",
        "loss, validation less training",
        "Above zero and growing: overfitting. The whole model's line is the one that counts. A stream's line "
        "that grows alone says where it comes from.",
        (
            Line(keys.LOSS_GAP, "alone"),
            Line(f"{keys.ALONE}_{keys.LOSS_GAP}", "alone, mean features"),
            Line(keys.LOSS_GAP, "", "full"),
        ),
        zero=True,
    ),
    Picture(
        "Streams that cover for each other",
        "loss",
        "What exchanging both costs beyond the one and the other. Above zero each covers for the other: they are "
        "redundant, which is no fault. Below zero they need each other.",
        (Line("val", "", "pairs"),),
        zero=True,
    ),
    Picture(
        "Shapley share",
        "of the score",
        "The stream's part of what the model gains by true inputs, averaged over every order of giving them "
        "back. The parts add up to the whole gain. Near zero: nothing is lost without it.",
        (Line(_val(keys.SHAPLEY)),),
        zero=True,
    ),
)

WHISKERS = (
    Whiskers(
        "What the head uses, at the last evaluation",
        "validation loss",
        "Dot: the estimate; bar: 95 % interval; tick: the smallest effect that would have been seen. A bar that holds "
        "zero: no use was seen, and one beyond the tick is unlikely. A tick far out: too few items to tell.",
        (Line(_val(keys.USES), "input exchanged"), Line(_val(keys.ABLATED), "mean features")),
    ),
    Whiskers(
        "Probe against use, at the last evaluation",
        "accuracy",
        "Known but not used: the head leaves it. Used and not complementary: another stream knows it, too. "
        "Neither known nor used: look at the stream's input, or whether its items belong to the labels.",
        (
            Line(keys.KNOWS, "knows (probe)"),
            Line(keys.COMPLEMENT, "only it knows"),
            Line(f"{_val(keys.USES)}_acc", "head uses (exchanged)"),
            Line(keys.HEAD_GAP, "head leaves", "full"),
        ),
    ),
)

_OF_STREAMS = {line.figure for part in (*PICTURES, *WHISKERS) for line in part.lines if line.of in ("streams", "full")}
_BOUNDS = (keys.LOW, keys.HIGH, keys.DETECTABLE)
_NO_PICTURE = {"samples", "correct", keys.EPOCH, keys.SKIPPED, keys.STOP, keys.WEIGHT_NORM_RATIO}


def is_shown(key: str, streams: Sequence[str]) -> bool:
    """Whether a picture shows it, or a bound of an interval; numbers of the user's own are shown."""
    base, _, which = key.rpartition("_")
    parts = keys.parse(base if which in _BOUNDS else key, streams)
    if parts.stream is not None:
        return parts.figure in _OF_STREAMS
    return is_own(parts.figure, streams) or parts.figure.endswith(f"_{_val(keys.COVER)}") or parts.figure in _OF_STREAMS


def is_own(key: str, streams: Sequence[str]) -> bool:
    """Whether it is a number of the user's own (or the loss)."""
    parts = keys.parse(key, streams)
    between = any(key.startswith(f"{name}_") for name in (*streams, keys.SHARED, keys.FULL))
    return parts.stream is None and not between and key not in _NO_PICTURE and parts.figure not in _OF_STREAMS
