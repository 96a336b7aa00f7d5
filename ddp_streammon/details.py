"""What the evidence rules ask for beside the gradients' norms, as the fields `SAMPLES` and `DETAIL` of a packet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddp_streammon.facts import Facts
from ddp_streammon.inputs import Inputs
from ddp_streammon.packet import ASIDE, Draft
from ddp_streammon.plan import Plan
from ddp_streammon.sampled import Sampled
from ddp_streammon.shards import Share
from ddp_streammon.stats import DETAIL, SAMPLES, SCALARS
from ddp_streammon.streams import StreamSet
from ddp_streammon.user_numbers import Numbers

LOSS = "loss"
"""The user's number that rules know as each rank's loss."""


class Details:
    """Samples of weights, gradients and inputs. `say` what the host knows, `write` the rest, `end`.

    Comm: none. Sync: none.
    """

    def __init__(
        self,
        streams: StreamSet,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        device: torch.device,
        facts: Facts,
        every: int,
    ) -> None:
        """`every`: calls from one measurement to the next."""
        self._number = len(streams.streams)
        self._facts = facts
        self._sampled = Sampled(streams, optimizers, device, every)
        self._inputs = Inputs(streams, model, device)
        self.aside = self._inputs.place_cells
        """Cells that a draft has aside for it."""

    @property
    def layers(self) -> Share:
        """What is to be read with the gradients, for `write`: as streams behind the last one, two a stream."""
        return self._sampled.layers(self._number)

    @property
    def generation(self) -> int:
        """Changes where `write` would do other operations, or those on other memory."""
        return self._sampled.generation

    def say(self, draft: Draft, plan: Plan, call: int, given: Numbers) -> None:
        """What the host knows, and zeros where `write` is to write. `given`: the user's numbers."""
        rows, unknown = self._sampled.begin(call)
        seen, places = self._inputs.begin()
        loss = math.nan
        if LOSS in plan.scalars and not given.waiting:
            first = 4 * list(plan.scalars).index(LOSS)
            _, weighted, weight, _ = given.cells[first : first + 4]
            loss = weighted / weight if weight else math.nan
        own = (0.0, unknown) * len(rows)
        draft.say(SAMPLES, [cell for row in rows for cell in row])
        draft.say(DETAIL, [loss, self._facts.share_in_eval(), *self._facts.base_rates(), *own, *seen])
        draft.say(ASIDE, places)

    def write(self, draft: Draft, plan: Plan, layers: Tensor, *, waiting: bool) -> None:
        """What the device knows, in place. The same operations each time, on the same memory.

        Shape: the moments of `layers` [2 S, 7]. `waiting`: whether the user's numbers came from the device.
        """
        detail, streams = draft.at(DETAIL), self._number
        if waiting and LOSS in plan.scalars:
            loss = draft.at(SCALARS).view(-1, 4)[list(plan.scalars).index(LOSS)]
            detail[0] = loss[1] / loss[2]  # nan where it was not given, or is not finite
        own = detail[2 + streams : 2 + 3 * streams].view(streams, 2)
        self._sampled.write(layers, draft.at(SAMPLES).view(streams, -1), own)
        self._inputs.write(detail[2 + 3 * streams :], draft.at(ASIDE))

    def end(self) -> None:
        """What `write` does is queued: batches may go."""
        self._inputs.end()

    def look_at_next(self, wanted: bool) -> None:
        """Whether the next forwards belong to a monitored step."""
        self._inputs.armed = wanted

    def remember_weights(self, call: int) -> None:
        """Before the optimizer's step number `call`, of which the next call is to see the change."""
        self._sampled.look(call)

    def stop(self) -> None:
        """Take the hooks off the model."""
        self._sampled.stop()
        self._inputs.stop()
