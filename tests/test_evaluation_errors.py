"""How often whole evaluations say something wrong of streams that know nothing, in a training of eight epochs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ddp_streammon import StreamMonitor
from ddp_streammon.evaluation import Statement
from ddp_streammon.train.models import multi_mlp

TRAININGS, EVALUATIONS = 60, 8
WRONG = {Statement.complementary, Statement.redundant, Statement.regressed, Statement.memorised}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_of_noise_something_wrong_is_said_in_five_percent_of_trainings_at_most() -> None:
    """Labels that nothing tells, 300 training and 300 held-out items, three streams, weights that wander."""
    wrong = right = 0
    for seed in range(TRAININGS):
        torch.manual_seed(seed)
        widths = {"rgb": 12, "depth": 8, "audio": 8}
        model = multi_mlp(widths, 4, hidden=(16,), norm=False)
        target = torch.randint(4, (600,))
        items = TensorDataset(*(torch.randn(600, width) for width in widths.values()), target)
        train, held_out = (TensorDataset(*items[rows]) for rows in (slice(300), slice(300, None)))
        monitor = StreamMonitor(model, streams=dict(model.encoders.items()))
        said: set[Statement] = set()
        for _ in range(EVALUATIONS):
            found = monitor.evaluate(DataLoader(held_out, 100), train=DataLoader(train, 100))
            said |= {claim.statement for claim in found.claims}
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(0.95).add_(0.3 * weight.std() * torch.randn_like(weight))
        wrong += bool(said & WRONG)
        right += Statement.knows_nothing in said
    assert wrong / TRAININGS <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / TRAININGS)
    assert right / TRAININGS > 0.8
