"""moments: the additive figures against a plain float64 twin."""

from __future__ import annotations

import itertools
import math
import sys
import types
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ddp_streammon.moments import (
    ABS_MAX,
    COLUMNS,
    ELEMENTS,
    NANS,
    NONFINITE,
    SQ_SUM,
    SUM,
    TENSORS,
    Source,
    moments,
    reader,
    sample,
)
from ddp_streammon.moments import readers as package
from ddp_streammon.moments import torch as reference
from ddp_streammon.moments.torch import BLOCK, EXACT, LARGE, ROW
from ddp_streammon.shards import Piece, Share

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]


def cut(parameters: Sequence[nn.Parameter], streams: Sequence[int], rank: int = 0, world: int = 1) -> Share:
    """A rank's part of each parameter, cut at any element."""
    pieces = []
    for stream, parameter in zip(streams, parameters, strict=True):
        size = parameter.numel()
        start, stop = size * rank // world, size * (rank + 1) // world
        if start < stop or (size == 0 and rank == 0):
            pieces.append(Piece(stream, parameter, start, stop, whole=stop - start == size, counts=start == 0))
    return Share(tuple(pieces), 1.0)


def measured(tensors: Sequence[Tensor | None], world: int = 1, streams: Sequence[int] | None = None) -> list[Tensor]:
    """The table of each path (CPU, other devices) for tensors read in `world` parts, summed over the parts."""
    parameters = [nn.Parameter(torch.zeros(0 if t is None else t.shape), requires_grad=False) for t in tensors]
    source = {id(parameter): tensor for parameter, tensor in zip(parameters, tensors, strict=True)}
    numbers = streams or [0] * len(tensors)
    shares = [[cut(parameters, numbers, rank, world)] for rank in range(world)]
    tables = []
    for path in (moments, reference._on_device):
        parts = torch.stack([path(share, max(numbers) + 1, lambda p: source[id(p)], CPU) for share in shares])
        table = parts.sum(0)
        table[:, ABS_MAX] = parts[..., ABS_MAX].amax(0)
        tables.append(table)
    return tables


def twin(tensors: Sequence[Tensor | None]) -> Tensor:
    """[7]: the same by definition, in float64."""
    present = [tensor.detach().cpu().to_dense() for tensor in tensors if tensor is not None]
    flat = [torch.view_as_real(t.contiguous()) if t.is_complex() else t for t in present]
    values = torch.cat([torch.zeros(0, dtype=torch.float64), *(t.double().reshape(-1) for t in flat)])
    finite = values[values.isfinite()]
    row = torch.zeros(COLUMNS, dtype=torch.float64)
    row[SUM], row[SQ_SUM] = math.fsum(finite.tolist()), math.fsum(finite.square().tolist())
    row[NONFINITE], row[NANS] = len(values) - len(finite), values.isnan().sum()
    row[ELEMENTS], row[TENSORS] = len(values), len(present)
    row[ABS_MAX] = finite.abs().max() if len(finite) else 0.0
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
    assert reference.flat(tensor).data_ptr() == tensor.data_ptr()


def test_streams_and_mixed_dtypes_stay_apart() -> None:
    torch.manual_seed(0)
    tensors = [random(1000, dtype=dtype) for dtype in DTYPES for _ in range(2)]
    streams = [0, 2] * len(DTYPES)
    for table in measured(tensors, 2, streams):
        assert_equal(table[0], twin(tensors[::2]))
        assert_equal(table[2], twin(tensors[1::2]))
        assert table[1].tolist() == [0.0] * COLUMNS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [10, EXACT + 5, 2 * BLOCK + 5])
