"""What is computed of known images is kept: found again, never stale, never a model's samples, whatever befalls a file."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from src.core.spec import BINARY_STATIC, CONTINUOUS
from src.data.loading import ArrayData
from src.metrics.features import Extractor, ImageSet, NetworkExtractor
from src.metrics.metric import Metric
from src.metrics.store import Store
from src.networks.classifier import SmallClassifier
from tests.evaluating import Draws, all_metrics, digit_data, digits, digits_classifier, real_digits, results_of, uniform
from tests.measuring import SHAPE, byte_images, image_set, make_metric
from tests.processes import NUM_ROUNDS, in_two_processes, race, value_of

KEEPERS = ["fd", "fd_pca", "kd", "precision", "coverage", "modes", "effective_support", "c_t", "copying", "copying_pixels"]


def some_metrics(**instead: Metric) -> dict[str, Metric]:
    return {name: all_metrics()[name] for name in KEEPERS} | instead


def honest() -> Draws:
    return Draws(lambda n, noise: real_digits(n))


class Recording(Store):
    """Writes down what it computes."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__(folder)
        self.computed: list[tuple[str, bool]] = []  # what, and whether it is of images that others can have too

    def get(
        self,
        what: str,
        images: ImageSet,
        extractor: Extractor | None,
        settings: dict[str, Any],
        make: Callable[[], dict[str, Tensor]],
        keep: bool = True,
    ) -> dict[str, Tensor]:
        def recorded() -> dict[str, Tensor]:
            if keep:
                self.computed.append((what, images.identity is not None))
            return make()

        return super().get(what, images, extractor, settings, recorded, keep)


class Counting(Extractor):
    """The classifier of the digits, counting the images it is shown."""

    def __init__(self) -> None:
        self._classifier = digits_classifier()
        self.name, self.sha256 = self._classifier.name, self._classifier.sha256
        self.num_images = 0

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.num_images += len(images)
        return self._classifier(images)


# --- computed once ---------------------------------------------------------------------------------------------------


def test_a_second_evaluation_computes_nothing_of_real_images(tmp_path):
    first, second, classifier = Recording(tmp_path), Recording(tmp_path), Counting()
    results = results_of(honest(), first, classifier=classifier)
    # training images; samples, untrained samples, noise, test and validation images
    assert classifier.num_images == 300 + 5 * 150
    assert sum(is_known for _, is_known in first.computed) > 10
    classifier.num_images = 0
    assert results_of(honest(), second, classifier=classifier) == results
    assert classifier.num_images == 2 * 150  # samples, before and after the training
    assert [what for what, is_known in second.computed if is_known] == []
    assert second.num_computed < first.num_computed


def test_another_model_in_the_same_session_costs_only_its_own_samples():
    store, classifier = Recording(None), Counting()
    results_of(honest(), store, classifier=classifier, metrics=some_metrics())
    store.computed.clear()
    classifier.num_images = 0
    results_of(Draws(uniform), store, classifier=classifier, metrics=some_metrics())
    assert classifier.num_images == 2 * 150
    assert not any(is_known for _, is_known in store.computed)


def test_a_set_of_images_goes_through_an_extractor_once_for_all_metrics():
    store, classifier = Store(None), Counting()
    results_of(honest(), store, classifier=classifier, untrained=honest())
    assert classifier.num_images == 300 + 5 * 150


def test_what_images_are_is_not_asked_unless_something_is_computed_of_them(tmp_path):
    data = digit_data(*digits())
    results_of(honest(), Store(tmp_path), data=data, metrics={"test_loss": make_metric("test_loss")})
    assert not any("sha256" in vars(split) for split in data.arrays.splits.values())
    assert not list(tmp_path.iterdir())
    results_of(honest(), Store(tmp_path), data=data, metrics={"fd": make_metric("fd")})
    assert {name for name, split in data.arrays.splits.items() if "sha256" in vars(split)} == {"train", "test"}


def test_what_images_are_is_asked_once():
    asked = []
    images = image_set(byte_images(10), identity=lambda: asked.append("!") or {"sha256": "0"})
    assert not asked
    for _ in range(3):
        Store(None).features(images, digits_classifier())
    assert asked == ["!"]


# --- never stale -----------------------------------------------------------------------------------------------------


def changed_image(split_start: int) -> ArrayData:
    x, y = digits()
    x = x.copy()
    x[split_start] = 16 - x[split_start]
    return digit_data(x, y)


def changed_label() -> ArrayData:
    x, y = digits()
    y = y.copy()
    y[0] = (y[0] + 1) % 10
    return digit_data(x, y)


