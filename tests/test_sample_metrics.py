"""Metrics of samples against closed forms, definitions and reference implementations, and what each finding says.

Most tests hand the metrics feature vectors where images would be: `GivenFeatures` passes them on.
"""

import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from src.core.batch import Batch
from src.core.errors import NotApplicable, UserError
from src.core.protocols import Terms
from src.core.rng import Noise
from src.core.spec import DISCRETE
from src.data.loading import ArrayData
from src.evaluation.results import absences, findings, results_table, to_markdown
from src.experiment import load_model, load_spec
from src.metrics import neighbours
from src.metrics.features import Extractor
from src.metrics.frechet import (
    GaussianStatistics,
    GaussianSums,
    effective_dimension,
    frechet_distance,
    gaussian_of,
    matrix_root,
)
from src.metrics.frozen_classifier import SHIPPED, read_frozen
from src.metrics.intervals import mean_interval, wilson_interval
from src.metrics.jackknife import NUM_BLOCKS, block_of, jackknife
from src.metrics.manifold import QUANTITIES, prdc
from src.metrics.memorization import mann_whitney, neighbour_ratio
from src.metrics.metric import HELD_OUT, Finding, Inputs, Measurement
from src.metrics.modes import histogram_kl, poisson_cdf
from src.metrics.neighbours import count_near_pairs, nearest_distances, neighbour_radii
from src.metrics.store import Store
from src.metrics.support import support_from_collisions
from tests.commands import train
from tests.evaluating import Draws, all_metrics, digit_data, digits, real_digits, results_of, uniform
from tests.examples import image_spec
from tests.measuring import SHAPE, byte_images, image_set, make_inputs, make_metric
from tests.processes import SPLITS, in_two_processes, meet, moments_of, statistics_of_part

pytestmark = pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")


class GivenFeatures(Extractor):
    """Takes feature vectors `(N, D)` as they are; with more than one class, the last entry is the class."""

    name, sha256 = "given", "0"

    def __init__(self, num_classes: int = 1) -> None:
        self._num_classes = num_classes

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float()
        if self._num_classes == 1:
            return x, torch.zeros(len(x), 1)
        return x[:, :-1], 1e3 * nn.functional.one_hot(x[:, -1].long(), self._num_classes).float()


def inputs_of(
    samples: Tensor,
    reference: Tensor,
    held_out: Tensor | None = None,
    num_classes: int = 1,
    unseen: Tensor | None = None,
) -> Inputs:
    inputs = make_inputs(
        generated=image_set(samples, batch_size=1000),
        reference=image_set(reference, batch_size=1000),
        anchors={} if held_out is None else {HELD_OUT: image_set(held_out, batch_size=1000)},
        classifier=GivenFeatures(num_classes),
        unseen=None if unseen is None else image_set(unseen, batch_size=1000),
    )
    return replace(inputs, spec=image_spec(SHAPE, DISCRETE, num_classes=num_classes))


def measured(
    name: str,
    samples: Tensor,
    reference: Tensor,
    held_out: Tensor | None = None,
    num_classes: int = 1,
    unseen: Tensor | None = None,
    **keys: object,
) -> Measurement:
    return make_metric(name, **keys).measure(inputs_of(samples, reference, held_out, num_classes, unseen))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the jackknife ---------------------------------------------------------------------------------------------------


def test_jackknife_of_a_mean_over_blocks_of_one_is_the_mean_with_students_interval():
    x = normal(30)
    found = jackknife(x.mean(), (x.sum() - x) / (len(x) - 1))
    assert found.corrected == pytest.approx(float(x.mean()), rel=1e-12)
    assert found.standard_error == pytest.approx(stats.sem(x.numpy()), rel=1e-12)
    assert found.interval == pytest.approx(stats.t.interval(0.95, 29, x.mean(), stats.sem(x.numpy())), rel=1e-12)


def test_jackknife_over_blocks_has_the_standard_error_of_the_blocks_means():
    x = normal(NUM_BLOCKS * 50)
    means = torch.stack([x[block_of(len(x)) == g].mean() for g in range(NUM_BLOCKS)])
    found = jackknife(x.mean(), torch.stack([x[block_of(len(x)) != g].mean() for g in range(NUM_BLOCKS)]))
    assert found.corrected == pytest.approx(float(x.mean()), abs=1e-12)
    assert found.standard_error == pytest.approx(stats.sem(means.numpy()), rel=1e-10)


def test_jackknife_takes_the_bias_of_a_variance_away_exactly():
    x = normal(25)
    left_out = torch.stack([torch.cat([x[:i], x[i + 1 :]]).var(correction=0) for i in range(len(x))])
    assert jackknife(x.var(correction=0), left_out).corrected == pytest.approx(float(x.var()), rel=1e-12)


# --- Frechet distance ------------------------------------------------------------------------------------------------

DIM, NUM_DRAWN, NUM_REPEATS = 64, 5000, 100


@functools.cache
def fd_repeats(shift: float, scale: float) -> list[Measurement]:
    """FD of as many sample sets from N(shift, scale^2 I), to features that have mean 0 and covariance I exactly."""
    axes = math.sqrt((2 * DIM - 1) / 2) * torch.eye(DIM)
    reference = torch.cat([axes, -axes])
    return [
        measured("fd", shift + scale * normal(NUM_DRAWN, DIM, seed=seed).float(), reference) for seed in range(NUM_REPEATS)
    ]


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.3, 1.3)], ids=["equal", "apart"])
def test_fd_and_its_interval_are_true_of_the_distribution(shift, scale):
    truth = DIM * (shift**2 + (scale - 1) ** 2)
    repeats = fd_repeats(shift, scale)
    num_covered = sum(m.interval[0] <= truth <= m.interval[1] for m in repeats)
    assert num_covered >= 88
    values = np.array([m.value for m in repeats])
    assert values.mean() == pytest.approx(truth, abs=4 * stats.sem(values))


def test_plain_fd_is_too_large_by_the_law():
    plug_in = np.array([m.parts["plug_in"] for m in fd_repeats(0.0, 1.0)])
    law = DIM / NUM_DRAWN + DIM * (DIM + 1) / (4 * NUM_DRAWN)
    assert plug_in.mean() == pytest.approx(law, abs=4 * stats.sem(plug_in))


class PassesOn(nn.Module):
    """Stands for torchmetrics' network."""

    num_features: ClassVar[int] = 12

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("shift", [0.0, 1.0, 100.0])
def test_plain_fd_agrees_with_torchmetrics(shift):
    samples, reference = (1.2 * normal(300, 12) + shift).float(), normal(400, 12, seed=1).float()
    torchmetrics = FrechetInceptionDistance(feature=PassesOn())
    torchmetrics.update(samples.double(), real=False)
    torchmetrics.update(reference.double(), real=True)
    found = measured("fd", samples, reference)
    assert found.parts["plug_in"] == pytest.approx(float(torchmetrics.compute()), rel=1e-5)
    assert found.parts["of_means"] == pytest.approx(float((samples.mean(0) - reference.mean(0)).square().sum()), rel=1e-5)


