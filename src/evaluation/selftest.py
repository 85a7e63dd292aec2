"""Quantities whose value is known, measured on this machine by the code that measures models.

An oracle is a value from a formula, from another implementation, or from an earlier measurement on a frozen classifier.
All that is random has a fixed seed, so a verdict does not change from call to call; where a mean of random values is
compared, the tolerance is three times its own standard error.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import NotApplicable
from src.core.rng import SampleNoise, hash_bits
from src.core.spec import DISCRETE, DataSpec, Values
from src.core.stack import Stack
from src.evaluation import autoregressive_oracles, flow_oracles, matching_oracles, mixture_oracles, variational_oracles
from src.evaluation.oracle import Oracle
from src.metrics.classifier_score import classifier_score
from src.metrics.features import Extractor, Features, ImageSet, NetworkExtractor
from src.metrics.frechet import GaussianStatistics, frechet_distance, gaussian_of
from src.metrics.frozen_classifier import SHIPPED, read_frozen
from src.metrics.intervals import wilson_interval
from src.metrics.jackknife import NUM_BLOCKS, block_of, jackknife
from src.metrics.kernel_distance import block_sums, squared_mmd
from src.metrics.manifold import prdc
from src.metrics.memorization import mann_whitney, neighbour_ratio
from src.metrics.metric import Inputs, Metric
from src.metrics.mixture_modes import kl_floor, kl_to_weights, quality_ceiling
from src.metrics.modes import histogram_kl
from src.metrics.neighbours import count_near_pairs, nearest_distances, neighbour_radii
from src.metrics.reconstruction import PSNR, SSIM
from src.metrics.stacked_classifier import StackExtractor
from src.metrics.store import Store
from src.metrics.support import support_from_collisions

__all__ = ["CHECKS", "STORED", "Oracle", "classifier_oracles", "oracles", "oracle_table"]

STORED = {
    "cifar10.safetensors": (47.4257914, 1.55306333, 87.1631341),
    "digits.safetensors": (251.491387, 2.9911109, 19504.7424),
    "fsdd.safetensors": (5654.55093, 3.23444746, 7178982.84),
    "mnist.safetensors": (83.0807776, 1.41216603, 12.9892759),
}
"""FD, CS and KD on each shipped classifier, of the images in `classifier_oracles`; for a new one those that it gives."""

_ERRORS = 3  # standard errors that a mean of random values may be off
_NUM_STORED = 512  # images on each side


Oracles = Iterator[Oracle]


def oracles(classifiers: dict[str, str], build: Callable[[dict[str, Any]], nn.Module]) -> Oracles:
    """All oracles, each computed when its turn comes.

    Args:
        classifiers: the SHA-256 that each shipped classifier must have, by file name.
        build: makes the network that a classifier's file describes.
    """
    for check in CHECKS:
        yield from check()
    for file, sha256 in classifiers.items():
        yield from classifier_oracles(file, sha256, build)


def oracle_table(found: Iterable[Oracle]) -> Table:
    """What is expected beside what was found."""
    table = Table()
    for name in ("oracle", "expected", "got", "tolerance", "verdict"):
        table.add_column(name, justify="left" if name in ("oracle", "verdict") else "right", no_wrap=name != "oracle")
    for oracle in found:
        tolerance = "" if isinstance(oracle.expected, str) else f"{oracle.tolerance:.2g}"
        table.add_row(oracle.name, _shown(oracle.expected), _shown(oracle.got), tolerance, "ok" if oracle.holds else "FAIL")
    return table


def _shown(value: float | str) -> str:
    return value[:12] if isinstance(value, str) else f"{value:.7g}"


# --- Fréchet distance ------------------------------------------------------------------------------------------------


def frechet_of_diagonal_gaussians() -> Oracles:
    """|mu_1 - mu_2|^2 + sum_i (sqrt a_i - sqrt b_i)^2; here 1 + 4 + 4 + 1.5^2."""
    mu_1, mu_2 = _vector(0, 0, 0), _vector(1, 2, -2)
    cov_1, cov_2 = (_vector(*scales).square().diag() for scales in ((1, 2, 3), (2.5, 2, 3)))
    yield Oracle("FD of diagonal Gaussians", 11.25, float(frechet_distance(mu_1, cov_1, mu_2, cov_2)), 1e-12)


def frechet_against_scipy() -> Oracles:
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^1/2) with the root of a general matrix by scipy."""
    from scipy.linalg import sqrtm  # slow to import

    (mu_1, cov_1), (mu_2, cov_2) = _gaussian(20, seed=1), _gaussian(20, seed=2)
    root = torch.from_numpy(sqrtm((cov_1 @ cov_2).numpy()).real)
    expected = float((mu_1 - mu_2).square().sum() + (cov_1 + cov_2 - 2 * root).trace())
    got = float(frechet_distance(mu_1, cov_1, mu_2, cov_2))
    yield Oracle("FD by scipy's matrix root", expected, got, 1e-9 * expected)


