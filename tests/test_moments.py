"""moments: the additive figures against a plain float64 twin."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ddp_streammon.moments import ABS_MAX, ELEMENTS, NONFINITE, SQ_SUM, SUM, TENSORS, moments
from ddp_streammon.moments import torch as reference
from ddp_streammon.moments.torch import BLOCK, EXACT, LARGE
from ddp_streammon.shards import Share, Topology, _cut

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]


def measured(tensors: Sequence[Tensor | None], world: int = 1, streams: Sequence[int] | None = None) -> list[Tensor]:
    """The table of each path (CPU, other devices) for tensors read in `world` parts, summed over the parts."""
    parameters = [nn.Parameter(torch.zeros(0 if t is None else t.shape), requires_grad=False) for t in tensors]
    source = {id(parameter): tensor for parameter, tensor in zip(parameters, tensors, strict=True)}
    numbers = streams or [0] * len(tensors)
    shares = [
        [Share(tuple(_cut(list(zip(numbers, parameters, strict=True)), Topology(rank, world))), 1.0)]
        for rank in range(world)
    ]
    tables = []
    for path in (moments, reference._on_device):
        parts = torch.stack([path(share, max(numbers) + 1, lambda p: source[id(p)], CPU) for share in shares])
        table = parts.sum(0)
        table[:, ABS_MAX] = parts[..., ABS_MAX].amax(0)
        tables.append(table)
    return tables


def twin(tensors: Sequence[Tensor | None]) -> Tensor:
    """The same by definition, in float64."""
    present = [tensor for tensor in tensors if tensor is not None]
    dense = [tensor.to_dense() if tensor.layout != torch.strided else tensor for tensor in present]
    flat = [torch.view_as_real(t.contiguous()) if t.is_complex() else t for t in dense]
    values = torch.cat([torch.zeros(0, dtype=torch.float64), *(t.double().reshape(-1) for t in flat)])
    finite = values[values.isfinite()]
    row = torch.zeros(6, dtype=torch.float64)
    row[SUM], row[SQ_SUM] = math.fsum(finite.tolist()), math.fsum(finite.square().tolist())
    row[NONFINITE], row[ELEMENTS] = len(values) - len(finite), len(values)
    row[TENSORS], row[ABS_MAX] = len(present), finite.abs().max() if len(finite) else 0.0
    return row


def assert_equal(table: Tensor, expected: Tensor) -> None:
    """To 1e-12 where float64 is used throughout, to 2e-7 where it is float32 within rows."""
    bound = 1e-12 if expected[ELEMENTS] <= EXACT else 2e-7
    torch.testing.assert_close(table, expected.view(table.shape), rtol=bound, atol=bound * expected[SQ_SUM].sqrt())


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world", [1, 3])
def test_dtypes_and_shapes_equal_the_twin(dtype: torch.dtype, world: int) -> None:
    torch.manual_seed(0)
    shapes = [(0,), (), (1,), (3, 5), (7, 0, 2), (EXACT,), (EXACT + 1,), (LARGE + 11,), (3, BLOCK + 11), (2, 3, 4, 5)]
    tensors = [random(*shape, dtype=dtype) for shape in shapes]
    for table in measured(tensors, world):
        assert_equal(table, twin(tensors))


@pytest.mark.parametrize("world", [1, 2, 5])
def test_strides_do_not_matter(world: int) -> None:
    torch.manual_seed(0)
    tensors = [
        random(8, 16, 12, 10).to(memory_format=torch.channels_last),
        random(300, 200).t(),
        random(90, 80)[::2, ::3],
        random(500)[7::5],
        random(1).expand(5000),
        random(5, 1, 7).transpose(0, 2),
        random(6, 7, 8).permute(1, 2, 0),
    ]
    for table in measured(tensors, world):
        assert_equal(table, twin(tensors))


def test_channels_last_is_read_without_a_copy() -> None:
    tensor = random(8, 16, 12, 10).to(memory_format=torch.channels_last)
    assert reference._flat(tensor).data_ptr() == tensor.data_ptr()


def test_streams_and_mixed_dtypes_stay_apart() -> None:
    torch.manual_seed(0)
    tensors = [random(1000, dtype=dtype) for dtype in DTYPES for _ in range(2)]
    streams = [0, 2] * len(DTYPES)
    for table in measured(tensors, 2, streams):
        assert_equal(table[0], twin(tensors[::2]))
        assert_equal(table[2], twin(tensors[1::2]))
        assert table[1].tolist() == [0.0] * 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [10, EXACT + 5, 2 * BLOCK + 5])
def test_nonfinite_values_are_counted_and_left_out(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    tensor = random(size, dtype=dtype)
    values = torch.view_as_real(tensor).view(-1) if dtype.is_complex else tensor
    values[[0, 3, size - 1]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=values.dtype)
    for table in measured([tensor]):
        assert table[0, NONFINITE] == 3
        assert_equal(table, twin([tensor]))


def test_nothing_but_nan() -> None:
    for table in measured([torch.full((5,), math.nan)]):
        assert table.tolist() == [[0.0, 0.0, 5.0, 5.0, 1.0, 0.0]]


@pytest.mark.parametrize("world", [1, 3])
def test_sparse_gradients_count_their_zeros(world: int) -> None:
    embedding = nn.Embedding(3000, 7, sparse=True)
    embedding(torch.tensor([4, 4, 2999, 0])).square().sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    for table in measured([gradient, None], world):
        assert_equal(table, twin([gradient]))
        assert table[0, ELEMENTS] == 21_000
        assert table[0, TENSORS] == 1


def test_no_gradient_at_all_is_zeros() -> None:
    for table in measured([None, None, torch.zeros(2)], 2, [0, 0, 1]):
        assert table.tolist() == [[0.0] * 6, [0.0, 0.0, 0.0, 2.0, 1.0, 0.0]]


def test_tiny_and_huge_values_neither_vanish_nor_overflow() -> None:
    for value, size in itertools.product((1e-42, 1e-23, 1e-16, 1e16, 1e20, 3e38), (100, 40_000, 1_000_000)):
        tensor = torch.full((size,), value)
        for table in measured([tensor]):
            expected = math.sqrt(size) * tensor[0].double().item()
            assert table[0, SQ_SUM].sqrt().item() == pytest.approx(expected, rel=1e-12)
            assert table[0, ABS_MAX] == tensor[0].double()


def test_the_weight_scales_what_adds_up_and_not_the_maximum() -> None:
    parameter = nn.Parameter(torch.tensor([3.0, -4.0, math.inf]))
    pieces = tuple(_cut([(0, parameter)], Topology()))
    for path in (moments, reference._on_device):
        table = path([Share(pieces, 0.25)], 1, lambda p: p.detach(), CPU)
        assert table.tolist() == [[-0.25, 6.25, 0.25, 0.75, 0.25, 4.0]]


def test_the_norm_of_twenty_million_elements_is_exact_where_pytorchs_is_not() -> None:
    tensor = torch.full((20_000_000,), 0.1)
    exact = math.sqrt(20_000_000) * tensor[0].double().item()
    parameter = nn.Parameter(tensor)
    table = moments([Share(tuple(_cut([(0, parameter)], Topology())), 1.0)], 1, lambda p: p.detach(), CPU)
    assert table[0, SQ_SUM].sqrt().item() == pytest.approx(exact, rel=1e-7)
    assert abs(tensor.norm().item() / exact - 1) > 1e-5  # what "exact" is needed for


def test_on_other_devices_large_tensors_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [random(100_003), random(50)]
    _, whole = measured(tensors)
    monkeypatch.setattr(reference, "DEVICE_BLOCK", 1000)
    _, blocks = measured(tensors)
    assert_equal(blocks, twin(tensors))
    assert_equal(blocks, whole[0])
