"""Each rank's own gradient, before the average: read in the backward pass, in time before DDP reduces it.

A leaf's post-accumulate hook runs before DistributedDataParallel's own hook of that parameter, so a bucket cannot be
reduced before the hook of its last parameter has run: there the whole bucket is read, where it can be (`_in_one`), or
each parameter in its own hook.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ddp_streammon.moments import NONFINITE, SQ_SUM, Reader, Source, reader
from ddp_streammon.shards import Piece, Share
from ddp_streammon.streams import StreamSet

_PATIENCE = 16
"""Steps after which DDP is no longer asked for its buckets; it rebuilds them once, in its first ones."""


_gradient: Source = attrgetter("grad")


@dataclass(eq=False)
class _Bucket:
    """Parameters that are read together, and which of them are ready in this backward pass."""

    numbers: Tensor
    """[P] 1 + their numbers over all streams"""
    streams: Tensor
    """[P]"""
    read: Reader
    divided_by: int = 1
    """By what DDP has divided all gradients but the last one when that one is ready."""
    ready: set[int] = field(default_factory=set)


class LocalGradients:
    """Squared norms and non-finite counts of this rank's own gradients, per stream.

    Of parameters under DistributedDataParallel, in the backward pass that synchronises (not within `no_sync`; what was
    accumulated there is included; so is the average of an earlier pass of the step that synchronised too). One read of
    the gradients, by bucket where and once that can be (`_in_one`), else by tensor. Gradients are left as they are.
    Comm: none. Sync: none.
    """

    def __init__(self, streams: StreamSet, model: nn.Module, device: torch.device) -> None:
        named = [(number, item) for number, stream in enumerate(streams.streams) for item in stream.parameters]
        self._stream_of = [number for number, _ in named]
        self._parameters = [item.parameter for _, item in named]
        self._num_streams = len(streams.streams)
        self._device = device
        self._number_of = {id(parameter): number for number, parameter in enumerate(self._parameters)}
        wrappers = (module for module in model.modules() if isinstance(module, DistributedDataParallel))
        self._models = [(wrapped, _reduced(wrapped)) for wrapped in wrappers]
        self._bucket_of: dict[int, _Bucket] = {}
        self._done: dict[_Bucket, Tensor] = {}
        """What was read in the last backward pass, [P, M] each, in its order."""
        self._taken = False
        self._asked = 0
        self.armed = True
        """Whether the next backward pass is to be read."""
        self._hooks: list[RemovableHandle] = []
        for wrapped, reduced in self._models:
            for parameter in reduced:
                number = self._number_of.get(id(parameter))
                if number is not None:
                    self._join([number])
                    hook = parameter.register_post_accumulate_grad_hook(self._hook(wrapped, number))  # type: ignore[no-untyped-call]
                    self._hooks.append(hook)
        seen = {self._stream_of[number] for number in self._bucket_of}
        missing = [name for number, name in enumerate(streams.names) if number not in seen]
        if missing:
            warnings.warn(
                f"no local gradients of {', '.join(missing)}: no trainable parameter of it is under "
                "DistributedDataParallel, which alone lets a rank's own gradient be seen before it is averaged "
                "(fully_shard reduces before any hook)",
                stacklevel=2,
            )

    def take(self, inverse_scale: float | Tensor) -> Tensor:
        """What the last backward pass left on this rank, without the loss scale; the same again until the next one.

        Shape: [2 S + 1] float64: each stream's squared norm (nan where nothing was read), each one's non-finite count,
        and 1 + the number, over all streams, of the first parameter of the backward pass with a non-finite gradient (0:
        none).
        """
        figures = torch.zeros(self._num_streams, 3, dtype=torch.float64, device=self._device)
        first = torch.zeros(1, dtype=torch.float64, device=self._device)
        if self._done:
            table = torch.cat(list(self._done.values()))
            bad = table[:, NONFINITE]
            read = torch.stack([table[:, SQ_SUM], bad, torch.ones_like(bad)], dim=1)
            figures.index_add_(0, torch.cat([bucket.streams for bucket in self._done]), read)
            worst = (bad > 0).int().argmax(dim=0, keepdim=True)
            numbers = torch.cat([bucket.numbers for bucket in self._done])
            first = torch.where(bad.any(), numbers.index_select(0, worst), first)
        for bucket in self._bucket_of.values():
            bucket.ready.clear()
        self._regroup()
        self._taken = True
        squares = torch.where(figures[:, 2] > 0, figures[:, 0] * inverse_scale * inverse_scale, torch.nan)
        return torch.cat([squares, figures[:, 1], first])

    def stop(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, wrapped: DistributedDataParallel, number: int) -> Callable[[Tensor], None]:
        def ready(_: Tensor) -> None:
            if not self.armed:
                return
            if self._taken:
                self._done.clear()
                self._taken = False
            if not wrapped.require_backward_grad_sync:
                return
            bucket = self._bucket_of[number]
            bucket.ready.add(number)
            if len(bucket.ready) == len(bucket.numbers):
                with torch.no_grad():
                    self._done[bucket] = self._read(bucket, number)
                bucket.ready.clear()

        return ready

    def _read(self, bucket: _Bucket, last: int) -> Tensor:
        """The moments of a bucket's gradients, of which all but the `last` may have been divided, [P, M]."""
        table = bucket.read(_gradient)
        if bucket.divided_by > 1:
            table[:, SQ_SUM] *= torch.where(bucket.numbers == last + 1, 1.0, float(bucket.divided_by) ** 2)
        return table

    def _join(self, numbers: Sequence[int], divided_by: int = 1) -> None:
        """Read these parameters together from now on."""
        parameters = [self._parameters[number] for number in numbers]
        pieces = tuple(Piece(row, p, 0, p.numel(), whole=True) for row, p in enumerate(parameters))
        streams = torch.tensor([self._stream_of[number] for number in numbers], device=self._device)
        told = torch.tensor([number + 1 for number in numbers], dtype=torch.float64, device=self._device)
        read = reader([Share(pieces, 1.0)], len(numbers), self._device)
        bucket = _Bucket(told, streams, read, divided_by)
        self._bucket_of.update(dict.fromkeys(numbers, bucket))

    def _regroup(self) -> None:
        """Take over DDP's buckets, where it has told of them since and they can be read as one."""
        if not self._models or self._asked == _PATIENCE:
            return
        self._asked += 1
        for wrapped, reduced in [pair for pair in self._models if _in_one(pair[0])]:
            divided_by = wrapped.process_group.size() if wrapped.gradient_as_bucket_view else 1
            told = wrapped._get_ddp_logging_data().get("rebuilt_per_bucket_param_indices", "")  # type: ignore[no-untyped-call]
            if told:
                self._models.remove((wrapped, reduced))
                for bucket in told.split(","):
                    members = [self._number_of.get(id(reduced[int(index)])) for index in bucket.split()]
                    self._join([number for number in members if number is not None], divided_by)