def frechet_invariances() -> Oracles:
    """FD(P, Q) = FD(Q, P) = FD(R P, R Q) for a rotation R, and FD(3 P, 3 Q) = 9 FD(P, Q)."""
    first, second = _gaussian(20, seed=1), _gaussian(20, seed=2)
    distance = float(frechet_distance(*first, *second))
    rotation = torch.linalg.qr(_normal(20, 20, seed=3))[0]
    turned = [(rotation @ mu, rotation @ cov @ rotation.T) for mu, cov in (first, second)]
    scaled = [(3 * mu, 9 * cov) for mu, cov in (first, second)]
    tolerance = 1e-12 * distance
    yield Oracle("FD with the two sides swapped", distance, float(frechet_distance(*second, *first)), tolerance)
    yield Oracle("FD after a rotation", distance, float(frechet_distance(*turned[0], *turned[1])), tolerance)
    yield Oracle("FD after scaling by 3", 9 * distance, float(frechet_distance(*scaled[0], *scaled[1])), 9 * tolerance)


def frechet_of_equals() -> Oracles:
    """FD(X, X) = 0; with fewer examples than dimensions up to the root of the rounding error of an eigenvalue."""
    for count, tolerance in ((500, 1e-10), (10, 1e-5)):
        x = gaussian_of(_normal(count, 20, seed=4))
        yield Oracle(f"FD(X, X), N = {count}, d = 20", 0.0, float(frechet_distance(*x, *x)), tolerance)


def frechet_bias_law() -> Oracles:
    """The plug-in FD of N white samples to the truth is d/N + d(d + 1)/4N on average; the jackknife takes that away.

    The law is the first term of a series in d/N; the next one, d^3 / 32 N^2 (from the moments of the Marchenko-Pastur law),
    is allowed for in the tolerance. Chong, Forsyth 2020, arXiv:1911.07023.
    """
    dim, count, num_repeats = 84, 1000, 60
    zero, eye = torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)
    plug_in, corrected = [], []
    for seed in range(num_repeats):
        statistics = GaussianStatistics(zero, NUM_BLOCKS, sync_on_compute=False)
        statistics.update(_normal(count, dim, seed=seed), block_of(count))
        sums = statistics.sums()
        full = frechet_distance(*sums.moments(), zero, eye, eye)
        left_out = [frechet_distance(*sums.without(g), zero, eye, eye) for g in range(NUM_BLOCKS)]
        plug_in.append(float(full))
        corrected.append(jackknife(full, torch.stack(left_out)).corrected)
    law, next_term = dim / count + dim * (dim + 1) / (4 * count), dim**3 / (32 * count**2)
    yield _mean_oracle("bias of the plug-in FD, d = 84, N = 1000", law, plug_in, next_term)
    yield _mean_oracle("bias left by the jackknife", 0.0, corrected, next_term)


def statistics_merge() -> Oracles:
    """Mean and covariance are those of all features at once, for any batches and processes, and far from zero as well."""
    x = _normal(1000, 20, seed=5)
    parts = [GaussianStatistics(x[0], sync_on_compute=False) for _ in range(2)]
    for part, some in zip(parts, x.split([300, 700]), strict=True):
        for batch in some.split(37):
            part.update(batch)
    parts[0].merge_state(parts[1])
    mean, cov = parts[0].compute()
    off = max(float((mean - x.mean(0)).abs().max()), float((cov - x.T.cov()).abs().max()))
    yield Oracle("mean and covariance of merged batches, largest error", 0.0, off, 1e-10)
    far = 1e6 + 1e-2 * _normal(1000, 2, seed=6)
    expected = float((far[:, 0] - far[:, 0].mean()).square().sum() / 999)
    yield Oracle("variance at mean 1e6, sd 1e-2", expected, float(gaussian_of(far)[1][0, 0]), 1e-6 * expected)