def test_fd_of_too_few_samples_has_no_value_and_names_the_least_number():
    narrow = normal(500, 64) * torch.tensor([1.0] + [1e-3] * 63)  # only its features are many, not its dimensions
    with pytest.raises(NotApplicable, match="68 images are too few for the covariance of 64 features; at least 69 are"):
        measured("fd", normal(68, 64), narrow)
    assert math.isfinite(measured("fd", normal(69, 64), narrow).value)


@pytest.mark.parametrize("scales", [[1.0] * 8, [1.0, 1.0, 0.5, 0.5], [1.0, 1.0, 1.0, 0.0]], ids=str)
def test_fd_needs_five_samples_for_each_effective_dimension(scales):
    scale = torch.tensor(scales * 8, dtype=torch.float64)
    dim = len(scale)
    axes = math.sqrt((2 * dim - 1) / 2) * scale.diag()  # their covariance is scale^2 exactly
    reference = torch.cat([axes, -axes])
    effective = float(scale.sum() ** 2 / scale.square().sum())
    assert effective_dimension(matrix_root(gaussian_of(reference)[1])) == pytest.approx(effective, rel=1e-6)
    least = round(5 * effective)
    assert least > max(dim / 0.95 + 2, 40)  # so that it is what decides
    words = f"{least - 1} images are too few .* at least ({least}|{least + 1}) are needed"  # or one more, by rounding
    with pytest.raises(NotApplicable, match=words):
        measured("fd", normal(least - 1, dim), reference)
    assert measured("fd", normal(least + 1, dim), reference).interval is not None


def test_effective_dimension_of_what_does_not_vary_is_zero():
    assert effective_dimension(torch.zeros(5, 5)) == 0.0


def test_fd_of_constant_samples_is_the_trace_of_the_reference_and_the_distance_of_means():
    reference = normal(500, 8).float()
    found = measured("fd", torch.full((100, 8), 3.0), reference)
    mean, cov = gaussian_of(reference)
    assert found.value == pytest.approx(float((mean - 3).square().sum() + cov.trace()), rel=1e-6)
    assert found.interval == pytest.approx((found.value, found.value), rel=1e-6)


def test_fd_between_constant_sets_is_the_distance_of_means():
    found = measured("fd", torch.full((100, 8), 3.0), torch.full((100, 8), 1.0))
    assert found.value == pytest.approx(8 * 4, rel=1e-6)


def test_frechet_distance_refuses_features_of_other_dimensions():
    with pytest.raises(AssertionError, match="features of 3 and of 4 dimensions"):
        frechet_distance(*gaussian_of(normal(10, 3)), *gaussian_of(normal(10, 4)))


@pytest.mark.parametrize("dim", [1, 3, 5])
def test_gaussian_statistics_refuse_features_of_another_dimension(dim):
    with pytest.raises((AssertionError, RuntimeError)):
        GaussianStatistics(torch.zeros(4)).update(normal(10, dim))