def test_nonfinite_values_are_counted_and_left_out(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    tensor = random(size, dtype=dtype)
    values = torch.view_as_real(tensor).view(-1) if dtype.is_complex else tensor
    values[[0, 3, size - 1]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=values.dtype)
    for table in measured([tensor]):
        assert (table[0, NONFINITE], table[0, NANS]) == (3, 1)
        assert_equal(table, twin([tensor]))


def test_nothing_but_nan() -> None:
    for table in measured([torch.full((5,), math.nan)]):
        assert table.tolist() == [[0.0, 0.0, 5.0, 5.0, 5.0, 1.0, 0.0]]


@pytest.mark.parametrize("world", [1, 3])
def test_sparse_gradients_count_their_zeros(world: int) -> None:
    embedding = nn.Embedding(3000, 7, sparse=True)
    embedding(torch.tensor([4, 4, 2999, 0])).square().sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None and not gradient.is_coalesced()
    for table in measured([gradient, None], world):
        assert_equal(table, twin([gradient]))
        assert table[0, ELEMENTS] == 21_000
        assert table[0, TENSORS] == 1


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("world", [1, 3])
def test_sparse_gradients_with_several_values_for_a_place(world: int) -> None:
    places = torch.tensor([[4, 0, 4, 2, 4, 2], [1, 1, 1, 0, 2, 0]])
    values = torch.tensor([[1.0, 2.0], [0.5, 3.0], [-1.0, 4.0], [math.inf, 1.0], [7.0, 9.0], [-math.inf, 1.0]])
    gradients = [
        torch.sparse_coo_tensor(places, values, (5, 3, 2), check_invariants=True),
        torch.sparse_coo_tensor(places[:, :0], values[:0], (5, 3, 2), check_invariants=True),
        torch.sparse_coo_tensor(places, values[:, 0], (5, 3), check_invariants=True).coalesce(),
        torch.sparse_coo_tensor(
            torch.tensor([[0, 1, 0], [1, 0, 1]]), torch.tensor([1.0, 2.0, 4.0]), (3, 3), check_invariants=True
        ),
        torch.eye(4).to_sparse_csr(),
    ]
    for gradient in gradients:
        for table in measured([gradient], world):
            assert_equal(table, twin([gradient]))


def test_no_gradient_at_all_is_zeros() -> None:
    for table in measured([None, None, torch.zeros(2)], 2, [0, 0, 1]):
        assert table.tolist() == [[0.0] * 7, [0.0, 0.0, 0.0, 0.0, 2.0, 1.0, 0.0]]


def test_tiny_and_huge_values_neither_vanish_nor_overflow() -> None:
    for value, size in itertools.product((1e-42, 1e-23, 1e-16, 1e16, 1e20, 3e38), (100, 40_000, 1_000_000)):
        tensor = torch.full((size,), value)
        for table in measured([tensor]):
            expected = math.sqrt(size) * tensor[0].double().item()
            assert table[0, SQ_SUM].sqrt().item() == pytest.approx(expected, rel=1e-12)
            assert table[0, ABS_MAX] == tensor[0].double()


def test_the_weight_scales_what_adds_up_and_not_the_maximum() -> None:
    parameter = nn.Parameter(torch.tensor([3.0, -4.0, math.inf]))
    pieces = cut([parameter], [0]).pieces
    for path in (moments, reference._on_device):
        table = path([Share(pieces, 0.25)], 1, lambda p: p.detach(), CPU)
        assert table.tolist() == [[-0.25, 6.25, 0.25, 0.0, 0.75, 0.25, 4.0]]


def test_the_norm_of_twenty_million_elements_is_exact_where_pytorchs_is_not() -> None:
    tensor = torch.full((20_000_000,), 0.1)
    exact = math.sqrt(20_000_000) * tensor[0].double().item()
    parameter = nn.Parameter(tensor)
    table = moments([cut([parameter], [0])], 1, lambda p: p.detach(), CPU)
    assert table[0, SQ_SUM].sqrt().item() == pytest.approx(exact, rel=1e-7)
    assert abs(tensor.norm().item() / exact - 1) > 1e-5  # what "exact" is needed for


def test_rows_made_to_round_badly_stay_within_a_millionth() -> None:
    """Each lane of a row begins with 1, next to which the squares that follow are below half an ulp."""
    for first, small in itertools.product((1, 4, 8, 16, 32), (1e-3, 2.0**-12, 0.99 * 2.0**-12, 1.4 * 2.0**-12, 6e-8)):
        row = torch.full((ROW,), small)
        row[:first] = 1.0
        for table in measured([row.repeat(1000)]):
            expected = twin([row.repeat(1000)])
            torch.testing.assert_close(table[0, [SUM, SQ_SUM]], expected[[SUM, SQ_SUM]], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mean_far_from_zero(dtype: torch.dtype) -> None:
    for mean, spread in ((1e3, 1.0), (0.7, 0.0), (100.0, 1e-3)):
        tensor = (torch.randn(100_000) * spread + mean).to(dtype)
        for table in measured([tensor]):
            torch.testing.assert_close(table[0], twin([tensor]), rtol=1e-6, atol=0.0)


def test_on_other_devices_large_tensors_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [random(100_003), random(50)]
    _, whole = measured(tensors)
    monkeypatch.setattr(reference, "DEVICE_BLOCK", 1000)
    _, blocks = measured(tensors)
    assert_equal(blocks, twin(tensors))
    assert_equal(blocks, whole[0])


# The reader -------------------------------------------------------------------------------------------------------


class Unlaunchable:
    """A kernel that its device cannot run."""

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, source: Source) -> Tensor:
        raise RuntimeError("no kernel image is available")


MODULE = "ddp_streammon.moments.triton"
FAILURES = {
    "Triton is missing": ({"triton": None}, "ModuleNotFoundError: import of triton halted"),
    "the launch fails": ({MODULE: types.SimpleNamespace(TritonMoments=Unlaunchable)}, "RuntimeError: no kernel image"),
}


@pytest.mark.parametrize(("modules", "reason"), FAILURES.values(), ids=list(FAILURES))
def test_without_the_kernel_there_is_one_warning_and_the_same_figures(
    modules: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(package._OneRead, "works", True)
    parameter = nn.Parameter(torch.randn(1000), requires_grad=False)
    arguments = ([cut([parameter], [0])], 1)
    read = package._OneRead(*arguments, CPU)
    expected = moments(*arguments, lambda p: p, CPU)
    with pytest.warns(RuntimeWarning, match=f"reads gradients in one pass failed: .*{reason}.*more slowly") as caught:
        assert torch.equal(read(lambda p: p), expected)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read(lambda p: p), expected)
        assert torch.equal(package._OneRead(*arguments, CPU)(lambda p: p), expected)


def test_an_error_of_the_source_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package._OneRead, "works", False)
    parameter = nn.Parameter(torch.zeros(1))
    with pytest.raises(KeyError):
        package._OneRead([cut([parameter], [0])], 1, CPU)(lambda p: {}[p])


