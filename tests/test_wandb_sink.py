"""sinks/wandb.py, against what W&B really writes to disk and sends to a server."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.report import Outcome, Report, RunInfo
from ddp_streammon.rules.finding import Action, Finding
from ddp_streammon.sinks import FanOut, JsonlSink, read_jsonl
from ddp_streammon.sinks import wandb as sink_module
from ddp_streammon.sinks.ledger import COLUMNS
from ddp_streammon.sinks.wandb import STEP_AXIS, WandbSink, active_wandb_run, over_ranks
from tests.fake_wandb import API_KEY, FakeWandb
from tests.ranks import CONTEXT
from tests.read_wandb import OfflineRun, read_run

wandb = pytest.importorskip("wandb")

STREAMS = ("rgb", "depth")
RUN = RunInfo(streams=STREAMS, config={"seed": 1, "optim": {"lr": 0.1}}, inventory="", name="first")
OVERFIT = Finding(
    "⚠️  Depth overfitting (score: 1.5) - increase depth_weight_decay or add dropout somewhere",
    rule="guide.overfit",
    severity=Severity.warning,
    stream="depth",
    evidence={"score": 1.5},
    do="increase it",
    action=Action("weight_decay", "depth", 0.05, 0.02, how="optim.streams.depth.weight_decay=0.05"),
)
HINT = Finding("✓ Gradient ratio balanced (1.15)", rule="guide.ratio")
NONFINITE = Finding("❌ 3 NaN", rule="nonfinite", severity=Severity.error, stream="rgb", rank=1, step=2)


def step(number: int, **values: float) -> Report:
    return Report("step", number, number / 2, {"rgb_grad_norm": number * 0.1, "loss": 1 / number, **values})


def epoch(number: int, *findings: Finding) -> Report:
    values = {"rgb_val_acc": 0.5, "depth_overfitting_score": 1.5, "val_loss": 0.25, "epoch": float(number)}
    return Report("epoch", 2 * number, float(number), values, findings)


OUTCOME = Outcome({"rgb_grad_norm": 0.3, "best_val_acc": 0.5}, (NONFINITE, OVERFIT), "", exit_code=0)


@pytest.fixture(autouse=True)
def a_wandb_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable, folder or service of one test reaches another; nothing leaves this machine."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    yield
    wandb.teardown()


def log_run(sink: WandbSink, *reports: Report) -> None:
    sink.open(RUN)
    for report in reports:
        sink.write(report)
    sink.close(OUTCOME)


def written(path: Path) -> OfflineRun:
    """The run on disk. `finish` may return some milliseconds before the service has written all of it."""
    wandb.teardown()
    return read_run(path)


def same(a: Any, b: Any) -> bool:
    return bool(a == b or (math.isnan(a) and math.isnan(b)))


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """What a history row holds besides the axes and W&B's own columns."""
    return {key: value for key, value in row.items() if not key.startswith("_") and key not in NO_FIGURES}


NO_FIGURES = (STEP_AXIS, keys.EPOCH, keys.VERDICT)


