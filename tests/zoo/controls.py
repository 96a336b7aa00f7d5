"""Healthy variations of the base training: architectures, optimizers, schedules, unequal streams, noise."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ddp_streammon.train.models import MultiStreamModel
from tests.zoo.cases import SECOND, control
from tests.zoo.training import Training

ADAM: dict[str, Any] = {"optimizer": "adam", "lr": 1e-3}
VARIATIONS: dict[str, dict[str, Any]] = {
    "h_base": {},
    "h_seed1": {"seed": 1},
    "h_seed2": {"seed": 2},
    "h_edges": {"views": "edges"},
    "h_vectors": {"views": "vectors"},
    "h_three": {"views": "three"},
    "h_conv": {"encoder": "conv", "lr": 0.03},
    "h_conv_bn": {"encoder": "conv_bn"},
    "h_tanh": {"activation": ("tanh",)},
    "h_adam": {**ADAM, "weight_decay": (0.0,)},
    "h_gelu_adamw": {**ADAM, "optimizer": "adamw", "activation": ("gelu",), "weight_decay": (1e-2,)},
    "h_guide_rates": {
        **ADAM,
        "optimizer": "adamw",
        "lr_scale": (2.0, 0.4, 1.0),
        "weight_decay": (1e-3, 3e-2, 1e-3),
        "epochs": 14,
    },
    "h_weighted": {"fusion": "weighted"},
    "h_gated": {"fusion": "gated"},
    "h_uneven_width": {"width": (128, 32)},
    "h_uneven_depth": {"depth": (4, 1)},
    "h_cosine": {"schedule": "cosine"},
    "h_warmup": {"schedule": "warmup", "lr": 0.08},
    "h_clip": {"clip": 2.0},
    "h_dropout": {"dropout": 0.3, "epochs": 14},
    "h_small_batch": {"batch": 16, "lr": 0.02, "epochs": 4},
    "h_large_batch": {"batch": 200, "lr": 0.15, "epochs": 34},
    "h_no_momentum": {"momentum": 0.0, "lr": 0.3},
    "h_converged": {"epochs": 24, "batch": 128, "schedule": "cosine", "lr": 0.2},
    "h_accumulate": {"accumulate": 2, "batch": 32, "epochs": 8},
    "h_bf16": {"autocast": "bf16"},
    "h_smoothing": {"label_smoothing": 0.1},
    "h_slow_start": {"lr": 0.006, "epochs": 14},
}
for _name, _setup in VARIATIONS.items():
    control(_name, **_setup)(Training)


@control("h_frozen", frozen=SECOND, width=(64, 128, 64))
class DeclaredFrozen(Training):
    """A stream is frozen, and the configuration says so."""

    def network(self) -> MultiStreamModel:
        model = super().network()
        model.encoders[self.names[1]].requires_grad_(False)
        return model


@control("h_jitter")
class Jitter(Training):
    """Every rank is late by up to a millisecond, at random."""

    def batch(self, inputs: list[Any], target: Tensor) -> tuple[list[Any], Tensor]:
        generator = torch.Generator().manual_seed(self.world * self.step + self.rank)
        time.sleep(1e-3 * float(torch.rand(1, generator=generator)))
        return inputs, target
