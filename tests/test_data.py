"""Data: prepared arrays against the files they come from, drawn values, loaders."""

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets

from src.core.batch import Batch
from src.core.errors import UserError
from src.core.spec import DataSpec
from src.data.arrays import Arrays, Split, prepare_images, save_splits
from src.data.digits import digits
from src.data.image_folder import image_folder
from src.data.loading import ArrayData
from src.data.torchvision_sets import cifar10, fashion_mnist, mnist
from tests.examples import image_spec

SPLITS = ("train", "val", "test")
DRAWN = ("binary_static", "binary_dynamic", "continuous")

# --- the embedded digits ---------------------------------------------------------------------------------------------


def test_digits_have_their_published_sizes_and_levels(cache):
    arrays = digits(str(cache), "discrete")
    assert {split: len(arrays.splits[split]) for split in SPLITS} == {"train": 1297, "val": 200, "test": 300}
    assert arrays.spec.describe() == "image 1x8x8, discrete values (17 levels), 10 classes"
    assert arrays.spec.class_names == tuple("0123456789")


def test_digits_are_scikit_learns_each_in_one_split(cache):
    from sklearn.datasets import load_digits

    source = load_digits()
    found = _labelled_bytes(digits(str(cache), "discrete"))
    assert sorted(found) == sorted(
        (image.tobytes(), int(y)) for image, y in zip(source.images.astype(np.uint8), source.target, strict=True)
    )


def test_every_class_of_digits_is_in_every_split(cache):
    arrays = digits(str(cache), "discrete")
    assert all(set(arrays.splits[split].y) == set(range(10)) for split in SPLITS)


# --- preparation -----------------------------------------------------------------------------------------------------


def _prepared(cache: Path, make: Callable[[Path], tuple[str, ...]], **source: int) -> Arrays:
    return prepare_images("made_up", str(cache), source, levels=256, values="discrete", make=make)


def _make(folder: Path) -> tuple[str, ...]:
    x = np.arange(12 * 4, dtype=np.uint8).reshape(12, 1, 2, 2)
    save_splits(folder, [("train", x[:8], np.arange(8)), ("val", x[8:10], np.arange(2)), ("test", x[10:], np.arange(2))])
    return tuple("abcdefgh")


def _never(folder: Path) -> tuple[str, ...]:
    raise AssertionError("prepared a second time")


def test_data_is_prepared_once(tmp_path):
    first = _prepared(tmp_path, _make)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    second = _prepared(tmp_path, _never)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == times
    assert second.fingerprint == first.fingerprint
    assert all((first.splits[split].x == second.splits[split].x).all() for split in SPLITS)


def test_fingerprint_depends_on_the_arrays_alone(tmp_path):
    here, there = _prepared(tmp_path / "here", _make), _prepared(tmp_path / "there", _make, other_source=1)
    assert here.fingerprint == there.fingerprint


def test_changed_source_is_prepared_anew(tmp_path):
    _prepared(tmp_path, _make, num_val=2)
    with pytest.raises(AssertionError, match="a second time"):
        _prepared(tmp_path, _never, num_val=3)


@pytest.mark.parametrize("end", [RuntimeError, KeyboardInterrupt])
def test_preparation_that_breaks_off_leaves_nothing_that_looks_finished(tmp_path, end):
    def broken(folder: Path) -> tuple[str, ...]:
        _make(folder)
        raise end("half way")

    with pytest.raises(end):
        _prepared(tmp_path, broken)
    assert list(tmp_path.iterdir()) == []
    assert len(_prepared(tmp_path, _make).splits["train"]) == 8


def test_what_a_killed_preparation_left_behind_is_no_obstacle(tmp_path):
    folder = Path(_prepared(tmp_path, _make).splits["train"].x.filename).parent
    folder.rename(folder.with_name(f"{folder.name}.unfinished-{os.getpid()}"))  # the same number, as in containers
    assert len(_prepared(tmp_path, _make).splits["train"]) == 8


def test_unknown_kind_of_values_is_refused_with_the_known_ones(cache):
    with pytest.raises(UserError, match=r"data\.values=binary .*discrete, binary_static, binary_dynamic, continuous"):
        digits(str(cache), "binary")


# --- data sets in torchvision's layout -------------------------------------------------------------------------------


