"""What happens around a job must not end it, and what ends it must say why: real processes, real signals."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from ddp_streammon import StreamMonitor, watch
from ddp_streammon.evaluation import Items
from ddp_streammon.report import Report
from ddp_streammon.sinks import JsonlSink, MemorySink, guard, read_jsonl
from ddp_streammon.sinks.wandb import STEP_AXIS
from tests.application import command, train
from tests.faults import SMALL, Broken
from tests.networks import STREAMS, batch, loss_of, network, part
from tests.ranks import CONTEXT, run_ranks
from tests.read_wandb import read_run
from tests.test_app import ROOT, inherited, start

NO_WANDB = "sinks.wandb.enabled=false"


def target(name: str, **arguments: Any) -> list[str]:
    """The overrides that choose a model of tests/faults.py."""
    return [f"+model._target_=tests.faults.{name}", *(f"+model.{key}={value}" for key, value in arguments.items())]


def findings_of(overrides: list[str], folder: str) -> list[tuple[str, str]]:
    """Train; what stands at the end."""
    return [(finding.rule, str(finding)) for finding in train(overrides, folder).findings]


def steps_of(path: Path) -> list[dict[str, Any]]:
    return [record for record in read_jsonl(path) if record["type"] == "step"]


# A rank is killed -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the job of the next test when nobody is killed: 3 epochs of 6 steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    overrides = [*SMALL, NO_WANDB, "trainer.epochs=3", *target("killed", at=1, victims=[])]
    run_ranks(2, findings_of, overrides, str(folder))
    return folder


@pytest.mark.slow
def test_a_restarted_job_goes_on_as_if_no_rank_had_been_killed(undisturbed_job: Path, tmp_path: Path) -> None:
    """Rank 0 dies in step 10, and after the restart at step 7 rank 1 in step 16; checkpoints are of steps 6 and 12."""
    overrides = [*SMALL, "trainer.epochs=3", *target("killed", at=10, victims="[0,1]"), "sinks.wandb.log_every=1"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2")
    done = start(*launcher, "-m", "ddp_streammon.train", *overrides, folder=tmp_path, WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "outputs").iterdir()

    records = read_jsonl(run_dir / "metrics.jsonl")
    steps = [record for record in records if record["type"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 19))
    assert [record["attempt"] for record in steps] == [0] * 6 + [1] * 6 + [2] * 6
    epochs = [(record["step"], record["attempt"]) for record in records if record["type"] == "epoch"]
    assert list(dict.fromkeys(epochs)) == [(6, 0), (12, 1), (18, 2)]
    for number, step in ((0, 7), (1, 13)):
        aside = steps_of(run_dir / f"metrics.jsonl.attempt-{number}")
        assert aside[0]["step"] == step
        assert {record["attempt"] for record in aside} == {number}

    twin = read_jsonl(undisturbed_job / "metrics.jsonl")
    for kind in ("step", "epoch"):
        mine, theirs = ([(r["values"], r["findings"]) for r in rs if r["type"] == kind] for rs in (records, twin))
        assert repr(mine) == repr(theirs)
    saved, expected = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (run_dir, undisturbed_job))
    assert all(torch.equal(tensor, expected["model"][name]) for name, tensor in saved["model"].items())
    assert str(saved["monitor"]) == str(expected["monitor"])

    runs = [read_run(folder) for folder in sorted((run_dir / "wandb").glob("offline-run-*"))]
    assert [run.run_id for run in runs] == [saved["wandb_run_id"]] * 3
    shown = [row[STEP_AXIS] for run in runs for row in run.history if "train/loss" in row]
    assert shown == list(range(1, 19)), "each step once, though steps were done again"


def test_a_job_goes_on_with_fewer_ranks(tmp_path: Path) -> None:
    overrides = [*SMALL, NO_WANDB, *target("killed", at=1, victims=[])]
    run_ranks(3, findings_of, [*overrides, "trainer.epochs=1"], str(tmp_path))
    before = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["monitor"]
    run_ranks(2, findings_of, [*overrides, "trainer.epochs=3"], str(tmp_path))
    after = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["monitor"]
    steps = steps_of(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in steps] == list(range(1, 17))  # 4 steps of 12 items, then 2 x 6 of 8
    assert [record["attempt"] for record in steps] == [0] * 4 + [1] * 12
    assert [record["values"]["samples"] for record in steps] == [12.0] * 4 + [8.0] * 12
    assert (before["calls"], after["calls"]) == (4, 16)
    assert [record["values"]["loss"] for record in steps] == after["history"]["series"]["loss"]["values"]


def test_starting_anew_in_the_same_folder_sets_the_old_records_aside(tmp_path: Path) -> None:
    overrides = [*SMALL, NO_WANDB, "trainer.epochs=1", *target("killed", at=1, victims=[])]
    train(overrides, str(tmp_path))
    train([*overrides, "trainer.resume=null"], str(tmp_path))
    steps, aside = steps_of(tmp_path / "metrics.jsonl"), steps_of(tmp_path / "metrics.jsonl.attempt-0")
    assert [record["step"] for record in steps] == [record["step"] for record in aside] == list(range(1, 13))
    assert {record["attempt"] for record in steps} == {1} and {record["attempt"] for record in aside} == {0}


def _error(overrides: list[str], folder: str) -> str:
    """What ends a run."""
    try:
        train(overrides, folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _error_apart(overrides: list[str], folder: str) -> str:
    """What ends a run whose hosts share no file system."""
    return _error(overrides, f"{folder}/{dist.get_rank()}")


def test_hosts_that_do_not_share_the_checkpoint_are_told(tmp_path: Path) -> None:
    overrides = [*SMALL, NO_WANDB, "trainer.epochs=1", *target("killed", at=1, victims=[])]
    train(overrides, str(tmp_path / "0"))
    for error in run_ranks(2, _error_apart, overrides, str(tmp_path)):
        assert error.startswith("ConfigError: rank 0 sees a checkpoint ")
        assert "rank 1 does not: the run directory must be one that all hosts share" in error


# A rank fails in an evaluation ------------------------------------------------------------------------------------


class Ends:
    """A rank's own batches, of which the second cannot be had."""

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        yield batch()
        if dist.get_rank() == 1:
            raise ConnectionError("the shard is gone")
        yield batch()


