"""The application as a user starts it: torchrun, overrides, errors, another model, another folder."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch

from ddp_streammon import __version__, keys
from ddp_streammon.replay import main as replay_main
from ddp_streammon.report.__main__ import main as report_main
from ddp_streammon.sinks import read_jsonl
from ddp_streammon.sinks.wandb import ESTIMATES, FINDINGS
from ddp_streammon.train.__main__ import main as train_main
from tests.application import EVERYTHING, SHORT, command
from tests.read_wandb import read_run

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = {
    *("grad_norm", "grad_share", "grad_nonfinite", "update_ratio", "weight_norm", "lr"),
    *("overfit", "probe", "rank", "ratio", "train", "trainer"),
}
PARALLEL_TAGS = ("rules=evidence", "parallel=ddp")


def inherited() -> dict[str, str]:
    """The environment without the W&B service that this process may have started for itself."""
    return {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}


def start(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` with the checkout importable, and wait for it."""
    variables = {**inherited(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=variables, capture_output=True, text=True, timeout=200, check=False
    )


def torchrun(*overrides: str, folder: Path, ranks: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    return start(*launcher, "-m", "ddp_streammon.train", *overrides, folder=folder, **environment)


def test_the_last_lines_say_where_to_look(main_job: tuple[Path, str]) -> None:
    run_dir, output = main_job
    last = output[output.index("Done: ") :]
    assert "full_test_acc 0." in last
    assert "Recommendations:\n  " in last
    assert f"run directory  {run_dir}\n" in last
    assert f"JSONL file     {run_dir}/metrics.jsonl\n" in last
    assert f"W&B run        {run_dir}/wandb/offline-run-" in last
    assert f"wandb sync {run_dir}/wandb/offline-run-" in last


def test_the_streams_are_listed_at_the_start_and_tabled_each_epoch(main_job: tuple[Path, str]) -> None:
    _, output = main_job
    assert "stream  tensors  parameters  trainable  lr     weight decay  dtype" in output
    assert output.count("overfitting_score") == 2
    assert "Stream Monitoring Summary" in output


def test_all_ranks_share_one_run_directory(main_job: tuple[Path, str]) -> None:
    run_dir, _ = main_job
    assert [path.name for path in run_dir.parent.iterdir()] == ["demo"]
    assert sorted(path.name for path in (run_dir / ".hydra").iterdir()) == ["rank0", "rank1"]
    assert {"rank0.log", "rank1.log", "checkpoint.pt", "metrics.jsonl"} <= {path.name for path in run_dir.iterdir()}


def test_every_step_is_in_the_jsonl_file(main_job: tuple[Path, str]) -> None:
    records = read_jsonl(main_job[0] / "metrics.jsonl")
    assert [record["type"] for record in records].count(
        "epoch"
    ) == 4  # of each evaluation what the head uses, and each stream alone
    steps = [record for record in records if record["type"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 9))  # 1,200 items, 2 ranks of 128: 4 steps an epoch
    assert all(record["values"]["samples"] == 256 for record in steps)
    assert all(0 < record["values"]["fou_grad_norm"] < 100 for record in steps)
    assert all(0 < record["monitor_seconds"] < 10 for record in steps)
    assert records[-1]["type"] == "outcome"


def test_the_wandb_file_holds_the_chosen_figures_of_the_jsonl_file(main_job: tuple[Path, str]) -> None:
    run_dir, _ = main_job
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    run = read_run(file)
    records = [record for record in read_jsonl(run_dir / "metrics.jsonl") if record["type"] in ("step", "epoch")]
    rows = [row for row in run.history if "trainer/step" in row]
    assert len(rows) == len(records)
    for row, record in zip(rows, records, strict=True):
        assert row["trainer/step"] == record["step"]
        for key, value in record["values"].items():
            shown = None if key == keys.EPOCH else keys.wandb_key(key, ("fou", "pix"))
            if shown is not None:
                assert row[shown] == value or (math.isnan(row[shown]) and math.isnan(value)), key
    (last,) = [row for row in rows[-2:] if "probe/uses/fou" in row]
    assert last["probe/uses_low/fou"] < last["probe/uses/fou"] < last["probe/uses_high/fou"]
    steps = [(row, record["values"]) for row, record in zip(rows, records, strict=True) if record["type"] == "step"]
    for row, values in steps:
        norms = [values[keys.of_rank("pix", keys.LOCAL_NORM, rank)] for rank in range(2)]
        assert [row[keys.wandb_rank_key(which, "pix")] for which in ("min", "max")] == sorted(norms)
        assert norms[int(row[keys.wandb_rank_key("loudest", "pix")])] == max(norms)
    assert run.summary[keys.VERDICT] == rows[-1][keys.VERDICT] != ""
    assert run.config["optim"]["lr"] == 1e-3
    assert run.config["world_size"] == 2
    assert run.config["parameters"] == {"fou": 3040, "pix": 8288, "shared": 330}
    assert (run.name, run.group) == ("demo", "mfeat_two")
    assert run.tags == ["data=mfeat", "model=multi_mlp", "streams=mfeat_two", "optim=adamw", *PARALLEL_TAGS]


def test_wandb_shows_at_most_20_figures_a_stream_and_no_two_under_one_key(main_job: tuple[Path, str]) -> None:
    run_dir, _ = main_job
    records = read_jsonl(run_dir / "metrics.jsonl")
    measured = {key for record in records if record["type"] in ("step", "epoch") for key in record["values"]}
    assert len(measured) > 190
    shown = [name for key in measured if (name := keys.wandb_key(key, ("fou", "pix"))) is not None]
    assert len(set(shown)) == len(shown)
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    logged = {key for row in read_run(file).history for key in row if not key.startswith(("_", FINDINGS, ESTIMATES))}
    own = {keys.VERDICT, keys.EPOCH}
    count = Counter(
        key.rsplit("/", 1)[1] for key in logged - own if key.split("/")[0] not in ("train", "ratio", "trainer")
    )
    assert count.keys() == {"fou", "pix", keys.SHARED, keys.FULL}
    assert max(count.values()) == count["fou"] == count["pix"] == 20
    assert len(logged - own) <= 20 * len(count)
    assert {key.split("/")[0] for key in logged - own} == SECTIONS


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(main_job: tuple[Path, str], tmp_path: Path) -> None:
    again = (*EVERYTHING, "sinks.wandb.enabled=false")
    done = torchrun(*SHORT, *again, folder=tmp_path, STREAMMON_RUN="again")
    assert done.returncode == 0, done.stderr
    first, again = (
        [record["values"] for record in read_jsonl(folder / "metrics.jsonl") if record["type"] in ("step", "epoch")]
        for folder in (main_job[0], tmp_path / "outputs" / "again")
    )
    assert len(first) == 12
    assert repr(first) == repr(again)


def test_an_unknown_key_ends_the_job_before_a_process_group_starts(tmp_path: Path) -> None:
    done = command("trainer.epoch=3", folder=tmp_path)
    assert done.returncode == 1
    assert "unknown key 'trainer.epoch': trainer has epochs, batch_size" in done.stderr
    assert "nearest: epochs" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_wrong_value_ends_the_job_with_one_line(tmp_path: Path) -> None:
    done = command("trainer.epochs=0", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("configuration error: trainer.epochs must be at least 1, got 0")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_multirun_under_torchrun_is_refused_with_the_way_out(tmp_path: Path) -> None:
    done = torchrun("--multirun", "optim.lr=1e-3,1e-4", folder=tmp_path)
    assert done.returncode != 0
    assert "--multirun cannot run under torchrun" in done.stderr
    assert "for lr in 1e-3 3e-4; do torchrun" in done.stderr


OWN = """
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset
    from ddp_streammon.train.data import StreamData

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.rgb_tower, self.depth_tower = nn.Linear(6, width), nn.Linear(4, width)
            self.head = nn.Linear(2 * width, 3)

        def forward(self, rgb, depth):
            return self.head(torch.cat([self.rgb_tower(rgb), self.depth_tower(depth)], 1).relu())

    def data(items):
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(items, size, generator=generator) for size in (6, 4)]
        part = TensorDataset(*tensors, torch.randint(0, 3, (items,), generator=generator))
        return StreamData(part, part, None, {"rgb": (6,), "depth": (4,)}, 3, part)
"""


def test_a_users_own_model_and_data_are_a_target(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(textwrap.dedent(OWN))
    experiment = """
        # @package _global_
        model: {_target_: own.Net, width: 8}
        data: {_target_: own.data, items: 90}
        streams:
          rgb: {patterns: [rgb_tower]}
          depth: {patterns: [depth_tower]}
        optim: {streams: {rgb: {lr: 1e-2, weight_decay: null}, depth: {lr: null, weight_decay: null}}}
        trainer: {epochs: 1, batch_size: 16}
    """
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "own.yaml").write_text(textwrap.dedent(experiment))
    arguments = ("--config-dir", "conf", "experiment=own", "data=none", "model=none", "streams=none")
    done = command(*arguments, folder=tmp_path, ranks=2, run="own")
    assert done.returncode == 0, done.stderr
    records = read_jsonl(tmp_path / "outputs" / "own" / "metrics.jsonl")
    in_use, epoch = (record["values"] for record in records if record["type"] == "epoch")
    assert {"rgb_val_uses_low", "depth_val_uses_high"} <= set(in_use)
    assert epoch["rgb_lr"] == pytest.approx(1e-2)
    assert {"rgb_val_acc", "depth_val_acc", "rgb_vs_depth_overfit_ratio"} <= set(epoch)
    saved = torch.load(tmp_path / "outputs" / "own" / "checkpoint.pt", weights_only=True)
    assert "rgb_tower.weight" in saved["model"]


def test_the_wheel_and_its_scripts_run_from_any_folder(tmp_path: Path) -> None:
    """The wheel is built from the source distribution, and installed where no checkout is seen."""
    build = ("-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT))
    built = start(*build, folder=tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,), (source,) = ((tmp_path / "dist").glob(f"*.{end}") for end in ("whl", "tar.gz"))
    name = f"ddp_streammon-{__version__}"
    assert wheel.name.startswith(f"{name}-") and source.name == f"{name}.tar.gz"
    site = tmp_path / "site"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    assert start(*install, folder=tmp_path).returncode == 0
    assert (site / "ddp_streammon" / "py.typed").is_file()
    where = "import importlib.util as u; print(u.find_spec('ddp_streammon').origin)"
    assert start("-c", where, folder=Path("/"), PYTHONPATH=str(site)).stdout == f"{site}/ddp_streammon/__init__.py\n"
    run_dir = tmp_path / "run"
    overrides = (*SHORT, "trainer.epochs=1", "sinks.wandb.enabled=false", f"hydra.run.dir={run_dir}")
    for script, arguments, said in (
        ("train", overrides, f"JSONL file     {run_dir}/metrics.jsonl\n"),
        ("report", (str(run_dir),), f"{run_dir}/report.html\n"),
        ("replay", (str(run_dir),), "rules"),
    ):
        path = str(site / "bin" / f"streammon-{script}")
        done = start(path, *arguments, folder=Path("/"), PYTHONPATH=str(site))
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


def test_the_commands_say_their_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for command_ in (train_main, replay_main, report_main):
        monkeypatch.setattr(sys, "argv", ["streammon", "--version"])
        with contextlib.suppress(SystemExit):
            command_()
        assert capsys.readouterr().out == f"{__version__}\n"