def other_classifier() -> NetworkExtractor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NetworkExtractor("digits", SmallClassifier(SHAPE, 10))  # of the same name


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "a training image": lambda: {"data": changed_image(0)},
    "a test image": lambda: {"data": changed_image(300)},
    "a validation image": lambda: {"data": changed_image(850)},
    "a label": lambda: {"data": changed_label()},
    "one image less": lambda: {"data": digit_data(*digits(), num_train=299)},
    "binary pixels": lambda: {"data": digit_data(*digits(), values=BINARY_STATIC)},
    "what the levels mean": lambda: {"data": digit_data(*digits(), levels=256)},
    "what the levels mean, of continuous pixels": lambda: {"data": digit_data(*digits(), values=CONTINUOUS, levels=256)},
    "the weights": lambda: {"classifier": other_classifier()},
    "the number of samples": lambda: {"num_samples": 145},
    "the neighbours": lambda: {"metrics": some_metrics(precision=make_metric("precision", k=3))},
    "the components": lambda: {
        "metrics": some_metrics(
            fd_pca=make_metric("fd_pca", space={"_target_": "src.metrics.spaces.PrincipalComponents", "num_components": 9})
        )
    },
    "the quantile": lambda: {"metrics": some_metrics(effective_support=make_metric("effective_support", quantile=0.2))},
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale_is_served_after_a_change_of(change, tmp_path):
    before: dict[str, Any] = {"metrics": some_metrics()}
    if "continuous" in change:
        before["data"] = digit_data(*digits(), values=CONTINUOUS)
    after = before | CHANGES[change]()
    earlier = results_of(honest(), Store(tmp_path), **before)
    afresh = results_of(honest(), Store(None), **after)
    assert results_of(honest(), Store(tmp_path), **after) == afresh
    assert change == "a label" or afresh != earlier


def test_sets_without_an_identity_are_never_taken_for_one_another():
    store, classifier = Store(None), digits_classifier()
    for seed in range(30):  # each set is gone before the next is made
        images = byte_images(2, seed)
        assert torch.equal(store.features(image_set(images), classifier).features, classifier(images)[0])


# --- the files -------------------------------------------------------------------------------------------------------


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_files_are_named_after_what_they_hold_and_say_what_it_is_of(tmp_path):
    results_of(honest(), Store(tmp_path), metrics=some_metrics())
    kinds = {file.name.split("-")[0] for file in files_in(tmp_path)}
    assert {"features", "gaussian", "kernel", "radii", "prdc", "nearest", "principal_components"} <= kinds
    for file in files_in(tmp_path):
        with safe_open(file, framework="pt") as opened:
            assert '"images"' in opened.metadata()["text"]


def test_samples_of_a_model_are_never_kept(tmp_path):
    results_of(honest(), Store(tmp_path))
    kept = files_in(tmp_path)
    results_of(Draws(uniform), Store(tmp_path), untrained=honest())
    assert files_in(tmp_path) == kept
    of_samples, _ = digits_classifier()(real_digits(150).add(1).mul(127.5).round().byte())
    for file in kept:
        for tensor in load_file(file).values():
            assert tensor.shape != of_samples.shape or not torch.isclose(tensor.float(), of_samples).all(1).any(), file


def test_pixels_are_computed_faster_than_read_so_they_are_not_kept(tmp_path):
    results_of(honest(), Store(tmp_path), metrics={"copying_pixels": make_metric("copying_pixels")})
    kinds = {file.name.split("-")[0] for file in files_in(tmp_path)}
    assert kinds == {"features", "nearest"}  # features of the classifier, by which classes are told apart
    assert all(load_file(file)["features"].shape[1] == 84 for file in tmp_path.glob("features-*"))


def exchange(file: Path) -> None:
    file.write_bytes(next(other for other in files_in(file.parent) if other != file).read_bytes())


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-10]),
    "cut off in its head": lambda file: file.write_bytes(file.read_bytes()[:20]),
    "text": lambda file: file.write_text("nothing that a tensor could be read from"),
    "of something else": exchange,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_computed_anew_with_a_warning(damage, tmp_path, caplog):
    results = results_of(honest(), Store(tmp_path), metrics=some_metrics())
    healthy = {file: file.read_bytes() for file in files_in(tmp_path)}
    for file in healthy:
        DAMAGES[damage](file)
    with caplog.at_level(logging.WARNING):
        assert results_of(honest(), Store(tmp_path), metrics=some_metrics()) == results
    warned = {file for file in healthy if any(f"{file} is damaged" in message for message in caplog.messages)}
    assert warned
    assert all(file.read_bytes() == healthy[file] for file in warned)
    caplog.clear()
    assert results_of(honest(), Store(tmp_path), metrics=some_metrics()) == results
    assert not warned & {file for file in healthy if any(str(file) in message for message in caplog.messages)}


def test_a_folder_that_cannot_be_written_to_costs_no_result(tmp_path):
    blocked = tmp_path / "statistics"
    blocked.write_text("a file where the folder should be")
    results = results_of(honest(), Store(None), metrics=some_metrics())
    assert results_of(honest(), Store(blocked), metrics=some_metrics()) == results


# --- two at once -----------------------------------------------------------------------------------------------------


def test_two_processes_that_compute_the_same_at_once_both_get_it(tmp_path):
    folder, failures = tmp_path / "statistics", tmp_path / "failures"
    in_two_processes(race, folder, failures)
    assert not failures.exists(), failures.read_text()
    files = files_in(folder)
    assert len(files) == NUM_ROUNDS
    assert all(file.suffix == ".safetensors" for file in files)  # nothing unfinished is left
    assert sorted(float(load_file(file)["x"][0]) for file in files) == [float(value_of(i)[0]) for i in range(NUM_ROUNDS)]


def test_what_another_evaluation_wrote_in_the_meantime_does_no_harm(tmp_path):
    images = image_set(byte_images(10), identity=lambda: {"sha256": "0"})
    expected = {"x": torch.arange(5)}

    def slowly() -> dict[str, Tensor]:
        Store(tmp_path).get("race", images, None, {}, lambda: expected)  # the other one
        return expected

    for _ in range(2):  # computed, then read
        assert torch.equal(Store(tmp_path).get("race", images, None, {}, slowly)["x"], expected["x"])
    assert len(files_in(tmp_path)) == 1