def _write_idx(root: Path, name: str, random: np.random.Generator) -> None:
    """The four files of MNIST and its like, with 40 + 12 images."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 12)):
        x = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + x.tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (0x801, count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + random.integers(0, 10, count, dtype=np.uint8).tobytes())


def _write_cifar(root: Path, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pickles of CIFAR-10, eight images each. torchvision knows the MD5 of the real ones and is told those of ours."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> str:
        encoded = pickle.dumps(content)
        (folder / name).write_bytes(encoded)
        return hashlib.md5(encoded).hexdigest()

    def batch() -> dict:
        return {"data": random.integers(0, 256, (8, 3072), dtype=np.uint8), "labels": random.integers(0, 10, 8).tolist()}

    train = [[f"data_batch_{i}", write(f"data_batch_{i}", batch())] for i in range(1, 6)]
    meta = write("batches.meta", {"label_names": [f"thing {i}" for i in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", write("test_batch", batch())]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": meta})


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A data root with tiny stand-ins of MNIST, Fashion-MNIST and CIFAR-10."""
    random = np.random.default_rng(0)
    _write_idx(tmp_path / "root", "MNIST", random)
    _write_idx(tmp_path / "root", "FashionMNIST", random)
    _write_cifar(tmp_path / "root", random, monkeypatch)
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("load", "reference", "shape"),
    [
        (mnist, datasets.MNIST, (1, 28, 28)),
        (fashion_mnist, datasets.FashionMNIST, (1, 28, 28)),
        (cifar10, datasets.CIFAR10, (3, 32, 32)),
    ],
)
def test_arrays_are_what_torchvision_reads(root, tmp_path, load, reference, shape):
    arrays = load(str(root), str(tmp_path / "cache"), "discrete", num_val=10, download=False)
    parts = arrays.splits
    train, test = reference(root, train=True), reference(root, train=False)
    assert arrays.spec.shape == shape
    assert arrays.spec.values.levels == 256
    assert len(parts["val"]) == 10
    for ours, theirs in (([parts["train"], parts["val"]], train), ([parts["test"]], test)):
        x = np.concatenate([split.x for split in ours])
        expected = [np.asarray(image) for image, _ in theirs]
        np.testing.assert_array_equal(x.transpose(0, 2, 3, 1).squeeze(), np.stack(expected))
        np.testing.assert_array_equal(np.concatenate([split.y for split in ours]), [y for _, y in theirs])


@pytest.mark.parametrize(("load", "name"), [(mnist, "3"), (fashion_mnist, "Dress"), (cifar10, "thing 3")])
def test_classes_have_their_names(root, tmp_path, load, name):
    arrays = load(str(root), str(tmp_path / "cache"), "discrete", num_val=10, download=False)
    assert arrays.spec.class_names[3] == name


@pytest.mark.parametrize("num_val", [0, 40, 41])
def test_validation_split_leaves_something_to_train_on(root, tmp_path, num_val):
    with pytest.raises(UserError, match=f"data.num_val={num_val} must be between 1 and 39"):
        mnist(str(root), str(tmp_path / "cache"), "discrete", num_val, download=False)


# --- folders and zips of images --------------------------------------------------------------------------------------


def _write_images(folder: Path, names: list[str], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """PNG files of random pixels `(H, W)` or `(H, W, 3)`; returns them by name."""
    random = np.random.default_rng(len(names))
    images = {name: random.integers(0, 256, shape, dtype=np.uint8) for name in names}
    for name, pixels in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return images


def _zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder))
    return path


def _load(path: Path, size: int = 8, colour: bool = True, test_path: Path | None = None) -> Arrays:
    test = None if test_path is None else str(test_path)
    return image_folder(str(path), test, str(path.parent / "cache"), "discrete", size, colour, held_out=0.1)


def _names(*folders: str, count: int = 12) -> list[str]:
    """File names that take turns among the folders."""
    return [f"{folders[i % len(folders)]}/{i}.png" for i in range(count)]


def _bytes(split: Split) -> list[bytes]:
    return [image.tobytes() for image in split.x]


def _labelled_bytes(arrays: Arrays) -> list[tuple[bytes, int]]:
    """All images with their labels."""
    return [
        (image.tobytes(), int(y)) for split in arrays.splits.values() for image, y in zip(split.x, split.y, strict=True)
    ]


def _all_bytes(arrays: Arrays) -> list[bytes]:
    return [image for split in SPLITS for image in _bytes(arrays.splits[split])]


