"""The application on two hosts (network namespaces of this machine), and what a cut cable does to it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddp_streammon.sinks import read_jsonl
from tests.faults import SMALL
from tests.ranks import run_ranks
from tests.scripts import environment
from tests.test_app import ROOT
from tests.test_survival import findings_of, target, wait_for

pytestmark = pytest.mark.slow

SCRIPT = ["bash", str(ROOT / "tests" / "two_hosts.sh")]
OVERRIDES = [*SMALL, "sinks.wandb.enabled=false"]


def two_hosts(what: str, name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SCRIPT, what, name], capture_output=True, text=True, timeout=20, check=False)


@pytest.fixture
def hosts() -> Iterator[str]:
    """The name under which the two hosts exist."""
    name = f"streammon{os.getpid()}"
    made = two_hosts("up", name)
    try:
        if made.returncode != 0:
            pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
        yield name
    finally:
        two_hosts("down", name)


class Job:
    """launch/torchrun.sh on each host, and an end to both whatever the test does."""

    def __init__(self, hosts: str, folder: Path, *overrides: str, restarts: int = 0) -> None:
        self.restarts = restarts
        self.file = folder / "outputs" / "two" / "metrics.jsonl"
        self.logs = [folder / f"host{side}.log" for side in (1, 2)]
        self.launchers = [self._start(hosts, folder, side, overrides) for side in (1, 2)]

    def _start(self, hosts: str, folder: Path, side: int, overrides: tuple[str, ...]) -> subprocess.Popen[str]:
        variables = {
            **environment(folder / f"environment{side}"),
            "NNODES": "2",
            "NPROC": "1",
            "NODE_RANK": str(side - 1),
            "MAX_RESTARTS": str(self.restarts),
            "HEAD": "10.77.0.1",
            "PORT": "29788",
            "LOCAL_ADDR": f"10.77.0.{side}",
            "STREAMMON_RUN": "two",
        }
        return subprocess.Popen(
            [*SCRIPT, "on", hosts, str(side), "bash", str(ROOT / "launch" / "torchrun.sh"), *overrides],
            cwd=folder,
            env=variables,
            stdout=self.logs[side - 1].open("w"),
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def steps(self) -> list[int]:
        if not self.file.exists():
            return []
        return [record["step"] for record in read_jsonl(self.file) if record["type"] == "step"]

    def wait_for_steps(self, count: int) -> None:
        wait_for(lambda: len(self.steps()) >= count, self.launchers[0])

    def ends(self, seconds: float) -> list[int]:
        """The launchers' exit codes; fails the test where one is still there after so long."""
        deadline = time.monotonic() + seconds
        return [launcher.wait(timeout=max(0.1, deadline - time.monotonic())) for launcher in self.launchers]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for launcher in self.launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()


def test_a_job_on_two_hosts_is_the_job_on_one(hosts: str, tmp_path: Path) -> None:
    overrides = [*OVERRIDES, "trainer.epochs=2", *target("slow", seconds=0)]
    with Job(hosts, tmp_path, *overrides) as job:
        codes = job.ends(120)
        assert codes == [0, 0], job.logs[0].read_text() + job.logs[1].read_text()
    run_ranks(2, findings_of, overrides, str(tmp_path / "one"))
    mine, theirs = (
        [(record["values"], record["findings"]) for record in read_jsonl(file) if record["type"] in ("step", "epoch")]
        for file in (job.file, tmp_path / "one" / "metrics.jsonl")
    )
    assert len(mine) == 16  # 12 steps, and of each of 2 evaluations what the head uses and each stream alone
    assert repr(mine) == repr(theirs)


def test_the_main_job_runs_to_its_end_on_two_hosts(hosts: str, tmp_path: Path) -> None:
    overrides = ["model.width=4", "trainer.epochs=1", "trainer.progress=false", "sinks.wandb.enabled=false"]
    with Job(hosts, tmp_path, *overrides) as job:
        codes = job.ends(180)
        assert codes == [0, 0], job.logs[0].read_text() + job.logs[1].read_text()
        first, second = (log.read_text() for log in job.logs)
    assert "Where to look:" in first and "Where to look:" not in second
    records = read_jsonl(job.file)
    assert job.steps() == [1, 2, 3, 4]  # 1,200 items, 2 ranks of 128
    assert {record["values"]["samples"] for record in records if record["type"] == "step"} <= {256.0, 1200.0 - 3 * 256}
    assert records[-1]["exit_code"] == 0


def test_a_rank_killed_on_the_other_host_restarts_the_job_on_both(hosts: str, tmp_path: Path) -> None:
    overrides = [*OVERRIDES, "trainer.epochs=2", *target("killed", at=9, victims="[1]")]
    with Job(hosts, tmp_path, *overrides, restarts=2) as job:
        codes = job.ends(120)
        assert codes == [0, 0], job.logs[0].read_text() + job.logs[1].read_text()
    assert job.steps() == list(range(1, 13))
    attempts = [record["attempt"] for record in read_jsonl(job.file) if record["type"] == "step"]
    assert attempts[:6] == [0] * 6 and 0 not in attempts[6:]


def test_a_cable_that_is_mended_costs_time_only(hosts: str, tmp_path: Path) -> None:
    with Job(hosts, tmp_path, *OVERRIDES, "trainer.epochs=10", *target("slow", seconds=0.1)) as job:
        job.wait_for_steps(5)
        two_hosts("cut", hosts)
        time.sleep(2)
        before = job.steps()
        time.sleep(18)
        assert job.steps() == before
        two_hosts("heal", hosts)
        codes = job.ends(180)
        assert codes == [0, 0], job.logs[0].read_text() + job.logs[1].read_text()
    assert job.steps() == list(range(1, 61))
    assert read_jsonl(job.file)[-1]["exit_code"] == 0


def test_a_cable_that_stays_cut_ends_the_job_within_its_timeout(hosts: str, tmp_path: Path) -> None:
    overrides = [*OVERRIDES, "trainer.epochs=1000", "trainer.timeout_s=15", *target("slow", seconds=0.1)]
    with Job(hosts, tmp_path, *overrides) as job:
        job.wait_for_steps(5)
        two_hosts("cut", hosts)
        wait_for(lambda: read_jsonl(job.file)[-1]["type"] == "outcome", job.launchers[0], seconds=15 + 10)
        assert job.launchers[0].wait(timeout=60) != 0
        log = job.logs[0].read_text()
        assert "Timed out waiting 15000ms" in log, log
    steps = job.steps()
    assert steps == list(range(1, len(steps) + 1))
    outcome = read_jsonl(job.file)[-1]
    assert (outcome["type"], outcome["exit_code"]) == ("outcome", 1)
