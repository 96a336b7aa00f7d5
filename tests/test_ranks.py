"""ranks.py: votes, checksums, what ranks say of themselves, and a clock that leaves no trace in copies of the model."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math
import pickle
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddp_streammon.ranks import Clock, Replicas, bit_sum, compared, outvoted
from ddp_streammon.shards import Family

CPU = torch.device("cpu")


# Votes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([1], []),
        ([1, 1], []),
        ([1, 2], [0, 1]),
        ([1, 1, 2], [2]),
        ([2, 1, 1], [0]),
        ([1, 2, 3], [0, 1, 2]),
        ([1, 1, 1, 2], [3]),
        ([1, 1, 2, 2], [0, 1, 2, 3]),
        ([1, 1, 2, 3], [0, 1, 2, 3]),
        ([1, 1, 1, 2, 3], [3, 4]),
    ],
)
def test_ranks_without_the_value_of_more_than_half_are_outvoted(values: list[float], expected: list[int]) -> None:
    assert outvoted(range(len(values)), values) == expected
    named = [10 + 3 * rank for rank in range(len(values))]
    assert outvoted(named, values) == [named[rank] for rank in expected]


def test_a_vote_does_not_depend_on_the_order_of_ranks() -> None:
    for order in itertools.permutations(range(4)):
        assert sorted(outvoted(order, [7.0 if rank == 2 else 1.0 for rank in order])) == [2]


def family(*sets: tuple[int, ...], stream: int = 0) -> Family:
    return Family(stream, sets, (), size=0, first=True)


def test_families_are_compared_within_each_set_of_replicas_and_among_ranks_that_took_part() -> None:
    families = [family((0, 1, 2), (3, 4, 5), stream=1), family((0,), (1,)), family((0, 1, 2, 3, 4, 5))]
    gradients, weights = [5.0, 5.0, 5.0, 8.0, 8.0, 8.0], [1.0, 1.0, 9.0, 2.0, 2.0, 2.0]
    equal = [4.0] * 6
    checksums = [(gradients, weights), (weights, weights), (equal, equal)]
    assert compared(families, checksums, ("rgb", "depth"), range(6)) == (
        Replicas("depth", gradients=True, weights=False, ranks=(2,)),
        Replicas("rgb", gradients=True, weights=True, ranks=()),
    )
    without = compared(families, checksums, ("rgb", "depth"), {0, 1, 3, 4, 5})
    assert [(found.stream, found.weights, found.gradients) for found in without] == [
        ("depth", True, True),
        ("rgb", True, True),
    ]


# Checksums --------------------------------------------------------------------------------------------------------

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
OTHERS = [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool, torch.int16, torch.int32, torch.int64]


def random(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.randn(*shape, dtype=dtype, generator=generator)
    return (torch.randn(*shape, generator=generator) * 50).to(dtype)


def sum_of(*tensors: Tensor | None) -> float:
    total = bit_sum(tensors, CPU)
    assert total.dtype == torch.float64
    assert total.shape == ()
    assert total.item() == int(total.item())
    assert 0 <= total.item() < 2**32
    return total.item()


@pytest.mark.parametrize("dtype", FLOATS + COMPLEX + OTHERS, ids=str)
def test_equal_numbers_have_equal_checksums_in_whatever_memory(dtype: torch.dtype) -> None:
    tensor = random(dtype, 6, 8)
    transposed = tensor.t().contiguous().t()
    with_gaps = torch.stack([tensor, tensor], dim=2)[..., 0]
    assert not transposed.is_contiguous()
    assert not with_gaps.is_contiguous()
    assert sum_of(tensor.clone()) == sum_of(tensor) == sum_of(transposed) == sum_of(with_gaps)
    assert sum_of(nn.Parameter(tensor, requires_grad=dtype.is_floating_point)) == sum_of(tensor)


def test_channels_last_memory_has_the_checksum_of_contiguous_memory() -> None:
    weight = random(torch.float32, 4, 3, 5, 5)
    assert sum_of(weight.to(memory_format=torch.channels_last)) == sum_of(weight)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.int64], ids=str)
def test_every_single_changed_bit_is_seen(dtype: torch.dtype) -> None:
    tensor = random(dtype, 5)
    before = sum_of(tensor)
    size = tensor.element_size()
    for place in range(5):
        for bit in range(8 * size):
            changed = tensor.clone()
            changed.view(torch.uint8)[place * size + bit // 8] ^= 1 << bit % 8
            assert sum_of(changed) != before


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_changed_sign_a_doubled_tensor_and_a_negative_zero_are_seen(dtype: torch.dtype) -> None:
    tensor = random(dtype, 5).abs()
    assert len({sum_of(tensor), sum_of(-tensor), sum_of(2 * tensor), sum_of(torch.zeros_like(tensor))}) == 4
    assert sum_of(torch.zeros(1).to(dtype)) != sum_of(-torch.zeros(1).to(dtype))


def test_the_order_of_tensors_matters_and_what_cancels_in_one_tensors_sum_does_not() -> None:
    a, b = random(torch.float32, 3), random(torch.float32, 3, seed=1)
    assert sum_of(a, b) != sum_of(b, a)
    assert sum_of(a) == sum_of(a.flip(0))
    assert sum_of(torch.tensor([1.0, -2.0])) == sum_of(torch.tensor([-1.0, 2.0]))


def test_no_gradient_is_not_a_gradient_of_zeros() -> None:
    zeros = torch.zeros(3)
    assert len({sum_of(zeros, None), sum_of(None, zeros), sum_of(zeros, zeros), sum_of(None, None)}) == 4
    assert sum_of() == 0.0
    assert sum_of(torch.zeros(0)) == 0.0


def test_special_values_are_told_apart_and_equal_to_themselves() -> None:
    values = [math.nan, math.inf, -math.inf, 5e-324, 0.0, 1.0]
    sums = [sum_of(torch.tensor([value], dtype=torch.float64)) for value in values]
    assert len(set(sums)) == len(values)
    assert sums == [sum_of(torch.tensor([value], dtype=torch.float64)) for value in values]


def test_sparse_and_lazily_conjugated_or_negated_tensors_count_as_what_they_stand_for() -> None:
    sparse = torch.tensor([4.0, 0.0, 3.0, 0.0, 0.0]).to_sparse()
    assert sum_of(sparse) == sum_of(sparse.to_dense())
    waves = torch.complex(random(torch.float32, 3), random(torch.float32, 3).abs())
    assert waves.conj().is_conj()
    assert sum_of(waves.conj()) == sum_of(waves.conj().resolve_conj()) != sum_of(waves)
    assert waves.conj().imag.is_neg()
    assert sum_of(waves.conj().imag) == sum_of(-waves.imag)


# Clock ------------------------------------------------------------------------------------------------------------


def test_laps_add_up_and_tell_how_long_until_the_forward_had_ended() -> None:
    model = nn.Linear(2, 2)
    clock = Clock(model)
    clock.lap()
    assert all(math.isnan(seconds) for seconds in clock.take())
    start = time.perf_counter()
    laps = []
    for before, after in ((0.02, 0.0), (0.0, 0.02), (0.01, 0.01)):
        time.sleep(before)
        model(torch.zeros(1, 2))
        time.sleep(after)
        clock.lap()
        laps.append(clock.take())
    assert sum(step for step, _ in laps) == pytest.approx(time.perf_counter() - start, abs=0.005)
    for (step, busy), (before, after) in zip(laps, ((0.02, 0.0), (0.0, 0.02), (0.01, 0.01)), strict=True):
        assert before <= busy <= step - after
    clock.lap()
    step, busy = clock.take()
    assert step > 0.0
    assert busy == 0.0


def test_calls_that_are_not_measured_count_with_the_next_that_is() -> None:
    model = nn.Linear(2, 2)
    clock = Clock(model)
    clock.lap()
    for _ in range(3):
        model(torch.zeros(1, 2))
        time.sleep(0.02)  # the others' forward: no work of this rank
        clock.lap()
    step, busy = clock.take()
    assert step >= 0.06
    assert busy < 0.02


def test_what_passes_while_a_rank_has_no_steps_is_nobodys() -> None:
    clock = Clock(nn.Linear(2, 2))
    clock.lap()
    clock.lap()
    clock.pause()
    time.sleep(0.05)  # the others' steps, under `Join`
    clock.lap()
    step, busy = clock.take()
    assert 0 <= busy <= step < 0.05


def test_stop_and_the_end_of_the_clock_leave_nothing_behind() -> None:
    model = nn.Linear(2, 2)
    clock = Clock(model)
    assert len(model._forward_hooks) == 1
    clock.stop()
    assert not model._forward_hooks
    other = Clock(model)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    assert model(torch.ones(1, 2)).shape == (1, 2)


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, saved, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_works_and_does_not_move_the_clock(copied: Callable[[Any], nn.Module]) -> None:
    model = nn.Linear(2, 2)
    clock = Clock(model)
    other = copied(model)
    before = clock._forward_ended
    x = torch.ones(1, 2)
    assert torch.equal(other(x), model.forward(x))
    assert clock._forward_ended == before
    model(x)
    assert clock._forward_ended > before


def test_a_pickled_model_is_read_without_ddp_streammon() -> None:
    model = nn.Linear(2, 2)
    clock = Clock(model)
    pickled = pickle.dumps(model)
    code = (
        "import pickle, sys, torch\n"
        "sys.modules['ddp_streammon'] = None\n"
        "model = pickle.load(sys.stdin.buffer)\n"
        "print(model(torch.ones(1, 2)).tolist())\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], input=pickled, capture_output=True, check=True)
    assert answer.stdout.decode().strip() == str(model(torch.ones(1, 2)).tolist())
    clock.stop()
