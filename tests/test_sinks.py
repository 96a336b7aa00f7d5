"""sinks: the fan-out, the guard, and the sinks that need no service."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from enum import Enum
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from ddp_streammon import MonitorConfig, StreamMonitor
from ddp_streammon.config import RuleSet, Severity
from ddp_streammon.report import Outcome, Report, RunInfo, as_override
from ddp_streammon.rules.finding import Action, Finding
from ddp_streammon.sinks import ConsoleSink, FanOut, Guarded, JsonlSink, MemorySink, guard, read_jsonl
from ddp_streammon.stats import StepStats
from tests.networks import STREAMS, batch, loss_of, network

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


class Threaded(MemorySink):
    """Kept in the thread that a guard gives to a sink of a file or a service."""

    in_callers_thread = False


class Failing(MemorySink):
    """Raises in `write`, and in `close` too, as a client whose service has died does."""

    def __init__(self, in_callers_thread: bool) -> None:
        super().__init__()
        self.in_callers_thread = in_callers_thread
        self.calls: list[str] = []

    def write(self, report: Report) -> None:
        self.calls.append("write")
        raise ConnectionResetError("service gone")

    def close(self, outcome: Outcome) -> None:
        self.calls.append("close")
        raise ConnectionResetError("still gone")


class Blocking(Threaded):
    """Waits in `write` until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def write(self, report: Report) -> None:
        self.released.wait(30)
        super().write(report)


def steps(count: int) -> list[Report]:
    return [Report("step", number, None, {}) for number in range(1, count + 1)]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("in_callers_thread", [True, False])
def test_one_sink_that_fails_is_one_warning_and_no_loss_for_others(
    in_callers_thread: bool, caplog: pytest.LogCaptureFixture
) -> None:
    failing, memory, threaded = Failing(in_callers_thread), MemorySink(), Threaded()
    sinks = FanOut([failing, memory, threaded])
    sinks.open(RUN)
    for report in (STEP, EPOCH, EPOCH):
        sinks.write(report)
        assert sinks.flush(5)
    sinks.close(OUTCOME)
    assert failing.calls == ["write", "close"]
    for sink in (memory, threaded):
        assert sink.run is RUN and sink.reports == [STEP, EPOCH, EPOCH] and sink.outcome is OUTCOME
    (warning,) = warnings_of(caplog)
    assert "Failing failed in write (ConnectionResetError: service gone): it is off" in warning


@pytest.mark.parametrize("in_callers_thread", [True, False])
def test_a_failure_while_closing_is_one_warning(in_callers_thread: bool, caplog: pytest.LogCaptureFixture) -> None:
    Guarded(Failing(in_callers_thread)).close(OUTCOME)
    assert len(warnings_of(caplog)) == 1


def test_a_sink_that_blocks_holds_up_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocking, file = Blocking(), JsonlSink(tmp_path / "log.jsonl")
    sinks = FanOut([blocking, file])
    sinks.open(RUN)
    start = time.monotonic()
    for report in steps(200):
        sinks.write(report)
    assert time.monotonic() - start < 1
    assert sinks.sinks[1].flush(5) and len(read_jsonl(file.path)) == 201
    assert not sinks.flush(0.05)
    assert blocking.reports == []
    blocking.released.set()
    sinks.close(OUTCOME)
    assert blocking.reports == steps(200) and blocking.outcome is OUTCOME
    assert warnings_of(caplog) == []


def test_what_a_slow_sink_cannot_take_is_dropped_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard, "QUEUE_LENGTH", 5)
    slow = Blocking()
    guarded = Guarded(slow)
    guarded.open(RUN)
    for report in steps(20):
        guarded.write(report)
    slow.released.set()
    guarded.close(OUTCOME)
    written = [report.step for report in slow.reports]
    assert written == list(range(1, len(written) + 1)) and len(written) in (5, 6)  # one may be in the sink's hands
    assert slow.outcome is OUTCOME
    assert warnings_of(caplog) == [f"Blocking was too slow: {20 - len(written)} of 20 reports are not written"]


def test_sinks_that_never_end_are_left_behind_together(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard, "CLOSE_SECONDS", 1.0)
    stuck, well = [Blocking(), Blocking()], Threaded()
    sinks = FanOut([*stuck, well])
    sinks.open(RUN)
    for report in steps(3):
        sinks.write(report)
    start = time.monotonic()
    sinks.close(OUTCOME)
    assert 1 <= time.monotonic() - start < 1.9
    assert well.outcome is OUTCOME
    warning = "Blocking did not end within 1 s and is left behind: 3 of 3 reports are not written"
    assert warnings_of(caplog) == [warning, warning]
    for sink in stuck:
        sink.released.set()


def test_a_user_who_interrupts_is_obeyed() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

    class Interrupted(MemorySink):
        def write(self, report: Report) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guarded(Interrupted()).write(STEP)
    blocking = Blocking()
    guarded = Guarded(blocking)
    guarded.open(RUN)
    guarded.write(STEP)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        guarded.close(OUTCOME)
    signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 5
    blocking.released.set()


