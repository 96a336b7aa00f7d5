"""workspace.py: every figure of W&B has its panel, and what is saved is what W&B's own package makes of it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from ddp_streammon import keys
from ddp_streammon.sinks.wandb import ESTIMATES, FINDINGS, STEP_AXIS
from ddp_streammon.workspace import EVALUATED, main, pictures, report, workspace
from tests.fake_wandb import FakeWandb

STREAMS = ("rgb", "rgb_low")
PANELS = [picture for panels in pictures().values() for picture in panels]


@pytest.fixture
def package() -> None:
    pytest.importorskip("wandb_workspaces", reason='the extra "workspace" is not installed')


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: None) -> Iterator[FakeWandb]:
    """A W&B of this test's own."""
    with FakeWandb() as fake:
        for name, value in fake.env().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        monkeypatch.delenv("WANDB_SERVICE", raising=False)
        wandb.teardown()
        yield fake
        wandb.teardown()


def shown() -> list[str]:
    """W&B's keys of all figures of two streams, as the sink makes them."""
    made = [keys.of_stream(name, figure) for name in (*STREAMS, keys.FULL) for figure in keys.WANDB_FIGURES]
    made += [keys.of_stream(keys.FULL, figure) for figure in keys.WANDB_FIGURES_OF_FULL]
    made += [keys.grad_ratio(*STREAMS), keys.overfit_ratio(*STREAMS), "loss", keys.VAL_ACC]
    found = [key for one in made if (key := keys.wandb_key(one, STREAMS)) is not None]
    assert len(found) == len(made)
    return [*found, *(keys.wandb_rank_key(which, name) for which in keys.RANK_FIGURES for name in STREAMS)]


def test_every_figure_is_in_one_panel_with_its_axis() -> None:
    for key in shown():
        (picture,) = [picture for picture in PANELS if re.search(picture.pattern, key)]
        over_epochs = key.startswith(("overfit/", "probe/"))
        assert picture.axis == (keys.EPOCH if over_epochs else STEP_AXIS), key
    assert all(any(re.search(picture.pattern, key) for key in shown()) for picture in PANELS)


def test_an_estimate_is_in_the_panel_of_its_interval() -> None:
    (picture,) = [picture for picture in PANELS if picture.title == keys.USES]
    figures = (f"val_{keys.USES}{bound}" for bound in ("", f"_{keys.LOW}", f"_{keys.HIGH}"))
    lines = [keys.wandb_key(keys.of_stream("rgb", figure), STREAMS) for figure in figures]
    assert all(line is not None and re.search(picture.pattern, line) for line in lines)


def line_plots(spec: Any) -> list[dict[str, Any]]:
    """The settings of every line plot anywhere in a saved specification."""
    if isinstance(spec, list):
        return [plot for item in spec for plot in line_plots(item)]
    if not isinstance(spec, dict):
        return []
    own = [spec["config"]] if spec.get("viewType") == "Run History Line Plot" else []
    return own + line_plots(list(spec.values()))


def check(spec: dict[str, Any]) -> None:
    """All pictures, in their order, and the table of findings."""
    plots = line_plots(spec)
    assert [(plot["chartTitle"], plot["metricRegex"], plot["xAxis"]) for plot in plots] == [
        (picture.title, picture.pattern, picture.axis) for picture in PANELS
    ]
    assert all(plot["useMetricRegex"] for plot in plots)
    assert [plot["chartTitle"] for plot in plots if plot.get("yLogScale")] == [keys.GRAD_NORM, keys.UPDATE_RATIO]
    for key in (FINDINGS, ESTIMATES):
        assert f'"val": "{key}"' in json.dumps(spec)
    assert f'"summary:{keys.VERDICT}": true' in json.dumps(spec)


def test_both_are_built_without_a_server(package: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    view = workspace("team", "project")
    check(json.loads(view._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)))
    assert [section.name for section in view.sections] == ["Findings", *pictures(), EVALUATED]
    blocks = report("team", "project").blocks
    assert [block.text for block in blocks if type(block).__name__ == "H1"] == ["Findings", *pictures(), EVALUATED]


def test_both_are_saved_in_the_project(server: FakeWandb, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fake/p"])
    where = capsys.readouterr().out.splitlines()
    assert where[0].startswith(f"workspace  {server.url}/fake/p?nw=")
    assert where[1].startswith(f"report     {server.url}/fake/p/reports/Streams--")
    assert [(view["projectName"], view["entityName"], view["displayName"]) for view in server.views] == [
        ("p", "fake", "Streams")
    ] * 2
    assert [view["type"] for view in server.views] == ["project-view", "runs"]
    for view in server.views:
        check(json.loads(view["spec"]))
    assert server.unknown == []


def test_a_project_that_is_not_there_is_said(server: FakeWandb) -> None:
    with pytest.raises(SystemExit, match="W&B did not save them .*check `wandb login`.* project fake/q exists"):
        main(["fake/q"])


@pytest.mark.parametrize("target", ["p", "fake/", "/p", "https://wandb.ai/fake/p"])
def test_a_project_is_named_with_its_entity(target: str) -> None:
    with pytest.raises(SystemExit, match=f"expected ENTITY/PROJECT.* got {target!r}"):
        main([target])


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(SystemExit, match=re.escape('needs the package wandb-workspaces: pip install "ddp-streammon[')):
        main(["fake/p"])
