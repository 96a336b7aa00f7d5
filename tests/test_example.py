"""The example script runs as its docstring says, and prints what the guide promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_example_trains_and_reports_both_streams(tmp_path: Path) -> None:
    script = ROOT / "launch" / "example_stream_monitoring.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, str(script), "--epochs", "2", "--samples", "80"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert re.search(r"^stream1 +60 .* 0\.005 +0\.01 ", out, re.M)
    assert re.search(r"^stream2 +60 .* 0\.001 +0\.02 ", out, re.M)
    losses = [float(loss) for loss in re.findall(r"^Epoch \d: train (\d\.\d+)", out, re.M)]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert len(re.findall(r"^  stream[12]: gradient norm \d.* weight norm \d.* score -?\d", out, re.M)) == 4
    assert re.search(r"^  (⚠️|✓) ", out, re.M)
    assert "Stream Monitoring Summary" in out and "Overfitting Indicators (latest):" in out
    assert "Pathways, over 20 validation items:" in out
    assert len(re.findall(r"^  stream[12] only: \d.*% \(\d+% of it\), mean feature norm \d", out, re.M)) == 2
    assert list(tmp_path.iterdir()) == []