def _failing_score(model: nn.Module, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    *inputs, target = tensors
    if dist.get_rank() == 1:
        raise ArithmeticError("no score for this batch")
    return {"loss": nn.functional.cross_entropy(model(*inputs), target, reduction="none")}


def _drawn(count: int) -> list[int]:
    """The order in which so many items are evaluated."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return order


def _failing_evaluations() -> dict[str, str]:
    """What each rank hears of a fault on rank 1; the ranks have to be in step after each."""
    model = DistributedDataParallel(network())
    monitor = StreamMonitor(model, streams=STREAMS)
    whole = TensorDataset(*batch())
    of_rank_1 = _drawn(len(whole))[2]  # in the second batch of two
    faults: dict[str, Callable[[], Any]] = {
        "item": lambda: monitor.evaluate(DataLoader(Broken(whole, of_rank_1), batch_size=2)),
        "score": lambda: monitor.evaluate(DataLoader(whole, batch_size=4), _failing_score),
        "iter": lambda: monitor.evaluate(Items(Ends(), "shards", sharded=True)),
    }
    heard = {}
    for name, evaluate in faults.items():
        with pytest.raises(RuntimeError) as caught:
            evaluate()
        heard[name] = str(caught.value)
        assert model.training
        monitor.evaluate(DataLoader(whole, batch_size=4))
    return heard


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_rank_that_fails_in_an_evaluation_ends_all_of_them_with_its_name(world: int) -> None:
    for heard in run_ranks(world, _failing_evaluations):
        assert re.fullmatch(r"the evaluation failed on rank 1: OSError: item \d+ is torn", heard["item"])
        assert heard["score"] == "the evaluation failed on rank 1: ArithmeticError: no score for this batch"
        assert heard["iter"] == "the evaluation failed on rank 1: ConnectionError: the shard is gone"


def test_the_job_whose_validation_item_is_torn_ends_and_its_record_says_so(tmp_path: Path) -> None:
    overrides = [*SMALL, NO_WANDB, "trainer.epochs=2", *target("slow", seconds=0)]
    torn = ("data._target_=tests.faults.torn", "+data.at=5")
    rank = _drawn(24).index(5) // 4 % 3  # batches of 4 in the drawn order, in turn
    for error in run_ranks(3, _error, [*overrides, *torn], str(tmp_path)):
        assert error == f"RuntimeError: the evaluation failed on rank {rank}: OSError: item 5 is torn"
    *steps, outcome = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in steps] == [None, 1, 2, 3, 4]
    assert (outcome["type"], outcome["exit_code"]) == ("outcome", 1)


# A sink fails or blocks -------------------------------------------------------------------------------------------


class Stuck(MemorySink):
    """A service that does not answer for half a minute."""

    in_callers_thread = False

    def write(self, report: Report) -> None:
        time.sleep(30)


class Raising(MemorySink):
    in_callers_thread = False

    def write(self, report: Report) -> None:
        raise ConnectionResetError("the service has died")


def _with_bad_sinks(path: str, watched: bool) -> tuple[float, list[str], list[Tensor]]:
    """The longest step of a training, what was warned of, and the weights at its end."""
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ddp_streammon").addHandler(handler)
    guard.CLOSE_SECONDS = 0.5
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sinks = [JsonlSink("/dev/full"), Stuck(), Raising(), JsonlSink(path)] if dist.get_rank() == 0 else []
    monitor = StreamMonitor(model, optimizer, STREAMS, sinks=sinks) if watched else None
    longest = 0.0
    for number in range(20):
        begin = time.monotonic()
        optimizer.zero_grad()
        loss = loss_of(model, part(batch(seed=number), dist.get_rank(), dist.get_world_size()))
        loss.backward()
        if monitor is not None:
            monitor.step(loss=loss)
        optimizer.step()
        longest = max(longest, time.monotonic() - begin)
    if monitor is not None:
        monitor.close()
    return longest, warned, [parameter.detach() for parameter in model.parameters()]


def test_no_sink_stops_slows_or_changes_the_training(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    (longest, warned, weights), (_, silent, _) = run_ranks(2, _with_bad_sinks, str(path), True)
    assert longest < 2
    assert sorted(warned) == [
        "JsonlSink failed in open (OSError: [Errno 28] No space left on device): "
        "it is off for the rest of this run, all else goes on",
        "Raising failed in write (ConnectionResetError: the service has died): "
        "it is off for the rest of this run, all else goes on",
        "Stuck did not end within 0.5 s and is left behind: 20 of 20 reports are not written",
    ]
    assert silent == []
    assert [record["step"] for record in steps_of(path)] == list(range(1, 21))
    alone = run_ranks(2, _with_bad_sinks, str(path), False)[0][2]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(weights, alone, strict=True))


def test_a_job_on_a_full_disk_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    result = train([*SMALL, NO_WANDB, "trainer.epochs=1", *target("slow", seconds=0)], str(tmp_path))
    assert 0 < result.figures["full_val_loss"] < 10
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "No space left on device" in warning


def test_the_job_outlives_wandbs_service(tmp_path: Path) -> None:
    overrides = [*SMALL, "trainer.epochs=2", *target("service_killed", at=5), "sinks.wandb.log_every=1"]
    done = command(*overrides, folder=tmp_path, run="orphan")
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "outputs" / "orphan"
    *records, outcome = read_jsonl(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records if record["type"] == "step"] == list(range(1, 25))
    assert outcome["exit_code"] == 0
    warnings = [line for line in (run_dir / "rank0.log").read_text().splitlines() if "[ddp_streammon]" in line]
    assert len([line for line in warnings if "WandbSink failed in write" in line]) == 1
    assert len([line for line in warnings if "[WARNING]" in line]) == 1


# Gradients fail ---------------------------------------------------------------------------------------------------


def test_a_job_whose_gradients_are_all_nan_ends_by_itself_and_says_so(tmp_path: Path) -> None:
    overrides = [*SMALL, NO_WANDB, "trainer.epochs=2", *target("nonfinite", at=4)]
    first, second = run_ranks(2, findings_of, overrides, str(tmp_path))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not strict JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    steps = [record for record in records if record["type"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 13))
    found = [{(finding["rule"], finding["stream"]) for finding in record["findings"]} for record in steps]
    whose = {("NF", None)}
    assert all(whose.isdisjoint(rules) for rules in found[:3])
    assert all(whose <= rules for rules in found[3:])
    assert records[-1]["exit_code"] == 0
    assert whose <= {(finding["rule"], finding["stream"]) for finding in records[-1]["findings"]}
    assert first == second
    assert {rule for rule, _ in first} >= {"NF"}


# The job is asked to go -------------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the job ended early"
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started."""
    children = Path(f"/proc/{launcher.pid}/task").glob("*/children")
    return [int(pid) for file in children for pid in file.read_text().split()]


def running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_job_that_is_asked_to_go_keeps_its_records(tmp_path: Path) -> None:
    overrides = [*SMALL, "trainer.epochs=1000", *target("slow", seconds=0.03), "sinks.wandb.log_every=1"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    job = subprocess.Popen(
        [sys.executable, *launcher, "-m", "ddp_streammon.train", *overrides],
        cwd=tmp_path,
        env={**inherited(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "STREAMMON_RUN": "asked"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    run_dir = tmp_path / "outputs" / "asked"
    file = run_dir / "metrics.jsonl"
    try:
        wait_for(lambda: file.exists() and len(file.read_text().splitlines()) > 10, job)
        ranks = ranks_of(job)
        asked = time.time()
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=40) != 0
    finally:
        if job.poll() is None:
            job.kill()
            job.wait()
    assert len(ranks) == 2 and not any(running(pid) for pid in ranks)
    *records, outcome = read_jsonl(file)
    assert (outcome["type"], outcome["exit_code"]) == ("outcome", 1)
    assert outcome["time"] - asked < 2
    steps = [record["step"] for record in records if record["type"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    assert records[-1]["time"] > asked - 1
    (log,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    run = read_run(log)
    assert [row["trainer/step"] for row in run.history if "trainer/step" in row] == [
        record["step"] for record in records if record["type"] in ("step", "epoch")
    ]
    assert run.exit_code == 1


def _own_loop(folder: str, calls: Any) -> None:
    os.chdir(folder)
    model = network()
    monitor = watch(model, streams=STREAMS, sinks=[JsonlSink("log.jsonl")])
    for number in range(1_000_000):
        loss_of(model, batch()).backward()
        monitor.step()
        calls.send(number + 1)
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_loop_of_ones_own_that_is_killed_keeps_its_records(number: signal.Signals, tmp_path: Path) -> None:
    calls, told = CONTEXT.Pipe(duplex=False)
    loop = CONTEXT.Process(target=_own_loop, args=(str(tmp_path), told))
    loop.start()
    told.close()
    try:
        while calls.poll(60) and calls.recv() < 30:
            pass
        if number == signal.SIGKILL:
            time.sleep(1.0)  # what is older than a second is kept, whatever else the machine does
        os.kill(loop.pid, number)
        loop.join(timeout=20)
        assert loop.exitcode == -number
    finally:
        loop.kill()
        loop.join()
    steps = [record["step"] for record in steps_of(tmp_path / "log.jsonl")]
    assert steps[:28] == list(range(1, 29))  # step 29 arrives at call 30, and may have been under way
