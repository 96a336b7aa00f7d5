"""The HTML report: curves that keep extremes, what a record tells, and the file itself."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddp_streammon import StreamMonitor
from ddp_streammon.report import STOPPED
from ddp_streammon.report import page as page_module
from ddp_streammon.report.__main__ import main
from ddp_streammon.report.curves import STRETCHES, Curve
from ddp_streammon.report.page import page
from ddp_streammon.report.panels import drawing
from ddp_streammon.report.pictures import PICTURES, WHISKERS
from ddp_streammon.report.story import Story, read
from ddp_streammon.report.verdict import verdict
from ddp_streammon.sinks import FanOut, HtmlSink, JsonlSink
from tests.application import QUIET, train
from tests.faults import SMALL as SMALLEST
from tests.records import (
    ADVICE,
    EVIL,
    OUTLIER,
    STREAMS,
    epoch_record,
    finding,
    outcome_record,
    run_record,
    step_record,
    step_values,
    whole_run,
    write_records,
)
from tests.test_sinks import EPOCH, OUTCOME, RUN, STEP


def story_of(*records: dict[str, Any]) -> Story:
    story = Story()
    for record in records:
        story.add(record)
    return story


def panels(story: Story) -> dict[str, dict[str, Any]]:
    """The report's pictures by title, as the page is given them."""
    return {panel["title"]: panel for panel in json.loads(json.dumps(drawing(story), allow_nan=False))["panels"]}


def steps_of(differences: Sequence[int]) -> list[int]:
    total, found = 0, []
    for difference in differences:
        total += difference
        found.append(total)
    return found


# Curves -----------------------------------------------------------------------------------------------------------


def test_every_extreme_of_a_long_curve_is_kept() -> None:
    random.seed(0)
    values = [
        random.gauss(0, 1) + (50 if step in (3, 31_416) else -70 if step == 77_777 else 0) for step in range(99_999)
    ]
    curve = Curve()
    for step, value in enumerate(values):
        curve.add(step, value)
    points = curve.points()
    assert STRETCHES / 2 <= len(points) / 2 <= STRETCHES + 0.5
    assert all(values[step] == value for step, value in points) and points == sorted(points)
    assert points[-1] == (99_998, values[-1])
    assert curve.width == 128
    for first in range(0, len(values), curve.width):
        stretch = values[first : first + curve.width]
        kept = [value for step, value in points if first <= step < first + curve.width]
        assert (min(kept), max(kept)) == (min(stretch), max(stretch))


def test_a_short_curve_is_kept_whole_in_any_order() -> None:
    curve = Curve()
    for step in (9, 2, 1000, 5):
        curve.add(step, float(step))
    assert curve.points() == [(2, 2.0), (5, 5.0), (9, 9.0), (1000, 1000.0)]
    assert curve.last == (5, 5.0)


def test_values_that_are_not_finite_are_kept_aside_in_bounded_memory() -> None:
    curve = Curve(limit=4)
    for step in range(1, 101):
        curve.add(step, math.nan if step % 2 else math.inf if step == 50 else 1.0)
    assert all(value == 1.0 for _, value in curve.points())
    assert 2 <= len(curve.strange()) <= 4 and curve.strange()[0] == 1
    assert set(curve.strange()) <= {*range(1, 101, 2), 50}


def test_means_of_curves_with_different_widths_lie_on_one_another() -> None:
    long, short = Curve(limit=4), Curve(limit=4)
    for step in range(16):
        long.add(step, float(step))
    short.add(5, 7.0)
    assert long.width == 4 and short.width == 1
    assert long.means(8) == {0: 3.5, 1: 11.5} and short.means(8) == {0: 7.0}


def test_a_curve_of_one_stretch_is_refused() -> None:
    with pytest.raises(ValueError, match="a curve needs at least 2 stretches, got 1"):
        Curve(1)


# What a record tells ----------------------------------------------------------------------------------------------


