"""What several files of tests read, and what each worker of a test run has for itself."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

USUAL = gc.get_threshold()
gc.set_threshold(10_000, 20, 20)  # of the many objects that imports and test functions are, none is ever garbage

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
if WORKER and hasattr(os, "sched_setaffinity"):
    # With its ranks: gloo's threads spin for a lock as long as its holder waits for a core. On one core it seldom does.
    CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {CORES[int(WORKER) % len(CORES)]})


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(*USUAL)


@pytest.fixture(scope="session")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory and the output of a small main job on two ranks, with all sinks and all that is measured."""
    from tests.application import EVERYTHING, SHORT, command  # not by the process that only hands tests to workers

    folder = tmp_path_factory.mktemp("main")
    done = command(*SHORT, *EVERYTHING, "sinks.wandb.log_every=1", folder=folder, ranks=2, run="demo")
    assert done.returncode == 0, done.stderr
    return folder / "outputs" / "demo", done.stdout
