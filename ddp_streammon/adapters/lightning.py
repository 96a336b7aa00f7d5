"""The monitor as a callback of Lightning's Trainer (the package `lightning`, or `pytorch_lightning`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ddp_streammon.adapters.common import Guest, Words, items_in
from ddp_streammon.evaluation import Items

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback


class StreamCallback(Guest, Callback):  # type: ignore[misc]
    """`Trainer(callbacks=[StreamCallback({"rgb": "rgb_tower", "depth": "depth_tower"})])`; see `Guest` for the rest.

    Measures in `on_before_optimizer_step`: once an accumulation, unscaled, before clipping. Figures go to the trainer's
    loggers every `log_every_n_steps`, findings to the terminal. With a `score` each validation of `fit` evaluates the
    first validation loader. Its state is in the checkpoint; it is closed when `fit` ends, also by an exception.
    With several optimizers (manual optimization) it measures at the first one's step after each backward pass.
    """

    words = Words(groups="configure_optimizers", clip="Trainer(gradient_clip_val)")
    _saved: dict[str, Any] | None = None
    _items: int | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        by_value = str(trainer.gradient_clip_algorithm).endswith("value")
        steps = trainer.estimated_stepping_batches
        self._begin(
            trainer.model,
            trainer.optimizers,
            lambda figures, step: [logger.log_metrics(figures, step - 1) for logger in trainer.loggers],
            every=trainer.log_every_n_steps,
            main=trainer.is_global_zero,
            saved=self._saved,
            accumulate=trainer.accumulate_grad_batches,
            clip_norm=None if by_value else trainer.gradient_clip_val or None,
            total_steps=int(steps) if 0 < steps < float("inf") else None,
        )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._items = items_in(batch)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        unscaled = loss.detach() if scaler is None else loss.detach() / scaler._scale
        self._micro.mean(unscaled * trainer.accumulate_grad_batches, self._items)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._micro:
            self._step(scaler=getattr(trainer.precision_plugin, "scaler", None), epoch=trainer.current_epoch)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            loaders, batches = trainer.val_dataloaders, trainer.num_val_batches[0] * trainer.world_size
            loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
            self._evaluate(Items(loader, "val_dataloader", max_batches=None if batches == float("inf") else batches))

    def state_dict(self) -> dict[str, Any]:
        return (self._saved or {}) if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close(1)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._close()
