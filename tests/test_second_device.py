"""On a device that is not the CPU: the same figures, and waits only where it is said (see tests/devices.py)."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

from ddp_streammon import MonitorConfig, StreamMonitor
from ddp_streammon.packet import Field, Layout
from ddp_streammon.train import loop
from tests import application
from tests.application import SMALL
from tests.devices import CPU, SECOND, second_device, waits
from tests.networks import STREAMS, TwoStreams, batch, network, part
from tests.ranks import run_ranks

DEVICES = [
    pytest.param(SECOND, id="second"),
    pytest.param(
        torch.device("cuda"),
        id="cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
"""What the second device refuses and waits for is what CUDA does."""


def copied(into: list[Tensor], source: list[Tensor]) -> list[Tensor]:
    """Lists that lie on two devices."""
    torch._foreach_copy_(into, source)
    return into


REFUSED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda there, here: there + here,
    "sum with a number there": lambda there, here: here + there[0],
    "in place, a number there": lambda there, here: here[0].add_(there[0]),
    "product": lambda there, here: there @ here,
    "concatenation": lambda there, here: torch.cat([there, here]),
    "stack with a number": lambda there, here: torch.stack([there[0], here[0]]),
    "choice": lambda there, here: torch.where(there > 0, there, here),
    "index_select": lambda there, here: there.index_select(0, here.long()),
    "index_add": lambda there, here: there.index_add(0, here.long(), there),
    "index of the CPU's": lambda there, here: here[there.long()],
    "comparison": lambda there, here: torch.equal(there, here),
    "loss": lambda there, here: cross_entropy(there.expand(3, 3), here.long()),
    "list": lambda there, here: torch._foreach_add([there], [here]),
    "generator": lambda there, here: torch.randn(3, generator=torch.Generator(), device=there.device),
}
TAKEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a number": lambda there, here: torch.maximum(there * here[1], here[2]),
    "in place": lambda there, here: there.clone().add_(here[1]).masked_fill_(there > 1, here[0]),
    "index": lambda there, here: there[here.long()],
    "of lists": lambda there, here: copied([there.clone(), here.clone()], [here, there])[0],
    "views": lambda there, here: there.clone().reshape(3, 1).transpose_(0, 1).contiguous()[0],
    "made there": lambda there, here: torch.arange(3.0, device=there.device) + torch.zeros_like(there),
    "brought there": lambda there, here: here.to(there.device, torch.float64, non_blocking=True).float(),
}
WAITS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "item": lambda there, here: there[0].item(),
    "truth": lambda there, here: bool(there[0]),
    "list": lambda there, here: there.tolist(),
    "copy": lambda there, here: there.cpu(),
    "copy there": lambda there, here: here.to(there.device),
    "filled": lambda there, here: there.clone().copy_(here),
    "tensor": lambda there, here: torch.tensor([1.0, 2.0], device=there.device),
    "mask": lambda there, here: there[there > 0],
    "places": lambda there, here: there.nonzero(),
    "index": lambda there, here: there[here.long()],
    "comparison": lambda there, here: torch.equal(there, there),
}


@contextlib.contextmanager
def strict(device: torch.device = SECOND) -> Iterator[torch.device]:
    """What is warned of (inputs that cannot be read, say) is an error."""
    with warnings.catch_warnings(), second_device() if device == SECOND else contextlib.nullcontext():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("error", message="a forward's inputs could not be looked at")
        yield device


# The device ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", REFUSED)
def test_two_devices_do_not_mix(name: str, device: torch.device) -> None:
    with strict(device), pytest.raises(RuntimeError, match="device"):
        REFUSED[name](torch.arange(3.0).to(device), torch.arange(3.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_gives_the_cpus_values(name: str, device: torch.device) -> None:
    here = torch.arange(3.0)
    with strict(device):
        found = TAKEN[name](here.to(device), here)
        assert found.device.type == device.type
        assert torch.equal(found.cpu(), TAKEN[name](here, here))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_seen(name: str, device: torch.device) -> None:
    with strict(device):
        there, here = torch.arange(3.0).to(device), torch.arange(3.0)
        if device == SECOND:
            with waits() as found:
                WAITS[name](there, here)
            assert [wait.split()[1] for wait in found] == ["test_second_device.py"]
        else:
            torch.cuda.set_sync_debug_mode("error")
            try:
                with pytest.raises(RuntimeError, match="synchroniz"):
                    WAITS[name](there, here)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_what_is_not_waited_for_is_not_read() -> None:
    with strict() as device:
        there = torch.ones(2, device=device)
        with pytest.raises(RuntimeError, match="not waited for"):
            there.to("cpu", non_blocking=True)
        with pytest.raises((RuntimeError, TypeError), match="numpy"):
            there.numpy()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_training_there_ends_at_the_cpus_weights(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    def trained(device: torch.device) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(8, 3)
        )
        own = optimizer(model.to(device).parameters(), 0.05, weight_decay=0.1)
        for _ in range(4):
            x, target = torch.randn(6, 3, 4).to(device), torch.randint(3, (6,)).to(device)
            own.zero_grad()
            cross_entropy(model(x), target).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            own.step()
        return copy.deepcopy(model).double()

    with strict() as device:
        found, expected = trained(device).state_dict(), trained(CPU).state_dict()
        assert {value.device for value in found.values()} == {SECOND}
        assert all(torch.equal(found[name].cpu(), expected[name]) for name in expected)


# Evaluations --------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """What is left of a sequence, packed or not."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.norm = nn.GRU(3, 6, batch_first=True), nn.LayerNorm(6)

    def forward(self, sequence: Any) -> Tensor:
        last: Tensor = self.norm(self.cells(sequence)[1][-1])
        return last