def test_the_offline_file_holds_the_chosen_figures_of_the_jsonl(tmp_path: Path) -> None:
    sink, file = WandbSink(run_id="r1"), JsonlSink(tmp_path / "log.jsonl")
    both = FanOut([file, sink])
    reports = [
        step(1, rgb_to_depth_ratio=math.inf),
        step(2, depth_grad_norm=math.nan, rgb_lr=1e-3, rgb_grad_mean=0.5),
        epoch(1, HINT, OVERFIT),
        step(3, loss=-math.inf),
        epoch(2, HINT, OVERFIT),
        epoch(3),
    ]
    both.open(RUN)
    for report in reports:
        both.write(report)
    both.close(OUTCOME)
    run = written(tmp_path / "wandb")

    logged = [record for record in read_jsonl(file.path) if record["type"] in ("step", "epoch")]
    rows = [row for row in run.history if STEP_AXIS in row]
    assert len(rows) == len(logged) == 6
    for row, record in zip(rows, logged, strict=True):
        assert (row[STEP_AXIS], row[keys.EPOCH]) == (record["step"], record["epoch"])
        shown = {key: keys.wandb_key(key, STREAMS) for key in record["values"] if key != keys.EPOCH}
        values = {shown[key]: record["values"][key] for key in shown if shown[key] is not None}
        assert figures(row).keys() == values.keys()
        assert all(same(row[key], value) for key, value in values.items()), (row, values)
    assert rows[0]["ratio/rgb_to_depth_ratio"] == math.inf and math.isnan(rows[1]["grad_norm/depth"])

    assert (run.run_id, run.name, run.exit_code) == ("r1", "first", 0)
    assert run.config["seed"] == 1 and run.config["streams"] == list(STREAMS)
    assert run.config["optim"] == {"lr": 0.1}
    assert run.summary["grad_norm/rgb"] == 0.3 and run.summary["train/best_val_acc"] == 0.5
    assert run.summary[keys.VERDICT] == "nonfinite: ❌ 3 NaN [1 error, 1 warning]"
    told = [row[keys.VERDICT] for row in rows if keys.VERDICT in row]
    overfit = f"guide.overfit: {OVERFIT.seen}"
    assert told == [f"{overfit} [1 warning]"] * 2 + [f"{overfit} (until step 6) [1 warning]"]
    check_axes(run)
    check_alerts(run)
    check_table(tmp_path)


def check_axes(run: OfflineRun) -> None:
    assert run.axes[STEP_AXIS] == "" and run.axes[keys.EPOCH] == ""
    for name in ("grad_norm/*", "weight_norm/*", "lr/*", "rank/*", "train/loss", "ratio/rgb_to_depth_ratio"):
        assert run.axes[name] == STEP_AXIS, name
    for name in ("overfit/*", "probe/*", "health/*", "train/val_loss"):
        assert run.axes[name] == keys.EPOCH, name


def check_alerts(run: OfflineRun) -> None:
    """One for the finding that stood for two epochs and cleared, one for the outcome's, none for the hint."""
    first, second = run.alerts
    assert first["level"] == "WARN" and len(first["title"]) <= 60
    assert first["title"].startswith("⚠️ Depth overfitting") and first["title"].endswith("...")
    assert first["text"] == f"{OVERFIT}. Do: increase it.\noptim.streams.depth.weight_decay=0.05"
    assert (second["level"], second["title"]) == ("ERROR", "❌ 3 NaN")


def tables(folder: Path, key: str = "findings", columns: tuple[str, ...] = COLUMNS) -> list[list[list[Any]]]:
    """The tables of this key that the only run has logged, in their order."""
    files = folder.glob(f"wandb/offline-run-*/files/media/table/{key}_*.table.json")
    logged = [json.loads(file.read_text()) for file in sorted(files, key=lambda file: int(file.name.split("_")[1]))]
    assert {tuple(table["columns"]) for table in logged} <= {columns}
    return [table["data"] for table in logged]


