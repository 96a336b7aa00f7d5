"""user_numbers.py: a rank's own numbers as cells, whether the host knows them or a device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ddp_streammon.stats import Total
from ddp_streammon.user_numbers import finish_, user_numbers

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
NAMES = ("loss", "count", "pair", "missing", "bad")
VALUES = {"loss": 0.5, "count": Total(3.0), "pair": (6.0, 4.0), "missing": None, "bad": math.inf}
EXPECTED = [[0.5, 4.0, 8.0, 1.0], [3.0, 3.0, 1.0, 1.0], [6.0, 6.0, 4.0, 1.0], [0.0] * 4, [0.0] * 4]


def test_what_the_host_knows_is_finished_on_the_host() -> None:
    for device in (CPU, CUDA):
        given = user_numbers(NAMES, VALUES, 8.0, device)
        assert given.cells == [cell for row in EXPECTED for cell in row]
        assert (given.bad, given.waiting) == (1.0, ())


def test_tensors_of_the_host_are_numbers() -> None:
    values = {"loss": torch.tensor([0.5], requires_grad=True), "count": Total(torch.tensor(3))}
    given = user_numbers(NAMES[:2], values, torch.tensor(8), CUDA)
    assert given.cells == EXPECTED[0] + EXPECTED[1] and not given.waiting


def test_what_a_device_knows_is_finished_there() -> None:
    """Meta tensors have no values to be read, so that nothing can have waited for them."""
    values = {**VALUES, "loss": torch.empty((), device=META, requires_grad=True)}
    given = user_numbers(NAMES, values, 8.0, CUDA)
    assert [place for place, _ in given.waiting] == [0]
    cells = torch.tensor(given.cells, dtype=torch.float64).view(-1, 4)
    cells[0, 0] = 0.5
    assert finish_(cells).item() == 1.0
    assert cells.tolist() == EXPECTED


def test_a_number_of_samples_may_be_on_the_device() -> None:
    given = user_numbers(("loss", "count"), {"loss": 0.5, "count": Total(3.0)}, torch.empty((), device=META), CUDA)
    assert [place for place, _ in given.waiting] == [1, 2]
    cells = torch.tensor(given.cells, dtype=torch.float64).view(-1, 4)
    cells[0, 1:3] = 8.0
    assert finish_(cells).item() == 0.0
    assert cells.tolist() == EXPECTED[:2]


def test_without_samples_every_rank_counts_once() -> None:
    assert user_numbers(("loss",), {"loss": 0.5}, None, CPU).cells == [0.5, 0.5, 1.0, 1.0]


def test_a_rank_may_have_no_samples() -> None:
    assert user_numbers(("loss",), {"loss": 0.5}, 0, CPU).cells == [0.5, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("value", "samples", "said"),
    [
        ("high", 8, "loss must be a number or a tensor of one element, got 'high'"),
        (torch.ones(3), 8, r"loss must be one number, got a tensor of shape \(3,\); give its mean"),
        (Total([1]), 8, r"loss must be a number or a tensor of one element, got \[1\]"),  # type: ignore[arg-type]
        ((1.0, 2.0, 3.0), 8, r"loss must be a number, or \(sum, weight\), got \(1.0, 2.0, 3.0\)"),
        ((1.0, "two"), 8, "the weight of loss must be a number or a tensor of one element, got 'two'"),
        (1.0, "eight", "samples must be a number or a tensor of one element, got 'eight'"),
        (1.0, -8, "samples must be at least 0, got -8"),
    ],
)
def test_what_is_no_number_is_refused_by_name(value: Any, samples: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        user_numbers(("loss",), {"loss": value}, samples, CPU)
