"""What the rest of the model makes of some streams' features alone: encoders run once and are replayed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddp_streammon import keys
from ddp_streammon.streams import StreamSet, unwrap, walk


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor inside tuples, lists, mappings and dataclasses replaced; itself where it has none."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, MutableMapping):
        filled = copy.copy(value)
        for key, item in value.items():
            filled[key] = map_tensors(item, change)
        return filled
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):  # frozen ones too
            object.__setattr__(changed, field.name, map_tensors(getattr(value, field.name), change))
        return changed
    return value


def _same(a: Any, b: Any) -> bool:
    """Whether two call arguments are equal, tensors by value."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple | list) and type(a) is type(b) and len(a) == len(b):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


class _Encoder:
    """Stands in for a root module's `forward`: records its calls, then answers from the record."""

    def __init__(self, stream: str, path: str, module: nn.Module, features: Features) -> None:
        self.stream, self.path, self.module = stream, path, module
        self._features = features
        self._own = vars(module).get("forward")
        inner = unwrap(module)
        self._original: Callable[..., Any] = module.forward if inner is module else inner
        self._record: list[tuple[Any, Any]] = []
        self._calls = 0
        self.called = False

    def install(self) -> None:
        self.module.forward = self

    def remove(self) -> None:
        if self._own is None:
            del self.module.forward
        else:
            self.module.forward = self._own

    def rewind(self, *, forget: bool) -> None:
        self._calls = 0
        if forget:
            self._record.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        kept = self._features.kept
        if kept is None:
            output = self._original(*args, **kwargs)
            # Cloned: the rest of the model may write into it.
            self._record.append(((args, kwargs), map_tensors(output, Tensor.clone)))
            return output
        number, self._calls = self._calls, self._calls + 1
        recorded = self._record[number] if number < len(self._record) else None
        if self.stream not in kept:
            features = self._original(*args, **kwargs) if recorded is None else recorded[1]
            return map_tensors(features, torch.zeros_like)
        if recorded is not None and self._features.agree(_same(recorded[0], (args, kwargs))):
            return map_tensors(recorded[1], Tensor.clone)
        return self._original(*args, **kwargs)  # its input depends on another stream: no replay


class Features:
    """The streams' features in a model, recorded in one forward and then kept or replaced by zeros in others.

    `features` means the outputs of a stream's roots: its largest modules (streams.Stream.roots). A recorded output is
    replayed only for the inputs that it was recorded with; where they differ, since an encoder reads another
    stream's features, the encoder runs again. `names` are the streams whose features may be replaced. `agree` is asked
    before each replay: where an encoder holds collectives, all ranks have to run it again or none.
    """

    def __init__(self, streams: StreamSet, names: Sequence[str], agree: Callable[[bool], bool] = bool) -> None:
        modules = {".".join(path): module for path, module in walk(streams.model)}
        for name in names:
            if not streams[name].roots:
                raise ValueError(
                    f"stream {name!r} has no module of its own, so its features cannot be replaced: its parameters "
                    "sit in modules that hold other streams too; give each stream a module, "
                    "e.g. streams={'rgb': model.rgb_encoder}"
                )
        self.agree = agree
        self.kept: frozenset[str] | None = None
        self._encoders = [_Encoder(name, path, modules[path], self) for name in names for path in streams[name].roots]

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Stand in for the encoders inside."""
        for encoder in self._encoders:
            encoder.install()
        try:
            yield
        finally:
            for encoder in self._encoders:
                encoder.remove()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Forwards inside run the encoders and record what they give."""
        self.kept = None
        for encoder in self._encoders:
            encoder.rewind(forget=True)
        yield

    @contextlib.contextmanager
    def keeping(self, streams: Sequence[str]) -> Iterator[None]:
        """Forwards inside see these streams' recorded features, and zeros for all others'."""
        self.kept = frozenset(streams)
        for encoder in self._encoders:
            encoder.rewind(forget=False)
        try:
            yield
        finally:
            self.kept = None

    def check_called(self) -> None:
        """ValueError for a stream none of whose modules took part in the forward."""
        for name in dict.fromkeys(encoder.stream for encoder in self._encoders):
            own = [encoder for encoder in self._encoders if encoder.stream == name]
            if not any(encoder.called for encoder in own):
                paths = ", ".join(encoder.path for encoder in own)
                raise ValueError(
                    f"stream {name!r}: its modules ({paths}) are not called by the model's forward, so its features "
                    "cannot be replaced; name the modules that are, e.g. streams={'rgb': model.rgb.encoder}"
                )


def variants(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What is evaluated, and the streams whose features are kept: all; each alone; from three streams, all but one."""
    kept = {keys.FULL: tuple(names)}
    kept |= {name: (name,) for name in names}
    if len(names) > 2:
        kept |= {keys.WITHOUT + name: tuple(other for other in names if other != name) for name in names}
    return kept