def test_a_torn_line_and_what_is_no_record_are_left_out(tmp_path: Path) -> None:
    path = write_records(tmp_path / "metrics.jsonl", [run_record(), step_record(1, {"loss": 2.0, "text": "x"})])
    strange = [{"type": "news"}, {"type": "step"}, {"type": "step", "step": 2, "values": None, "findings": [3, {}]}]
    with path.open("ab") as file:
        file.write(b"[1, 2]\n\xff\xfe\n\n")
        file.write("".join(json.dumps(record) + "\n" for record in strange).encode())
        file.write(json.dumps(step_record(3, {"loss": 1.0})).encode()[:-20])
    story = read(path)
    assert story.last_step == 2 and story.curves["loss"].points() == [(1, 2.0)]
    assert not story.findings and "No end is recorded" in verdict(story).detail
    assert "Loss of the whole model" in panels(story) and page(story)


def test_a_run_that_measured_nothing_has_a_report(tmp_path: Path) -> None:
    story = story_of(run_record(), outcome_record())
    assert verdict(story).headline == "Nothing was measured"
    assert drawing(story)["panels"] == [] and page(story)


def test_findings_have_a_beginning_an_end_and_times_between() -> None:
    failed = finding("NF", "error", stream="rgb")
    story = story_of(
        run_record(),
        step_record(1, {}, [OUTLIER]),
        step_record(2, {}, [OUTLIER]),
        step_record(3, {}, [failed]),
        epoch_record(3, {}, [failed, ADVICE]),
        {**run_record(), "attempt": 1},
        step_record(4, {}, [OUTLIER]),
        epoch_record(6, {}, [OUTLIER, ADVICE]),
    )
    told = {told.latest["rule"]: told for told in story.findings.values()}
    assert told["OUTLIER"].spans == [[1, 2], [4, 6]] and told["OUTLIER"].stands
    assert told["NF"].spans == [[3, 3]] and not told["NF"].stands
    assert told["S-GR"].spans == [[3, 6]] and told["S-GR"].stands
    assert [told.latest["rule"] for told in story.by_urgency()] == ["NF", "OUTLIER", "S-GR"]
    marks = [(mark["x"], mark["level"], mark["text"]) for mark in drawing(story)["marks"]]
    assert marks[:2] == [(3, "error", "NF rgb"), (1, "warning", "OUTLIER depth")]
    assert drawing(story)["starts"] == [3]


def test_a_finding_that_only_epochs_tell_stands_between_them_and_ends_with_one() -> None:
    story = story_of(epoch_record(10, {}, [ADVICE]), step_record(11, {}))
    (told,) = story.findings.values()
    assert told.stands
    story.add(epoch_record(20, {}))
    assert not told.stands and told.spans == [[10, 10]]


def test_the_rules_own_beginning_of_a_finding_counts() -> None:
    story = story_of(step_record(20, {}, [{**OUTLIER, "since": 12}]))
    assert [told.since for told in story.findings.values()] == [12]


@pytest.mark.parametrize(
    ("records", "level", "headline", "detail"),
    [
        ([step_record(5, {})], "ok", "no alarm from the rule set 'guide'", "No end is recorded"),
        (
            [step_record(5, {}, [finding("OK", "info") | {"finding": "no alarm from 31 rules"}]), outcome_record()],
            *("ok", "no alarm from 31 rules", "Ended at step 5."),
        ),
        ([step_record(5, {}, [ADVICE]), outcome_record()], "ok", "no alarm", "1 note. Ended at step 5."),
        (
            [step_record(5, {}), outcome_record(STOPPED)],
            "ok",
            "no alarm",
            "Stopped after step 5, as somebody had asked.",
        ),
        ([step_record(5, {}), outcome_record(3)], "error", "The run failed; no alarm", "after step 5 (exit code 3)"),
        (
            [step_record(5, {}, [ADVICE, OUTLIER, finding("NF", "error", explained_by="OUTLIER")]), outcome_record(1)],
            *("error", "NF: NF &", "1 error, 1 warning, 1 note. It failed after step 5 (exit code 1)."),
        ),
    ],
)
def test_the_verdict_is_one_line(records: list[dict[str, Any]], level: str, headline: str, detail: str) -> None:
    said = verdict(story_of(run_record(), *records))
    assert said.level == level and headline in said.headline and detail in said.detail
    assert "healthy" not in said.headline


