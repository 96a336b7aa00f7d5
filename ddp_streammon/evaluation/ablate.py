"""What the rest of the model makes of changed features of some streams: encoders run once and are replayed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ddp_streammon import keys
from ddp_streammon.streams import StreamSet, unwrap, walk


class Replacement(enum.Enum):
    """What stands for a stream's features."""

    zero = "zero"
    """Zeros: the guide's way. A shift of the features that the next bias takes back changes what comes out."""
    mean = "mean"
    """Their mean over training items, element by element."""
    exchange = "exchange"
    """Those of another item."""


Variant: TypeAlias = "Mapping[str, Replacement]"
"""What is replaced, by stream; a stream that is not named keeps its features."""

Means: TypeAlias = "Mapping[tuple[str, int], Sequence[Tensor | None]]"
"""By root and number of its call: the mean of each tensor that it gives, without the dimension of the items; nothing
where one has none."""


def map_tensors(value: Any, change: Callable[[Tensor], Tensor], whole: Callable[[Any], Any] | None = None) -> Any:
    """`value` with every tensor inside tuples, lists, mappings and dataclasses replaced; itself where it has none.

    `whole` gives what stands for a part that is no mapping, or None for one that is to be looked into."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):
        filled = copy.copy(value)
        for key, item in value.items():
            filled[key] = map_tensors(item, change, whole)
        return filled
    changed = None if whole is None else whole(value)
    if changed is not None:
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change, whole) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)([map_tensors(item, change, whole) for item in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):  # frozen ones too
            object.__setattr__(changed, field.name, map_tensors(getattr(value, field.name), change, whole))
        return changed
    return value


def on_device(value: Any, device: torch.device) -> Any:
    """`value` with its tensors on `device`; what has a `to` of its own (packed sequences, classes of batches) is asked
    for it. Sync: none, unless it comes to the host."""

    def moved(tensor: Tensor) -> Tensor:
        # A copy to the host that is not waited for has not arrived when it is read.
        return tensor.to(device, non_blocking=device.type != "cpu")

    def asked(part: Any) -> Any:
        own = getattr(part, "to", None)
        return own(device) if callable(own) and not isinstance(part, type) else None

    return map_tensors(value, moved, asked)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors inside `value`, in the order of `map_tensors`."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found


def reordered(value: Any, items: int, order: Tensor) -> Any:
    """`value` with entry `order[i]` of every tensor of `items` entries in place of entry i."""
    return map_tensors(
        value,
        lambda tensor: (
            tensor.index_select(0, order.to(tensor.device)) if tensor.dim() and len(tensor) == items else tensor
        ),
    )


def item_dim(tensor: Tensor, items: int) -> int | None:
    """Which dimension of a feature is that of the items: the first, or else the only one of their number (the state of
    an RNN has the items in its second)."""
    if tensor.dim() and len(tensor) == items:
        return 0
    found = [dim for dim, size in enumerate(tensor.shape) if size == items]
    return found[0] if len(found) == 1 else None


def _in_order(features: Any, items: int, order: Tensor) -> Any:
    """An encoder's output with its items in another order."""

    def moved(tensor: Tensor) -> Tensor:
        dim = item_dim(tensor, items)
        return tensor if dim is None else tensor.index_select(dim, order.to(tensor.device))

    return map_tensors(features, moved)


