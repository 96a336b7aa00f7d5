"""Trainings of two ranks in each framework of the adapters, and the plain loop that they are to agree with."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, TensorDataset

import ddp_streammon as streammon
from ddp_streammon.adapters.common import of_logits
from ddp_streammon.sinks import MemorySink
from tests.networks import STREAMS, batch, network

ITEMS, BATCH, ACCUMULATE, EPOCHS, LR = 30, 3, 2, 2, 0.1
"""5 micro-batches a rank and epoch: the last optimizer step of an epoch has one alone."""
STEPS = 3 * EPOCHS
CLIP = 0.05
"""Less than any step's norm."""
Batch = tuple[Tensor, ...]


def data() -> TensorDataset:
    return TensorDataset(*batch(ITEMS))


def held_out() -> TensorDataset:
    return TensorDataset(*batch(20, seed=2))


class Collectives(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def figures(sink: MemorySink | streammon.StreamMonitor) -> dict[str, list[float]]:
    """Some of what was measured, over steps."""
    keys = ("rgb_grad_norm", "depth_grad_norm", "shared_grad_norm", "rgb_grad_share", "loss", "samples")
    assert isinstance(sink, streammon.StreamMonitor)
    return {key: sink.history[key] for key in keys}


def validation_loss(model: nn.Module) -> float:
    """The mean over the held-out items, each once."""
    rgb, depth, target = held_out().tensors
    with torch.no_grad():
        return float(functional.cross_entropy(model.eval()(rgb, depth), target))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), LR)


def strided(rank: int) -> list[Batch]:
    """A rank's batches where its items are a stride of all."""
    return list(DataLoader(TensorDataset(*(t[rank::2] for t in data().tensors)), BATCH))


def alternate(rank: int) -> list[Batch]:
    """A rank's batches where whole batches go to the ranks in turn."""
    return [own for number, own in enumerate(DataLoader(data(), BATCH)) if number % 2 == rank]


def plain(batches: Sequence[Batch], *, divisor: int | None, clip_first: bool = False) -> dict[str, Any]:
    """The loop without a framework. `divisor` of each micro-batch's loss; None: the number of the step's."""
    model = DistributedDataParallel(network())
    optimizer = optimizer_of(model)
    monitor = streammon.watch(model, optimizer, STREAMS)
    for _ in range(EPOCHS):
        for start in range(0, len(batches), ACCUMULATE):
            micro = batches[start : start + ACCUMULATE]
            losses = []
            for place, (rgb, depth, target) in enumerate(micro):
                with contextlib.nullcontext() if place == len(micro) - 1 else model.no_sync():
                    losses.append(functional.cross_entropy(model(rgb, depth), target))
                    (losses[-1] / (divisor or len(micro))).backward()
            if clip_first:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            monitor.step(loss=torch.stack(losses).mean(), samples=BATCH * len(micro))
            if not clip_first:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    monitor.close()
    return {"figures": figures(monitor), "weights": weights(model.module)}


def _environment() -> None:
    """What torchrun would say; the process group is there already."""
    rank, world = dist.get_rank(), dist.get_world_size()
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in named.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def printed() -> Iterator[io.StringIO]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        yield text


def snippet(framework: str, **names: Any) -> str:
    """Run the README's snippet of a framework; what it prints on rank 0."""
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    blocks = re.findall(r"```py\n(.*?)```", readme, re.S)
    (code,) = (block for block in blocks if f"from ddp_streammon.adapters.{framework} import" in block)
    with printed() as text:
        exec(code, {"torch": torch, **names})
    return text.getvalue()


class Towers(nn.Module):
    """The network under the names that the README uses."""

    def __init__(self) -> None:
        super().__init__()
        net = network()
        self.rgb_tower, self.depth_tower, self.mix = net.rgb, net.depth, net.mix

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        logits: Tensor = self.mix(torch.cat([self.rgb_tower(rgb), self.depth_tower(depth)], dim=1))
        return logits


class _Interrupted(Exception):
    """What ends a training of the tests."""


def ended(memory: MemorySink) -> int | None:
    """The exit code that the sinks were told; None where they were told nothing (rank 1 has none)."""
    return None if memory.outcome is None else memory.outcome.exit_code


# Lightning --------------------------------------------------------------------------------------------------------


