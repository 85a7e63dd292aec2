"""Metrics against closed forms and reference implementations, and what they say when there is no value."""

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore as TorchmetricsInceptionScore

from src.core.errors import NotApplicable
from src.core.rng import SampleNoise
from src.metrics import spaces
from src.metrics.classifier_score import classifier_score
from src.metrics.features import Extractor, ImageSet, NetworkExtractor, weights_sha256
from src.metrics.frechet import GaussianStatistics, frechet_distance
from src.metrics.metric import HELD_OUT, NOISE, UNTRAINED, Reading
from src.networks.classifier import SmallClassifier
from tests.configs import single_options
from tests.measuring import NUM_CLASSES, SHAPE, byte_images, image_set, make_inputs, make_metric

pytestmark = pytest.mark.usefixtures("same_weights")

ROWS = [HELD_OUT, NOISE, UNTRAINED]


def random(*shape: int, seed: int = 0) -> Tensor:
    return SampleNoise(seed).normal(shape, torch.zeros((), dtype=torch.float64))


def random_covariance(dim: int, seed: int) -> Tensor:
    root = random(dim, 2 * dim, seed=seed)
    return root @ root.T / dim


def random_rotation(dim: int) -> Tensor:
    return torch.linalg.qr(random(dim, dim, seed=9))[0]


def test_frechet_distance_of_diagonal_gaussians_is_the_distance_of_means_and_scales():
    mu_1, mu_2 = random(6), random(6, seed=1)
    scale_1, scale_2 = random(6, seed=2).abs(), random(6, seed=3).abs()
    expected = (mu_1 - mu_2).square().sum() + (scale_1 - scale_2).square().sum()
    distance = frechet_distance(mu_1, scale_1.square().diag(), mu_2, scale_2.square().diag())
    assert float(distance) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("dim", [1, 2, 20])
