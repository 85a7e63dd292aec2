"""Stacked MNIST: digits in channels, their joint reading, and the metrics of known modes on them."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from src.core.errors import NotApplicable, UserError
from src.core.spec import DISCRETE, DataSpec
from src.core.stack import Stack
from src.data import stacked_mnist as module
from src.data.arrays import Arrays, image_values, save_in_chunks
from src.data.loading import ArrayData
from src.data.stacked_mnist import stacked_mnist
from src.data.torchvision_sets import mnist
from src.experiment import _classifier
from src.metrics.classifier_score import classifier_score
from src.metrics.features import Extractor, Features, ImageSet
from src.metrics.metric import HELD_OUT, NOISE, Inputs, Measurement
from src.metrics.mixture_modes import kl_by_luck, kl_floor
from src.metrics.stacked_classifier import StackExtractor
from src.metrics.store import Store
from src.training.callbacks.pictures import image_grid
from tests.configs import compose_config, load_option
from tests.evaluating import results_of
from tests.measuring import image_set, make_inputs, make_metric
from tests.mnist import DATA_ROOT, Given, needs_mnist

SPLITS = ("train", "val", "test")
TRIPLES = Stack(num_images=3, num_classes=10)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A stand-in of MNIST in torchvision's layout, with 60 + 30 images that all differ."""
    random = np.random.default_rng(0)
    raw = tmp_path_factory.mktemp("root") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 30)):
        x, y = random.integers(1, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        for kind, values, magic in (("images-idx3", x, 0x803), ("labels-idx1", y, 0x801)):
            header = b"".join(n.to_bytes(4, "big") for n in (magic, *values.shape))
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + values.tobytes())
    return raw.parent.parent


SMALL = {"num_digits": 3, "num_train": 200, "num_val": 20, "num_test": 50, "values": DISCRETE, "download": False}


def _small(root: Path, cache: Path, **keys: int | str) -> Arrays:
    return stacked_mnist(str(root), str(cache), **(SMALL | keys))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def arrays(root, cache) -> Arrays:
    return _small(root, cache)


def _places(arrays: Arrays, digits: Arrays, split: str) -> np.ndarray:
    """Which digit of the split is in each channel, `(N, num_digits)`; fails if any channel holds none of them."""
    place = {image.tobytes(): i for i, image in enumerate(digits.splits[split].x)}
    assert len(place) == len(digits.splits[split])
    part = arrays.splits[split].x[:, : arrays.stack.num_images]
    return np.array([[place[channel.tobytes()] for channel in image] for image in part])


# --- the data --------------------------------------------------------------------------------------------------------


def test_stacks_have_three_digits_of_their_split_and_the_number_they_make_for_a_class(root, cache, arrays):
    digits = mnist(str(root), str(cache), DISCRETE, num_val=20, download=False)
    assert {split: arrays.splits[split].x.shape for split in SPLITS} == {
        "train": (200, 3, 28, 28), "val": (20, 3, 28, 28), "test": (50, 3, 28, 28),
    }  # fmt: skip
    for split in SPLITS:
        part = arrays.splits[split]
        assert (part.x.dtype, part.y.dtype) == (np.dtype("uint8"), np.dtype("int64"))
        labels = digits.splits[split].y[_places(arrays, digits, split)]  # so no digit is in stacks of two splits
        np.testing.assert_array_equal(part.y, labels @ [100, 10, 1])
    assert arrays.spec.describe() == "image 3x28x28, discrete values (256 levels), 1000 classes"
    assert [arrays.spec.class_names[k] for k in (0, 7, 314, 999)] == ["000", "007", "314", "999"]
    assert arrays.stack == TRIPLES


def test_digits_are_drawn_evenly_and_independently_for_each_channel(root, cache):
    digits = mnist(str(root), str(cache), DISCRETE, num_val=20, download=False)
    place = _places(_small(root, cache, num_train=4000), digits, "train")
    counts = np.stack([np.bincount(column, minlength=40) for column in place.T])
    assert abs(counts - 100).max() < 5 * math.sqrt(100)
    assert abs(np.corrcoef(place.T) - np.eye(3)).max() < 4 / math.sqrt(4000)


