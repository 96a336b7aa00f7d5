"""packet.py: one vector, a frozen layout, slots that gather exactly."""

from __future__ import annotations

import math
import struct

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ddp_streammon.packet import Field, Layout
from ddp_streammon.stats import step_layout
from tests.ranks import run_ranks

LAYOUT = Layout((Field("one"), Field("table", (2, 3)), Field("slots", (2,), per_rank=True), Field("none", (0, 4))), 3)
SPECIAL = [math.nan, math.inf, -math.inf, 5e-324, -0.1, 1e308, 3.0]


def values(rank: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(rank)
    return {
        "one": torch.randn((), dtype=torch.float64),
        "table": torch.randn(2, 3, dtype=torch.float64),
        "slots": torch.randn(2, dtype=torch.float64),
        "none": torch.zeros(0, 4, dtype=torch.float64),
    }


def unpacked(packet: Tensor) -> dict[str, Tensor]:
    """The fields as tensors, to compare."""
    shapes = {field.name: (*field.shape, 3) if field.per_rank else field.shape for field in LAYOUT.fields}
    return {
        name: torch.tensor(cells, dtype=torch.float64).view(shapes[name])
        for name, cells in LAYOUT.unpack(packet).items()
    }


def test_the_size_counts_a_slot_for_each_rank() -> None:
    assert LAYOUT.size == 1 + 6 + 2 * 3 + 0
    assert Layout(()).size == 0


@pytest.mark.parametrize(("streams", "scalars", "world"), [(1, 0, 1), (2, 3, 4), (7, 5, 1024)])
def test_a_step_takes_5s_and_sw_and_4w_and_4u_cells(streams: int, scalars: int, world: int) -> None:
    layout = step_layout([f"s{i}" for i in range(streams)], [f"u{i}" for i in range(scalars)], world)
    assert layout.size == 5 * streams + streams * world + 4 * world + 4 * scalars
    assert layout.zeros().shape == (layout.size,)


def test_unpack_inverts_pack_and_other_ranks_slots_are_zero() -> None:
    sent = values()
    packet = LAYOUT.pack(sent, rank=1)
    assert (packet.dtype, packet.shape) == (torch.float64, (13,))
    fields = unpacked(packet)
    assert set(fields) == set(sent)
    for name in ("one", "table", "none"):
        assert torch.equal(fields[name], sent[name])
    assert torch.equal(fields["slots"][:, 1], sent["slots"])
    assert fields["slots"][:, [0, 2]].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_adding_packets_adds_fields_and_gathers_slots_in_any_order() -> None:
    sent = [values(rank) for rank in range(3)]
    packets = [LAYOUT.pack(each, rank) for rank, each in enumerate(sent)]
    total = unpacked(sum(packets, LAYOUT.zeros()))
    assert torch.equal(total["slots"], torch.stack([each["slots"] for each in sent], dim=1))
    torch.testing.assert_close(total["table"], sum(each["table"] for each in sent), rtol=1e-15, atol=1e-15)
    again = unpacked(packets[2] + (packets[0] + packets[1]))
    assert torch.equal(again["slots"], total["slots"])


def test_the_zero_packet_is_the_identity() -> None:
    packet = LAYOUT.pack(values(), rank=2)
    assert torch.equal(packet + LAYOUT.zeros(), packet)


def _gathered() -> bytes:
    """The bytes of the summed slots: rank r sends the special values rotated by r."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layout = Layout((Field("slots", (len(SPECIAL),), per_rank=True),), world)
    sent = torch.tensor(SPECIAL[rank:] + SPECIAL[:rank], dtype=torch.float64)
    packet = layout.pack({"slots": sent}, rank)
    dist.all_reduce(packet)
    return packet.numpy().tobytes()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_special_values_arrive_exactly_and_bit_equal_on_all_ranks(world: int) -> None:
    received = run_ranks(world, _gathered)
    assert len(set(received)) == 1
    cells = struct.unpack(f"{len(SPECIAL) * world}d", received[0])
    for rank in range(world):
        expected = SPECIAL[rank:] + SPECIAL[:rank]
        own = cells[rank * len(SPECIAL) : (rank + 1) * len(SPECIAL)]
        assert [repr(value) for value in own] == [repr(value) for value in expected]
