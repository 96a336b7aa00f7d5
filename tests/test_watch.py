"""watch: the first of the three lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import wandb
from torch import nn

import ddp_streammon as streammon
from ddp_streammon.sinks import MemorySink
from tests.ranks import run_ranks
from tests.read_wandb import read_run


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"rgb": nn.Linear(4, 2), "depth": nn.Linear(3, 2)})


def trained(net: nn.Module) -> None:
    inputs = {"rgb": torch.ones(5, 4), "depth": torch.ones(5, 3)}
    sum(net[name](x).square().mean() for name, x in inputs.items()).backward()  # type: ignore[index,union-attr]


def test_it_prints_the_streams(capsys: pytest.CaptureFixture[str]) -> None:
    net = model()
    streammon.watch(net, torch.optim.SGD(net.parameters(), 0.1))
    header, rgb, depth = capsys.readouterr().out.splitlines()
    assert header.split() == ["stream", "tensors", "parameters", "trainable", "lr", "weight", "decay", "dtype"]
    assert rgb.split() == ["rgb", "2", "10", "10", "0.1", "0", "float32"]
    assert depth.split()[0] == "depth"


def test_an_alarm_is_printed_when_it_is_raised_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    net = model()
    monitor = streammon.watch(net, torch.optim.SGD(net.parameters(), 0.1))
    capsys.readouterr()
    for number in range(3):
        trained(net)
        if number:
            net["depth"].weight.grad[0, 0] = float("nan")  # type: ignore[index,union-attr]
        monitor.step(loss=0.5, samples=5)
    monitor.flush()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 2: ") and "gradients of depth: not finite" in line
    monitor.close()
    assert capsys.readouterr().out == ""


def test_an_active_wandb_run_is_logged_into_and_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # of an earlier test, and gone
    with wandb.init(mode="offline", dir=str(tmp_path)) as run:
        net = model()
        monitor = streammon.watch(net)
        trained(net)
        figures = monitor.step(loss=0.5, samples=5)
        monitor.close()
        assert wandb.run is run
    wandb.teardown()
    (row,) = (row for row in read_run(tmp_path).history if "trainer/step" in row)
    assert row["trainer/step"] == 1
    assert row["train/loss"] == 0.5
    assert row["grad_norm/rgb"] == figures["rgb_grad_norm"] > 0


def _reports() -> tuple[int, int]:
    net = model()
    sink = MemorySink()
    monitor = streammon.watch(net, sinks=[sink])
    trained(net)
    monitor.step(loss=1.0)
    monitor.close()
    return len(sink.reports), len(monitor.history["loss"])


def test_rank_0_alone_reports_and_every_rank_remembers() -> None:
    assert run_ranks(2, _reports) == [(1, 1), (0, 1)]


def _refused() -> str:
    class Closed(MemorySink):
        def open(self, run: object) -> None:
            raise OSError("the disk is full")

    with pytest.raises((OSError, RuntimeError)) as caught:
        streammon.watch(model(), sinks=[Closed()])
    return str(caught.value)


def test_a_sink_that_cannot_be_opened_on_rank_0_is_an_error_on_every_rank() -> None:
    assert run_ranks(2, _refused) == [
        "the disk is full",
        "a sink could not be opened on rank 0: OSError: the disk is full",
    ]
