"""What rules need beside the gradients' norms, from small samples: how weights move, first and last layers, what
optimizers hold, and whether gradients were cleared."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from ddp_streammon.moments.torch import flat
from ddp_streammon.shards import local
from ddp_streammon.streams import StreamSet

TENSORS, ELEMENTS = 48, 32_768
"""Of a stream's weights: at most so many tensors, at equal distances, and so many elements in all."""
LAYER = 16_384
"""Elements of a layer's gradient that are read."""
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
"""Whose weights make the first and the last layer: not embeddings, of which most rows have no gradient."""
SUMS = ("moved_square", "weight_square", "moved", "compared", "first", "last", "trainable", "optimized", "uncleared")
"""Of each stream: squares of the change of its sampled weights since the last call and of themselves now; how many
elements changed, of how many; mean squares of the gradient of its first and its last layer; its tensors that require a
gradient, and those of them that an optimizer holds; and 1 where a gradient of the step before was still there when the
first of this one arrived."""
_MODULUS = 2**32


class Sampled:
    """Figures of samples of this rank's weights and gradients. Memory: two copies of the sampled weights.

    Comm: none. Sync: none.
    """

    def __init__(self, streams: StreamSet, optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> None:
        self._streams = streams
        self._optimizers = optimizers
        self._device = device
        self._all = [[item.parameter for item in stream.parameters] for stream in streams.streams]
        self._trained: list[int] = []
        self._parameters: list[list[nn.Parameter]] = []
        self._views: list[list[Tensor]] = []
        self._addresses: list[int] = []
        self._before: tuple[int, Tensor] | None = None
        self._now: tuple[int, Tensor] | None = None
        self._group_sizes: tuple[int, ...] = ()
        self._held: set[int] = set()
        layers = {id(module.weight) for module in streams.model.modules() if isinstance(module, LAYERS)}
        self._ends = [ends([p for p in parameters if id(p) in layers]) for parameters in self._all]
        self._uncleared = Uncleared(self._all, device)

    @torch.no_grad()
    def look(self, call: int) -> None:
        """Before the optimizer's step of `call`: remember the weights that it starts from."""
        self._before = self._now if self._now is not None and self._now[0] == call else (call, self._weights())

    @torch.no_grad()
    def take(self, call: int) -> tuple[Tensor, Tensor]:
        """What adds up over ranks, [S, 9] float64 (`SUMS`), and what each rank says for itself, [S, 2]: a number below
        2^32 that is the same for the same weights, and the norm of their change (nan where nothing was remembered of
        the call before)."""
        now = self._weights()
        self._now = (call, now)
        known = self._before is not None and self._before[0] == call - 1 and len(self._before[1]) == len(now)
        before = self._before[1] if known and self._before is not None else now
        change = (now - before).square()
        squares = now.square()
        moved = change != 0
        words = now.view(torch.int32)
        rows, own = [], []
        start = 0
        counts = self._counts()
        layers = self._layers()
        for views in self._views:
            stop = start + sum(map(len, views))
            size = torch.full((), float(stop - start) if known else 0.0, dtype=torch.float64, device=self._device)
            part = change[start:stop].sum(dtype=torch.float64)
            weight = squares[start:stop].sum(dtype=torch.float64)
            rows.append(torch.stack([part, weight, moved[start:stop].sum().double(), size]))
            bits = words[start:stop].sum(dtype=torch.int64).remainder(_MODULUS).double()
            own.append(torch.stack([bits, part.sqrt() if known else torch.full_like(part, math.nan)]))
            start = stop
        table = torch.cat([torch.stack(rows), layers, counts, self._uncleared.take()[:, None]], dim=1)
        return table, torch.stack(own)

    def counts(self) -> list[tuple[int, int]]:
        """For each stream its tensors that require a gradient, and those of them that an optimizer holds."""
        sizes = tuple(len(group["params"]) for optimizer in self._optimizers for group in optimizer.param_groups)
        if sizes != self._group_sizes:
            self._group_sizes = sizes
            groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
            self._held = {id(parameter) for group in groups for parameter in group["params"]}
        trained = [[p for p in parameters if p.requires_grad] for parameters in self._all]
        return [(len(of), sum(id(p) in self._held for p in of)) for of in trained]

    def stop(self) -> None:
        """Take the hooks off."""
        self._uncleared.stop()

    def _counts(self) -> Tensor:
        return torch.tensor(self.counts(), dtype=torch.float64).to(self._device, non_blocking=True)

    def _weights(self) -> Tensor:
        """The sampled weights, stream after stream. Shape: [N] float32."""
        trained = [sum(parameter.requires_grad for parameter in parameters) for parameters in self._all]
        if trained != self._trained:
            self._trained = trained
            self._parameters = [_spread(parameters) for parameters in self._all]
        addresses = [local(parameter).data_ptr() for parameters in self._parameters for parameter in parameters]
        if addresses != self._addresses:
            self._addresses = addresses
            self._views = [_views(parameters) for parameters in self._parameters]
        views = [view for of_stream in self._views for view in of_stream]
        if not views:
            return torch.zeros(0, device=self._device)
        if len({view.dtype for view in views}) > 1 or views[0].dtype != torch.float32:
            views = [view.float() for view in views]
        return torch.cat(views)

    def _layers(self) -> Tensor:
        """[S, 2] mean squares of the gradients of each stream's first and last layer; nan where there is none."""
        found: list[Tensor] = []
        places: list[tuple[int, int]] = []
        for number, (first, last) in enumerate(self._ends):
            for column, parameter in enumerate((first, last)):
                gradient = None if parameter is None else parameter.grad
                if gradient is not None and gradient.layout == torch.strided:
                    found.append(flat(local(gradient))[:LAYER])
                    places.append((number, column))
        table = torch.full((len(self._ends), 2), math.nan, dtype=torch.float64, device=self._device)
        if found:
            norms = torch.stack(torch._foreach_norm(found)).double()
            sizes = torch.tensor([float(max(len(part), 1)) for part in found], dtype=torch.float64)
            rows = torch.tensor(places).to(self._device, non_blocking=True)
            table[rows[:, 0], rows[:, 1]] = norms.square() / sizes.to(self._device, non_blocking=True)
        return table


class Uncleared:
    """Whether the gradient of the step before is still there when the first one of this step arrives.

    A tensor hook runs before autograd adds: it sees what a step begins with. Of each stream one matrix is asked, once
    a step, in the first backward pass; later passes of the same step add up rightly.
    """

    def __init__(self, parameters: Sequence[Sequence[nn.Parameter]], device: torch.device) -> None:
        self.armed = True
        self._device = device
        self._found: list[Tensor | None] = [None] * len(parameters)
        self._hooks: list[RemovableHandle] = []
        for number, of_stream in enumerate(parameters):
            trained = [p for p in of_stream if p.requires_grad and not isinstance(p, DTensor)]
            wanted = min(trained, key=lambda p: (p.dim() < 2, p.numel()), default=None)
            if wanted is not None:
                arrived = _Arrived(self._found, number, wanted)
                self._hooks.append(wanted.register_hook(arrived))  # type: ignore[no-untyped-call]

    def take(self) -> Tensor:
        """[S] 1 where a gradient was still there; 0 also where nothing arrived."""
        cells = [
            torch.zeros((), dtype=torch.float64, device=self._device) if found is None else (found != 0).double()
            for found in self._found
        ]
        self._found[:] = [None] * len(cells)
        return torch.stack(cells)

    def stop(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


class _Arrived:
    """The hook of one parameter: looks at its gradient before the first addition of a step."""

    def __init__(self, found: list[Tensor | None], number: int, parameter: nn.Parameter) -> None:
        self._found, self._number, self._parameter = found, number, parameter

    def __call__(self, _: Tensor) -> None:
        if self._found[self._number] is None:
            with torch.no_grad():
                gradient = self._parameter.grad
                zero = torch.zeros((), device=self._parameter.device)
                sample = None if gradient is None or gradient.layout != torch.strided else flat(gradient)[:LAYER]
                self._found[self._number] = zero if sample is None else torch.linalg.vector_norm(sample, math.inf)


def ends(kernels: Sequence[nn.Parameter]) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """The first and the last of these that is trained; (None, None) where there are fewer than two."""
    matrices = [p for p in kernels if p.requires_grad]
    return (matrices[0], matrices[-1]) if len(matrices) > 1 else (None, None)


def _spread(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """At most `TENSORS` of those that are trained, or of all where none is; first and last included."""
    parameters = [parameter for parameter in parameters if parameter.is_floating_point()]
    parameters = [parameter for parameter in parameters if parameter.requires_grad] or parameters
    if len(parameters) <= TENSORS:
        return parameters
    return [parameters[round(place * (len(parameters) - 1) / (TENSORS - 1))] for place in range(TENSORS)]


def _views(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The elements of each that are sampled, as they lie in memory; small tensors whole."""
    flats = [flat(local(parameter.detach())) for parameter in parameters]
    room = ELEMENTS
    allowed: dict[int, int] = {}
    for rest, place in enumerate(sorted(range(len(flats)), key=lambda place: len(flats[place]))):
        allowed[place] = min(len(flats[place]), room // (len(flats) - rest))
        room -= allowed[place]
    return [view[: allowed[place]] for place, view in enumerate(flats)]
