"""What goes into each stream: figures of a sample of its inputs, taken on their device, in the step or before."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ddp_streammon.moments import SampleReader, sample
from ddp_streammon.rank_facts import INPUT_CELLS
from ddp_streammon.shards import local
from ddp_streammon.streams import StreamSet, unwrap

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class Inputs:
    """Looks at the first tensor that each stream's root is called with, and at what its first layer sees.

    Forwards in training count: those with gradients, or of a model in training mode. Compiled code is not looked into.
    `begin` says what the host knows, `write` does the rest on the device.
    Comm: none. Sync: none. It draws nothing and changes nothing.
    """

    def __init__(self, streams: StreamSet, model: nn.Module, device: torch.device) -> None:
        self.armed = True
        """Whether the forwards from now on belong to a monitored step."""
        self._model = model
        self._number = len(streams.streams)
        self._seen = torch.zeros(2 * self._number, sample.COLUMNS, dtype=torch.float64, device=device)
        """Of each stream what its root has seen since the last step, and what its first layer has."""
        self._reader = SampleReader(self._seen)
        self.place_cells = len(self._seen) * self._reader.place_cells
        """Numbers that say where the batches are that are looked at in the step, and not as the forward begins."""
        self._held: list[tuple[Tensor, int, list[float]] | None] = [None] * len(self._seen)
        """Those batches, until then, their version (what was changed in place is not looked at), and where they are."""
        self._calls = [0] * len(self._seen)
        self._root_saw: tuple[Hashable, Tensor] = (None, self._seen[0])
        """Where the last root's batch lies that was looked at in its forward, and what was added for it."""
        self._warned = False
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
    def saw(self, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward begins."""
        tensor = next((value for value in (*args, *kwargs.values()) if _can_be_read(value)), None)
        if tensor is not None:
            self._read_held(number)
            batch = local(tensor.detach())
            later = not batch.is_inference()  # such a tensor does not say whether it was changed in place
            place = self._reader.place(batch, compare=number % 2 == 0) if later else None
            if place is None:
                self._look(number, batch)
            else:
                self._held[number] = (batch, batch._version, place)
            self._calls[number] += 1

    def leave_out(self, error: Exception) -> None:
        """A forward whose inputs cannot be read, one of `torch.func`'s transforms of the model, say."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a forward's inputs could not be looked at ({type(error).__name__}: {error}): it is left out of what "
                "rules about inputs see, other forwards are not",
                stacklevel=2,
            )

    def _look(self, number: int, batch: Tensor) -> None:
        """Now. A first layer that sees the very input of its root is not looked at for itself."""
        is_root, sums = number % 2 == 0, self._seen[number, : sample.BAD]
        plain = batch.is_contiguous() and not batch.is_inference()
        memory = (batch.data_ptr(), len(batch), batch.numel(), batch.dtype, batch._version) if plain else None
        if is_root:
            before = sums.clone()
            self._reader.add(number, batch, compare=True)
            self._root_saw = memory, sums - before
        elif memory is not None and memory == self._root_saw[0]:
            sums += self._root_saw[1]
        else:
            self._reader.add(number, batch, compare=False)

    def _read_held(self, number: int) -> None:
        """Several forwards in a step: all but the last are looked at as the next one begins."""
        held, self._held[number] = self._held[number], None
        if held is not None and held[0]._version == held[1]:
            self._look(number, held[0])

    def wanted(self) -> bool:
        """Whether this forward is one of training."""
        return self.armed and (torch.is_grad_enabled() or self._model.training)

    def begin(self) -> tuple[list[float], list[float]]:
        """What is to stand where `write` writes: each stream's calls in the first of its cells; and where the batches
        are that `write` is to look at, which have to stay until `end`. The next forwards are another step's."""
        nothing_yet = (0.0,) * (INPUT_CELLS - 1)
        cells = [cell for calls in self._calls[::2] for cell in (float(calls), *nothing_yet)]
        self._calls = [0] * len(self._calls)
        self._root_saw = None, self._seen[0]
        nothing = [0.0] * self._reader.place_cells
        places = [nothing if held is None or held[0]._version != held[1] else held[2] for held in self._held]
        return cells, [cell for place in places for cell in place]

    def end(self) -> None:
        """What looks at the batches is queued: they may go."""
        self._held = [None] * len(self._held)

    @torch.no_grad()
    def write(self, cells: Tensor, places: Tensor) -> None:
        """What was seen since the last time, in place. The same operations each time, on the same memory.

        Shape: `places` [2 S x place_cells], as `begin` said them; `cells` [S x INPUT_CELLS] float64, of each stream as
        `rank_facts.StreamInput.of_cells` reads them.
        """
        self._reader.add_all(places)
        rows, seen = cells.view(self._number, INPUT_CELLS), self._seen.view(self._number, 2, sample.COLUMNS)
        rows[:, 1:8] = seen[:, 0]
        rows[:, 8:] = seen[:, 1, :3]
        seen.zero_()

    def stop(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


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


class _Seen:
    """The forward hook of `Inputs`, which it does not keep alive."""

    def __init__(self, inputs: Inputs, place: int) -> None:
        self._inputs = weakref.ref(inputs)
        self._place = place

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return
        inputs = self._inputs()
        if inputs is not None and inputs.wanted():
            try:
                inputs.saw(self._place, args, kwargs)
            except Exception as error:  # it must not end the forward that it looks at
                inputs.leave_out(error)

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
