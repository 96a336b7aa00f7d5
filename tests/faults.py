"""Models and data that fail at a moment of the test's choosing, for the application's `_target_`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ddp_streammon.train.data import StreamData, synthetic
from ddp_streammon.train.models import multi_mlp

SMALL = (
    *("data=synthetic", "streams=synthetic", "model=none", "trainer.progress=false", "sinks.console.enabled=false"),
    *("data.streams.stream1=[8]", "data.streams.stream2=[4]", "data.num_classes=3", "data.validation=24"),
    *("+model.hidden=[8]", "trainer.batch_size=4", "data.train=48", "trainer.checkpoint_every=1"),
)
"""The application at its smallest: 48 / (4 x ranks) steps an epoch. A test adds `model._target_`."""


def service_processes() -> list[int]:
    """The processes of W&B's service that this process has started."""
    children = Path("/proc/self/task").glob("*/children")
    found = [int(pid) for file in children for pid in file.read_text().split()]
    return [pid for pid in found if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def killed(
    streams: Mapping[str, Any], num_classes: int, hidden: Sequence[int], at: int, victims: Sequence[int]
) -> nn.Module:
    """In its n-th start a job loses rank `victims[n]`, in the training forward `at` of that start, two seconds into it:
    W&B has rows on disk a second after they are logged, and what it loses before nobody sends again."""
    victim = dict(enumerate(victims)).get(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))

    def kill(module: nn.Module) -> None:
        if rank() == victim:
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)

    return _at(multi_mlp(streams, num_classes, hidden, dropout_p=0.2), at, kill)


def service_killed(streams: Mapping[str, Any], num_classes: int, hidden: Sequence[int], at: int) -> nn.Module:
    """W&B's service is killed in the training forward `at`."""

    def kill(module: nn.Module) -> None:
        (service,) = service_processes()
        os.kill(service, signal.SIGKILL)

    return _at(multi_mlp(streams, num_classes, hidden), at, kill)


def nonfinite(streams: Mapping[str, Any], num_classes: int, hidden: Sequence[int], at: int) -> nn.Module:
    """Every gradient is nan from the training forward `at` on."""

    def poison(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.register_hook(lambda gradient: gradient * float("nan"))

    return _at(multi_mlp(streams, num_classes, hidden), at, poison)


def slow(streams: Mapping[str, Any], num_classes: int, hidden: Sequence[int], seconds: float) -> nn.Module:
    """A step takes `seconds`."""
    model = multi_mlp(streams, num_classes, hidden)
    model.register_forward_pre_hook(lambda module, _: time.sleep(seconds if module.training else 0.0))
    return model


def _at(model: nn.Module, at: int, fault: Any) -> nn.Module:
    """The model, to which `fault` happens at the start of its training forward number `at` (the first is 1)."""
    count = 0

    def hook(module: nn.Module, _: Any) -> None:
        nonlocal count
        count += module.training
        if module.training and count == at:
            fault(module)

    model.register_forward_pre_hook(hook)
    return model


class Broken(Dataset[tuple[Tensor, ...]]):
    """Item `at` cannot be read."""

    def __init__(self, items: Dataset[tuple[Tensor, ...]], at: int) -> None:
        self.items, self.at = items, at

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if index == self.at:
            raise OSError(f"item {index} is torn")
        return self.items[index]


class Drawing(Dataset[tuple[Tensor, ...]]):
    """Reading an item draws a random number, as augmentation does."""

    def __init__(self, items: Dataset[tuple[Tensor, ...]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        first, *rest = self.items[index]
        return first * torch.rand(()), *rest


def drawing(**arguments: Any) -> StreamData:
    """Synthetic data whose training items are augmented."""
    data = synthetic(**arguments)
    own = data.validation, None, data.streams, data.num_classes, data.train_eval, data.collate
    return StreamData(Drawing(data.train), *own)


def torn(at: int, **arguments: Any) -> StreamData:
    """Synthetic data whose validation item `at` cannot be read."""
    data = synthetic(**arguments)
    return StreamData(
        data.train, Broken(data.validation, at), None, data.streams, data.num_classes, data.train_eval, data.collate
    )
