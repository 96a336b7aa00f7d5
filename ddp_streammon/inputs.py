"""What goes into each stream: figures of a sample of its inputs, taken on their device as the forward begins."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ddp_streammon.shards import local
from ddp_streammon.streams import StreamSet, unwrap

ITEMS, FEATURES = 32, 1024
"""Of a batch: the first items, and of each so many features at equal distances."""
COLUMNS = ("calls", "mean", "std", "abs_max", "nonfinite", "constant", "first_mean", "first_std")
"""Of a stream's inputs since they were last taken: calls; mean, standard deviation (nan for integers) and largest
absolute value of the finite ones; how many are not finite; 1 where all items of each call are equal; and mean and
standard deviation of what its first linear or convolution layer sees (nan where there is none)."""
_SUM, _SQ_SUM, _COUNT, _BAD, _CONSTANT, _PRINT, _MAX = range(7)
_MODULUS = 2**32
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class Inputs:
    """Looks at the first tensor that each stream's root is called with, and at what its first layer sees.

    Forwards in training count: those with gradients, or of a model in training mode. Compiled code is not looked into.
    Comm: none. Sync: none. It draws nothing and changes nothing.
    """

    def __init__(self, streams: StreamSet, model: nn.Module, device: torch.device) -> None:
        self.armed = True
        """Whether the forwards from now on belong to a monitored step."""
        self._model = model
        self._device = device
        self._number = len(streams.streams)
        self._seen: list[list[Tensor]] = [[] for _ in range(2 * self._number)]
        self._hooks: list[RemovableHandle] = []
        self.watched = tuple(bool(stream.roots) for stream in streams.streams)
        """For each stream whether it has a module whose inputs can be seen."""
        for number, stream in enumerate(streams.streams):
            if not stream.roots:
                continue
            root = streams.model.get_submodule(stream.roots[0])
            first = first_layer(root)
            places = [(2 * number, root)] + ([(2 * number + 1, first)] if first is not None else [])
            for place, module in places:
                hook = module.register_forward_pre_hook(_Seen(self, place), with_kwargs=True)
                self._hooks.append(hook)

    @torch.no_grad()
    def saw(self, place: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward begins."""
        tensor = next((value for value in (*args, *kwargs.values()) if _can_be_read(value)), None)
        if tensor is not None:
            whole = local(tensor.detach())
            self._seen[place].append(_figures(whole, len(whole) if place % 2 == 0 else 0))

    def wanted(self) -> bool:
        """Whether this forward is one of training."""
        return self.armed and (torch.is_grad_enabled() or self._model.training)

    @torch.no_grad()
    def take(self) -> Tensor:
        """What was seen since the last time. Shape: [S x 8 + 1] float64: `COLUMNS` of each stream, and a number below
        2^32 that is the same for the same batch (nan where nothing was seen)."""
        rows = [self._row(2 * number) for number in range(self._number)]
        prints = [torch.stack(seen)[:, _PRINT].sum() for seen in self._seen[::2] if seen]
        batch = torch.stack(prints).sum().remainder(_MODULUS) if prints else self._nan(1)[0]
        for seen in self._seen:
            seen.clear()
        return torch.cat([*rows, batch.reshape(1)])

    def stop(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _row(self, place: int) -> Tensor:
        if not self._seen[place]:
            return torch.cat([torch.zeros(1, dtype=torch.float64, device=self._device), self._nan(7)])
        table = torch.stack(self._seen[place]).to(self._device)
        mean, std = _moments(table)
        calls = torch.full((), float(len(table)), dtype=torch.float64, device=self._device)
        first = _moments(torch.stack(self._seen[place + 1]).to(self._device)) if self._seen[place + 1] else self._nan(2)
        cells = (calls, mean, std, table[:, _MAX].amax(), table[:, _BAD].sum(), table[:, _CONSTANT].amin(), *first)
        return torch.stack(cells)

    def _nan(self, cells: int) -> Tensor:
        return torch.full((cells,), math.nan, dtype=torch.float64, device=self._device)


def first_layer(root: nn.Module) -> nn.Module | None:
    """The first linear or convolution layer in the order of definition, where no other layer with parameters, an
    embedding or a norm, say, comes before it."""
    for module in root.modules():
        if next(module.parameters(recurse=False), None) is not None:
            return module if isinstance(module, _LAYERS) else None
    return None


def _can_be_read(value: Any) -> bool:
    """Whether it is a batch of plain numbers in memory."""
    strided = isinstance(value, Tensor) and not value.is_nested and value.layout == torch.strided
    return strided and value.dim() > 1 and value.numel() > 0 and not value.is_complex()


def _moments(table: Tensor) -> tuple[Tensor, Tensor]:
    count = table[:, _COUNT].sum()
    mean = table[:, _SUM].sum() / count
    return mean, (table[:, _SQ_SUM].sum() / count - mean * mean).clamp_min(0).sqrt()


def _figures(tensor: Tensor, items: int) -> Tensor:
    """The figures of a sample of one tensor, [7] float64 on its device. `items`: how many the batch has, of which the
    first of this number are compared; 0: none are."""
    sample = _sample(tensor)
    numbers = sample.is_floating_point()
    bits = _bits(sample)
    constant = (sample == sample[:1]).all().double() if min(items, len(sample)) > 1 else torch.zeros_like(bits)
    values = sample.float() if numbers else sample.abs().double()
    finite = torch.isfinite(values)
    values = torch.where(finite, values, 0)
    count = finite.sum().double()
    if numbers:
        wide = values.double()
        sums = (wide.sum(), torch.linalg.vector_norm(wide).square(), count)
    else:
        sums = (torch.full_like(count, math.nan), torch.full_like(count, math.nan), count)
    bad = values.numel() - count
    return torch.stack([*sums, bad, constant, bits, torch.linalg.vector_norm(values, math.inf).double()])


def _sample(tensor: Tensor) -> Tensor:
    """[items, features] of a batch, in memory order, without a copy of more than that where memory has no gaps."""
    few = tensor[:ITEMS]
    inner = sorted(range(1, few.dim()), key=few.stride, reverse=True)
    table = few.permute(0, *inner).reshape(len(few), -1)
    return table[:, :: max(1, -(-table.shape[1] // FEATURES))]


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(sample: Tensor) -> Tensor:
    """A sum of the sample's bits that depends on their order, [] float64 below 2^32."""
    whole = sample.contiguous()
    words = whole.view(_INTEGERS.get(whole.element_size(), whole.dtype)).reshape(-1).long()
    places = torch.arange(1, 2 * len(words), 2, device=words.device)
    return (words * places).sum().remainder(_MODULUS).double()


class _Seen:
    """The forward hook of `Inputs`, which it does not keep alive."""

    def __init__(self, inputs: Inputs, place: int) -> None:
        self._inputs = weakref.ref(inputs)
        self._place = place

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        inputs = self._inputs()
        if inputs is not None and inputs.wanted():
            inputs.saw(self._place, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model has a callable without effect."""
        return getattr, (contextlib.nullcontext(), "__exit__")


def normalises(module: nn.Module) -> bool:
    """Whether it is a norm layer, of torch or by its name."""
    name = type(unwrap(module)).__name__.lower()
    return "norm" in name


def has_norm(modules: Iterable[nn.Module]) -> bool:
    """Whether one of them is a norm layer: the scale of weights before it does not matter."""
    return any(normalises(module) for module in modules)
