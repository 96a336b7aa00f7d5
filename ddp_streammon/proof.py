"""Which replicas audits have shown to be equal: parameter by parameter, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ddp_streammon.moments import Source
from ddp_streammon.ranks import bit_sum
from ddp_streammon.shards import Family, Share, local, shares
from ddp_streammon.stats import StepStats


class Proof:
    """Of every parameter of the families whether its replicas have equal gradients and weights.

    An audit shows that where all ranks hold the same bits and there is something to compare: gradients that are missing
    or zero on every rank are equal whether or not anybody synchronises them. What was shown stays so until an audit
    finds a family that differs, or a gradient that lies otherwise in memory. All of it follows from summed packets.
    Comm: none.
    """

    def __init__(self, families: Sequence[Family], rank: int, world_size: int) -> None:
        self._families = families
        self._rank = rank
        self._world_size = world_size
        self._equal = [False] * sum(family.size for family in families)
        self._differs = [False] * len(families)

    def take(self, step: StepStats, shown: Sequence[float]) -> bool:
        """Take over what an audit has found; `shown`: the sums of `shown_cells`. Whether anything is new."""
        heard = set(step.rank_facts.numbers)
        found = iter(step.replicas)
        cells = iter(shown)
        known = iter(self._equal)
        equal: list[bool] = []
        for number, family in enumerate(self._families):
            same = False
            if any(len(held) > 1 for held in family.sets):
                replicas = next(found)
                same = replicas.gradients and replicas.weights
                self._differs[number] = not same
            holders = sum(len(heard.intersection(held)) for held in family.sets)
            for _ in range(family.size):
                before, ranks = next(known), next(cells)
                equal.append(same and not math.isnan(ranks) and (before or ranks == holders))
        return self._replace(equal)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: among how many ranks (0: nothing yet), and of each parameter."""
        return {"ranks": self._world_size if any(self._equal) else 0, "equal": list(self._equal)}

    def trust(self, proof: Mapping[str, Any]) -> bool:
        """Take over a `to_dict`, where as many ranks hold as many parameters. Whether anything is new."""
        fits = (proof["ranks"], len(proof["equal"])) == (self._world_size, len(self._equal))
        return fits and self._replace(list(proof["equal"]))

    def _replace(self, equal: list[bool]) -> bool:
        before, self._equal = self._equal, equal
        return equal != before

    def shares(self, held: Sequence[Family]) -> tuple[Share, ...]:
        """What this rank reads of its families, some of their parameters left out."""
        equal = {id(parameter) for parameter, _, is_equal in self._own() if is_equal}
        halves = [(replace(f, parameters=tuple(p for p in f.parameters if id(p) in equal)), True) for f in held]
        halves += [(replace(f, parameters=tuple(p for p in f.parameters if id(p) not in equal)), False) for f in held]
        return shares([family for family, _ in halves], self._rank, [is_equal for _, is_equal in halves])

    def open(self, held: Sequence[Family]) -> list[nn.Parameter]:
        """Of `held` this rank's parameters that others hold too, and of which nothing is known yet."""
        read = _ids(held)
        alone = [len(family.peers(self._rank)) < 2 for family in self._families]
        return [
            parameter
            for parameter, number, is_equal in self._own()
            if id(parameter) in read and not (is_equal or self._differs[number] or alone[number])
        ]

    def _own(self) -> list[tuple[nn.Parameter, int, bool]]:
        """This rank's parameters, the numbers of their families, and whether they are shown to be equal."""
        start, result = 0, []
        for number, family in enumerate(self._families):
            equal = self._equal[start : start + family.size]
            result += [(p, number, is_equal) for p, is_equal in zip(family.parameters, equal, strict=False)]
            start += family.size
        return result


def checksums(families: Sequence[Family], held: Sequence[Family], gradient: Source, device: torch.device) -> Tensor:
    """Bit-sums of the gradients and of the weights that this rank holds; gradients of `held` alone.

    Shape: [F, 2] float64. Comm, Sync: none.
    """
    rows = []
    for family, squared in zip(families, held, strict=True):
        weights = [local(parameter) for parameter in family.parameters]
        gradients = [gradient(parameter) for parameter in squared.parameters]
        rows.append(torch.stack([bit_sum(tensors, device) for tensors in (gradients, weights)]))
    return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.float64, device="cpu")


def shown_cells(families: Sequence[Family], held: Sequence[Family], gradient: Source, device: torch.device) -> Tensor:
    """Of each parameter 1 where this rank's gradient shows something: where it is not missing and not all zeros.

    1 also for parts without elements, and for what is not in `held`; 0 for parameters of other ranks. nan where the
    gradient lies in memory in another order than the parameter, as it may on this rank alone: pieces that are cut in
    the order of memory would then not be the same elements on all ranks.

    Shape: [P] float64. Comm, Sync: none.
    """
    read = _ids(held)
    cells = []
    for family in families:
        for parameter in family.parameters:
            part = local(parameter)
            to_read = id(parameter) in read and part.numel() > 0
            cells.append(_shows(part, gradient(parameter)) if to_read else 1.0)
        cells += [0.0] * (family.size - len(family.parameters))
    if not cells:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    on_device = torch.ones((), dtype=torch.float64, device=device)
    return torch.stack([on_device * (cell.to(device) if isinstance(cell, Tensor) else cell) for cell in cells])


def _shows(part: Tensor, gradient: Tensor | None) -> Tensor | float:
    if gradient is None:
        return 0.0
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    elif _order(gradient) != _order(part):
        return math.nan
    return torch.count_nonzero(gradient) > 0


def _order(tensor: Tensor) -> list[int]:
    """The dimensions with several elements, in the order in which memory runs through them (`moments.torch.flat`)."""
    dimensions = [dimension for dimension in range(tensor.dim()) if tensor.shape[dimension] > 1]
    return sorted(dimensions, key=tensor.stride, reverse=True)


def _ids(families: Sequence[Family]) -> set[int]:
    return {id(parameter) for family in families for parameter in family.parameters}
