"""moments.triton against the float64 twin: the real kernel on CUDA, Triton's interpreter on CPU.

Triton is one or the other for the life of a process, by the environment at its import. Without a CUDA device
test_emulated_cuda.py runs these tests in a process of their own, in the interpreter.
"""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddp_streammon.moments import ABS_MAX, COLUMNS, ELEMENTS, NANS, NONFINITE, SQ_SUM, SUM, TENSORS, reader
from ddp_streammon.shards import Piece, Share
from tests.test_moments import cut, twin

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
on_cuda = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
has_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of what only CUDA has."""
    return pytest.mark.gpu(on_cuda(has_triton(test)))


def kernel(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that runs the kernel: in the interpreter, or on CUDA."""
    return has_triton(test) if INTERPRETED else gpu(test)


class Case:
    """Tensors that stand for gradients, one a parameter, which a test may exchange between reads."""

    def __init__(self, tensors: Sequence[Tensor | None], streams: Sequence[int] | None = None) -> None:
        self.tensors = list(tensors)
        self.streams = list(streams or [0] * len(tensors))
        self.parameters = [
            nn.Parameter(torch.zeros(0 if t is None else t.shape, device=DEVICE), requires_grad=False) for t in tensors
        ]
        self._numbers = {id(parameter): number for number, parameter in enumerate(self.parameters)}

    def source(self, parameter: nn.Parameter) -> Tensor | None:
        return self.tensors[self._numbers[id(parameter)]]

    def share(self, rank: int = 0, world: int = 1) -> Share:
        return cut(self.parameters, self.streams, rank, world)

    def read(self) -> Any:
        """A reader of all of them."""
        return triton_moments([self.share()], max(self.streams) + 1)

    def in_parts(self, world: int) -> Tensor:
        """What `world` ranks read together."""
        streams = max(self.streams) + 1
        parts = [triton_moments([self.share(r, world)], streams)(self.source) for r in range(world)]
        table = torch.stack(parts).sum(0)
        table[:, ABS_MAX] = torch.stack(parts)[..., ABS_MAX].amax(0)
        return table

    def twin(self) -> Tensor:
        """[S, 7] by definition."""
        held = list(zip(self.streams, self.tensors, strict=True))
        return torch.stack([twin([t for s, t in held if s == stream]) for stream in range(max(self.streams) + 1)])


def triton_moments(shares: Sequence[Share], num_streams: int) -> Any:
    from ddp_streammon.moments.triton import TritonMoments

    return TritonMoments(shares, num_streams, DEVICE)


def assert_close(table: Tensor, expected: Tensor, bound: float = 1e-6) -> None:
    """Counts and abs-max exactly, squares to `bound`; sums to as much of what their signs could not have cancelled."""
    assert table.device.type == DEVICE.type and table.dtype == torch.float64
    table = table.cpu()
    exact = [NONFINITE, NANS, ELEMENTS, TENSORS, ABS_MAX]
    assert torch.equal(table[:, exact], expected[:, exact]), f"{table} is not {expected}"
    torch.testing.assert_close(table[:, SQ_SUM], expected[:, SQ_SUM], rtol=bound, atol=0.0)
    norms = (expected[:, SQ_SUM] * expected[:, ELEMENTS]).sqrt()
    assert ((table[:, SUM] - expected[:, SUM]).abs() <= bound * norms).all(), f"{table} is not {expected}"


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(DEVICE, dtype)


