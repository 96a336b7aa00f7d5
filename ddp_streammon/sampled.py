"""What rules need beside the gradients' norms, from small samples: how weights move, first and last layers, what
optimizers hold, and whether gradients were cleared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from ddp_streammon.moments import ELEMENTS as ELEMENTS_READ
from ddp_streammon.moments import SQ_SUM
from ddp_streammon.moments.torch import flat
from ddp_streammon.shards import Piece, Share, local
from ddp_streammon.streams import StreamSet

TENSORS, ELEMENTS = 48, 16_384
"""Of a stream's weights: at most so many tensors, at equal distances, and so many elements in all."""
LAYER = 8_192
"""Elements of a layer's gradient that are read."""
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
"""Whose weights make the first and the last layer: not embeddings, of which most rows have no gradient."""
SUMS = ("moved_square", "weight_square", "moved", "compared", "first", "last", "trainable", "optimized", "uncleared")
"""Of each stream: squares of the change of its sampled weights since the last call and of themselves now; how many
elements changed, of how many; mean squares of the gradient of its first and its last layer; its tensors that require a
gradient, and those of them that an optimizer holds; and 1 where a gradient of the step before was still there when the
first of this one arrived."""
_MODULUS = 2**32
_requires_grad = attrgetter("requires_grad")


class Sampled:
    """Figures of samples of this rank's weights and gradients. Memory: three copies of the sampled weights.

    `begin` says what the host knows, `write` does the rest on the device. Comm: none. Sync: none.
    """

    def __init__(
        self, streams: StreamSet, optimizers: Sequence[torch.optim.Optimizer], device: torch.device, every: int
    ) -> None:
        """`every`: calls from one `write` to the next; after each, where it is 1, comes a change to be seen."""
        self._optimizers = optimizers
        self._device = device
        self._remembers = every == 1
        self._all = [[item.parameter for item in stream.parameters] for stream in streams.streams]
        self._flat = [parameter for of_stream in self._all for parameter in of_stream]
        self._has_dtensors = any(isinstance(parameter, DTensor) for parameter in self._flat)
        self._trained: list[bool] = []
        self._chosen: list[list[nn.Parameter]] = []
        self._addresses: list[int] = []
        self._views: list[Tensor] = []
        self._sizes: list[int] = []
        self._now = self._before = self._change = torch.zeros(len(self._all), 0, dtype=torch.float32, device=device)
        """[S, N] float32: each stream's sampled weights, the rest zeros; and memory to work in."""
        self._slots: tuple[list[Tensor], list[Tensor]] = ([], [])
        """Where each view's weights are in `_now` and `_before`."""
        self.generation = 0
        """Changes where `write` would do other operations, or those on other memory."""
        self._kept_at = -1
        self._group_sizes: tuple[int, ...] = ()
        self._counts: list[tuple[int, int]] = []
        kernels = {id(_kernel(module)) for module in streams.model.modules() if isinstance(module, LAYERS)}
        self._ends = [ends([p for p in parameters if id(p) in kernels]) for parameters in self._all]
        self._uncleared = Uncleared(self._all, device)

    def layers(self, first: int) -> Share:
        """Samples of the gradients of each stream's first and last layer, as streams number `first` and on."""
        pieces = []
        for number, pair in enumerate(self._ends):
            for column, parameter in enumerate(pair):
                if parameter is not None:
                    size = min(local(parameter).numel(), LAYER)
                    pieces.append(Piece(first + 2 * number + column, parameter, 0, size, whole=False))
        return Share(tuple(pieces), 1.0)

    @torch.no_grad()
    def look(self, call: int) -> None:
        """Before the optimizer's step of `call`: remember the weights that it starts from, unless `write` has."""
        if self._kept_at != call:
            self._find()
            torch._foreach_copy_(self._slots[1], self._views)
            self._kept_at = call

    def begin(self, call: int) -> tuple[list[list[float]], float]:
        """The rows of `SUMS`, zeros where `write` is to write; and what is to be added to the norms of changes: nan
        where nothing was remembered of the call before."""
        self._find()
        known = self._kept_at == call - 1
        if self._remembers:
            self._kept_at = call
        self._uncleared.begin()
        rows = [
            [0.0, 0.0, 0.0, float(size if known else 0), 0.0, 0.0, float(trainable), float(optimized), 0.0]
            for size, (trainable, optimized) in zip(self._sizes, self._tensors(), strict=True)
        ]
        return rows, 0.0 if known else math.nan

    @torch.no_grad()
    def write(self, layers: Tensor, sums: Tensor, own: Tensor) -> None:
        """The sampled figures, in place. The same operations each time, on the same memory.

        Shape: the moments of `layers` [2 S, 7] in; `sums` [S, 9] (`SUMS`), which add up over ranks; `own` [S, 2]: a
        number below 2^32 that is the same for the same weights, and the norm of their change, which is added.
        """
        now, change = self._now, self._change
        if self._views:
            torch._foreach_copy_(self._slots[0], self._views)
        moved = torch.linalg.vector_norm(torch.sub(now, self._before, out=change), dim=1).double()
        sums[:, 0] = moved.square()
        sums[:, 1] = torch.linalg.vector_norm(now, dim=1).double().square()
        sums[:, 2] = change.ne_(0).sum(dim=1)
        sums[:, 4:6] = (layers[:, SQ_SUM] / layers[:, ELEMENTS_READ]).view(-1, 2)
        sums[:, 8] = self._uncleared.take()
        own[:, 0] = _bits(now)
        own[:, 1] += moved
        if self._remembers:
            self._before.copy_(now)

    def _tensors(self) -> list[tuple[int, int]]:
        """For each stream its tensors that require a gradient, and those of them that an optimizer holds."""
        sizes = tuple(len(group["params"]) for optimizer in self._optimizers for group in optimizer.param_groups)
        if sizes != self._group_sizes or not self._counts:
            self._group_sizes = sizes
            groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
            held = {id(parameter) for group in groups for parameter in group["params"]}
            of_streams = [[p for p in parameters if p.requires_grad] for parameters in self._all]
            self._counts = [(len(of), sum(id(p) in held for p in of)) for of in of_streams]
        return self._counts

    def stop(self) -> None:
        """Take the hooks off."""
        self._uncleared.stop()

    def _find(self) -> None:
        """Look where the sampled weights are; choose them anew where others are trained."""
        trained = list(map(_requires_grad, self._flat))
        others = trained != self._trained
        if others:
            self._trained = trained
            self._chosen = [_spread(parameters) for parameters in self._all]
            self._counts = []
        addresses = self._addresses_now()
        if others or addresses != self._addresses:
            self._addresses = addresses
            self.generation += 1
            self._place([_views(of_stream) for of_stream in self._chosen], anew=others)

    def _addresses_now(self) -> list[int]:
        chosen = [parameter for of_stream in self._chosen for parameter in of_stream]
        if self._has_dtensors:
            chosen = [local(parameter) for parameter in chosen]  # type: ignore[misc]
        return list(map(Tensor.data_ptr, chosen))

    def _place(self, per_stream: list[list[Tensor]], *, anew: bool) -> None:
        """Take over views of the sampled weights; `anew`: what is remembered is of other weights."""
        self._views = [view for views in per_stream for view in views]
        sizes = [sum(map(len, views)) for views in per_stream]
        if anew or sizes != self._sizes:
            self._sizes = sizes
            even = max(sizes) + max(sizes) % 2  # read in words of two, too
            self._now = torch.zeros(len(sizes), even, dtype=torch.float32, device=self._device)
            self._before = torch.zeros_like(self._now)
            self._change = torch.zeros_like(self._now)
            self._slots = (_rows(self._now, per_stream), _rows(self._before, per_stream))
            self._kept_at = -1


