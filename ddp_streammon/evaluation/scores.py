"""How a batch becomes per-item figures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Score: TypeAlias = "Callable[[nn.Module, Any], Mapping[str, Tensor]]"
"""`score(model, batch)` gives per item, shape [B] each: `loss`, optionally `weight` (default 1), and any further
figure (`correct`, say); figures are averaged over items by weight."""

Criterion: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"

TARGETS = ("target", "targets", "label", "labels")
"""Where the target lies in a batch that is a mapping."""


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
    for its per-item losses (class weights multiply them); of another the batch mean stands for each item. Items with
    its `ignore_index` as target count for nothing.
    """

    def score(model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        inputs, named, target = split_batch(batch)
        return classified(model, model(*inputs, **named), target, criterion)

    return score


def classified(
    model: nn.Module, logits: Tensor, target: Tensor, criterion: Criterion | None = None
) -> dict[str, Tensor]:
    """`loss`, `correct` and `weight` of each item, [B] each; see `classification`."""
    own = getattr(model, "criterion", None) if criterion is None else criterion
    used = nn.CrossEntropyLoss() if own is None else own
    figures = {"loss": _per_item(used, logits, target), "correct": (logits.argmax(1) == target).double()}
    ignored = getattr(used, "ignore_index", None)
    return figures if ignored is None else figures | {"weight": (target != ignored).double()}


def _per_item(criterion: Criterion, logits: Tensor, target: Tensor) -> Tensor:
    if isinstance(criterion, nn.Module) and hasattr(criterion, "reduction"):
        each: Any = copy.copy(criterion)
        each.reduction = "none"
        criterion = each
    loss = criterion(logits, target)
    return loss.expand(len(target)) if loss.dim() == 0 else loss.reshape(len(target), -1).mean(1)


def to_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device
