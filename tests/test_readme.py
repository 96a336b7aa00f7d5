"""The README's snippets and commands are run, so that they stay true."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ddp_streammon import StreamMonitor, __version__
from ddp_streammon.train.__main__ import conf_dir
from tests.application import command
from tests.sharding import needs_fsdp2
from tests.test_app import ROOT, inherited

README = (ROOT / "README.md").read_text()
BLOCKS = {language: re.findall(rf"```{language}\n(.*?)```", README, re.S) for language in ("bash", "python")}
(TOGETHER,) = (block for block in BLOCKS["bash"] if "for " in block)
"""Commands of which one needs what the others leave behind."""
APART = [block for block in BLOCKS["bash"] if block != TOGETHER]
COMMANDS = [line.split("#")[0].strip() for block in APART for line in block.splitlines() if line]
FAULT = "bash launch/demo.sh optim.streams.pix.lr=0.3"
SMALL = "model=multi_mlp model.hidden=[16,8] trainer.epochs=1 sinks.wandb.enabled=false"


class Net(nn.Module):
    """Two streams of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stream1, self.stream2, self.fc = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(16, 5)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.cat([self.stream1(a), self.stream2(b)], dim=1))


def random_items(count: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    return (torch.randn(count, 4), torch.randn(count, 3)), torch.randint(0, 5, (count,))


@pytest.mark.parametrize("number", range(len(BLOCKS["python"])))
def test_a_python_snippet_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    tensors = (torch.randn(20, 4), torch.randn(20, 3), torch.randint(0, 5, (20,)))
    model = Net()
    nn.functional.cross_entropy(model(*tensors[:2]), tensors[2]).backward()
    loader = DataLoader(TensorDataset(*tensors), batch_size=5)
    names = {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "loader": [((a, b), y) for a, b, y in loader],
        "train_loader": loader,
        "val_loader": loader,
        "monitor": StreamMonitor(model),
        "train_items": random_items(300),
        "held_out_items": random_items(200),
    }
    if number > 0:
        exec(BLOCKS["python"][0].splitlines()[0], names)  # the import is in the first snippet
    exec(BLOCKS["python"][number], names)
    printed = capsys.readouterr().out
    said = ("no alarm from", "Gradient ratio", "('stream1', 'cannot tell')", "preflight after")
    said += ("[('stream1', '", "stream1: exchanging its input costs ")
    assert any(words in printed for words in said)


SLOW = ("mfeat_six", "precision=bf16", "hsdp", "fusion_type=gated", "every_steps", "fou.lr", "fsdp2")
"""In the commands that only the slow tests run: other tests run what they are about."""
FSDP2 = ("parallel=fsdp2", "parallel=hsdp")


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(
            line,
            marks=[
                mark for mark, parts in ((pytest.mark.slow, SLOW), (needs_fsdp2, FSDP2)) if any(map(line.count, parts))
            ],
        )
        for line in COMMANDS
        if "ddp_streammon.train" in line
    ],
)
def test_a_command_of_the_application_runs(line: str, tmp_path: Path) -> None:
    if "htad" in line and find_spec("multiviewstacking") is None:
        pytest.skip("multiviewstacking is not installed")
    before, after = line.split(" -m ddp_streammon.train")
    launcher = re.fullmatch(r"python|torchrun --nproc-per-node=(\d)", before)
    assert launcher is not None, before
    ranks = int(launcher[1] or 0)
    done = command(*shlex.split(after), *SMALL.split(), folder=tmp_path, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert ("Where to look:" if ranks else "fusion_type: concat") in done.stdout


@pytest.mark.slow
def test_commands_that_need_each_other_run(tmp_path: Path) -> None:
    if find_spec("multiviewstacking") is None:
        pytest.skip("multiviewstacking is not installed")
    script = re.sub(r"(ddp_streammon\.train .*)", rf"\1 {SMALL}", TOGETHER)
    variables = {
        **inherited(),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "audio: a probe of models of it alone is " in done.stdout
    assert "the average of models of one stream each is " in done.stdout


@pytest.mark.slow
def test_the_fault_of_the_demo_is_named_at_its_step_with_what_mends_it(tmp_path: Path) -> None:
    assert FAULT in COMMANDS
    override = FAULT.removeprefix("bash launch/demo.sh ")
    done = command(override, "trainer.epochs=12", "sinks.wandb.enabled=false", folder=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    (said,) = re.findall(r"^step 10: .* pix: .* \[(.*)\]$", done.stdout, re.M)
    assert said == "optim.streams.pix.lr=0.02"


def test_the_other_commands_are_scripts_that_ci_or_a_test_runs() -> None:
    others = [command for command in COMMANDS if "ddp_streammon.train" not in command]
    assert [command for command in others if command != FAULT] == ["bash launch/demo.sh", "bash launch/test.sh"]
    assert "launch/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_every_script_and_option_that_the_text_names_exists() -> None:
    for path in re.findall(r"(?:launch|tests)/[\w/.]+\.(?:sh|py|png)", README):
        assert (ROOT / path).is_file(), path
    for group, name in re.findall(r"\b(experiment|data|streams|sinks|optim|rules|evaluation)=(\w+)", README):
        assert Path(conf_dir(), group, f"{name}.yaml").is_file() or name == "none", (group, name)


def test_the_version_to_cite_is_this_one() -> None:
    assert f"version = {{{__version__}}}" in README
    assert f"- **{__version__}**" in README
    (file,) = re.findall(r"`(ddp_streammon/CITATION\.cff)`", README)
    cited = yaml.safe_load((ROOT / file).read_text())
    assert cited["version"] == __version__ and cited["cff-version"] == "1.2.0"
    assert cited["title"] in README and cited["license"] == "MIT" and cited["authors"] and cited["message"]
