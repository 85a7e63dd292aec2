"""Points in the plane: each data set against the definition that it follows, and its exact density."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from src.core.errors import UserError
from src.core.mixture import GaussianMixtureDensity, IsotropicMixture
from src.core.rng import SampleNoise
from src.data.arrays import Arrays
from src.data.gaussian_mixtures import gaussian_mixture
from src.data.planar import checkerboard, eight_gaussians, swiss_roll, two_moons
from src.training.callbacks.point_pictures import density_picture
from tests.configs import load_option

PLANAR = {
    "two_moons": two_moons,
    "swiss_roll": swiss_roll,
    "checkerboard": checkerboard,
    "eight_gaussians": eight_gaussians,
}
DRAWN = {**PLANAR, "gaussian_mixture": gaussian_mixture}
SIZES = {"num_train": 30_000, "num_val": 500, "num_test": 500}


def made(name: str, cache: object, **keys: float) -> Arrays:
    node = dict(load_option("data", name).data)
    node.pop("_target_")
    return DRAWN[name](**(node | {"cache": str(cache)} | SIZES | keys))


@pytest.fixture(scope="module", params=PLANAR)
def arrays(request, tmp_path_factory) -> Arrays:
    return made(request.param, tmp_path_factory.getbasetemp() / "planar")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "planar"


def points(arrays: Arrays, split: str = "train") -> Tensor:
    return torch.from_numpy(np.array(arrays.splits[split].x)).double()


# --- all of them -----------------------------------------------------------------------------------------------------


def test_density_integrates_to_one_and_its_integral_is_the_share_of_points(arrays):
    """Over the cells of a grid whose lines are the checkerboard's."""
    side, num_cells = 10.0, 320
    step = side / num_cells
    middle = -side / 2 + step * (torch.arange(num_cells, dtype=torch.float64) + 0.5)
    grid = torch.cartesian_prod(middle, middle)
    mass = arrays.density.log_prob(grid).exp().reshape(num_cells, num_cells) * step**2
    assert float(mass.sum()) == pytest.approx(1, abs=1e-4)
    x = points(arrays)
    assert x.abs().max() < side / 2
    blocks = mass.reshape(20, num_cells // 20, 20, num_cells // 20).sum((1, 3))
    place = ((x + side / 2) / side * 20).long()
    counts = (20 * place[:, 0] + place[:, 1]).bincount(minlength=400).reshape(20, 20).double()
    is_likely = blocks > 5 / len(x)
    observed, expected = (torch.cat([some[is_likely], some[~is_likely].sum()[None]]) for some in (counts, len(x) * blocks))
    is_possible = expected > 1e-6
    assert float(observed[~is_possible].sum()) == 0
    expected = expected[is_possible] / expected[is_possible].sum() * len(x)
    assert stats.chisquare(observed[is_possible].numpy(), expected.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(
    ("name", "keys", "nats", "tolerance"),
    [
        ("two_moons", {"noise": 0.05}, 0.291, 0.005),
        ("two_moons", {"noise": 0.1}, 0.998, 0.015),
        ("two_moons", {"noise": 0.1, "scale": 3.0, "shift": -1.0}, 0.998 + 2 * math.log(3), 0.015),
        ("checkerboard", {}, math.log(32), 1e-12),
        ("eight_gaussians", {}, 2.8308, 0.0015),
    ],
)
def test_entropy_is_the_published_or_measured_one(cache, name, keys, nats, tolerance):
    assert made(name, cache, **keys).density.entropy.nats == pytest.approx(nats, abs=tolerance)


def test_entropy_is_the_mean_of_minus_the_log_density(arrays):
    values = -arrays.density.log_prob(points(arrays))
    error = float(values.std()) / math.sqrt(len(values))
    assert float(values.mean()) == pytest.approx(arrays.density.entropy.nats, abs=max(4 * error, 1e-9))
    assert arrays.density.entropy.standard_error is None


def test_points_of_one_seed_are_the_same_everywhere_and_splits_differ(arrays, tmp_path):
    again = made(arrays.spec.name, tmp_path)
    assert again.fingerprint == arrays.fingerprint
    assert not np.intersect1d(arrays.splits["val"].x[:, 0], arrays.splits["test"].x[:, 0]).size
    assert {len(arrays.splits[split]) for split in ("val", "test")} == {500}
    assert arrays.splits["train"].x.dtype == np.float32


def test_drawn_point_does_not_depend_on_its_batch(arrays):
    together, apart = arrays.density.sample(30, SampleNoise(4))[0], arrays.density.sample(10, SampleNoise(4, 20))[0]
    torch.testing.assert_close(apart, together[20:], rtol=0, atol=1e-12)


def test_picture_shows_the_exact_density(arrays):
    """Its right half has colour where points are likely, and is white elsewhere."""
    data = points(arrays)[:10_000].float()
    picture = density_picture(data, data, arrays.density.log_prob)
    assert picture.shape == (3, 512, 2 * 512 + 4)
    is_coloured = picture[:, :, 516:].sum(0) < 700
    shares = [some.float().mean() for some in (is_coloured, picture[:, :, :512].sum(0) < 700)]
    assert 0.05 < min(shares) < max(shares) < min(2 * min(shares), 0.8)  # the samples are as widespread
    assert not is_coloured[:8].any()


# --- each against its definition -------------------------------------------------------------------------------------


def test_moons_are_those_of_scikit_learn(cache):
    from sklearn.datasets import make_moons

    arrays = made("two_moons", cache)
    x, y = points(arrays).numpy(), arrays.splits["train"].y
    theirs, their_y = make_moons(20_000, noise=0.05, random_state=0)
    scaled = points(made("two_moons", cache, scale=3.0, shift=-1.0)).numpy()
    np.testing.assert_allclose(scaled, 3 * x - 1, atol=1e-5)
    assert arrays.spec.class_names == ("0", "1")
    for label in range(2):
        for axis in range(2):
            assert stats.ks_2samp(x[y == label, axis], theirs[their_y == label, axis]).pvalue > 1e-4
    assert abs(y.mean() - 0.5) < 4 * 0.5 / math.sqrt(len(y))
    log_p = arrays.density.log_prob(torch.from_numpy(theirs))
    error = float(log_p.std()) / math.sqrt(len(log_p))
    assert float(-log_p.mean()) == pytest.approx(arrays.density.entropy.nats, abs=4 * error)


def test_swiss_roll_is_the_first_and_third_value_of_scikit_learns_over_five(cache):
    from sklearn.datasets import make_swiss_roll

    arrays = made("swiss_roll", cache)
    theirs = make_swiss_roll(20_000, noise=1.0, random_state=0)[0][:, [0, 2]] / 5
    for direction in ((1, 0), (0, 1), (1, 1), (1, -1)):
        assert stats.ks_2samp(points(arrays).numpy() @ direction, theirs @ direction).pvalue > 1e-4
    log_p = arrays.density.log_prob(torch.from_numpy(theirs))
    error = float(log_p.std()) / math.sqrt(len(log_p))
    assert float(-log_p.mean()) == pytest.approx(arrays.density.entropy.nats, abs=4 * error)
    assert arrays.spec.num_classes == 0


def test_checkerboard_is_that_of_ffjord(cache):
    """The formula of its `toy_data.py`, in words: a column's squares are shifted by one if the column is odd."""
    density = made("checkerboard", cache).density
    rng = np.random.default_rng(0)
    first = rng.random(5000) * 4 - 2
    second = rng.random(5000) - rng.integers(0, 2, 5000) * 2 + np.floor(first) % 2
    theirs = torch.from_numpy(2 * np.stack([first, second], 1))
    assert (density.log_prob(theirs) == -math.log(32)).all()
    assert (density.log_prob(theirs + torch.tensor([2.0, 0.0])) == -math.inf).all()
    assert (density.log_prob(points(made("checkerboard", cache))) == -math.log(32)).all()  # rounded to float32, too


@pytest.mark.parametrize(
    ("point", "is_black"),
    [((1, 1), True), ((1, -1), False), ((-1, -1), True), ((4, 4), True), ((4, 1), False), ((2, 1), True), ((-4, 4), False),
     ((5, 5), False), ((0, 0), True), ((-4, -4), True), ((4, 3), True), ((4.0001, 3), False)],
)  # fmt: skip
def test_squares_of_the_board_are_black_with_their_rims(point, is_black):
    from src.data.planar import Checkerboard

    log_p = Checkerboard().log_prob(torch.tensor([point], dtype=torch.float32))
    assert log_p.dtype == torch.float64
    assert log_p.tolist() == [-math.log(32) if is_black else -math.inf]


def test_eight_gaussians_are_those_of_ffjord(cache):
    arrays = made("eight_gaussians", cache)
    assert isinstance(arrays.density, IsotropicMixture)
    half = 4 / math.sqrt(2)
    centres = [(4, 0), (-4, 0), (0, 4), (0, -4), (half, half), (half, -half), (-half, half), (-half, -half)]
    theirs = {tuple(round(v / 1.414, 3) + 0.0 for v in centre) for centre in centres}
    assert {tuple(round(v, 3) + 0.0 for v in mean) for mean in arrays.density.means.tolist()} == theirs
    assert arrays.density.sigma == pytest.approx(0.5 / 1.414)


def test_gaussian_mixture_has_any_dimension_and_its_components_for_classes(cache):
    arrays = made("gaussian_mixture", cache, dim=6, num_components=3)
    density, y = arrays.density, torch.from_numpy(arrays.splits["train"].y)
    assert isinstance(density, GaussianMixtureDensity)
    assert arrays.spec.describe() == "vector 6, continuous values without bounds, 3 classes"
    x = points(arrays)
    for k in range(3):
        torch.testing.assert_close(x[y == k].mean(0), density.means[k], rtol=0, atol=0.06)
    log_p = density.log_prob(x)
    error = math.hypot(float(log_p.std()) / math.sqrt(len(x)), density.entropy.standard_error)
    assert float(-log_p.mean()) == pytest.approx(density.entropy.nats, abs=4 * error)
    other = made("gaussian_mixture", cache, dim=6, num_components=3, seed=1)
    assert other.fingerprint != arrays.fingerprint


# --- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "value", "sentence"),
    [
        ("two_moons", "noise", 0.0, r"data\.noise=0\.0 must be a number of at least 0\.01"),
        ("two_moons", "noise", math.nan, r"data\.noise=nan must be a number of at least 0\.01"),
        ("two_moons", "scale", -3.0, r"data\.scale=-3\.0 must be positive"),
        ("swiss_roll", "noise", 0.05, r"data\.noise=0\.05 must be a number of at least 0\.1"),
        ("checkerboard", "num_test", 1, r"data\.num_test=1 must be at least 2"),
        ("eight_gaussians", "sigma", -1.0, r"data\.sigma=-1\.0 must be a positive number"),
        ("gaussian_mixture", "dim", 0, r"data\.dim=0 must be at least 1"),
        ("gaussian_mixture", "num_components", 0, r"data\.num_components=0 must be at least 1"),
        ("gaussian_mixture", "spread", 0.0, r"data\.spread=0\.0 must be a positive number"),
        ("gaussian_mixture", "min_std", 2.0, r"data\.min_std=2\.0 must not be above data\.max_std=1\.0"),
    ],
)
def test_senseless_setting_is_refused_by_its_key(tmp_path, name, key, value, sentence):
    with pytest.raises(UserError, match=sentence):
        made(name, tmp_path, **{key: value})
