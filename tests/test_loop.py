"""The training loop: what it trains, saves and resumes, on one rank and on several."""

from __future__ import annotations

import math
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp_streammon.sinks import read_jsonl
from ddp_streammon.train.__main__ import composed, data_and_model
from ddp_streammon.train.config import ConfigError, load
from ddp_streammon.train.evaluating import budget as evaluation_budget
from ddp_streammon.train.training import build
from tests.application import QUIET, SMALL, train, train_ranks
from tests.ranks import run_ranks


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_resumed_run_ends_bit_identical(world: int, tmp_path: Path) -> None:
    overrides = [*SMALL, "trainer.checkpoint_every=2", "optim.scheduler=step", "model.modality_dropout=0.2"]
    overrides.append(f"evaluation={'full' if world == 2 else 'fast'}")
    whole = train_ranks(world, [*overrides, "trainer.epochs=4"], tmp_path / "whole")
    train_ranks(world, [*overrides, "trainer.epochs=2"], tmp_path / "half")
    resume = f"trainer.resume={tmp_path}/half/checkpoint.pt"
    resumed = train_ranks(world, [*overrides, "trainer.epochs=4", resume], tmp_path / "rest")
    for rank in range(world):
        assert same(whole[rank]["saved"]["model"], resumed[rank]["saved"]["model"])
        assert repr(whole[rank]["figures"]) == repr(resumed[rank]["figures"])
        assert whole[rank]["findings"] == resumed[rank]["findings"]
    assert str(whole[0]["saved"]["monitor"]) == str(resumed[0]["saved"]["monitor"])


def evaluations(folder: Path) -> list[Any]:
    """The records of what the head uses."""
    epochs = [record for record in read_jsonl(folder / "metrics.jsonl") if record["type"] == "epoch"]
    return [record for record in epochs if "fou_val_uses" in record["values"]]


def steps_of_evaluations(folder: Path) -> list[int]:
    return [record["step"] for record in evaluations(folder)]


def test_a_resumed_run_counts_optimizer_steps_on(tmp_path: Path) -> None:
    overrides = [*SMALL, "evaluation.every_steps=4", "optim.scheduler=none", "model.dropout_p=0.2"]
    train([*overrides, "trainer.epochs=2"], str(tmp_path / "whole"))
    train([*overrides, "trainer.epochs=1"], str(tmp_path / "run"))
    assert steps_of_evaluations(tmp_path / "run") == [4, 8, 9]  # 9 steps an epoch, and one evaluation at the end
    train([*overrides, "trainer.epochs=2"], str(tmp_path / "run"))
    assert steps_of_evaluations(tmp_path / "run") == [4, 8, 9, 12, 16, 18]
    assert steps_of_evaluations(tmp_path / "whole") == [4, 8, 12, 16, 18]
    whole, resumed = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("whole", "run"))
    assert same(whole["model"], resumed["model"])


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
    alone = train_ranks(2, [*overrides, "monitor.enabled=false"], tmp_path / "alone")
    assert not (tmp_path / "alone" / "metrics.jsonl").exists()
    for name, evaluation in {
        "off": ["evaluation=off"],
        "fast": [],
        "full": ["evaluation=full", "evaluation.every_steps=3", "evaluation.share=1.0"],
    }.items():
        watched = train_ranks(2, [*overrides, *evaluation], tmp_path / name)
        assert same(watched[0]["saved"]["model"], alone[0]["saved"]["model"])
        assert repr(watched[0]["figures"]) == repr(watched[1]["figures"])
        for figure in ("full_val_loss", "full_val_acc", "full_test_acc"):
            assert watched[0]["figures"][figure] == pytest.approx(alone[0]["figures"][figure], rel=1e-12)
    assert steps_of_evaluations(tmp_path / "fast") == [4, 8]
    assert steps_of_evaluations(tmp_path / "full") == [3, 6, 8]


def test_without_an_evaluation_of_streams_the_whole_model_is_recorded(tmp_path: Path) -> None:
    train([*SMALL, "evaluation=off"], str(tmp_path))
    epochs = [r["values"] for r in read_jsonl(tmp_path / "metrics.jsonl") if r["type"] == "epoch"]
    assert len(epochs) == 2
    assert {"full_val_loss", "full_val_acc", "train_loss", "train_acc", "fou_lr", "fou_weight_norm"} <= set(epochs[0])
    assert not {"fou_val_acc", "fou_val_uses", "full_train_acc"} & set(epochs[0])
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"]


