"""packet.py: one vector, a frozen layout, slots that gather exactly."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ddp_streammon.packet import ASIDE, Draft, Field, Layout
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


def layout_of(streams: int, scalars: int, world: int, **options: Any) -> Layout:
    return step_layout([f"s{i}" for i in range(streams)], [f"u{i}" for i in range(scalars)], world, **options)


@pytest.mark.parametrize(("streams", "scalars", "world"), [(1, 0, 1), (2, 3, 4), (7, 5, 64)])
def test_a_steps_cells_are_counted(streams: int, scalars: int, world: int) -> None:
    plain, slot = 7 * streams + 4 * scalars + 4, 3 * streams + 6
    layout = layout_of(streams, scalars, world)
    assert (layout.turns, layout.size) == (1, plain + world * slot)
    assert layout.zeros().shape == (layout.size,)
    assert layout_of(streams, scalars, world, updates=True, linear=9).size == layout.size + 2 * streams + 9
    assert layout_of(streams, scalars, world, families=2, parameters=7).size == layout.size + world * 4 + 7


@pytest.mark.parametrize("world", [1024, 4096])
def test_a_packet_stays_within_64_kib_and_every_rank_has_its_turn(world: int) -> None:
    layout = layout_of(4, 3, world)
    assert layout.size * 8 <= 65_536
    heard = [rank for turn in range(layout.turns) for rank in layout.heard(turn)]
    assert sorted(heard) == list(range(world))
    audit = layout_of(4, 3, world, families=4)
    assert audit.turns == 1  # replicas are compared within one packet


def test_in_its_turn_a_rank_fills_its_own_slots_exactly() -> None:
    layout = Layout((Field("sum"), Field("slot", (2,), per_rank=True)), world_size=5, limit_bytes=5 * 8)
    assert (layout.turns, layout.size) == (3, 1 + 2 * 2)
    for turn in range(4):
        packets = [
            layout.pack({"sum": torch.tensor(1.0), "slot": torch.tensor([rank, -rank])}, rank, turn=turn)
            for rank in range(5)
        ]
        fields = layout.unpack(torch.stack(packets).sum(0), turn)
        heard = list(layout.heard(turn))
        assert heard == list(range(turn % 3, 5, 3))
        assert fields["sum"] == 5.0
        assert [list(of_ranks) for of_ranks in fields["slot"]] == [heard, [-rank for rank in heard]]
        assert [list(fields["slot"].of_rank(place)) for place in range(len(heard))] == [[rank, -rank] for rank in heard]


def test_each_field_of_the_slots_has_its_own_cells_alone() -> None:
    layout = Layout((Field("a", (2,), per_rank=True), Field("b", (1,), per_rank=True)), world_size=3)
    fields = layout.unpack(torch.arange(9.0, dtype=torch.float64))
    assert ([*map(list, fields["a"])], [*map(list, fields["b"])]) == ([[0, 3, 6], [1, 4, 7]], [[2, 5, 8]])
    assert (list(fields["a"].of_rank(1)), list(fields["b"].of_rank(2))) == ([3, 4], [8])
    for cell in (2, -1):
        with pytest.raises(IndexError, match=f"no cell {cell} in slots of 2"):
            fields["a"][cell]


def test_a_plain_field_can_be_viewed_where_it_lies_and_a_raw_one_stays_a_tensor() -> None:
    layout = Layout((Field("a"), Field("b", (2, 2)), Field("c", (3,), raw=True), Field("d", per_rank=True)), 2)
    sent = {"a": torch.tensor(1.0), "b": torch.arange(4.0).view(2, 2), "c": torch.arange(3.0), "d": torch.tensor(7.0)}
    packet = layout.pack(sent, 1)
    assert torch.equal(layout.view(packet, "b"), sent["b"].double())
    assert layout.view(packet, "b").data_ptr() == packet[1:].data_ptr()
    fields = layout.unpack(packet)
    assert torch.equal(fields.pop("c"), sent["c"].double())
    assert list(fields.pop("d")) == [0.0, 7.0]
    assert fields == {"a": 1.0, "b": [[0.0, 1.0], [2.0, 3.0]]}
    with pytest.raises(KeyError, match="no plain field 'd'; plain fields: a, b, c"):
        layout.view(packet, "d")


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


TURNS = Layout((Field("one"), Field("table", (2, 3)), Field("slots", (2,), per_rank=True)), 4, limit_bytes=80)


@pytest.mark.parametrize("rank", range(4))
def test_a_draft_is_the_packet_that_pack_makes(rank: int) -> None:
    given = values(rank)
    for turn in range(TURNS.turns):
        draft = Draft(TURNS, rank, turn, aside=3)
        draft.say("one", [0.5])
        draft.say("slots", given["slots"].tolist())
        draft.say(ASIDE, [7.0, 8.0, 9.0])
        draft.send(None)
        draft.put("one", given["one"])
        draft.put("table", given["table"][:, :2].reshape(-1)[:3])
        draft.put("table", given["table"].view(-1)[3:], 3)
        draft.at("table")[:3] = given["table"][0]
        assert torch.equal(draft.packet, TURNS.pack(given, rank, turn=turn))
        assert draft.at(ASIDE).tolist() == [7, 8, 9]
        assert draft.at("slots").tolist() == given["slots"].tolist(), "also where they are not sent"


def test_a_draft_is_written_where_it_is_wanted() -> None:
    draft = Draft(LAYOUT, 1)
    cells = torch.full((draft.cell_count,), 5.0, dtype=torch.float64)
    draft.say("slots", [1.0, 2.0])
    draft.send(cells)
    assert draft.packet.data_ptr() == cells.data_ptr()
    assert cells.tolist() == [0.0] * 9 + [1.0, 2.0] + [0.0] * 2