# --- classifier score ------------------------------------------------------------------------------------------------


def classifier_score_limits() -> Oracles:
    """exp of the mutual information of image and class: 1 if all images look alike, K if K classes are drawn equally."""
    alike = _normal(1, 10, seed=7).expand(100, -1)
    yield Oracle("CS of equal predictions", 1.0, float(classifier_score(alike)), 1e-6)
    balanced = 100 * nn.functional.one_hot(torch.arange(100) % 10, 10).double()
    yield Oracle("CS of 10 classes drawn equally", 10.0, float(classifier_score(balanced)), 1e-6)
    overconfident = torch.tensor([[1e4, -1e4, 0.0]]).expand(100, -1)  # its softmax in float32 has zeros
    yield Oracle("CS of overconfident equal predictions", 1.0, float(classifier_score(overconfident)), 1e-6)


# --- kernel distance -------------------------------------------------------------------------------------------------


def kernel_distance_is_unbiased() -> Oracles:
    """Zero on average for two samples of one distribution. Gretton et al. 2012, lemma 6."""
    pairs = [(_normal(100, 8, seed=2 * i), _normal(100, 8, seed=2 * i + 1)) for i in range(1000)]
    yield _mean_oracle("KD of two samples of one distribution", 0.0, [_squared_mmd(x, y) for x, y in pairs])


def kernel_distance_against_torchmetrics() -> Oracles:
    """The same polynomial MMD by torchmetrics, on one full subset."""
    from torchmetrics.image.kid import poly_mmd  # slow to import

    x, y = _normal(300, 20, seed=8), 1.2 * _normal(300, 20, seed=9) + 0.3
    expected = float(poly_mmd(x, y))
    yield Oracle("KD by torchmetrics", expected, _squared_mmd(x, y), 1e-6 * expected)


# --- precision, recall, density, coverage ----------------------------------------------------------------------------


def manifold_of_equals() -> Oracles:
    """A set beside itself has 1 of everything: in the open ball of an example lie it and its k - 1 nearest neighbours."""
    x = _normal(300, 8, seed=10)
    for name, value in _prdc(x, x).items():
        yield Oracle(f"{name} of a set and itself", 1.0, value, 1e-12)


def manifold_of_strangers() -> Oracles:
    """Sets with no ball in common have 0 of everything."""
    x = _normal(300, 8, seed=10)
    for name, value in _prdc(x, x + 1000).items():
        yield Oracle(f"{name} of disjoint sets", 0.0, value)


def manifold_of_one_distribution() -> Oracles:
    """Two sets of N draws: coverage 1 - prod_{i=1..k} (N - i)/(2N - i), density 1. Naeem et al. 2020, arXiv:2002.09797."""
    count, k = 500, 5
    found = [_prdc(_normal(count, 8, seed=2 * i), _normal(count, 8, seed=2 * i + 1)) for i in range(50)]
    coverage = 1 - math.prod((count - i) / (2 * count - i) for i in range(1, k + 1))
    yield _mean_oracle("coverage by the same distribution", coverage, [some["coverage"] for some in found])
    yield _mean_oracle("density of the same distribution", 1.0, [some["density"] for some in found])


def manifold_orientation() -> Oracles:
    """Narrow samples inside wide real data: P > 0.8, R < 0.3, as in torch-fidelity; the other way round: reversed."""
    narrow, wide = 0.1 * _normal(500, 2, seed=11), _normal(500, 2, seed=12)
    for name, samples, real, precision in (("narrow", narrow, wide, 1.0), ("wide", wide, narrow, 0.0)):
        found = _prdc(samples, real)
        yield Oracle(f"precision of {name} samples", precision, found["precision"], 0.2 if precision else 0.3)
        yield Oracle(f"recall of {name} samples", 1 - precision, found["recall"], 0.3 if precision else 0.2)


# --- modes and copies ------------------------------------------------------------------------------------------------


