"""CUDA without a GPU: the second device of tests/devices.py under CUDA's name, with what CUDA has beside.

Graphs record operations and repeat them on the same memory, events and pinned memory let numbers arrive late, and
Triton's kernels run in its interpreter, so `TRITON_INTERPRET=1` has to be set before Triton is imported. Not covered:
several streams at work at once, autocast, NCCL, and whatever the hardware decides.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.devices import COPIES, SECOND, OnSecond, _tensors, second_device, waits

CUDA = torch.device("cuda", 0)
PINNED = "_is_pinned"
"""The attribute of tensors in pinned memory."""


class _Named(TorchFunctionMode):
    """Takes CUDA for the second device's name, and knows pinned memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func == Tensor.device.__get__ and isinstance(args[0], OnSecond):  # type: ignore[attr-defined]
            return CUDA
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return isinstance(args[0], OnSecond)
        if func is Tensor.register_post_accumulate_grad_hook:
            return func(args[0], lambda parameter: self._hooked(args[1], parameter))
        if func is Tensor.pin_memory:
            return _pinned(args[0].clone())
        if func is Tensor.copy_ and hasattr(args[0], PINNED) and isinstance(args[1], OnSecond):
            assert kwargs.get("non_blocking"), "pinned memory that is waited for is of no use"
            _Stream.now.arrives_later(args[0], args[1].held.clone())
            return args[0]
        pin = kwargs.get("pin_memory", False)
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        made = func(*map(_renamed, args), **{key: _renamed(value) for key, value in kwargs.items()})
        return _pinned(made) if pin else made

    def _hooked(self, hook: Callable[[Tensor], None], parameter: Tensor) -> None:
        """In the midst of a backward pass PyTorch does as if there were neither modes nor classes of tensors."""
        with self, torch._C._EnableTorchFunction():
            hook(parameter)


def _renamed(value: Any) -> Any:
    if isinstance(value, torch.device):
        return SECOND if value.type == "cuda" else value
    return SECOND if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


def _pinned(tensor: Tensor) -> Tensor:
    setattr(tensor, PINNED, True)
    return tensor


class _Stream:
    """What the device has in hand: copies to the host, which arrive when they are waited for."""

    now: _Stream

    def __init__(self, *_: Any) -> None:
        self._under_way: list[tuple[Tensor, Tensor]] = []
        self.queued = 0

    def arrives_later(self, host: Tensor, values: Tensor) -> None:
        host.fill_(math.nan)
        self._under_way.append((host, values))
        self.queued += 1

    def finish(self, queued: int) -> None:
        """Whatever was queued up to there has arrived."""
        while self._under_way and self.queued - len(self._under_way) < queued:
            host, values = self._under_way.pop(0)
            host.copy_(values)

    def wait_stream(self, _: _Stream) -> None:
        """One stream does all the work in order."""


class _Event:
    def __init__(self, **_: Any) -> None:
        self._after = math.inf

    def record(self) -> None:
        self._after = _Stream.now.queued

    def synchronize(self) -> None:
        assert self._after < math.inf, "an event that was not recorded"
        _Stream.now.finish(int(self._after))

    def query(self) -> bool:
        return False


class _Recorder(TorchDispatchMode):
    """Notes operations, and the memory that they change as it was before."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Callable[[], None]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors([*args, *kwargs.values()])
        name = func._schema.name.removeprefix("aten::")
        apart = {isinstance(tensor, OnSecond) for tensor in given}
        if (name in COPIES and len(apart) > 1) or name == "lift_fresh":
            raise RuntimeError(f"operation not permitted when stream is capturing: {name} from or to the host")
        if func._schema.is_mutable:
            self.keep(given)
        made = func(*args, **kwargs)
        if "empty" not in name:  # it says nothing of what is in that memory
            self.work.append(lambda: _again(made, func(*args, **kwargs)))
        return made

    def keep(self, tensors: list[Tensor]) -> None:
        """Remember what these hold, unless that was remembered before."""
        for tensor in tensors:
            memory = (tensor.held if isinstance(tensor, OnSecond) else tensor).untyped_storage()
            if memory.data_ptr() and memory.data_ptr() not in self._before:
                self._before[memory.data_ptr()] = memory, memory.clone()

    def restore(self) -> None:
        """As if nothing had been done."""
        for memory, before in self._before.values():
            memory.copy_(before)


def _again(made: Any, repeated: Any) -> None:
    """Results go where they were when they were recorded."""
    for first, now in zip(_tensors([made]), _tensors([repeated]), strict=True):
        if first.data_ptr() != now.data_ptr():
            first.copy_(now)


class _Graph:
    recording: _Recorder | None = None

    def __init__(self) -> None:
        self._work: list[Callable[[], None]] = []
        self._stack = ExitStack()

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        _Graph.recording = self._stack.enter_context(_Recorder())
        self._waited = self._stack.enter_context(waits())

    def capture_end(self) -> None:
        recorder, _Graph.recording = _Graph.recording, None
        self._stack.close()
        assert recorder is not None
        recorder.restore()
        self._work = recorder.work
        if self._waited:
            raise RuntimeError(f"operation not permitted when stream is capturing: {', '.join(self._waited)}")

    def replay(self) -> None:
        for repeat in self._work:
            repeat()


class _Kernel:
    """A kernel of Triton, which knows neither the second device nor graphs."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*given: Any, **constants: Any) -> None:
            assert all(isinstance(value, OnSecond) for value in given if isinstance(value, Tensor)), "not on the device"
            arguments = [value.held if isinstance(value, OnSecond) else value for value in given]

            def run() -> None:
                with _disable_current_modes(), torch._C.DisableTorchFunction(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # numpy's, of nan
                    self._kernel[grid](*arguments, **constants)

            if _Graph.recording is not None:
                with _disable_current_modes():
                    _Graph.recording.keep([value for value in arguments if isinstance(value, Tensor)])
                _Graph.recording.work.append(run)
            run()

        return launch


class _SyncDebugMode:
    """`torch.cuda.set_sync_debug_mode`: whether waits are errors."""

    def __init__(self) -> None:
        self._raises = False

    def __call__(self, mode: str) -> None:
        self._raises = mode == "error"

    def append(self, wait: str) -> None:
        if self._raises:
            raise RuntimeError(f"called a synchronizing CUDA operation: {wait}")


@contextmanager
def emulated_cuda() -> Iterator[None]:
    """Within it `torch.device("cuda")` is a device like any other."""
    from ddp_streammon.moments import sample_triton, triton

    _Stream.now = _Stream()
    here: dict[str, Any] = {
        "CUDAGraph": _Graph,
        "Event": _Event,
        "Stream": _Stream,
        "current_stream": lambda *_: _Stream.now,
        "device": lambda _: nullcontext(),
        "get_rng_state": torch.get_rng_state,
        "stream": lambda _: nullcontext(),
        "synchronize": lambda *_: _Stream.now.finish(_Stream.now.queued),
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **here))
        for module, names in ((triton, ("_read", "_fold")), (sample_triton, ("_add",))):
            for name in names:
                stack.enter_context(mock.patch.object(module, name, _Kernel(getattr(module, name))))
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        debug = _SyncDebugMode()
        stack.enter_context(mock.patch.object(torch.cuda, "set_sync_debug_mode", debug))
        stack.enter_context(mock.patch("tests.devices._listeners", [debug]))
        stack.enter_context(second_device())
        stack.enter_context(_Named())
        yield
