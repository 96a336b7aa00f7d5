"""The benchmarks' commands run, and their tables mean what they say; what they time is not tested."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable

import pytest
import torch

from ddp_streammon.rules import evidence
from tests.benchmarks import (
    better,
    coverage,
    growth,
    machine,
    main_job,
    peers,
    replay,
    rules,
    soak,
    statistics,
    whole_step,
)
from tests.benchmarks.counting import counts, dispatched
from tests.benchmarks.gradients import PIXELS, Gradients, gradient_bytes, two_streams
from tests.benchmarks.timing import Alternation, Ratio, Timer, interval, median, table

CPU = torch.device("cpu")
Run = Callable[..., str]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Run:
    """What a command prints."""

    def run(main: Callable[[list[str]], None], *arguments: str) -> str:
        main(list(arguments))
        return capsys.readouterr().out

    return run


def rows(text: str, first: str) -> dict[str, dict[str, str]]:
    """The table whose header begins with `first`: row -> column -> cell."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"{first}  "))
    header = re.split(r"\s{2,}", lines[start].strip())
    found = {}
    for line in lines[start + 1 :]:
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) != len(header):
            break
        found[cells[0]] = dict(zip(header, cells, strict=True))
    return found


# The commands ------------------------------------------------------------------------------------------------------


def test_statistics_prints_every_method_with_its_counts(printed: Run) -> None:
    text = printed(statistics.main, "--model", "small", "--repeats", "2", "--ceiling-mb", "1")
    model = two_streams("small", CPU)
    tensors = len(list(model.parameters()))
    assert f"torch {torch.__version__}" in text
    assert f"two small streams, float32: {tensors} tensors, 0.05095 M parameters, 0.2038 MB" in text
    found = rows(text, "method")
    methods = {*statistics.ours(Gradients.random("small", CPU), CPU), *peers.methods(Gradients.random("small", CPU))}
    assert set(found) == {*methods, statistics.CEILING}
    for cells in found.values():
        assert float(cells["host ms"]) > 0
        assert float(cells["to ours"]) > 0
        assert {cells[column] for column in ("device ms", "queued ms", "blocked ms", "peak MB")} == {"-"}
    assert found[statistics.OURS]["95 %"] == "1.00 to 1.00"
    assert found[statistics.CEILING]["of read"] == "100.0 %"
    assert found[statistics.SENT]["of read"] == "-"
    syncs = {name: int(cells["syncs"]) for name, cells in found.items()}
    assert syncs[".item() loop"] == tensors
    assert syncs["Lightning-style"] == 2 * tensors + 1, "the list of norms is read once, and each value again"
    assert syncs["composer-style"] == tensors + 1
    assert syncs["OLMo-style"] == 4 * tensors + 1
    assert syncs["clip_grad_norm_"] == syncs["foreach L2 + inf per stream"] == 0
    assert int(found["composer-style"]["aten ops"]) == 3 * tensors + 1
    assert {name: cells["collectives"] for name, cells in found.items() if cells["collectives"] != "0"} == {
        statistics.SENT: "1",
        "AdaptDL-style": "1",
    }


def test_a_long_job_holds_no_more_memory_at_its_end_than_once_history_is_full(printed: Run) -> None:
    found = rows(printed(soak.main, "--steps", "3000", "--ranks", "3", "--history", "300"), "steps")
    memory = [float(cells["memory MB"]) for cells in found.values()]
    assert list(found) == [f"{300 * part:,}" for part in range(1, 11)]
    assert memory[-1] < memory[2] + 2  # a leak of 1 KB a step would be 2.1 MB over the last seven parts


def test_growth_prints_the_packet_of_each_number_of_ranks_and_one_collective(printed: Run) -> None:
    text = printed(growth.main, "--repeats", "2", "--tensors", "6", "12", "--ranks", "1", "3", "64", "1024")
    tensors, ranks = rows(text, "tensors"), rows(text, "ranks")
    assert list(tensors) == ["6", "12"]
    assert list(ranks) == ["1", "3", "64", "1,024"]
    sent = {int(name.replace(",", "")): cells["packet bytes"].replace(",", "") for name, cells in ranks.items()}
    slot = (int(sent[64]) - int(sent[3])) / 61
    assert slot == (int(sent[3]) - int(sent[1])) / 2 > 0
    assert [cells["turns"] for cells in ranks.values()] == ["1", "1", "1", "8"]
    assert int(sent[64]) + 64 * slot - slot < int(sent[1_024]) <= 65_536, "slots are sent in turn"
    assert [cells["collectives"] for cells in ranks.values()] == ["0", "1", "1", "1"]
    assert ranks["1"]["to 1"] == "1.00"
    for cells in ranks.values():
        assert all(float(cells[column]) > 0 for column in ("step ms", "unpack ms", "stats ms"))
        assert int(cells["audit bytes"].replace(",", "")) > int(cells["packet bytes"].replace(",", ""))


