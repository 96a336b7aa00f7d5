"""The monitor inside Lightning, Accelerate and the Trainer of transformers: 2 gloo ranks, the real packages."""

from __future__ import annotations

import math
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddp_streammon import Action, Finding, Intent, MonitorConfig, Severity, watch
from ddp_streammon.adapters.common import Guest, LoggerSink, MicroBatches, Words, change, declared, items_in
from ddp_streammon.report import Report, RunInfo
from ddp_streammon.sinks import HtmlSink, JsonlSink, read_jsonl
from ddp_streammon.sinks.jsonl import reported
from ddp_streammon.sinks.ledger import COLUMNS, Ledger
from tests import adapted
from tests.adapted import ACCUMULATE, CLIP, STEPS
from tests.networks import STREAMS, network
from tests.ranks import run_ranks

FRAMEWORKS = {"lightning": "lightning", "accelerated": "accelerate", "huggingface": "transformers"}
WORDS = Words(groups="configure_optimizers", clip="Trainer(gradient_clip_val)")


@pytest.fixture(scope="module", params=FRAMEWORKS)
def training(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """A framework, and what each rank says of the trainings with it."""
    package = FRAMEWORKS[request.param]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed (pip install 'ddp-streammon[adapters]')")
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, run_ranks(2, getattr(adapted, request.param), str(folder), timeout=200)


def test_figures_are_those_of_the_plain_loop(training: tuple[str, list[Any]]) -> None:
    for rank in training[1]:
        assert len(rank["figures"]["loss"]) == STEPS
        for key, values in rank["figures"].items():
            assert values == pytest.approx(rank["plain"]["figures"][key], rel=1e-5), key


def test_training_is_bit_for_bit_that_without_a_monitor(training: tuple[str, list[Any]]) -> None:
    for rank in training[1]:
        without, watched = rank["weights"][:2]
        assert all(torch.equal(tensor, watched[name]) for name, tensor in without.items())
        assert all(
            torch.allclose(tensor, watched[name], atol=1e-6) for name, tensor in rank["plain"]["weights"].items()
        )


def test_one_all_reduce_more_an_optimizer_step(training: tuple[str, list[Any]]) -> None:
    for rank in training[1]:
        without, watched = rank["counts"]["without"], rank["counts"]["with"]
        more = {name: count - without.get(name, 0) for name, count in watched.items() if count != without.get(name, 0)}
        assert more.pop("allreduce_") == STEPS
        assert set(more) <= {"allgather_"} and more.get("allgather_", 0) <= 8  # objects, when it is made


def test_a_checkpoint_goes_on_counting(training: tuple[str, list[Any]]) -> None:
    for rank in training[1]:
        calls, resumed = rank["resumed"]
        assert calls == STEPS
        assert resumed == rank["figures"]
        whole, again = rank["weights"][1:3]
        assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_validation_evaluates_each_item_once(training: tuple[str, list[Any]]) -> None:
    first, second = (rank["evaluated"] for rank in training[1])
    assert first == second
    assert first["full_val_loss"] == pytest.approx(training[1][0]["validation"], rel=1e-5)
    assert all(math.isfinite(value) for value in first["rgb_val_uses"])


def test_the_sinks_are_told_how_it_ended(training: tuple[str, list[Any]]) -> None:
    first, second = training[1]
    assert first["ended"] == [0, 1]
    assert second["ended"] == [None, None]  # rank 1 has no sinks
    assert [rank["failed"] for rank in training[1]] == [("raised", 2)] * 2


def test_findings_are_printed_on_rank_0(training: tuple[str, list[Any]]) -> None:
    first, second = (rank["printed"] for rank in training[1])
    assert "no alarm from" in first and "rgb     4        9,695" in first
    assert "no alarm from" not in second and "rgb     4" not in second


def test_intent_is_what_the_framework_was_told(training: tuple[str, list[Any]]) -> None:
    intent = training[1][0]["intent"]
    assert intent.accumulate == ACCUMULATE
    if training[0] != "accelerated":  # which does not know these before they happen
        assert (intent.clip_norm, intent.total_steps) == (CLIP, STEPS)


def test_the_frameworks_own_logger_has_the_figures(training: tuple[str, list[Any]]) -> None:
    name, (first, _) = training
    norms = first["figures"]["rgb_grad_norm"]
    if name == "lightning":
        header, *lines = (line.split(",") for line in first["logged"].splitlines())
        cells = [
            (int(row["step"]), float(value))
            for row in (dict(zip(header, line, strict=True)) for line in lines)
            if (value := row["grad_norm/rgb"])
        ]
        assert cells == list(enumerate(norms))
    elif name == "accelerated":
        assert [(step, values["grad_norm/rgb"]) for values, step in first["logged"]] == list(enumerate(norms, 1))
    else:
        assert [(row["step"], row["grad_norm/rgb"]) for row in first["logged"] if "grad_norm/rgb" in row] == list(
            enumerate(norms, 1)
        )
        own = [row["loss"] for row in first["logged"] if "loss" in row]
        assert own == pytest.approx(first["figures"]["loss"], rel=1e-5)


def test_the_readmes_snippet_runs(training: tuple[str, list[Any]]) -> None:
    first, second = (rank["snippet"] for rank in training[1])
    assert "rgb     4        9,695" in first and "no alarm from" in first
    assert "rgb     4" not in second


def test_what_a_framework_cannot_tell(training: tuple[str, list[Any]]) -> None:
    name, (first, _) = training
    if name == "lightning":
        assert first["scaled"]["loss"] == pytest.approx(first["figures"]["loss"][:3], rel=1e-2)
        for key in ("rgb_grad_norm", "depth_grad_norm", "shared_grad_norm"):
            assert first["scaled"][key] == pytest.approx(first["figures"][key][:3], rel=2e-2)
    if name == "huggingface":
        assert first["refused"] == [
            "clip_norm=0.05 needs TrainingArguments(max_grad_norm=0), or both clip",
            "a score needs one eval_dataset, got near, far",
        ]


def test_lightnings_manual_optimization_with_two_optimizers(training: tuple[str, list[Any]]) -> None:
    name, ranks = training
    if name != "lightning":
        pytest.skip("the others are given their optimizers")
    for rank in ranks:
        one, several = rank["several"]
        assert len(one["loss"]) == 5 and several == one, "a backward pass is measured once"
        pairs = zip(*map(dict.values, rank["by_several"]), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_gradients_that_transformers_has_clipped_say_so(training: tuple[str, list[Any]]) -> None:
    name, ranks = training
    if name != "huggingface":
        pytest.skip("the others are measured before clipping")
    for rank in ranks:
        assert rank["clipped_to"] == pytest.approx([CLIP] * STEPS)
        squares = [rank["figures"][f"{stream}_grad_norm"] for stream in ("rgb", "depth", "shared")]
        assert [math.hypot(*norms) for norms in zip(*squares, strict=True)] == pytest.approx([CLIP] * STEPS, rel=1e-3)
        for key, values in rank["unclipped"].items():
            assert values == pytest.approx(rank["plain_unclipped"]["figures"][key], rel=1e-5), key
        assert all(
            torch.allclose(tensor, rank["weights"][3][at], atol=1e-6)
            for at, tensor in rank["plain_unclipped"]["weights"].items()
        )


# What they share, in one process ----------------------------------------------------------------------------------


def two_groups() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    rest = [p for part in (model.rgb, model.mix) for p in part.parameters()]
    groups = [{"params": rest, "lr": 0.1}, {"params": list(model.depth.parameters()), "lr": 0.2}]
    return model, torch.optim.SGD(groups)


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (Action("lr", "depth", 0.02, 0.2), "param_groups[1]['lr']: 0.2 -> 0.02"),
        (
            Action("lr", "rgb", 0.05, 0.1),
            "lr=0.05 for 'rgb' in a parameter group of its own (configure_optimizers), now in one group with shared",
        ),
        (
            Action("weight_decay", "full", 0.01, 0.1),
            "param_groups[0]['weight_decay'], param_groups[1]['weight_decay']: 0.1 -> 0.01",
        ),
        (Action("clip_norm", "full", 2.0, 1.0), "Trainer(gradient_clip_val)=2"),
    ],
)
def test_an_action_names_what_is_to_be_set(action: Action, said: str) -> None:
    model, optimizer = two_groups()
    monitor = watch(model, optimizer, STREAMS, sinks=[])
    assert change(action, monitor, [optimizer], WORDS) == said
    monitor.close()