def support_of_equally_likely_images() -> Oracles:
    """Of s draws from K images s(s - 1)/2K pairs collide on average, so the estimate is K. Arora, Zhang 2017.

    The number C of pairs has a standard deviation of sqrt(C (1 - 1/K)), so the estimate has one of K / sqrt(C).
    """
    num_draws = 2000
    for support in (100, 200):
        chosen = hash_bits(13, torch.arange(num_draws), 1).squeeze(1) % support
        num_pairs = count_near_pairs(_normal(support, 20, seed=14)[chosen], radius=0.0)
        tolerance = _ERRORS * support * math.sqrt(2 * support / (num_draws * (num_draws - 1)))
        got = support_from_collisions(num_pairs, num_draws)
        yield Oracle(f"effective support of {support} images", float(support), got, tolerance)


def rank_test_values() -> Oracles:
    """z = (U - nm/2) / sqrt(nm/12 (n + m + 1 - sum(t^3 - t) / (n + m)(n + m - 1))) with t equal values. Mann, Whitney 1947.

    By hand: of (1, 2, 2) and (2, 3, 4) U = 2 ties / 2 = 1 and t = 3. All of 200 copies at 0 below all of 200 others: U = 0.
    """
    by_hand = (1 - 4.5) / math.sqrt(9 / 12 * (7 - 24 / 30))
    yield Oracle("rank test with ties, by hand", by_hand, mann_whitney(_vector(1, 2, 2), _vector(2, 3, 4))[1], 1e-12)
    n, total = 200, 400
    copies = -(n**2) / 2 / math.sqrt(n**2 / 12 * (total + 1 - (n**3 - n) / (total * (total - 1))))
    got = mann_whitney(torch.zeros(n), 1 + torch.arange(float(n)))[1]
    yield Oracle("rank test of exact copies", copies, got, 1e-9)


def rank_test_null() -> Oracles:
    """On average 0 with variance 1 if both samples come from one distribution."""
    z = [mann_whitney(*_normal(2, 100, seed=i))[1] for i in range(2000)]
    yield _mean_oracle("rank test of one distribution, mean", 0.0, z)
    yield _mean_oracle("rank test of one distribution, mean square", 1.0, [value**2 for value in z])


