"""How a batch becomes per-item figures."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Score: TypeAlias = "Callable[[nn.Module, Any], Mapping[str, Any]]"
"""`score(model, batch)` gives `loss`, [B], one value an item (a sequence, an image with its caption), and if it likes:

`weight` [B] (default 1): tokens, say; 0 leaves an item out. `group` [B] integers: items of one group are not
independent (clips of one video); `"batch"` makes the batch one group (a contrastive loss). `present`: by stream a mask
[B], true where the stream has data. `target` and `prediction`: classes [B], or values [B, outputs], for the probe.
`record`: a sequence of B objects that pickle, for a `reduce` of the user's. Any other figure (`correct`, say), [B], is
averaged over items by weight, as the loss is.

The batch lies on the device of the model's first parameter; one of a class of its own does where it has a `to`.
"""

Criterion: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"

TARGETS = ("target", "targets", "label", "labels")
"""Where the target lies in a batch that is a mapping."""


BATCH = "batch"
"""As a group: all items of the batch are one."""
_SPECIAL = ("weight", "group", "present", "target", "prediction", "record")


@dataclass(frozen=True)
class Scored:
    """What a score gave for a batch, checked. Shape: [B] each; figures and weight float64."""

    figures: Mapping[str, Tensor]
    weight: Tensor
    group: Tensor | str | None = None
    present: Mapping[str, Tensor] = field(default_factory=dict)
    target: Tensor | None = None
    prediction: Tensor | None = None
    record: Sequence[Any] | None = None

    @property
    def items(self) -> int:
        return len(self.weight)


def scored(score: Score, model: nn.Module, batch: object) -> Scored:
    """Run `score` on a batch. Errors: ValueError for what is not one value an item, with its name and shape."""
    returned = score(model, batch)
    if not isinstance(returned, Mapping):
        raise ValueError(f"score must return a mapping, e.g. {{'loss': loss}}, got {_kind(returned)}")
    given = dict(returned)
    if "loss" not in given:
        raise ValueError(f"score must give 'loss' per item, got {', '.join(map(repr, given)) or 'nothing'}")
    special = {name: given.pop(name, None) for name in _SPECIAL}
    special["present"] = {} if special["present"] is None else special["present"]
    count = len(given["loss"]) if isinstance(given["loss"], Tensor) and given["loss"].dim() == 1 else None
    _check_numbers(given, special, count)
    _check_targets(special, count)
    figures = {name: values.detach().double() for name, values in given.items()}
    device = figures["loss"].device

    def beside(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    weight = torch.ones_like(figures["loss"]) if special["weight"] is None else special["weight"].detach().double()
    masks = {stream: beside(mask) for stream, mask in special["present"].items()}
    group, target, prediction = (beside(special[name]) for name in ("group", "target", "prediction"))
    return Scored(figures, beside(weight), group, masks, target, prediction, special["record"])


def _check_numbers(given: Mapping[str, Any], special: Mapping[str, Any], count: int | None) -> None:
    """ValueError for figures, weights, groups and masks that are not one number an item."""
    group, present = special["group"], special["present"]
    if isinstance(group, str) and group != BATCH:
        raise ValueError(f"group must be integers [items], or {BATCH!r} for one group a batch, got {group!r}")
    if not isinstance(present, Mapping):
        raise ValueError(f"present must be a mapping of streams to masks [items], got {_kind(present)}")
    optional = {"weight": special["weight"], "group": None if isinstance(group, str) else group}
    named = {**given, **{name: value for name, value in optional.items() if value is not None}}
    masks = {f"present[{stream!r}]": mask for stream, mask in present.items()}
    for name, values in {**named, **masks}.items():
        _check_items(name, values, count)
    if isinstance(group, Tensor) and (group.is_floating_point() or group.is_complex()):
        raise ValueError(f"group must be integers, got {group.dtype}")


def _check_targets(special: Mapping[str, Any], count: int | None) -> None:
    """ValueError for targets, predictions and records that are not one an item."""
    for name in ("target", "prediction", "record"):
        value = special[name]
        if value is None:
            continue
        if name != "record" and not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor [items] or [items, outputs], got {_kind(value)}")
        found = "a number" if isinstance(value, Tensor) and not value.dim() else len(value)
        if found != count:
            raise ValueError(f"score must give one {name} per item, {count} in all, got {found}")
    target, prediction = special["target"], special["prediction"]
    if target is not None and prediction is not None and prediction[:1].numel() != target[:1].numel():
        raise ValueError(
            f"prediction must have the shape of target, {tuple(target.shape)}, got {tuple(prediction.shape)}; "
            "of logits give the class, logits.argmax(1)"
        )


def _check_items(name: str, values: object, count: int | None) -> None:
    """ValueError for what is not one number an item; `count` is None where the loss is not."""
    if not isinstance(values, Tensor):
        raise ValueError(f"score must give one {name} per item, as a tensor, got {_kind(values)}")
    if values.dim() != 1 or len(values) != count:
        remedy = "; of a loss function use reduction='none'" if name == "loss" and not values.dim() else ""
        raise ValueError(
            f"score must give one {name} per item, shape [{'items' if count is None else count}], "
            f"got shape {tuple(values.shape)}{remedy}"
        )


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """(positional inputs, keyword inputs, target) of `(x1, x2, y)`, `((x1, x2), y)` or `{"rgb": x1, "label": y}`."""
    if isinstance(batch, Mapping):
        target = next((key for key in TARGETS if key in batch), None)
        if target is None:
            raise ValueError(f"the batch has no target: expected one of {', '.join(TARGETS)}, got {', '.join(batch)}")
        return (), {key: value for key, value in batch.items() if key != target}, batch[target]
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise ValueError(f"a batch must be (inputs..., target) or a mapping with a target, got {type(batch).__name__}")
    inputs = batch[:-1]
    if len(inputs) == 1 and isinstance(inputs[0], tuple | list):
        inputs = inputs[0]
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return (), dict(inputs[0]), batch[-1]
    return tuple(inputs), {}, batch[-1]


def classification(criterion: Criterion | None = None) -> Score:
    """Loss (nats, per item) and correctness of class logits [B, C] against targets [B].

    `criterion` defaults to the model's own `criterion`, then to cross entropy. One that has a `reduction` is asked
    for its per-item losses (class weights multiply them); of another the batch mean stands for each item, and each
    batch is one group: its items say the same. Items with its `ignore_index` as target count for nothing.
    """

    def score(model: nn.Module, batch: Any) -> Mapping[str, Any]:
        inputs, named, target = split_batch(batch)
        logits = model(*inputs, **named)
        prediction = logits.argmax(1)
        figures = classified(model, logits, target, criterion, prediction)
        return figures | {"target": target, "prediction": prediction}

    return score


def classified(
    model: nn.Module,
    logits: Tensor,
    target: Tensor,
    criterion: Criterion | None = None,
    prediction: Tensor | None = None,
) -> dict[str, Any]:
    """`loss`, `correct` and `weight` of each item, [B] each, and their `group`; see `classification`.

    `prediction`: the classes of the largest logits, where they are known already.
    """
    prediction = logits.argmax(1) if prediction is None else prediction
    own = getattr(model, "criterion", None) if criterion is None else criterion
    used = nn.CrossEntropyLoss() if own is None else own
    loss = _per_item(used, logits, target)
    figures: dict[str, Any] = {"loss": loss, "correct": (prediction == target).double()}
    if not loss.dim():
        figures |= {"loss": loss.expand(len(target)), "group": BATCH}
    ignored = getattr(used, "ignore_index", None)
    return figures if ignored is None else figures | {"weight": (target != ignored).double()}


def _per_item(criterion: Criterion, logits: Tensor, target: Tensor) -> Tensor:
    """[B], or the mean of the batch, [], where the criterion cannot be asked for more."""
    if isinstance(criterion, nn.Module) and hasattr(criterion, "reduction"):
        each: Any = copy.copy(criterion)
        each.reduction = "none"
        criterion = each
    elif _takes_reduction(criterion):
        function: Any = criterion
        criterion = functools.partial(function, reduction="none")
    loss = criterion(logits, target)
    if loss.dim() == 0:
        return loss
    return loss if loss.shape == target.shape[:1] else loss.reshape(len(target), -1).mean(1)


def _takes_reduction(criterion: Criterion) -> bool:
    """Whether it is one of `torch.nn.functional`'s, or takes the same keyword."""
    try:
        return "reduction" in inspect.signature(criterion).parameters
    except (TypeError, ValueError):
        return False


def to_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device
