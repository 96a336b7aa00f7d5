"""A joint model beside models of one stream each: laziness, the ensemble gap, and how they come about."""

from __future__ import annotations

import contextlib
import math
import statistics
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ddp_streammon.collective import Collective
from ddp_streammon.evaluation import Items, classification
from ddp_streammon.sinks import read_jsonl
from ddp_streammon.streams import StreamSet
from ddp_streammon.train.__main__ import composed, data_and_model, solo_models
from ddp_streammon.train.config import ConfigError, load
from ddp_streammon.train.models import MultiStreamModel, multi_mlp
from ddp_streammon.train.solo import Comparison, SoloReferences, ahead, over_seeds
from tests.application import SMALL, train
from tests.ranks import run_ranks

NAMES, CLASSES, SEEDS = ("a", "b"), 3, 2


def items(count: int, seed: int) -> TensorDataset:
    """Each stream tells the class, with noise."""
    chance = torch.Generator().manual_seed(seed)
    target = torch.randint(0, CLASSES, (count,), generator=chance)
    streams = [torch.randn(count, 6, generator=chance) + 3 * torch.eye(CLASSES, 6)[target] for _ in NAMES]
    return TensorDataset(*streams, target)


def model(names: tuple[str, ...], seed: int) -> MultiStreamModel:
    torch.manual_seed(seed)
    return multi_mlp(dict.fromkeys(names, 6), CLASSES, hidden=[8], norm=False)


def compared(references: tuple[str, ...], *, lazy: bool = False) -> Comparison:
    """A joint model, whose encoder of `a` tells nothing if lazy, beside references with weights of their own."""
    joint = model(NAMES, 0)
    if lazy:
        for parameter in joint.encoders["a"].parameters():
            torch.nn.init.zeros_(parameter)
    alone = {name: [model((name,), 1 + seed) for seed in range(SEEDS)] for name in references}
    solo = SoloReferences(alone, {name: name for name in NAMES}, NAMES, torch.device("cpu"))
    train, held_out = (Items(DataLoader(items(*which), 50), "items") for which in ((700, 1), (333, 2)))
    first, second = (
        solo.compare(
            StreamSet.resolve(joint, {name: name for name in NAMES}),
            Collective(),
            train,
            held_out,
            classification(),
            contextlib.nullcontext,
        )
        for _ in range(2)
    )
    assert first.values() == second.values()  # the second time they are remembered
    return first


def _values() -> dict[str, float]:
    return compared(NAMES).values()


def test_the_figures_are_the_same_on_any_number_of_ranks() -> None:
    one = _values()
    assert set(one) == {
        f"{key}{bound}" for key in ("a_laziness", "b_laziness", "full_ensemble_gap") for bound in ("", "_low", "_high")
    }
    for found in run_ranks(2, _values):
        assert found == pytest.approx(one, rel=1e-9)


def test_the_ensemble_gap_is_that_of_averaged_log_probabilities() -> None:
    *inputs, target = items(333, 2).tensors
    joint = model(NAMES, 0)(*inputs).argmax(1) == target
    gaps = []
    for seed in range(SEEDS):
        logs = [model((name,), 1 + seed)(x).log_softmax(1) for name, x in zip(NAMES, inputs, strict=True)]
        right = (logs[0] + logs[1]).argmax(1) == target
        gaps.append(float(right.double().mean() - joint.double().mean()))
    found = compared(NAMES).estimates["full_ensemble_gap"]
    assert found.value == pytest.approx(statistics.fmean(gaps))
    assert found.low < min(gaps) < max(gaps) < found.high


def test_an_encoder_that_tells_nothing_is_lazy_and_only_that_one() -> None:
    found = compared(NAMES, lazy=True)
    a, b = found.estimates["a_laziness"], found.estimates["b_laziness"]
    assert a.low > 0.2
    assert b.low < 0.1 and b.value < 0.1
    lines = found.text.splitlines()
    assert lines[0].startswith(f"a: a probe of models of it alone is {100 * a.value:.1f} pp [{100 * a.low:.1f}, ")
    assert lines[0].endswith("above that of its encoder here (95 % interval over 2 seeds)")
    assert lines[2].startswith("the average of models of one stream each is ")


def test_without_references_of_every_stream_there_is_no_ensemble() -> None:
    assert set(compared(("b",)).estimates) == {"b_laziness"}


def test_the_interval_over_seeds_is_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = [0.03, 0.05, 0.01, 0.06]
    low, high = stats.t.interval(0.95, 3, loc=statistics.fmean(values), scale=stats.sem(values))
    found = over_seeds(values)
    assert (found.value, found.low, found.high) == pytest.approx((statistics.fmean(values), low, high))
    assert math.isnan(over_seeds([math.nan, 0.1]).low)


def test_the_same_items_are_compared_in_pairs() -> None:
    first, second = torch.tensor([1.0] * 60 + [0.0] * 40), torch.tensor([1.0] * 50 + [0.0] * 50)
    paired = ahead(first, second)
    assert paired.value == pytest.approx(0.1)
    assert paired.low > 0  # ten disagreements, all one way; two independent sets would not tell


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of `fou` alone, of two seeds."""
    folder = tmp_path_factory.mktemp("alone")
    for seed in range(SEEDS):
        overrides = ["streams.only=fou", f"trainer.seed={seed}", "evaluation=off", "trainer.epochs=1"]
        train([*SMALL, *overrides], str(folder / f"fou-{seed}"))
    return folder


def test_a_joint_run_is_compared_with_runs_of_a_stream_alone(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = f"evaluation.solo={{fou: [{alone}/fou-0, {alone}/fou-1/checkpoint.pt]}}"
    said = ["evaluation=full", "sinks.console.enabled=true", "trainer.epochs=1"]
    figures = train([*SMALL, *said, runs], str(tmp_path / "joint")).figures
    assert figures["fou_laziness_low"] <= figures["fou_laziness"] <= figures["fou_laziness_high"]
    recorded = [r["values"] for r in read_jsonl(tmp_path / "joint" / "metrics.jsonl") if r["type"] == "epoch"]
    assert recorded[-1]["fou_laziness"] == figures["fou_laziness"]
    assert "fou: a probe of models of it alone is " in capsys.readouterr().out
    train([*SMALL, "evaluation=full", "trainer.epochs=1"], str(tmp_path / "without"))
    weights = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("joint", "without")]
    assert all(torch.equal(tensor, weights[1]["model"][name]) for name, tensor in weights[0]["model"].items())


def test_references_of_another_model_are_refused(alone: Path) -> None:
    runs = f"evaluation.solo={{fou: [{alone}/fou-0, {alone}/fou-1]}}"
    config = composed([*SMALL, "evaluation=full", "model.hidden=[8]", runs])
    settings = load(config)
    data, _ = data_and_model(config, settings)
    with pytest.raises(
        ConfigError, match=r"evaluation.solo.fou: '.*' is of another model .* give this run the model's"
    ):
        solo_models(config, settings, data)
