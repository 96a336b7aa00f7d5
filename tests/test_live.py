"""The panel in the terminal: what it shows at which width, and that no terminal breaks a job."""

from __future__ import annotations

import io
import logging
import math
import os
import pty
import select
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ddp_streammon.report import Report
from ddp_streammon.rules.finding import Finding
from ddp_streammon.sinks import ConsoleSink, Guarded, LiveSink, live, terminal_sink
from ddp_streammon.sinks.live import BARS, FINDINGS, State, panel, sparkline
from tests.test_sinks import EPOCH, OUTCOME, OVERFIT, RUN

ROOT = Path(__file__).resolve().parent.parent
rich_console = pytest.importorskip("rich.console")


class Terminal(io.StringIO):
    """A terminal that keeps what is written to it."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def a_state(steps: int = 100, streams: tuple[str, ...] = ("rgb", "depth")) -> State:
    state = State(streams, "a run")
    for step in range(1, steps + 1):
        falls = {f"{name}_grad_norm": 2.0 / step for name in streams}
        rises = {f"{name}_val_acc": step / steps for name in streams}
        state.take(Report("step", step, step / 50, {**falls, **rises, "rgb_grad_share": 0.75, "loss": 1 / step}))
    state.take(EPOCH)
    return state


def drawn(state: State, width: int) -> list[str]:
    """The panel's lines without colours."""
    out = io.StringIO()
    rich_console.Console(file=out, width=width, color_system=None, legacy_windows=False).print(panel(state, width))
    return out.getvalue().splitlines()


def test_a_sparkline_is_the_course_of_values() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == BARS
    assert sparkline(list(range(80)), 8) == BARS
    assert sparkline([10.0**number for number in range(8)], 8) == BARS, "positive and of many sizes: logarithmic"
    assert sparkline([1.0, 1.0], 12) == "▄▄"
    assert sparkline([], 12) == ""


def test_the_panel_shows_streams_figures_courses_and_findings() -> None:
    lines = drawn(a_state(), 100)
    assert {len(line) for line in lines} == {100}
    assert lines[0].startswith("╭─ a run ─")
    whole, head, rgb, depth, shared, finding = (line.strip("│ ") for line in lines[1:-1])
    assert whole.startswith("step 10  epoch 1  loss 0.01 █")
    assert whole.endswith("val acc 0.75")
    assert head.split() == ["stream", "gradient", "val", "acc", "share"]
    assert rgb.split()[:2] == ["rgb", "1.25"] and rgb.split()[-1] == "0.75"
    assert depth.split()[:2] == ["depth", "0.5"] and depth.split()[-1] == "-", "what was not measured is a dash"
    assert rgb.split()[2][0] == "█" and rgb.split()[4][0] == "▁", "gradients fall and accuracies rise"
    assert shared.split()[:2] == ["shared", "2"]
    assert finding == "overfit depth: Depth overfitting (score: 1.5)"


@pytest.mark.parametrize("width", [8, 20, 40, 60, 79, 200])
def test_the_panel_fits_any_width(width: int) -> None:
    lines = drawn(a_state(streams=("rgb", "a_stream_of_a_very_long_name")), width)
    assert max(map(len, lines)) <= width
    if width >= 40:
        assert any("rgb" in line and "1.25" in line for line in lines)


def test_many_streams_and_findings_are_told_in_few_lines() -> None:
    state = a_state(streams=tuple(f"s{number}" for number in range(40)))
    state.of_step = (OVERFIT,) * 20
    lines = drawn(state, 80)
    assert sum("overfit" in line for line in lines) == FINDINGS
    assert any("and 30 more streams" in line for line in lines)
    assert len(lines) < 24


def test_a_finding_that_is_cleared_leaves_the_panel() -> None:
    state = State(("rgb",))
    state.take(Report("step", 1, None, {}, findings=(OVERFIT,)))
    state.take(Report("epoch", 1, 1.0, {}, findings=(OVERFIT,)))
    assert sum("overfit" in line for line in drawn(state, 60)) == 1
    state.take(Report("step", 2, None, {}))
    assert not any("overfit" in line for line in drawn(state, 60))


def test_that_nothing_was_found_is_not_said_beside_an_alarm() -> None:
    state = State(("rgb",))
    state.take(Report("epoch", 1, 1.0, {}, findings=(Finding("no alarm from 9 rules", rule="OK"),)))
    assert any("no alarm from 9 rules" in line for line in drawn(state, 60))
    state.take(Report("step", 2, None, {}, findings=(OVERFIT,)))
    assert not any("no alarm" in line for line in drawn(state, 60))


def test_a_million_steps_are_kept_in_bounded_memory() -> None:
    state = State(("rgb",))
    for step in range(10_000):
        state.take(Report("step", step, None, {"rgb_grad_norm": math.nan if step == 5 else 1.0 + step}))
    assert len(state.course("rgb_grad_norm")) <= live.POINTS
    assert state.last("rgb_grad_norm") == 10_000.0


def test_it_is_drawn_a_few_times_a_second_at_most() -> None:
    seconds = iter(range(10_000))
    terminal = Terminal()
    sink = LiveSink(terminal, clock=lambda: next(seconds) / 25)
    sink.open(RUN)
    for step in range(100):
        sink.write(Report("step", step, None, {"loss": 1.0}))
    drawings = terminal.getvalue().count("╭")
    assert 2 <= drawings <= 6
    sink.close(OUTCOME)
    assert terminal.getvalue().count("╭") > drawings
    assert "step 99" in terminal.getvalue()
    assert terminal.getvalue().rstrip().endswith("the end")


