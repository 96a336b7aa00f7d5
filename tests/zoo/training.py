"""A correct training program under DDP. A fault is a subclass that overrides the one method in which it lies."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DistributedSampler

from ddp_streammon.evaluation import classification
from ddp_streammon.train.models import MultiStreamModel
from tests.zoo.cases import Setup
from tests.zoo.data import CLASSES, Data, Loader, load
from tests.zoo.models import FEATURES, encoder

Groups = list[dict[str, Any]]
HEAD = "head"
"""The parameter group of what belongs to no stream."""


@dataclass
class Context:
    """What an adapter is given on each rank at the start."""

    ddp: nn.Module
    module: nn.Module
    optimizer: Optimizer | tuple[Optimizer, ...]
    rank: int
    world: int
    train_loader: Iterable[Sequence[Tensor]]
    val_loader: Iterable[Sequence[Tensor]]
    """Each rank's own items."""
    declared: Mapping[str, Any]
    """What a configuration would say: what the user means, not what the program does."""
    streams: Mapping[str, Sequence[str]]
    """Name -> names of its parameters in `module`, in the order of the inputs."""
    scaler: torch.amp.GradScaler | None = None
    score: Any = None
    """`score(model, batch)`: per-item figures, for `monitor.evaluate`."""


@dataclass
class Outcome:
    steps: int
    loss: float
    """On the validation items, at the end."""
    accuracy: float
    """nan where there are no classes."""
    train_loss: float
    """Mean of the last epoch."""
    seconds: float