def test_an_evaluations_estimates_are_a_table_with_their_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that have one, which keys of their own would be too many for; unknown ones are left out."""
    sink = WandbSink()
    sink.open(RUN)
    for number in (1, 2, 3):  # the third table waits for the end
        monkeypatch.setattr(sink_module, "TABLE_SECONDS", 0.0 if number < 3 else 1e9)
        figures = {"rgb_knows": 0.1 * number, "rgb_knows_low": 0.05, "rgb_knows_high": 0.4}
        unknown = dict.fromkeys(("depth_knows", "depth_knows_low", "depth_knows_high"), math.nan)
        whole = epoch(number)
        sink.write(dataclasses.replace(whole, values={**whole.values, **figures, **unknown, "rgb_val_acc": 0.5}))
        sink.write(step(3 * number))  # not again
    sink.close(OUTCOME)
    found = tables(tmp_path, "estimates", ("figure", "value", "low", "high", "step", "epoch"))
    assert found == [[["rgb_knows", 0.1 * number, 0.05, 0.4, epoch(number).step, number]] for number in (1, 2, 3)]


def check_table(folder: Path) -> None:
    """One at the end: this run is over before the first would be written while it is on."""
    override = "optim.streams.depth.weight_decay=0.05"
    (last,) = tables(folder)
    assert last == [
        [2, 6, 1, "info", "guide.ratio", None, None, str(HINT), "", ""],
        [2, 6, 1, "warning", "guide.overfit", "depth", None, str(OVERFIT), "score=1.5", override],
        [2, None, 1, "error", "nonfinite", "rgb", 1, "❌ 3 NaN", "", ""],
    ]


def test_a_run_of_our_own_has_the_name_group_and_tags_that_it_is_given(tmp_path: Path) -> None:
    log_run(WandbSink(name="mine", group="g", tags=("a", "b=c")))
    run = written(tmp_path / "wandb")
    assert (run.name, run.group, run.tags) == ("mine", "g", ["a", "b=c"])


def test_log_every_thins_steps_only(tmp_path: Path) -> None:
    reports = [step(1), step(2), epoch(1), step(3), step(4), epoch(2)]
    log_run(WandbSink(log_every=3, alerts=False), *reports)
    run = written(tmp_path / "wandb")
    assert [row[STEP_AXIS] for row in run.history if STEP_AXIS in row] == [1, 2, 4, 4]
    assert run.alerts == []


def test_what_an_attempt_before_has_shown_is_not_shown_again(tmp_path: Path) -> None:
    """The record of an attempt that was killed at step 3, and of one that began anew and came to step 1."""
    for reports in ((step(1), step(2), epoch(1, HINT, OVERFIT), step(3)), (step(1),)):
        file = JsonlSink(tmp_path / "log.jsonl")
        file.open(RUN)
        for report in reports:
            file.write(report)
    sink = WandbSink(record=file.path)
    log_run(sink, step(1), step(2), epoch(1, HINT, OVERFIT), step(3), step(4), epoch(2, OVERFIT))
    run = written(tmp_path / "wandb")
    assert [row[STEP_AXIS] for row in run.history if STEP_AXIS in row] == [4, 4]
    assert [alert["level"] for alert in run.alerts] == ["ERROR"], "of the outcome's finding, and of nothing known"
    assert [row[:5] for row in tables(tmp_path)[-1]] == [
        [2, 4, 1, "info", "guide.ratio"],
        [2, None, 1, "warning", "guide.overfit"],
        [2, None, 1, "error", "nonfinite"],
    ]


def test_what_an_attempt_before_has_alerted_of_is_not_alerted_soon_again(tmp_path: Path) -> None:
    """A finding that had cleared before the restart, and the last alert of an attempt that has come to its end."""
    file = JsonlSink(tmp_path / "log.jsonl")
    log_run(file, epoch(1, OVERFIT), epoch(2))  # type: ignore[arg-type]
    log_run(WandbSink(record=file.path), epoch(3, OVERFIT, NONFINITE))
    assert written(tmp_path / "wandb").alerts == []
    assert [row[:3] for row in tables(tmp_path)[-1]] == [[2, None, 2], [2, None, 1]]


def test_of_many_ranks_three_numbers_are_shown(tmp_path: Path) -> None:
    norms = {keys.of_rank("rgb", keys.LOCAL_NORM, rank): 1.0 + (rank == 11) for rank in range(16)}
    log_run(WandbSink(), step(1, **norms, depth_local_grad_norm_rank0=math.nan))
    (row,) = (row for row in written(tmp_path / "wandb").history if STEP_AXIS in row)
    ranks = {key: value for key, value in row.items() if key.startswith("rank/")}
    assert ranks == {
        "rank/local_grad_norm_min/rgb": 1.0,
        "rank/local_grad_norm_max/rgb": 2.0,
        "rank/local_grad_norm_loudest/rgb": 11.0,
    }
    assert over_ranks({"rgb_grad_norm": 1.0, "loss_rank0": 2.0}, STREAMS) == {}
    equal = {keys.of_rank("rgb", keys.LOCAL_NORM, rank): 1.0 for rank in (3, 2)}
    assert over_ranks(equal, STREAMS)["rank/local_grad_norm_loudest/rgb"] == 2.0


def test_a_finding_that_comes_and_goes_alerts_once_and_is_one_row_of_a_table_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = WandbSink()
    sink.open(RUN)
    for seconds, reports in ((0.0, [epoch(1, OVERFIT), epoch(2), step(5)]), (60.0, [epoch(3, OVERFIT), epoch(4)])):
        monkeypatch.setattr(sink_module, "TABLE_SECONDS", seconds)
        for report in reports:
            sink.write(report)
    assert [[row[:3] for row in rows] for rows in tables(tmp_path)] == [[[2, None, 1]], [[2, 4, 1]]], "while it is on"
    monkeypatch.setattr(sink_module, "TABLE_SECONDS", 0.0)
    sink.write(step(9))
    sink.close(Outcome({}, (OVERFIT,), ""))
    assert len(written(tmp_path / "wandb").alerts) == 1
    assert [[row[:3] for row in rows] for rows in tables(tmp_path)[2:]] == [[[2, 8, 2]]] * 2


def test_an_active_run_is_logged_into_and_left_to_its_owner(tmp_path: Path) -> None:
    owner = wandb.init(mode="offline", id="theirs", config={"seed": 7}, settings={"console": "off"})
    owner.log({"mine": 1.0})
    sink = WandbSink(run_id="ignored")
    log_run(sink, step(1), epoch(1, OVERFIT))
    assert wandb.run is owner and sink.run_id == "theirs" and "theirs" in sink.location
    owner.log({"mine": 2.0})
    owner.finish()
    run = written(tmp_path / "wandb")
    assert [row["mine"] for row in run.history if "mine" in row] == [1.0, 2.0]
    assert [row["grad_norm/rgb"] for row in run.history if "grad_norm/rgb" in row] == [0.1]
    assert run.config["seed"] == 7 and run.config["streams"] == list(STREAMS)
    assert run.alerts == []


def test_an_active_run_whose_service_does_not_answer_is_left_to_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with wandb.init(mode="offline", settings={"console": "off"}) as owner:
        sink = WandbSink()
        sink.open(RUN)

        def no_answer(*_: Any, **__: Any) -> None:
            raise ConnectionResetError("Connection lost")

        with monkeypatch.context() as gone:
            gone.setattr(owner, "log", no_answer)
            with pytest.raises(ConnectionError):
                sink.write(step(1))
        assert wandb.run is owner
        owner.log({"mine": 1.0})
    assert [row["mine"] for row in written(tmp_path / "wandb").history] == [1.0]


def test_an_active_run_sends_alerts_when_asked(tmp_path: Path) -> None:
    with wandb.init(mode="offline", settings={"console": "off"}):
        log_run(WandbSink(alerts=True), epoch(1, OVERFIT))
    assert [alert["level"] for alert in written(tmp_path / "wandb").alerts] == ["WARN", "ERROR"]


def test_an_owner_who_passes_step_keeps_his_rows_with_join_rows(tmp_path: Path) -> None:
    """Two rows of ours to one of his: W&B's counter would pass his, and W&B would drop them."""
    with wandb.init(mode="offline", settings={"console": "off"}) as owner:
        sink = WandbSink(join_rows=True)
        sink.open(RUN)
        for number in (1, 2, 3):
            owner.log({"mine": float(number)}, step=number)
            sink.write(step(number))
            sink.write(epoch(number))
    rows = [row for row in written(tmp_path / "wandb").history if "mine" in row]
    assert [(row["mine"], row["overfit/val_acc/rgb"]) for row in rows] == [(1.0, 0.5), (2.0, 0.5), (3.0, 0.5)]
    assert [row["grad_norm/rgb"] for row in rows] == pytest.approx([0.1, 0.2, 0.3])


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    sink = WandbSink(mode="disabled", run_id="r1")
    log_run(sink, step(1), epoch(1, OVERFIT))
    assert sink.location == "" and sink.run_id == "r1" and wandb.run is None
    assert not list(tmp_path.rglob("*.wandb"))


