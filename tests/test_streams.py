"""streams.py: which parameter, module and input belongs to which stream."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon.streams import StreamSet, StreamSpec
from tests.ranks import run_ranks


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(4, 4)
        self.lora = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(self.block(x))


class Towers(nn.Module):
    """vision (28 elements), text (10), head (6)."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = Vision()
        self.text = nn.Linear(4, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.vision(x) + self.text(y))


class Numbered(nn.Module):
    """Streams found by name: a module, a parameter inside a module, and a tenth stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stream1 = nn.Linear(2, 2)
        self.stream10 = nn.Linear(2, 2)
        self.conv = nn.Module()
        self.conv.stream1_weight = nn.Parameter(torch.zeros(3))
        self.conv.stream2_weight = nn.Parameter(torch.zeros(3))
        self.upstream1 = nn.Linear(2, 2)


def names(streams: StreamSet) -> dict[str, list[str]]:
    return {stream.name: [item.name for item in stream.parameters] for stream in streams.streams}


def roots(streams: StreamSet) -> dict[str, tuple[str, ...]]:
    return {stream.name: stream.roots for stream in streams.streams}


VISION, LORA = ["vision.block.weight", "vision.block.bias"], ["vision.lora.weight"]
TEXT, HEAD = ["text.weight", "text.bias"], ["head.weight", "head.bias"]


def test_numbered_names_are_streams_and_ten_is_not_one() -> None:
    assert names(StreamSet.resolve(Numbered())) == {
        "stream1": ["stream1.weight", "stream1.bias", "conv.stream1_weight"],
        "stream2": ["conv.stream2_weight"],
        "stream10": ["stream10.weight", "stream10.bias"],
        "shared": ["upstream1.weight", "upstream1.bias"],
    }


def test_else_top_level_children_above_one_percent() -> None:
    model = Towers()
    model.tiny = nn.Parameter(torch.zeros(1))
    model.add_module("scale", nn.Linear(1, 1, bias=False))
    model.add_module("big", nn.Linear(10, 10))
    streams = StreamSet.resolve(model)  # 156 elements: the scale's one is 0.6 %
    assert streams.user_names == ("vision", "text", "head", "big")
    assert names(streams)["shared"] == ["tiny", "scale.weight"]


def test_children_that_cannot_be_stream_names_are_shared() -> None:
    model = nn.ModuleDict({"rgb": nn.Linear(2, 2), "shared": nn.Linear(2, 2)})
    assert names(StreamSet.resolve(model)) == {
        "rgb": ["rgb.weight", "rgb.bias"],
        "shared": ["shared.weight", "shared.bias"],
    }
    with pytest.raises(ValueError, match=r"no streams found in Sequential: name them, e\.g\. streams="):
        StreamSet.resolve(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_patterns_match_components_and_the_longest_wins() -> None:
    streams = StreamSet.resolve(Towers(), {"vision": "vision", "adapter": "vision.lora", "language": ["text"]})
    assert names(streams) == {"vision": VISION, "adapter": LORA, "language": TEXT, "shared": HEAD}
    assert streams.user_names == ("vision", "adapter", "language")
    assert streams.names[-1] == "shared"
    assert streams["adapter"].parameters[0].parameter is streams.model.vision.lora.weight


def test_patterns_are_whole_components_in_order_with_wildcards() -> None:
    assert names(StreamSet.resolve(Towers(), {"a": "vis*.bias", "b": "t?xt"})) == {
        "a": ["vision.block.bias"],
        "b": TEXT,
        "shared": ["vision.block.weight", *LORA, *HEAD],
    }
    with pytest.raises(ValueError, match=r"stream 'a': pattern 'vis' matches no parameter; nearest names: vision"):
        StreamSet.resolve(Towers(), {"a": "vis"})
    with pytest.raises(ValueError, match="pattern 'lora.vision' matches no parameter"):
        StreamSet.resolve(Towers(), {"a": "lora.vision"})


def test_modules_and_mixtures() -> None:
    model = Towers()
    streams = StreamSet.resolve(model, {"v": model.vision, "t": [model.text, "head.weight"]})
    assert names(streams) == {"v": VISION + LORA, "t": [*TEXT, "head.weight"], "shared": ["head.bias"]}


def test_a_module_inside_a_streams_module_can_be_another_stream() -> None:
    model = Towers()
    streams = StreamSet.resolve(model, {"vision": model.vision, "adapter": model.vision.lora})
    assert names(streams) == {"vision": VISION, "adapter": LORA, "shared": TEXT + HEAD}
    assert roots(streams) == {"vision": ("vision.block",), "adapter": ("vision.lora",), "shared": ()}


def test_a_stream_may_have_inputs_alone() -> None:
    spec = {"left": StreamSpec(inputs=("x",)), "right": StreamSpec(patterns=("text",), inputs=("y",))}
    streams = StreamSet.resolve(Towers(), spec)
    assert names(streams) == {"left": [], "right": TEXT, "shared": VISION + LORA + HEAD}
    assert (streams["left"].inputs, streams["right"].inputs, streams["left"].roots) == (("x",), ("y",), ())


def test_the_optimizers_groups_may_carry_streams() -> None:
    model = Towers()
    groups: list[dict[str, Any]] = [
        {"params": list(model.vision.parameters()), "stream": "rgb", "lr": 0.1},
        {"params": list(model.text.parameters()), "stream": "depth", "lr": 0.2},
        {"params": list(model.head.parameters()), "stream": "shared", "lr": 0.3},
    ]
    streams = StreamSet.resolve(model, None, [torch.optim.SGD(groups)])
    assert names(streams) == {"rgb": VISION + LORA, "depth": TEXT, "shared": HEAD}
    two = [torch.optim.SGD(groups[:1]), torch.optim.SGD(groups[1:])]
    assert names(StreamSet.resolve(model, None, two)) == names(streams)
    assert StreamSet.resolve(model, {"v": "vision"}, two).user_names == ("v",)


def test_the_models_own_stream_names() -> None:
    model = Towers()
    model.stream_names = ("text", "vision")
    assert names(StreamSet.resolve(model)) == {"text": TEXT, "vision": VISION + LORA, "shared": HEAD}


def test_an_equal_claim_is_an_error_that_names_both() -> None:
    with pytest.raises(ValueError, match=r"parameter vision\.lora\.weight is claimed by 'b' and 'c' alike; give one"):
        StreamSet.resolve(Towers(), {"a": "lora", "b": "vision.lora", "c": ["text", "vision.weight"]})


def test_tied_weights_across_streams_are_an_error_with_both_names() -> None:
    model = Towers()
    model.text = nn.Linear(4, 2)
    model.text.weight = model.vision.lora.weight
    with pytest.raises(ValueError, match=r"vision\.lora\.weight = text\.weight is claimed by 'vision' and 'text'"):
        StreamSet.resolve(model, {"vision": "vision", "text": "text"})
    streams = StreamSet.resolve(model, {"vision": "vision", "text": "text", "tied": "vision.lora"})
    assert names(streams)["tied"] == ["vision.lora.weight"]
    assert sum(len(stream.parameters) for stream in streams.streams) == 6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, r"streams=\{\} names no stream"),
        ({"a": "visoin"}, "pattern 'visoin' matches no parameter; nearest names: vision"),
        ({"a": "vision.lora", "b": "vision.lora.weight"}, "stream 'a' has no parameters: other streams have stronger"),
        ({"a": nn.Linear(4, 4)}, r"stream 'a': the module Linear is not part of the model \(Towers\)"),
        ({"a": StreamSpec()}, "stream 'a' is empty: give it a pattern, a module, or inputs"),
        ({"a": [3]}, r"stream 'a': expected patterns \(str\), modules .* got 3"),
        ({"shared": "vision"}, "'shared' cannot be a stream's name"),
        ({"full": "vision"}, "none of the reserved names epoch, full, full_model, shared, step"),
        ({"1st": "vision"}, "'1st' cannot be a stream's name: use letters"),
        ({"a/b": "vision"}, "'a/b' cannot be a stream's name"),
    ],
)
def test_what_cannot_be_resolved_is_an_error(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamSet.resolve(Towers(), spec)


@pytest.mark.parametrize(
    ("streams", "said"),
    [
        (["rgb"], r"streams must map names to patterns or modules, e.g. \{'rgb': 'rgb'\}, got \['rgb'\]"),
        ({"rgb": 5}, r"stream 'rgb': expected patterns \(str\), modules \(nn.Module\) or a StreamSpec, got 5"),
    ],
)
def test_streams_of_another_kind_are_an_error(streams: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StreamSet.resolve(nn.Linear(2, 2), streams)


def test_a_model_without_parameters_is_an_error() -> None:
    lazy = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(
        ValueError, match=r"1.weight has no shape yet \(a lazy module\): run one batch through the model"
    ):
        StreamSet.resolve(lazy)
    with pytest.raises(ValueError, match=r"the model \(ReLU\) has no parameters: there is nothing to monitor"):
        StreamSet.resolve(nn.ReLU())


def test_an_unknown_stream_is_a_key_error_with_the_valid_ones() -> None:
    with pytest.raises(KeyError, match="no stream 'rgb'; streams: vision, shared"):
        StreamSet.resolve(Towers(), {"vision": "vision"})["rgb"]


def compiled_whole(model: Towers) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_part(model: Towers) -> nn.Module:
    model.vision = torch.compile(model.vision, backend="eager")  # type: ignore[assignment]
    return model


def checkpointed_part(model: Towers) -> nn.Module:
    model.vision = checkpoint_wrapper(model.vision)
    return model


def compiled_checkpointed(model: Towers) -> nn.Module:
    model.vision.block = checkpoint_wrapper(model.vision.block)
    return compiled_whole(compiled_part(model))  # type: ignore[arg-type]


def data_parallel(model: Towers) -> nn.Module:
    return nn.DataParallel(model)


WRAPPINGS = [compiled_whole, compiled_part, checkpointed_part, compiled_checkpointed, data_parallel]


@pytest.mark.parametrize("wrap", WRAPPINGS, ids=lambda wrap: wrap.__name__)
def test_wrappers_leave_no_trace_in_names_and_roots(wrap: Any) -> None:
    plain = Towers()
    vision = plain.vision
    wrapped = wrap(plain)
    patterns = {"vision": "vision", "adapter": "vision.lora", "t": "text"}
    for given, same in [(None, None), (patterns, patterns), ({"v": vision}, {"v": "vision"})]:
        streams, expected = StreamSet.resolve(wrapped, given), StreamSet.resolve(Towers(), same)
        assert streams.model is plain
        assert (names(streams), roots(streams)) == (names(expected), roots(expected))


def _names_under_ddp() -> list[Any]:
    found = []
    whole = DistributedDataParallel(Towers())
    found.append(names(StreamSet.resolve(whole)))
    found.append(names(StreamSet.resolve(DistributedDataParallel(compiled_whole(Towers())))))
    found.append(names(StreamSet.resolve(compiled_whole(whole))))  # type: ignore[arg-type]
    part = Towers()
    part.vision = DistributedDataParallel(part.vision)  # type: ignore[assignment]
    found.append(names(StreamSet.resolve(part)))
    found.append(names(StreamSet.resolve(part, {"vision": part.vision, "text": "text", "head": "head"})))
    assert StreamSet.resolve(part)["vision"].roots == ("vision",)
    return found


def test_ddp_leaves_no_trace_in_names_whole_or_in_part() -> None:
    expected = {"vision": VISION + LORA, "text": TEXT, "head": HEAD}
    assert run_ranks(1, _names_under_ddp) == [[expected] * 5]


def test_roots_are_the_largest_callable_modules_and_come_once() -> None:
    model = nn.Module()
    model.encoders = nn.ModuleDict({"rgb": Vision(), "depth": Vision()})
    model.again = model.encoders["rgb"]
    streams = StreamSet.resolve(model, {"rgb": "rgb", "depth": "depth.block"})
    assert roots(streams) == {"rgb": ("encoders.rgb",), "depth": ("encoders.depth.block",), "shared": ()}
    parameter_only = StreamSet.resolve(Numbered())
    assert roots(parameter_only) == {"stream1": ("stream1",), "stream2": (), "stream10": ("stream10",), "shared": ()}


def test_a_list_of_modules_cannot_be_called_and_its_modules_are_the_roots() -> None:
    model = nn.ModuleDict({"towers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 2)})
    assert roots(StreamSet.resolve(model, {"a": "towers"})) == {"a": ("towers.0", "towers.1"), "shared": ()}


def test_numbered_streams_come_in_the_order_of_their_numbers() -> None:
    model = nn.ModuleDict({f"stream{number}": nn.Linear(2, 2) for number in (10, 2, 1)})
    assert StreamSet.resolve(model).names == ("stream1", "stream2", "stream10")


def test_the_inventory_leaves_out_what_an_optimizer_does_not_say() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    table = StreamSet.resolve(model, {"a": "a", "b": "b"}).inventory([torch.optim.LBFGS(model.parameters(), lr=0.5)])
    assert re.split(r"\s{2,}", table.splitlines()[1])[-3:] == ["0.5", "-", "float32"]


def test_the_inventory_is_a_table_with_learning_rates() -> None:
    model = Towers()
    model.text.bfloat16()
    model.head.requires_grad_(False)
    groups = [{"params": model.vision.parameters(), "lr": 1e-3}, {"params": model.text.parameters(), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, weight_decay=1e-4)
    table = StreamSet.resolve(model, {"vision": "vision", "text": "text"}).inventory([optimizer])
    assert [re.split(r"\s{2,}", line) for line in table.splitlines()] == [
        ["stream", "tensors", "parameters", "trainable", "lr", "weight decay", "dtype"],
        ["vision", "3", "28", "28", "0.001", "0.0001", "float32"],
        ["text", "2", "10", "10", "0.5", "0.0001", "bfloat16"],
        ["shared", "2", "6", "0", "-", "-", "float32"],
    ]


def test_fsdp1_is_refused() -> None:
    class FullyShardedDataParallel(Towers):
        """Recognised by its name: the real one needs an accelerator."""

    with pytest.raises(ValueError, match=r"wrapped in FullyShardedDataParallel \(FSDP1\), whose flat parameters mix"):
        StreamSet.resolve(nn.Sequential(FullyShardedDataParallel()), {"a": "text"})
