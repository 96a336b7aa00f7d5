"""Replay says of a recorded run what was said while it ran; preflight says what will not train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import Intent, MonitorConfig, RuleSet, StreamMonitor
from ddp_streammon.replay import Event, main, replay
from ddp_streammon.sinks import JsonlSink
from ddp_streammon.sinks.jsonl import read_jsonl
from ddp_streammon.version import __version__
from tests.networks import STREAMS, batch, network
from tests.ranks import run_ranks

FAULTS = ("none", "frozen", "absent", "alone", "same data", "zero rate", "no zero_grad", "empty", "eval")


def train(
    fault: str, folder: str | None = None, steps: int = 8, until: int = 1000
) -> tuple[list[tuple[str, str | None]], str]:
    """Train with a fault, which may end (an empty input); (rule, stream) of the preflight's findings, and its text."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    net = network(norm=True)
    if fault == "frozen":
        net.rgb.requires_grad_(False)
    model: nn.Module = DistributedDataParallel(net) if dist.is_initialized() else net
    of_streams = {name: list(getattr(net, name).parameters()) for name in STREAMS}
    rest = [p for p in net.parameters() if all(p is not q for of in of_streams.values() for q in of)]
    groups = [{"params": [p for p in of if p.requires_grad], "lr": 0.1} for of in (*of_streams.values(), rest)]
    if fault == "absent":
        groups.pop(0)
    if fault == "zero rate":
        groups[0]["lr"] = 0.0
    optimizer = torch.optim.SGD([group for group in groups if group["params"]], momentum=0.9)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    sinks = [JsonlSink(Path(folder) / "metrics.jsonl")] if folder else []
    intent = Intent(frozen=(), classes=3, total_steps=100)
    monitor = StreamMonitor(model, optimizer, STREAMS, config=MonitorConfig(intent=intent), sinks=sinks)
    torch.manual_seed(0 if fault == "same data" else rank)
    for step in range(steps):
        model.train(fault != "eval")
        rgb, depth, target = batch(8)
        rgb, depth = torch.randn_like(rgb), torch.randn_like(depth)
        if fault == "empty" and 2 <= step < until:
            rgb = torch.zeros_like(rgb)
        if fault != "no zero_grad":
            optimizer.zero_grad()
        loss = cross_entropy((net if fault == "alone" else model)(rgb, depth), target % 3)
        loss.backward()
        monitor.step(loss=loss, samples=len(target))
        optimizer.step()
    said = monitor.preflight()
    monitor.close()
    assert said.ok == (fault == "none" or steps > until)
    return [(finding.rule, finding.stream) for finding in said.findings if not finding.explained_by], str(said)


EXPECTED = {
    "none": [],
    "frozen": [("FRZ", "rgb")],
    "absent": [("OPT", "rgb")],
    "alone": [("SYNC", None)],
    "same data": [("SAME", None)],
    "zero rate": [("LR0", "rgb")],
    "no zero_grad": [("ZGR", None)],
    "empty": [("INZ", "rgb")],
    "eval": [("EVAL", None)],
}


def _all_faults() -> dict[str, tuple[list[tuple[str, str | None]], str]]:
    return {fault: train(fault) for fault in FAULTS}


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_preflight_says_what_will_not_train(world: int) -> None:
    first, *others = run_ranks(world, _all_faults)
    assert {fault: findings for fault, (findings, _) in first.items()} == EXPECTED
    assert all(other == first for other in others)
    assert first["none"][1].splitlines()[0] == "preflight after 8 measured steps:"
    assert "no alarm from" in first["none"][1]
    assert "1 alarm from" in first["frozen"][1]
    assert "Do: call requires_grad_(True) on rgb" in first["frozen"][1]


