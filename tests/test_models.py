"""Models: shapes, sizes against published figures, fusions at their start, modality dropout, compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddp_streammon.train.models import (
    MLPEncoder,
    MultiStreamModel,
    ResNetEncoder,
    make_fusion,
    mc_resnet,
    mc_resnet18,
    mc_resnet50,
    mixed,
    multi_mlp,
)
from ddp_streammon.train.models.multi_stream import drop_streams
from ddp_streammon.train.optim import Schedule, StreamSchedulers


def tiny(**options: object) -> MultiStreamModel:
    torch.manual_seed(0)
    return multi_mlp({"rgb": 6, "depth": 4}, num_classes=3, hidden=(8, 5), **options)  # type: ignore[arg-type]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("depth", "published", "features"),
    [
        (18, 11_689_512, 512),
        (34, 21_797_672, 512),
        (50, 25_557_032, 2048),
        (101, 44_549_160, 2048),
        (152, 60_192_808, 2048),
    ],
)
def test_resnet_has_the_published_number_of_parameters(depth: int, published: int, features: int) -> None:
    with torch.device("meta"):
        encoder = ResNetEncoder(depth, in_channels=3)
    head = 1000 * features + 1000
    assert encoder.features == features
    assert count(encoder) + head == published


def test_resnet_strides_and_he_initialisation() -> None:
    torch.manual_seed(0)
    encoder = ResNetEncoder(18, in_channels=3, width=16)
    sizes: dict[str, tuple[int, ...]] = {}
    for name in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        module = encoder.get_submodule(name)
        module.register_forward_hook(lambda m, x, y, name=name: sizes.update({name: tuple(y.shape[1:])}))
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 128)
    assert sizes == {
        "conv1": (16, 32, 32),
        "maxpool": (16, 16, 16),
        "layer1": (16, 16, 16),
        "layer2": (32, 8, 8),
        "layer3": (64, 4, 4),
        "layer4": (128, 2, 2),
    }
    weight = next(p for n, p in encoder.named_parameters() if n.startswith("layer4.1") and p.dim() == 4)
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


def test_mc_resnet_on_small_images_with_named_streams() -> None:
    streams = {"pixels": 1, "edges": 1, "colour": 3}
    model = mc_resnet18(10, "gated", streams=streams, stem="small", width=4, dropout_p=0.1)
    x, y, z = torch.randn(2, 1, 16, 15), torch.randn(2, 1, 16, 15), torch.randn(2, 3, 16, 15)
    assert model.stream_names == ("pixels", "edges", "colour")
    assert model(x, y, z).shape == (2, 10)
    assert model.fc.in_features == 3 * 32
    assert {n.split(".")[1] for n, _ in model.named_parameters() if n.startswith("encoders.")} == set(streams)
    model.eval()
    assert torch.equal(model(x, y, z), model(colour=z, edges=y, pixels=x))


def test_mc_resnet_default_streams_and_channels() -> None:
    model = mc_resnet50(5, in_channels_stream2=2, stem="small", width=2)
    assert model.stream_names == ("stream1", "stream2")
    assert [e.conv1.in_channels for e in model.encoders.values()] == [3, 2]
    assert model.fc.in_features == 2 * 64
    with pytest.raises(ValueError, match="exclude each other, got both: put the channels into streams"):
        mc_resnet(18, 5, streams={"a": 1}, in_channels_stream1=3)
    with pytest.raises(ValueError, match="depth must be one of 18, 34, 50, 101, 152, got 20"):
        mc_resnet(20, 5)
    with pytest.raises(ValueError, match="stem must be one of imagenet, small, got 'tiny'"):
        mc_resnet18(5, stem="tiny")


@pytest.mark.parametrize("fusion_type", ["weighted", "gated"])
def test_fresh_fusions_equal_the_concatenation(fusion_type: str) -> None:
    features = [torch.randn(4, 5) for _ in range(3)]
    fused = make_fusion(fusion_type, 3, 5)(*features)
    torch.testing.assert_close(fused, torch.cat(features, dim=1))


def test_weighted_fusion_scales_by_three_times_the_softmax() -> None:
    fusion = make_fusion("weighted", 3, 2)
    with torch.no_grad():
        fusion.logits.copy_(torch.tensor([2.0, 1.0, 1.0]).log())
    fused = fusion(*[torch.ones(1, 2)] * 3)
    assert {n: tuple(p.shape) for n, p in fusion.named_parameters()} == {"logits": (3,)}
    torch.testing.assert_close(fused, torch.tensor([[1.5, 1.5, 0.75, 0.75, 0.75, 0.75]]))


def test_gated_fusion_scales_differ_by_sample_and_have_mean_one() -> None:
    torch.manual_seed(0)
    fusion = make_fusion("gated", 2, 5)
    nn.init.normal_(fusion.gate[-1].weight)
    scales = fusion.scales(torch.randn(6, 5), torch.randn(6, 5))
    torch.testing.assert_close(scales.mean(dim=1), torch.ones(6))
    assert scales[:, 0].unique().numel() == 6
    fusion(torch.randn(6, 5), torch.randn(6, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fusion.parameters())


def test_unknown_fusion() -> None:
    with pytest.raises(ValueError, match="fusion_type must be one of concat, weighted, gated, got 'sum'"):
        make_fusion("sum", 2, 4)


def test_inputs_are_checked() -> None:
    model = tiny()
    x, y = torch.randn(3, 2, 3), torch.randn(3, 4)
    assert model(x, y).shape == (3, 3)
    with pytest.raises(TypeError, match=r"the model has 2 streams \(rgb, depth\), got 1 inputs"):
        model(x)
    with pytest.raises(TypeError, match="inputs by name must be exactly rgb, depth, got rgb, sound"):
        model(rgb=x, sound=y)
    with pytest.raises(TypeError, match="by position or by name, got 1 by position and by name depth"):
        model(x, depth=y)


@pytest.mark.parametrize("name", ["shared", "full", "a.b", "keys", "two words"])
def test_impossible_stream_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"must be a Python identifier, none of shared, full.*got '{name}'"):
        multi_mlp({name: 3}, 2)


def test_modality_dropout_rates_and_never_all() -> None:
    torch.manual_seed(0)
    n = 40_000
    features = [torch.ones(n, 1, requires_grad=True) for _ in range(2)]
    dropped = torch.cat(drop_streams(features, (0.5, 0.2)), dim=1)
    assert set(dropped.unique().tolist()) == {0.0, 1.0}
    assert (dropped.sum(dim=1) >= 1).all()
    # Both would go with probability 0.1; then either is kept, uniformly: 0.5 - 0.05 and 0.2 - 0.05.
    lost = 1 - dropped.detach().mean(dim=0)
    torch.testing.assert_close(lost, torch.tensor([0.45, 0.15]), atol=0.01, rtol=0)
    dropped.sum().backward()
    assert features[0].grad is not None and torch.equal(features[0].grad, dropped[:, :1])


def test_modality_dropout_always_keeps_one_at_probability_one() -> None:
    kept = torch.cat(drop_streams([torch.ones(500, 1)] * 3, (1.0, 1.0, 1.0)), dim=1)
    assert torch.equal(kept.sum(dim=1), torch.ones(500))
    assert kept.mean(dim=0).min() > 0.2


def test_modality_dropout_acts_in_training_only_and_draws_nothing_without_it() -> None:
    model = tiny(modality_dropout={"depth": 1.0}, norm=False)
    x, y = torch.randn(5, 6), torch.randn(5, 4)
    model.train()
    assert torch.equal(model(x, y), model(x, torch.zeros_like(y) + 7))
    model.eval()
    assert not torch.equal(model(x, y), model(x, torch.zeros_like(y) + 7))
    plain = tiny().train()
    before = torch.get_rng_state()
    plain(x, y)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="modality_dropout names sound, the streams are rgb, depth"):
        tiny(modality_dropout={"sound": 0.1})
    with pytest.raises(ValueError, match=r"modality_dropout must be in \[0, 1\], got 1.5 for rgb"):
        tiny(modality_dropout=1.5)


def test_compile_makes_one_group_a_stream_with_fallbacks() -> None:
    model = tiny()
    assert model.optimizer is None and model.device == torch.device("cpu")
    returned = model.compile("sgd", 0.1, 1e-4, scheduler="cosine", depth_lr=0.01, rgb_weight_decay=0.5)
    assert returned is model and isinstance(model.optimizer, torch.optim.SGD)
    figures = {g["stream"]: (g["lr"], g["weight_decay"]) for g in model.optimizer.param_groups}
    assert figures == {"rgb": (0.1, 0.5), "depth": (0.01, 1e-4), "shared": (0.1, 1e-4)}
    sizes = {g["stream"]: sum(p.numel() for p in g["params"]) for g in model.optimizer.param_groups}
    assert sizes == {
        "rgb": count(model.encoders["rgb"]),
        "depth": count(model.encoders["depth"]),
        "shared": count(model.fc),
    }
    assert isinstance(model.scheduler, StreamSchedulers)
    assert "criterion" not in "".join(model.state_dict())


def test_compile_errors() -> None:
    model = tiny()
    with pytest.raises(TypeError, match="unknown keywords audio_lr; per stream it takes rgb_lr, rgb_weight_decay"):
        model.compile(audio_lr=0.1)
    with pytest.raises(TypeError, match=r"unknown keywords fullgraph.*use torch.compile\(model\)"):
        model.compile(fullgraph=True)
    with pytest.raises(ValueError, match="optimizer must be one of adamw, adam, sgd, got 'lion'"):
        model.compile("lion")
    with pytest.raises(ValueError, match="scheduler must be one of cosine, step, plateau, got 'linear'"):
        model.compile(scheduler="linear")
    with pytest.raises(ValueError, match="loss must be an nn.Module or one of cross_entropy, got 'hinge'"):
        model.compile(loss="hinge")
    with pytest.raises(ValueError, match="lr must be finite and not negative, got -1.0"):
        model.compile(rgb_lr=-1.0)
    assert model.optimizer is None


def test_a_few_steps_learn() -> None:
    model = tiny().compile("adamw", 0.02, scheduler=Schedule("step", step_size=50))
    x, y = torch.randn(64, 6), torch.randn(64, 4)
    target = (x[:, 0] > 0).long() + (y[:, 0] > 0).long()
    losses = []
    for _ in range(60):
        loss = model.criterion(model(x, y), target)
        model.optimizer.zero_grad()
        loss.backward()
        model.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_multi_mlp_checks_its_sizes() -> None:
    with pytest.raises(ValueError, match="streams must name at least one stream, got none"):
        multi_mlp({}, 2)
    with pytest.raises(ValueError, match=r"hidden must hold at least one width, all at least 1, got \(\)"):
        multi_mlp({"a": 3}, 2, hidden=())
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        multi_mlp({"a": 0}, 2)


def test_a_mixed_model_gives_vectors_an_mlp_and_images_a_resnet() -> None:
    model = mixed({"fou": (76,), "pix": (1, 16, 15)}, num_classes=10, hidden=(32,), width=4)
    assert isinstance(model.encoders["fou"], MLPEncoder)
    assert isinstance(model.encoders["pix"], ResNetEncoder)
    assert model(torch.randn(3, 76), torch.randn(3, 1, 16, 15)).shape == (3, 10)
    assert model.fc.in_features == 2 * 8 * 4
    assert mixed({"a": (5,), "b": (6,)}, num_classes=2, hidden=(8, 4))(torch.randn(3, 5), torch.randn(3, 6)).shape == (
        3,
        2,
    )
    with pytest.raises(ValueError, match=r"a vector \[features\] or an image \[channels, H, W\], got {'a': \(2, 3\)}"):
        mixed({"a": (2, 3)}, num_classes=2)