def test_whole_step_trains_on_two_ranks_with_one_collective(printed: Run) -> None:
    text = printed(whole_step.main, "--model", "small", "--fours", "2", "--steps", "2", "--items", "3")
    assert "2 cpu rank(s) under DDP" in text
    assert "18 tensors, 0.05095 M parameters, 0.2038 MB; 3 items a rank of 3 x 8 x 8" in text
    assert "8 blocks of 2 step(s)" in text
    figures = re.search(
        r"monitored +([\d.]+) ms\n.* not +([\d.]+) ms\nmonitor.step +([\d.]+) ms, 1 collective\(s\)\n"
        r"ratio +([\d.]+) +\(95 % interval ([\d.]+) to ([\d.]+)\)",
        text,
    )
    assert figures is not None
    monitored, plain, step, ratio, low, high = (float(figure) for figure in figures.groups())
    assert 0 < step < monitored
    assert plain > 0
    assert low <= ratio <= high


@pytest.mark.slow
def test_replay_sets_what_is_tried_beside_a_plain_pass(printed: Run) -> None:
    text = printed(replay.main, "--repeats", "2", "--items", "32", "--batch", "16", "--hidden", "16", "8")
    assert "two streams of mlp [16, 8], 32 items in batches of 16, 2 repeats" in text
    assert {name for name in (replay.LOOP, replay.PLAIN, replay.TRIED, replay.PAIR) if f"\n{name} " in text} == {
        "loop",
        "plain",
        "tried",
        "pair",
    }


def test_rules_say_what_a_step_costs_them(printed: Run) -> None:
    text = printed(rules.main, "--steps", "20", "--ranks", "3", "1")
    assert text.startswith(f"{len(evidence.RULES)} rules, 20 steps of two streams; CPU ms a step\n")
    found = rows(text, "ranks heard")
    assert set(found) == {"3", "1"}
    for costs in found.values():
        assert 0 < float(costs["rules, median"]) <= float(costs["rules, 99 %"])


@pytest.mark.slow
def test_coverage_counts_the_intervals_that_hold_the_truth(printed: Run) -> None:
    pytest.importorskip("multiviewstacking")
    found = rows(printed(coverage.main, "--splits", "1", "--validation", "100"), "figure")
    assert found["all uses"]["intervals"] == "4"
    assert found["all gaps"]["intervals"] == "6"
    assert found["full_acc_gap"]["all"] in ("0 %", "100 %")