def lightning(folder: str) -> dict[str, Any]:
    """Trainings by Lightning's Trainer, and what became of them."""
    _environment()
    import lightning as framework
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.plugins import MixedPrecision
    from lightning.pytorch.strategies import DDPStrategy

    from ddp_streammon.adapters.lightning import StreamCallback

    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False}

    class Lit(framework.LightningModule):
        def __init__(self, fails_at: int | None = None, net: nn.Module | None = None) -> None:
            super().__init__()
            self.net, self.fails_at = net or network(), fails_at

        def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
            return self.net(rgb, depth)

        def training_step(self, given: Batch, number: int) -> Tensor:
            if self.fails_at is not None and self.global_step >= self.fails_at:
                raise _Interrupted
            rgb, depth, target = given
            return functional.cross_entropy(self(rgb, depth), target)

        def validation_step(self, given: Batch, number: int) -> None:
            rgb, depth, target = given
            self.log("plain_val_loss", functional.cross_entropy(self(rgb, depth), target))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self)

    class Manual(Lit):
        """One backward pass, and two optimizers."""

        automatic_optimization = False

        def training_step(self, given: Batch, number: int) -> None:
            self.manual_backward(super().training_step(given, number))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            rest = [*self.net.rgb.parameters(), *self.net.mix.parameters()]
            return [torch.optim.SGD(own, LR) for own in (rest, self.net.depth.parameters())]

    def trainer(epochs: int = EPOCHS, **options: Any) -> Any:
        return framework.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo"),
            max_epochs=epochs,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **{"accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": CLIP, **quiet, **options},
        )

    def fit(made: Any, module: Any, **options: Any) -> dict[str, int]:
        with Collectives() as calls:
            sampler = DistributedSampler(data(), shuffle=False)
            made.fit(module, DataLoader(data(), BATCH, sampler=sampler), DataLoader(held_out(), 4), **options)
        return dict(calls.counts)

    without = Lit()
    counts = {"without": fit(trainer(), without)}
    watched, memory = Lit(), MemorySink()
    callback = StreamCallback(STREAMS, sinks=[memory])
    logger = CSVLogger(folder, name="csv", version="0")
    with printed() as text:
        made = trainer(callbacks=[callback], logger=logger)
        counts["with"] = fit(made, watched)
        made.save_checkpoint(f"{folder}/whole.ckpt")

    scored, again = StreamCallback(STREAMS, score=streammon.classification()), StreamCallback(STREAMS)
    half = trainer(1, callbacks=[scored])
    resumed = Lit()
    with printed():
        fit(half, half_way := Lit())
        half.save_checkpoint(f"{folder}/half.ckpt")
        fit(trainer(callbacks=[again]), resumed, ckpt_path=f"{folder}/half.ckpt")

    failed, failure = StreamCallback(STREAMS, sinks=[told := MemorySink()]), "nothing was raised"
    with printed():
        try:
            fit(trainer(callbacks=[failed]), Lit(fails_at=2))
        except _Interrupted:
            failure = "raised"
    scaler = torch.amp.GradScaler("cpu")
    half_precision = StreamCallback(STREAMS)
    one, several = StreamCallback(STREAMS), StreamCallback(STREAMS)
    each = {"gradient_clip_val": None, "accumulate_grad_batches": 1}
    with printed():
        fit(trainer(1, callbacks=[half_precision], plugins=[MixedPrecision("16-mixed", "cpu", scaler)]), Lit())
        fit(trainer(1, callbacks=[one], **each), by_one := Lit())
        fit(trainer(1, callbacks=[several], **each), by_two := Manual())
    os.chdir(folder)
    loaders = {"train_loader": DataLoader(data(), BATCH), "val_loader": DataLoader(held_out(), 4)}
    return {
        "snippet": snippet("lightning", module=Lit(net=Towers()), **loaders),
        "scaled": figures(half_precision.running),
        "several": [figures(one.running), figures(several.running)],
        "by_several": [weights(by_one.net), weights(by_two.net)],
        "plain": plain(strided(dist.get_rank()), divisor=ACCUMULATE),
        "figures": figures(callback.running),
        "counts": counts,
        "weights": [weights(module.net) for module in (without, watched, resumed)],
        "printed": text.getvalue(),
        "ended": [ended(memory), ended(told)],
        "resumed": (again.running.calls, figures(again.running)),
        "evaluated": {key: scored.running.history[key] for key in ("full_val_loss", "rgb_val_uses")},
        "validation": [validation_loss(half_way.net)],
        "failed": (failure, failed.running.calls),
        "intent": callback.running.config.intent,
        "logged": Path(folder, "csv", "0", "metrics.csv").read_text() if dist.get_rank() == 0 else "",
    }