def test_a_stream_that_no_group_holds_gets_one_of_its_own() -> None:
    model = network()
    monitor = watch(model, None, STREAMS, sinks=[])
    said = change(Action("lr", "rgb", 0.05, math.nan), monitor, [], WORDS)
    assert said == "lr=0.05 for 'rgb' in a parameter group of its own (configure_optimizers)"
    monitor.close()


class Loop(Guest):
    """The least that an adapter is."""

    words = WORDS

    def train(self, logged: list[tuple[dict[str, float], int]], *, breaks_at: int | None = None) -> None:
        model, optimizer = two_groups()
        self._begin(model, [optimizer], lambda figures, step: logged.append((figures, step)), every=2, main=True)
        for number in range(1, 6):
            optimizer.zero_grad()
            loss = model(torch.ones(3, 4), torch.ones(3, 3)).square().mean()
            loss.backward()
            if number == breaks_at:
                model.depth[0].weight.grad[0, 0] = math.nan
            self._micro.mean(loss, 3)
            self._step(epoch=0)


def test_every_second_steps_figures_are_logged_and_what_is_wrong_is_said_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    with Loop(STREAMS) as loop:
        loop.train(logged, breaks_at=3)
        assert [step for _, step in logged] == [2, 4]
        printed = capsys.readouterr().out
    assert logged[1][0]["train/samples"] == 3 and "grad_norm/depth" in logged[1][0]
    assert "error NF: " in printed and "depth" in printed.split("error NF: ")[1]
    assert loop.running.calls == 5
    assert "info INC: " in capsys.readouterr().out  # what stands at the end: the same inputs in every step
    loop._close()
    assert capsys.readouterr().out == ""