def test_resuming_offline_keeps_the_id(tmp_path: Path) -> None:
    first = WandbSink()
    log_run(first, step(1))
    log_run(WandbSink(run_id=first.run_id), step(2))
    runs = [written(file) for file in sorted(tmp_path.rglob("*.wandb"))]
    assert runs and {run.run_id for run in runs} == {first.run_id}
    steps = [row[STEP_AXIS] for run in runs for row in run.history if STEP_AXIS in row]
    assert sorted(steps) == [1, 2]


def test_what_is_asked_to_stop_may_hold_a_lock_which_wandb_cannot_copy() -> None:
    asked = threading.Event()
    sink = WandbSink(on_stop=asked.set)
    sink.open(RUN)
    settings = wandb.run.settings  # a deep copy, which W&B makes where finishing takes too long
    settings.stop_fn()
    sink.close(OUTCOME)
    assert asked.is_set()


def test_online_and_resumed_on_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeWandb() as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        server.stop_requested, asked = True, threading.Event()
        sink = WandbSink(mode="online", project="p", run_id="r1", on_stop=asked.set)
        log_run(sink, step(1), step(2), epoch(1, OVERFIT))
        assert asked.wait(5), "somebody has pressed stop"
        server.stop_requested = False
        run = server.runs["r1"]
        assert run.complete and run.exit_code == 0 and sink.location.endswith("/p/runs/r1")
        assert [row[STEP_AXIS] for row in run.history if STEP_AXIS in row] == [1, 2, 2]
        assert [alert["severity"] for alert in run.alerts] == ["WARN", "ERROR"]
        assert run.config["seed"]["value"] == 1 and run.config["streams"]["value"] == list(STREAMS)
        again = WandbSink(mode="online", project="p", run_id=sink.run_id)
        again.open(RUN)
        again.write(step(3))
        deadline = time.monotonic() + 8  # W&B's own 15 seconds are what a killed attempt would have lost for good
        while not any(row.get(STEP_AXIS) == 3 for row in run.history):
            assert time.monotonic() < deadline, "rows of a run that goes on are not on the server"
            time.sleep(0.1)
        again.close(OUTCOME)
        assert list(server.runs) == ["r1"]
        history = [row for row in run.history if STEP_AXIS in row]
        assert [row[STEP_AXIS] for row in history] == [1, 2, 2, 3]
        assert [row["_step"] for row in history] == sorted({row["_step"] for row in history})
        assert run.summary["grad_norm/rgb"] == 0.3
        wandb.teardown()
        assert server.unknown == []