def test_frechet_distance_agrees_with_scipys_matrix_root(dim):
    mu_1, mu_2 = random(dim), random(dim, seed=1)
    cov_1, cov_2 = random_covariance(dim, seed=2), random_covariance(dim, seed=3)
    root = linalg.sqrtm((cov_1 @ cov_2).numpy()).real
    expected = float((mu_1 - mu_2).square().sum() + cov_1.trace() + cov_2.trace()) - 2 * np.trace(root)
    assert float(frechet_distance(mu_1, cov_1, mu_2, cov_2)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_symmetric_and_zero_only_between_equals():
    first, second = ((random(7, seed=seed), random_covariance(7, seed=seed)) for seed in (0, 1))
    there, back = float(frechet_distance(*first, *second)), float(frechet_distance(*second, *first))
    assert there == pytest.approx(back, rel=1e-12)
    assert there > 0.1
    assert float(frechet_distance(*first, *first)) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_does_not_change_under_rotation_and_grows_with_the_square_of_scale():
    first, second = ((random(7, seed=seed), random_covariance(7, seed=seed)) for seed in (0, 1))
    distance = float(frechet_distance(*first, *second))
    R = random_rotation(7)
    rotated = [(R @ mu, R @ cov @ R.T) for mu, cov in (first, second)]
    scaled = [(3 * mu, 9 * cov) for mu, cov in (first, second)]
    assert float(frechet_distance(*rotated[0], *rotated[1])) == pytest.approx(distance, rel=1e-12)
    assert float(frechet_distance(*scaled[0], *scaled[1])) == pytest.approx(9 * distance, rel=1e-12)


def test_frechet_distance_of_singular_covariances_is_finite_and_not_negative():
    features = random(5, 20)  # fewer samples than dimensions
    mu, cov = features.mean(0), features.T.cov()
    assert float(frechet_distance(mu, cov, mu, cov)) == pytest.approx(0, abs=1e-6)
    assert float(frechet_distance(mu, cov, mu, torch.zeros_like(cov))) == pytest.approx(float(cov.trace()), rel=1e-9)


def test_frechet_distance_of_n_samples_is_biased_by_the_law():
    dim, n, num_repeats = 6, 500, 300
    x = random(num_repeats * n, dim).unflatten(0, (num_repeats, n))
    eye, zero = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    distances = torch.stack([frechet_distance(some.mean(0), some.T.cov(), zero, eye) for some in x])
    law = dim / n + dim * (dim + 1) / (4 * n)
    monte_carlo_error = float(distances.std()) / math.sqrt(num_repeats)
    assert float(distances.mean()) == pytest.approx(law, abs=4 * monte_carlo_error)


def statistics_of(parts: Iterable[Tensor], shift: Tensor, num_blocks: int = 1) -> GaussianStatistics:
    """Of rows that come in parts; row i of each part is in block i mod G."""
    statistics = GaussianStatistics(shift, num_blocks)
    for part in parts:
        statistics.update(part, torch.arange(len(part)) % num_blocks)
    return statistics


@pytest.mark.parametrize("mean", [0.0, 1e6])
@pytest.mark.parametrize("sizes", [[100], [1] * 100, [37, 63]], ids=["one", "singles", "uneven"])
def test_gaussian_statistics_are_the_same_for_any_batches_and_any_mean(mean, sizes):
    x = random(100, 4) + mean
    for num_blocks in (1, 3):
        found_mean, found_cov = statistics_of(x.split(sizes), x[0], num_blocks).compute()
        np.testing.assert_allclose(found_mean, x.numpy().mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found_cov, np.cov(x.numpy(), rowvar=False), rtol=1e-8)


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_gaussian_statistics_of_two_processes_merge(num_blocks):
    x = random(100, 4)
    merged = statistics_of([x[:30]], x[0], num_blocks)
    merged.merge_state(statistics_of([x[30:]], x[0], num_blocks))
    for found, expected in zip(merged.compute(), statistics_of([x], x[0], num_blocks).compute(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_gaussian_statistics_take_float32_and_count_in_float64():
    x = random(1000, 3).float() + 1000
    _, cov = statistics_of(x.split(10), shift=x[0]).compute()
    np.testing.assert_allclose(cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9)


def sure_logits(classes: Tensor, gap: float = 1e3) -> Tensor:
    return gap * nn.functional.one_hot(classes, 10).double()


def test_classifier_score_is_one_for_one_class_and_for_no_idea():
    assert float(classifier_score(random(1, 10).expand(50, -1))) == pytest.approx(1, abs=1e-12)
    assert float(classifier_score(torch.zeros(50, 10))) == pytest.approx(1, abs=1e-12)
    assert float(classifier_score(sure_logits(torch.full((50,), 3)))) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("num_seen", [2, 8, 10])
def test_classifier_score_is_the_number_of_classes_that_are_drawn_equally_and_surely(num_seen):
    assert float(classifier_score(sure_logits(torch.arange(40 * num_seen) % num_seen))) == pytest.approx(num_seen)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classifier_score_lies_between_one_and_the_number_of_classes(scale, dtype):
    assert 1 <= float(classifier_score((scale * random(200, 10)).to(dtype))) <= 10


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`", "ignore:std")
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_classifier_score_agrees_with_torchmetrics_over_one_split(scale):
    logits = scale * random(200, 10)
    reference = TorchmetricsInceptionScore(feature=nn.Identity(), splits=1)
    reference.update(logits)
    assert float(classifier_score(logits)) == pytest.approx(float(reference.compute()[0]), rel=1e-9)


def small_extractor() -> NetworkExtractor:
    return NetworkExtractor("small", SmallClassifier(SHAPE, NUM_CLASSES))


class FirstPixelIsTheClass(Extractor):
    """Sure that the class of an image is the value of its first pixel; its features are the pixels."""

    name, sha256 = "first_pixel", "0"

    def __init__(self) -> None:
        self.num_images = 0

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.num_images += len(images)
        first = images[:, 0, 0, 0].long().clamp(max=NUM_CLASSES - 1)
        return images.flatten(1).float(), 1e3 * nn.functional.one_hot(first, NUM_CLASSES).float()


class Conditional(nn.Module):
    is_conditional = True


class Unreadable(ImageSet):
    """A set whose images cannot be had, as the samples of a diverged model."""

    def __init__(self) -> None:
        super().__init__(self._refuse, count=100)

    def _refuse(self) -> list:
        raise NotApplicable("no images today")


def test_extractor_maps_bytes_to_minus_one_and_one():
    seen = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(x)
            return x, x

    NetworkExtractor("spy", Spy(1, 1))(torch.tensor([0, 51, 255], dtype=torch.uint8))
    torch.testing.assert_close(seen[0], torch.tensor([-1.0, -0.6, 1.0]))


def test_extractor_is_frozen_and_no_use_changes_it():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 5), nn.Dropout())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = self.layers(x)
            return features, features

    network = Network().train()
    extractor = NetworkExtractor("noisy", network)
    images = byte_images(12)
    first, _ = extractor(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = torch.cat([extractor(image[None])[0] for image in images])
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training
    assert first.dtype == torch.float32
    assert not first.requires_grad
    torch.testing.assert_close(alone, first, rtol=1e-5, atol=1e-6)
    assert weights_sha256(network) == extractor.sha256


def test_hash_of_weights_is_of_their_numbers_and_names():
    first, again, other = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)
    again.load_state_dict(first.state_dict())
    assert weights_sha256(first) == weights_sha256(again) != weights_sha256(other)
    assert weights_sha256(nn.Sequential(first)) != weights_sha256(first)


def test_images_are_sent_through_an_extractor_once_for_all_metrics():
    extractor = FirstPixelIsTheClass()
    inputs = make_inputs(generated=image_set(byte_images(200)), reference=image_set(byte_images(40)), classifier=extractor)
    for name in ("fd", "cs", "fd"):
        make_metric(name).measure(inputs)
    assert extractor.num_images == 200 + 40


def test_image_set_keeps_order_and_labels():
    images, labels = byte_images(20), torch.arange(20) % NUM_CLASSES
    features = image_set(images, labels, batch_size=6).features(FirstPixelIsTheClass())
    assert features.count == 20
    assert torch.equal(features.features, images.flatten(1).float())
    assert torch.equal(features.labels, labels)
    assert image_set(images).features(FirstPixelIsTheClass()).labels is None


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.double().mean(0), features.double().T.cov()


def test_fd_is_the_distance_of_the_features_of_samples_and_training_images():
    extractor = small_extractor()
    some, others = byte_images(200), byte_images(300, seed=1) // 2
    inputs = make_inputs(
        generated=image_set(some), reference=image_set(others), anchors={HELD_OUT: image_set(others)}, classifier=extractor
    )
    measured = make_metric("fd").measure(inputs)
    x, reference = extractor(some)[0], moments(extractor(others)[0])
    plug_in = float(frechet_distance(*moments(x), *reference))
    assert measured.parts["plug_in"] == pytest.approx(plug_in, rel=1e-6)
    assert measured.anchors[HELD_OUT].parts["plug_in"] == pytest.approx(0, abs=1e-6 * plug_in)
    block = torch.arange(200) % 20
    without = [float(frechet_distance(*moments(x[block != g]), *reference)) for g in range(20)]
    assert measured.value == pytest.approx(20 * plug_in - 19 * np.mean(without), rel=1e-6)
    margin = stats.t(19).ppf(0.975) * math.sqrt(19 * np.var(without))
    assert measured.interval == pytest.approx((measured.value - margin, measured.value + margin), rel=1e-6)


def test_fd_of_one_sample_has_no_value():
    inputs = make_inputs(generated=image_set(byte_images(1)), classifier=small_extractor())
    with pytest.raises(NotApplicable, match="1 images are too few for the covariance of 84 features"):
        make_metric("fd").measure(inputs)


@pytest.mark.parametrize("count", [40, 25, 7])
def test_principal_components_are_those_of_a_fixed_part_of_the_training_images_and_only_it_is_read(count, monkeypatch):
    images, was_read = byte_images(40), []
    small_pixels = spaces._small_pixels

    def spy(some: Tensor) -> Tensor:
        was_read.append(some)
        return small_pixels(some)

    monkeypatch.setattr(spaces, "_MAX_FITTED", count)
    monkeypatch.setattr(spaces, "_small_pixels", spy)
    found = [
        spaces.PrincipalComponents(5).extractor(make_inputs(reference=image_set(images, batch_size=size)))
        for size in (16, 9)
    ]
    parts = [torch.cat(was_read[:3]), torch.cat(was_read[3:])]
    assert torch.equal(*parts)
    rows = [(images == image).flatten(1).all(1).nonzero().item() for image in parts[0]]
    assert len(rows) == len(set(rows)) == count
    if count < 40:
        assert rows != list(range(count))  # not the first ones: a folder of images is sorted by class
    x = parts[0].flatten(1).double() / 127.5 - 1
    variances = torch.linalg.svdvals(x - x.mean(0)).square()[:5] / (count - 1)
    for extractor in found:
        features, _ = extractor(parts[0])
        torch.testing.assert_close(features.double().var(0), variances, rtol=1e-3, atol=1e-5)


def test_principal_components_of_a_single_image_do_not_exist():
    with pytest.raises(NotApplicable, match="at least two training images, not 1"):
        spaces.PrincipalComponents(5).extractor(make_inputs(reference=image_set(byte_images(1))))


def test_network_without_weights_can_be_an_extractor():
    class Passes(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.flatten(1), x.flatten(1)

    features, _ = NetworkExtractor("passes", Passes())(torch.full((2, *SHAPE), 255, dtype=torch.uint8))
    assert torch.equal(features, torch.ones(2, math.prod(SHAPE)))


def test_cs_counts_the_classes_of_the_samples():
    images = torch.zeros(30, *SHAPE, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(30) % 2
    inputs = make_inputs(generated=image_set(images), classifier=FirstPixelIsTheClass())
    assert make_metric("cs").measure(inputs).value == pytest.approx(2)


def test_condition_accuracy_is_the_share_of_samples_of_the_class_asked_for():
    images = torch.zeros(20, *SHAPE, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(20) % NUM_CLASSES
    asked = torch.arange(20) % NUM_CLASSES
    asked[:5] = (asked[:5] + 1) % NUM_CLASSES
    anchors = {HELD_OUT: image_set(images, torch.arange(20) % NUM_CLASSES)}
    inputs = make_inputs(Conditional(), image_set(images, asked), anchors=anchors, classifier=FirstPixelIsTheClass())
    measured = make_metric("condition_accuracy").measure(inputs)
    assert measured.value == 15 / 20
    assert (measured.anchors[HELD_OUT].value, measured.anchors[HELD_OUT].count) == (1.0, 20)


def test_condition_accuracy_has_no_value_for_an_unconditional_model():
    inputs = make_inputs(generated=image_set(byte_images(20)), classifier=FirstPixelIsTheClass())
    with pytest.raises(NotApplicable, match="fake draws no given class"):
        make_metric("condition_accuracy").measure(inputs)


of_the_classifier = pytest.mark.parametrize("name", ["fd", "cs", "condition_accuracy"])


@of_the_classifier
def test_sample_metrics_name_extractor_and_counts_on_their_card(name):
    extractor, labels = small_extractor(), torch.arange(200) % NUM_CLASSES
    images = image_set(byte_images(200), labels)
    inputs = make_inputs(Conditional(), images, anchors={HELD_OUT: images}, classifier=extractor)
    measured = make_metric(name).measure(inputs)
    expected = {"extractor": "small", "extractor_sha256": extractor.sha256, "num_samples": 200, "num_reference": 40}
    expected |= {"quantisation": "clamped and rounded to 0 .. 255", "seed": 0}
    assert expected.items() <= measured.card.items()
    assert measured.anchors == {HELD_OUT: Reading(measured.value, 200, measured.interval, measured.parts)}


@of_the_classifier
def test_reference_rows_stand_beside_the_samples(name):
    sets = {row: image_set(byte_images(200, seed), torch.zeros(200).long()) for seed, row in enumerate(ROWS)}
    inputs = make_inputs(Conditional(), sets[HELD_OUT], anchors=sets, classifier=small_extractor())
    assert list(make_metric(name).measure(inputs).anchors) == ROWS


@of_the_classifier
def test_reference_row_that_cannot_be_measured_says_why_and_the_value_stays(name):
    sets = {HELD_OUT: image_set(byte_images(200), torch.zeros(200).long()), NOISE: Unreadable()}
    inputs = make_inputs(Conditional(), sets[HELD_OUT], anchors=sets, classifier=small_extractor())
    measured = make_metric(name).measure(inputs)
    assert measured.anchors[HELD_OUT].value == measured.value
    assert str(measured.anchors[NOISE]) == "no images today"


@of_the_classifier
def test_sample_metrics_have_no_value_without_a_classifier(name):
    with pytest.raises(NotApplicable, match="there is no classifier"):
        make_metric(name).measure(make_inputs(Conditional(), generated=image_set(byte_images(30))))


@pytest.mark.parametrize("name", single_options("metric"))
def test_metric_says_which_capability_a_model_lacks(name):
    able = "Sample|Score|Bound|Reconstruct|Classify|Weigh|Quantize"
    capabilities = f"Can({able})|Trainable|HasPrior|HasBaseline|HasPaths"
    of_other_data = "it is of (data whose density is known|text|sound)"
    with pytest.raises(NotApplicable, match=f"fake has no ({capabilities})|{of_other_data}"):
        make_metric(name).measure(make_inputs())