def at_offset(tensor: Tensor, offset: int) -> Tensor:
    """The same values as a view into a buffer of other values, nan at both of its ends, as in a bucket of DDP."""
    flat = torch.full((tensor.numel() + offset + 9,), math.nan, dtype=tensor.dtype, device=tensor.device)
    view = flat[offset : offset + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of which small tensors fill several, read in several rounds and folded in several."""
    from ddp_streammon.moments import triton

    monkeypatch.setattr(triton, "CHUNKS", (512, 512))
    monkeypatch.setattr(triton, "ROWS", 32)
    monkeypatch.setattr(triton, "FOLD", 8)


# Values -----------------------------------------------------------------------------------------------------------

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0,), (), (1,), (3, 5), (7, 0, 2), (255,), (512,), (513,), (3, 11, 31)]


@kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shapes_and_alignments(dtype: torch.dtype, small: None) -> None:
    tensors = [at_offset(random(*shape, dtype=dtype), offset) for shape in SHAPES for offset in (0, 1, 7)]
    case = Case(tensors, [number % 5 for number in range(len(tensors))])
    assert_close(case.read()(case.source), case.twin())


@kernel
@pytest.mark.parametrize("seed", range(2 if INTERPRETED else 20))
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_together_read_what_the_twin_reads(seed: int, world: int, small: None) -> None:
    torch.manual_seed(seed)

    def draw(stop: int) -> int:
        return int(torch.randint(stop, ()))

    tensors = [
        None if draw(8) == 0 else at_offset(random(draw(1200), dtype=FLOATS[draw(3)]) * 10.0 ** (draw(9) - 4), draw(9))
        for _ in range(9)
    ]
    case = Case(tensors, [draw(4) for _ in tensors[1:]] + [3])
    assert_close(case.in_parts(world), case.twin())


@kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dense_memory_in_any_order(dtype: torch.dtype, small: None) -> None:
    tensors = [
        random(4, 6, 5, 7, dtype=dtype).to(memory_format=torch.channels_last),
        random(30, 20, dtype=dtype).t(),
        random(6, 7, 8, dtype=dtype).permute(1, 2, 0),
        random(5, 1, 7, dtype=dtype).transpose(0, 2),
        random(1, 9, dtype=dtype)[:, 2:7],
    ]
    case = Case(tensors)
    read = case.read()
    assert_close(read(case.source), case.twin())
    assert not read.find(case.source)  # all of them were the kernel's
    assert_close(case.in_parts(3), case.twin())


@kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nonfinite_values_are_counted_and_left_out(dtype: torch.dtype, small: None) -> None:
    bad = [math.nan, math.inf, -math.inf, math.nan]
    tensors = [random(size, dtype=dtype) for size in (10, 1300)] + [torch.full((5,), math.nan, device=DEVICE)]
    for tensor in tensors[:2]:
        tensor[[0, 3, 7, len(tensor) - 1]] = torch.tensor(bad, dtype=dtype, device=DEVICE)
    case = Case(tensors, [0, 1, 2])
    table = case.read()(case.source)
    assert_close(table, case.twin())
    assert table[:, NONFINITE].tolist() == [4, 4, 5] and table[:, NANS].tolist() == [2, 2, 5]


@kernel
@pytest.mark.parametrize("value", [1e-45, 1e-42, 1.2e-38, 1e-23, 1e-16, 0.1, 1e16, 1e20, 3.4e38])
def test_tiny_and_huge_values_neither_vanish_nor_overflow(value: float, small: None) -> None:
    tensors = [
        torch.full((1300,), value, device=DEVICE),
        random(1300).clamp(-1, 1) * value,
        -torch.ones(9, device=DEVICE),
    ]
    tensors.append(torch.tensor([value, -1.0, value], device=DEVICE))
    case = Case(tensors, [0, 1, 1, 2])
    assert_close(case.read()(case.source), case.twin())


@kernel
def test_nothing_but_zeros_and_no_gradient_at_all(small: None) -> None:
    case = Case([torch.zeros(700, device=DEVICE), None, torch.zeros(0, device=DEVICE)], [0, 1, 3])
    expected = torch.zeros(4, COLUMNS, dtype=torch.float64)
    expected[0, ELEMENTS], expected[0, TENSORS], expected[3, TENSORS] = 700, 1, 1
    assert torch.equal(case.read()(case.source).cpu(), expected)
    assert torch.equal(triton_moments([], 2)(case.source).cpu(), torch.zeros(2, COLUMNS, dtype=torch.float64))
    assert triton_moments([], 0)(case.source).shape == (0, COLUMNS)


@kernel
def test_many_streams(small: None) -> None:
    streams = 40 if INTERPRETED else 10_000
    case = Case([random(number % 13) for number in range(streams)], list(range(streams)))
    assert_close(case.read()(case.source), case.twin())


@kernel
def test_shares_count_for_their_weights_and_the_maximum_for_itself(small: None) -> None:
    case = Case([random(900), random(700), random(40)], [0, 1, 0])
    pieces = case.share().pieces
    table = triton_moments([Share(pieces[2:], 0.25), Share(pieces[:2], 1.0)], 2)(case.source)
    big, middle, light = (twin([tensor]) for tensor in case.tensors)
    expected = torch.stack([big + 0.25 * light, middle])
    expected[0, ABS_MAX] = max(big[ABS_MAX], light[ABS_MAX])
    assert_close(table, expected)


@kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_sizes_that_users_get(dtype: torch.dtype) -> None:
    case = Case([at_offset(random(100_003, dtype=dtype) + 3.0, 5), random(70_000, dtype=dtype)])
    assert_close(case.read()(case.source), case.twin())


@kernel
def test_the_same_values_give_the_same_bits(small: None) -> None:
    case = Case([random(2000), random(1000, dtype=torch.bfloat16)])
    read = case.read()
    first = read(case.source)
    assert all(torch.equal(read(case.source), first) for _ in range(3))


@has_triton
def test_larger_models_have_larger_chunks() -> None:
    from ddp_streammon.moments.triton import CHUNKS, ENOUGH_CHUNKS, MAX_CHUNKS, chunk_size

    smallest, largest = CHUNKS
    assert chunk_size([]) == chunk_size([10, 20]) == chunk_size([smallest * ENOUGH_CHUNKS]) == smallest
    assert chunk_size([smallest * ENOUGH_CHUNKS, 1]) == 2 * smallest
    assert chunk_size([largest * ENOUGH_CHUNKS, 1]) == chunk_size([largest * MAX_CHUNKS]) == largest
    assert chunk_size([largest * MAX_CHUNKS, 1]) == 2 * largest
    assert chunk_size([largest * MAX_CHUNKS] * 5) == 8 * largest


# What moves -------------------------------------------------------------------------------------------------------


@kernel
def test_gradients_come_and_go_and_move(small: None) -> None:
    case = Case([random(900), random(600), random(40)], [0, 1, 1])
    read = case.read()
    stages: list[list[Tensor | None]] = [
        case.tensors,
        [random(900), None, case.tensors[2]],
        [None, None, None],
        [case.tensors[0], random(600), None],
        [at_offset(random(900), 1), random(600, dtype=torch.bfloat16), random(40)],
    ]
    for stage in stages:
        case.tensors = stage
        assert_close(read(case.source), case.twin())


@kernel
def test_other_values_in_the_same_place_are_read(small: None) -> None:
    case = Case([random(900)])
    read = case.read()
    read(case.source)
    case.tensors[0].copy_(random(900))
    assert_close(read(case.source), case.twin())


@kernel
def test_another_dtype_and_other_strides_at_the_same_address_are_seen(small: None) -> None:
    memory = random(1200)
    case = Case([memory[:600]])
    read = case.read()
    for tensor in (memory[:600], memory[::2], memory[:600], memory.view(torch.bfloat16)[:600]):
        assert tensor.data_ptr() == memory.data_ptr()
        case.tensors = [tensor]
        assert_close(read(case.source), case.twin())


@kernel
def test_the_device_is_told_only_what_changed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddp_streammon.moments.triton import TritonMoments

    sent: list[int] = []
    send = TritonMoments._send
    counted = lambda self, tensors: (sent.append(len(tensors)), send(self, tensors))[1]  # noqa: E731
    monkeypatch.setattr(TritonMoments, "_send", counted)
    case = Case([random(900), random(600)])
    read = case.read()
    for _ in range(3):
        read(case.source)
    assert len(sent) == 1
    case.tensors[0] = random(900)
    assert_close(read(case.source), case.twin())
    case.tensors[1] = None
    assert_close(read(case.source), case.twin())
    assert len(sent) == 3


@kernel
def test_gradients_are_not_kept_alive(small: None) -> None:
    case = Case([random(900), random(600)[::2]])
    read = case.read()
    read(case.source)
    gone = [weakref.ref(tensor) for tensor in case.tensors if tensor is not None]
    case.tensors = [None, None]
    assert [reference() for reference in gone] == [None, None]


# What the kernel does not read ------------------------------------------------------------------------------------


def unread() -> list[Tensor]:
    """One tensor of each kind that the kernel does not read."""
    places = torch.tensor([[4, 0, 4, 29, 4]], device=DEVICE)
    values = torch.randint(-9, 9, (5, 7), device=DEVICE).float()  # whose sums are the same in any order
    sparse = torch.sparse_coo_tensor(places, values, (30, 7), check_invariants=False)
    return [
        random(300, dtype=torch.float64),
        random(300, dtype=torch.complex64),
        random(40, 30)[::2, ::3],
        random(1).expand(500),
        sparse,
        sparse.coalesce(),
    ]


@kernel
def test_what_it_cannot_read_is_added(small: None) -> None:
    case = Case([random(900), *unread(), random(30, dtype=torch.float16)], [0, 1, 1, 0, 2, 3, 3, 4])
    read = case.read()
    table = read(case.source)
    assert_close(table, case.twin())
    case.tensors[5], case.tensors[6] = None, random(30, 7)
    assert_close(read(case.source), case.twin())


@gpu
def test_gradients_on_another_device_are_added() -> None:
    case = Case([random(900), random(600).cpu(), None])
    assert_close(case.read()(case.source), case.twin())


# Samples of batches -----------------------------------------------------------------------------------------------


def batch_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype is torch.bool:
        return torch.rand(shape, device=DEVICE) > 0.5
    if not dtype.is_floating_point:
        return torch.randint(0 if dtype is torch.uint8 else -100, 100, shape, dtype=dtype, device=DEVICE)
    return random(*shape).to(dtype)


BATCH_SHAPES = [(1, 3), (2, 1), (7, 300), (40, 1024), (33, 3, 20, 20), (5, 1025)]
BATCH_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int32, torch.int64]


@kernel
@pytest.mark.parametrize("dtype", BATCH_DTYPES, ids=str)
def test_the_sample_of_a_batch_is_pytorchs(dtype: torch.dtype) -> None:
    from ddp_streammon.moments import sample, sample_triton

    for shape in BATCH_SHAPES:
        batches = [batch_of(shape, dtype) for _ in range(2)]
        if len(shape) == 4:
            batches.append(batches[0].to(memory_format=torch.channels_last))
        if dtype.is_floating_point:
            batches[0].view(-1)[0], batches[1].view(-1)[-1] = math.inf, math.nan
        batches.append(batches[-1][:1].expand(shape).contiguous())
        for compare in (True, False):
            own, twin = (torch.zeros(sample.COLUMNS, dtype=torch.float64, device=DEVICE) for _ in range(2))
            for batch in batches:
                assert sample_triton.can_add(own.device, batch)
                place = torch.tensor(sample_triton.place(batch, compare=compare), dtype=torch.float64, device=DEVICE)
                nothing = torch.zeros(sample_triton.PLACE_CELLS, dtype=torch.float64, device=DEVICE)
                rows = torch.stack([torch.zeros_like(own), own])
                sample_triton.add_samples(rows, torch.stack([nothing, place]))
                assert not rows[0].any()
                own = rows[1]
                sample.add_sample(twin, batch, compare=compare)
            exact = [sample.COUNT, sample.BAD, sample.CONSTANT, sample.BITS, sample.ABS_MAX]
            assert torch.equal(own[exact], twin[exact]), shape
            torch.testing.assert_close(own, twin, rtol=1e-9, atol=1e-9, equal_nan=True)


@has_triton
def test_batches_with_gaps_are_not_the_kernels() -> None:
    from ddp_streammon.moments import sample_triton

    assert sample_triton.can_add(torch.device("cpu"), torch.zeros(4, 6)[::2])
    assert not sample_triton.can_add(torch.device("cpu"), torch.zeros(4, 6)[:, ::2])
    assert not sample_triton.can_add(torch.device("cpu"), torch.zeros(4, 1).expand(4, 6))
    assert not sample_triton.can_add(torch.device("cpu"), torch.zeros(4, 6, dtype=torch.complex64))


# On CUDA ----------------------------------------------------------------------------------------------------------


@contextmanager
def no_waiting() -> Iterator[None]:
    """Waiting for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_no_call_waits_for_the_device() -> None:
    case = Case([random(900, 100), random(600, dtype=torch.bfloat16), *unread()])
    read = case.read()
    read(case.source)
    moved = random(900, 100)
    with no_waiting():
        table = read(case.source)
    assert_close(table, case.twin())
    case.tensors[0], case.tensors[1] = moved, None
    with no_waiting():
        table = read(case.source)
    assert_close(table, case.twin())


@gpu
def test_what_is_moving_is_read_where_it_was_then() -> None:
    """Each step's gradients lie elsewhere, and the host is many steps ahead of the device."""
    case = Case([random(5000) for _ in range(3)], [0, 1, 1])
    read = case.read()
    steps = [[random(5000) for _ in range(3)] for _ in range(100)]
    read(case.source)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    tables = []
    for step in steps:
        case.tensors = list(step)
        tables.append(read(case.source))
    for step, table in zip(steps, tables, strict=True):
        case.tensors = list(step)
        assert_close(table, case.twin())


@gpu
def test_memory_does_not_grow() -> None:
    case = Case([random(90_000), random(600, dtype=torch.bfloat16)])
    read = case.read()
    other = [random(90_000), random(600, dtype=torch.bfloat16)]
    for _ in range(3):
        read(case.source)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for number in range(100):
        if number % 10 == 0:
            case.tensors, other = other, case.tensors
        read(case.source)
    assert torch.cuda.memory_allocated() == before


@gpu
def test_another_cuda_stream() -> None:
    case = Case([random(90_000)])
    read = case.read()
    side = torch.cuda.Stream()
    for _ in range(3):
        case.tensors = [random(90_000)]
        assert_close(read(case.source), case.twin())
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            table = read(case.source)
        side.synchronize()
        assert_close(table, case.twin())


@gpu
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 300_000_001), (torch.bfloat16, 2_300_000_001)], ids=str)
def test_large_tensors(dtype: torch.dtype, size: int) -> None:
    """Also beyond 2 ** 31 elements and bytes."""
    tensor = torch.empty(size, dtype=dtype, device=DEVICE).normal_(0.1)
    case = Case([None])
    case.tensors = [tensor]
    table = triton_moments([Share((Piece(0, case.parameters[0], 0, size, whole=True),), 1.0)], 1)(case.source)
    expected = torch.zeros(1, COLUMNS, dtype=torch.float64)
    for block in tensor.split(50_000_000):
        wide = block.double()
        expected[0, SUM] += wide.sum().item()
        expected[0, SQ_SUM] += wide.square().sum().item()
        expected[0, ABS_MAX] = max(expected[0, ABS_MAX].item(), wide.abs().max().item())
    expected[0, ELEMENTS], expected[0, TENSORS] = size, 1
    assert_close(table, expected)


@gpu
def test_on_cuda_the_reader_is_the_kernel() -> None:
    case = Case([random(900), random(600, dtype=torch.bfloat16)], [0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert_close(reader([case.share()], 2, DEVICE)(case.source), case.twin())
