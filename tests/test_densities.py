"""Known densities against their integrals, their draws and other implementations; the metrics that need one."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from src.core.density import Density, Entropy, entropy_by_draws, entropy_on_grid
from src.core.errors import NotApplicable, UserError
from src.core.mixture import GaussianMixtureDensity, IsotropicMixture
from src.core.rng import Noise, SampleNoise
from src.core.spec import OwnUnits
from src.data.gaussian_mixtures import random_mixture
from src.data.planar import Checkerboard, two_moons
from src.metrics.metric import HELD_OUT, LOWER, NOISE, Inputs
from src.metrics.wasserstein import wasserstein_2
from tests.examples import vector_spec
from tests.measuring import image_set, make_inputs, make_metric

F64 = torch.zeros((), dtype=torch.float64)
LN_2_PI_E = math.log(2 * math.pi * math.e)


def gaussian(dim: int, sigma: float = 1.0, at: float = 0.0) -> IsotropicMixture:
    return IsotropicMixture(torch.full((1, dim), at, dtype=torch.float64), sigma, torch.ones(1, dtype=torch.float64))


def correlated(dim: int = 3, num_components: int = 4) -> GaussianMixtureDensity:
    return random_mixture(dim, num_components, 3.0, 0.2, 1.0, seed=0)


# --- mixtures with full covariances ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "num_components"), [(1, 1), (2, 5), (7, 3)])
def test_density_with_full_covariances_is_that_of_torch(dim, num_components):
    density = correlated(dim, num_components)
    components = MultivariateNormal(density.means, scale_tril=density.roots)
    expected = MixtureSameFamily(Categorical(density.weights), components)
    x = torch.cat([density.sample(200, SampleNoise(1))[0], 5 * SampleNoise(2).normal((200, dim), F64)])
    torch.testing.assert_close(density.log_prob(x), expected.log_prob(x), rtol=1e-9, atol=1e-9)
    assert density.log_prob(x.float()).dtype == torch.float64


def test_density_with_full_covariances_does_not_depend_on_the_parts_it_is_computed_in(monkeypatch):
    density = correlated()
    x = density.sample(50, SampleNoise(1))[0]
    whole = density.log_prob(x)
    monkeypatch.setattr("src.core.mixture._MAX_VALUES", 40)
    torch.testing.assert_close(density.log_prob(x), whole, rtol=1e-12, atol=0)


def test_draws_with_full_covariances_have_their_weights_means_and_covariances():
    density, count = correlated(), 40_000
    x, component = density.sample(count, SampleNoise(3))
    shares = component.bincount(minlength=4).double() / count
    torch.testing.assert_close(shares, density.weights, rtol=0, atol=4 * math.sqrt(0.25 / count))
    for k in range(4):
        white = torch.linalg.solve_triangular(density.roots[k], (x[component == k] - density.means[k]).T, upper=False)
        tolerance = 5 / math.sqrt(white.shape[1])
        torch.testing.assert_close(torch.cov(white), torch.eye(3, dtype=torch.float64), rtol=0, atol=tolerance)
        assert white.mean(1).abs().max() < tolerance


def test_draw_does_not_depend_on_its_batch():
    density = correlated()
    together, of = density.sample(20, SampleNoise(3))
    apart, of_apart = density.sample(8, SampleNoise(3, start=12))
    torch.testing.assert_close(apart, together[12:])
    assert torch.equal(of_apart, of[12:])


def test_random_mixture_is_drawn_as_it_says():
    density = random_mixture(dim=2, num_components=400, spread=3.0, min_std=0.2, max_std=1.0, seed=1)
    eigenvalues, vectors = torch.linalg.eigh(density.roots @ density.roots.mT)
    std = eigenvalues.sqrt()
    assert 0.2 <= float(std.min()) <= float(std.max()) <= 1.0
    assert stats.kstest(std.log().flatten().numpy(), "uniform", (math.log(0.2), math.log(5))).pvalue > 1e-4
    angle = torch.atan2(vectors[:, 1, 0], vectors[:, 0, 0]) % math.pi
    assert stats.kstest(angle.numpy(), "uniform", (0, math.pi)).pvalue > 1e-4
    assert stats.kstest(density.means.flatten().numpy() / 3, "norm").pvalue > 1e-4
    assert float(density.weights.max() / density.weights.min()) < 3
    other = random_mixture(2, 400, 3.0, 0.2, 1.0, seed=2)
    assert not torch.allclose(density.means, other.means)


# --- entropies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2])
def test_entropy_on_a_grid_is_that_of_a_gaussian(dim):
    found = gaussian(dim, sigma=0.3).entropy
    assert found.nats == pytest.approx(dim * (LN_2_PI_E / 2 + math.log(0.3)), abs=1e-9)
    assert found.standard_error is None


def test_entropy_from_draws_is_that_of_a_gaussian_to_its_standard_error():
    found = entropy_by_draws(gaussian(5, sigma=2.0), num_draws=100_000)
    assert found.nats == pytest.approx(5 * (LN_2_PI_E / 2 + math.log(2)), abs=3 * found.standard_error)
    assert found.standard_error == pytest.approx(math.sqrt(5 / 2 / 100_000), rel=0.02)  # -log p has a variance of D / 2


def test_entropy_of_many_cells_or_dimensions_is_from_draws():
    far = IsotropicMixture(torch.tensor([[0.0, 0.0], [1e4, 1e4]]).double(), 0.1, torch.full((2,), 0.5).double())
    expected = math.log(2) + LN_2_PI_E + 2 * math.log(0.1)
    assert far.entropy.nats == pytest.approx(expected, abs=3 * far.entropy.standard_error)
    assert "draws" in far.entropy.how
    assert gaussian(3).entropy.standard_error > 0


def test_entropy_on_a_grid_passes_over_what_has_no_density():
    board = Checkerboard()
    corner = torch.full((2,), 5.0, dtype=torch.float64)
    assert entropy_on_grid(board.log_prob, -corner, corner, 2 / 64).nats == pytest.approx(math.log(32), rel=0.1)


@pytest.mark.parametrize("density", [gaussian(2), correlated(), Checkerboard()], ids=lambda d: type(d).__name__)
def test_known_densities_have_all_that_is_asked_of_one(density):
    assert isinstance(density, Density)


# --- forward KL ------------------------------------------------------------------------------------------------------


class Scores(nn.Module):
    """A model that is a known density."""

    def __init__(self, density: Density) -> None:
        super().__init__()
        self._density = density

    def log_prob(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        return self._density.log_prob(x)


def _inputs(model: nn.Module, density: Density | None, dim: int = 2, count: int = 20_000, **more: object) -> Inputs:
    x = (density or gaussian(dim)).sample(count, SampleNoise(9))[0]
    inputs = make_inputs(model, x=x, batch_size=4096, **more)
    return replace(inputs, spec=vector_spec(dim), density=density)


def test_forward_kl_of_gaussians_is_their_closed_form():
    data, model = gaussian(2, 1.0), gaussian(2, 1.5, at=0.7)
    found = make_metric("forward_kl").measure(_inputs(Scores(model), data))
    expected = 2 * (math.log(1.5) + (1 + 0.7**2) / (2 * 1.5**2) - 0.5)
    half_width = (found.interval[1] - found.interval[0]) / 2
    assert found.value == pytest.approx(expected, abs=2 * half_width)
    assert half_width < 0.02
    assert (found.unit, found.better) == ("nats", LOWER)
    assert found.card["data_entropy"] == pytest.approx(LN_2_PI_E)
    assert found.card["data_entropy_by"] == "quadrature on a grid"
    assert "data_entropy_standard_error" not in found.card
    assert found.parts["cross_entropy"] - found.parts["entropy_of_test_points"] == pytest.approx(found.value)


def test_forward_kl_of_the_density_itself_is_zero_and_an_estimated_entropy_says_so():
    density = correlated()
    found = make_metric("forward_kl").measure(_inputs(Scores(density), density, dim=3, count=500))
    assert (found.value, found.interval) == (0, (0, 0))
    assert found.card["data_entropy_standard_error"] > 0
    assert found.card["data_entropy_by"] == "mean over 400,000 draws"


def test_forward_kl_of_a_model_without_mass_somewhere_has_no_value():
    with pytest.raises(NotApplicable, match="of 500 test examples have no finite value"):
        make_metric("forward_kl").measure(_inputs(Scores(Checkerboard()), gaussian(2, 3.0), count=500))


def test_forward_kl_says_why_there_is_none():
    metric = make_metric("forward_kl")
    with pytest.raises(NotApplicable, match="it is of data whose density is known; that of data=made_up is not"):
        metric.measure(_inputs(Scores(gaussian(2)), None))
    with pytest.raises(NotApplicable, match="fake has no CanScore"):
        metric.measure(_inputs(nn.Identity(), gaussian(2)))
    given = Scores(gaussian(2))
    given.is_conditional = True
    with pytest.raises(NotApplicable, match="fake scores x given its class; the known density is of x"):
        metric.measure(_inputs(given, gaussian(2)))


# --- Wasserstein -----------------------------------------------------------------------------------------------------


def test_wasserstein_of_points_on_a_line_is_that_of_their_order():
    x, y = (SampleNoise(i).normal((300, 1), F64) * (i + 1) for i in range(2))
    expected = (x.sort(0).values - y.sort(0).values).square().mean().sqrt()
    assert wasserstein_2(x, y) == pytest.approx(float(expected), rel=1e-12)


def test_wasserstein_of_shifted_points_is_the_shift_whatever_their_order():
    x = SampleNoise(0).normal((200, 3), F64)
    y = x.flip(0) + torch.tensor([3.0, 0.0, 4.0])
    assert wasserstein_2(x, y) == pytest.approx(5, rel=1e-12)
    assert wasserstein_2(x, x.roll(7, 0)) == pytest.approx(0, abs=1e-12)


def test_wasserstein_is_the_root_of_the_mean_cost_of_scipys_assignment():
    x, y = (SampleNoise(i).normal((100, 2), F64).numpy() for i in range(2))
    cost = ((x[:, None] - y) ** 2).sum(2)
    expected = math.sqrt(cost[linear_sum_assignment(cost)].mean())
    assert wasserstein_2(torch.from_numpy(x).float(), torch.from_numpy(y).float()) == pytest.approx(expected, rel=1e-5)


def _points(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return SampleNoise(seed).normal((count, 2), torch.zeros(())) + shift


def _sets(generated: Tensor, count: int = 400) -> Inputs:
    sets = {name: image_set(_points(count, i, shift), batch_size=64) for i, (name, shift) in enumerate(SHIFTS.items())}
    inputs = make_inputs(
        generated=image_set(generated, batch_size=64),
        anchors={HELD_OUT: sets[HELD_OUT], NOISE: sets[NOISE]},
        unseen=sets["unseen"],
    )
    return replace(inputs, spec=vector_spec(2))


SHIFTS = {HELD_OUT: 0.0, NOISE: 4.0, "unseen": 0.0}


def test_wasserstein_stands_between_real_against_real_and_noise():
    found = make_metric("wasserstein").measure(_sets(_points(400, 7, shift=1.0)))
    floor, ceiling = (found.anchors[name].value for name in (HELD_OUT, NOISE))
    assert 0.05 < floor < 0.5
    assert found.value == pytest.approx(math.sqrt(2), abs=floor)
    assert ceiling == pytest.approx(4 * math.sqrt(2), abs=floor)
    assert (found.unit, found.better) == ("data units", LOWER)
    assert {"num_samples": 400, "num_reference": 400, "reference_split": "test"}.items() <= found.card.items()


def test_wasserstein_of_a_table_says_that_its_columns_are_standardized():
    inputs = _sets(_points(400, 7))
    own = OwnUnits(("height", "age"), (1.0, 2.0), (3.0, 400.0))
    plain, of_table = (make_metric("wasserstein").measure(some) for some in (inputs, _with_own_units(inputs, own)))
    assert of_table.value == plain.value
    assert of_table.unit == "standardized units"
    assert of_table.card.pop("units") == "each column less its mean, over its standard deviation, both of the training rows"
    assert of_table.card == plain.card


def _with_own_units(inputs: Inputs, own: OwnUnits) -> Inputs:
    return replace(inputs, spec=replace(inputs.spec, own_units=own))


def test_wasserstein_takes_no_more_points_than_it_is_told_on_all_sides():
    found = make_metric("wasserstein", num_points=50).measure(_sets(_points(400, 7)))
    assert {found.card["num_samples"], *(anchor.count for anchor in found.anchors.values())} == {50}
    few = make_metric("wasserstein").measure(_sets(_points(30, 7)))
    assert few.card["num_samples"] == 30


def test_wasserstein_takes_points_from_everywhere():
    """Held-out points in an order that says something must not be compared in part."""
    inputs = _sets(_points(400, 7))
    x = _points(400, 0)
    in_order = image_set(x[x[:, 0].argsort()], batch_size=64)
    found = make_metric("wasserstein", num_points=100).measure(replace(inputs, anchors={HELD_OUT: in_order}))
    assert found.value < 0.7


def test_wasserstein_refuses_what_it_cannot_measure():
    with pytest.raises(NotApplicable, match="it is of vectors; data=made_up gives image"):
        make_metric("wasserstein").measure(make_inputs(generated=image_set(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))))
    for number in (1, 2001):
        with pytest.raises(UserError, match=rf"metric\.wasserstein\.num_points={number} must be from 2 to 2,000"):
            make_metric("wasserstein", num_points=number)


# --- curves blurred by a Gaussian ------------------------------------------------------------------------------------


def _moons_by_simpson(x: np.ndarray, noise: float) -> float:
    """log p of one point, by a fine quadrature that knows nothing of ours."""
    t = np.linspace(0, math.pi, 100_001)
    curves = [(np.cos(t), np.sin(t)), (1 - np.cos(t), 0.5 - np.sin(t))]
    exponents = [-((x[0] - a) ** 2 + (x[1] - b) ** 2) / (2 * noise**2) for a, b in curves]
    most = max(float(e.max()) for e in exponents)
    total = sum(integrate.simpson(np.exp(e - most), x=t) for e in exponents)
    return most + math.log(total / (2 * math.pi)) - math.log(2 * math.pi * noise**2)


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("reach", [0, 5, 20])
def test_density_of_the_moons_is_right_to_a_millionth_and_far_from_them(tmp_path, noise, reach):
    density = two_moons(str(tmp_path), noise, 1.0, 0.0, 2, 2, 2).density
    x = density.sample(12, SampleNoise(1))[0] + reach * noise * SampleNoise(2).normal((12, 2), F64)
    expected = [_moons_by_simpson(point, noise) for point in x.numpy()]
    np.testing.assert_allclose(density.log_prob(x).numpy(), expected, rtol=0, atol=1e-6)


def test_entropy_says_how_it_was_found():
    assert Checkerboard().entropy == Entropy(math.log(32), None, "closed form")
