"""Early stopping per stream: each stream stops at its own best epoch, the others go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddp_streammon.train.optim import BestSoFar, encoders_of, freeze_group, groups_of
from ddp_streammon.train.sharded import laid_out, whole


@dataclass(frozen=True)
class Criteria:
    """When a stream stops."""

    patience: int
    """Evaluations in a row without an improvement after which the stream is frozen."""
    min_delta: float = 0.0
    """An improvement is more than this, in the metric's unit."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")
        if self.min_delta < 0.0:
            raise ValueError(f"min_delta must not be negative, got {self.min_delta}")


class _Stream:
    """One stream's criteria, best figures and best tensors."""

    def __init__(self, criteria: Criteria, mode: str, parts: Sequence[nn.Module | nn.Parameter]) -> None:
        self.criteria = criteria
        self.progress = BestSoFar(mode, criteria.min_delta)
        self.parts = tuple(parts)
        self.best_tensors: list[Tensor] = []
        self.best_epoch: int | None = None
        self.frozen = False

    def tensors(self) -> list[Tensor]:
        """Parameters and buffers, each once, in a fixed order; asked for anew since Module.to replaces
        buffers.
        """
        found: dict[int, Tensor] = {}
        for part in self.parts:
            tensors = [*part.parameters(), *part.buffers()] if isinstance(part, nn.Module) else [part]
            found.update((id(tensor), tensor) for tensor in tensors)
        return list(found.values())

    def keep(self, epoch: int) -> None:
        self.best_epoch = epoch
        self.best_tensors = [tensor.detach().clone() for tensor in self.tensors()]

    def restore(self) -> None:
        """Put the best tensors back; without any (no finite metric so far) the present ones stay."""
        if not self.best_tensors:
            return
        with torch.no_grad():
            for tensor, best in zip(self.tensors(), self.best_tensors, strict=True):
                tensor.copy_(best)


class StreamEarlyStopping:
    """Freezes a stream when its own validation metric has stopped improving, at its best weights and buffers.

    `streams` says which streams may stop and when. `modules` maps a stream to its modules, or to parameters
    that are in no module of its own (default: the stream's entry of `model.encoders`). `mode` is max where a
    higher metric is better, min where a lower one is.

    What is kept and restored are the parameters and the buffers (BatchNorm's running statistics), one copy on
    their device. Frozen means lr, weight decay and momentum of the stream's groups at zero, never
    requires_grad, see `optim.freeze_group`; and its modules in eval mode, so that buffers stand still, which
    lasts until the next `model.train()`: call `apply_modes()` after each. Metrics must be equal on every
    rank; nothing is communicated. Where ranks have buffers of their own, DistributedDataParallel's next
    forward makes those restored on rank 0 everyone's, as in every step (under FSDP2 `parallel.share_buffers`).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        streams: Mapping[str, Criteria],
        modules: Mapping[str, Sequence[nn.Module | nn.Parameter]] | None = None,
        mode: str = "max",
    ) -> None:
        owned = modules if modules is not None else {name: [m] for name, m in encoders_of(model).items()}
        unknown = [name for name in streams if name not in owned]
        if not streams or unknown:
            raise ValueError(f"streams must name some of {', '.join(owned)}, got {', '.join(unknown) or 'none'}")
        self.optimizer = optimizer
        self._streams: dict[str, _Stream] = {}
        for name, criteria in streams.items():
            groups_of(optimizer, name)
            self._streams[name] = _Stream(criteria, mode, owned[name])

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the frozen streams."""
        return tuple(name for name, stream in self._streams.items() if stream.frozen)

    @property
    def all_frozen(self) -> bool:
        """Whether every stream that may stop has stopped: training can end."""
        return len(self.frozen) == len(self._streams)

    @property
    def best(self) -> dict[str, tuple[float, int]]:
        """Stream -> best metric and its epoch, for the streams that have one."""
        return {
            name: (stream.progress.best, stream.best_epoch)
            for name, stream in self._streams.items()
            if stream.progress.best is not None and stream.best_epoch is not None
        }

    def update(self, metrics: Mapping[str, float], epoch: int) -> list[str]:
        """Take one validation metric per stream that is not frozen yet; returns the names newly frozen.

        A nan or infinite metric counts as no improvement. Raises ValueError, before anything changes, when a
        metric is missing.
        """
        active = {name: stream for name, stream in self._streams.items() if not stream.frozen}
        missing = [name for name in active if name not in metrics]
        if missing:
            raise ValueError(f"no metric for {', '.join(missing)}, got {', '.join(metrics) or 'none'}")
        newly = []
        for name, stream in active.items():
            if stream.progress.update(float(metrics[name])):
                stream.keep(epoch)
            elif stream.progress.waited >= stream.criteria.patience:
                stream.restore()
                self._freeze(name)
                newly.append(name)
        return newly

    def apply_modes(self) -> None:
        """Put the frozen streams' modules in eval mode; call it after each `model.train()`."""
        for stream in self._streams.values():
            if stream.frozen:
                for part in stream.parts:
                    if isinstance(part, nn.Module):
                        part.eval()

    def state_dict(self) -> dict[str, Any]:
        """Per stream: progress, best epoch, whether it is frozen, and its best tensors as wholes, sharded ones on
        rank 0 alone.

        Comm: an all_gather of each tensor that is sharded.
        """
        return {
            name: {
                "progress": stream.progress.state_dict(),
                "best_epoch": stream.best_epoch,
                "frozen": stream.frozen,
                "best_tensors": [whole(tensor) for tensor in stream.best_tensors],
            }
            for name, stream in self._streams.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave and freeze again what was frozen; the model's weights are the
        caller's.

        Raises ValueError when the streams or the shapes of their tensors differ, before anything changes.
        """
        if set(state) != set(self._streams):
            raise ValueError(f"the state is of streams {', '.join(state)}, here are {', '.join(self._streams)}")
        for name, stream in self._streams.items():
            saved = [tuple(tensor.shape) for tensor in state[name]["best_tensors"]]
            if saved and saved != [tuple(tensor.shape) for tensor in stream.tensors()]:
                raise ValueError(f"the best tensors of {name} in the state do not fit its parameters and buffers")
        for name, stream in self._streams.items():
            given = state[name]
            stream.progress.load_state_dict(given["progress"])
            stream.best_epoch = given["best_epoch"]
            stream.best_tensors = [
                laid_out(best, tensor) for tensor, best in zip(stream.tensors(), given["best_tensors"], strict=False)
            ]
            if given["frozen"]:
                self._freeze(name)

    def _freeze(self, name: str) -> None:
        for group in groups_of(self.optimizer, name):
            freeze_group(group)
        self._streams[name].frozen = True
        self.apply_modes()
