"""sinks/tensorboard.py, read back by TensorBoard's own reader."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from ddp_streammon import keys
from ddp_streammon.sinks.tensorboard import TensorboardSink
from tests.test_sinks import EPOCH, OUTCOME, OVERFIT, RUN, STEP


def written(folder: Path) -> Any:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    return events


def texts(events: Any, name: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(f"{name}/text_summary")]


def test_figures_findings_and_the_verdict_are_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    sink = TensorboardSink(tmp_path)
    sink.open(RUN)
    for report in (STEP, EPOCH, EPOCH):
        sink.write(report)
    sink.close(OUTCOME)
    events = written(tmp_path)
    wanted = {keys.wandb_key(key, RUN.streams) for report in (STEP, EPOCH) for key in report.values} - {None}
    assert set(events.Tags()["scalars"]) == wanted and "grad_norm/rgb" in wanted
    norms = [(event.step, event.value) for event in events.Scalars("grad_norm/depth")]
    assert norms == [(STEP.step, math.inf), (EPOCH.step, 0.5), (EPOCH.step, 0.5)]
    ((step, told),) = texts(events, "findings")
    assert step == EPOCH.step and told.startswith(f"{OVERFIT.severity.value} {OVERFIT.rule}: ⚠️  Depth overfitting")
    assert told.endswith("`parameter group 'depth': weight_decay -> 0.05`")
    verdict = "the run failed; overfit: Depth overfitting (score: 1.5) [1 warning]"
    assert texts(events, keys.VERDICT) == [(EPOCH.step, verdict)]
    assert texts(events, "run") == [(0, f"```\n{RUN.inventory}\n```")]


def test_steps_are_thinned_and_epochs_are_not(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    sink = TensorboardSink(tmp_path, log_every=2)
    sink.open(RUN)
    for report in (STEP, STEP, STEP, EPOCH):
        sink.write(report)
    sink.close(OUTCOME)
    events = written(tmp_path)
    assert [event.step for event in events.Scalars("grad_norm/rgb")] == [STEP.step, STEP.step, EPOCH.step]
    assert len(events.Scalars("overfit/overfitting_score/depth")) == 1


def test_bad_settings_and_a_missing_package_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="log_every must be at least 1 .every step report., got 0"):
        TensorboardSink(tmp_path, log_every=0)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="needs the package tensorboard: pip install tensorboard"):
        TensorboardSink(tmp_path)
