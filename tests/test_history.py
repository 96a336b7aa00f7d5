"""History: bounded, aligned, exact, and the same after a round trip."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest

from ddp_streammon.history import Entry, History


def filled(count: int, limit: int = 10_000, key: str = "loss") -> History:
    history = History(limit)
    for step in range(count):
        history.append(step, step / 10, {key: step * 0.5})
    return history


def test_an_unknown_key_is_an_empty_list_and_no_key_is_made() -> None:
    history = History()
    assert history["loss"] == []
    assert history.tail("loss", 5) == []
    assert math.isnan(history.latest("loss"))
    assert ("loss" in history, len(history), history.keys()) == (False, 0, [])


def test_values_steps_and_epochs() -> None:
    history = History()
    history.append(3, None, {"loss": 1.5, "stream1_grad_norm": math.nan})
    history.append(7, 2.0, {"loss": 1.0})
    assert history["loss"] == [1.5, 1.0]
    assert history.series("loss") == [Entry(3, None, 1.5), Entry(7, 2.0, 1.0)]
    assert history.latest("loss") == 1.0
    assert math.isnan(history.latest("stream1_grad_norm"))
    assert list(history) == history.keys() == ["loss", "stream1_grad_norm"]


def test_keys_of_different_cadence_keep_their_own_steps() -> None:
    history = History()
    for step in range(10):
        history.append(step, None, {"loss": 1.0} | ({"val_loss": 2.0} if step % 5 == 0 else {}))
    assert len(history["loss"]) == 10
    assert [entry.step for entry in history.series("val_loss")] == [0, 5]


def test_an_unknown_series_names_the_nearest_keys() -> None:
    history = History()
    history.append(0, None, {"stream1_grad_norm": 1.0, "stream2_grad_norm": 1.0, "loss": 1.0})
    with pytest.raises(KeyError, match="'stream1_gradnorm'; nearest keys: stream1_grad_norm, stream2_grad_norm"):
        history.series("stream1_gradnorm")
    with pytest.raises(KeyError, match="nothing was logged yet"):
        History().series("loss")


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 16, 100])
def test_trimming_keeps_exactly_the_last_values(limit: int) -> None:
    history = History(limit)
    for step in range(5 * limit + 3):
        history.append(step, step / 10, {"loss": step * 0.5})
        kept = range(max(0, step + 1 - limit), step + 1)
        assert history["loss"] == [n * 0.5 for n in kept]
        assert history.series("loss") == [Entry(n, n / 10, n * 0.5) for n in kept]
        assert history.tail("loss", 2 * limit) == history.series("loss")
        state = history.state_dict()["series"]["loss"]
        assert state == {"steps": [*kept], "epochs": [n / 10 for n in kept], "values": [n * 0.5 for n in kept]}
        assert history.latest("loss") == step * 0.5


def test_memory_is_bounded() -> None:
    history = History(limit=100)
    largest = 0
    for step in range(5_000):
        history.append(step, None, {"loss": 1.0})
        largest = max(largest, len(pickle.dumps(history)))
    assert largest < 20_000  # bytes; every entry kept would take 120,000


@pytest.mark.parametrize(("count", "steps"), [(0, []), (1, [9]), (3, [7, 8, 9]), (4, [6, 7, 8, 9]), (99, [6, 7, 8, 9])])
def test_tail(count: int, steps: list[int]) -> None:
    assert [entry.step for entry in filled(10, limit=4).tail("loss", count)] == steps


def test_limit_is_checked() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        History(0)


@pytest.mark.parametrize("bad", ["ConcatFusion", None, [1.0]])
def test_a_value_that_is_no_number_leaves_the_series_whole(bad: Any) -> None:
    history = filled(2)
    with pytest.raises((TypeError, ValueError)):
        history.append(2, None, {"loss": bad})
    history.append(3, None, {"loss": 9.0})
    assert history.series("loss") == [Entry(0, 0.0, 0.0), Entry(1, 0.1, 0.5), Entry(3, None, 9.0)]


def test_state_dict_round_trip_through_json() -> None:
    history = filled(20, limit=7)
    history.append(2**40, None, {"loss": 0.1 + 0.2, "odd": math.nan, "tiny": 5e-324, "most": -math.inf})
    state = json.loads(json.dumps(history.state_dict()))
    restored = History(limit=7)
    restored.append(0, None, {"forgotten": 1.0})
    restored.load_state_dict(state)
    assert repr(restored.state_dict()) == repr(history.state_dict())
    assert restored.keys() == history.keys()
    assert restored.series("loss") == history.series("loss")
    assert restored.series("loss")[-1] == Entry(2**40, None, 0.1 + 0.2)
    for each in (history, restored):
        each.append(2**40 + 1, 3.0, {"loss": 1.0})
    assert repr(restored.state_dict()) == repr(history.state_dict())


def test_a_state_is_a_copy() -> None:
    history = filled(3)
    state = history.state_dict()
    history.append(3, None, {"loss": 1.0})
    assert state["series"]["loss"]["steps"] == [0, 1, 2]


@pytest.mark.parametrize(("limit", "steps"), [(3, [7, 8, 9]), (100, list(range(10)))])
def test_loading_keeps_the_own_limit(limit: int, steps: list[int]) -> None:
    history = History(limit)
    history.load_state_dict(filled(10).state_dict())
    assert history.limit == limit
    assert [entry.step for entry in history.series("loss")] == steps
