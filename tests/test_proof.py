"""Replicas are shared out among ranks once an audit has shown something equal, and not before."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import MonitorConfig, RuleSet, StreamMonitor
from ddp_streammon.plan import Measurement
from ddp_streammon.proof import Proof, shown_cells
from ddp_streammon.rank_facts import RankFacts
from ddp_streammon.ranks import Replicas
from ddp_streammon.shards import Family
from ddp_streammon.stats import StepStats
from tests.layouts import Collectives
from tests.ranks import run_ranks
from tests.steps import ranks_of

STEPS = 24
OPENS = 5
"""The first step in which what was frozen, or behind a gate of zero, has a gradient."""
SIZE = 6 * 5 + 5


class Gated(nn.Module):
    """Streams `a` behind a gate, and `b`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)
        self.gate = 1.0

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.b(x) + self.gate * self.a(x)
        return output


@dataclass(frozen=True)
class Answer:
    """Of one rank, step by step: the norm of `a` and what it is by definition, and the collectives; the calls that
    were audits; the elements that it reads at the end; and the findings."""

    norms: list[float]
    expected: list[float]
    collectives: list[int]
    audits: list[int]
    read: int
    findings: set[tuple[str, str | None]]


def _watched(kind: str) -> Answer:
    """`kind`: how the gradients of `a` begin, and whether DDP synchronises it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Gated()
    begins, _, synchronised = kind.partition(", ")
    if begins == "frozen":
        model.a.requires_grad_(False)
    if synchronised:
        model.a = DistributedDataParallel(model.a)  # type: ignore[assignment]
    model.b = DistributedDataParallel(model.b)  # type: ignore[assignment]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = StreamMonitor(model, optimizer, {"a": "a", "b": "b"}, config=MonitorConfig(rules=RuleSet.off))
    prove = monitor._meter.prove
    audits: list[int] = []

    def noted(audit: Measurement) -> None:
        audits.append(audit.call)
        prove(audit)

    monitor._meter.prove = noted  # type: ignore[method-assign]
    norms, expected, collectives = [], [], []
    for step in range(1, STEPS + 1):
        if begins == "frozen" and step == OPENS:
            model.a.requires_grad_(True)
        model.gate = float(begins == "frozen" or (begins == "gated" and step >= OPENS))
        optimizer.zero_grad()
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(world * step + rank))
        model(x).square().mean().backward()
        with Collectives() as counted:
            figures = monitor.step()
        collectives.append(counted.count)
        norms.append(figures["a_grad_norm"])
        gradients = [parameter.grad for parameter in model.a.parameters() if parameter.grad is not None]
        square = torch.tensor(sum(gradient.double().square().sum().item() for gradient in gradients))
        dist.all_reduce(square)
        expected.append(math.sqrt(square.item() / world) if gradients else math.nan)
        optimizer.step()
    monitor.flush()
    read = sum(piece.stop - piece.start for share in monitor._meter.shares for piece in share.pieces)
    found = {(finding.rule, finding.stream) for finding in monitor.get_recommendations()}
    monitor.close()
    return Answer(norms, expected, collectives[1:], audits, read, found)


AUDITS = {
    "frozen": [1, OPENS + 2],
    "gated": [1, 5],
    "gated, synchronised": [1, 5],
    "zero, synchronised": [1, 5, 9, 13, 21],
}
"""What stays missing asks for no audit; what stays zero asks ever more rarely."""


@pytest.mark.parametrize("kind", AUDITS)
def test_gradients_that_were_missing_or_zero_are_compared_when_they_come(kind: str) -> None:
    answers = run_ranks(2, _watched, kind)
    for answer in answers:
        assert answer.norms == pytest.approx(answer.expected, rel=1e-6, nan_ok=True)
        assert answer.collectives == [1] * (STEPS - 1)
        assert answer.audits == AUDITS[kind]
        told = {stream for rule, stream in answer.findings if rule in ("SYNC", "DESYNC")}
        assert told == (set() if "synchronised" in kind else {"a"})
    read = sum(answer.read for answer in answers)
    assert read == (2 * SIZE if kind == "gated, synchronised" else 3 * SIZE)


def _transposed_on_rank_0() -> list[tuple[float, float]]:
    """The norm and the largest element of a synchronised gradient that rank 0 has in another order of memory."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(100, 120, bias=False)})
    monitor = StreamMonitor(model, None, {"a": "a"}, config=MonitorConfig(rules=RuleSet.off))
    found = []
    for _ in range(4):
        gradient = torch.arange(12_000.0).view(120, 100)
        model["a"].weight.grad = gradient.t().contiguous().t() if dist.get_rank() == 0 else gradient
        figures = monitor.step()
        found.append((figures["a_grad_norm"], figures["a_grad_max"]))
    return found


def test_gradients_in_another_order_of_memory_are_not_cut() -> None:
    expected = (torch.arange(12_000.0).double().norm().item(), 11_999.0)
    for answer in run_ranks(2, _transposed_on_rank_0):
        assert answer == [pytest.approx(expected)] * 4


