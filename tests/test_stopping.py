"""train/stopping.py: one rank is asked to end the job, all end after the same step, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ddp_streammon import keys
from ddp_streammon.report import STOPPED
from ddp_streammon.sinks import read_jsonl
from ddp_streammon.train import loop
from ddp_streammon.train.__main__ import composed, data_and_model
from ddp_streammon.train.config import load
from ddp_streammon.train.training import Training, build
from tests.fake_wandb import FakeWandb
from tests.faults import SMALL
from tests.ranks import run_ranks
from tests.test_app import ROOT, inherited

JOB = (
    *SMALL,
    "+model._target_=ddp_streammon.train.models.multi_mlp",
    "+model.dropout_p=0.3",
    "sinks.wandb.enabled=false",
)
JOB += ("trainer.epochs=2", "evaluation=off", "data._target_=tests.faults.drawing")


def trained(folder: Path, *more: str, asked_at: int = 0, asks: int = 0) -> Training:
    """Train; rank `asks` is asked to stop in its n-th training forward."""
    config = composed([*JOB, *more])
    settings = load(config)
    loop.seed_all(0)
    data, model = data_and_model(config, settings)
    folder.mkdir(exist_ok=True)
    training = build(settings, data, model, folder, {}, torch.device("cpu"))
    training.stop.possible = dist.get_rank() == 0
    forwards = 0

    def hook(module: Any, _: Any) -> None:
        nonlocal forwards
        forwards += module.training
        if forwards == asked_at and dist.get_rank() == asks:
            training.stop.ask()

    model.register_forward_pre_hook(hook)
    loop._train(training)
    assert training.monitor is not None
    training.monitor.close()
    return training


def _stopped_and_resumed(folder: str, *more: str) -> tuple[tuple[bool, int, int, int], bool, list[float]]:
    """Where a stopped training stood, whether its weights after resuming are those of one that went through, and what
    was recorded of the stop."""
    whole = trained(Path(folder, "whole"), *more, asked_at=2, asks=1)  # where nobody can ask
    assert not whole.stop.agreed
    half = trained(Path(folder, "half"), *more, asked_at=9)
    asked = half.monitor.history[keys.STOP] if half.monitor is not None else []
    assert half.begun is not None
    stood = half.stop.agreed, half.epoch, half.steps, half.begun.batches
    rest = trained(Path(folder, "half"), *more)
    pairs = zip(whole.model.parameters(), rest.model.parameters(), strict=True)
    alike = rest.steps == whole.steps and all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert not rest.stop.agreed, "the answer of the attempt before is not taken for another"
    return stood, alike, asked


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_all_ranks_stop_after_the_same_step_and_go_on_bit_for_bit(accumulate: int, tmp_path: Path) -> None:
    """6 micro-batches an epoch; rank 0 is asked in the third of the second one, and a packet arrives a step later."""
    steps, batches = {1: (10, 4), 2: (6, 6)}[accumulate]
    for stood, alike, asked in run_ranks(2, _stopped_and_resumed, str(tmp_path), f"trainer.accumulate={accumulate}"):
        assert stood == (True, 1, steps, batches)
        assert alike
        assert [number for number, value in enumerate(asked, 1) if value] == list(range(steps - 1, steps + 1))


def _other_number_of_ranks(folder: str) -> tuple[int, int]:
    training = trained(Path(folder))
    return training.epoch, training.steps


@pytest.mark.slow
def test_with_another_number_of_ranks_the_epoch_begins_anew(tmp_path: Path) -> None:
    run_ranks(2, _stopped, str(tmp_path))
    assert (
        run_ranks(3, _other_number_of_ranks, str(tmp_path)) == [(2, 10 + 4)] * 3
    )  # 10 steps, then 48 / 12 of a new one


def _stopped(folder: str) -> None:
    trained(Path(folder), asked_at=9)


def until(condition: Any, job: subprocess.Popen[bytes], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, "the job ended early"
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


@pytest.mark.slow
def test_stop_run_in_wandbs_page_ends_all_ranks(tmp_path: Path) -> None:
    """Under torchrun with restarts allowed: the job is not started again, and its last rows are on the server."""
    job_of = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2")
    overrides = (*SMALL, "+model._target_=tests.faults.slow", "+model.seconds=0.05", "trainer.epochs=100000")
    online = ("sinks.wandb.mode=online", "sinks.wandb.project=p", "sinks.wandb.run_id=r1", "sinks.wandb.log_every=1")
    run_dir = tmp_path / "outputs" / "stopped"
    file = run_dir / "metrics.jsonl"
    with FakeWandb() as server, (tmp_path / "out").open("wb") as out:
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "STREAMMON_RUN": "stopped", "WANDB_SILENT": "true"}
        command = [sys.executable, *job_of, "-m", "ddp_streammon.train", *overrides, *online]
        job = subprocess.Popen(
            command, cwd=tmp_path, env={**inherited(), **server.env(), **own}, stdout=out, stderr=out
        )
        try:
            until(lambda: file.exists() and len(file.read_text().splitlines()) > 20, job)
            server.stop_requested = True
            code = job.wait(timeout=60)
        finally:
            if job.poll() is None:
                job.terminate()
                job.wait(timeout=40)
        said = (tmp_path / "out").read_text()
        assert code == 0, said
        *records, outcome = read_jsonl(file)
        steps = [record["step"] for record in records if record["type"] == "step"]
        assert steps == list(range(1, len(steps) + 1)) and {record["attempt"] for record in records} == {0}
        assert (outcome["type"], outcome["exit_code"]) == ("outcome", STOPPED)
        assert [record["values"][keys.STOP] for record in records if record["type"] == "step"][-3:] == [0.0, 1.0, 1.0]
        assert f"Stopped after step {len(steps)}, as asked for in W&B" in said
        assert f"Stopped after step {len(steps)}, as somebody had asked." in (run_dir / "report.html").read_text()
        saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        assert saved["steps"] == len(steps) and saved["begun"] is not None
        run = server.runs["r1"]
        assert (run.complete, run.exit_code) == (True, STOPPED)
        shown = [row["trainer/step"] for row in run.history if "train/loss" in row]
        assert shown == steps
        assert server.unknown == []
    for log in (run_dir / f"rank{rank}.log" for rank in range(2)):
        assert f"asked to stop: training ends after step {len(steps)}" in log.read_text()
    assert os.path.getmtime(run_dir / "checkpoint.pt") <= outcome["time"]