@pytest.mark.parametrize("source", ["folder", "zip"])
@pytest.mark.parametrize(("colour", "shape"), [(True, (8, 8, 3)), (False, (8, 8))])
def test_images_of_the_right_size_arrive_unchanged(tmp_path, source, colour, shape):
    images = _write_images(tmp_path / "images", _names("."), shape)
    path = tmp_path / "images" if source == "folder" else _zipped(tmp_path / "images")
    arrays = _load(path, colour=colour)
    assert arrays.spec.shape == ((3 if colour else 1), 8, 8)
    expected = [pixels.transpose(2, 0, 1) if colour else pixels for pixels in images.values()]
    assert sorted(_all_bytes(arrays)) == sorted(np.ascontiguousarray(pixels).tobytes() for pixels in expected)


def test_folder_and_zip_of_it_are_the_same_data(tmp_path):
    _write_images(tmp_path / "images", _names("cat", "cat-like", "dog", count=30), (9, 11, 3))
    folder, zipped = _load(tmp_path / "images"), _load(_zipped(tmp_path / "images"))
    assert folder.fingerprint == zipped.fingerprint
    assert folder.spec == zipped.spec


@pytest.mark.parametrize(("colour", "mode"), [(True, "RGB"), (False, "L")])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (8, 8, 4)])
def test_colours_are_converted(tmp_path, shape, colour, mode):
    images = _write_images(tmp_path / "images", _names("."), shape)
    expected = [np.asarray(Image.fromarray(pixels).convert(mode)) for pixels in images.values()]
    expected = [np.ascontiguousarray(pixels.transpose(2, 0, 1) if colour else pixels).tobytes() for pixels in expected]
    assert sorted(_all_bytes(_load(tmp_path / "images", colour=colour))) == sorted(expected)


@pytest.mark.parametrize("is_wide", [True, False])
def test_shorter_side_is_resized_and_the_longer_one_cropped_at_both_ends(tmp_path, is_wide):
    stripes = np.repeat([[0, 0, 200, 200, 100, 100]], 2, axis=0).repeat(12, 0).repeat(12, 1).astype(np.uint8)
    (tmp_path / "images").mkdir()
    for i in range(10):
        Image.fromarray(stripes if is_wide else stripes.T).save(tmp_path / "images" / f"{i}.png")
    arrays = _load(tmp_path / "images", size=8, colour=False)
    assert arrays.spec.shape == (1, 8, 8)
    middle = arrays.splits["train"].x[0, 0][1:-1, 1:-1]  # the rim mixes with what is cropped
    np.testing.assert_allclose(middle, 200, atol=3)


@pytest.mark.parametrize("top", ["", "photos/train/"])
def test_sub_folders_are_classes_below_the_folders_that_all_share(tmp_path, top):
    images = _write_images(tmp_path / "images", _names(f"{top}dog", f"{top}cat"), (8, 8))
    arrays = _load(tmp_path / "images", colour=False)
    assert arrays.spec.class_names == ("cat", "dog")
    expected = [(pixels.tobytes(), int("dog" in name)) for name, pixels in images.items()]
    assert sorted(_labelled_bytes(arrays)) == sorted(expected)


def test_images_in_one_folder_have_no_labels(tmp_path):
    _write_images(tmp_path / "images", _names("holiday"), (8, 8))
    arrays = _load(tmp_path / "images")
    assert arrays.spec.num_classes == 0
    assert all(arrays.splits[split].y is None for split in SPLITS)


def test_image_beside_class_folders_is_named(tmp_path):
    _write_images(tmp_path / "images", [*_names("cat", "dog"), "stray.png"], (8, 8))
    with pytest.raises(UserError, match=r"stray\.png .*beside the class folders"):
        _load(tmp_path / "images")


def test_test_images_may_come_from_a_folder_of_their_own(tmp_path):
    _write_images(tmp_path / "images", _names("cat", "dog"), (8, 8))
    test = _write_images(tmp_path / "test", _names("cat", "dog", count=11), (8, 8))
    arrays = _load(tmp_path / "images", colour=False, test_path=tmp_path / "test")
    assert [len(arrays.splits[split]) for split in SPLITS] == [11, 1, 11]
    assert sorted(_bytes(arrays.splits["test"])) == sorted(pixels.tobytes() for pixels in test.values())


def test_test_images_of_other_classes_are_refused(tmp_path):
    _write_images(tmp_path / "images", _names("cat", "dog"), (8, 8))
    _write_images(tmp_path / "test", _names("cat", "cow"), (8, 8))
    with pytest.raises(UserError, match=r"'dog'.*'cow'"):
        _load(tmp_path / "images", test_path=tmp_path / "test")


