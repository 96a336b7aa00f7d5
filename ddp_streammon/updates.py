"""What the optimizer really changes: the update-to-weight ratio of each stream, on a cadence of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ddp_streammon.moments import SQ_SUM, reader
from ddp_streammon.moments.torch import flat
from ddp_streammon.shards import Piece, Share, local


class Updates:
    """Norms of weight updates, over this rank's share of the weights that an optimizer can change.

    Every `every` calls (0: never) the share is copied before the optimizer's step and compared at the next call; the
    figures ride in the next packet. Memory: a copy of this rank's share of the weights. Comm, Sync: none.

    The ratio of update and weight norms is a common health figure, near 1e-3 for SGD on images (A. Karpathy, Stanford
    CS231n notes, "Ratio of weights:updates").
    """

    def __init__(self, shares: Sequence[Share], num_streams: int, device: torch.device, every: int) -> None:
        self.every = every
        self._num_streams = num_streams
        self._device = device
        self._table: Tensor | None = None
        self._shares = self._next_shares = _changeable(shares)
        self._copies: list[Tensor] = []
        self._armed = False

    @property
    def pending(self) -> bool:
        """Whether figures wait for a packet."""
        return self._table is not None

    def share(self, shares: Sequence[Share]) -> None:
        """Copy another share of the weights from the next time on; what is copied is still compared."""
        self._next_shares = _changeable(shares)

    @torch.no_grad()
    def look(self, call: int) -> None:
        """Before the optimizer's step of `call`: compare with the copy of the last call, if there is one; make one."""
        if not self.every:
            return
        if self._armed:
            self._compare()
        self._armed = (call - 1) % self.every == 0
        if self._armed:
            self._copy()

    def take(self) -> Tensor | None:
        """[S, 2] squared norms of the last update and of the weights before it; None where there is nothing new."""
        table, self._table = self._table, None
        return table

    def _weights(self) -> list[Tensor]:
        """This rank's share of the weights, as they are in memory."""
        pieces = (piece for share in self._shares for piece in share.pieces)
        return [flat(local(piece.parameter.detach()))[piece.start : piece.stop] for piece in pieces]

    def _copy(self) -> None:
        if self._shares is not self._next_shares:
            self._shares = self._next_shares
            self._copies = []
        weights = self._weights()
        if self._copies:
            torch._foreach_copy_(self._copies, weights)
            return
        copies = [nn.Parameter(weight.clone(), requires_grad=False) for weight in weights]
        self._copies = [copy.detach() for copy in copies]
        one_by_one = iter(copies)
        own = [
            Share(tuple(_of_copy(piece, next(one_by_one)) for piece in share.pieces), share.weight)
            for share in self._shares
        ]
        self._read = reader(own, self._num_streams, self._device)

    def _compare(self) -> None:
        before = self._read(Tensor.detach)[:, SQ_SUM]
        if self._copies:
            torch._foreach_sub_(self._copies, self._weights())
        self._table = torch.stack([self._read(Tensor.detach)[:, SQ_SUM], before], dim=1)


def _changeable(shares: Sequence[Share]) -> list[Share]:
    """Without what no optimizer changes: integers, booleans, and 8-bit floats, in which PyTorch does not calculate."""
    return [replace(share, pieces=tuple(p for p in share.pieces if _is_changeable(p.parameter))) for share in shares]


def _is_changeable(weight: Tensor) -> bool:
    return (weight.is_floating_point() and weight.element_size() > 1) or weight.is_complex()


def _of_copy(piece: Piece, copy: nn.Parameter) -> Piece:
    return Piece(piece.stream, copy, 0, copy.numel(), whole=True, counts=piece.counts)