class Uncleared:
    """Whether the gradient of the step before is still there when the first one of this step arrives.

    A tensor hook runs before autograd adds: it sees what a step begins with. Of each stream one matrix is asked, once
    a step, in the first backward pass; later passes of the same step add up rightly.
    """

    def __init__(self, parameters: Sequence[Sequence[nn.Parameter]], device: torch.device) -> None:
        self._found = torch.zeros(len(parameters), dtype=torch.float32, device=device)
        """[S] the largest absolute value of what was there; 0 also where nothing arrived."""
        self._asked = [False] * len(parameters)
        self._hooks: list[RemovableHandle] = []
        for number, of_stream in enumerate(parameters):
            trained = [p for p in of_stream if p.requires_grad and not isinstance(p, DTensor)]
            wanted = min(trained, key=lambda p: (p.dim() < 2, p.numel()), default=None)
            if wanted is not None:
                arrived = _Arrived(self._asked, number, self._found[number], wanted)
                self._hooks.append(wanted.register_hook(arrived))  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """The next gradients that arrive are another step's."""
        self._asked[:] = [False] * len(self._asked)

    def take(self) -> Tensor:
        """[S] 1 where a gradient was still there."""
        there = self._found != 0
        self._found.zero_()
        return there

    def stop(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


class _Arrived:
    """The hook of one parameter: looks at its gradient before the first addition of a step."""

    def __init__(self, asked: list[bool], number: int, found: Tensor, parameter: nn.Parameter) -> None:
        self._asked, self._number, self._found, self._parameter = asked, number, found, parameter

    def __call__(self, _: Tensor) -> None:
        if self._asked[self._number]:
            return
        self._asked[self._number] = True
        gradient = self._parameter.grad
        if gradient is not None and gradient.layout == torch.strided:
            with torch.no_grad():
                self._found.copy_(torch.linalg.vector_norm(flat(gradient)[:LAYER], math.inf))


def ends(kernels: Sequence[nn.Parameter]) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """The first and the last of these that is trained; (None, None) where there are fewer than two."""
    matrices = [p for p in kernels if p.requires_grad]
    return (matrices[0], matrices[-1]) if len(matrices) > 1 else (None, None)


def _kernel(layer: nn.Module) -> nn.Parameter | None:
    """The layer's weight; None where it is computed: `layer.weight` would run a parametrization, which may draw random
    numbers or change its buffers (`spectral_norm`)."""
    return layer._parameters.get("weight")


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


def _rows(table: Tensor, per_stream: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Where views of each stream go, one after the other in its row of [S, N]."""
    slots: list[Tensor] = []
    for row, views in zip(table, per_stream, strict=True):
        slots += torch.split(row[: sum(map(len, views))], [len(view) for view in views]) if views else []
    return slots


def _bits(table: Tensor) -> Tensor:
    """Of each row of [S, N] float32, N even, a number below 2^32 that is the same for the same bits."""
    total = table.view(torch.int64).sum(dim=1)
    return (total.remainder(_MODULUS) + (total >> 32)).remainder(_MODULUS)