@pytest.mark.parametrize(("num_digits", "num_classes", "names"), [(1, 10, ("0", "9")), (2, 100, ("00", "99"))])
def test_channels_without_a_digit_are_black(root, cache, num_digits, num_classes, names):
    arrays = _small(root, cache, num_digits=num_digits)
    assert arrays.stack == Stack(num_digits, 10)
    assert (arrays.spec.num_classes, arrays.spec.class_names[0], arrays.spec.class_names[-1]) == (num_classes, *names)
    for split in SPLITS:
        x = arrays.splits[split].x
        assert x.shape[1:] == (3, 28, 28)
        assert x[:, :num_digits].min() > 0
        assert x[:, num_digits:].max() == 0
    data = ArrayData(arrays, 10, 10, 0, 0)
    assert set(data.to_units(next(iter(data.held_out_loader("test")))).x[:, num_digits:].unique().tolist()) == {-1.0}


def test_same_stacks_are_made_everywhere_and_others_for_other_settings(root, cache, arrays, tmp_path):
    assert _small(root, tmp_path).fingerprint == arrays.fingerprint
    others = [_small(root, tmp_path, **{key: 30}) for key in ("num_train", "num_val", "num_test")]
    assert len({some.fingerprint for some in [arrays, _small(root, tmp_path, num_digits=2), *others]}) == 5


def test_choice_of_digits_does_not_depend_on_the_machine(root, cache, arrays):
    """The first ones as they were chosen once, on Linux with an x86-64 processor."""
    digits = mnist(str(root), str(cache), DISCRETE, num_val=20, download=False)
    assert _places(arrays, digits, "train")[:2].tolist() == [[15, 37, 35], [26, 10, 6]]


def test_stacks_written_in_pieces_are_those_written_at_once(root, arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7)
    in_pieces = _small(root, tmp_path)
    assert in_pieces.fingerprint == arrays.fingerprint
    for split in SPLITS:
        assert isinstance(in_pieces.splits[split].x, np.memmap)
        np.testing.assert_array_equal(in_pieces.splits[split].x, arrays.splits[split].x)


def test_array_saved_in_pieces_is_whole(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (11, 2, 3), dtype=np.uint8)
    save_in_chunks(tmp_path, "train", x.shape, (x[i : i + 4] for i in range(0, 11, 4)), np.arange(11))
    np.testing.assert_array_equal(np.load(tmp_path / "train_x.npy"), x)
    np.testing.assert_array_equal(np.load(tmp_path / "train_y.npy"), np.arange(11))
    with pytest.raises(AssertionError):
        save_in_chunks(tmp_path, "val", x.shape, [x[:4]], np.arange(11))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("num_digits", 4, "data.num_digits=4 must be 1, 2 or 3"),
        ("num_digits", 0, "data.num_digits=0 must be 1, 2 or 3"),
        ("num_train", 1, "data.num_train=1 must be at least 2"),
        ("num_test", 0, "data.num_test=0 must be at least 2"),
        ("num_val", 60, "data.num_val=60 must be between 1 and 59"),
        ("values", "grey", "data.values=grey is not known"),
    ],
)
def test_senseless_setting_is_refused_by_its_key(root, tmp_path, key, value, sentence):
    with pytest.raises(UserError, match=sentence):
        _small(root, tmp_path, **{key: value})


def test_missing_mnist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data=mnist is not under .* set data\.root="):
        _small(tmp_path / "nowhere", tmp_path)


def test_config_has_pacgans_numbers_and_mnists_classifier():
    config, of_mnist = compose_config("data=stacked_mnist"), load_option("data", "mnist")
    assert (config.data.num_train, config.data.num_test, config.evaluation.num_samples) == (128_000, 26_000, 26_000)
    assert config.evaluation.classifier == of_mnist.evaluation.classifier
    assert list(config.callback.light_evaluation.metrics) == ["modes_covered", "reverse_kl"]


