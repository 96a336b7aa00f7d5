"""Checkpoints: everything that a resumed run needs to go on exactly where the other stopped."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.utils._pytree import tree_map_only

from ddp_streammon.collective import Collective
from ddp_streammon.train.config import AUTO, CHECKPOINT, ConfigError
from ddp_streammon.train.sharded import laid_out, whole

KEYS = frozenset(("epoch", "steps", "model", "optimizer", "scaler", "schedulers", "monitor", "rng", "figures"))
"""What tells a checkpoint of the application from other files."""


def find(resume: str | None, run_dir: Path, collective: Collective) -> Path | None:
    """The checkpoint to go on from, if any; `resume` as in the configuration.

    A job that torchrun has restarted goes on from its own, also where `resume` named the one that it began with.
    Errors: ConfigError where ranks do not see the same. Comm: one all_gather_object.
    """
    if resume is None:
        return None
    own = run_dir / CHECKPOINT
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # some hosts' ranks may know, others not
    seen, known = zip(*collective.gather((own.is_file(), restarted)), strict=True)
    if resume != AUTO and not any(known):
        return Path(resume)
    if len(set(seen)) > 1:
        raise ConfigError(
            f"rank {seen.index(True)} sees a checkpoint {str(own)!r}, rank {seen.index(False)} does not: the run "
            "directory must be one that all hosts share, or say trainer.resume=null to start anew"
        )
    if seen[0]:
        return own
    return None if resume == AUTO else Path(resume)


def model_state(model: nn.Module) -> dict[str, Any]:
    """The model's state_dict with whole tensors on the CPU; where there are several ranks, on rank 0 alone.

    Comm: an all_gather of what is sharded.
    """
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_model(model: nn.Module, state: dict[str, Any]) -> None:
    """Load what `model_state` gave, on every rank, in the model's own layout."""
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state_dict with whole tensors, sharded ones on rank 0 alone.

    Parameters go by their numbers, which are the same in every layout. (What torch's `get_optimizer_state_dict` gives
    cannot be loaded where an optimizer keeps no tensors, as SGD without momentum.)
    Comm: an all_gather of what is sharded.
    """
    return tree_map_only(torch.Tensor, whole, optimizer.state_dict())  # type: ignore[no-any-return]


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `optimizer_state` gave, in the layout of the optimizer's parameters. Comm: a scatter of each tensor."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {
        number: {
            name: laid_out(value, parameters[number])
            if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": own})


def rng_state() -> dict[str, Any]:
    """This process's random states (Python, NumPy, torch on the CPU and the current CUDA device), as plain values."""
    kind, words, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, numpy.asarray(words).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, words, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, numpy.array(words, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`; a reader sees the old file or the new one, never half of it."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load(path: str | Path, model: nn.Module, key: str = "trainer.resume") -> dict[str, Any]:
    """Read a checkpoint onto the CPU: tensors and plain values only, so that a file from elsewhere cannot run code.

    `key` is where the configuration names the file.
    Errors: ConfigError for a file that is no checkpoint of this application, or one of another model.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle each have their own
        raise ConfigError(f"{key}: {str(path)!r} is no checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or not state.keys() >= KEYS:
        raise ConfigError(f"{key}: {str(path)!r} holds no run of this application; give its {CHECKPOINT}")
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    saved = {name: tensor.shape for name, tensor in state["model"].items()}
    if own != saved:
        names = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
        remedy = "resume with the configuration that it was trained with, or say trainer.resume=null to start anew"
        if key != "trainer.resume":
            remedy = "give this run the model's options that it was trained with"
        raise ConfigError(
            f"{key}: {str(path)!r} is of another model ({', '.join(names[:3])} and their like differ): {remedy}"
        )
    return state