class Training:
    """One rank of a training. `watchers` are told what happens."""

    find_unused = False
    task = "classification"

    def __init__(self, setup: Setup, rank: int, world: int) -> None:
        self.setup, self.rank, self.world = setup, rank, world
        self.step = self.epoch = 0
        torch.manual_seed(1000 + setup.seed)
        self.data = self.read()
        self.names = tuple(self.data.streams)
        self.model = self.network()
        self.ddp = DistributedDataParallel(self.model, find_unused_parameters=self.find_unused)
        torch.manual_seed(5000 + 10 * setup.seed + rank)
        self.optimizers = self.make_optimizers(self.groups())
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["initial_lr"] = group["lr"]
        self.sampler = self.make_sampler()
        self.loader = Loader(self.data.train, self.sampler, max(2, setup.batch // world))
        self.held_out = Loader(self.data.validation, range(rank, len(self.data.validation), world), 256)
        self.total = len(self.loader) * setup.epochs
        half = setup.autocast == "fp16"
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=20) if half else None

    # What is built ------------------------------------------------------------------------------------------------

    def read(self) -> Data:
        return load(self.setup.views, self.setup.items, self.setup.seed)

    def network(self) -> MultiStreamModel:
        """The same weights on every rank."""
        encoders = {name: self.encoder(place) for place, name in enumerate(self.data.streams)}
        return MultiStreamModel(encoders, FEATURES, self.outputs(), self.setup.fusion)

    def encoder(self, place: int) -> nn.Module:
        setup = self.setup
        return encoder(
            setup.encoder,
            list(self.data.streams.values())[place],
            width=_of(setup.width, place),
            depth=_of(setup.depth, place),
            activation=_of(setup.activation, place),
            dropout=setup.dropout,
        )

    def outputs(self) -> int:
        return CLASSES

    def encoder_of(self, place: int) -> Any:
        """The encoder of a stream, in the finished model."""
        return self.model.encoders[self.names[place]]

    def groups(self) -> Groups:
        """A parameter group for each stream, and one for fusion and head."""
        groups: Groups = []
        for place, name in enumerate(self.names):
            rate = self.setup.lr * _of(self.setup.lr_scale, place)
            decay = _of(self.setup.weight_decay, place)
            groups.append({"name": name, "params": _trained(self.encoder_of(place)), "lr": rate, "weight_decay": decay})
        rest = [*_trained(self.model.fusion), *_trained(self.model.fc)]
        groups.append({"name": HEAD, "params": rest, "lr": self.setup.lr, "weight_decay": self.setup.weight_decay[0]})
        return [group for group in groups if group["params"]]

    def make_optimizers(self, groups: Groups) -> tuple[Optimizer, ...]:
        if self.setup.optimizer == "sgd":
            return (torch.optim.SGD(groups, momentum=self.setup.momentum),)
        return ({"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.setup.optimizer](groups),)

    def make_sampler(self) -> DistributedSampler[Any]:
        return DistributedSampler(self.data.train, self.world, self.rank, seed=self.setup.seed)  # type: ignore[arg-type]

    def declared(self) -> dict[str, Any]:
        setup = self.setup
        rates = {name: setup.lr * _of(setup.lr_scale, place) for place, name in enumerate(self.names)}
        decays = {name: _of(setup.weight_decay, place) for place, name in enumerate(self.names)}
        return {
            "task": self.task,
            "num_classes": CLASSES if self.task == "classification" else None,
            "optimizer": setup.optimizer,
            "lr": {**rates, HEAD: setup.lr},
            "weight_decay": {**decays, HEAD: setup.weight_decay[0]},
            "schedule": setup.schedule,
            "clip": setup.clip,
            "accum": setup.accumulate,
            "dropout": setup.dropout,
            "total_steps": self.total,
            "steps_per_epoch": len(self.loader),
            "frozen_streams": [self.names[place] for place in setup.frozen],
        }

    def context(self) -> Context:
        named = [name for name, _ in self.model.named_parameters()]
        return Context(
            ddp=self.ddp,
            module=self.model,
            optimizer=self.optimizers if len(self.optimizers) > 1 else self.optimizers[0],
            rank=self.rank,
            world=self.world,
            train_loader=self.loader,
            val_loader=self.held_out,
            declared=self.declared(),
            streams={name: [n for n in named if n.startswith(f"encoders.{name}.")] for name in self.names},
            scaler=self.scaler,
            score=self.score,
        )

    # What happens in a step ---------------------------------------------------------------------------------------

    def set_mode(self) -> None:
        self.ddp.train()

    def set_epoch(self) -> None:
        self.sampler.set_epoch(self.epoch)

    def batch(self, inputs: list[Any], target: Tensor) -> tuple[list[Any], Tensor]:
        """What the loader's batch becomes before the model sees it."""
        return inputs, target

    def rate(self, group: Mapping[str, Any]) -> float:
        """The learning rate of a group now, as a share of its initial one."""
        done, warm_up = self.step / self.total, 0.1
        if self.setup.schedule == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        if self.setup.schedule == "warmup":
            past = (done - warm_up) / (1 - warm_up)
            return done / warm_up if done < warm_up else (1 + math.cos(math.pi * past)) / 2
        if self.setup.schedule == "warm_restarts":
            return (1 + math.cos(math.pi * (4 * done % 1))) / 2
        return 1.0

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def forward(self, *inputs: Any) -> Any:
        return self.ddp(*inputs)

    def loss(self, outputs: Any, target: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, target, label_smoothing=self.setup.label_smoothing)

    def backward(self, inputs: list[Any], target: Tensor) -> float:
        """Forward and backward of one batch; the loss."""
        with self.autocast():
            outputs = self.forward(*inputs)
            loss = self.loss(outputs.float() if isinstance(outputs, Tensor) else outputs, target)
        part = loss / self.setup.accumulate
        (self.scaler.scale(part) if self.scaler else part).backward()
        return loss.item()

    def before_step(self) -> None:
        """After the monitors looked, before the optimizers use the gradients."""
        if self.setup.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.setup.clip)

    def after_step(self) -> None:
        """After the optimizers."""

    def optimize(self) -> None:
        for optimizer in self.optimizers:
            if self.scaler:
                self.scaler.step(optimizer)
            else:
                optimizer.step()
        if self.scaler:
            self.scaler.update()

    def score(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Per-item `loss` (and `correct`) of a batch."""
        return classification()(model, batch)

    # The loop -----------------------------------------------------------------------------------------------------

    def run(self, watchers: Any) -> Outcome:
        """Train. `watchers.tell(method, *arguments)` is called at the moments of the adapters' interface."""
        watchers.tell("start", self.context())
        started = time.perf_counter()
        losses: list[float] = []
        loss = accuracy = math.nan
        for epoch in range(self.setup.epochs):
            self.epoch = epoch
            self.set_mode()
            self.set_epoch()
            losses = [self.train_on(batch, watchers) for batch in self.loader]
            loss, accuracy = self.evaluate()
            train_loss = sum(losses) / len(losses)
            stats = {"epoch": epoch, "train_loss": train_loss, "val_loss": loss, "val_acc": accuracy}
            watchers.tell("on_epoch_end", epoch, self.step, stats)
        return Outcome(self.step, loss, accuracy, sum(losses) / len(losses), time.perf_counter() - started)

    def train_on(self, loaded: list[Tensor], watchers: Any) -> float:
        """One batch: a step, or with accumulation a part of one."""
        began = time.perf_counter()
        inputs, target = self.batch(loaded[:-1], loaded[-1])
        watchers.tell("on_batch", self.step, *inputs, target)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * self.rate(group)
        if self.step % self.setup.accumulate == 0:
            self.zero_grad()
        last = (self.step + 1) % self.setup.accumulate == 0
        with contextlib.nullcontext() if last else self.ddp.no_sync():
            loss = self.backward(inputs, target)
        if last:
            watchers.tell("on_after_backward", self.ddp, self.step, loss, (*inputs, target))
            self.before_step()
            self.optimize()
            self.after_step()
            watchers.tell("on_after_step", self.ddp, self.step, loss, time.perf_counter() - began)
        self.step += 1
        return loss

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy over all ranks' validation items; leaves the model in eval mode, as loops do."""
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in self.held_out:
            figures = self.score(self.model, batch)
            correct = figures.get("correct")
            right = math.nan if correct is None else float(correct.sum())
            sums += torch.tensor([float(figures["loss"].sum()), right, len(batch[-1])], dtype=torch.float64)
        dist.all_reduce(sums)
        return float(sums[0] / sums[2]), float(sums[1] / sums[2])

    def autocast(self) -> AbstractContextManager[Any]:
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if self.setup.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast("cpu", dtypes[self.setup.autocast])


def _of(values: Sequence[Any], place: int) -> Any:
    """The value for a stream: the last one counts for all further streams."""
    return values[min(place, len(values) - 1)]


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