@pytest.mark.parametrize("source", ["folder", "zip"])
def test_hidden_files_and_litter_are_passed_over(tmp_path, source):
    images = _write_images(tmp_path / "images", _names("cat", "dog"), (8, 8))
    for name in (".DS_Store", "cat/.hidden.png", "cat/Thumbs.db", "__MACOSX/cat/._0.png", ".trash/1.png", "desktop.ini"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_text("no image")
    path = tmp_path / "images" if source == "folder" else _zipped(tmp_path / "images")
    assert len(_all_bytes(_load(path))) == len(images)


def test_photographs_are_turned_upright(tmp_path):
    images = _write_images(tmp_path / "images", _names("."), (8, 8))
    upside_down = Image.Exif()
    upside_down[0x0112] = 3  # orientation: turned by 180 degrees
    for name, pixels in images.items():
        Image.fromarray(pixels).save(tmp_path / "images" / name, exif=upside_down)
    found = _all_bytes(_load(tmp_path / "images", colour=False))
    assert sorted(found) == sorted(pixels[::-1, ::-1].tobytes() for pixels in images.values())


def test_sixteen_bit_image_is_refused_and_named(tmp_path):
    _write_images(tmp_path / "images", _names("."), (8, 8))
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(tmp_path / "images" / "scan.png")
    with pytest.raises(UserError, match=r"scan\.png .*8 bits a channel"):
        _load(tmp_path / "images")


def test_changed_image_is_prepared_anew(tmp_path):
    _write_images(tmp_path / "images", _names("."), (8, 8))
    before = _load(tmp_path / "images").fingerprint
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "images" / "0.png")
    assert _load(tmp_path / "images").fingerprint != before


# --- drawn values ----------------------------------------------------------------------------------------------------


def _arrays(x: np.ndarray, values: str) -> Arrays:
    """8-bit images whose labels are their indices, the same in all splits."""
    split = Split(x, np.arange(len(x)))
    return Arrays(image_spec(x.shape[1:], values), 256, dict.fromkeys(SPLITS, split), "made_up")


def _random_arrays(values: str, count: int = 60) -> Arrays:
    return _arrays(np.random.default_rng(0).integers(0, 256, (count, 1, 5, 3), dtype=np.uint8), values)


def _grey_ramps(values: str, count: int) -> Arrays:
    """Images that hold every grey value once."""
    return _arrays(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(count, 0), values)


def _data(arrays: Arrays, batch_size: int = 20, num_workers: int = 0, seed: int = 0) -> ArrayData:
    return ArrayData(arrays, batch_size, batch_size, num_workers, seed)


def _epoch(loader: DataLoader, epoch: int) -> DataLoader:
    """The loader in an epoch, as Lightning announces it."""
    loader.sampler.set_epoch(epoch)
    return loader


def _by_index(data: ArrayData, loader: DataLoader) -> Tensor:
    """All examples in data units, in the order of their indices."""
    batches = [data.to_units(batch) for batch in loader]
    order = torch.cat([batch.condition for batch in batches]).argsort()
    return torch.cat([batch.x for batch in batches])[order]


def test_discrete_levels_map_onto_the_whole_range():
    data = _data(_grey_ramps("discrete", 20))
    x = _by_index(data, data.held_out_loader("test"))[0].flatten()
    assert (x[0], x[-1]) == (-1, 1)
    torch.testing.assert_close(x.diff(), torch.full((255,), 2 / 255), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("values", "is_fresh"), [("binary_static", False), ("binary_dynamic", True), ("continuous", True)])
def test_training_values_are_drawn_afresh_each_epoch_unless_static(values, is_fresh):
    data = _data(_random_arrays(values))
    loader = data.train_dataloader()
    first, second = (_by_index(data, _epoch(loader, epoch)) for epoch in (0, 1))
    assert torch.equal(first, second) != is_fresh
    assert torch.equal(first, _by_index(data, _epoch(loader, 0)))


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("values", DRAWN)
def test_held_out_values_are_drawn_once(values, split):
    data = _data(_random_arrays(values))
    assert torch.equal(_by_index(data, data.held_out_loader(split)), _by_index(data, data.held_out_loader(split)))


@pytest.mark.parametrize("values", DRAWN)
def test_held_out_values_are_the_same_in_every_run(values):
    first, second = (_data(_random_arrays(values), seed=seed) for seed in (0, 1))
    for split in ("train", "val", "test"):
        assert torch.equal(*(_by_index(data, data.held_out_loader(split)) for data in (first, second)))


