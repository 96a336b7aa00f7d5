"""The application under FSDP2 and HSDP: what it trains, finds, saves and resumes is what DDP gives."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddp_streammon import StreamSet
from ddp_streammon.collective import Collective
from ddp_streammon.sinks import read_jsonl
from ddp_streammon.train import parallel
from ddp_streammon.train.__main__ import composed, data_and_model
from ddp_streammon.train.config import ConfigError, load
from ddp_streammon.train.parallel import wrap
from ddp_streammon.train.training import build, seed_all, state_of
from tests.application import SMALL, command, train, train_ranks
from tests.ranks import run_ranks
from tests.sharding import needs_fsdp2
from tests.test_app import ROOT

NAMES = ("fou", "pix", "shared")
LAYOUTS = {"ddp": [], "fsdp2": ["parallel=fsdp2"], "hsdp": ["parallel=hsdp"]}
TINY = [*SMALL, "trainer.epochs=1"]


def leaves(state: Any, path: str = "") -> dict[str, Any]:
    """Everything inside nested mappings and sequences by its path."""
    if isinstance(state, dict):
        items = list(state.items())
    elif isinstance(state, list | tuple):
        items = list(enumerate(state))
    else:
        return {path: state}
    return {key: value for name, entry in items for key, value in leaves(entry, f"{path}/{name}").items()}


def differences(one: Any, other: Any, *parts: str) -> list[str]:
    """Paths of the parts of two checkpoints that are not equal to the bit."""
    first, second = leaves({part: one[part] for part in parts}), leaves({part: other[part] for part in parts})
    assert first.keys() == second.keys() and first
    return [
        path
        for path, value in first.items()
        if not (torch.equal(value, second[path]) if isinstance(value, Tensor) else repr(value) == repr(second[path]))
    ]


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=rtol, atol=atol, msg=name)


def steps_of(folder: Path) -> list[dict[str, float]]:
    return [record["values"] for record in read_jsonl(folder / "metrics.jsonl") if record["type"] == "step"]


@dataclass(frozen=True)
class Epoch:
    """What each rank found in an epoch, and the run directory."""

    ranks: list[dict[str, Any]]
    folder: Path


@pytest.fixture(scope="module")
def epoch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Epoch]:
    """An epoch of the same training on so many ranks in a layout, run once for all tests."""

    @functools.cache
    def trained(world: int, layout: str) -> Epoch:
        folder = tmp_path_factory.mktemp(f"{layout}-{world}")
        return Epoch(train_ranks(world, [*TINY, *LAYOUTS[layout]], folder), folder)

    return trained


@needs_fsdp2
@pytest.mark.parametrize(("layout", "world"), [("fsdp2", 2), ("hsdp", 4)])
def test_an_epoch_gives_the_metrics_of_ddp(layout: str, world: int, epoch: Callable[[int, str], Epoch]) -> None:
    ddp, sharded = epoch(world, "ddp"), epoch(world, layout)
    expected = ddp.ranks[0]
    for found in sharded.ranks:
        assert found["figures"] == pytest.approx(expected["figures"], rel=1e-4, abs=1e-4, nan_ok=True)
        assert_close(expected["saved"]["model"], found["saved"]["model"], rtol=1e-4, atol=1e-5)
    ours, theirs = steps_of(sharded.folder), steps_of(ddp.folder)
    assert len(ours) == len(theirs) > 1
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5, nan_ok=True)


@needs_fsdp2
@pytest.mark.parametrize("layout", ["fsdp2", pytest.param("hsdp", marks=pytest.mark.slow)])
def test_training_with_and_without_the_monitor_is_bit_identical(layout: str, tmp_path: Path) -> None:
    options = ["trainer.clip_norm=0.5", "trainer.accumulate=2", "trainer.batch_size=64", "model.dropout_p=0.1"]
    overrides = [*TINY, *LAYOUTS[layout], *options]
    watched = train_ranks(2, overrides, tmp_path / "watched")[0]
    alone = train_ranks(2, [*overrides, "monitor.enabled=false"], tmp_path / "alone")[0]
    assert differences(watched["saved"], alone["saved"], "model", "optimizer") == []


@needs_fsdp2
def test_accumulation_and_clipping_are_those_of_ddp(tmp_path: Path) -> None:
    options = ["trainer.clip_norm=0.05", "trainer.accumulate=3", "trainer.batch_size=64", "optim=sgd"]
    ddp, fsdp = (train_ranks(2, [*TINY, *LAYOUTS[name], *options], tmp_path / name)[0] for name in ("ddp", "fsdp2"))
    assert_close(ddp["saved"]["model"], fsdp["saved"]["model"])
    for name in ("ddp", "fsdp2"):
        norms = [math.hypot(*(v[f"{s}_grad_norm"] for s in NAMES)) for v in steps_of(tmp_path / name)]
        assert min(norms) > 10 * 0.05  # or clipping would not matter


RESUMED = [*SMALL, "trainer.checkpoint_every=1", "optim.scheduler=step", "model.modality_dropout=0.2"]
STOPS = ["streams.fou.patience=1", "streams.fou.min_delta=1.0"]
"""fou stops after the second epoch, so its best weights and its frozen group are in the checkpoint."""


@needs_fsdp2
@pytest.mark.parametrize(
    ("layout", "world", "options", "half"),
    [("fsdp2", 2, ["optim=sgd", "optim.momentum=0"], 1), pytest.param("hsdp", 4, STOPS, 2, marks=pytest.mark.slow)],
)
def test_the_same_layout_resumes_bit_for_bit(
    layout: str, world: int, options: list[str], half: int, tmp_path: Path
) -> None:
    overrides = [*RESUMED, *LAYOUTS[layout], *options]
    whole = train_ranks(world, [*overrides, f"trainer.epochs={2 * half}"], tmp_path / "whole")
    train_ranks(world, [*overrides, f"trainer.epochs={half}"], tmp_path / "half")
    resume = f"trainer.resume={tmp_path}/half/checkpoint.pt"
    resumed = train_ranks(world, [*overrides, f"trainer.epochs={2 * half}", resume], tmp_path / "rest")
    parts = ("model", "optimizer", "schedulers", "early_stopping", "figures", "epoch", "steps", "monitor")
    assert differences(whole[0]["saved"], resumed[0]["saved"], *parts) == []
    for one, other in zip(whole, resumed, strict=True):
        assert repr(one["figures"]) == repr(other["figures"])
    if options is STOPS:
        assert resumed[0]["saved"]["early_stopping"]["fou"]["frozen"]


@dataclass(frozen=True)
class Stopping:
    """Trainings in which `fou` stops after the second of three epochs, at its best of the first."""

    halves: dict[str, dict[str, Any]]
    """Two epochs in each layout."""
    ddp: dict[str, Any]
    """The third under DDP throughout, and after a change of the layout."""
    from_ddp: dict[str, Any]
    to_ddp: dict[str, Any]


@pytest.fixture(scope="module")
def stopping(tmp_path_factory: pytest.TempPathFactory) -> Stopping:
    folder = tmp_path_factory.mktemp("stopping")
    overrides = [*SMALL, "trainer.checkpoint_every=1", *STOPS]

    def third(before: str, layout: str) -> dict[str, Any]:
        resume = f"trainer.resume={folder}/{before}/checkpoint.pt"
        whole = [*overrides, *LAYOUTS[layout], "trainer.epochs=3", resume]
        return train_ranks(2, whole, folder / f"{before} to {layout}")[0]

    twos = [*overrides, "trainer.epochs=2"]
    halves = {name: train_ranks(2, [*twos, *LAYOUTS[name]], folder / name)[0] for name in ("ddp", "fsdp2")}
    return Stopping(halves, third("ddp", "ddp"), third("ddp", "fsdp2"), third("fsdp2", "ddp"))


@needs_fsdp2
def test_a_checkpoint_goes_on_under_every_other_layout(stopping: Stopping) -> None:
    expected, from_ddp, to_ddp = stopping.ddp, stopping.from_ddp, stopping.to_ddp
    for found, tolerance in ((from_ddp, 1e-5), (to_ddp, 1e-4)):
        assert found["figures"] == pytest.approx(expected["figures"], rel=1e-4, abs=1e-4, nan_ok=True)
        assert_close(expected["saved"]["model"], found["saved"]["model"], tolerance, tolerance)
    best = expected["saved"]["early_stopping"]["fou"]["best_tensors"]
    for found in (from_ddp, to_ddp):
        kept = found["saved"]["early_stopping"]["fou"]["best_tensors"]
        assert_close(dict(enumerate(best)), dict(enumerate(kept)), 1e-4, 1e-5)  # type: ignore[arg-type]


def _read_back(overrides: list[str], folder: str) -> dict[str, Any]:
    """What a run that goes on from a checkpoint would save at once."""
    config = composed(overrides)
    settings = load(config)
    data, model = data_and_model(config, settings)
    training = build(settings, data, model, Path(folder), {}, torch.device("cpu"))
    try:
        return state_of(training)
    finally:
        assert training.monitor is not None
        training.monitor.close()


def assert_read_back(saved: dict[str, Any], file: Path, world: int, overrides: list[str], folder: Path) -> None:
    """So many ranks that go on from `file` have what was saved in it."""
    again = run_ranks(world, _read_back, [*TINY, *overrides, f"trainer.resume={file}"], str(folder))[0]
    found = differences(saved, again, "model", "optimizer", "monitor", "epoch", "figures")
    proved_anew = ("/monitor/replicas", "/monitor/rules/world")
    assert [path for path in found if not path.startswith(proved_anew)] == []


@needs_fsdp2
@pytest.mark.parametrize(
    ("world", "layout"), [(4, "hsdp"), pytest.param(3, "fsdp2", marks=pytest.mark.slow), (1, "ddp")]
)
def test_another_number_of_ranks_reads_what_was_saved(
    world: int, layout: str, epoch: Callable[[int, str], Epoch], tmp_path: Path
) -> None:
    half = epoch(2, "fsdp2")
    assert_read_back(half.ranks[0]["saved"], half.folder / "checkpoint.pt", world, LAYOUTS[layout], tmp_path)


@needs_fsdp2
def test_another_number_of_ranks_reads_what_another_optimizer_saved(tmp_path: Path) -> None:
    sgd = [*LAYOUTS["fsdp2"], "optim=sgd"]
    saved = train_ranks(2, [*TINY, *sgd], tmp_path / "saved")[0]["saved"]
    (tmp_path / "again").mkdir()
    assert_read_back(saved, tmp_path / "saved" / "checkpoint.pt", 3, sgd, tmp_path / "again")


@needs_fsdp2
def test_a_stream_stops_at_its_best_and_its_buffers_are_the_same_on_all_ranks(stopping: Stopping) -> None:
    later = {"ddp, an epoch later": stopping.ddp, "fsdp2, an epoch later": stopping.from_ddp}
    for name, run in (stopping.halves | later).items():
        fou = run["saved"]["early_stopping"]["fou"]
        assert fou["frozen"] and fou["best_epoch"] == 1, name
        rates = {group["stream"]: group["lr"] for group in run["saved"]["optimizer"]["param_groups"]}
        assert rates["fou"] == 0.0 < rates["pix"]
        kept = [value for key, value in run["saved"]["model"].items() if key.startswith("encoders.fou.")]
        best = {tuple(tensor.shape): tensor for tensor in fou["best_tensors"] if tensor.dim() == 2}
        assert all(torch.equal(best[tuple(value.shape)], value) for value in kept if value.dim() == 2)
    ddp, fsdp2 = (run["figures"] for run in stopping.halves.values())
    assert fsdp2 == pytest.approx(ddp, rel=1e-3, abs=1e-3, nan_ok=True)


@needs_fsdp2
def test_a_declared_frozen_stream_is_not_trained(tmp_path: Path) -> None:
    frozen = [*TINY, *LAYOUTS["fsdp2"], "streams.fou.frozen=true"]
    saved = train_ranks(2, frozen, tmp_path)[0]["saved"]
    assert [group["stream"] for group in saved["optimizer"]["param_groups"]] == ["pix", "shared"]
    config = composed(frozen)
    settings = load(config)
    seed_all(settings.trainer.seed)
    start = data_and_model(config, settings)[1].state_dict()
    moved = {
        name.split(".")[1]
        for name, value in saved["model"].items()
        if name.endswith("weight") and not torch.equal(value, start[name])
    }
    assert moved == {"pix", "weight"}  # fc.weight


@needs_fsdp2
def test_bf16_trains_under_fsdp2_as_under_ddp(tmp_path: Path) -> None:
    half = [*TINY, "trainer.precision=bf16"]
    ddp, fsdp = (train_ranks(2, [*half, *LAYOUTS[name]], tmp_path / name)[0] for name in ("ddp", "fsdp2"))
    assert fsdp["figures"]["full_val_loss"] == pytest.approx(ddp["figures"]["full_val_loss"], rel=2e-2)
    assert steps_of(tmp_path / "fsdp2")[0]["pix_grad_norm"] == pytest.approx(
        steps_of(tmp_path / "ddp")[0]["pix_grad_norm"], rel=1e-2
    )
    assert {tensor.dtype for name, tensor in fsdp["saved"]["model"].items() if "weight" in name} == {torch.float32}


def test_a_single_process_has_nobody_to_share_with(tmp_path: Path) -> None:
    plain = train(TINY, str(tmp_path / "plain"))
    assert repr(train([*TINY, "parallel=fsdp2"], str(tmp_path / "fsdp2")).figures) == repr(plain.figures)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["parallel=fsdp2", "trainer.precision=fp16"],
            "trainer.precision=fp16 needs a GradScaler, which works with parallel=ddp only, got parallel=fsdp2; say "
            "trainer.precision=bf16, or parallel=ddp",
        ),
        (["parallel=hsdp", "parallel.shard_size=0"], "parallel.shard_size must be at least 1, got 0"),
        (
            ["parallel=hsdp", "parallel.shard_size=null"],
            "parallel.shard_size is a number of ranks for parallel=hsdp, got None for parallel=hsdp",
        ),
        (
            ["parallel=fsdp2", "parallel.shard_size=2"],
            "parallel.shard_size is for parallel=hsdp alone, got 2 for parallel=fsdp2",
        ),
    ],
)
def test_a_layout_that_cannot_be_is_one_sentence(overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        load(composed(overrides))


def test_sharding_on_cpu_is_refused_where_pytorch_does_not_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "FSDP2_ON_CPU", False)
    collective = Collective()
    collective.distributed = True
    model = nn.ModuleDict({"stream1": nn.Linear(2, 2)})
    streams, hsdp = StreamSet.resolve(model), load(composed([*TINY, *LAYOUTS["hsdp"]]))
    text = (
        f"parallel=hsdp on CPU needs PyTorch 2.9 or later, got {torch.__version__}: older ones do not average gradients"
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        wrap(streams, hsdp, torch.device("cpu"), collective)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


@pytest.mark.slow
def test_ranks_that_cannot_be_shared_out_end_before_a_process_group_starts(tmp_path: Path) -> None:
    sizes = ["parallel=hsdp", "parallel.shard_size=4"]
    done = command(*SMALL, *sizes, "trainer.timeout_s=20", folder=tmp_path, ranks=2)
    assert done.returncode != 0
    assert (
        "configuration error: parallel.shard_size=4 does not divide the number of ranks, 2; choose one of 1, 2, or "
        "start another number of ranks (torchrun --nproc-per-node)" in done.stderr
    )
    with pytest.raises(ConfigError, match="does not divide the number of ranks, 1; choose one of 1, or start another"):
        train([*SMALL, *sizes], str(tmp_path))


def shown(*overrides: str) -> str:
    done = command("--cfg", "job", *overrides, folder=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_configuration_shows_the_layout() -> None:
    assert "parallel:\n  name: ddp\n  shard_size: null\n" in shown()
    assert "parallel:\n  name: hsdp\n  shard_size: 4\n" in shown("parallel=hsdp", "parallel.shard_size=4")


@needs_fsdp2
def test_the_command_trains_a_sharded_model_to_the_end(tmp_path: Path) -> None:
    done = command(*TINY, "sinks.console.enabled=true", "parallel=fsdp2", folder=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "full_test_acc 0." in done.stdout[done.stdout.index("Done: ") :]
    steps = steps_of(tmp_path / "outputs" / "run")
    assert [values["samples"] for values in steps] == [256.0] * 4
    assert all(0 < values["fou_grad_norm"] < 100 for values in steps)
    saved = torch.load(tmp_path / "outputs" / "run" / "checkpoint.pt", weights_only=True)
    assert saved["model"]["fc.weight"].shape == (10, 32)
    assert "Traceback" not in done.stderr
