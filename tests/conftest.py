"""What several files of tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.application import EVERYTHING, SHORT, command


@pytest.fixture(scope="session")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory and the output of a small main job on two ranks, with all sinks and all that is measured."""
    folder = tmp_path_factory.mktemp("main")
    done = command(*SHORT, *EVERYTHING, "sinks.wandb.log_every=1", folder=folder, ranks=2, run="demo")
    assert done.returncode == 0, done.stderr
    return folder / "outputs" / "demo", done.stdout
