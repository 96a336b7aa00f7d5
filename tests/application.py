"""The application inside a test: composed as from the command line, run in this process or on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ddp_streammon.train.__main__ import composed, data_and_model, solo_models
from ddp_streammon.train.config import load
from ddp_streammon.train.loop import Result, run, seed_all
from tests.ranks import run_ranks

QUIET = ("trainer.progress=false", "sinks.console.enabled=false", "sinks.wandb.enabled=false")
SMALL = (*QUIET, "model=multi_mlp", "model.hidden=[32,16]", "trainer.epochs=2")
"""Seconds of the main job become a fraction of one; everything but the size is the main job's."""


def train(overrides: list[str], folder: str) -> Result:
    """One run with these overrides, in `folder`."""
    torch.set_num_threads(1)
    Path(folder).mkdir(parents=True, exist_ok=True)
    config = composed(overrides)
    settings = load(config)
    seed_all(settings.trainer.seed)
    data, model = data_and_model(config, settings)
    solo = solo_models(config, settings, data)
    return run(settings, data, model, Path(folder), {"overrides": overrides}, solo)


def _weights(overrides: list[str], folder: str) -> dict[str, Any]:
    """The figures and the checkpoint of a run, read back."""
    result = train(overrides, folder)
    saved = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    return {"figures": dict(result.figures), "findings": [str(f) for f in result.findings], "saved": saved}


def train_ranks(world: int, overrides: list[str], folder: Path) -> list[dict[str, Any]]:
    """The same run on `world` ranks; what each found."""
    return run_ranks(world, _weights, overrides, str(folder), timeout=180)