def test_findings_are_printed_once_above_the_panel_with_what_to_set() -> None:
    terminal = Terminal()
    sink = LiveSink(terminal)
    sink.open(RUN)
    for _ in range(3):
        sink.write(EPOCH)
    sink.close(OUTCOME)
    assert terminal.getvalue().count("[parameter group 'depth': weight_decay -> 0.05]") == 1
    assert "\x1b[?25h" in terminal.getvalue(), "the cursor is shown"
    assert terminal.getvalue().rindex("\x1b[?25l") < terminal.getvalue().index("\x1b[?25h"), "and never left hidden"


def test_no_colour_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    sink = LiveSink(terminal)
    sink.open(RUN)
    sink.write(EPOCH)
    sink.close(OUTCOME)
    assert "overfit" in terminal.getvalue()
    assert "\x1b[3" not in terminal.getvalue() and "\x1b[9" not in terminal.getvalue()


@pytest.mark.parametrize("fails_from", [0, 2])
def test_a_terminal_that_goes_away_is_one_warning(fails_from: int, caplog: pytest.LogCaptureFixture) -> None:
    class Gone(Terminal):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            if self.writes > fails_from:
                raise OSError(5, "Input/output error")
            return super().write(text)

    guarded = Guarded(LiveSink(Gone()))
    before = sys.stdout, sys.stderr
    guarded.open(RUN)
    for _ in range(3):
        guarded.write(EPOCH)
        assert guarded.flush(5)
    guarded.close(OUTCOME)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "LiveSink failed in write (OSError: [Errno 5] Input/output error): it is off" in warning
    assert (sys.stdout, sys.stderr) == before


def test_where_no_panel_can_be_drawn_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert live.fits(Terminal())
    assert not live.fits(io.StringIO())
    ascii_only = Terminal()
    ascii_only.encoding = "ascii"
    assert not live.fits(ascii_only)
    closed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    closed.close()
    assert not live.fits(closed)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert isinstance(terminal_sink(), LiveSink)
    monkeypatch.setenv("TERM", "dumb")
    assert not live.fits(Terminal())
    assert type(terminal_sink()) is ConsoleSink
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(live.importlib.util, "find_spec", lambda name: None)
    assert not live.fits(Terminal())


# A real terminal --------------------------------------------------------------------------------------------------


def in_a_terminal(*command: str, folder: Path, gone_after: str | None = None) -> tuple[int, str]:
    """Exit code and output of a command in a pseudo-terminal, which goes away once it has shown `gone_after`."""
    ours, theirs = pty.openpty()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {
        **os.environ,
        "TERM": "xterm",
        "COLUMNS": "90",
        "LINES": "40",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=variables, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said, deadline = b"", time.monotonic() + 120
    try:
        while time.monotonic() < deadline and (gone_after is None or gone_after.encode() not in said):
            if not select.select([ours], [], [], 0.2)[0]:
                continue
            try:
                part = os.read(ours, 65536)
            except OSError:  # all of its ends are closed
                break
            said += part
        os.close(ours)
        code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
    finally:
        process.kill()
        process.wait()
    return code, said.decode(errors="replace")


@pytest.mark.slow
def test_the_application_shows_the_panel_in_a_terminal(tmp_path: Path) -> None:
    overrides = ("model=multi_mlp", "model.hidden=[16,8]", "trainer.epochs=2", "sinks.wandb.enabled=false")
    code, said = in_a_terminal("-m", "ddp_streammon.train", *overrides, "optim.lr=1e-3", folder=tmp_path)
    assert code == 0, said
    assert said.count("╭─") > 2 and "gradient" in said and "▁" in said
    assert "epoch 1/2:" not in said, "no bar beside the panel"
    last = said.rindex("╰")
    assert "Stream Monitoring Summary" in said[last:] and "Where to look:" in said[last:]


LOOP = """
import os, sys, time
import torch
from torch import nn
import ddp_streammon as streammon
from ddp_streammon.sinks import LiveSink

model = nn.ModuleDict({"stream1": nn.Linear(4, 2), "stream2": nn.Linear(4, 2)})
optimizer = torch.optim.SGD(model.parameters(), 0.1)
plain = type(sys.stdout)
monitor = streammon.watch(model, optimizer, sinks=[LiveSink()])
child = os.fork()
if child == 0:
    os._exit(0 if type(sys.stdout) is plain and type(sys.stderr) is plain else 7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert type(sys.stdout) is not plain
for number in range(int(sys.argv[1])):
    loss = sum(stream(torch.randn(8, 4)).square().mean() for stream in model.values())
    optimizer.zero_grad()
    loss.backward()
    monitor.step(loss=loss, samples=8)
    optimizer.step()
    time.sleep(0.02)
    if number == 10:
        monitor.flush()
        print("a line of the loop's own")
monitor.close()
open("done", "w").write(str(monitor.calls))
"""


def test_a_loop_prints_above_the_panel_and_outlives_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(textwrap.dedent(LOOP))
    code, said = in_a_terminal("loop.py", "60", folder=tmp_path, gone_after="a line of the loop's own")
    assert code == 0
    assert (tmp_path / "done").read_text() == "60"
    own = said.index("a line of the loop's own")
    assert "╭─" in said[:own]
    assert "step" in said[:own]