def _reduced(wrapped: DistributedDataParallel) -> list[nn.Parameter]:
    """The parameters that DDP reduces, in the order in which it numbers them (torch/nn/parallel/distributed.py)."""
    named = wrapped.module.named_parameters()
    ignored = wrapped.parameters_to_ignore
    return [parameter for name, parameter in named if parameter.requires_grad and name not in ignored]


def _in_one(wrapped: DistributedDataParallel) -> bool:
    """Whether it is known what a bucket's gradients are when the last of them is ready.

    They are this rank's own, and final; with `gradient_as_bucket_view` DDP has divided all but the last by the number
    of ranks, each in its place as soon as it was ready, unless a communication hook does so (torch's reducer.cpp,
    mark_variable_ready_dense). Not where parameters may come several times, or never (`static_graph`). With
    `find_unused_parameters` DDP keeps its first buckets, and tells of none.
    """
    return not (wrapped.static_graph or (wrapped.gradient_as_bucket_view and _has_hook(wrapped)))


def _has_hook(wrapped: DistributedDataParallel) -> bool:
    """Whether a communication hook is there, of Python or one of the built-in ones, of which the logger alone tells."""
    return bool(wrapped._comm_hooks or wrapped._get_ddp_logging_data().get("comm_hook"))  # type: ignore[no-untyped-call]
