"""The report in headless Chromium: no script error, no request, and a person finds everything at any width."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddp_streammon.report.page import write
from ddp_streammon.report.story import Story
from tests.browser import CHROMIUM, DRIVER, MISSING, Browser
from tests.records import STREAMS, epoch_record, epoch_values, run_record, step_record, whole_run

pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason=MISSING)
FIND = """
const all = (what) => [...document.querySelectorAll(what)];
const box = (what) => document.querySelector(what).getBoundingClientRect();
const titled = (title) => all("figure").find((figure) => figure.querySelector("h3").textContent === title);
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every picture, an outlier rank, a restart, and names that try to be elements."""
    story = Story()
    for record in whole_run():
        story.add(record)
    path = tmp_path_factory.mktemp("report") / "report.html"
    write(story, path)
    return path


def shown(browser: Browser, report: Path, width: int, dark: bool) -> None:
    browser.look(width, dark)
    browser.complaints(), browser.requests()
    browser.open(report)
    assert browser.complaints() == []
    assert set(browser.requests()) == {report.as_uri()}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everything_is_there_without_an_error_or_a_request(
    width: int, dark: bool, browser: Browser, report: Path
) -> None:
    shown(browser, report, width, dark)
    count: dict[str, int] = {
        what: browser.run(f"{FIND} return all({what!r}).length;")
        for what in ("figure", "figure svg text", ".curve", ".band", ".whisker", ".estimate", ".outlier", ".finding")
    }
    assert count["figure"] == 26 and count[".outlier"] == 1
    assert count[".curve"] >= 40 and count[".band"] >= 15 and count[".whisker"] >= 12 and count[".finding"] >= 40
    assert count[".estimate"] == 16
    wide, tall, shift = browser.run(
        f"{FIND} const d = document.documentElement; return [d.scrollWidth, d.scrollHeight, d.scrollLeft];"
    )
    assert wide <= width and tall > 2000 and shift == 0
    spill = browser.run(
        f"{FIND} return all('figure').filter((f) => f.querySelector('svg').getBoundingClientRect().right > "
        "f.getBoundingClientRect().right + 1).length;"
    )
    assert spill == 0
    columns = browser.run(f"{FIND} return new Set(all('figure').map((f) => f.getBoundingClientRect().left)).size;")
    assert columns == (1 if width == 390 else 3)
    paper = browser.run("return getComputedStyle(document.body).backgroundColor;")
    assert paper == ("rgb(17, 19, 23)" if dark else "rgb(247, 247, 245)")
    assert browser.run("return window.hacked === undefined && document.images.length === 0;")
    names = browser.run(f"{FIND} return all('#streams th[scope=row]').map((cell) => cell.textContent);")
    assert names == [*STREAMS, "shared", "whole model"]


OVERLAPS = """
const found = [];
for (const figure of document.querySelectorAll("figure")) {
  const texts = [...figure.querySelectorAll("svg text")].filter((of) => of.textContent.trim());
  texts.forEach((text, at) => texts.slice(at + 1).forEach((other) => {
    const [a, b] = [text.getBoundingClientRect(), other.getBoundingClientRect()];
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const tall = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > 1 && tall > 4) found.push(`${text.textContent} | ${other.textContent}`);
  }));
}
return found;
"""


@pytest.mark.parametrize("width", [320, 390])
def test_no_text_lies_on_another_at_phone_width(width: int, browser: Browser, tmp_path: Path) -> None:
    streams = ("rgb", "a_tower_with_a_long_name", "thermal_camera_2")
    story = Story()
    for record in (run_record(streams), step_record(100, {}), epoch_record(100, epoch_values(100, streams))):
        story.add(record)
    write(story, tmp_path / "report.html")
    shown(browser, tmp_path / "report.html", width, dark=False)
    assert browser.run(f"{FIND} return all('.whisker').length;") == 13
    assert browser.run(OVERLAPS) == []


def test_a_logarithmic_axis_has_marks_over_all_of_its_length(browser: Browser, tmp_path: Path) -> None:
    story = Story()
    for record in (run_record(), *(step_record(step, {"rgb_update_ratio": 0.0012 * step}) for step in range(1, 41))):
        story.add(record)
    write(story, tmp_path / "report.html")
    shown(browser, tmp_path / "report.html", 390, dark=False)
    marks = browser.run(
        f"{FIND} return [...titled('Update ratio').querySelectorAll('text')].map((e) => e.textContent);"
    )
    assert marks[:4] == ["0.002", "0.005", "0.01", "0.02"]


def readout(browser: Browser, title: str) -> list[str]:
    script = (
        f"{FIND} const f = titled({title!r}); "
        "return [f.querySelector('.at'), ...f.querySelectorAll('.legend b')].map((e) => e.textContent);"
    )
    found: list[str] = browser.run(script)
    return found


def at_step(browser: Browser, title: str, step: int) -> None:
    """Move the mouse to a step of a picture."""
    x, y = browser.run(
        f"{FIND} const svg = titled({title!r}).querySelector('svg'); svg.scrollIntoView({{block: 'center'}}); "
        f"const b = svg.getBoundingClientRect(); "
        f"return [b.left + 50 + (b.width - 60) * {step} / 1000, b.top + b.height / 2];"
    )
    browser.hover(x, y)


@pytest.mark.parametrize("width", [1280, 390])
def test_hovering_shows_the_values_of_that_step_in_every_picture(width: int, browser: Browser, report: Path) -> None:
    shown(browser, report, width, dark=False)
    assert readout(browser, "Gradient norm")[0] == "step 1,000 · epoch 10"
    before = readout(browser, "Gradient norm")[1:]
    at_step(browser, "Gradient norm", 300)
    at, *values = readout(browser, "Gradient norm")
    step = int(at.split()[1])
    assert abs(step - 300) <= 4 and f"epoch {step // 100}" in at and "▼ S-GR rgb" in at
    assert values != before and all(float(value) > 0 for value in values)
    assert readout(browser, "Update ratio")[0] == at
    noise = readout(browser, "Gradient noise scale")[1]
    assert float(noise.split()[0]) == pytest.approx(360, rel=0.3) and "[" in noise
    whole, of_monitor = map(float, readout(browser, "Step time")[1:])
    assert (whole, of_monitor) == pytest.approx((0.01, 2e-4), rel=1e-3)
    bounds = readout(browser, "What the head uses: loss that an exchanged input costs")[1]
    assert "[" in bounds and "]" in bounds
    assert "visible" in browser.run(f"{FIND} return all('.cross').map((line) => line.getAttribute('visibility'));")
    at_step(browser, "Gradient of each rank, before the average: depth", 700)
    assert readout(browser, "Gradient of each rank, before the average: depth")[1].startswith("rank 2: 4.")
    assert browser.complaints() == []


def test_keys_move_the_step_and_another_width_draws_anew(browser: Browser, report: Path) -> None:
    shown(browser, report, 1280, dark=False)
    key = (
        "titled('Gradient norm').querySelector('svg').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}));"
    )
    browser.run(FIND + key)
    assert readout(browser, "Gradient norm")[0].startswith("step 995 ")
    browser.look(390, dark=False)
    view: Any = browser.run(f"{FIND} return titled('Gradient norm').querySelector('svg').getAttribute('viewBox');")
    assert float(view.split()[2]) < 390
    assert browser.complaints() == []


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"loss": "NaN"},
        {"loss": 0.0, "rgb_grad_norm": 0.0},
        {"loss": 1e300, "rgb_grad_norm": 1e-300},
        {"loss": -1e9},
    ],
)
def test_odd_runs_are_drawn_without_an_error(values: dict[str, Any], browser: Browser, tmp_path: Path) -> None:
    story = Story()
    for record in (run_record(), step_record(1, values)):
        story.add(record)
    write(story, tmp_path / "report.html")
    shown(browser, tmp_path / "report.html", 390, dark=True)
    wrong = f"{FIND} return all('svg *').filter((e) => /NaN|Infinity/.test(e.outerHTML)).map((e) => e.outerHTML);"
    assert browser.run(wrong) == []
    assert browser.run(f"{FIND} return all('figure').length;") == len(values)
