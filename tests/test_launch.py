"""The scripts: the demo, and the picture of a run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.scripts import environment
from tests.test_app import ROOT, start


def test_the_demo_trains_and_says_where_to_look(tmp_path: Path) -> None:
    overrides = ("model.width=4", "trainer.epochs=2", f"hydra.run.dir={tmp_path}/run")
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "demo.sh"), *overrides],
        cwd=tmp_path,
        env=environment(tmp_path / "environment"),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout[done.stdout.index("Recommendations:") :]
    assert f"JSONL file     {tmp_path}/run/metrics.jsonl" in last
    assert f"W&B run        {tmp_path}/run/wandb/offline-run-" in last
    pytest.importorskip("matplotlib")
    plotted = start(str(ROOT / "launch" / "plot_run.py"), f"{tmp_path}/run", "picture.png", folder=tmp_path)
    assert plotted.returncode == 0, plotted.stderr
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