def _log_until_killed(folder: str, told: Any) -> None:
    """Rows without end; each is told with the time at which `write` had returned."""
    os.environ.update(WANDB_DIR=folder, WANDB_SILENT="true")
    sink = WandbSink(run_id="r1")
    sink.open(RUN)
    for number in range(1, 1_000_000):
        sink.write(step(number))
        told.send((number, time.monotonic()))
        time.sleep(0.02)


ORPHANED = """
import os, signal, time
from ddp_streammon.report import Outcome, Report, RunInfo
from ddp_streammon.sinks import FanOut
from ddp_streammon.sinks.wandb import WandbSink
from tests.faults import service_processes

sink = FanOut([WandbSink()])
sink.open(RunInfo(("rgb",), {}, ""))
sink.write(Report("step", 1, None, {"loss": 1.0}))
assert sink.flush(20)
os.kill(*service_processes(), signal.SIGKILL)
for step in range(2, 50):
    sink.write(Report("step", step, None, {"loss": 1.0}))
    time.sleep(0.02)
sink.close(Outcome({}, (), ""))
"""


def test_a_service_that_is_gone_is_one_warning_and_no_traceback_at_exit(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", ORPHANED], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("WandbSink failed in write (")
    assert line.endswith("): it is off for the rest of this run, all else goes on")


def rows_on_disk(folder: Path) -> int:
    return len([row for row in read_run(folder).history if STEP_AXIS in row])


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_loses_at_most_the_rows_of_its_last_second(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)  # from where the process imports this module
    logged, told = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_log_until_killed, args=(str(tmp_path), told))
    process.start()
    told.close()
    try:
        times = [logged.recv()[1]] if logged.poll(60) else []
        while times and times[-1] - times[0] < 1.6 and logged.poll(10):
            times.append(logged.recv()[1])
        os.kill(process.pid, number)
        killed = time.monotonic()
        process.join(timeout=20)
        assert process.exitcode == -number
    finally:
        process.kill()
        process.join()
    older_than_a_second = len([moment for moment in times if moment < killed - 1])
    assert older_than_a_second > 10
    while rows_on_disk(tmp_path) < older_than_a_second:
        assert time.monotonic() < killed + 1, (rows_on_disk(tmp_path), older_than_a_second)
        time.sleep(0.05)


@pytest.mark.slow
def test_an_offline_run_is_synced_and_shown_by_wandbs_own_commands(tmp_path: Path) -> None:
    log_run(WandbSink(project="p", run_id="r1", group="g"), step(1), step(2), epoch(1, OVERFIT))
    written(tmp_path / "wandb")
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    command = (sys.executable, "-m", "wandb")
    inspect = [*command, "leet", "inspect", "--summary", "--json", str(folder)]
    shown = subprocess.run(inspect, check=True, capture_output=True, text=True, timeout=60).stdout
    assert json.loads(shown)["summary"][keys.VERDICT] == "nonfinite: ❌ 3 NaN [1 error, 1 warning]"
    with FakeWandb() as server:
        variables = {**os.environ, **server.env()}
        subprocess.run([*command, "sync", str(folder)], check=True, env=variables, capture_output=True, timeout=60)
        run = server.runs["r1"]
        assert [row[STEP_AXIS] for row in run.history if STEP_AXIS in row] == [1, 2, 2]
        assert run.summary["grad_norm/rgb"] == 0.3
        assert [alert["severity"] for alert in run.alerts] == ["WARN", "ERROR"]
        assert run.complete and server.unknown == []


@pytest.mark.slow
def test_a_server_that_refuses_costs_a_warning_and_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        start = time.monotonic()
        with caplog.at_level(logging.WARNING, logger="ddp_streammon"):
            log_run(WandbSink(mode="online", run_id="r1"), step(1))
        seconds = time.monotonic() - start
    (record,) = [record for record in caplog.records if record.name == "ddp_streammon"]
    assert "this run is kept offline, upload it later with `wandb sync`" in record.getMessage()
    run = written(next((tmp_path / "wandb").glob("offline-run-*-r1")))
    assert run.run_id == "r1" and [row["train/loss"] for row in run.history if STEP_AXIS in row] == [1.0]
    assert seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [6.0, 3600.0])
