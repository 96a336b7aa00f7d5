"""The loss scale of a GradScaler, and figures without it; nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddp_streammon.moments import ABS_MAX, SQ_SUM, SUM


def inverse_scale(scaler: torch.amp.GradScaler | None, optimizers: Sequence[torch.optim.Optimizer]) -> float | Tensor:
    """1 / the scale that the optimizers' gradients carry, on its device; 1.0 where they carry none, or no longer.

    `GradScaler.get_scale()` would wait for the device, and the stage is not public: torch/amp/grad_scaler.py.
    Errors: ValueError where some optimizers' gradients are unscaled and others' are not.
    """
    if scaler is None or not scaler.is_enabled():
        return 1.0
    known = {id(optimizer) for optimizer in optimizers}
    states = scaler._per_optimizer_states.items()
    done = {optimizer for optimizer, state in states if state["stage"].name != "READY"}
    if known & done and known - done:
        raise ValueError(
            "the gradients of some optimizers are unscaled and those of others are not: call scaler.unscale_ for "
            "all of them, or for none, before monitor.step"
        )
    return 1.0 if done & known or (done and not known) else inverse_scale_of_backward(scaler)


def inverse_scale_of_backward(scaler: torch.amp.GradScaler | None) -> float | Tensor:
    """1 / the scale of this step's backward pass, on its device."""
    if scaler is None or not scaler.is_enabled() or scaler._scale is None:
        return 1.0
    return scaler._scale.double().reciprocal()


def unscale(table: Tensor, inverse: float | Tensor) -> Tensor:
    """Moments of scaled gradients -> moments of the gradients. Shape: [S, 7]. Comm, Sync: none."""
    factors = torch.ones_like(table[0])
    factors[SUM] = factors[ABS_MAX] = inverse
    factors[SQ_SUM] = inverse * inverse
    return table * factors