def test_the_order_of_memory_is_asked_where_it_matters() -> None:
    """Not of dimensions of one element, nor of gaps; sparse gradients are never cut."""
    images, gaps, alone = torch.zeros(4, 3, 2, 2), torch.zeros(4, 12)[:, ::2], torch.zeros(5, 1)
    parameters = [nn.Parameter(tensor) for tensor in (images, gaps, alone, torch.zeros(3, 2))]
    gradients: list[Tensor | None] = [
        torch.ones(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.ones(4, 6),
        torch.ones(1, 5).t(),
        torch.ones(3, 2).to_sparse(),
    ]
    family = Family(0, ((0, 1),), tuple(parameters), size=4, first=True)
    source = dict(zip(map(id, parameters), gradients, strict=True))
    cells = shown_cells([family], [family], lambda parameter: source[id(parameter)], torch.device("cpu"))
    assert cells.tolist() == pytest.approx([math.nan, 1, 1, 1], nan_ok=True)


def test_what_cannot_be_read_shows_that_it_is_equal() -> None:
    """Parts without elements, and what is not among those to be read; missing and zero gradients show nothing."""
    parameters = [nn.Parameter(torch.zeros(size)) for size in (0, 3, 3, 3, 3)]
    parameters[2].grad, parameters[4].grad = torch.zeros(3), torch.tensor([0.0, 0.0, 1.0])
    family = Family(0, ((0, 1),), tuple(parameters), size=6, first=True)
    held = Family(0, ((0, 1),), (parameters[0], *parameters[2:]), size=6, first=True)
    cells = shown_cells([family], [held], lambda parameter: parameter.grad, torch.device("cpu"))
    assert cells.tolist() == [1, 1, 0, 0, 1, 0]


EVERY = 4
"""Calls from one audit to the next."""


def _apart_from_step_6_on() -> list[float]:
    """Norms of a weight whose gradients are equal until rank 1 alone has one, of one element."""
    model = nn.ModuleDict({"a": nn.Linear(100, 100, bias=False)})
    monitor = StreamMonitor(model, streams={"a": "a"}, config=MonitorConfig(audit_every=EVERY))
    norms = []
    for step in range(1, 13):
        model["a"].weight.grad = torch.full((100, 100), float(step < 6))
        model["a"].weight.grad[0, 0] += dist.get_rank() * (step >= 6)
        norms.append(monitor.step()["a_grad_norm"])
    return norms


def test_replicas_that_part_are_read_in_full_after_the_next_audit() -> None:
    """The audits are steps 1, 5 and 9, and what they show is taken over after the step behind them."""
    for norms in run_ranks(2, _apart_from_step_6_on):
        assert norms == [pytest.approx(100)] * 5 + [0] * 5 + [pytest.approx(0.5**0.5)] * 2


def audit(*found: tuple[bool, bool], ranks: int = 4) -> StepStats:
    """An audit that so many ranks took part in; of each family whether gradients and weights are equal."""
    facts = tuple(RankFacts(rank, (), (), 1.0, 1.0, 1.0, 1.0) for rank in range(ranks))
    replicas = tuple(Replicas("a", gradients=g, weights=w, ranks=()) for g, w in found)
    return StepStats(1, None, {}, {}, ranks, (), scaled=False, rank_facts=ranks_of(facts), replicas=replicas)


def proof_of(sets: tuple[tuple[int, ...], ...] = ((0, 1), (2, 3))) -> tuple[Proof, Family]:
    family = Family(0, sets, tuple(nn.Parameter(torch.zeros(8)) for _ in range(3)), size=3, first=True)
    return Proof([family], 1, 4), family


def test_only_parameters_that_every_holder_has_shown_are_equal() -> None:
    proof, family = proof_of()
    assert proof.take(audit((True, True)), [4, 2, 0])
    assert proof.to_dict() == {"ranks": 4, "equal": [True, False, False]}
    assert proof.open([family]) == list(family.parameters[1:])
    assert [(share.weight, len(share.pieces)) for share in proof.shares([family])] == [(1.0, 1), (0.5, 2)]
    assert proof.take(audit((True, True), ranks=3), [0, 3, 2])  # under `Join` one has left: three hold all there is
    assert proof.to_dict()["equal"] == [True, True, False]


def test_a_gradient_that_lies_otherwise_in_memory_is_no_longer_cut() -> None:
    proof, _ = proof_of()
    proof.take(audit((True, True)), [4, 4, 0])
    assert proof.take(audit((True, True)), [4, math.nan, 0])
    assert proof.to_dict()["equal"] == [True, False, False]


@pytest.mark.parametrize("found", [(False, True), (True, False)])
def test_what_differs_is_no_longer_equal_and_asks_no_more(found: tuple[bool, bool]) -> None:
    proof, family = proof_of()
    proof.take(audit((True, True)), [4, 4, 0])
    assert proof.take(audit(found), [4, 4, 4])
    assert proof.to_dict() == {"ranks": 0, "equal": [False] * 3}
    assert proof.open([family]) == []


def test_what_one_rank_holds_alone_is_never_asked_for() -> None:
    proof, family = proof_of(((0,), (1,), (2,), (3,)))
    assert not proof.take(audit(), [4, 4, 4])
    assert proof.open([family]) == []


def test_a_proof_is_trusted_by_as_many_ranks_that_hold_as_much() -> None:
    proof, _ = proof_of()
    proof.take(audit((True, True)), [4, 4, 0])
    other, _ = proof_of()
    assert not other.trust({**proof.to_dict(), "ranks": 3})
    assert not other.trust({"ranks": 4, "equal": [True]})
    assert other.trust(proof.to_dict())
    assert other.to_dict() == proof.to_dict()
