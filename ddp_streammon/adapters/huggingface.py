"""The monitor as a callback of the Trainer of Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ddp_streammon.adapters.accelerate import whole
from ddp_streammon.adapters.common import Guest, Words, items_in

FILE = "ddp_streammon.pt"  # in each checkpoint's folder


class StreamCallback(Guest, TrainerCallback):  # type: ignore[misc]
    """`with StreamCallback(trainer, {"rgb": "rgb_tower", "depth": "depth_tower"}): trainer.train()`; see also `Guest`.

    Measures in `on_pre_optimizer_step`: once an accumulation, unscaled, but after the Trainer clips to `max_grad_norm`:
    steps then carry `clipped_to`; shares and ratios are right all the same. With `max_grad_norm=0` and `clip_norm=1.0`
    here they are clipped after they are measured. Figures go through `trainer.log` every `logging_steps`. With a
    `score` (`common.of_logits()`) `on_evaluate` evaluates. Its state lies in the checkpoints' folders.
    """

    words = Words(groups="Trainer(optimizers)", clip="StreamCallback(clip_norm)")

    def __init__(self, trainer: Any, streams: Any = None, *, clip_norm: float | None = None, **options: Any) -> None:
        super().__init__(streams, **options)
        if clip_norm and trainer.args.max_grad_norm:
            raise ValueError(f"clip_norm={clip_norm} needs TrainingArguments(max_grad_norm=0), or both clip")
        if self._score is not None and isinstance(trainer.eval_dataset, dict):
            raise ValueError(f"a score needs one eval_dataset, got {', '.join(trainer.eval_dataset)}")
        self._trainer, self._clip_norm = trainer, clip_norm
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        folders = (args.resume_from_checkpoint, f"{args.output_dir}/checkpoint-{state.global_step}")
        files = [Path(folder, FILE) for folder in folders if state.global_step and isinstance(folder, str)]
        self._begin(
            self._trainer.model_wrapped,
            [getattr(optimizer, "optimizer", optimizer)],
            lambda figures, step: self._trainer.log(figures),
            every=int(state.logging_steps),
            main=self._trainer.is_world_process_zero(),
            saved=next((torch.load(file, weights_only=True) for file in files if file.is_file()), None),
            undo=model.register_forward_hook(self._forwarded, with_kwargs=True).remove,
            accumulate=args.gradient_accumulation_steps,
            clip_norm=self._clip_norm,
            total_steps=state.max_steps,
        )

    def _forwarded(self, model: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        loss = output.get("loss") if isinstance(output, dict) else output[0]
        if model.training and isinstance(loss, Tensor) and loss.dim() == 0:
            if named.get("num_items_in_batch") is None:
                self._micro.mean(loss, items_in(named or inputs))
            else:  # a part of the mean over the items of all micro-batches, and of all ranks where these are averaged
                ranks = self._trainer.args.world_size if self._trainer.args.average_tokens_across_devices else 1
                self._micro.add(loss, 0.0 if self._micro else 1 / ranks, items_in(named))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        flag = {"clipped_to": args.max_grad_norm} if args.max_grad_norm else {}
        self._step(scaler=self._trainer.accelerator.scaler, epoch=state.epoch, **flag)
        if self._clip_norm:
            self.running.clip_grad_norm_(self._clip_norm)

    def on_evaluate(self, args: Any, state: Any, control: Any, eval_dataloader: Any, **_: Any) -> None:
        self._evaluate(whole(eval_dataloader))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = self.running.state_dict()  # on every rank, so that all bring in the same steps
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and folder.is_dir():  # a hyperparameter search has another
            torch.save(saved, folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._close()