def test_the_verdict_says_that_an_alarm_is_over() -> None:
    said = verdict(story_of(run_record(), step_record(4, {}, [OUTLIER]), step_record(5, {}), outcome_record()))
    assert said.level == "warning" and said.detail == "It stood until step 4. 1 warning. Ended at step 5."


def test_pictures_are_drawn_of_what_there_is_and_of_nothing_else() -> None:
    (loss,) = panels(story_of(run_record(), step_record(1, {"loss": 1.0, "samples": 4, "rgb_params": 3}))).values()
    assert loss["title"] == "Loss of the whole model" and [line["name"] for line in loss["lines"]] == ["each step"]
    drawn = panels(story_of(*whole_run()))
    assert {
        *("When findings stood", "What the head uses, at the last evaluation"),
        *("Probe against use, at the last evaluation", "Loss of the whole model", "Gradient norm", "Update ratio"),
        *("Weight norm", "Accuracy of each stream alone", "Generalisation gap in the loss", "Shapley share", "aux"),
        *(
            "Streams that cover for each other",
            "Step time",
            "Gradient noise scale",
            "Gradient of each rank, before the average: depth",
        ),
    } <= drawn.keys()
    assert [line["name"] for line in drawn["Step time"]["lines"]] == ["a step", "of it the monitor"]
    uses = drawn["What the head uses: loss that an exchanged input costs"]["lines"]
    assert [line["name"] for line in uses] == list(STREAMS)
    assert all(
        low < value < high
        for line in uses
        for low, value, high in zip(line["low"]["y"], line["y"], line["high"]["y"], strict=True)
    )
    rows = drawn["Probe against use, at the last evaluation"]["rows"]
    assert [row["name"] for row in rows[:3]] == ["rgb"] * 3 and rows[-1]["name"] == "whole model"
    assert drawn["Loss of the whole model"]["lines"][2]["low"]["x"]


def test_values_that_are_not_finite_are_marked_by_their_step() -> None:
    values = {
        "loss": "NaN",
        "rgb_grad_norm": "Infinity",
        "rgb_local_grad_norm_rank0": "NaN",
        "rgb_local_grad_norm_rank1": 1.0,
    }
    drawn = panels(story_of(run_record(), step_record(7, values), step_record(8, {"loss": 0.5})))
    loss, norm = drawn["Loss of the whole model"]["lines"][0], drawn["Gradient norm"]["lines"][0]
    assert (steps_of(loss["x"]), loss["y"], loss["bad"]) == ([8], [0.5], [7])
    assert (norm["x"], norm["bad"]) == ([], [7])
    rows = drawn["Gradient of each rank, before the average: rgb"]["rows"]
    assert [row["cells"][7] for row in rows] == ["x", 0]


def test_the_rank_that_stands_out_is_marked_and_its_row_says_by_how_much() -> None:
    drawn = panels(story_of(*whole_run()))
    heat = drawn["Gradient of each rank, before the average: depth"]
    assert [row["rules"] for row in heat["rows"]] == [[], [], ["OUTLIER"], []]
    assert list(drawn)[:2] == ["When findings stood", heat["title"]]
    last = [row["cells"][-1] for row in heat["rows"]]
    assert last[2] == pytest.approx(100 * math.log2(4.5), abs=15) and all(abs(cell) < 15 for cell in last[:2])
    assert not any(row["rules"] for row in drawn["Gradient of each rank, before the average: rgb"]["rows"])


def test_times_of_ranks_are_drawn_where_the_record_has_them() -> None:
    facts = {"rank": [0, 1, 2], "busy_seconds": [0.1, 0.2, 0.3]}
    slow = finding("SLOW", "warning", rank=2)
    records = [{**step_record(step, {}, [slow]), "measured": {"rank_facts": facts}} for step in (1, 2)]
    heat = panels(story_of(run_record(), *records))["Busy time of each rank"]
    assert [row["cells"][-1] for row in heat["rows"]] == [-100, 0, 58]
    assert [row["rules"] for row in heat["rows"]] == [[], [], ["SLOW"]]