# Accelerate -------------------------------------------------------------------------------------------------------


def accelerated(folder: str) -> dict[str, Any]:
    """A loop of one's own that uses Accelerate."""
    _environment()
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker
    from accelerate.utils import ProjectConfiguration

    from ddp_streammon.adapters.accelerate import StreamWatch

    logged: list[tuple[dict[str, float], int]] = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "memory", False, None

        def __init__(self) -> None:
            super().__init__()

        def log(self, values: dict[str, float], step: int, **_: Any) -> None:
            logged.append((values, step))

    def readme() -> str:
        accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE)
        net = Towers()
        made = accelerator.prepare(net, optimizer_of(net), DataLoader(data(), BATCH), DataLoader(held_out(), 4))
        names = dict(zip(("model", "optimizer", "train_loader", "val_loader"), made, strict=True))
        return snippet("accelerate", accelerator=accelerator, **names)

    def train(
        epochs: int, *, watched: bool, start: str = "", save: str = "", fails_at: int = 1000, tracker: Any = None
    ) -> dict[str, Any]:
        accelerator = Accelerator(
            gradient_accumulation_steps=ACCUMULATE,
            log_with=tracker,
            project_config=ProjectConfiguration(project_dir=folder),
        )
        if tracker is not None:
            accelerator.init_trackers("test")
        net = network()
        model, optimizer, loader, validation = accelerator.prepare(
            net, optimizer_of(net), DataLoader(data(), BATCH), DataLoader(held_out(), 4)
        )
        memory, steps, evaluation = MemorySink(), 0, None
        around: Any = StreamWatch(accelerator, model, optimizer, STREAMS, sinks=[memory]) if watched else None
        if start:
            accelerator.load_state(start)
        with Collectives() as calls, contextlib.suppress(_Interrupted), around or contextlib.nullcontext():
            for _ in range(epochs):
                for rgb, depth, target in loader:
                    with accelerator.accumulate(model):
                        loss = functional.cross_entropy(model(rgb, depth), target)
                        accelerator.backward(loss)
                        if around is not None:
                            around.step(loss, len(target))
                        if accelerator.sync_gradients:
                            accelerator.clip_grad_norm_(model.parameters(), CLIP)
                            steps += 1
                        optimizer.step()
                        optimizer.zero_grad()
                        if steps == fails_at:
                            raise _Interrupted
            if around is not None and start:
                evaluation = around.evaluate(validation)
        if save:
            accelerator.save_state(save)
        watch = around.running if around is not None else None
        return {
            "validation": [validation_loss(net)],
            "counts": dict(calls.counts),
            "weights": weights(net),
            "watch": watch,
            "ended": ended(memory),
            "evaluation": evaluation,
        }

    with printed() as text:
        without = train(EPOCHS, watched=False)
        whole = train(EPOCHS, watched=True, tracker=Tracker())
        train(1, watched=True, save=f"{folder}/half")
        resumed = train(1, watched=True, start=f"{folder}/half")
        failed = train(1, watched=True, fails_at=2)
    return {
        "snippet": readme(),
        "plain": plain(alternate(dist.get_rank()), divisor=ACCUMULATE),
        "figures": figures(whole["watch"]),
        "counts": {"without": without["counts"], "with": whole["counts"]},
        "weights": [run["weights"] for run in (without, whole, resumed)],
        "printed": text.getvalue(),
        "ended": [whole["ended"], failed["ended"]],
        "resumed": (resumed["watch"].calls, figures(resumed["watch"])),
        "evaluated": {key: [resumed["evaluation"][key]] for key in ("full_val_loss", "rgb_val_uses")},
        "validation": resumed["validation"],
        "failed": ("raised", failed["watch"].calls),
        "intent": whole["watch"].config.intent,
        "logged": logged,
    }


