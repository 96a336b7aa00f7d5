"""The application inside a test: composed as from the command line, run in this process or on real ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ddp_streammon.train.__main__ import composed, data_and_model, main, solo_models
from ddp_streammon.train.config import load
from ddp_streammon.train.loop import Result, run, seed_all
from tests.ranks import CONTEXT, run_ranks

QUIET = ("trainer.progress=false", "sinks.console.enabled=false", "sinks.wandb.enabled=false")
SHORT = ("model=multi_mlp", "model.hidden=[32,16]", "trainer.epochs=2")
SMALL = (*QUIET, *SHORT)
"""Seconds of the main job become a fraction of one; everything but the size is the main job's."""
EVERYTHING = ("evaluation=full", "monitor.local_gradients=true", "monitor.update_every=1")
"""All that can be measured."""


def train(overrides: list[str], folder: str) -> Result:
    """One run with these overrides, in `folder`."""
    torch.set_num_threads(1)
    Path(folder).mkdir(parents=True, exist_ok=True)
    config = composed(overrides)
    settings = load(config)
    seed_all(settings.trainer.seed)
    data, model = data_and_model(config, settings)
    solo = solo_models(config, settings, data)
    return run(settings, data, model, Path(folder), {"overrides": overrides}, solo)


def _weights(overrides: list[str], folder: str) -> dict[str, Any]:
    """The figures and the checkpoint of a run, read back."""
    result = train(overrides, folder)
    saved = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    return {"figures": dict(result.figures), "findings": [str(f) for f in result.findings], "saved": saved}


def train_ranks(world: int, overrides: list[str], folder: Path) -> list[dict[str, Any]]:
    """The same run on `world` ranks; what each found."""
    return run_ranks(world, _weights, overrides, str(folder), timeout=180)


def _command(arguments: Sequence[str], folder: Path, output: Path, variables: dict[str, str]) -> None:
    """The command line on one process; what it prints goes to files in `output`."""
    os.environ.pop("WANDB_SERVICE", None)  # of the process that made the server
    os.environ.update(variables)
    for stream, name in ((1, "out"), (2, "err")):
        with (output / f"{name}{variables.get('RANK', '')}").open("wb") as file:
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["ddp_streammon.train", *arguments]
    torch.set_num_threads(1)
    main()


def command(*arguments: str, folder: Path, ranks: int = 0, run: str = "run") -> subprocess.CompletedProcess[str]:
    """`python -m ddp_streammon.train` in `folder`, or with `ranks` what torchrun starts; run directory outputs/`run`.

    On forked processes: new interpreters would take seconds each to import torch. The answer has every rank's output.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {"STREAMMON_RUN": run, "OMP_NUM_THREADS": "1"}
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{store.port}", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"TORCHELASTIC_RUN_ID": "tests", "WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}"}
    each = [job | shared | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(ranks)] or [job]
    with tempfile.TemporaryDirectory() as output:
        processes = [
            CONTEXT.Process(target=_command, args=(arguments, folder, Path(output), variables)) for variables in each
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 200
        try:
            for process in processes:
                process.join(timeout=max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        assert None not in codes, f"not done within 200 s: the exit codes are {codes}"
        out, err = ("".join(file.read_text() for file in sorted(Path(output).glob(f"{n}*"))) for n in ("out", "err"))
    return subprocess.CompletedProcess(arguments, next(filter(None, codes), 0), out, err)
