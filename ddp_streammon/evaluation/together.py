"""Ranks that evaluate together: an error on one is raised on all, and forwards that hold collectives stay in step."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ddp_streammon.collective import Collective
from ddp_streammon.evaluation.items import Share

T = TypeVar("T")
_NOTHING: Any = object()
_numbers = itertools.count()
"""Ranks make the same evaluations, so a number of this process names the same one on each."""


class Stranded(RuntimeError):
    """This rank cannot make the forwards that the others wait for, or they do not make theirs."""


def describe(error: Exception) -> str:
    """What travels of an exception."""
    return f"{type(error).__name__}: {error}"


def raise_together(errors: Sequence[str | None], own: Exception | None) -> None:
    """Raise on every rank what any rank ran into; `errors` by rank, `own` this rank's."""
    failed = [rank for rank, error in enumerate(errors) if error is not None]
    if not failed:
        return
    if own is not None and (len(errors) == 1 or (isinstance(own, ValueError) and len(failed) == len(errors))):
        raise own
    raise RuntimeError(f"the evaluation failed on rank {failed[0]}: {errors[failed[0]]}") from own


class Apart:
    """Each rank at its own pace: the forward holds no collective."""

    failure: Exception | None = None
    """What this rank ran into without raising it yet."""

    def following(self) -> contextlib.AbstractContextManager[None]:
        """Around everything that ranks do together."""
        return contextlib.nullcontext()

    def rounds(
        self, share: Callable[[], Share], prepare: Callable[[Any], Any], name: str
    ) -> Iterator[tuple[int | None, Any]]:
        """This rank's batches, prepared, with their places; None for one that does not count."""
        for place, batch in share().batches:
            yield place, prepare(batch)

    def attempt(self, scored: Callable[[Any], T], batch: Any) -> T | None:
        """What `scored` gives for the batch."""
        return scored(batch)

    def agree(self, same: bool) -> bool:
        """Whether it is so on every rank that it matters to."""
        return same


class Lockstep(Apart):
    """As many forwards on each rank as on every other, since they hold collectives.

    A rank that has run out of batches, or whose batch cannot be scored, makes the forwards of another batch, which
    counts for nothing; before the next batch all ranks learn of a failure and stop. An exception out of the forward
    itself, or before the first one, cannot be mended like that. It is raised at once, and told to the others through
    the process group's store: they read it there when their collective has failed, at the latest after the group's
    timeout.
    """

    def __init__(self, model: nn.Module, collective: Collective) -> None:
        self._model = model
        self._collective = collective
        self._key = f"ddp_streammon/evaluation/{next(_numbers)}"
        self._begun = self._ended = 0
        self._usual = 1
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._stand_in: Any = _NOTHING

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._begun += 1
            self._call = args, kwargs

        def end(*_: Any) -> None:
            self._ended += 1

        # The first hook before the forward and the last one after it: collectives of other hooks lie between them.
        handles = [
            self._model.register_forward_pre_hook(begin, prepend=True, with_kwargs=True),
            self._model.register_forward_hook(end),
        ]
        try:
            yield
        except Stranded:
            raise
        except Exception as error:
            raise self._told(error) from error
        finally:
            for handle in handles:
                handle.remove()

    def rounds(
        self, share: Callable[[], Share], prepare: Callable[[Any], Any], name: str
    ) -> Iterator[tuple[int | None, Any]]:
        """As often on every rank as on the one with the most batches; ends on all of them after a failure.

        Comm: one all_reduce(SUM) before each batch. Sync: blocks.
        """
        mine = self._noting(share)
        batches = iter(mine.batches) if mine is not None else iter(())
        while True:
            given = self._noting(lambda: next(batches, None))
            if given is not None:
                self._stand_in = given[1]
            elif self._stand_in is _NOTHING and mine is not None and self.failure is None:
                spare = self._noting(mine.spare)
                self._stand_in = _NOTHING if spare is None else spare
            prepared = self._noting(lambda: prepare(self._stand_in)) if self._stand_in is not _NOTHING else _NOTHING
            failed = self.failure is not None
            having, failing, lacking = self._sums(given is not None, failed, prepared is _NOTHING and not failed)
            if failing or not having:
                return
            if lacking:
                if prepared is _NOTHING:
                    self.failure = ValueError(
                        f"{name}: there is no batch on this rank, and the parameters are sharded, so that each rank "
                        "has to take part in every forward; give each rank one batch at least, or pass a DataLoader "
                        "over the whole map-style data set, which is shared out here"
                    )
                return
            yield None if given is None else given[0], prepared

    def attempt(self, scored: Callable[[Any], T], batch: Any) -> T | None:
        """What `scored` gives; None where it raised outside of the forward, which has been made all the same."""
        begun = self._begun
        try:
            result = scored(batch)
        except Exception as error:
            self._note(error)
            if self._begun != self._ended or self._call is None:
                raise self._told(error) from error
            args, kwargs = self._call
            try:
                for _ in range(self._begun - begun, self._usual):
                    self._model(*args, **kwargs)
            except Exception as other:
                raise self._told(other) from other
            return None
        self._usual = self._begun - begun
        return result

    def agree(self, same: bool) -> bool:
        """Comm: one all_reduce(SUM). Sync: blocks."""
        (different,) = self._sums(not same)
        return not different

    def _sums(self, *flags: bool) -> list[float]:
        packet = torch.tensor(flags, dtype=torch.float64, device="cpu")
        try:
            return self._collective.all_reduce(packet.to(self._collective.device_for(packet.device))).wait().tolist()
        except Exception as error:
            raise self._told(error) from error

    def _noting(self, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Exception as error:
            self._note(error)
            return None

    def _note(self, error: Exception) -> None:
        self.failure = self.failure or error
        self._told(error)

    def _told(self, error: Exception) -> Stranded:
        """Tell the others of the error; the first that anyone has told of in this evaluation."""
        first = f"{self._collective.topology.rank} {describe(error)}"
        with contextlib.suppress(Exception):  # the store may have gone with its rank: then this rank's own error it is
            store = dist.distributed_c10d._get_default_store()
            first = store.compare_set(self._key, "", first).decode()
        rank, _, text = first.partition(" ")
        return Stranded(f"the evaluation failed on rank {rank}: {text}")


def pace_of(model: nn.Module, collective: Collective) -> Apart:
    """In lockstep where the parameters are sharded (FSDP2, HSDP, tensor parallel), so that forwards communicate."""
    sharded = any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )
    return Lockstep(model, collective) if sharded and collective.topology.world_size > 1 else Apart()
