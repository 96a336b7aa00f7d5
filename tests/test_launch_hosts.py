"""The scripts of launch/: what they start, and that it runs; the demo, and the picture of a run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddp_streammon.sinks import read_jsonl
from tests.faults import SMALL
from tests.scripts import environment, script
from tests.test_app import ROOT, start
from tests.test_survival import target

TOLD = 'echo "$STREAMMON_RUN: $*"; [[ "$*" != *bad* ]]'
"""In place of torchrun: says what it is asked for, and fails where it is asked for something bad."""
JOB = (*SMALL, "sinks.wandb.enabled=false", "trainer.epochs=1", *target("slow", seconds=0))


@pytest.fixture
def told(tmp_path: Path) -> dict[str, str]:
    return environment(tmp_path / "environment", torchrun=TOLD)


def test_the_demo_trains_and_says_where_to_look(tmp_path: Path) -> None:
    overrides = ("model.width=4", "trainer.epochs=2", f"hydra.run.dir={tmp_path}/run")
    done = script("demo.sh", *overrides, folder=tmp_path, variables=environment(tmp_path / "environment"))
    assert done.returncode == 0, done.stderr
    last = done.stdout[done.stdout.index("Recommendations:") :]
    assert f"JSONL file     {tmp_path}/run/metrics.jsonl" in last
    assert f"W&B run        {tmp_path}/run/wandb/offline-run-" in last
    pytest.importorskip("matplotlib")
    plotted = start(str(ROOT / "launch" / "plot_run.py"), f"{tmp_path}/run", "picture.png", folder=tmp_path)
    assert plotted.returncode == 0, plotted.stderr
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_one_host_needs_no_variables(told: dict[str, str], tmp_path: Path) -> None:
    done = script(
        "torchrun.sh", "optim.lr=0.1", folder=tmp_path, variables={**told, "STREAMMON_RUN": "x", "NPROC": "2"}
    )
    asked = "--nproc-per-node=2 --max-restarts=0 --standalone -m ddp_streammon.train optim.lr=0.1"
    assert (done.stdout, done.returncode) == (f"x: {asked}\n", 0), done.stderr
    plain = script("torchrun.sh", folder=tmp_path, variables=told)
    assert re.match(r"\d{8}-\d{6}: --nproc-per-node=auto ", plain.stdout)


@pytest.mark.parametrize(("rank", "is_host"), [({"NODE_RANK": "0"}, 1), ({"SLURM_NODEID": "1"}, 0)])
def test_many_hosts_meet_at_the_head(told: dict[str, str], tmp_path: Path, rank: dict[str, str], is_host: int) -> None:
    many = {"NNODES": "2", "HEAD": "a", "PORT": "9", "STREAMMON_RUN": "x", "LOCAL_ADDR": "b", "MAX_RESTARTS": "3"}
    done = script("torchrun.sh", folder=tmp_path, variables={**told, **many, **rank})
    assert done.stdout == (
        "x: --nproc-per-node=auto --max-restarts=3 --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=a:9 --rdzv-id=x "
        f"--rdzv-conf=is_host={is_host} --local-addr=b -m ddp_streammon.train\n"
    ), done.stderr


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"STREAMMON_RUN": "x"}, "with NNODES=2 say HEAD, the name or address of host 0"),
        ({"HEAD": "a"}, "with NNODES=2 say STREAMMON_RUN, the same name on every host"),
    ],
)
def test_what_many_hosts_need_is_asked_for(
    told: dict[str, str], tmp_path: Path, given: dict[str, str], error: str
) -> None:
    done = script("torchrun.sh", folder=tmp_path, variables={**told, **given, "NNODES": "2"})
    assert done.returncode != 0 and error in done.stderr


def test_a_sweep_is_one_torchrun_for_each_combination(told: dict[str, str], tmp_path: Path) -> None:
    overrides = ("optim.lr=1e-3,1e-4", "model.hidden=[8,4]", "+name=a/b,bad", "trainer.epochs=1")
    done = script("sweep.sh", *overrides, folder=tmp_path, variables={**told, "STREAMMON_SWEEP": "s", "NPROC": "2"})
    jobs = [line for line in done.stdout.splitlines() if not line.startswith("==")]
    fixed = "--nproc-per-node=2 --max-restarts=0 --standalone -m ddp_streammon.train"
    assert jobs == [
        f"s/optim.lr={lr},+name={name.replace('/', '_')}: {fixed} optim.lr={lr} model.hidden=[8,4] +name={name} "
        "trainer.epochs=1"
        for lr in ("1e-3", "1e-4")
        for name in ("a/b", "bad")
    ]
    assert done.returncode == 1
    assert done.stderr == "failed: optim.lr=1e-3,+name=bad\nfailed: optim.lr=1e-4,+name=bad\n"


def test_a_sweep_of_one_is_a_run(told: dict[str, str], tmp_path: Path) -> None:
    done = script("sweep.sh", "trainer.epochs=1", folder=tmp_path, variables={**told, "STREAMMON_SWEEP": "s"})
    assert done.returncode == 0, done.stderr
    assert "== the runs are in outputs/s\n" in done.stdout and "s/all: " in done.stdout


@pytest.mark.slow
def test_the_jobs_of_a_sweep_run(tmp_path: Path) -> None:
    variables = {**environment(tmp_path / "environment"), "STREAMMON_SWEEP": "s", "NPROC": "2"}
    done = script("sweep.sh", *JOB, "trainer.seed=0,1", folder=tmp_path, variables=variables)
    assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "outputs" / "s").iterdir())
    assert [run.name for run in runs] == ["trainer.seed=0", "trainer.seed=1"]
    losses = [[r["values"]["loss"] for r in read_jsonl(run / "metrics.jsonl") if r["type"] == "step"] for run in runs]
    assert len(losses[0]) == len(losses[1]) == 6 and losses[0] != losses[1]


def test_the_readmes_commands_start_what_they_say(told: dict[str, str]) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    *commands, batch = block.splitlines()
    done = subprocess.run(
        ["bash", "-ec", "\n".join(commands)],
        cwd=ROOT,
        env=told,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "first: --nproc-per-node=auto --max-restarts=0 --nnodes=2 " in done.stdout
    assert "experiment=mfeat_six\n" in done.stdout
    assert done.stdout.count(" --standalone ") == 4
    script_of_batch = re.search(r"^sbatch .*(launch/\S+)", batch)
    assert script_of_batch and (ROOT / script_of_batch[1]).is_file()


# Slurm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The variables by which Slurm's commands find two nodes of this machine."""
    if os.geteuid() != 0 or not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "sbatch")):
        pytest.skip("Slurm is not installed, or not by root (Debian's slurm-wlm and munge)")
    folder = tmp_path / "slurm"
    nodes = ["bash", str(ROOT / "tests" / "slurm_two_nodes.sh")]
    try:
        up = subprocess.run([*nodes, "up", str(folder)], capture_output=True, text=True, timeout=60, check=False)
        assert up.returncode == 0, up.stderr
        yield {"SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run([*nodes, "down", str(folder)], timeout=20, check=False)


@pytest.mark.slow
def test_two_nodes_of_slurm_run_one_job_to_the_end(slurm: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    variables = {**environment(tmp_path / "environment"), **slurm, "HEAD": "127.0.0.1", "NPROC": "1"}
    submitted = subprocess.run(
        ["sbatch", "--parsable", f"--output={tmp_path}/job.log", "launch/slurm.sbatch", *JOB, f"hydra.run.dir={run}"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert submitted.returncode == 0, submitted.stderr
    number = submitted.stdout.strip()
    log, deadline = tmp_path / "job.log", time.monotonic() + 120
    while "State" not in (state := _state(number, variables)) and time.monotonic() < deadline:
        time.sleep(0.5)
    said = log.read_text() if log.exists() else "no log"
    assert "COMPLETED" in state, f"{state}\n{said}"
    records = read_jsonl(run / "metrics.jsonl")
    steps = [record for record in records if record["type"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 7))
    assert {record["values"]["samples"] for record in steps} == {8.0}  # 2 ranks of 4
    assert records[-1]["exit_code"] == 0
    assert "Where to look:" in said


def _state(number: str, variables: dict[str, str]) -> str:
    """`State: ...` of a job that has ended, else empty."""
    shown = subprocess.run(
        ["scontrol", "show", "job", number], env=variables, capture_output=True, text=True, timeout=20, check=False
    ).stdout
    found = re.search(r"JobState=(\w+)", shown)
    running = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
    return f"State: {found[1]}" if found and found[1] not in running else ""