def _same(a: Any, b: Any) -> bool:
    """Whether two call arguments are equal, tensors by value."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and type(a) is type(b) and len(a) == len(b):
        return all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


@dataclasses.dataclass
class _Call:
    """A call of a root while the batch went through the whole model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class _Encoder:
    """Stands in for a root module's `forward`: records its calls, then answers from the record."""

    def __init__(self, stream: str, path: str, module: nn.Module, features: Features) -> None:
        self.stream, self.path, self.module = stream, path, module
        self._features = features
        self._own = vars(module).get("forward")
        inner = unwrap(module)
        self._original: Callable[..., Any] = module.forward if inner is module else inner
        self.record: list[_Call] = []
        self._number = 0
        self._by_item: bool | None = None
        self.called = False

    def install(self) -> None:
        self.module.forward = self

    def remove(self) -> None:
        if self._own is None:
            del self.module.forward
        else:
            self.module.forward = self._own

    def rewind(self, *, forget: bool) -> None:
        self._number = 0
        if forget:
            self.record.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        features = self._features
        if features.variant is None:
            given, named = map_tensors((args, kwargs), Tensor.clone) if features.copies_inputs else (args, kwargs)
            output = self._original(*args, **kwargs)
            # Cloned: the rest of the model may write into it.
            self.record.append(_Call(given, named, map_tensors(output, Tensor.clone)))
            return output
        number, self._number = self._number, self._number + 1
        recorded = self.record[number] if number < len(self.record) else None
        how = features.variant.get(self.stream)
        if how is Replacement.exchange and self.stream not in features.by_input:
            if recorded is None:
                raise ValueError(f"{self.path} is called more often when streams are exchanged: its calls do not pair")
            return self._exchanged(recorded)
        if how in (Replacement.zero, Replacement.mean):
            kept = self._original(*args, **kwargs) if recorded is None else recorded.output
            if how is Replacement.zero:
                return map_tensors(kept, torch.zeros_like)
            return _expanded(kept, features.means.get((self.path, number), ()), len(features.order))
        if recorded is not None and features.agree(_same((recorded.args, recorded.kwargs), (args, kwargs))):
            return map_tensors(recorded.output, Tensor.clone)
        if recorded is not None and how is Replacement.exchange:
            order = features.order
            given = reordered((recorded.args, recorded.kwargs), len(order), order)
            if features.agree(_has_items(recorded, len(order)) and _same(given, (args, kwargs))):
                return self._exchanged(recorded)
        features.replayed = False
        features.readers.add(self.stream)  # its input depends on another stream: no replay
        return self._original(*args, **kwargs)

    def _exchanged(self, recorded: _Call) -> Any:
        """The features of the batch with its items exchanged: the recorded ones in another order."""
        order = self._features.order
        if not _has_items(recorded, len(order)):
            raise ValueError(
                f"{self.path}: its features have no dimension of the {len(order)} items in front, so those of stream "
                f"{self.stream!r} cannot be exchanged; say where its input lies in the batch: "
                f"swap={{{self.stream!r}: <its key or position>}}"
            )
        if self._by_item is None:
            self._by_item = self._features.agree(self._looks_at_items_alone(recorded))
        if self._by_item:
            return _in_order(recorded.output, len(order), order)
        self._features.replayed = False
        args, kwargs = reordered((recorded.args, recorded.kwargs), len(order), order)
        return self._original(*args, **kwargs)

    def _looks_at_items_alone(self, recorded: _Call) -> bool:
        """Whether an item's features do not depend on its batch, tried with a few items; not where it refuses these."""
        order = self._features.order
        few = order[: min(len(order), _FEW)]
        args, kwargs = reordered((recorded.args, recorded.kwargs), len(order), few)
        expected = tensors_of(_in_order(recorded.output, len(order), few))
        try:
            found = tensors_of(self._original(*args, **kwargs))
        except Exception:  # it takes batches of one size only, say
            if self._features.in_step:
                raise
            return False
        if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
            return False
        return all(
            not tensor.is_floating_point()
            or float((tensor - other).double().norm()) <= _ROUNDING * float(other.double().norm())
            for tensor, other in zip(found, expected, strict=True)
        )


def _has_items(call: _Call, items: int) -> bool:
    """Whether a tensor that the call gave has the items in front."""
    return any(tensor.dim() and len(tensor) == items for tensor in tensors_of(call.output))


_FEW = 4
_ROUNDING = 0.02
"""Relative; bf16 kernels for another batch size differ by up to 0.01."""


def _expanded(output: Any, means: Sequence[Tensor | None], items: int) -> Any:
    """`output` with the means of its tensors in place of each item's own; where there is none it stays."""
    one_by_one = iter(means)

    def expanded(tensor: Tensor) -> Tensor:
        mean, dim = next(one_by_one, None), item_dim(tensor, items)
        if mean is None or dim is None or mean.shape != tensor.shape[:dim] + tensor.shape[dim + 1 :]:
            return tensor.clone()
        return mean.to(tensor).unsqueeze(dim).expand_as(tensor).clone()

    return map_tensors(output, expanded)