def test_on_cuda_the_kernel_is_tried_and_elsewhere_not() -> None:
    assert isinstance(reader([], 1, torch.device("cuda")), package._OneRead)
    assert not isinstance(reader([], 1, CPU), package._OneRead)


# Samples of batches -----------------------------------------------------------------------------------------------


def sample_twin(batch: torch.Tensor, compare: bool) -> list[float]:
    """The figures of a sample's first 32 items and of at most 1,024 features of each, number by number."""
    step = -(-batch[0].numel() // 1024)
    rows = [item.reshape(-1)[::step].tolist() for item in batch[:32]]
    cells = [float(value) for row in rows for value in row]
    finite = [value for value in cells if math.isfinite(value)]
    integers = not batch.is_floating_point()
    sums = (math.nan, math.nan) if integers else (math.fsum(finite), math.fsum(value**2 for value in finite))
    constant = float(compare and len(rows) > 1 and all(row == rows[0] for row in rows))
    top = max((abs(value) for value in finite), default=0.0)
    return [*sums, len(finite), len(cells) - len(finite), constant, math.nan, top]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.int64])
def test_the_figures_of_a_sample_are_by_definition(dtype: torch.dtype) -> None:
    for shape in ((1, 3), (7, 300), (40, 1025), (33, 3, 20, 20)):
        batch = torch.randn(shape).mul(3).to(dtype) if dtype.is_floating_point else torch.randint(0, 2, shape).to(dtype)
        same = batch[:1].expand(shape).contiguous()
        bad = batch.clone()
        if dtype.is_floating_point:
            bad.view(-1)[0], bad.view(-1)[-1] = math.inf, math.nan
        for tensor in (batch, same, bad, batch[:, ::2]):
            for compare in (True, False):
                row = torch.zeros(sample.COLUMNS, dtype=torch.float64)
                sample.add_sample(row, tensor, compare=compare)
                expected = sample_twin(tensor, compare)
                expected[sample.BITS] = row[sample.BITS].item()
                assert row.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


def test_a_samples_bits_tell_values_and_their_order() -> None:
    def bits(batch: torch.Tensor) -> float:
        row = torch.zeros(sample.COLUMNS, dtype=torch.float64)
        sample.add_sample(row, batch, compare=False)
        return row[sample.BITS].item()

    batch = torch.randn(4, 50)
    swapped = batch[[1, 0, 2, 3]]
    changed = batch.clone()
    changed[2, 3] += 1e-6
    assert bits(batch) == bits(batch.clone())
    assert len({bits(batch), bits(swapped), bits(changed), bits(batch.double())}) == 4
    assert all(0 <= bits(each) < sample.MODULUS for each in (batch, swapped, changed))


def test_samples_add_up() -> None:
    first, second = torch.randn(8, 20), 5 * torch.randn(8, 20)
    row, twin = (torch.zeros(sample.COLUMNS, dtype=torch.float64) for _ in range(2))
    sample.add_sample(row, first, compare=True)
    sample.add_sample(row, second, compare=True)
    sample.add_sample(twin, torch.cat([first, second]), compare=True)
    exact = [sample.COUNT, sample.BAD, sample.CONSTANT, sample.ABS_MAX]
    assert row[exact].tolist() == twin[exact].tolist()
    assert row[: sample.COUNT].tolist() == pytest.approx(twin[: sample.COUNT].tolist(), rel=1e-12)
