"""A second device without one: its tensors compute on the CPU, and refuse and wait where those of CUDA do.

So a fault such as an index made on the CPU that meets a feature on the GPU is found where there is no GPU. Not covered:
autocast, sparse tensors, and what is done on CUDA alone, for which see emulated_cuda.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SECOND = torch.device("lazy", 0)
"""Of the device types that nothing here uses, the one that autograd takes in a build for the CPU (PyTorch 2.6 to 2.13).
Later ones also set up `privateuseone` from Python, where each operation would have to be written."""
CPU = torch.device("cpu")
COPIES = {"copy_", "_foreach_copy_", "_to_copy"}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
"""Those whose indices may lie on the CPU."""
FILLING = {"masked_fill", "masked_fill_", "fill", "fill_"}
"""Those that take a number which lies on the CPU, besides pointwise operations and those of two lists."""
WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "repeat_interleave", "bincount", "_unique2"}
WAITING |= {"unique_dim", "unique_consecutive", "_linalg_check_errors"}
_listeners: list[list[str]] = []


class OnSecond(Tensor):
    """A tensor of the second device; `held` is the CPU's tensor that has its values. Views share their memory."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnSecond:
        if held.layout is not torch.strided or held.is_conj():
            raise NotImplementedError(f"the second device has no {held.layout} tensors, and no conjugated views")
        place = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        with torch.inference_mode(held.is_inference()):
            made: OnSecond = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, held.size(), **place, dtype=held.dtype, device=SECOND
            )
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.data_ptr:
            return args[0].held.data_ptr()
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            args[0].held = args[1].held
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved, it is read back on the CPU."""
        return self.held.__reduce_ex__(protocol)


class _Everywhere(TorchDispatchMode):
    """For what is made there from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Within it `SECOND` is a device like any other: `model.to(SECOND)`, `torch.zeros(3, device=SECOND)`."""
    usual = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # or torch.tensor(..., device=SECOND) passes the mode by
    try:
        with _Everywhere():
            yield SECOND
    finally:
        torch._C._set_only_lift_cpu_tensors(usual)


@contextmanager
def waits() -> Iterator[list[str]]:
    """Where the host waits for the device in the block: "operation file.py" each."""
    found: list[str] = []
    _listeners.append(found)
    try:
        yield found
    finally:
        _listeners.remove(found)


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """An operation's arguments or results with their tensors replaced."""
    if isinstance(value, list | tuple):
        return type(value)([_mapped(item, change) for item in value])
    return change(value) if isinstance(value, Tensor) else value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(value, found.append)
    return found


def _is_there(value: object) -> bool:
    return isinstance(value, OnSecond)


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    if torch.is_inference_mode_enabled():  # then operations that consist of others arrive, too
        with _Everywhere():
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
    name = func._schema.name.removeprefix("aten::")
    tensors = _tensors([*args, *kwargs.values()])
    there = [tensor for tensor in tensors if isinstance(tensor, OnSecond)]
    target = torch.device(kwargs.get("device") or (SECOND if there else CPU))
    to_second = target.type == SECOND.type
    if not there and not to_second:
        return func(*args, **kwargs)
    mixed = 0 < len(there) < len(tensors)
    if mixed and name.startswith("_foreach_") and len(args[0]) > 1:  # PyTorch, too, goes through such lists one by one
        rows = [[[arg[n]] if isinstance(arg, list | tuple) else arg for arg in args] for n in range(len(args[0]))]
        found = [_computed(func, row, kwargs) for row in rows]
        return None if found[0] is None else [value for (value,) in found]
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a '{SECOND.type}' device type for generator but found 'cpu'")
    if mixed:
        _check_mixed(func, name, args, tensors)
    _note_wait(name, args, kwargs, to_second)
    if kwargs.get("device") is not None and to_second:
        kwargs = kwargs | {"device": CPU}
    result = func(*_mapped(args, _held), **{key: _mapped(value, _held) for key, value in kwargs.items()})
    for tensor in there if func._schema.is_mutable else ():
        if tensor.shape != tensor.held.shape or tensor.stride() != tensor.held.stride():
            Tensor.data.__set__(tensor, OnSecond(tensor.held))  # type: ignore[attr-defined]
    given = {id(_held(tensor)): tensor for tensor in tensors}
    return _mapped(result, lambda new: given.get(id(new)) if id(new) in given else OnSecond(new) if to_second else new)


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, OnSecond) else tensor


def _check_mixed(func: Any, name: str, args: Any, tensors: list[Tensor]) -> None:
    """Refuse what PyTorch refuses: besides copies and indices, no more than a number may lie on the CPU, to be read."""
    if name in COPIES:
        return
    if name in INDEXING and _is_there(args[0]):
        tensors = [value for value in args[2:3] if isinstance(value, Tensor)]
    changed = [
        a for a, of in zip(args, func._schema.arguments, strict=False) if of.alias_info and of.alias_info.is_write
    ]
    read = torch.Tag.pointwise in func.tags or name in FILLING | INDEXING or func._overloadname == "List"
    read = read and all(map(_is_there, _tensors(changed)))
    if any(not _is_there(tensor) and (tensor.dim() or not read) for tensor in tensors):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {SECOND} and cpu! (when "
            f"checking {func} of {', '.join(f'{list(tensor.shape)} on {tensor.device}' for tensor in tensors)})"
        )


def _note_wait(name: str, args: Any, kwargs: Any, to_second: bool) -> None:
    """Tell listeners of an operation for which the host waits; RuntimeError where it should and does not."""
    waiting = name in WAITING
    if name in COPIES:
        source = _tensors(args[0] if name == "_to_copy" else args[1])[0]
        goes = to_second if name == "_to_copy" else _is_there(_tensors(args[0])[0])
        later = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if later and not goes and name == "_to_copy" and _is_there(source):
            raise RuntimeError("a copy to the host that is not waited for: it is read before it has arrived")
        waiting = goes != _is_there(source) and not (later and goes)
    elif name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        waiting = any(index.dtype == torch.bool or not _is_there(index) for index in indices)
    if waiting and _listeners:
        frame = sys._getframe(1)
        while frame.f_back is not None and (
            frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename
        ):
            frame = frame.f_back
        for listener in _listeners:
            listener.append(f"{name} {frame.f_code.co_filename.rpartition('/')[2]}")