class Features:
    """The streams' features in a model, recorded in one forward and then kept or replaced in others.

    `features` means the outputs of a stream's roots: its largest modules (streams.Stream.roots). A recorded output is
    replayed only for the inputs that it was recorded with; where they differ, since an encoder reads another
    stream's features, the encoder runs again. `names` are the streams whose features may be replaced. `agree` is asked
    before each replay: where an encoder holds collectives, all ranks have to run it again or none. Streams in
    `by_input` are exchanged by the caller, in the batch; the others in their features, in the order `order` [items].
    """

    def __init__(
        self,
        streams: StreamSet,
        names: Sequence[str],
        agree: Callable[[bool], bool] = bool,
        *,
        by_input: frozenset[str] = frozenset(),
        means: Means | None = None,
        in_step: bool = False,
    ) -> None:
        modules = {".".join(path): module for path, module in walk(streams.model)}
        for name in names:
            if not streams[name].roots and name not in by_input:
                raise ValueError(
                    f"stream {name!r} has no module of its own, so its features cannot be replaced: its parameters "
                    "sit in modules that hold other streams too; give each stream a module, "
                    "e.g. streams={'rgb': model.rgb_encoder}"
                )
        self.agree = agree
        self.in_step = in_step
        """Whether forwards hold collectives: what ends one is told to the other ranks."""
        self.by_input = by_input
        self.means: Means = means or {}
        self.variant: Variant | None = None
        self.order = torch.empty(0, dtype=torch.long, device="cpu")
        self.replayed = True
        """Whether every encoder was spared running again."""
        self.copies_inputs = False
        """Whether what encoders are called with is copied, since forwards write into their batch."""
        self.readers: set[str] = set()
        """Streams whose encoders read other streams' features."""
        self.encoders = [_Encoder(name, path, modules[path], self) for name in names for path in streams[name].roots]

    def items(self) -> int:
        """How many entries the recorded features have in front; 0 where nothing is recorded."""
        tensors = (tensor for encoder in self.encoders for call in encoder.record for tensor in tensors_of(call.output))
        return next((len(tensor) for tensor in tensors if tensor.dim()), 0)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Stand in for the encoders inside."""
        for encoder in self.encoders:
            encoder.install()
        try:
            yield
        finally:
            for encoder in self.encoders:
                encoder.remove()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Forwards inside run the encoders and record what they give."""
        self.variant = None
        for encoder in self.encoders:
            encoder.rewind(forget=True)
        yield

    @contextlib.contextmanager
    def replacing(self, variant: Variant, order: Tensor) -> Iterator[None]:
        """Forwards inside see the recorded features, but for what the variant replaces."""
        self.variant, self.order = variant, order
        for encoder in self.encoders:
            encoder.rewind(forget=False)
        try:
            yield
        finally:
            self.variant = None

    def check_called(self) -> None:
        """ValueError for a stream none of whose modules took part in the forward."""
        for name in dict.fromkeys(encoder.stream for encoder in self.encoders):
            own = [encoder for encoder in self.encoders if encoder.stream == name]
            if name not in self.by_input and not any(encoder.called for encoder in own):
                paths = ", ".join(encoder.path for encoder in own)
                raise ValueError(
                    f"stream {name!r}: its modules ({paths}) are not called by the model's forward, so its features "
                    "cannot be replaced; name the modules that are, e.g. streams={'rgb': model.rgb.encoder}"
                )


def each_alone(names: Sequence[str], how: Replacement) -> dict[str, Variant]:
    """Each stream alone, the others replaced, by its name; from three streams on also all but one, `without_<name>`."""
    found: dict[str, Variant] = {name: {other: how for other in names if other != name} for name in names}
    if len(names) > 2:
        found |= {keys.WITHOUT + name: {name: how} for name in names}
    return found
