"""What a training is made of, read once when the monitor is built: plain values that rules may ask for."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon.facts import MODED
from ddp_streammon.inputs import has_norm
from ddp_streammon.moments.torch import flat
from ddp_streammon.shards import local
from ddp_streammon.streams import Stream, StreamSet, unwrap

SCALED = (nn.Linear, nn.modules.conv._ConvNd)
"""Layers whose initial scale is known."""
ELEMENTS = 65_536
"""Of a layer's weights, for its scale."""
ADAPTIVE = ("adam", "lion", "adafactor", "rmsprop", "adagrad", "adadelta", "lamb", "shampoo", "sophia", "muon", "rprop")
"""Optimizers, by a part of their names, whose updates hardly depend on the gradient's length."""


@dataclass(frozen=True)
class StreamSetup:
    """A stream as it was built. `rates`, `decays`: the base learning rates and weight decays of its groups;
    `scheduled`: whether a scheduler says what the base rates are.

    `scale`: root mean square of w x sqrt(fan-in) over its linear and convolution layers, zero-initialised ones left out
    (0.58 is PyTorch's default, 1.41 He's); nan without such layers. `norm`: whether it has norm layers; `visible`:
    whether it has a module whose inputs can be seen; `low_precision`: whether it is trained in 16-bit weights;
    `zeros`: whether a layer of it begins with zeros alone; `whole`: whether every rank holds all of it.
    """

    tensors: int
    trainable: int
    optimized: int
    rates: tuple[float, ...] = ()
    scheduled: bool = False
    decays: tuple[float, ...] = ()
    scale: float = math.nan
    norm: bool = False
    visible: bool = False
    low_precision: bool = False
    zeros: bool = False
    whole: bool = True


@dataclass(frozen=True)
class Setup:
    """A training as it was built; rank 0's view, so that it is the same on every rank.

    `data_ranks`: of the ranks that see the same data the first each. `replicated`: several ranks hold the same part of
    something. `wrapped`: DistributedDataParallel is seen. `moded`: there are modules that do something else in eval
    mode. `adaptive`: all optimizers are (`ADAPTIVE`).
    """

    world: int
    data_ranks: tuple[int, ...]
    replicated: bool
    wrapped: bool
    moded: bool
    optimizers: tuple[str, ...]
    streams: Mapping[str, StreamSetup]

    @property
    def adaptive(self) -> bool:
        names = [name.lower() for name in self.optimizers]
        return bool(names) and all(any(part in name for part in ADAPTIVE) for name in names)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Setup:
        """The inverse of `to_dict`."""
        of_streams = {
            name: StreamSetup(**stream | {"rates": tuple(stream["rates"]), "decays": tuple(stream["decays"])})
            for name, stream in values["streams"].items()
        }
        tuples = {name: tuple(values[name]) for name in ("optimizers", "data_ranks")}
        return cls(**{**values, **tuples, "streams": of_streams})


def describe(
    streams: StreamSet,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    world: int,
    data_ranks: Sequence[int],
    replicated: bool,
    whole: Collection[str],
) -> Setup:
    """This rank's view. Comm: none. Sync: waits for the device, for the scale of the weights."""
    held = {id(p): group for o in optimizers for group in o.param_groups for p in group["params"]}
    return Setup(
        world=world,
        data_ranks=tuple(data_ranks),
        replicated=replicated,
        wrapped=any(isinstance(module, DistributedDataParallel) for module in model.modules()),
        moded=any(isinstance(module, MODED) for module in model.modules()),
        optimizers=tuple(type(optimizer).__name__ for optimizer in optimizers),
        streams={s.name: _of_stream(s, streams.model, held, whole=s.name in whole) for s in streams.streams},
    )


def _of_stream(stream: Stream, model: nn.Module, held: Mapping[int, Mapping[str, Any]], *, whole: bool) -> StreamSetup:
    parameters = [item.parameter for item in stream.parameters]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = {id(held[id(p)]): held[id(p)] for p in parameters if id(p) in held}.values()
    modules = [module for root in stream.roots for module in model.get_submodule(root).modules()]
    scale, zeros = _scale([module for module in modules if isinstance(unwrap(module), SCALED)])
    return StreamSetup(
        tensors=len(parameters),
        trainable=len(trained),
        optimized=sum(id(parameter) in held for parameter in trained),
        rates=_known(rate for group in groups for rate in _rates(group)),
        scheduled=any("initial_lr" in group for group in groups),
        decays=_known(group.get("weight_decay") for group in groups),
        scale=scale,
        zeros=zeros,
        whole=whole,
        norm=has_norm(modules),
        visible=bool(stream.roots),
        low_precision=any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in trained),
    )


def _rates(group: Mapping[str, Any]) -> list[Any]:
    """What a scheduler started from, and what it goes up to (OneCycleLR); else the present rate."""
    based = [group[name] for name in ("initial_lr", "max_lr") if name in group]
    return based or [group.get("lr")]


def _known(values: Any) -> tuple[float, ...]:
    """Numbers that can be read without waiting for a device, each once."""
    numbers = [v for v in values if v is not None and not (isinstance(v, torch.Tensor) and v.device.type != "cpu")]
    return tuple(dict.fromkeys(float(number) for number in numbers))


@torch.no_grad()
def _scale(layers: Sequence[nn.Module]) -> tuple[float, bool]:
    """The scale of layers that are not zero, and whether some are."""
    squares = elements = 0.0
    zeros = False
    for layer in {id(layer): layer for layer in layers}.values():
        weight = layer._parameters.get("weight")
        if weight is None or weight.dim() < 2 or weight.is_meta or weight.is_complex():
            continue
        fan_in = weight.shape[1:].numel()
        sample = flat(local(weight.detach()))[:ELEMENTS].float()
        if not len(sample):
            continue
        mean_square = float(sample.square().mean())
        zeros = zeros or mean_square == 0
        if mean_square > 0:
            squares += mean_square * fan_in * weight.numel()
            elements += weight.numel()
    return (math.sqrt(squares / elements) if elements else math.nan), zeros
