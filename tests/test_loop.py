"""The training loop: what it trains, saves and resumes, on one rank and on several."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp_streammon.sinks import read_jsonl
from ddp_streammon.train.__main__ import composed
from ddp_streammon.train.config import ConfigError, load
from tests.application import QUIET, SMALL, train, train_ranks


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_ends_bit_identical(world: int, tmp_path: Path) -> None:
    overrides = [*SMALL, "trainer.checkpoint_every=2", "optim.scheduler=step", "model.modality_dropout=0.2"]
    whole = train_ranks(world, [*overrides, "trainer.epochs=4"], tmp_path / "whole")
    train_ranks(world, [*overrides, "trainer.epochs=2"], tmp_path / "half")
    resume = f"trainer.resume={tmp_path}/half/checkpoint.pt"
    resumed = train_ranks(world, [*overrides, "trainer.epochs=4", resume], tmp_path / "rest")
    for rank in range(world):
        assert same(whole[rank]["saved"]["model"], resumed[rank]["saved"]["model"])
        assert repr(whole[rank]["figures"]) == repr(resumed[rank]["figures"])
        assert whole[rank]["findings"] == resumed[rank]["findings"]
    assert str(whole[0]["saved"]["monitor"]) == str(resumed[0]["saved"]["monitor"])


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    overrides = [*SMALL, "sinks.wandb.enabled=true", "trainer.epochs=1"]
    train(overrides, str(tmp_path / "first"))
    run_id = torch.load(tmp_path / "first" / "checkpoint.pt", weights_only=True)["wandb_run_id"]
    resume = f"trainer.resume={tmp_path}/first/checkpoint.pt"
    train([*overrides, "trainer.epochs=2", resume], str(tmp_path / "second"))
    for run in ("first", "second"):
        (folder,) = (tmp_path / run / "wandb").glob("offline-run-*")
        assert folder.name.endswith(f"-{run_id}")


def test_training_with_and_without_the_monitor_is_bit_identical(tmp_path: Path) -> None:
    overrides = [*SMALL, "model.dropout_p=0.1", "optim.name=sgd"]
    watched = train_ranks(2, overrides, tmp_path / "watched")
    alone = train_ranks(2, [*overrides, "monitor.enabled=false"], tmp_path / "alone")
    assert same(watched[0]["saved"]["model"], alone[0]["saved"]["model"])
    for figure in ("full_val_loss", "full_val_acc", "full_test_acc"):
        assert watched[0]["figures"][figure] == pytest.approx(alone[0]["figures"][figure], rel=1e-12)
    assert not (tmp_path / "alone" / "metrics.jsonl").exists()


def test_without_the_monitor_streams_stop_and_rates_fall_as_with_it(tmp_path: Path) -> None:
    stop = ["streams.fou.patience=1", "streams.fou.min_delta=0.02", "optim.scheduler=plateau", "optim.patience=0"]
    overrides = [*SMALL, "trainer.epochs=4", *stop]
    watched = train_ranks(2, overrides, tmp_path / "watched")[0]["saved"]
    alone = train_ranks(2, [*overrides, "monitor.enabled=false"], tmp_path / "alone")[0]["saved"]
    assert same(watched["model"], alone["model"])
    assert watched["early_stopping"]["fou"]["best_epoch"] == alone["early_stopping"]["fou"]["best_epoch"]


def test_a_plateau_counts_evaluations_not_epochs_without_one(tmp_path: Path) -> None:
    rare = ["optim.scheduler=plateau", "optim.patience=1", "monitor.evaluate_every=3", "trainer.epochs=5"]
    train([*SMALL, *rare], str(tmp_path))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert {group["lr"] for group in saved["optimizer"]["param_groups"]} == {1e-3}


def test_a_file_that_is_no_checkpoint_of_this_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    train([*SMALL, "trainer.epochs=1"], str(tmp_path / "run"))
    other_model = [f"trainer.resume={tmp_path}/run/checkpoint.pt", "model.hidden=[8]"]
    for overrides, text in (
        ([f"trainer.resume={tmp_path}/text.pt"], "is no checkpoint"),
        ([f"trainer.resume={tmp_path}/other.pt"], "holds no run of this application"),
        (other_model, "is of another model"),
    ):
        with pytest.raises(ConfigError, match=text):
            train([*SMALL, *overrides], str(tmp_path / "refused"))
    assert not (tmp_path / "refused" / "metrics.jsonl").exists()


@pytest.mark.parametrize("seconds", ["0", "-1", "inf"])
def test_a_timeout_is_a_positive_number_of_seconds(seconds: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer.timeout_s must be a positive number of seconds, got"):
        load(composed([f"trainer.timeout_s={seconds}"]))


def test_all_ranks_end_with_the_same_figures_and_findings(tmp_path: Path) -> None:
    ranks = train_ranks(3, [*SMALL], tmp_path)
    assert all(repr(rank["figures"]) == repr(ranks[0]["figures"]) for rank in ranks)
    assert all(rank["findings"] == ranks[0]["findings"] for rank in ranks)


def test_accumulation_gives_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    plain = [*SMALL, "model.norm=false", "optim.name=sgd", "trainer.epochs=1"]
    train([*plain, "trainer.batch_size=64", "trainer.accumulate=2"], str(tmp_path / "parts"))
    train([*plain, "trainer.batch_size=128"], str(tmp_path / "whole"))
    parts, whole = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("parts", "whole"))
    for name, tensor in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], tensor, rtol=2e-4, atol=2e-6)
    steps = [
        [record["values"] for record in read_jsonl(tmp_path / run / "metrics.jsonl") if record["type"] == "step"]
        for run in ("parts", "whole")
    ]
    assert [values["samples"] for values in steps[0]] == [128.0] * 9
    for mine, theirs in zip(*steps, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["fou_grad_norm"] == pytest.approx(theirs["fou_grad_norm"], rel=1e-3)


def test_gradients_are_measured_before_clipping(tmp_path: Path) -> None:
    result = train([*SMALL, "trainer.clip_norm=1e-3", "trainer.epochs=1"], str(tmp_path))
    norms = [r["values"]["fou_grad_norm"] for r in read_jsonl(tmp_path / "metrics.jsonl") if r["type"] == "step"]
    assert min(norms) > 1e-2
    assert math.isfinite(result.figures["full_val_loss"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_norms_are_those_of_the_unscaled_gradients(precision: str, tmp_path: Path) -> None:
    train([*SMALL, "trainer.epochs=1", f"trainer.precision={precision}"], str(tmp_path / "half"))
    train([*SMALL, "trainer.epochs=1"], str(tmp_path / "full"))
    first = [
        next(r["values"] for r in read_jsonl(tmp_path / run / "metrics.jsonl") if r["type"] == "step")
        for run in ("half", "full")
    ]
    assert first[0]["pix_grad_norm"] == pytest.approx(first[1]["pix_grad_norm"], rel=0.05)
    assert first[0]["pix_grad_nonfinite"] == 0


def test_a_stream_stops_at_its_best_and_the_rest_goes_on(tmp_path: Path) -> None:
    overrides = [*SMALL, "trainer.epochs=6", "streams.fou.patience=1", "streams.fou.min_delta=1.0"]
    saved = train_ranks(2, overrides, tmp_path)[0]["saved"]
    assert saved["epoch"] == 6
    assert saved["early_stopping"]["fou"]["frozen"]
    assert saved["early_stopping"]["fou"]["best_epoch"] == 1
    rates = {group["stream"]: group["lr"] for group in saved["optimizer"]["param_groups"]}
    assert rates["fou"] == 0.0
    assert rates["pix"] > 0.0


def test_training_ends_when_every_stream_has_stopped(tmp_path: Path) -> None:
    stops = [f"streams.{name}.{setting}" for name in ("fou", "pix") for setting in ("patience=1", "min_delta=1.0")]
    train([*SMALL, "trainer.epochs=9", *stops], str(tmp_path))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 2


def test_a_declared_frozen_stream_is_not_trained_and_not_complained_about(tmp_path: Path) -> None:
    result = train([*SMALL, "streams.fou.frozen=true"], str(tmp_path))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert [group["stream"] for group in saved["optimizer"]["param_groups"]] == ["pix", "shared"]
    assert not [finding for finding in result.findings if finding.rule in ("DET", "DEAD", "NF")]


@pytest.mark.parametrize("scheduler", ["cosine", "step", "plateau", "none"])
def test_every_schedule_runs_per_group(scheduler: str, tmp_path: Path) -> None:
    own = ["optim.streams.fou.lr=5e-4", "optim.step_size=1", "optim.patience=0"]
    train([*SMALL, f"optim.scheduler={scheduler}", *own], str(tmp_path))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    rates = {group["stream"]: group["lr"] for group in saved["optimizer"]["param_groups"]}
    assert rates["pix"] == pytest.approx(2 * rates["fou"])
    assert rates["pix"] == {"cosine": pytest.approx(1e-5), "step": pytest.approx(1e-5)}.get(scheduler, rates["pix"])


@pytest.mark.parametrize(
    ("experiment", "streams"),
    [
        ("mfeat_six", ["fou", "fac", "kar", "pix", "zer", "mor"]),
        ("mc_resnet", ["pixels", "edges"]),
        ("htad", ["audio", "accelerometer"]),
    ],
)
def test_the_other_experiments_run(experiment: str, streams: list[str], tmp_path: Path) -> None:
    if experiment == "htad" and find_spec("multiviewstacking") is None:
        pytest.skip("multiviewstacking is not installed")
    width = "model.width=4" if experiment == "mc_resnet" else "model.hidden=[32,16]"
    result = train([*QUIET, f"experiment={experiment}", width, "trainer.epochs=1"], str(tmp_path))
    for stream in streams:
        assert 0 <= result.figures[f"{stream}_val_acc"] <= 1
    assert ("fac_without_val_acc" in result.figures) == (experiment == "mfeat_six")