def test_grid_of_stacks_is_in_colour(arrays):
    levels = torch.from_numpy(np.array(arrays.splits["test"].x[:2]))
    picture = image_grid(arrays.spec, arrays.spec.to_units(levels), per_row=2)
    side = picture.shape[1] - 2  # without the lines
    assert torch.equal(picture[:, 1 : 1 + side : side // 28, 1 : 1 + side : side // 28], levels[0])


# --- joint reading ---------------------------------------------------------------------------------------------------


class Corner(Extractor):
    """Reads a one-channel image as the class in its first pixel, quite surely; all of its first row are its features."""

    name, sha256, accuracy = "corner", "ab", 0.9

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert images.shape[1] == 1
        return images[:, 0, 0].float(), 50 * torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 10).float()


def _stacks(classes: Tensor, num_digits: int = 3) -> Tensor:
    """Images `(N, 3, 4, 4)` that `Corner` reads as the classes `(N,)` of stacks."""
    x = torch.zeros(len(classes), 3, 4, 4, dtype=torch.uint8)
    for channel in range(num_digits):
        x[:, channel, 0, 0] = classes // 10 ** (num_digits - 1 - channel) % 10
    return x


def test_class_of_a_stack_is_the_number_its_digits_make():
    assert TRIPLES.num_joint_classes == 1000
    assert TRIPLES.joint_class(torch.tensor([[3, 1, 4], [0, 0, 7], [9, 9, 9]])).tolist() == [314, 7, 999]
    assert Stack(1, 10).joint_class(torch.tensor([[3]])).tolist() == [3]


@pytest.mark.parametrize("num_digits", [1, 2, 3])
def test_channels_are_read_one_by_one(num_digits):
    classes = torch.arange(10**num_digits)
    stack = Stack(num_digits, 10)
    extractor = StackExtractor(Corner(), stack)
    features, logits = extractor(_stacks(classes, num_digits))
    found = Features(features, logits, None, stack)
    assert torch.equal(found.classes, classes)
    assert torch.equal(found.logits.argmax(1), classes)
    assert found.num_classes == 10**num_digits
    assert features.shape == (len(classes), 4 * num_digits)
    assert torch.equal(features[:, ::4], _stacks(classes, num_digits)[:, :num_digits, 0, 0].float())
    assert extractor.name == f"corner, on each of {num_digits} channels"
    assert (extractor.sha256, extractor.accuracy) == ("ab", pytest.approx(0.9**num_digits))


def test_joint_log_probabilities_are_the_sums_of_those_of_the_channels():
    stack = Stack(3, 4)
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    p = logits.double().reshape(5, 3, 4).softmax(2)
    expected = torch.einsum("na,nb,nc->nabc", *p.unbind(1)).flatten(1)
    found = Features(torch.zeros(5, 1), logits, None, stack).logits
    torch.testing.assert_close(found.double().exp(), expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(5))


def test_only_the_parts_are_kept(tmp_path):
    """30 logits a stack, not 1,000; and what is read again from the disk is read as a stack, too."""
    images = image_set(_stacks(torch.arange(1000)), identity=lambda: {"some": "stacks"})
    inputs = make_inputs(generated=images, store=Store(tmp_path))
    extractor = StackExtractor(Corner(), TRIPLES)
    assert inputs.features(images, extractor).logits.shape == (1000, 1000)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 4 * 1000 * (12 + 30) + 1000
    again = replace(inputs, store=Store(tmp_path)).features(images, extractor)
    assert torch.equal(again.classes, torch.arange(1000))


# --- the metrics -----------------------------------------------------------------------------------------------------


def _inputs(classes: Tensor, num_digits: int = 3) -> Inputs:
    stack = Stack(num_digits, 10)
    inputs = make_inputs(
        generated=image_set(_stacks(classes, num_digits), batch_size=1000), classifier=StackExtractor(Corner(), stack)
    )
    names = tuple(f"{k:0{num_digits}d}" for k in range(10**num_digits))
    return replace(inputs, spec=DataSpec("stacked", "image", (3, 4, 4), image_values(DISCRETE, 256), names), stack=stack)


def _measured(name: str, classes: Tensor, num_digits: int = 3) -> Measurement:
    return make_metric(name).measure(_inputs(classes, num_digits))


def _drawn(num_modes: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(num_modes, (count,), generator=torch.Generator().manual_seed(seed))


def test_all_modes_drawn_evenly_have_nothing_to_complain_of():
    covered, divergence = (_measured(name, _drawn(1000, 26_000)) for name in ("modes_covered", "reverse_kl"))
    assert (covered.value, covered.parts["of"], covered.finding.words) == (1000, 1000, "1000 of 1000 modes")
    assert divergence.value == pytest.approx(kl_floor(1000, 26_000), abs=4 * math.sqrt(2 * 999) / (2 * 26_000))
    assert divergence.parts["floor"] == 999 / 52_000
    assert divergence.parts["largest"] == pytest.approx(math.log(1000))
    assert {covered.finding.alarm, divergence.finding.alarm} == {None}
    for some in (covered, divergence):
        assert some.card["extractor"] == "corner, on each of 3 channels"
        assert (some.card["extractor_sha256"], some.card["num_components"]) == ("ab", 1000)
        assert (some.card["num_samples"], some.card["reference"]) == (26_000, "all modes equally likely")
    assert (divergence.unit, divergence.card["logarithm"]) == ("nats", "natural")


def test_three_hundred_modes_are_counted_and_the_rest_is_missed():
    covered, divergence = (_measured(name, _drawn(300, 26_000)) for name in ("modes_covered", "reverse_kl"))
    assert covered.value == 300
    assert [name for name in covered.parts if name.startswith("missing_")] == [f"missing_{k}" for k in range(300, 1000)]
    assert covered.finding.words.startswith("300 of 1000 modes (missing: 300, 301, ")
    assert covered.finding.words.endswith(" and 690 more)")
    expected = math.log(1000 / 300) + kl_floor(300, 26_000)
    assert divergence.value == pytest.approx(expected, abs=4 * math.sqrt(2 * 299) / (2 * 26_000))
    assert [covered.finding.alarm, divergence.finding.alarm] == ["modes", "modes"]


def test_one_sample_makes_a_mode_and_one_mode_has_the_largest_divergence():
    one = torch.full((2600,), 271)
    assert _measured("modes_covered", torch.cat([one, torch.tensor([0, 999])])).value == 3
    covered, divergence = (_measured(name, one) for name in ("modes_covered", "reverse_kl"))
    said = "1 of 1000 modes (in 2,600 samples, too few to call a mode missing; a perfect sampler reaches about 926)"
    assert covered.finding.words == said
    assert divergence.value == pytest.approx(math.log(1000))
    assert divergence.finding.alarm == "modes"


@pytest.mark.parametrize("num_samples", [100, 1000, 2600, 5000, 26_000])
def test_even_draws_are_no_alarm_however_few(num_samples):
    """And as many modes are reached as are expected."""
    for seed in range(10):
        covered, divergence = (_measured(n, _drawn(1000, num_samples, seed)) for n in ("modes_covered", "reverse_kl"))
        assert {covered.finding.alarm, divergence.finding.alarm} == {None}
        assert divergence.value < kl_by_luck(torch.full((1000,), 1e-3), num_samples)
        assert covered.value == pytest.approx(covered.parts["expected"], abs=4 * math.sqrt(1000 / 4) + 1)


def test_two_digits_have_a_hundred_modes():
    covered, divergence = (_measured(name, _drawn(90, 5000), num_digits=2) for name in ("modes_covered", "reverse_kl"))
    assert (covered.value, covered.parts["of"], covered.finding.alarm) == (90, 100, "modes")
    assert "missing_95" in covered.parts
    assert divergence.value == pytest.approx(math.log(100 / 90) + kl_floor(90, 5000), abs=4 * math.sqrt(2 * 89) / 10_000)


def test_stacks_have_no_high_quality_and_the_reason_is_given():
    with pytest.raises(NotApplicable, match="distances to the means of a mixture; the modes of data=stacked are classes"):
        _measured("high_quality", _drawn(1000, 100))


def test_classifier_of_other_classes_is_refused():
    inputs = replace(_inputs(_drawn(1000, 100)), stack=Stack(2, 10))
    with pytest.raises(NotApplicable, match="the classifier knows 1000 classes, not the 100 modes"):
        make_metric("modes_covered").measure(inputs)


def test_metrics_of_classes_see_the_joint_ones():
    even = _inputs(_drawn(1000, 5000))
    inputs = replace(even, reference=image_set(_stacks(_drawn(1000, 20_000, seed=1)), batch_size=1000))
    assert make_metric("modes").measure(inputs).parts["of"] == 1000
    # e to the entropy of the marginal, which 5,000 draws miss a little of
    assert make_metric("cs").measure(inputs).value == pytest.approx(1000 * math.exp(-kl_floor(1000, 5000)), rel=0.02)
    stack = Features(torch.zeros(2, 1), torch.zeros(2, 30), None, TRIPLES)
    assert float(classifier_score(stack.logits)) == pytest.approx(1, abs=1e-5)


# --- which classifier ------------------------------------------------------------------------------------------------


def _found(arrays: Arrays, *overrides: str) -> Extractor:
    data = ArrayData(arrays, 10, 10, 0, 0)
    return _classifier(compose_config("data=stacked_mnist", *overrides), data, torch.device("cpu"))()


def test_evaluation_reads_the_channels_with_the_classifier_of_mnist(arrays):
    extractor = _found(arrays)
    assert isinstance(extractor, StackExtractor)
    assert extractor.name == "mnist, on each of 3 channels"
    assert extractor.sha256 == load_option("data", "mnist").evaluation.classifier.sha256
    features, logits = extractor(torch.from_numpy(np.array(arrays.splits["test"].x)))
    assert (features.shape, logits.shape) == ((50, 3 * 84), (50, 30))


@pytest.mark.parametrize("file", ["cifar10", "digits"])
def test_classifier_of_other_images_is_refused(arrays, file):
    sha256 = load_option("data", file).evaluation.classifier.sha256
    given = (f"evaluation.classifier.file={file}.safetensors", f"evaluation.classifier.sha256={sha256}")
    with pytest.raises(
        NotApplicable, match=r"the classifier .* is of .* images in 10 classes; data=stacked_mnist gives image 3x"
    ):
        _found(arrays, *given)


# --- real digits -----------------------------------------------------------------------------------------------------


@functools.cache
def _real(cache: Path) -> tuple[ArrayData, Extractor]:
    """Stacks of the real digits, fewer for training, and their classifier."""
    arrays = stacked_mnist(str(DATA_ROOT), str(cache), DISCRETE, 3, 3000, 5000, 2600, download=False)
    return ArrayData(arrays, 100, 500, 0, 0), _found(arrays)


@needs_mnist
def test_real_stacks_are_read_rightly_as_often_as_the_card_says(cache):
    data, extractor = _real(cache)
    part = data.arrays.splits["test"]
    images = ImageSet(lambda: [(torch.from_numpy(np.array(part.x)), None)], len(part))
    right = (replace(images.features(extractor), stack=extractor.stack).classes == torch.from_numpy(part.y)).double()
    assert extractor.accuracy > 0.97
    assert float(right.mean()) == pytest.approx(extractor.accuracy, abs=4 * math.sqrt(0.025 / len(right)))


@needs_mnist
def test_real_stacks_reach_the_modes_and_the_divergence_that_are_expected(cache):
    """In 2,600 samples 923 +- 7 modes and 0.219 +- 0.010 nats, by simulation with the class frequencies of the digits."""
    data, extractor = _real(cache)
    names = ("modes_covered", "reverse_kl")
    model = Given(torch.from_numpy(np.array(data.arrays.splits["test"].x)))
    metrics = {name: make_metric(name) for name in names}
    found = results_of(model, Store(None), data, num_samples=2600, metrics=metrics, classifier=extractor, untrained=model)
    covered, divergence = (found["metrics"][name] for name in names)
    for some in (covered, covered["anchors"][HELD_OUT]):
        assert some["value"] == pytest.approx(923, abs=30)
    for some in (divergence, divergence["anchors"][HELD_OUT]):
        assert some["value"] == pytest.approx(0.219, abs=0.04)
    assert covered["parts"]["expected"] == pytest.approx(1000 * (1 - 0.999**2600))
    assert covered["anchors"][NOISE]["value"] < 500
    assert divergence["anchors"][NOISE]["value"] > 2
    assert [some["finding"]["alarm"] for some in (covered, divergence)] == [None, None]