@pytest.mark.parametrize("values", DRAWN)
def test_training_values_depend_on_the_seed_unless_they_are_drawn_once(values):
    first, second = (_data(_random_arrays(values), seed=seed) for seed in (0, 1))
    is_same = torch.equal(*(_by_index(data, data.train_dataloader()) for data in (first, second)))
    assert is_same == (values == "binary_static")


def test_splits_do_not_share_their_noise():
    x = np.full((50, 1, 8, 8), 128, dtype=np.uint8)
    arrays = _random_arrays("binary_static")
    arrays = replace(arrays, splits={name: Split(x, None) for name in ("train", "val", "test")})
    data = _data(arrays)
    train, val, test = (next(iter(data.held_out_loader(name))).x for name in ("train", "val", "test"))
    assert not torch.equal(train, val)
    assert not torch.equal(val, test)


@pytest.mark.parametrize("values", DRAWN)
def test_drawn_values_do_not_depend_on_the_batch_size(values):
    first, second = (_data(_random_arrays(values), batch_size=size) for size in (4, 30))
    assert torch.equal(_by_index(first, first.train_dataloader()), _by_index(second, second.train_dataloader()))
    assert torch.equal(_by_index(first, first.val_dataloader()), _by_index(second, second.val_dataloader()))


def test_workers_change_nothing():
    alone, helped = (_data(_random_arrays("binary_dynamic"), num_workers=count) for count in (0, 2))
    for batch, same in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert torch.equal(batch.x, same.x)
        assert torch.equal(batch.condition, same.condition)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("values", ["binary_static", "binary_dynamic"])
def test_binary_value_is_one_as_often_as_the_grey_value_says(values, split):
    num_images = 2000
    data = _data(_grey_ramps(values, num_images), batch_size=500)
    x = _by_index(data, data.held_out_loader(split) if split == "test" else data.train_dataloader()).flatten(1)
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    share, p = (x == 1).double().mean(0), torch.arange(256) / 255
    assert (share[0], share[255]) == (0, 1)
    deviation = (share - p)[1:-1] / (p * (1 - p) / num_images)[1:-1].sqrt()
    assert deviation.abs().max() < 4.5  # standard errors; 254 normal values stay below 4.5 with probability 0.998
    assert deviation.square().mean() == pytest.approx(1, abs=0.4)


def test_binary_pixels_are_drawn_independently():
    data = _data(_arrays(np.full((2000, 1, 4, 4), 128, dtype=np.uint8), "binary_dynamic"), batch_size=500)
    x = _by_index(data, data.train_dataloader()).flatten(1)
    covariance = torch.cov(x.double().T)
    torch.testing.assert_close(covariance, torch.eye(16, dtype=torch.float64), rtol=0, atol=4.5 / 2000**0.5)


def test_continuous_value_lies_anywhere_in_the_bin_of_its_level_and_nowhere_else():
    data = _data(_grey_ramps("continuous", 2000), batch_size=500)
    x = _by_index(data, data.train_dataloader()).flatten(1).double()
    place = (x + 1) * 128  # in bins
    assert x.abs().max() <= 1
    assert torch.equal(place.floor().long(), torch.arange(256).expand(2000, -1))
    inside = place - place.floor()
    assert inside.mean() == pytest.approx(1 / 2, abs=0.002)
    assert inside.var() == pytest.approx(1 / 12, abs=0.001)


# --- loaders ---------------------------------------------------------------------------------------------------------


def _order(loader: DataLoader) -> list[int]:
    return torch.cat([batch.condition for batch in loader]).tolist()


def test_training_sees_an_example_at_most_once_an_epoch_and_in_full_batches():
    loader = _data(_random_arrays("discrete"), batch_size=16).train_dataloader()
    assert [len(batch) for batch in loader] == [16, 16, 16]
    order = _order(loader)
    assert len(set(order)) == len(order) == 48


