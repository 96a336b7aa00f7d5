"""sinks: the fan-out, the guard, and the sinks that need no service."""

from __future__ import annotations

import io
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddp_streammon.config import Severity
from ddp_streammon.report import Outcome, Report, RunInfo, Sink
from ddp_streammon.rules.finding import Action, Finding
from ddp_streammon.sinks import ConsoleSink, FanOut, Guarded, JsonlSink, MemorySink, read_jsonl

RUN = RunInfo(streams=("rgb", "depth"), config={"lr": 0.1, "data": Path("d")}, inventory="rgb: 3 tensors", name="r")
STEP = Report("step", 7, 0.5, {"rgb_grad_norm": math.nan, "depth_grad_norm": math.inf, "loss": -math.inf})
OVERFIT = Finding(
    "⚠️  Depth overfitting (score: 1.5)",
    rule="overfit",
    severity=Severity.warning,
    stream="depth",
    step=10,
    evidence={"score": math.inf},
    action=Action(setting="weight_decay", stream="depth", value=0.05, old=math.nan),
)
EPOCH = Report(
    "epoch",
    10,
    1.0,
    {
        "rgb_grad_norm": 1.25,
        "depth_grad_norm": 0.5,
        "depth_overfitting_score": 1.5,
        "shared_grad_norm": 2,
        "train_loss": 0.4,
        "full_val_acc": 0.75,
    },
    findings=(OVERFIT,),
)
OUTCOME = Outcome(summary={"rgb_grad_norm": 1.25}, findings=(), text="the end", exit_code=3)


