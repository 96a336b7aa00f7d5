"""The monitor in a loop of one's own that uses Hugging Face Accelerate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ddp_streammon.adapters.common import Guest, Words
from ddp_streammon.evaluation import Evaluation, Items, Score
from ddp_streammon.streams import StreamLike


class StreamWatch(Guest):
    """`with StreamWatch(accelerator, model, optimizer, streams) as watch:` around a loop, after `accelerator.prepare`.

    `watch.step(loss, samples)` comes after `accelerator.backward(loss)` and before `clip_grad_norm_`, for every
    micro-batch: it measures where gradients are synchronised, unscaled. Figures go to the accelerator's trackers every
    `log_every` steps, findings to the terminal; `save_state` and `load_state` carry its state; the end of the block
    closes it, also by an exception. Other arguments: see `Guest`.
    """

    words = Words(groups="before accelerator.prepare", clip="accelerator.clip_grad_norm_(max_norm)")

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        streams: Mapping[str, StreamLike] | None = None,
        *,
        log_every: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(streams, **options)
        self._accelerator = accelerator
        given = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self._begin(
            model,
            [getattr(one, "optimizer", one) for one in given],
            lambda figures, step: accelerator.log(figures, step=step),
            every=log_every,
            main=accelerator.is_main_process,
            accumulate=accelerator.gradient_accumulation_steps,
        )
        accelerator.register_for_checkpointing(self.running)

    def step(self, loss: Tensor, samples: int | None = None, **numbers: Any) -> None:
        """A micro-batch: its mean `loss` over `samples`; other `numbers` are those of `StreamMonitor.step`, of the
        micro-batch whose gradients are synchronised. Comm: one all_reduce(SUM) there, else none. Sync: none."""
        self._micro.mean(loss, samples)
        if self._accelerator.sync_gradients:
            self._step(scaler=self._accelerator.scaler, **numbers)

    def evaluate(self, loader: DataLoader[Any], score: Score | None = None) -> Evaluation:
        """`StreamMonitor.evaluate` on a loader of `accelerator.prepare`, each of its items once."""
        return self.running.evaluate(whole(loader), score or self._score)


def whole(loader: DataLoader[Any]) -> Items:
    """What a prepared loader shards, for the monitor to share out: without the items that even it up."""
    sampler = loader.batch_sampler
    if not isinstance(sampler, BatchSamplerShard):
        return Items(loader, "loader")
    made: DataLoader[Any] = DataLoader(
        loader.dataset, batch_sampler=sampler.batch_sampler, collate_fn=loader.collate_fn
    )
    return Items(made, "loader")