@pytest.mark.parametrize("depth", ["fast", "full"])
def test_an_evaluation_is_recorded_and_said(depth: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["sinks.console.enabled=true", f"evaluation={depth}", "trainer.epochs=1"]
    figures = train([*SMALL, *said], str(tmp_path)).figures
    first, second = [r["values"] for r in read_jsonl(tmp_path / "metrics.jsonl") if r["type"] == "epoch"]
    assert not set(first) & set(second)
    assert {"fou_train_acc", "pix_overfitting_score", "fou_lr"} <= set(second)
    assert figures["fou_val_uses"] == first["fou_val_uses"]
    assert first["pix_val_uses_low"] < first["pix_val_uses"] < first["pix_val_uses_high"]
    output = capsys.readouterr().out
    line = f"val loss that an exchanged input costs: fou {first['fou_val_uses']:.3g} [{first['fou_val_uses_low']:.3g}, "
    assert f"epoch 1 (step 9)\n  {line}" in output
    assert output.count("epoch 1 (step 9)") == 1
    assert ("fou_knows" in first) == (depth == "full")
    assert (f"its features know, beyond the majority class, {100 * figures.get('fou_knows', 1):.1f} pp" in output) == (
        depth == "full"
    )


def test_a_budget_of_seconds_limits_what_is_tried(tmp_path: Path) -> None:
    train([*SMALL, "evaluation.seconds=1e-9", "trainer.batch_size=32", "trainer.epochs=2"], str(tmp_path))
    found = [record["values"] for record in evaluations(tmp_path)]
    first, second = (values["fou_val_uses_acc"] for values in found)
    assert first * 400 == pytest.approx(round(first * 400))
    assert second * 64 == pytest.approx(round(second * 64))  # the first one told the pace; no fewer than 64 are tried
    assert found[1]["fou_val_uses_detectable"] > 1.5 * found[0]["fou_val_uses_detectable"]


def _budgets(folder: str) -> tuple[float | None, float]:
    """What rank 1's clock says was a thousand seconds longer."""
    config = composed([*SMALL, "evaluation.share=0.5"])
    settings = load(config)
    training = build(settings, *data_and_model(config, settings), Path(folder), {}, torch.device("cpu"))
    training.since -= 1000 * training.rank
    return evaluation_budget(training), time.monotonic() - training.since


def test_a_share_of_the_time_is_rank_0s_on_every_rank(tmp_path: Path) -> None:
    (budget, passed), (told, longer) = run_ranks(2, _budgets, str(tmp_path))
    assert longer > 999
    assert told == budget
    assert budget is not None and 0 < budget <= 0.5 * passed


def test_a_stream_stops_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    stop = ["streams.fou.patience=1", "streams.fou.min_delta=1.0", "evaluation.every_steps=4", "trainer.epochs=1"]
    train([*SMALL, *stop], str(tmp_path))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["early_stopping"]["fou"]["frozen"]
    best = iter(saved["early_stopping"]["fou"]["best_tensors"])  # as of step 4; the run ends at step 9
    mine = [tensor for name, tensor in saved["model"].items() if name.startswith("encoders.fou.")]
    kept = sorted(map(str, best))
    assert kept == sorted(map(str, mine))


def test_without_the_monitor_streams_stop_and_rates_fall_as_with_it(tmp_path: Path) -> None:
    stop = ["streams.fou.patience=1", "streams.fou.min_delta=0.02", "optim.scheduler=plateau", "optim.patience=0"]
    overrides = [*SMALL, "trainer.epochs=4", *stop]
    watched = train_ranks(2, overrides, tmp_path / "watched")[0]["saved"]
    alone = train_ranks(2, [*overrides, "monitor.enabled=false"], tmp_path / "alone")[0]["saved"]
    assert same(watched["model"], alone["model"])
    assert watched["early_stopping"]["fou"]["best_epoch"] == alone["early_stopping"]["fou"]["best_epoch"]


@pytest.mark.parametrize("cadence", ["every_epochs=3", "every_steps=25"])
def test_a_plateau_counts_evaluations_not_epochs_without_one(cadence: str, tmp_path: Path) -> None:
    rare = ["optim.scheduler=plateau", "optim.patience=1", f"evaluation.{cadence}", "trainer.epochs=5"]
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
    depth = "evaluation=full" if experiment == "htad" else "evaluation=fast"
    result = train([*QUIET, f"experiment={experiment}", width, "trainer.epochs=1", depth], str(tmp_path))
    for stream in streams:
        assert 0 <= result.figures[f"{stream}_val_acc"] <= 1
        assert result.figures[f"{stream}_val_uses_low"] <= result.figures[f"{stream}_val_uses"]
    assert ("fac_without_val_acc" in result.figures) == (experiment == "mfeat_six")
    assert ("audio_knows_low" in result.figures) == (experiment == "htad")