def test_a_finding_says_what_to_set_in_the_frameworks_words_wherever_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = JsonlSink(tmp_path / "log.jsonl")
    sinks = (file, HtmlSink(tmp_path / "report.html"))
    with Loop(STREAMS, config=MonitorConfig(intent=Intent(lr={"depth": 0.02})), sinks=sinks) as loop:
        loop.train([])
    assert "RATE: " in (printed := capsys.readouterr().out)
    assert "[param_groups[1]['lr']: 0.2 -> 0.02]\n" in printed and "optim.streams" not in printed
    said = "param_groups[1]['lr']: 0.2 -> 0.02"
    (found,) = [found for found in read_jsonl(file.path)[-1]["findings"] if found["rule"] == "RATE"]
    assert found["action"]["how"] == said
    text = unescape((tmp_path / "report.html").read_text()).replace("<wbr>", "")
    assert said in text and "optim.streams" not in text
    for_wandb = Ledger()
    for report in reported(file.path):
        for_wandb.rest(report.findings)
    assert said in {row[COLUMNS.index("override")] for row in for_wandb.rows()}


def test_a_guest_has_no_monitor_before_it_begins() -> None:
    with pytest.raises(RuntimeError, match="it is made when training begins"):
        _ = Loop().running


def test_a_logger_sink_says_a_finding_once_and_information_with_epochs() -> None:
    said: list[str] = []
    sink = LoggerSink(lambda figures, step: None, lambda finding: said.append(finding.rule))
    sink.open(RunInfo(("rgb",), {}, ""))
    loud, quiet = Finding("a", rule="LOUD", severity=Severity.warning), Finding("b", rule="QUIET")
    for step in (1, 2):
        sink.write(Report("step", step, None, {}, (loud, quiet)))
    assert said == ["LOUD"]
    sink.write(Report("epoch", 2, 1.0, {}, (loud, quiet)))
    assert said == ["LOUD", "QUIET"]


def test_micro_batches_are_weighted_by_their_samples() -> None:
    micro = MicroBatches()
    assert micro.take() == {"loss": None, "samples": None}
    loss = torch.tensor(2.0, dtype=torch.float64)
    micro.add(loss, 1, 1)
    loss *= 100  # as transformers scales a loss in place
    micro.mean(torch.tensor(5.0), 3)
    taken = micro.take()
    assert (float(taken["loss"][0]), taken["loss"][1], taken["samples"]) == (17.0, 4, 4)
    micro.mean(1.0, None)
    assert micro.take() == {"loss": (1.0, 1.0), "samples": None}


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ((torch.zeros(3, 2), torch.zeros(3)), 3),
        ({"id": "x", "pixels": [torch.zeros(4, 2)]}, 4),
        (torch.tensor(1.0), None),
        ("text", None),
    ],
)
def test_the_items_of_a_batch(batch: Tensor | dict[str, Any] | str, count: int | None) -> None:
    assert items_in(batch) == count


def test_what_the_user_declares_stands() -> None:
    config = MonitorConfig(intent=Intent(clip_norm=2.0))
    got = declared(config, clip_norm=1.0, total_steps=10, accumulate=None).intent
    assert (got.clip_norm, got.total_steps, got.accumulate) == (2.0, 10, 1)
    assert declared(None, accumulate=4).intent.accumulate == 4