def test_a_record_whose_times_are_not_by_figure_has_a_report_without_them() -> None:
    rows = [{"rank": rank, "busy_seconds": 0.1} for rank in range(2)]
    drawn = panels(
        story_of(run_record(), *[{**step_record(1, {}), "measured": of} for of in ({"rank_facts": rows}, {})])
    )
    assert "Busy time of each rank" not in drawn


def test_of_many_ranks_the_first_and_those_that_findings_name_are_drawn() -> None:
    facts = {"rank": list(range(1000)), "busy_seconds": [0.1] * 999 + [0.4]}
    records = [
        {**step_record(step, {}, [finding("SLOW", "warning", rank=999)]), "measured": {"rank_facts": facts}}
        for step in (1, 2)
    ]
    heat = panels(story_of(run_record(), *records))["Busy time of each rank"]
    assert [row["rank"] for row in heat["rows"]] == [*range(64), 999]
    assert heat["rows"][-1]["cells"][-1] == 200
    assert "Beyond the first 64, ranks that a finding names." in heat["note"]


def test_a_rank_is_marked_where_the_picture_is_of_what_is_said_of_it() -> None:
    facts = {"rank": [0, 1], "busy_seconds": 0.1}
    norms = {f"{name}_local_grad_norm_rank{rank}": 1.0 for name in (*STREAMS, "shared") for rank in range(2)}
    told = [
        finding("LOSS", "warning", rank=1),
        finding("OUTLIER", "info", rank=1, stream="rgb", explained_by="LOSS"),
        finding("OUTLIER", "info", rank=1, explained_by="LOSS"),
        finding("INR", "error", rank=0, stream="depth"),
    ]
    records = [{**step_record(step, norms, told), "measured": {"rank_facts": facts}} for step in (1, 2)]
    drawn = panels(story_of(run_record(), *records))
    marked = {title: [row["rules"] for row in of["rows"]] for title, of in drawn.items() if of["kind"] == "heat"}
    before = "Gradient of each rank, before the average: "
    assert marked == {
        f"{before}rgb": [[], ["LOSS", "OUTLIER"]],
        f"{before}depth": [["INR"], ["LOSS"]],
        f"{before}{STREAMS[2]}": [[], ["LOSS"]],
        f"{before}shared": [[], ["LOSS", "OUTLIER"]],
        "Busy time of each rank": [[], []],
    }


def test_what_too_few_items_cannot_tell_is_no_fault() -> None:
    unknown = {"rgb_knows": "NaN", "depth_knows": "NaN", "full_val_acc": 0.5, "rgb_val_uses": "NaN"}
    story = story_of(run_record(), epoch_record(4, unknown), epoch_record(8, {**unknown, "rgb_knows": 0.25}))
    (line,) = panels(story)["What each stream knows: ridge probe of its features"]["lines"]
    assert (line["name"], steps_of(line["x"]), "bad" in line) == ("rgb", [8], False)
    assert panels(story)["What the head uses: loss that an exchanged input costs"]["lines"][0]["bad"]
    text = Tags(page(story)).visible
    assert "0.25" in text and "nan" not in text and "–" in text


# The file ---------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The elements of a page, the text outside of scripts, and what script elements hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.visible, self.scripts, self.addresses = "", [""], []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag in ("script", "style"):
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("script", "style") and data.strip():
            self.scripts[-1] += data
        else:
            self.visible += data


def test_names_and_sentences_cannot_become_elements() -> None:
    tags = Tags(page(story_of(*whole_run())))
    assert tags.tags.count("script") == 2 and "img" not in tags.tags
    assert tags.visible.count(EVIL) >= 5 and "<b>audio</b>" in tags.visible
    data = json.loads(tags.scripts[2])
    lines = [line["name"] for panel in data["panels"] if panel["title"] == "Gradient norm" for line in panel["lines"]]
    assert "<b>audio</b>" in lines


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    text = page(story_of(*whole_run()))
    assert Tags(text).addresses == ["data:,"]
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src &#x27;none&#x27;" in text and 'name="viewport"' in text


@pytest.mark.parametrize("config", [{"world_size": 3}, {"world_size": None, "setup": {"world": 3}}])
def test_the_head_says_how_many_ranks_ran(config: dict[str, Any]) -> None:
    assert "3 ranks · 4 steps" in Tags(page(story_of(run_record(**config), step_record(4, {})))).visible