def test_sigterm_waits_until_sinks_are_closed() -> None:
    """torchrun sends it to rank 0 when another rank has died, just as rank 0 ends its records."""
    events: list[str] = []

    class Slow(Threaded):
        def close(self, outcome: Outcome) -> None:
            time.sleep(0.3)
            events.append("closed")

    before = signal.signal(signal.SIGTERM, lambda *_: events.append("sigterm"))
    try:
        sinks = FanOut([Slow()])
        sinks.open(RUN)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        sinks.close(OUTCOME)
        assert events == ["closed", "sigterm"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_closing_in_another_thread_sets_no_signal() -> None:
    sink = Threaded()
    guarded = Guarded(sink)
    guarded.open(RUN)
    thread = threading.Thread(target=guarded.close, args=(OUTCOME,))
    thread.start()
    thread.join(timeout=5)
    assert sink.outcome is OUTCOME


def script(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own that has the names of this module."""
    root = Path(__file__).resolve().parent.parent
    header = "import os, sys, time\nfrom tests.test_sinks import *\n"
    return subprocess.run(
        [sys.executable, "-c", header + textwrap.dedent(code)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_process_ends_although_nobody_closed_its_sinks(tmp_path: Path) -> None:
    """One sink blocks for an hour. Timed inside, since a loaded machine takes seconds to take an interpreter down."""
    done = script(
        """
        import atexit

        class Slow(JsonlSink):
            def write(self, report):
                time.sleep(0.05)
                super().write(report)

        class Hour(Threaded):
            def write(self, report):
                time.sleep(3600)

        atexit.register(lambda: print(time.monotonic() - ended, flush=True))  # called after those that come later
        sinks = FanOut([Slow("log.jsonl"), Hour()])
        sinks.open(RUN)
        for report in steps(5):
            sinks.write(report)
        ended = time.monotonic()
        """,
        tmp_path,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert 1 <= float(done.stdout) < guard.CLOSE_SECONDS
    assert [record["step"] for record in read_jsonl(tmp_path / "log.jsonl")] == [None, 1, 2, 3, 4, 5]


def test_forked_processes_write_nothing_twice_and_end(tmp_path: Path) -> None:
    done = script(
        """
        import gc

        gc.freeze()  # or each process looks at all that torch is made of as it ends
        sinks = FanOut([JsonlSink("log.jsonl")])
        sinks.open(RUN)
        for number, report in enumerate(steps(200)):
            sinks.write(report)
            if number % 50 == 0 and os.fork() == 0:
                sys.exit(0)
        sinks.close(OUTCOME)
        assert {os.wait()[1] for _ in range(4)} == {0}
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in read_jsonl(tmp_path / "log.jsonl")] == [None, *range(1, 201), None]


def test_a_full_disk_is_a_warning_also_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    memory = MemorySink()
    sinks = FanOut([JsonlSink("/dev/full"), memory])
    sinks.open(RUN)
    sinks.write(STEP)
    sinks.close(OUTCOME)
    (warning,) = warnings_of(caplog)
    assert "JsonlSink failed in open (OSError: [Errno 28] No space left on device): it is off" in warning
    assert memory.reports == [STEP] and memory.outcome is OUTCOME


def test_a_file_that_cannot_grow_is_one_warning_and_stays_readable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = FanOut([JsonlSink(tmp_path / "log.jsonl")])
    sinks.open(RUN)
    sinks.write(STEP)
    assert sinks.flush(5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "log.jsonl").stat().st_size + 20, limits[1]))
    try:
        for report in (STEP, EPOCH):
            sinks.write(report)
        sinks.close(OUTCOME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (warning,) = warnings_of(caplog)
    assert "JsonlSink failed in write (OSError: [Errno 27] File too large): it is off" in warning
    assert [record["type"] for record in read_jsonl(tmp_path / "log.jsonl")] == ["run", "step"]


@pytest.mark.parametrize("error", [ValueError("no such project"), PermissionError(errno.EACCES, "no such project")])
def test_a_sink_that_cannot_open_is_heard_before_training(error: Exception) -> None:
    class Closed(MemorySink):
        def open(self, run: RunInfo) -> None:
            raise error

    with pytest.raises(type(error), match="no such project"):
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


@pytest.mark.parametrize("rules", list(RuleSet))
def test_jsonl_gives_back_what_the_rules_saw(rules: RuleSet, tmp_path: Path) -> None:
    model, memory = network(), MemorySink()
    sinks = [JsonlSink(tmp_path / "log.jsonl"), memory]
    with StreamMonitor(model, streams=STREAMS, sinks=sinks, config=MonitorConfig(rules=rules)) as monitor:
        for _ in range(2):
            loss_of(model, batch()).backward()
            monitor.step(loss=0.5)
    measured = [StepStats.from_dict(r["measured"]) for r in read_jsonl(sinks[0].path) if r["type"] == "step"]
    assert repr(measured) == repr([report.stats for report in memory.reports if report.kind == "step"])
    assert len(measured) == 2 and (measured[0].streams["rgb"].sample is not None) == (rules is RuleSet.evidence)


class Mode(Enum):
    fast = "quick"


def test_jsonl_writes_what_json_has_no_type_for_as_its_value_or_its_text(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "log.jsonl")
    sink.open(
        RunInfo(streams=(), config={"mode": Mode.fast, "names": frozenset({"a"}), "rank": {0: tmp_path}}, inventory="")
    )
    (run,) = read_jsonl(sink.path)
    assert run["config"] == {"mode": "quick", "names": ["a"], "rank": {"0": str(tmp_path)}}


class InParts(FileIO):
    """A file that takes a few bytes at a time, as one may that is interrupted by signals."""

    def write(self, data: Any) -> int:
        return super().write(data[:7])


def test_jsonl_writes_whole_lines_where_a_file_takes_them_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddp_streammon.sinks.jsonl.FileIO", InParts)
    sink = JsonlSink(tmp_path / "log.jsonl")
    sink.open(RUN)
    sink.write(EPOCH)
    assert read_jsonl(sink.path)[1]["values"] == dict(EPOCH.values)


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


def attempt(path: Path, numbers: list[int], resume_step: int | None) -> None:
    """A run that goes on at `resume_step`, writes these steps and is killed."""
    sink = JsonlSink(path, resume_step)
    sink.open(RUN)
    for number in numbers:
        sink.write(Report("step", number, None, {}))
        if number % 2 == 0:
            sink.write(Report("epoch", number, number / 2, {}))


def test_what_a_resumed_run_writes_again_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    attempt(path, [1, 2, 3, 4, 5], resume_step=0)
    path.write_bytes(path.read_bytes()[:-10])
    attempt(path, [3, 4, 5], resume_step=2)
    attempt(path, [5, 6], resume_step=4)
    records = read_jsonl(path)
    kinds = [(record["type"], record["step"], record["attempt"]) for record in records]
    assert [kind for kind in kinds if kind[0] == "run"] == [("run", None, 0), ("run", None, 1), ("run", None, 2)]
    assert [kind for kind in kinds if kind[0] == "step"] == [
        *(("step", 1, 0), ("step", 2, 0), ("step", 3, 1), ("step", 4, 1), ("step", 5, 2), ("step", 6, 2)),
    ]
    assert [kind for kind in kinds if kind[0] == "epoch"] == [("epoch", 2, 0), ("epoch", 4, 1), ("epoch", 6, 2)]
    first, second = (read_jsonl(tmp_path / f"log.jsonl.attempt-{number}") for number in (0, 1))
    assert [(record["step"], record["attempt"]) for record in first] == [(3, 0), (4, 0), (4, 0)]  # 5 was torn
    assert [(record["step"], record["attempt"]) for record in second] == [(5, 1)]


def test_a_torn_line_is_set_aside_and_nothing_else_if_nothing_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    attempt(path, [1, 2], resume_step=None)
    whole = path.read_bytes()
    attempt(path, [], resume_step=2)
    assert path.read_bytes().startswith(whole) and not list(tmp_path.glob("*.attempt-*"))
    torn = path.read_bytes() + b'{"type": "step", "st'
    path.write_bytes(torn)
    attempt(path, [3], resume_step=2)
    assert (tmp_path / "log.jsonl.attempt-1").read_bytes() == b'{"type": "step", "st'
    assert [record["step"] for record in read_jsonl(path) if record["type"] == "step"] == [1, 2, 3]


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


def printed(*reports: Report) -> list[str]:
    """The lines that a console sink prints for `reports` (and nothing for the run and the outcome)."""
    stream = io.StringIO()
    sink = ConsoleSink(stream)
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
    first = OVERFIT.worded(as_override)
    worse = Finding("⚠️  Depth overfitting (score: 1.9)", **vars(first.fields))
    other = Finding("✓ balanced", rule="ratio")
    lines = printed(Report("epoch", 10, 1.0, {}, (first,)), Report("epoch", 20, 2.0, {}, (worse, other)))
    assert lines[-4:] == [
        "  ⚠️  Depth overfitting (score: 1.5) [optim.streams.depth.weight_decay=0.05]",
        "epoch 2 (step 20)",
        "  ✓ balanced",
        "  (1 unchanged)",
    ]


def test_console_counts_neither_what_it_has_just_said_nor_that_nothing_was_found() -> None:
    clear = Finding("no alarm from 24 rules", rule="OK")
    found = Report("epoch", 10, 1.0, {"rgb_val_uses": 0.5}, (clear, OVERFIT))
    assert len(printed(found, Report("epoch", 10, 1.0, {}, (clear, OVERFIT)))) == len(printed(found))
    later = Report("epoch", 20, 2.0, {}, (clear, OVERFIT))
    assert printed(found, later)[-2:] == ["epoch 2 (step 20)", "  (1 unchanged)"]


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