def copies_by_neighbour_ratio() -> Oracles:
    """The share below the q quantile of held-out examples is q for honest samples, and p + (1 - p) q with p of them copied.

    Its standard deviation, from the samples and from the quantile, is sqrt(2 q (1 - q) / N).
    """
    count, quantile = 6000, 0.01
    train, held_out, fresh = (_normal(count, 8, seed=seed).float() for seed in (15, 16, 17))
    copying = torch.cat([train[: count // 10], fresh[count // 10 :]])
    honest, *drawn = (neighbour_ratio(nearest_distances(x, train, 50).double()) for x in (held_out, fresh, copying))
    shares = [float((ratio <= torch.quantile(honest, quantile)).double().mean()) for ratio in drawn]
    tolerance = _ERRORS * math.sqrt(2 * quantile * (1 - quantile) / count)
    yield Oracle("near one training example, honest samples", quantile, shares[0], tolerance)
    yield Oracle("near one training example, 10 % copies", 0.1 + 0.9 * quantile, shares[1], tolerance)


def histogram_without_two_classes() -> Oracles:
    """KL of 8 equal classes from 10 equal ones: ln(10/8)."""
    counts = torch.tensor([100] * 8 + [0] * 2)
    got = float(histogram_kl(counts, torch.full((10,), 100)))
    yield Oracle("KL of 8 of 10 equal classes", math.log(10 / 8), got, 1e-9)


# --- known modes -----------------------------------------------------------------------------------------------------


def quality_of_true_draws() -> Oracles:
    """P(|z| < 3) of z ~ N(0, I) in two dimensions is 1 - exp(-9/2): by formula, and by a million draws."""
    expected, count = 1 - math.exp(-9 / 2), 1_000_000
    yield Oracle("ceiling of high quality, D = 2", expected, quality_ceiling(2), 1e-12)
    is_good = torch.linalg.vector_norm(_normal(count, 2, seed=21), dim=1) < 3
    tolerance = _ERRORS * math.sqrt(expected * (1 - expected) / count)
    yield Oracle("ceiling of high quality, by simulation", expected, float(is_good.double().mean()), tolerance)


def reverse_kl_without_two_modes() -> Oracles:
    """KL of 8 of 10 equally likely modes, each drawn as often, from the weights: ln(10/8). Of one alone it is ln 10."""
    weights = torch.full((10,), 0.1, dtype=torch.float64)
    for num_drawn in (8, 1):
        counts = torch.tensor([100] * num_drawn + [0] * (10 - num_drawn))
        expected, got = math.log(10 / num_drawn), float(kl_to_weights(counts, weights))
        yield Oracle(f"reverse KL of {num_drawn} of 10 equal modes", expected, got, 1e-12)


def reverse_kl_of_true_draws() -> Oracles:
    """(K - 1) / 2N on average, to first order; the next term, K^2 / 12 N^2 for equal weights, is allowed for."""
    num_modes, count, num_repeats = 25, 2500, 400
    weights = torch.full((num_modes,), 1 / num_modes, dtype=torch.float64)
    drawn = hash_bits(22, torch.arange(num_repeats), count) % num_modes
    found = [float(kl_to_weights(row.bincount(minlength=num_modes), weights)) for row in drawn]
    next_term = num_modes**2 / (12 * count**2)
    yield _mean_oracle("reverse KL of true draws, K = 25, N = 2500", kl_floor(num_modes, count), found, next_term)


def reading_of_stacks() -> Oracles:
    """By hand: channels with P(class 1) = 3/4 and 1/4 make the classes 00, 01, 10, 11 with 3/16, 1/16, 9/16, 3/16.

    The classifier's logits are 0 and the pixel times ln 3, so a pixel of 1 is read as class 1 with 3/4.
    """
    extractor = StackExtractor(_PixelReader(), Stack(num_images=2, num_classes=2))
    images = torch.tensor([[1, -1, 7], [-1, -1, 7]])[:, :, None, None]  # the last channel is of no image
    features, logits = extractor(images)
    found = Features(features, logits, None, extractor.stack)
    for k, sixteenths in enumerate((3, 1, 9, 3)):
        yield Oracle(f"P(class {k:02b}) of a stack", sixteenths / 16, float(found.logits.exp()[0, k]), 1e-6)
    yield Oracle("classes read in two stacks", "10, 00", ", ".join(f"{k:02b}" for k in found.classes.tolist()))
    yield Oracle("features of a stack, side by side", "1, -1", ", ".join(f"{value:.0f}" for value in features[0].tolist()))


# --- reconstruction and intervals ------------------------------------------------------------------------------------


def reconstructions() -> Oracles:
    """PSNR = 10 log10(255^2 / MSE), with every pixel off by 5 levels 20 log10(255/5); SSIM(x, x) = 1."""
    yield Oracle("PSNR, every pixel off by 5", 20 * math.log10(255 / 5), _rebuilt(PSNR(), 5), 1e-6)
    yield Oracle("SSIM(x, x)", 1.0, _rebuilt(SSIM(), 0), 1e-6)


def interval_of_a_share() -> Oracles:
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3: 81/263 and 0/20."""
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611)):
        found = wilson_interval(hits, count)
        yield Oracle(f"Wilson's interval of {hits}/{count}, low", low, found[0], 5e-5)
        yield Oracle(f"Wilson's interval of {hits}/{count}, high", high, found[1], 5e-5)


METRIC_CHECKS: tuple[Callable[[], Oracles], ...] = (
    frechet_of_diagonal_gaussians,
    frechet_against_scipy,
    frechet_invariances,
    frechet_of_equals,
    frechet_bias_law,
    statistics_merge,
    classifier_score_limits,
    kernel_distance_is_unbiased,
    kernel_distance_against_torchmetrics,
    manifold_of_equals,
    manifold_of_strangers,
    manifold_of_one_distribution,
    manifold_orientation,
    support_of_equally_likely_images,
    rank_test_values,
    rank_test_null,
    copies_by_neighbour_ratio,
    histogram_without_two_classes,
    quality_of_true_draws,
    reverse_kl_without_two_modes,
    reverse_kl_of_true_draws,
    reading_of_stacks,
    reconstructions,
    interval_of_a_share,
)
CHECKS: tuple[Callable[[], Oracles], ...] = (
    *METRIC_CHECKS,
    *variational_oracles.CHECKS,
    *flow_oracles.CHECKS,
    *matching_oracles.CHECKS,
    *mixture_oracles.CHECKS,
    *autoregressive_oracles.CHECKS,
)
"""All but the classifiers, in the order they are shown in."""


# --- shipped classifiers ---------------------------------------------------------------------------------------------


def classifier_oracles(file: str, sha256: str, build: Callable[[dict[str, Any]], nn.Module]) -> Oracles:
    """The file is the one that its data set asks for, and the values on it are the stored ones, to 1e-4 of them.

    The images are grids of 4x4 random grey or coloured squares; on the other side they are half as bright.
    """
    try:
        state, about, found = read_frozen(SHIPPED / file, None)
    except NotApplicable as reason:
        yield Oracle(f"SHA-256 of {file} ({reason})", sha256, "none")
        return
    yield Oracle(f"SHA-256 of {file}", sha256, found)
    network = build(about["network"])
    network.load_state_dict(state)
    extractor = NetworkExtractor(file, network, found)
    (x, logits), (y, _) = extractor(_squares(about["in_shape"], 18) // 2), extractor(_squares(about["in_shape"], 19))
    got = {
        "FD": float(frechet_distance(*gaussian_of(x), *gaussian_of(y))),
        "CS": float(classifier_score(logits)),
        "KD": _squared_mmd(x, y),
    }
    if file not in STORED:
        yield from (Oracle(f"{name} on {file}", "not stored", value) for name, value in got.items())
        return
    for (name, value), stored in zip(got.items(), STORED[file], strict=True):
        yield Oracle(f"{name} on {file}", stored, value, 1e-4 * abs(stored))


# --- helpers ---------------------------------------------------------------------------------------------------------


class _PixelReader(Extractor):
    """Reads images of one pixel v as class 1 with the odds of 3^v."""

    name, sha256 = "pixel reader", "none"

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixel = images.flatten(1).float()
        return pixel, torch.cat([torch.zeros_like(pixel), math.log(3) * pixel], dim=1)


class _OffBy(nn.Module):
    """A model that rebuilds every image too bright by so many levels of 256."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self._levels = levels

    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return x + 2 * self._levels / 255


def _rebuilt(metric: Metric, levels: int) -> float:
    """A metric of reconstructions that are off by so many levels everywhere."""
    spec = DataSpec("squares", "image", (1, 16, 16), Values(DISCRETE, low=-1.0, high=1.0, levels=256))
    x = spec.to_units(_squares(spec.shape, 20) // 2)

    def no_classifier() -> NetworkExtractor:
        raise NotApplicable("no classifier is needed")

    inputs = Inputs(
        model=_OffBy(levels),
        model_name="self-test",
        device=torch.device("cpu"),
        spec=spec,
        test_batches=lambda: (Batch(part) for part in x.split(100)),
        seed=0,
        generated=NotApplicable("nothing is drawn"),
        reference=ImageSet(lambda: [], 0),
        anchors={},
        classifier=no_classifier,
        store=Store(None),
    )
    return metric.measure(inputs).value


def _squares(shape: Iterable[int], seed: int) -> Tensor:
    """Images `(N, C, H, W)` uint8 of 4x4 squares, each of one random value; whole numbers only, so alike everywhere."""
    channels, height, width = shape
    bits = hash_bits(seed, torch.arange(_NUM_STORED), channels * 16) & 255
    grid = bits.byte().reshape(-1, channels, 4, 4)
    rows, columns = (torch.arange(side) * 4 // side for side in (height, width))
    return grid[:, :, rows][:, :, :, columns]


def _mean_oracle(name: str, expected: float, values: list[float], slack: float = 0.0) -> Oracle:
    """The mean of independent values, allowed to be off by three standard errors of it, and `slack`."""
    drawn = torch.tensor(values, dtype=torch.float64)
    return Oracle(name, expected, float(drawn.mean()), slack + _ERRORS * float(drawn.std()) / math.sqrt(len(values)))


def _prdc(samples: Tensor, real: Tensor, k: int = 5) -> dict[str, float]:
    found = prdc(samples, real, neighbour_radii(samples, k), neighbour_radii(real, k), k)
    return {name: float(values.mean()) for name, values in found.items()}


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    xx, yy, xy = (block_sums(*pair, 1, without_diagonal=pair[0] is pair[1]) for pair in ((x, x), (y, y), (x, y)))
    return float(squared_mmd(xx.sum(), yy.sum(), xy.sum(), len(x), len(y)))


def _gaussian(dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """A mean and a covariance of full rank."""
    return gaussian_of(_normal(3 * dim, dim, seed=seed))


def _normal(*shape: int, seed: int) -> Tensor:
    return SampleNoise(seed).normal(shape, torch.zeros((), dtype=torch.float64))


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