# --- statistics over processes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def meeting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes wrote down what they found."""
    folder = tmp_path_factory.mktemp("meeting")
    in_two_processes(meet, folder)
    return folder


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric GaussianStatistics")
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("way", ["sums", "computed"])
def test_gaussian_statistics_of_two_processes_are_those_of_one(way, split, rank, meeting):
    found = torch.load(meeting / f"{way}_{rank}.pt")[split]
    expected = moments_of(statistics_of_part(0, 100).sums())[: len(found)]
    assert len(found) == (2 + 8 if way == "sums" else 2)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_gaussian_statistics_without_a_block_are_those_of_the_other_samples():
    x, block = normal(90, 5), block_of(90, 4)
    statistics = GaussianStatistics(shift=x[0], num_blocks=4)
    statistics.update(x, block)
    sums: GaussianSums = statistics.sums()
    for g in range(4):
        for found, expected in zip(sums.without(g), gaussian_of(x[block != g]), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# --- kernel distance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kernel_distance_agrees_with_torchmetrics_over_one_subset_of_all(shift):
    samples, reference = (normal(150, 12) + shift).float(), normal(150, 12, seed=1).float()
    torchmetrics = KernelInceptionDistance(feature=PassesOn(), subsets=1, subset_size=150)
    torchmetrics.update(samples.double(), real=False)
    torchmetrics.update(reference.double(), real=True)
    assert measured("kd", samples, reference).value == pytest.approx(float(torchmetrics.compute()[0]), rel=1e-6)


@functools.cache
def kd_repeats(shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Kernel distances of many pairs of sets, and their standard errors."""
    found = [measured("kd", normal(100, 4, seed=2 * i) + shift, normal(100, 4, seed=2 * i + 1)) for i in range(120)]
    half_widths = np.array([m.interval[1] - m.value for m in found])
    return np.array([m.value for m in found]), half_widths / stats.t.ppf(0.975, NUM_BLOCKS - 1)


def test_kernel_distance_of_equal_distributions_is_zero_on_average():
    values, _ = kd_repeats(0.0)
    assert values.mean() == pytest.approx(0, abs=3 * stats.sem(values))
    assert (values < 0).mean() > 0.3


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_standard_error_of_the_kernel_distance_is_its_spread_over_draws(shift):
    values, standard_errors = kd_repeats(shift)
    assert 1 / 1.5 < math.sqrt(np.mean(standard_errors**2)) / values.std(ddof=1) < 1.5


def test_kernel_distance_does_not_depend_on_the_order_of_samples():
    samples, reference = normal(2000, 6) + 0.1, normal(2000, 6, seed=1)  # more than are computed at a time
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    assert measured("kd", samples[order], reference).value == pytest.approx(
        measured("kd", samples, reference).value, rel=1e-9
    )


def test_kernel_distance_of_fewer_than_two_samples_a_block_has_no_value():
    with pytest.raises(NotApplicable, match=f"at least {2 * NUM_BLOCKS} images on each side, not 39"):
        measured("kd", normal(39, 4), normal(500, 4))
    assert math.isfinite(measured("kd", normal(40, 4), normal(500, 4)).value)


# --- precision, recall, density, coverage ----------------------------------------------------------------------------


def manifold(samples: Tensor, reference: Tensor, k: int = 5) -> dict[str, float]:
    return {name: measured(name, samples, reference, k=k).value for name in QUANTITIES}


def prdc_by_definition(samples: np.ndarray, real: np.ndarray, k: int) -> dict[str, float]:
    between = cdist(samples, real)
    sample_radii, real_radii = (np.sort(cdist(some, some), axis=1)[:, k] for some in (samples, real))
    return {
        "precision": np.mean([any(between[i, j] < real_radii[j] for j in range(len(real))) for i in range(len(samples))]),
        "recall": np.mean([any(between[i, j] < sample_radii[i] for i in range(len(samples))) for j in range(len(real))]),
        "density": (between < real_radii).sum() / (k * len(samples)),
        "coverage": np.mean([any(between[i, j] < real_radii[j] for i in range(len(samples))) for j in range(len(real))]),
    }


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_prdc_is_as_defined(shift, k):
    samples, real = 0.8 * normal(60, 3) + shift, normal(60, 3, seed=1)
    expected = prdc_by_definition(samples.float().numpy(), real.float().numpy(), k)
    assert manifold(samples, real, k) == pytest.approx(expected, abs=1e-12)


def test_prdc_takes_sets_of_unequal_size_and_more_than_are_computed_at_a_time():
    samples, real = normal(1500, 3), normal(700, 3, seed=1) + 0.5
    values = prdc(samples, real, neighbour_radii(samples, 5), neighbour_radii(real, 5), 5)
    expected = prdc_by_definition(samples.numpy(), real.numpy(), 5)
    assert {name: float(value.mean()) for name, value in values.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("k", [1, 5])
def test_prdc_of_identical_sets_is_one_exactly(name, k):
    x = normal(300, 8)
    assert measured(name, x, x, k=k).value == 1.0


@pytest.mark.parametrize("name", QUANTITIES)
def test_prdc_of_sets_far_apart_is_zero(name):
    assert measured(name, normal(300, 8), normal(300, 8, seed=1) + 100).value == 0.0


def test_interval_of_precision_is_wilsons_and_that_of_density_is_of_a_mean():
    samples, real = normal(100, 3) + 1, normal(300, 3, seed=1)
    precision, density = (measured(name, samples, real) for name in ("precision", "density"))
    hits = round(100 * precision.value)
    assert 0 < hits < 100
    expected = stats.binomtest(hits, 100).proportion_ci(0.95, method="wilson")
    assert precision.interval == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert density.interval[1] - density.value == pytest.approx(density.value - density.interval[0])
    assert measured("precision", samples, samples).interval == pytest.approx((0.963, 1), abs=1e-3)  # all, yet not surely
    assert measured("recall", samples, real).interval is None


@pytest.mark.parametrize("k", [3, 5])
def test_density_and_coverage_of_equal_distributions_are_as_expected(k):
    n, found = 100, []
    for i in range(60):
        samples, real = normal(n, 4, seed=2 * i), normal(n, 4, seed=2 * i + 1)
        values = prdc(samples, real, neighbour_radii(samples, k), neighbour_radii(real, k), k)
        found.append([float(values[name].mean()) for name in ("coverage", "density")])
    coverage, density = np.array(found).T
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert coverage.mean() == pytest.approx(expected, abs=3 * stats.sem(coverage))
    assert density.mean() == pytest.approx(1, abs=3 * stats.sem(density))


def test_narrow_samples_are_precise_and_recall_little_and_wide_ones_the_reverse():
    narrow, wide = 0.3 * normal(400, 3), normal(400, 3, seed=1)
    one_way, other_way = manifold(narrow, wide), manifold(wide, narrow)
    assert one_way["precision"] > 0.95
    assert one_way["recall"] < 0.3
    assert one_way["density"] > 1
    assert other_way["precision"] < 0.3
    assert other_way["recall"] > 0.95


def test_prdc_of_a_constant_generator_sees_that_it_covers_little():
    reference = normal(300, 4)
    found = manifold(torch.zeros(300, 4), reference)
    assert found["precision"] == 1  # in the middle of the reference
    assert found["recall"] == 0
    assert 0 < found["coverage"] < 0.2
    assert manifold(torch.full((300, 4), 50.0), reference) == dict.fromkeys(QUANTITIES, 0.0)


def test_prdc_of_no_more_images_than_neighbours_has_no_value():
    with pytest.raises(NotApplicable, match="5 images are too few for 5 nearest neighbours"):
        measured("recall", normal(5, 4), normal(300, 4))


# --- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_nearest_distances_are_those_of_all_pairs(offset):
    x, y = normal(60, 8) + offset, normal(90, 8, seed=1) + offset
    expected = np.sort(cdist(x.numpy(), y.numpy()), axis=1)[:, :7]
    np.testing.assert_allclose(nearest_distances(x, y, 7), expected, rtol=1e-9)
    expected = np.sort(cdist(x.float().double().numpy(), y.float().double().numpy()), axis=1)[:, :7]
    np.testing.assert_allclose(nearest_distances(x.float(), y.float(), 7), expected, rtol=1e-4)


def test_copies_are_at_distance_zero_exactly_and_a_single_grey_level_is_not_lost():
    y = byte_images(500).flatten(1).float()
    nudged = y[:50].clone()
    nudged[:, 0] += 1
    found = nearest_distances(torch.cat([y[:50], nudged]), y, 3)
    assert found.dtype == torch.float32
    assert (found[:50, 0] == 0).all()
    np.testing.assert_allclose(found[50:, 0], 1, rtol=1e-4)
    expected = np.sort(cdist(y[:50].double().numpy(), y.double().numpy()), axis=1)[:, :3]
    np.testing.assert_allclose(found[:50], expected, rtol=1e-5)


def test_neighbour_radii_reach_to_the_kth_other_row_and_duplicates_are_others():
    x = normal(40, 3)
    x = torch.cat([x, x[:10]])  # ten of them twice
    expected = np.sort(cdist(x.numpy(), x.numpy()), axis=1)
    for k in (1, 2, 5):
        np.testing.assert_allclose(neighbour_radii(x, k), expected[:, k], rtol=1e-9)
    assert (neighbour_radii(x, 1)[:10] == 0).all()


@pytest.mark.parametrize("entries", [1, 1000])
def test_neighbours_do_not_depend_on_how_many_are_computed_at_a_time(entries, monkeypatch):
    x, y = normal(50, 6), normal(80, 6, seed=1)
    whole = nearest_distances(x, y, 5), neighbour_radii(x, 5), count_near_pairs(x, 2.0)
    monkeypatch.setattr(neighbours, "_CHUNK_ENTRIES", entries)
    np.testing.assert_allclose(nearest_distances(x, y, 5), whole[0], rtol=1e-12)
    np.testing.assert_allclose(neighbour_radii(x, 5), whole[1], rtol=1e-12)
    assert count_near_pairs(x, 2.0) == whole[2] > 0


@pytest.mark.parametrize("values", [1, 50, 200, 479])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.uint8])
def test_nearest_distances_do_not_depend_on_how_many_values_are_floats_at_a_time(values, dtype, monkeypatch):
    """Among 80 vectors of 6 there are the nearest in several pieces, and copies, whose distance needs the differences."""
    x, y = ((40 * normal(n, 6, seed=n) + 128).round().clamp(0, 255).to(dtype) for n in (50, 80))
    x = torch.cat([x, y[::9]])
    expected = np.sort(cdist(x.double().numpy(), y.double().numpy()), axis=1)[:, :5]
    monkeypatch.setattr(neighbours, "_CHUNK_VALUES", values)
    found = nearest_distances(x, y, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-4 if dtype != torch.float64 else 1e-9)
    assert (found[50:, 0] == 0).all()
    monkeypatch.setattr(neighbours, "_CHUNK_ENTRIES", 7)
    np.testing.assert_allclose(nearest_distances(x, y, 5), expected, rtol=1e-4 if dtype != torch.float64 else 1e-9)


@pytest.mark.parametrize(("dtype", "far", "rtol"), [(torch.float64, 1e4, 1e-9), (torch.float32, 30, 1e-4)], ids=str)
def test_distances_to_a_far_piece_keep_their_digits(dtype, far, rtol, monkeypatch):
    """The pieces share one centre, that of the first, and here the second lies far from it."""
    y = torch.cat([normal(40, 6), normal(40, 6, seed=1) + far]).to(dtype)
    x = y[35:45].clone()
    x[:, 0] += 1e-2
    monkeypatch.setattr(neighbours, "_CHUNK_VALUES", 40 * 6)
    expected = np.sort(cdist(x.double().numpy(), y.double().numpy()), axis=1)[:, :3]
    np.testing.assert_allclose(nearest_distances(x, y, 3), expected, rtol=rtol)


@pytest.mark.parametrize("radius", [0.0, 1e-3, 0.7, 2.0, 100.0])
def test_near_pairs_are_counted_among_all_pairs(radius):
    x = normal(60, 4).float().double()
    x = torch.cat([x, x[:7], x[:3]])  # some twice, three thrice
    distances = cdist(x.numpy(), x.numpy())
    expected = int((distances[np.triu_indices(len(x), k=1)] <= radius).sum())
    assert count_near_pairs(x, radius) == expected
    assert count_near_pairs(x.float() + 100, 1e-5) == 7 + 2 * 3  # equal rows, wherever they lie


# --- modes -----------------------------------------------------------------------------------------------------------


def of_classes(classes: Tensor) -> Tensor:
    """Feature vectors of given classes."""
    return torch.stack([torch.zeros(len(classes)), classes.float()], dim=1)


ALL_TEN = of_classes(torch.arange(1000) % 10)
EIGHT_OF_TEN = of_classes(torch.tensor([0, 1, 2, 4, 5, 6, 8, 9]).repeat(100))
BOTH, ONE_OF_TWO = of_classes(torch.arange(1000) % 2), of_classes(torch.zeros(800))


@pytest.mark.parametrize(
    ("samples", "reference", "words", "kl", "alarm"),
    [
        (ALL_TEN, ALL_TEN, "10 of 10 modes", 0, None),
        (EIGHT_OF_TEN, ALL_TEN, "8 of 10 modes (missing: class 3, class 7)", math.log(10 / 8), "modes"),
        (ONE_OF_TWO, BOTH, "1 of 2 modes (missing: class 1)", math.log(2), "modes"),
    ],
    ids=["all", "eight of ten", "one class only"],
)
def test_modes_and_class_kl_say_which_classes_are_missing(samples, reference, words, kl, alarm):
    num_classes = int(reference[:, -1].max()) + 1
    modes, class_kl = (measured(name, samples, reference, reference, num_classes) for name in ("modes", "class_kl"))
    assert modes.value == int(words.split()[0])
    assert (modes.finding.words, modes.finding.alarm) == (words, alarm)
    assert class_kl.value == pytest.approx(kl, abs=1e-12)
    assert class_kl.finding.words == f"class histogram off by {class_kl.value:.2g} nats (null 0)"
    assert class_kl.finding.alarm == alarm


def test_a_class_that_the_data_lacks_is_no_mode_and_costs_no_infinity():
    nine, samples = of_classes(torch.arange(900) % 9), of_classes(torch.arange(1000) % 10)
    modes, class_kl = (measured(name, samples, nine, num_classes=10) for name in ("modes", "class_kl"))
    assert modes.finding.words == "9 of 9 modes"
    assert math.isfinite(class_kl.value)


def test_a_class_that_few_samples_may_miss_by_chance_is_not_called_missing():
    """In 60 samples a class of a tenth is missed with a chance of exp(-6), in 100 with exp(-10)."""
    nine = of_classes(torch.arange(900) % 9)
    by_chance, for_sure = (measured("modes", nine[:n], ALL_TEN, ALL_TEN, num_classes=10) for n in (90, 180))
    assert by_chance.value == for_sure.value == 9
    assert by_chance.finding == Finding("9 of 10 modes (in 90 samples, too few to call a class missing)", None)
    assert for_sure.finding == Finding("9 of 10 modes (missing: class 9)", "modes")


@pytest.mark.parametrize(("num_samples", "alarm"), [(19, None), (20, "modes")])
def test_a_class_is_missing_if_so_small_a_count_has_a_chance_below_1_in_10_000_for_all_classes(num_samples, alarm):
    """By the law of rare events none of n is of one of two classes with a chance of exp(-n/2): 7.5e-5 and 4.5e-5."""
    found = measured("modes", of_classes(torch.zeros(num_samples)), BOTH, num_classes=2)
    assert found.finding.alarm == alarm


def test_a_rare_class_of_real_data_that_is_not_drawn_raises_no_alarm():
    """One in a thousand images is of a class that a thousand honest samples miss in every third evaluation."""
    reference = of_classes((torch.arange(10_000) % 1000 == 0).long())
    honest = of_classes(torch.zeros(1000))
    found = measured("modes", honest, reference, num_classes=2)
    assert found.finding == Finding("1 of 2 modes (in 1,000 samples, too few to call a class missing)", None)
    assert measured("modes", honest.repeat(20, 1), reference, num_classes=2).finding.alarm == "modes"


@pytest.mark.parametrize("mean", [0.3, 6.0, 300.0])
def test_poisson_cdf_agrees_with_scipy(mean):
    counts = torch.arange(0, 40)
    expected = stats.poisson.cdf(counts.numpy(), mean)
    np.testing.assert_allclose(poisson_cdf(counts, torch.full((40,), mean)), expected, rtol=1e-6, atol=1e-300)


def test_the_divergence_of_few_honest_samples_raises_no_alarm_and_the_same_one_of_many_does():
    """Ten samples of ten equally likely classes are off by 0.4 nats or more, as a rule; a thousand so far off are not."""
    few = of_classes(torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, 5, 6]))
    found, of_many = (measured("class_kl", some, ALL_TEN, ALL_TEN, num_classes=10) for some in (few, few.repeat(100, 1)))
    assert found.value == pytest.approx(of_many.value)
    assert found.value > 0.3
    assert found.finding.alarm is None
    assert of_many.finding.alarm == "modes"
    assert found.finding.words == of_many.finding.words


def test_the_divergence_of_honest_samples_is_chi_square_by_luck():
    """No alarm without any threshold, although a tenth of them is above the 90 % quantile."""
    generator = torch.Generator().manual_seed(0)
    drawn = [of_classes(torch.randint(10, (200,), generator=generator)) for _ in range(300)]
    found = [measured("class_kl", some, ALL_TEN, num_classes=10, alarm_above=0.0) for some in drawn]
    assert not any(m.finding.alarm for m in found)
    assert found[0].parts["at_most_by_luck"] == pytest.approx(stats.chi2.isf(1e-4, 9) / 400, rel=1e-12)
    share = np.mean([400 * m.value > stats.chi2.isf(0.1, 9) for m in found])
    assert share == pytest.approx(0.1, abs=0.06)


def test_one_misread_sample_is_no_mode():
    samples = torch.cat([EIGHT_OF_TEN, of_classes(torch.tensor([3]))])
    assert measured("modes", samples, ALL_TEN, num_classes=10).value == 8


def test_histogram_kl_agrees_with_scipy():
    p, q = torch.tensor([5, 0, 20, 75]), torch.tensor([30, 30, 0, 40])
    expected = stats.entropy(p.numpy() / 100, (q.numpy() + 0.5) / 102)
    assert float(histogram_kl(p, q)) == pytest.approx(expected, rel=1e-12)


# --- effective support -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_points", [50, 200])
def test_effective_support_of_draws_from_a_few_points_is_their_number(num_points):
    drawn = torch.randint(num_points, (1500,), generator=torch.Generator().manual_seed(0))
    samples = normal(num_points, 16, seed=1)[drawn]
    found = measured(
        "effective_support", samples, normal(10, 16), normal(1500, 16, seed=2), unseen=normal(1500, 16, seed=3)
    )
    assert found.anchors[HELD_OUT].value > 100_000
    assert found.value == pytest.approx(num_points, rel=0.1)
    assert found.finding.alarm == "support"
    assert found.finding.words.startswith(f"effective support {found.value:,.0f} images (null ")


def test_effective_support_of_samples_that_all_differ_is_only_known_from_below():
    found = measured("effective_support", 10 * normal(500, 16), normal(10, 16), normal(500, 16, seed=2))
    assert found.value == 500 * 499 / 2
    assert found.finding.words.startswith("effective support at least 124,750 images")
    assert found.finding.alarm is None


def test_support_from_collisions_follows_the_birthday_law():
    assert support_from_collisions(num_pairs=100, num_samples=201) == 201
    assert support_from_collisions(num_pairs=1, num_samples=100) == support_from_collisions(0, 100) == 4950


# --- copying ---------------------------------------------------------------------------------------------------------

TRAIN, UNSEEN, HONEST, FURTHER = (normal(n, 16, seed=seed) for seed, n in enumerate((2000, 1000, 1000, 1000)))


@pytest.mark.parametrize("name", ["copying", "copying_pixels"])
@pytest.mark.parametrize(
    ("num_copies", "expected", "alarm"),
    [(0, 0.01, None), (100, 0.109, "copying"), (1000, 1.0, "copying")],
    ids=["honest", "ten percent", "all"],
)
def test_copying_finds_the_share_of_copies(name, num_copies, expected, alarm):
    samples = torch.cat([TRAIN[:num_copies], HONEST[num_copies:]])
    found = measured(name, samples, TRAIN, UNSEEN, unseen=FURTHER)
    assert found.value == pytest.approx(expected, abs=0.012)
    assert found.interval[0] <= found.value <= found.interval[1]
    assert found.anchors[HELD_OUT].value == pytest.approx(0.01, abs=0.012)
    assert found.parts["null"] == pytest.approx(0.01, abs=1e-9)
    assert found.finding.alarm == alarm
    space = "features" if name == "copying" else "pixels"
    share = "100" if num_copies == 1000 else f"{100 * found.value:.2g}"
    assert found.finding.words == f"copying {share} % in {space} (null 1 %)"


@pytest.mark.parametrize("name", ["copying", "copying_pixels"])
def test_copying_needs_a_held_out_image_below_the_quantile(name):
    with pytest.raises(NotApplicable, match=r"99 held-out images are too few for their 0.01 quantile"):
        measured(name, HONEST, TRAIN, UNSEEN[:99])
    assert math.isfinite(measured(name, HONEST, TRAIN, UNSEEN[:100]).value)
    assert math.isfinite(measured(name, HONEST, TRAIN, UNSEEN[:20], quantile=0.05).value)


BY_HELD_OUT = ["copying", "copying_pixels", "c_t", "effective_support"]


@pytest.mark.parametrize("name", BY_HELD_OUT)
def test_what_judges_by_held_out_images_has_further_ones_as_its_row_or_none(name):
    """A yardstick measured by itself would say nothing."""
    assert measured(name, HONEST, TRAIN, UNSEEN).anchors == {}
    found = measured(name, HONEST, TRAIN, UNSEEN, unseen=FURTHER)
    of_further = measured(name, FURTHER, TRAIN, UNSEEN)
    (row,) = found.anchors.values()
    assert (row.value, row.count, row.parts) == (of_further.value, 1000, of_further.parts)
    assert "null" in found.finding.words


@pytest.mark.parametrize("name", ["fd", "kd", "recall", "modes", "class_kl"])
def test_other_metrics_have_the_held_out_images_themselves_as_a_row(name):
    classes = (torch.arange(1000) % 2)[:, None]
    samples, held_out, further = (torch.cat([some, classes], 1) for some in (HONEST, UNSEEN + 1, FURTHER))
    reference = torch.cat([TRAIN, (torch.arange(2000) % 2)[:, None]], 1)
    found = measured(name, samples, reference, held_out, num_classes=2, unseen=further)
    of_held_out = measured(name, held_out, reference, num_classes=2)
    assert found.anchors[HELD_OUT].value == pytest.approx(of_held_out.value)


def test_further_images_that_are_too_few_say_so_and_the_value_stays():
    found = measured("copying", HONEST, TRAIN, UNSEEN, unseen=FURTHER[:50])
    assert str(found.anchors[HELD_OUT]) == "50 held-out images are too few for their 0.01 quantile"
    assert found.finding.alarm is None


def drawn_from_two_classes(num_dense: int, num_wide: int, seed: int) -> Tensor:
    """Honest draws: a tenth of the dense class lie beside a training image, as photographs of one scene do."""
    twins = num_dense // 10
    beside = TRAIN[1000 : 1000 + twins] + 1e-3 * normal(twins, 16, seed=seed)
    dense = torch.cat([beside, normal(num_dense - twins, 16, seed=seed)])
    parts = [(normal(num_wide, 16, seed=seed + 1) + 50, 0), (dense, 1)]
    x = torch.cat([torch.cat([some, torch.full((len(some), 1), float(label))], 1) for some, label in parts])
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("seed", range(3))
def test_drawing_a_dense_class_more_often_is_no_copying(seed):
    reference = torch.cat([TRAIN[:1000] + 50, TRAIN[1000:]])
    reference = torch.cat([reference, (torch.arange(2000) >= 1000).double()[:, None]], 1)
    held_out = drawn_from_two_classes(num_dense=200, num_wide=1800, seed=10 * seed + 100)
    samples = drawn_from_two_classes(num_dense=1800, num_wide=200, seed=10 * seed + 200)
    found = measured("copying", samples, reference, held_out, num_classes=2)
    assert found.value > 0.08  # the null without weights is 0.01
    assert found.parts["null"] == pytest.approx(found.value, abs=0.02)
    assert found.finding.alarm is None


def test_neighbour_ratio_is_zero_for_copies_even_of_a_training_image_that_is_there_many_times():
    distances = torch.tensor([[0.0, 2, 4], [3, 3, 3], [1, 2, 2], [0, 0, 0]])
    torch.testing.assert_close(neighbour_ratio(distances), torch.tensor([0.0, 1.0, 0.5, 0.0]))


# --- C_T -------------------------------------------------------------------------------------------------------------


def test_c_t_of_honest_samples_is_a_standard_score_of_its_own_null():
    def classed(seed: int, n: int) -> Tensor:
        return torch.cat([normal(n, 4, seed=seed), (torch.arange(n) % 3)[:, None].double()], 1)

    reference = classed(0, 300)
    found = [measured("c_t", classed(i, 90), reference, classed(1000 + i, 90), num_classes=3) for i in range(1, 101)]
    scores = np.array([m.value / m.parts["null_standard_deviation"] for m in found])
    assert found[0].parts["null_standard_deviation"] == pytest.approx(1 / math.sqrt(3))
    assert found[0].parts["num_cells"] == 3
    assert stats.kstest(scores, "norm").pvalue > 0.01
    assert not any(m.finding.alarm for m in found)


@pytest.mark.parametrize(
    ("samples", "is_as_expected", "alarm", "words"),
    [
        (HONEST, lambda z: abs(z) < 3, None, "about as near to training images as unseen real ones (C_T "),
        (TRAIN[:1000], lambda z: z < -20, "copying", "much nearer to training images than unseen real ones (C_T -"),
        (1.5 * HONEST, lambda z: z > 10, "underfit", "farther from training images than unseen real ones (C_T +"),
    ],
    ids=["honest", "copies", "farther"],
)
def test_c_t_has_the_sign_of_what_is_wrong(samples, is_as_expected, alarm, words):
    found, beside_null = (measured("c_t", samples, TRAIN, UNSEEN, unseen=some) for some in (None, FURTHER))
    assert is_as_expected(found.value)
    assert found.finding.alarm == beside_null.finding.alarm == alarm
    assert found.finding.words.startswith(words)
    assert found.finding.words.endswith(f"(C_T {found.value:+.1f})")
    null = beside_null.anchors[HELD_OUT].value
    assert abs(null) < 3
    assert beside_null.finding.words.endswith(f"(C_T {found.value:+.1f}, null {null:+.1f})")
    assert found.interval is None


def test_the_effect_of_c_t_is_the_probability_of_being_farther_beyond_one_half():
    """Over three classes, weighted by those of the held-out images, with copies on both sides."""
    samples, held_out, reference = (
        torch.cat([normal(n, 2, seed=seed), (torch.arange(n) % 3)[:, None].double()], 1)
        for seed, n in enumerate((160, 120, 300))
    )
    samples[:40], held_out[:20] = reference[:40], reference[:20]
    held_out = torch.cat([held_out, held_out[held_out[:, -1] == 1]])  # twice as many of one class
    found = measured("c_t", samples, reference, held_out, num_classes=3)
    near, honest = (cdist(some[:, :-1].float(), reference[:, :-1].float()).min(1) for some in (samples, held_out))
    effects, weights = [], []
    for cell in range(3):
        x, y = near[samples[:, -1] == cell], honest[held_out[:, -1] == cell]
        effects.append(np.mean((x[:, None] > y) + 0.5 * (x[:, None] == y)) - 0.5)
        weights.append(len(y))
    assert max(effects) - min(effects) > 0.01
    assert found.parts["effect"] == pytest.approx(np.average(effects, weights=weights), rel=1e-9)


def scaled_to_effect(scale: float) -> Measurement:
    """One class; samples so much wider (or narrower) than held-out images."""
    return measured("c_t", scale * HONEST, TRAIN, UNSEEN, copying_effect=0.1, underfit_effect=0.03)


def test_alarms_of_c_t_need_an_effect_and_one_of_copying_a_larger_one():
    narrow, narrower, wide = (scaled_to_effect(scale) for scale in (0.95, 0.8, 1.05))
    assert -0.1 < narrow.parts["effect"] < -0.05
    assert narrow.value < -4  # clear, but nearness alone is no copy
    assert narrow.finding.alarm is None
    assert narrow.finding.words.startswith("about as near to training images")
    assert narrower.parts["effect"] < -0.1
    assert narrower.finding.alarm == "copying"
    assert 0.03 < wide.parts["effect"] < 0.1
    assert wide.value > 4
    assert wide.finding.alarm == "underfit"


def test_alarms_of_c_t_need_a_clear_score():
    found = measured("c_t", 1.2 * HONEST[:30], TRAIN, UNSEEN[:30])
    assert found.parts["effect"] > 0.03
    assert found.value < 4
    assert found.finding.alarm is None


@pytest.mark.parametrize("key", ["copying_effect", "underfit_effect"])
def test_effects_of_c_t_cannot_be_negative(key):
    with pytest.raises(UserError, match=rf"metric\.c_t\.{key}=-0\.1 must be at least 0"):
        make_metric("c_t", **{key: -0.1})


def test_c_t_without_a_class_of_enough_images_has_no_value():
    with pytest.raises(NotApplicable, match="no class has 10 samples and 10 held-out images"):
        measured("c_t", HONEST[:9], TRAIN, UNSEEN)


@pytest.mark.parametrize("levels", [3, 20, 10**6], ids=["many ties", "ties", "none"])
@pytest.mark.parametrize(("n", "m"), [(30, 30), (10, 80)])
def test_mann_whitney_agrees_with_scipy(n, m, levels):
    x, y = ((levels * some.sigmoid()).round() for some in (normal(n) + 0.3, normal(m, seed=1)))
    expected = stats.mannwhitneyu(x, y, alternative="less", method="asymptotic", use_continuity=False)
    share, z = mann_whitney(x, y)
    assert stats.norm.cdf(z) == pytest.approx(expected.pvalue, rel=1e-9)
    assert share * n * m == pytest.approx(expected.statistic, rel=1e-9)
    assert mann_whitney(y, x) == pytest.approx((1 - share, -z), rel=1e-9)


def test_mann_whitney_of_equal_values_is_zero():
    assert mann_whitney(torch.ones(10), torch.ones(20)) == (0.5, 0.0)


# --- reconstructions, bounds, intervals ------------------------------------------------------------------------------


class Rebuilds(nn.Module):
    """A model that rebuilds an image as a function of it."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._of = of

    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self._of(x)


def in_units(grey: Tensor) -> Tensor:
    return grey.float() / 127.5 - 1


def rebuilt(name: str, grey: Tensor, of: Callable[[Tensor], Tensor]) -> Measurement:
    """A metric of images that are rebuilt as a function of their grey values 0 .. 255."""
    inputs = make_inputs(Rebuilds(lambda x: in_units(of((x + 1) * 127.5))), x=in_units(grey))
    return make_metric(name).measure(replace(inputs, spec=image_spec(tuple(grey.shape[1:]), DISCRETE)))


def test_psnr_is_that_of_the_mean_squared_error_of_all_images():
    grey = 100 + byte_images(20).float() % 50
    assert rebuilt("psnr", grey, lambda x: x + 10).value == pytest.approx(10 * math.log10(255**2 / 100), rel=1e-9)
    three_in_four = 20 * (torch.arange(20) % 4 > 0).reshape(-1, 1, 1, 1)  # the batches are of four
    found = rebuilt("psnr", grey, lambda x: x + three_in_four[: len(x)])
    assert found.value == pytest.approx(10 * math.log10(255**2 / 300), rel=1e-9)
    margin = 1.959964 * stats.sem([0, 400, 400, 400] * 5)
    assert found.interval == pytest.approx([10 * math.log10(255**2 / e) for e in (300 + margin, 300 - margin)], rel=1e-6)


def test_psnr_sees_what_is_shown_not_what_lies_beyond_black_and_white():
    assert rebuilt("psnr", torch.full((5, *SHAPE), 250.0), lambda x: x + 1000).value == pytest.approx(20 * math.log10(51))


def test_psnr_of_perfect_reconstructions_has_no_value():
    with pytest.raises(NotApplicable, match="rebuilt exactly"):
        rebuilt("psnr", byte_images(5), lambda x: x)


def checkerboard(contrast: float) -> Tensor:
    sign = 1 - 2 * ((torch.arange(24)[:, None] + torch.arange(24)) % 2)
    return (128 + contrast * sign).expand(5, 1, 24, 24)


C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # of the paper


@pytest.mark.parametrize("other", [40.0, 20.0, -40.0], ids=["equal", "fainter", "inverted"])
def test_ssim_of_checkerboards_is_that_of_their_contrasts(other):
    found = rebuilt("ssim", checkerboard(40.0), lambda x: 128 + (x - 128) * other / 40)
    assert found.value == pytest.approx((2 * 40 * other + C2) / (40**2 + other**2 + C2), abs=1e-3)


def test_ssim_of_plain_images_is_that_of_their_brightness():
    found = rebuilt("ssim", torch.full((5, 1, 16, 16), 200.0), lambda x: x - 100)
    assert found.value == pytest.approx((2 * 200 * 100 + C1) / (200**2 + 100**2 + C1), rel=1e-4)
    assert rebuilt("ssim", torch.full((5, 1, 16, 16), 200.0), lambda x: x).value == pytest.approx(1, abs=1e-6)


def test_ssim_of_images_smaller_than_its_window_has_no_value():
    with pytest.raises(NotApplicable, match=r"11x11 window .* side of 8"):
        rebuilt("ssim", byte_images(5), lambda x: x)


class BoundOfParts(nn.Module):
    """A bound of two parts."""

    def log_prob_bound(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        return torch.stack(list(self.log_prob_bound_terms(x, condition, generator=generator).values())).sum(0)

    def log_prob_bound_terms(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Terms:
        noise = generator.normal((len(x),), like=x)
        return {"reconstruction": -x.square().flatten(1).sum(1) + noise, "minus_kl": -x.abs().flatten(1).sum(1)}


@pytest.mark.parametrize("name", ["bound", "bound_bits_per_dim"])
def test_the_parts_of_a_bound_add_up_to_it(name):
    found = make_metric(name).measure(make_inputs(BoundOfParts(), x=normal(25, *SHAPE)))
    assert sorted(found.parts) == ["minus_kl", "reconstruction"]
    assert sum(found.parts.values()) == pytest.approx(found.value, rel=1e-12)
    assert found.interval[0] < found.value < found.interval[1]


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (0, 50), (3, 50), (50, 50), (5000, 10_000)])
def test_interval_of_a_share_is_wilsons(hits, count):
    expected = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_interval_of_a_mean_is_by_the_standard_error_and_needs_two_values():
    x = normal(40)
    expected = stats.norm.interval(0.95, x.mean(), stats.sem(x.numpy()))
    assert mean_interval(x) == pytest.approx(expected, rel=1e-6)
    assert mean_interval(x[:1]) is None


# --- bad input through the whole evaluation --------------------------------------------------------------------------


class NotANumber(Draws):
    """Can do everything, and says of everything that it is not a number."""

    def __init__(self) -> None:
        super().__init__(lambda n, noise: with_one(uniform(n, noise), math.nan))

    objective = "none"

    def log_prob(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        return x.new_full((len(x),), math.nan)

    def log_prob_bound(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        return self.log_prob(x)

    def log_prob_bound_terms(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Terms:
        return {"reconstruction": self.log_prob(x)}

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        return {"loss": self.log_prob(batch.x)}

    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return x * math.nan

    def classify(self, x: Tensor) -> Tensor:
        return x.new_full((len(x), 10), math.nan)


def with_one(x: Tensor, value: float) -> Tensor:
    x[-1, 0, 0, 0] = value
    return x


STORE = Store(None)  # what is known of the real images, for all cases


def same_images() -> ArrayData:
    x, y = digits()
    return digit_data(np.broadcast_to(x[:1], x.shape).copy(), np.full_like(y, 0))


def result(model: nn.Module, **settings: Any) -> dict[str, Any]:
    return results_of(model, STORE, **settings)


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "fewer samples than asked": lambda: result(Draws(lambda n, noise: uniform(n - 1, noise))),
    "no samples": lambda: result(Draws(lambda n, noise: uniform(0, noise))),
    "not a number": lambda: result(NotANumber()),
    "infinite": lambda: result(Draws(lambda n, noise: with_one(uniform(n, noise), math.inf))),
    "not a number before training": lambda: result(Draws(uniform), untrained=NotANumber()),
    "far outside the range": lambda: result(Draws(lambda n, noise: 1e30 * uniform(n, noise))),
    "constant": lambda: result(Draws(lambda n, noise: torch.zeros(n, *SHAPE))),
    "a constant digit": lambda: result(Draws(lambda n, noise: real_digits(1).expand(n, -1, -1, -1))),
    "one class": lambda: result(Draws(lambda n, noise: real_digits(n, of_class=3))),
    "no labels": lambda: result(Draws(uniform), data=digit_data(digits()[0], None)),
    "fewer samples than features": lambda: result(Draws(uniform), num_samples=50),
    "two samples": lambda: result(Draws(uniform), num_samples=2),
    "more samples than test images": lambda: result(Draws(uniform), num_samples=200),
    "images of another size": lambda: result(Draws(lambda n, noise: uniform(n, noise, (1, 9, 9)))),
    "flat vectors": lambda: result(Draws(lambda n, noise: uniform(n, noise).flatten(1))),
    "few images": lambda: result(Draws(uniform), data=digit_data(*digits(), num_train=8, num_test=1), num_samples=8),
    "one training image": lambda: result(Draws(uniform), data=digit_data(*digits(), num_train=1), num_samples=8),
    "one training image of few pixels": lambda: result(
        Draws(lambda n, noise: uniform(n, noise, (1, 4, 4))),
        data=digit_data(digits()[0][:, :, 2:6, 2:6], None, num_train=1),
    ),
    "training images that are all the same": lambda: result(Draws(uniform), data=same_images()),
    "no sampler": lambda: result(nn.Linear(1, 1)),
}
result_of = functools.cache(lambda case: CASES[case]())


def numbers_in(entry: dict[str, Any]) -> list[float]:
    found = [entry["value"], *(entry["interval"] or []), *entry["parts"].values()]
    return found + [reading["value"] for reading in entry["anchors"].values() if "value" in reading]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gives_every_metric_a_finite_value_or_a_sentence(case):
    results = result_of(case)
    json.dumps(results, allow_nan=False)
    assert set(results["metrics"]) == set(all_metrics())
    for name, entry in results["metrics"].items():
        rows = [entry, *entry.get("anchors", {}).values()]
        reasons = [row["not_applicable"] for row in rows if "not_applicable" in row]
        for reason in reasons:
            assert len(reason.split()) >= 3, (name, reason)
            assert "the value is" not in reason, (name, reason)  # it does not say why
        if "value" in entry:
            assert all(math.isfinite(number) for number in numbers_in(entry)), (name, entry)
    assert to_markdown(results)
    assert results_table(results).row_count == sum("value" in entry for entry in results["metrics"].values())
    assert len(findings(results)) + len(absences(results)) > 0


SAMPLE_METRICS = ["fd", "fd_pca", "cs", "kd", *QUANTITIES, "modes", "class_kl", "effective_support", "c_t", "copying"]


def test_good_input_gives_every_sample_metric_a_value_and_finite_reference_rows():
    results = result(Draws(lambda n, noise: real_digits(n)))
    for name in SAMPLE_METRICS:
        entry = results["metrics"][name]
        assert "value" in entry, (name, entry)
        assert all("value" in reading for reading in entry["anchors"].values()), (name, entry)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("fewer samples than asked", r"fake drew samples of the shape \(31, 1, 8, 8\) where \(32, 1, 8, 8\) was asked for"),
        ("images of another size", r"fake drew samples of the shape \(32, 1, 9, 9\) where \(32, 1, 8, 8\) was asked for"),
        ("not a number", "fake drew samples that are not finite"),
        ("infinite", "fake drew samples that are not finite"),
        ("fewer samples than features", "50 images are too few for the covariance of 84 features; at least 90 are needed"),
        ("no labels", "data=made_up has no labels"),
        ("no sampler", "fake has no CanSample"),
    ],
)
def test_fd_says_what_is_wrong_with_the_samples(case, words):
    assert re.match(words, result_of(case)["metrics"]["fd"]["not_applicable"])


def test_without_labels_samples_are_still_measured_on_pixels():
    metrics = result_of("no labels")["metrics"]
    assert [name for name in [*SAMPLE_METRICS, "copying_pixels"] if "value" in metrics[name]] == [
        "fd_pca",
        "copying_pixels",
    ]


# --- what stays out of a checkpoint ----------------------------------------------------------------------------------


def tensors_in(node: Any, path: str = "") -> dict[str, Tensor]:
    if isinstance(node, Tensor):
        return {path: node}
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    return {name: tensor for key, value in items for name, tensor in tensors_in(value, f"{path}/{key}").items()}


def test_no_weight_of_an_extractor_is_in_a_checkpoint_an_optimizer_or_an_average(tmp_path, cache):
    run = train(
        tmp_path / "run",
        cache,
        "model=gan",
        "training.ema_half_life_examples=1000",
        "trainer.max_steps=10",
        "callback.light_evaluation.every_n_validations=1",  # so that there is an extractor during the training
        "metric=[fd]",
    ).run
    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert "light_evaluation/fd" in board.Tags()["scalars"]
    model = load_model(run.config(), load_spec(run, run.config()))
    checkpoint = torch.load(run.checkpoint("last"), weights_only=True)
    average = {f"weight_average.average.{name}" for name in model.players()[0].state_dict()}
    assert set(checkpoint["state_dict"]) == {f"model.{name}" for name in model.state_dict()} | average
    of_extractor, _, _ = read_frozen(SHIPPED / "digits.safetensors", None)
    shapes = {tuple(weight.shape) for weight in of_extractor.values() if weight.numel() > 100}
    assert len(shapes) == 6
    found = tensors_in(checkpoint)
    assert any("optimizer_states" in name for name in found)
    assert not {name: tensor.shape for name, tensor in found.items() if tuple(tensor.shape) in shapes}