# Hugging Face -----------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """The two streams as transformers has models: named inputs, and a loss over `num_items_in_batch` where given."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or network()

    def forward(self, rgb: Tensor, depth: Tensor, labels: Tensor | None = None, **named: Any) -> dict[str, Tensor]:
        logits = self.net(rgb, depth)
        if labels is None:
            return {"logits": logits}
        items = named.get("num_items_in_batch")
        loss = functional.cross_entropy(logits, labels, reduction="mean" if items is None else "sum")
        return {"loss": loss if items is None else loss / items, "logits": logits}


def rows(items: TensorDataset) -> list[dict[str, Any]]:
    return [{"rgb": rgb, "depth": depth, "labels": int(target)} for rgb, depth, target in items]


def huggingface(folder: str) -> dict[str, Any]:
    """Trainings by the Trainer of transformers."""
    _environment()
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from ddp_streammon.adapters.huggingface import StreamCallback

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class Fails(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise _Interrupted

    def trainer(name: str, *, callbacks: Sequence[Any] = (), net: nn.Module | None = None, **options: Any) -> Any:
        module = Classifier(net)
        arguments = TrainingArguments(
            **{
                "output_dir": f"{folder}/{name}",
                "use_cpu": True,
                "ddp_backend": "gloo",
                "report_to": [],
                "disable_tqdm": True,
                "per_device_train_batch_size": BATCH,
                "per_device_eval_batch_size": 4,
                "gradient_accumulation_steps": ACCUMULATE,
                "num_train_epochs": EPOCHS,
                "lr_scheduler_type": "constant",
                "max_grad_norm": CLIP,
                "logging_steps": 1,
                "save_strategy": "no",
                **options,
            }
        )
        return InOrder(
            model=module,
            args=arguments,
            train_dataset=rows(data()),
            eval_dataset=rows(held_out()),
            optimizers=(optimizer_of(module), None),
            callbacks=list(callbacks),
        )

    def train(made: Any, watch: Any = None, **options: Any) -> dict[str, int]:
        with Collectives() as calls, watch or contextlib.nullcontext():
            made.train(**options)
        return dict(calls.counts)

    with printed() as text:
        without = trainer("without")
        counts = {"without": train(without)}
        with_, memory = trainer("with", eval_strategy="epoch", save_strategy="epoch"), MemorySink()
        callback = StreamCallback(with_, STREAMS, sinks=[memory], score=of_logits())
        train(with_, callback)
        bare = trainer("bare")
        counts["with"] = train(bare, StreamCallback(bare, STREAMS))
        continued = trainer("with")
        again = StreamCallback(continued, STREAMS)
        train(continued, again, resume_from_checkpoint=f"{folder}/with/checkpoint-3")
        own = trainer("own", max_grad_norm=0.0)
        unclipped = StreamCallback(own, STREAMS, clip_norm=CLIP)
        train(own, unclipped)
        fails, failure = trainer("fails", callbacks=[Fails()]), "nothing was raised"
        failed = StreamCallback(fails, STREAMS, sinks=[told := MemorySink()])
        try:
            train(fails, failed)
        except _Interrupted:
            failure = "raised"
    refused = []
    several = SimpleNamespace(args=own.args, eval_dataset={"near": [], "far": []})
    for made, option in ((bare, {"clip_norm": CLIP}), (several, {"score": of_logits()})):
        try:
            StreamCallback(made, STREAMS, **option)
        except ValueError as error:
            refused.append(str(error))
    mine = alternate(dist.get_rank())
    return {
        "snippet": snippet("huggingface", trainer=trainer("readme", net=Towers(), eval_strategy="epoch")),
        "refused": refused,
        "plain": plain(mine, divisor=None, clip_first=True),
        "plain_unclipped": plain(mine, divisor=None),
        "figures": figures(callback.running),
        "unclipped": figures(unclipped.running),
        "clipped_to": callback.running.history["clipped_to"],
        "counts": counts,
        "weights": [weights(made.model.net) for made in (without, with_, continued, own)],
        "printed": text.getvalue(),
        "ended": [ended(memory), ended(told)],
        "resumed": (again.running.calls, figures(again.running)),
        "evaluated": {key: callback.running.history[key] for key in ("full_val_loss", "rgb_val_uses")},
        "validation": [row["eval_loss"] for row in with_.state.log_history if "eval_loss" in row],
        "failed": (failure, failed.running.calls),
        "intent": unclipped.running.config.intent,
        "logged": with_.state.log_history,
    }