@pytest.mark.slow
def test_main_job_pairs_steps_with_and_without_the_monitor(printed: Run) -> None:
    text = printed(main_job.main, "--steps", "20")
    assert "2 CPU ranks, the default job: 20 steps, every second one monitored" in text
    assert re.search(r"\nratio +[\d.]+   \(95 % interval [\d.]+ to [\d.]+\)", text), text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "must be a whole number of at least 1, got '0'"),
        (["--repeats", "-3"], "must be a whole number of at least 1, got '-3'"),
        (["--device", "tpu"], "must be cpu or cuda, got 'tpu'"),
        (["--model", "bert"], "invalid choice: 'bert'"),
    ],
)
def test_a_wrong_argument_ends_the_command(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        statistics.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        whole_step.main(["--device", "cuda"])
    assert "PyTorch finds no CUDA device here; use cpu" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_statistics_on_cuda_tells_who_waits(printed: Run) -> None:
    text = printed(statistics.main, "--model", "small", "--device", "cuda", "--repeats", "3", "--ceiling-mb", "64")
    found = rows(text, "method")
    assert int(found[statistics.OURS]["syncs"]) == int(found["ours: monitor.step"]["syncs"]) == 0
    assert int(found[".item() loop"]["syncs"]) == int(found[".item() loop"]["kernels"]) == 18
    assert float(found[".item() loop"]["blocked ms"]) > 15 > float(found[statistics.OURS]["blocked ms"])


# What they compare -------------------------------------------------------------------------------------------------


def test_the_gradient_sets_have_the_published_sizes() -> None:
    meta = torch.device("meta")
    sizes = {name: two_streams(name, meta) for name in PIXELS}
    assert len(list(sizes["resnet"].parameters())) == 2 * 60 + 2
    assert gradient_bytes(sizes["resnet"]) == 4 * (2 * 11_176_512 + 2 * 512 * 10 + 10), "torchvision's without its head"
    assert len(list(sizes["vit"].parameters())) == 2 * (3 + 12 * 12 + 2) + 2
    class_token = 768 + 768  # and its position
    assert gradient_bytes(sizes["vit"]) == 4 * (2 * (85_798_656 - class_token) + 2 * 768 * 10 + 10)


def test_every_method_finds_the_norm() -> None:
    gradients = Gradients.random("small", CPU)
    grads = [[p.grad for p in stream if p.grad is not None] for stream in gradients.by_stream]
    squares = [sum(grad.double().square().sum().item() for grad in stream) for stream in grads]
    norms = [math.sqrt(square) for square in squares]
    total = math.sqrt(sum(squares))
    for method in (peers.clip, peers.item_loop, peers.lightning, peers.composer, peers.olmo):
        assert float(method(gradients)) == pytest.approx(total, rel=1e-5), method.__name__
    assert peers.foreach(gradients).tolist() == pytest.approx(norms, rel=1e-5)
    l2, largest = peers.foreach_and_max(gradients)
    assert l2.tolist() == pytest.approx(norms, rel=1e-5)
    assert largest.tolist() == [max(grad.abs().max().item() for grad in stream) for stream in grads]
    local, synced = peers.adaptdl(gradients)
    assert local == pytest.approx(squares, rel=1e-6)
    assert synced == pytest.approx(squares, rel=1e-6)


def test_the_methods_leave_the_gradients_as_they_are() -> None:
    gradients = Gradients.random("small", CPU)
    before = [p.grad.clone() for p in gradients.parameters if p.grad is not None]
    for method in peers.methods(gradients).values():
        method()
    after = [p.grad for p in gradients.parameters if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# How they measure --------------------------------------------------------------------------------------------------


def test_operations_reads_and_collectives_are_counted() -> None:
    x = torch.ones(4)
    assert dispatched(lambda: x.sum().item()) == {"aten": 1}
    found = counts(lambda: torch.tensor([x.sum(), x.max()]).tolist(), CPU)
    assert found.syncs == 2, "the constructor reads both without being asked to"
    assert (found.collectives, found.kernels, found.peak_bytes) == (0, None, None)
    with machine.process_group("gloo"):
        assert dispatched(lambda: torch.distributed.all_reduce(x)) == {"c10d": 1}
    assert not torch.distributed.is_initialized()


def test_calls_take_turns() -> None:
    order: list[str] = []
    taken = Timer(CPU).round_robin({name: lambda name=name: order.append(name) for name in "abc"}, 4)
    repeats = ["".join(order[start : start + 3]) for start in range(len(order) - 12, len(order), 3)]
    assert all(sorted(repeat) == ["a", "b", "c"] for repeat in repeats)
    assert len(set(repeats)) > 1, "the order changes"
    assert {name: len(times) for name, times in taken.items()} == {"a": 4, "b": 4, "c": 4}


def test_ratios_are_paired() -> None:
    drifting = [1.0, 2.0, 4.0, 8.0, 16.0]
    ratio = Ratio.of([1.1 * second for second in drifting], drifting)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    low, high = interval([1.0, 1.0, 1.0, 9.0])
    assert (low, high) == (1.0, 9.0)


def test_blocks_of_a_b_b_a_cancel_a_drift() -> None:
    drift = [1.0 + 0.1 * block for block in range(8)]
    found = Alternation.of([*drift, 99.0])
    assert found.ratio.median == pytest.approx(1.0)
    assert found.monitored == pytest.approx(found.plain) == pytest.approx(1.35)
    assert Alternation.of([3.0, 2.0, 2.0, 3.0]).ratio.median == pytest.approx(1.5)


def test_tables_are_aligned_and_nothing_is_none() -> None:
    assert table(("a", "bb"), [("long", "1"), ("x", "22")]) == "a     bb\nlong   1\nx     22"
    assert median([None, None]) is None
    assert median([3.0, 1.0, 2.0]) == 2.0


# The better model -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("multiviewstacking") is None, reason="needs multiviewstacking")
def test_the_better_model_is_not_called_sick(printed: Run) -> None:
    (found,) = rows(printed(better.main, "--splits", "10", "--data", "htad"), "data").values()
    assert (found["trained by"], found["which"]) == ("own losses", "better")
    assert found["splits with an alarm"] in ("0 of 10", "1 of 10")