class Net(nn.Module):
    """Batch norm and a recurrent encoder, each part on its own device; float64."""

    def __init__(self, places: Mapping[str, torch.device]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rgb = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.audio = Recurrent()
        self.head = nn.Linear(12, 2)
        self.double()
        for name, device in places.items():
            self.get_submodule(name).to(device)

    def forward(self, rgb: Tensor, audio: Any) -> Tensor:
        first, second, last = (next(child.parameters()).device for child in self.children())
        features = self.rgb(rgb.to(first)).to(last), self.audio(audio.to(second)).to(last)
        logits: Tensor = self.head(torch.cat(features, 1))
        return logits


def items(count: int, seed: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    target = torch.arange(count) % 2
    rgb, audio = torch.randn(count, 4, generator=draw), torch.randn(count, 2, 3, generator=draw)
    return TensorDataset((rgb + target[:, None]).double(), (audio - target[:, None, None]).double(), target)


VAL, TRAIN = items(30, 1), items(90, 2)
PER_ITEM = ("loss", "target", "prediction", "weight", "group", "rgb", "audio")


def score_of(*on_cpu: str) -> Any:
    """All that a score may give, some of it on the CPU."""

    def score(model: nn.Module, given: Any) -> dict[str, Any]:
        rgb, audio, target = given
        assert {rgb.device, target.device} == {next(model.parameters()).device}
        logits = model(rgb, audio)
        target = target.to(logits.device)
        found = {
            "loss": cross_entropy(logits, target, reduction="none"),
            "correct": (logits.argmax(1) == target).double(),
            "target": target,
            "prediction": logits.argmax(1),
            "weight": target + 1.0,
            "group": torch.arange(len(target), device=target.device) // 2,
            "rgb": torch.arange(len(target), device=target.device) > 1,
            "audio": rgb[:, 0].to(target.device) > -2,
        }
        found |= {name: found[name].cpu() for name in on_cpu}
        return {**found, "present": {name: found.pop(name) for name in ("rgb", "audio")}}

    return score


class Batch:
    """Of a class of one's own, with a `to` as classes of batches have."""

    def __init__(self, *tensors: Tensor) -> None:
        self.rgb, self.audio, self.target = tensors

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def __iter__(self) -> Iterator[Tensor]:
        return iter(vars(self).values())


def stacked(rows: Sequence[Any]) -> tuple[Tensor, ...]:
    return tuple(map(torch.stack, zip(*rows, strict=True)))


def packed(rows: Sequence[Any]) -> tuple[Any, ...]:
    rgb, audio, target = stacked(rows)
    return rgb, pack_padded_sequence(audio, 1 + target, batch_first=True, enforce_sorted=False), target


def own(rows: Sequence[Any]) -> Batch:
    return Batch(*stacked(rows))


def there(rows: Sequence[Any]) -> tuple[Tensor, ...]:
    return tuple(tensor.to(SECOND) for tensor in stacked(rows))


def measured(places: Mapping[str, torch.device], score: Any, collate: Any, **options: Any) -> dict[str, float]:
    """Every figure of an evaluation and of the guide's methods."""
    with StreamMonitor(Net(places), streams={"rgb": "rgb", "audio": "audio"}) as monitor:
        val, train = (DataLoader(data, 15, collate_fn=collate) for data in (VAL, TRAIN))
        found = dict(monitor.evaluate(val, score, train=train, **options))
        found |= monitor.compute_stream_overfitting_indicators(0.9, 1.1, 0.8, 0.7, train, val, score=score)
        return (
            found | dict(monitor.compute_stream_activations(*VAL.tensors[:2])) | dict(monitor.compute_stream_weights())
        )


WHOLE = dict.fromkeys(("rgb", "audio", "head"), SECOND)
CASES: dict[str, tuple[Mapping[str, torch.device], Any, Any, dict[str, Any]]] = {
    "every figure": (WHOLE, score_of(), stacked, {"limit": 15}),
    "exchanged in the batch": (WHOLE, score_of("target"), stacked, {"swap": {"rgb": 0, "audio": "1"}}),
    "a loss on the CPU": (WHOLE, score_of("loss"), stacked, {}),
    "all but the loss on the CPU": (WHOLE, score_of(*PER_ITEM[1:]), stacked, {}),
    "packed sequences": (WHOLE, score_of(), packed, {}),
    "a class of batches": (WHOLE, score_of(), own, {}),
    "batches there, the model here": ({}, None, there, {}),
    "the first stream there": ({"rgb": SECOND}, score_of(), stacked, {}),
    "all but the first stream there": ({"audio": SECOND, "head": SECOND}, score_of(), stacked, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_figure_of_an_evaluation_is_the_cpus(case: str) -> None:
    places, score, collate, options = CASES[case]
    expected = measured({}, score, stacked if collate is there else collate, **options)
    with strict():
        found = measured(places, score, collate, **options)
    assert found.keys() == expected.keys() and len(found) > 80
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-12, abs=1e-13, nan_ok=True), key


def test_an_evaluation_under_inference_mode_is_the_cpus() -> None:
    with strict(), torch.inference_mode():
        assert measured(WHOLE, None, stacked) == pytest.approx(measured({}, None, stacked), rel=1e-12, nan_ok=True)


def test_a_packet_on_the_host_has_values_of_the_device() -> None:
    layout = Layout((Field("whole", (2,), raw=True), Field("own", (3,), per_rank=True)))
    values = {"whole": torch.tensor([1.0, 2.0]), "own": torch.arange(3.0)}
    with strict() as device:
        found = layout.pack({name: value.to(device) for name, value in values.items()}, 0)
        assert torch.equal(found, layout.pack(values, 0))


# Steps --------------------------------------------------------------------------------------------------------------


class Apart(TwoStreams):
    """The parts that are named lie on the second device, and each is called where it lies."""

    def __init__(self, parts: Sequence[str]) -> None:
        torch.manual_seed(0)
        super().__init__()
        for name in parts:
            self.get_submodule(name).to(SECOND)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        places = {name: next(part.parameters()).device for name, part in self.named_children()}
        features = self.rgb(rgb.to(places["rgb"])), self.depth(depth.to(places["depth"]))
        logits: Tensor = self.mix(torch.cat([feature.to(places["mix"]) for feature in features], 1))
        return logits


def steps(
    model: nn.Module, wrapped: nn.Module, rank: int = 0, world: int = 1
) -> tuple[dict[str, float], list[list[str]]]:
    """The figures of a short training, and for what each monitored step waited."""
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    config = MonitorConfig(update_every=2, local_gradients=True)
    monitor = StreamMonitor(wrapped, optimizer, STREAMS, config=config)
    waited = []
    for number in range(6):
        tensors = tuple(tensor.to(device) for tensor in part(batch(seed=number), rank, world))
        optimizer.zero_grad()
        logits = wrapped(*tensors[:-1])
        loss = cross_entropy(logits, tensors[-1].to(logits.device))
        with waits() as found:
            loss.backward()
            monitor.step(loss=loss.detach(), samples=len(tensors[-1]), pair=(loss.detach(), 2.0), count=3)
            monitor.clip_grad_norm_(0.3)
        waited.append(found)
        optimizer.step()
    own = dict(monitor.compute_stream_gradients())
    monitor.close()
    return {**own, **{key: monitor.history.latest(key) for key in monitor.history}}, waited


def assert_close(found: Mapping[str, float], expected: Mapping[str, float]) -> None:
    assert found.keys() == expected.keys() and {"rgb_grad_norm", "rgb_update_ratio", "loss"} < found.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6, nan_ok=True), key


@pytest.mark.filterwarnings("ignore:no local gradients")
@pytest.mark.parametrize("parts", [("rgb", "depth", "mix"), ("rgb",), ("depth", "mix")], ids=" ".join)
def test_every_figure_of_a_step_is_the_cpus_and_only_the_read_of_the_last_one_waits(parts: Sequence[str]) -> None:
    expected, _ = steps(here := Apart(()), here)
    with strict():
        found, waited = steps(model := Apart(parts), model)
    assert_close(found, expected)
    if len(parts) == 3:
        assert waited == [[], *[["_to_copy collective.py"]] * 5]


INIT_SYNC = "init_sync" in inspect.signature(DistributedDataParallel).parameters
NO_INIT_SYNC = "as it is built, DistributedDataParallel of this PyTorch asks gloo for the device"


def over_the_host(_, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
    """DDP's mean of a bucket: gloo has no sum on the second device."""
    mean = bucket.buffer().cpu() / dist.get_world_size()
    dist.all_reduce(mean)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer().copy_(mean))
    return done


def ranks_steps() -> tuple[dict[str, float], dict[str, float]]:
    found = []
    for device in (CPU, SECOND):
        with strict():
            model = network().to(device)
            wrapped = DistributedDataParallel(model, init_sync=False)
            wrapped.register_comm_hook(None, over_the_host)
            found.append(steps(model, wrapped, dist.get_rank(), dist.get_world_size())[0])
    return found[0], found[1]


@pytest.mark.skipif(not INIT_SYNC, reason=NO_INIT_SYNC)
def test_each_ranks_own_gradients_are_read_there() -> None:
    for expected, found in run_ranks(2, ranks_steps):
        assert_close(found, expected)
        assert found["rgb_local_grad_norm_rank1"] > 0


# The application ----------------------------------------------------------------------------------------------------


def test_the_application_trains_there_to_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(run: str) -> dict[str, Any]:
        """Of a job that goes on from the checkpoint of a shorter one."""
        jobs = [[*SMALL, "evaluation=full", f"trainer.epochs={epochs}"] for epochs in (1, 2)]
        return [dict(application.train(job, str(tmp_path / run)).figures) for job in jobs][-1]

    expected = trained("here")
    monkeypatch.setattr(loop, "process_group", lambda _: strict())
    found = trained("there")
    assert found.keys() == expected.keys() and len(found) > 100
    assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)