def test_a_server_that_turns_slow_or_silent_delays_no_step_and_the_end_by_20_seconds_at_most(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer comes late from the middle of the run on; all rows are on disk whatever the server does."""
    with FakeWandb() as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        sinks = FanOut([WandbSink(mode="online", project="p", run_id="r1")])
        sinks.open(RUN)
        steps: list[float] = []
        for number in range(1, 401):
            if number == 100:
                assert sinks.flush(5)
                server.delay = seconds
            begun = time.monotonic()
            sinks.write(step(number) if number % 20 else epoch(number // 2, OVERFIT))
            steps.append(time.monotonic() - begun)
            time.sleep(0.05)  # 15 s under the slow server: W&B sends what it has every 15 s
        begun = time.monotonic()
        sinks.close(OUTCOME)
        ended = time.monotonic() - begun
        server.delay = 0.0
    assert max(steps[100:]) < 0.5, f"with a server that answers at once it was at most {max(steps[:99])}"
    assert ended < 20.5
    run = written(next((tmp_path / "wandb").glob("run-*-r1")))
    assert [row[STEP_AXIS] for row in run.history if STEP_AXIS in row] == list(range(1, 401))


def test_a_run_of_our_own_is_logged_and_finished_in_a_thread_of_its_own(tmp_path: Path) -> None:
    both = FanOut([WandbSink(run_id="r1")])
    both.open(RUN)
    assert wandb.run is not None
    names = {thread.name for thread in threading.enumerate()}
    both.write(step(1))
    assert {thread.name for thread in threading.enumerate()} - names == {"ddp_streammon WandbSink"}
    both.close(OUTCOME)
    assert wandb.run is None
    run = written(tmp_path / "wandb")
    assert run.exit_code == 0 and [row["train/loss"] for row in run.history if STEP_AXIS in row] == [1.0]


def test_an_active_run_is_logged_into_by_the_owners_thread_only(tmp_path: Path) -> None:
    """Between a row that the owner has begun and the one that he commits, nothing of ours commits."""
    with wandb.init(mode="offline", settings={"console": "off"}) as owner:
        sinks = FanOut([WandbSink(join_rows=True)])
        sinks.open(RUN)
        for number in (1, 2, 3):
            sinks.write(step(number))
            owner.log({"mine": float(number)})
        sinks.close(OUTCOME)
        assert "ddp_streammon WandbSink" not in {thread.name for thread in threading.enumerate()}
    rows = [row for row in written(tmp_path / "wandb").history if "mine" in row]
    assert [(row["mine"], row[STEP_AXIS]) for row in rows] == [(1.0, 1), (2.0, 2), (3.0, 3)]


def test_bad_settings_are_refused_with_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode must be one of auto, disabled, offline, online, got 'onlin'"):
        WandbSink(mode="onlin")
    with pytest.raises(ValueError, match=r"log_every must be at least 1 \(every step report\), got 0"):
        WandbSink(log_every=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="W&B cannot write to the folder .*runs.* as dir=... or in WANDB_DIR"):
        WandbSink(dir=tmp_path / "file" / "runs")


def test_a_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="needs the package wandb: pip install wandb"):
        WandbSink()


def test_a_folder_of_offline_runs_is_not_taken_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ImportError, match="found only the folder .*/wandb: pip install wandb"):
        WandbSink()


def test_auto_is_online_only_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto_mode = sink_module._auto_mode
    assert auto_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert auto_mode() == "online"
    (tmp_path / "netrc").write_text("no netrc at all\n")
    assert auto_mode() == "offline"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    assert auto_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert auto_mode() == "disabled"
    monkeypatch.setenv("WANDB_MODE", "shared")
    with pytest.raises(ValueError, match="WANDB_MODE must be one of disabled, offline, online for mode=auto"):
        WandbSink(mode="auto")


def test_looking_for_an_active_run_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert active_wandb_run() is None
    with wandb.init(mode="offline", settings={"console": "off"}) as run:
        assert active_wandb_run() is run
    monkeypatch.delitem(sys.modules, "wandb")
    assert active_wandb_run() is None and "wandb" not in sys.modules