def test_a_preflight_of_one_process_leaves_out_what_needs_ranks() -> None:
    findings, text = train("absent")
    assert findings == [("OPT", "rgb")]
    assert "SAME" in text and "one rank sees all data" in text
    monitor = StreamMonitor(network(), None, STREAMS, config=MonitorConfig(rules=RuleSet.off))
    with pytest.raises(ValueError, match="a preflight needs rules=evidence, the monitor has rules=off"):
        monitor.preflight()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("run")
    train("empty", str(folder), steps=12)
    yield folder


def test_a_replay_says_what_was_said_and_when(recorded: Path) -> None:
    records = read_jsonl(recorded / "metrics.jsonl")
    *events, rest = replay(records)
    raised = [(event.step, event.finding.rule, event.finding.stream) for event in events if isinstance(event, Event)]
    live = {(record["step"], f["rule"], f["stream"]) for record in records[1:-1] for f in record["findings"]}
    assert (6, "INZ", "rgb") in raised
    assert set(raised) <= live
    assert {finding[1:] for finding in live} == {finding[1:] for finding in raised}
    assert "alarm" in str(rest) and "not evaluated" in str(rest)


def test_a_replay_takes_other_thresholds_and_mutes(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(recorded), "INZ.hold=8"])
    assert "step 10: error INZ: " in capsys.readouterr().out
    main([str(recorded / "metrics.jsonl"), "INZ.hold=8"])
    assert "step 10: error INZ: " in capsys.readouterr().out
    main([str(recorded), "mute=INZ"])
    assert "INZ" not in capsys.readouterr().out
    main([str(recorded), "rules=guide"])
    assert capsys.readouterr().out == ""


def test_the_guides_sentences_are_replayed_at_the_epochs_at_which_they_are_news() -> None:
    records: list[dict[str, Any]] = [{"type": "run", "streams": list(STREAMS)}]
    for epoch, score in enumerate([0.2, 1.5, 1.5, 0.2, 1.5], start=1):
        norms = dict.fromkeys(("rgb_grad_norm", "depth_grad_norm"), 1.0)
        records.append({"type": "step", "step": 10 * epoch - 1, "epoch": None, "values": norms})
        scores = {"rgb_overfitting_score": score, "depth_overfitting_score": 0.2}
        records.append({"type": "epoch", "step": 10 * epoch, "epoch": float(epoch), "values": scores})
    events = [event for event in replay(records, rules=RuleSet.guide) if isinstance(event, Event)]
    overfits = [(step, rule) for step in (20, 50) for rule in ("S-OF", "S-OR")]
    assert [(event.step, event.finding.rule) for event in events] == [(10, "S-GR"), *overfits]
    assert all(event.raised for event in events)


def test_a_replay_says_when_a_finding_is_over(tmp_path: Path) -> None:
    train("empty", str(tmp_path), steps=24, until=10)
    events = [event for event in replay(read_jsonl(tmp_path / "metrics.jsonl")) if isinstance(event, Event)]
    raised, over = (event for event in events if event.finding.rule == "INZ")
    assert raised.raised and not over.raised and raised.step < 12 <= over.step
    assert str(over) == f"step {over.step}: INZ is over: {over.finding.seen}"


def test_what_cannot_be_replayed_is_said(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no rule 'INX'; nearest: IN"):
        main([str(recorded), "mute=INX"])
    with pytest.raises(SystemExit, match="cannot replay .*No such file"):
        main([str(tmp_path)])
    monitor = StreamMonitor(
        network(), None, STREAMS, config=MonitorConfig(rules=RuleSet.off), sinks=[JsonlSink(tmp_path / "metrics.jsonl")]
    )
    monitor.close()
    with pytest.raises(SystemExit, match="recorded without rules=evidence"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match="RUN_DIR"):
        main([])


@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_who_asks_for_help_gets_it_without_an_error(asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([asked])
    assert "RUN_DIR" in capsys.readouterr().out


def test_the_command_reads_its_own_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["streammon-replay", "--version"])
    main()
    assert capsys.readouterr().out == f"{__version__}\n"
