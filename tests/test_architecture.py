"""The street is one-way, metric keys exist in one module, and the core needs torch alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ddp_streammon
from ddp_streammon import keys

ROOT = Path(ddp_streammon.__file__).parent
STREET = (
    *("version", "config", "keys", "streams", "shards", "moments", "packet", "collective", "ranks", "rank_facts"),
    *("stats", "noise", "weights", "proof", "power", "updates", "linear", "plan", "user_numbers", "clipping"),
    "scaling",
    *("local_gradients", "facts", "inputs", "sampled", "details", "graphs", "measurement", "steps", "described"),
    *("evaluation", "history", "rules", "report", "sinks", "workspace"),
    *("actions", "reference", "monitor", "replay", "adapters", "train"),
)
"""A module imports only from modules before it; inside a package siblings are fine."""
OPTIONAL = (
    "hydra",
    "omegaconf",
    "wandb",
    "wandb_workspaces",
    "matplotlib",
    "tensorboard",
    "lightning",
    "transformers",
    "accelerate",
    "rich",
)
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def place(path: Path) -> str:
    """The part of the street that a file belongs to: its first folder, or its own name."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def project_imports(tree: ast.AST) -> Iterator[str]:
    """The parts of the street that a module imports from, also inside functions and for types only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports would escape this test"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "ddp_streammon":
                yield rest.split(".")[0]


def wrong_turns(source: str, part: str) -> list[str]:
    """What a module of `part` imports from its own place on the street onwards, its own package apart."""
    allowed = {*STREET[: STREET.index(part)], part}
    return [name for name in project_imports(ast.parse(source)) if name not in allowed]


def test_every_module_is_on_the_street() -> None:
    assert {place(path) for path in MODULES} <= set(STREET)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_earlier_on_the_street(path: Path) -> None:
    assert wrong_turns(path.read_text(), place(path)) == []


def test_a_wrong_turn_would_be_seen() -> None:
    source = "def f():\n    from ddp_streammon.monitor import watch\n    from ddp_streammon import keys, stats\n"
    assert wrong_turns(source, "streams") == ["monitor", "stats"]
    assert wrong_turns("import ddp_streammon.rules.guide", "rules") == []
    assert wrong_turns("from ddp_streammon import StreamMonitor", "adapters") == ["StreamMonitor"]


# Metric keys ------------------------------------------------------------------------------------------------------

FIGURES = sorted(
    {
        *keys.GRAD_FIGURES,
        *keys.WEIGHT_FIGURES,
        *keys.OVERFIT_FIGURES,
        keys.WEIGHT_NORM_RATIO,
        keys.FULL_MODEL_LOSS_GAP,
        keys.FULL_MODEL_ACC_GAP,
    }
    - {keys.GRAD_TENSORS}  # "params" is also what an optimizer's group calls its tensors
)
KEY = re.compile(rf"(\w*_)?({'|'.join(FIGURES)})|\w*_(to|vs)_\w*ratio|_{keys.GRAD_TENSORS}|_(to|vs)_|_(overfit_)?ratio")


def key_literals(source: str) -> list[str]:
    """String literals, parts of f-strings among them, that are a metric key or a piece of one; docstrings apart."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [node.value for node in strings if id(node) not in prose and KEY.fullmatch(node.value)]


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if place(path) not in ("keys", "train")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_metric_keys_are_spelled_in_one_module_only(path: Path) -> None:
    literals = key_literals(path.read_text())
    if place(path) == "rules":  # where a figure without a stream is the name of a piece of evidence
        literals = [literal for literal in literals if literal not in FIGURES]
    assert literals == []


def test_a_spelled_key_would_be_seen() -> None:
    assert key_literals("x = {'rgb_grad_norm': 1}") == ["rgb_grad_norm"]
    pieces = ["_val_acc", "_to_", "_ratio", "_params"]
    assert key_literals("x = f'{s}_val_acc', f'{a}_to_{b}_ratio', f'{s}_params'") == pieces
    assert key_literals("def f():\n    'grad_norm'\n    return group['params'], 'a norm of grad_norm'") == []
    assert {"grad_norm", "weight_norm_ratio", "overfitting_score"} <= set(key_literals((ROOT / "keys.py").read_text()))


# Devices ----------------------------------------------------------------------------------------------------------

MADE = {
    *("arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint"),
    *("randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}
"""What PyTorch makes on the device that a script has set for all tensors, unless it is told another one."""
REAL = {"empty", "eye", "linspace", "logspace", "ones", "rand", "randn", "zeros"}
"""Of these, what has the dtype that is set for all, too."""


def unsaid(source: str) -> list[str]:
    """Calls that make a tensor and do not say where, or of what."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        module, _, name = ast.unparse(call.func).rpartition(".")
        wanted = {"device", "dtype"} if name in REAL else {"device"}
        if module == "torch" and name in MADE and not wanted <= {option.arg for option in call.keywords}:
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize(
    "path", [path for path in MODULES if place(path) != "train"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_tensor_is_made_on_a_device_and_of_a_dtype_that_are_said(path: Path) -> None:
    assert unsaid(path.read_text()) == []


def test_a_tensor_made_anywhere_would_be_seen() -> None:
    source = (
        "x = torch.zeros(3, dtype=t), torch.ones(3, device=d), x.new_zeros(3), torch.arange(3, device=d), torch.eye(3)"
    )
    assert unsaid(source) == ["torch.zeros(3, dtype=t)", "torch.ones(3, device=d)", "torch.eye(3)"]


# What the core needs ----------------------------------------------------------------------------------------------


KERNEL = "ddp_streammon.moments.triton"
"""Imported when it is needed: on CUDA."""


def loaded_after(code: str) -> set[str]:
    """The optional packages, and the kernel, that a fresh process has loaded after `code`."""
    report = f"import sys; print(); print(*sorted({{{KERNEL!r}, *{OPTIONAL!r}}} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {report}"], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    return set(done.stdout.splitlines()[-1].split())


def test_the_core_needs_torch_alone_the_wandb_sink_imports_no_wandb_and_a_step_on_cpu_no_kernel() -> None:
    code = (
        "import torch, ddp_streammon as s, ddp_streammon.sinks.wandb, ddp_streammon.adapters.common; "
        "m = torch.nn.ModuleDict({'a': torch.nn.Linear(2, 2)}); w = s.watch(m); w.step(loss=1.0); "
        "w.log_metrics(0, w.compute_stream_weights()); w.get_recommendations(); w.get_summary(); w.close()"
    )
    assert loaded_after(code) == set()


def test_an_optional_import_would_be_seen() -> None:
    for name in ("wandb", KERNEL):
        assert name in loaded_after(f"import sys, types; sys.modules[{name!r}] = types.ModuleType({name!r})")