def test_findings_are_told_with_evidence_and_override() -> None:
    text = Tags(page(story_of(*whole_run()))).visible
    for part in ("OUTLIER", "factor\xa0=\xa04.5", "rank 2\xa0=\xa0nan", "Likely too high a rate"):
        assert part in text, part
    assert "optim.streams.rgb.lr=0.0005" in text
    own_loop = story_of(run_record(), epoch_record(4, {}, [{**ADVICE, "action": {**ADVICE["action"], "how": ""}}]))
    assert "parameter group 'rgb': lr 0.001 -> 0.0005" in Tags(page(own_loop)).visible


def contrast(a: str, b: str) -> float:
    """The WCAG 2 contrast ratio of two colours (#rrggbb)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_can_be_seen_in_both_schemes() -> None:
    style = Path(page_module.__file__).with_name("page.css").read_text()
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(schemes) == 2 and schemes[0].keys() == schemes[1].keys()
    streams = [f"s{number}" for number in range(8)]
    for colours in schemes:
        for name in (*streams, "shared", "full"):
            assert contrast(colours[name], colours["card"]) > 4, name
        for name in ("text", "soft", "ok", "info", "warning", "error"):
            assert contrast(colours[name], colours["card"]) > 4.5, name
        assert len({colours[name] for name in streams}) == 8


def test_many_steps_make_no_large_file(tmp_path: Path) -> None:
    values = step_values(1, ("rgb", "depth"))
    records = (step_record(step, dict.fromkeys(values, 1 + step * 7919 % 997 / 997)) for step in range(1, 6001))
    text = page(read(write_records(tmp_path / "metrics.jsonl", records)))
    assert len(text) < 500_000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_steps_are_read_in_one_pass_and_make_a_small_file(tmp_path: Path) -> None:
    names = (
        "loss",
        *(f"{stream}_{figure}" for stream in ("rgb", "depth", "shared") for figure in ("grad_norm", "grad_share")),
    )
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write(json.dumps(run_record(("rgb", "depth"))) + "\n")
        for step in range(1, 1_000_001):
            value = 1e6 if step == 654_321 else 1 + (step * 7919 % 99_991) / 99_991
            file.write(json.dumps(step_record(step, dict.fromkeys(names, value))) + "\n")
    start = time.monotonic()
    story = read(tmp_path / "metrics.jsonl")
    text = page(story)
    print(f"{time.monotonic() - start:.1f} s, {len(text)} bytes")
    assert story.last_step == 1_000_000 and len(text) < 1_000_000
    assert (654_321, 1e6) in story.curves["loss"].points()


# The command and the sink -----------------------------------------------------------------------------------------


def test_the_command_writes_the_file_beside_the_record_and_says_where(tmp_path: Path) -> None:
    write_records(tmp_path / "metrics.jsonl", whole_run(200))
    torchs_own = "ignore:Implicitly cleaning up:ResourceWarning"  # a folder that PyTorch 2.6 makes when it is imported
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", torchs_own, "-m", "ddp_streammon.report", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'report.html'}\n", "")
    assert (tmp_path / "report.html").read_text() == page(read(tmp_path / "metrics.jsonl"))
    assert main([str(tmp_path / "metrics.jsonl"), str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_bytes() == (tmp_path / "report.html").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no record '{}/metrics.jsonl': give a run directory that holds metrics.jsonl, or a JSONL file"),
        ("", "'{}/metrics.jsonl' holds no record of a run"),
        ('{"a": 1}\nno JSON\n', "'{}/metrics.jsonl' holds no record of a run"),
    ],
)
def test_the_command_says_what_it_needs(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main([str(tmp_path)]) == 1
    assert message.format(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def without_times(story: Story) -> list[dict[str, Any]]:
    return [panel for panel in drawing(story)["panels"] if panel["title"] != "Step time"]


def test_the_sink_writes_what_the_command_writes_from_its_record(tmp_path: Path) -> None:
    sinks = FanOut(
        [JsonlSink(tmp_path / "metrics.jsonl"), HtmlSink(tmp_path / "report.html", tmp_path / "metrics.jsonl")]
    )
    sinks.open(RUN)
    for report in (STEP, EPOCH):
        sinks.write(report)
    assert not (tmp_path / "report.html").exists()
    sinks.close(OUTCOME)
    written = json.loads(Tags((tmp_path / "report.html").read_text()).scripts[2])
    story = read(tmp_path / "metrics.jsonl")
    assert [panel for panel in written["panels"] if panel["title"] != "Step time"] == without_times(story)
    assert "exit code 3" in (tmp_path / "report.html").read_text()


def test_the_sink_needs_no_record_and_goes_on_from_one(tmp_path: Path) -> None:
    alone = HtmlSink(tmp_path / "new" / "alone.html")
    alone.open(RUN)
    alone.write(EPOCH)
    alone.close(OUTCOME)
    assert "Depth overfitting" in alone.path.read_text()
    write_records(tmp_path / "metrics.jsonl", [run_record(), step_record(3, {"loss": 2.0}), outcome_record(1)])
    resumed = HtmlSink(tmp_path / "report.html", tmp_path / "metrics.jsonl")
    resumed.open(RUN)
    resumed.write(EPOCH)
    resumed.close(OUTCOME)
    data = json.loads(Tags(resumed.path.read_text()).scripts[2])
    assert data["starts"] == [3] and data["last"] == 10


def test_a_report_that_cannot_be_written_is_heard_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write the report '.*file/report.html' \(.*\): give a path to a file"):
        HtmlSink(tmp_path / "file" / "report.html")


def test_the_application_writes_the_report_also_when_training_fails(tmp_path: Path) -> None:
    overrides = [
        *SMALLEST,
        "sinks.wandb.enabled=false",
        "trainer.epochs=1",
        "+model._target_=tests.faults.slow",
        "+model.seconds=0",
    ]
    result = train(overrides, str(tmp_path / "well"))
    assert result.records["report"] == str(tmp_path / "well" / "report.html")
    assert "No alarm from" in (tmp_path / "well" / "report.html").read_text()
    with pytest.raises(Exception, match="item 20 is torn"):
        train([*overrides, "data._target_=tests.faults.torn", "+data.at=20"], str(tmp_path / "torn"))
    text = (tmp_path / "torn" / "report.html").read_text()
    assert "It failed after step 12 (exit code 1)." in text


def test_the_application_writes_no_report_where_none_is_wanted(tmp_path: Path) -> None:
    overrides = [*QUIET, *SMALLEST, "trainer.epochs=1", "+model._target_=tests.faults.slow", "+model.seconds=0"]
    result = train([*overrides, "sinks.html.enabled=false"], str(tmp_path))
    assert "report" not in result.records and not (tmp_path / "report.html").exists()


# The guide's figure -----------------------------------------------------------------------------------------------


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ddp_streammon.report.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs the package matplotlib: pip install 'ddp-streammon\[plot\]'"):
        import_module("ddp_streammon.report.plot")


def test_plot_history_draws_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from ddp_streammon.report.plot import plot_history

    monitor = StreamMonitor(nn.ModuleDict({"stream1": nn.Linear(2, 2), "stream2": nn.Linear(2, 2)}))
    with pytest.raises(
        ValueError, match="nothing to plot: no stream of stream1, stream2 has one of grad_norm, val_acc"
    ):
        plot_history(monitor)
    for epoch in range(3):
        sum((p * torch.ones_like(p)).sum() for p in monitor.model.parameters()).backward()
        monitor.log_metrics(epoch, {**monitor.compute_stream_gradients(), **monitor.compute_stream_weights()})
    figure = plot_history(monitor)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["Gradient norm", "Weight norm"]
    drawn = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert drawn == {name: monitor.history[f"{name}_grad_norm"] for name in ("stream1", "stream2")}
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_every_picture_says_how_to_read_it() -> None:
    assert all(len(re.findall(r"[.:;](?: |$)", of.note)) >= 2 for of in (*PICTURES, *WHISKERS))
    shown = panels(story_of(*whole_run(400)))
    assert {"heat", "spans"} <= {panel["kind"] for panel in shown.values()}
    for title, panel in shown.items():
        assert len(panel["note"].split()) >= 15, title