def test_training_order_is_a_function_of_seed_and_epoch():
    orders = {
        (seed, epoch): tuple(_order(_epoch(_data(_random_arrays("discrete"), seed=seed).train_dataloader(), epoch)))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len(set(orders.values())) == len(orders)
    again = _epoch(_data(_random_arrays("discrete"), seed=1).train_dataloader(), 2)
    assert tuple(_order(again)) == orders[1, 2]


def test_training_order_changes_from_epoch_to_epoch_under_lightning():
    data, recorder = _data(_random_arrays("discrete")), _Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(recorder, datamodule=data)
    expected = [_order(_epoch(_data(_random_arrays("discrete")).train_dataloader(), epoch)) for epoch in range(3)]
    assert recorder.orders == expected


class _Recorder(L.LightningModule):
    """Learns nothing and writes down which examples it was given in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.orders: list[list[int]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0)

    def on_train_epoch_start(self) -> None:
        self.orders.append([])

    def validation_step(self, batch: Batch, batch_idx: int) -> None: ...

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert batch.x.is_floating_point()  # in data units by now
        self.orders[-1] += batch.condition.tolist()
        return self.weight * 0


def test_every_example_is_left_out_in_some_epochs_only():
    loader = _data(_random_arrays("discrete"), batch_size=16).train_dataloader()
    seen = [set(_order(_epoch(loader, epoch))) for epoch in range(20)]
    assert set.union(*seen) == set(range(60))


def test_held_out_examples_come_once_and_in_order():
    loader = _data(_random_arrays("discrete"), batch_size=16).held_out_loader("val")
    assert _order(loader) == list(range(60))


@pytest.mark.parametrize("values", ["discrete", *DRAWN])
def test_chosen_held_out_examples_are_those_of_the_whole_split(values):
    data, chosen = _data(_random_arrays(values), batch_size=16), torch.arange(3, 60, 2)
    loader = data.held_out_loader("test", chosen)
    assert _order(loader) == chosen.tolist()
    assert torch.equal(_by_index(data, loader), _by_index(data, data.held_out_loader("test"))[chosen])


def test_hash_of_a_split_is_of_its_images_and_labels_as_they_are_now():
    x, y = np.arange(5000 * 4, dtype=np.uint8).reshape(5000, 1, 2, 2), np.arange(5000)
    other_x, other_y = x.copy(), y.copy()
    other_x[4999] += 1
    other_y[0] += 1
    splits = [Split(x, y), Split(other_x, y), Split(x, other_y), Split(x, None)]
    assert len({split.sha256 for split in splits}) == len(splits)
    assert Split(x.copy(), y.copy()).sha256 == splits[0].sha256


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch_out_among_themselves(world_size):
    orders = []
    for rank in range(world_size):
        data = _data(_random_arrays("discrete"), batch_size=10)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
        orders.append(_order(data.train_dataloader()))
    seen = [index for order in orders for index in order]
    assert sorted(seen) == list(range(60))
    assert len({len(order) for order in orders}) == 1


@pytest.mark.parametrize("values", ["discrete", *DRAWN])
def test_batch_larger_than_the_data_set_is_the_data_set(values):
    data = _data(_random_arrays(values), batch_size=1000)
    assert [sorted(batch.condition.tolist()) for batch in data.train_dataloader()] == [list(range(60))]
    assert [len(batch) for batch in data.held_out_loader("test")] == [60]


@pytest.mark.parametrize(("key", "value"), [("batch_size", 0), ("eval_batch_size", 0), ("num_workers", -1)])
def test_senseless_loader_setting_is_refused_by_its_name(key, value):
    settings = {"batch_size": 1, "eval_batch_size": 1, "num_workers": 0} | {key: value}
    with pytest.raises(UserError, match=f"loader.{key}={value}"):
        ArrayData(_random_arrays("discrete"), **settings, seed=0)


# --- the data spec ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "levels"), [("discrete", 256), ("discrete", 17), ("binary_static", 2)])
def test_levels_survive_a_round_trip_through_data_units(values, levels):
    spec = image_spec((1, 2, 2), values, levels)
    k = torch.arange(levels, dtype=torch.uint8)
    assert torch.equal(spec.to_levels(spec.to_units(k)), k.long())


def test_data_units_are_clamped_and_rounded_to_the_nearest_level():
    spec = image_spec((1, 2, 2), "discrete", 5)  # levels at -1, -0.5, 0, 0.5, 1
    x = torch.tensor([-7.0, -0.76, -0.74, 0.24, 0.26, 7.0])
    assert spec.to_levels(x).tolist() == [0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("values", ["discrete", *DRAWN])
def test_bytes_are_clamped_and_rounded(values):
    x = torch.tensor([-7.0, -1.0, -1 + 2 * 99.6 / 255, -1 + 2 * 100.4 / 255, 1.0, 7.0])
    found = image_spec((1, 2, 2), values).to_bytes(x)
    assert found.dtype == torch.uint8
    assert found.tolist() == [0, 0, 100, 100, 255, 255]


@pytest.mark.parametrize("values", ["discrete", *DRAWN])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_spec_survives_a_round_trip_through_json(values, num_classes):
    spec = image_spec((3, 8, 8), values, num_classes=num_classes)
    assert DataSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