class Failing(MemorySink):
    """Raises in `write`, and in `close` too, as a client whose service has died does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def write(self, report: Report) -> None:
        self.calls.append("write")
        raise ConnectionResetError("service gone")

    def close(self, outcome: Outcome) -> None:
        self.calls.append("close")
        raise ConnectionResetError("still gone")


def test_one_sink_that_fails_is_one_warning_and_no_loss_for_others(caplog: pytest.LogCaptureFixture) -> None:
    failing, memory = Failing(), MemorySink()
    sinks: Sink = FanOut([failing, memory])
    with caplog.at_level(logging.INFO, logger="ddp_streammon"):
        sinks.open(RUN)
        for report in (STEP, EPOCH, EPOCH):
            sinks.write(report)
        sinks.close(OUTCOME)
    assert failing.calls == ["write", "close"]
    assert memory.run is RUN and memory.reports == [STEP, EPOCH, EPOCH] and memory.outcome is OUTCOME
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "Failing failed in write (ConnectionResetError: service gone): it is off" in record.getMessage()


def test_a_failure_while_closing_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ddp_streammon"):
        Guarded(Failing()).close(OUTCOME)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_user_who_interrupts_is_obeyed() -> None:
    class Interrupted(MemorySink):
        def write(self, report: Report) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guarded(Interrupted()).write(STEP)


def test_a_sink_that_cannot_open_is_heard_before_training() -> None:
    class Closed(MemorySink):
        def open(self, run: RunInfo) -> None:
            raise ValueError("no such project")

    with pytest.raises(ValueError, match="no such project"):
        FanOut([Closed()]).open(RUN)


def test_fan_outs_nest(tmp_path: Path) -> None:
    file, memory = JsonlSink(tmp_path / "log.jsonl"), MemorySink()
    sinks = FanOut([FanOut([file]), Guarded(memory)])
    sinks.open(RUN)
    sinks.write(STEP)
    sinks.close(OUTCOME)
    assert len(memory.reports) == 1 and len(read_jsonl(file.path)) == 3


def test_jsonl_gives_every_value_back_and_is_strict_json(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "new" / "folder" / "log.jsonl")
    sink.open(RUN)
    sink.write(STEP)
    sink.write(EPOCH)
    sink.close(OUTCOME)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not strict JSON")

    for line in sink.path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    run, step, epoch, outcome = read_jsonl(sink.path)
    assert [record["type"] for record in (run, step, epoch, outcome)] == ["run", "step", "epoch", "outcome"]
    assert run["streams"] == ["rgb", "depth"] and run["config"] == {"lr": 0.1, "data": "d"}
    assert run["name"] == "r" and run["inventory"] == RUN.inventory
    assert math.isnan(step["values"]["rgb_grad_norm"])
    assert (step["values"]["depth_grad_norm"], step["values"]["loss"]) == (math.inf, -math.inf)
    assert (epoch["step"], epoch["epoch"], epoch["values"]) == (10, 1.0, dict(EPOCH.values))
    assert run["time"] <= step["time"] <= outcome["time"]
    (finding,) = epoch["findings"]
    assert finding["finding"] == str(OVERFIT) and finding["severity"] == "warning"
    assert finding["evidence"] == {"score": math.inf} and math.isnan(finding["action"]["old"])
    assert (outcome["text"], outcome["exit_code"], outcome["values"]) == ("the end", 3, OUTCOME.summary)


def test_jsonl_is_on_disk_after_each_record(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "log.jsonl")
    sink.open(RUN)
    sink.write(STEP)
    assert len(read_jsonl(sink.path)) == 2
    sink.close(OUTCOME)


def test_jsonl_survives_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    first = JsonlSink(path)
    first.open(RUN)
    first.write(STEP)
    first.close(OUTCOME)
    path.write_bytes(path.read_bytes()[:-20])
    assert [record["type"] for record in read_jsonl(path)] == ["run", "step"]
    resumed = JsonlSink(path)
    resumed.open(RUN)
    resumed.write(EPOCH)
    resumed.close(OUTCOME)
    types = [record["type"] for record in read_jsonl(path)]
    assert types == ["run", "step", "run", "epoch", "outcome"]


def test_a_file_that_something_else_changed_is_not_read_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    sink = JsonlSink(path)
    sink.open(RUN)
    sink.write(STEP)
    sink.close(OUTCOME)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:15], lines[2]]))
    with pytest.raises(ValueError, match="line 2 of .*log.jsonl' is not JSON although the run went on"):
        read_jsonl(path)


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "log.jsonl", tmp_path):
        with pytest.raises(OSError, match="cannot write the JSONL file .*give a path to a file in a folder"):
            JsonlSink(path)


def test_writing_to_a_jsonl_sink_that_is_not_open_is_explained(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"not open: call open\(\) before write\(\)"):
        JsonlSink(tmp_path / "log.jsonl").write(STEP)


def printed(*reports: Report, style: Any = "words") -> list[str]:
    """The lines that a console sink prints for `reports` (and nothing for the run and the outcome)."""
    stream = io.StringIO()
    sink = ConsoleSink(stream, action_style=style)
    sink.open(RunInfo(streams=RUN.streams, config={}, inventory=""))
    for report in reports:
        sink.write(report)
    sink.close(Outcome({}, (), ""))
    return stream.getvalue().splitlines()


def test_console_prints_an_aligned_table_an_epoch() -> None:
    assert printed(STEP, EPOCH) == [
        "epoch 1 (step 10)",
        "  stream  grad_norm  overfitting_score",
        "  rgb          1.25                  -",
        "  depth         0.5                1.5",
        "  shared          2                  -",
        "  whole model: train_loss 0.4, val_acc 0.75",
        "  ⚠️  Depth overfitting (score: 1.5) [parameter group 'depth': weight_decay -> 0.05]",
    ]


def test_console_counts_what_stands_and_shows_overrides() -> None:
    worse = Finding("⚠️  Depth overfitting (score: 1.9)", **vars(OVERFIT.fields))
    other = Finding("✓ balanced", rule="ratio")
    lines = printed(EPOCH, Report("epoch", 20, 2.0, {}, (worse, other)), style="hydra")
    assert lines[-4:] == [
        "  ⚠️  Depth overfitting (score: 1.5) [optim.streams.depth.weight_decay=0.05]",
        "epoch 2 (step 20)",
        "  ✓ balanced",
        "  (1 unchanged)",
    ]


def test_console_says_an_alarm_at_its_step_and_once() -> None:
    nan = Finding("❌ Rgb: 4 NaN gradients", rule="nonfinite", severity=Severity.error, stream="rgb", rank=2)
    hint = Finding("ℹ️  ratio 1.2", rule="ratio")
    steps = [Report("step", step, None, {}, (nan, hint)) for step in (3, 4)]
    lines = printed(*steps, Report("epoch", 5, None, {}, (nan, hint)))
    assert lines == ["step 3: ❌ Rgb: 4 NaN gradients", "step 5", "  ℹ️  ratio 1.2", "  (1 unchanged)"]


def test_console_prints_inventory_and_summary(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ConsoleSink()
    sink.open(RUN)
    sink.close(OUTCOME)
    assert capsys.readouterr().out == "rgb: 3 tensors\nthe end\n"


def test_console_refuses_an_unknown_style() -> None:
    style: Any = "yaml"
    with pytest.raises(ValueError, match="console action_style must be one of words, hydra, got 'yaml'"):
        ConsoleSink(action_style=style)


def test_sinks_do_not_import_wandb() -> None:
    code = "import sys, ddp_streammon.sinks.wandb; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
