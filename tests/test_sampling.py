"""Ways to look at what a model draws: interpolations, truncation, classes, mixed styles, densities of points."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from src.build import build_model
from src.core.batch import Batch
from src.core.drawing import Sampler
from src.core.errors import NotApplicable, UserError
from src.core.latents import BetweenNoise, TruncatedNoise, lerp, slerp, truncate_normal
from src.core.mixture import IsotropicMixture
from src.core.protocols import CanDecode
from src.core.rng import SampleNoise
from src.core.views import Viewer, half_mask
from src.evaluation.protocol import draw_samples
from src.experiment import steer
from src.sample_files import SampleFiles
from src.sample_pictures import _draw_classes, _draw_samples
from src.training.callbacks.point_pictures import curve_picture, density_picture, histogram_density
from tests.commands import Trained, call, train
from tests.configs import compose_model
from tests.examples import image_spec

SHARES = [0.0, 0.1, 0.5, 0.75, 1.0]

# --- ways between two latents ----------------------------------------------------------------------------------------


def _latents(count: int = 5, dim: int = 7) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return a, b


@pytest.mark.parametrize("way", [lerp, slerp])
def test_ends_are_exact(way):
    a, b = (z.float() for z in _latents())
    assert torch.equal(way(a, b, 0.0), a)
    assert torch.equal(way(a, b, 1.0), b)


@pytest.mark.parametrize("share", SHARES)
def test_slerp_stays_on_the_sphere_and_turns_at_an_even_pace(share):
    a, b = (z / z.norm(dim=1, keepdim=True) for z in _latents())
    z = slerp(a, b, share)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5, dtype=torch.float64))
    angle = (a * b).sum(1).acos()
    torch.testing.assert_close((a * z).sum(1), (share * angle).cos())


@pytest.mark.parametrize("share", SHARES)
def test_slerp_of_the_axes_is_the_unit_circle(share):
    x, y = torch.eye(2, dtype=torch.float64)[:, None]
    expected = [math.cos(share * math.pi / 2), math.sin(share * math.pi / 2)]
    torch.testing.assert_close(slerp(x, y, share), torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0])
def test_slerp_is_straight_where_there_is_no_arc(share, factor):
    a, _ = _latents()
    torch.testing.assert_close(slerp(a, factor * a, share), lerp(a, factor * a, share))


def test_middle_of_an_arc_is_as_long_as_a_latent_is_and_that_of_a_line_is_not():
    a, b = torch.randn(2, 50, 1000, generator=torch.Generator().manual_seed(0))
    assert float(slerp(a, b, 0.5).norm(dim=1).mean()) == pytest.approx(math.sqrt(1000), rel=0.01)
    assert float(lerp(a, b, 0.5).norm(dim=1).mean()) == pytest.approx(math.sqrt(500), rel=0.01)


def test_noise_between_two_is_normal_again_and_there_is_none_between_uniform_values():
    between = BetweenNoise(SampleNoise(0), SampleNoise(1), 0.3)
    z = between.normal((400, 100), torch.zeros(()))
    assert float(z.mean()) == pytest.approx(0, abs=0.02)
    assert float(z.std()) == pytest.approx(1, abs=0.02)
    with pytest.raises(NotApplicable, match="uniform"):
        between.uniform((2, 2), torch.zeros(()))


class _OnAppleGPU(Tensor):
    """A tensor that says that it is on Apple's GPU, and like one has no float64."""

    @property
    def device(self) -> torch.device:
        return torch.device("mps")

    def double(self) -> Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self) -> Tensor:
        return self.as_subclass(Tensor)


def test_on_a_gpu_without_float64_latents_are_those_of_the_cpu():
    a, b = (z.float() for z in _latents())
    a_there, b_there = a.as_subclass(_OnAppleGPU), b.as_subclass(_OnAppleGPU)
    assert torch.equal(slerp(a_there, b_there, 0.3).cpu(), slerp(a, b, 0.3))
    assert torch.equal(truncate_normal(a_there, 0.5).cpu(), truncate_normal(a, 0.5))


# --- the truncated normal distribution -------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.1, 0.5, 1.0, 2.0, 5.0])
def test_truncated_normal_is_that_of_its_closed_form(bound):
    z = truncate_normal(SampleNoise(0).normal((1000, 100), torch.zeros((), dtype=torch.float64)), bound).flatten()
    exact = stats.truncnorm(-bound, bound)
    assert float(z.abs().max()) <= bound
    assert float(z.mean()) == pytest.approx(0, abs=0.02 * bound)
    assert float(z.var()) == pytest.approx(exact.var(), rel=0.02)
    assert stats.kstest(z[:20_000].numpy(), exact.cdf).pvalue > 1e-3


def test_truncation_keeps_the_order_and_wide_bounds_change_nothing():
    z = torch.linspace(-8, 8, 101, dtype=torch.float64)
    assert bool((truncate_normal(z, 1.0).diff() >= 0).all())
    torch.testing.assert_close(truncate_normal(z[20:-20], 40.0), z[20:-20], rtol=1e-4, atol=1e-6)
    assert torch.equal(truncate_normal(z, 0.0).abs(), torch.zeros_like(z))
    assert truncate_normal(torch.tensor([-50.0, 50.0]), 40.0).isfinite().all()


def test_truncated_noise_of_a_sample_depends_on_its_index_alone():
    like = torch.zeros(())
    whole = TruncatedNoise(SampleNoise(3), 0.7).normal((9, 4), like)
    part = TruncatedNoise(SampleNoise(3, start=5), 0.7).normal((4, 4), like)
    assert torch.equal(whole[5:], part)


# --- drawing from a model --------------------------------------------------------------------------------------------

NUM_CLASSES = 3
MODELS = ["gan", "dcgan", "cgan", "vae", "cvae", "stylegan2"]


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> nn.Module:
    return _model(request.param)


def _model(name: str, *overrides: str) -> nn.Module:
    """A model of tiny images with random weights; one with styles has a mean style and noise in its layers."""
    torch.manual_seed(0)
    built = build_model(compose_model(f"model={name}", *overrides).model, image_spec((1, 8, 8), "discrete"), name).eval()
    if getattr(built, "has_styles", False):
        built.generator.mean_style.normal_()
        for layer in built.generator.convolutions:
            nn.init.ones_(layer.noise_strength)
    return built


def _sampler(model: nn.Module, batch_size: int = 100, **settings: float) -> Sampler:
    return Sampler(model, NUM_CLASSES, seed=3, batch_size=batch_size, **settings)


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_samples_are_those_of_an_evaluation(model):
    condition = torch.arange(7) % NUM_CLASSES if model.is_conditional else None
    with torch.no_grad():
        expected = torch.cat(list(draw_samples(model, 7, 100, 3, condition)))
    assert torch.equal(_sampler(model).samples(7), expected)


def test_rows_end_in_the_samples_and_do_not_depend_on_the_batch_size(model):
    sampler = _sampler(model, condition=1 if model.is_conditional else None)
    samples, rows = sampler.samples(6), sampler.interpolations(3, 4)
    assert rows.shape == (3, 4, 1, 8, 8)
    _close(rows[:, 0], samples[:3])
    _close(rows[:, -1], samples[3:])
    assert not torch.allclose(rows[:, 0], rows[:, 1])
    in_parts = _sampler(model, batch_size=2, condition=1 if model.is_conditional else None)
    _close(in_parts.interpolations(3, 4), rows)


@pytest.mark.parametrize("name", ["cgan", "cvae"])
def test_rows_of_a_conditional_model_keep_the_class_they_begin_with(name):
    model = _model(name)
    rows = _sampler(model).interpolations(2, 3)
    for r in range(2):
        of_class = _sampler(model, condition=r).samples(4)
        _close(rows[r, [0, -1]], of_class[[r, 2 + r]])
    assert not torch.allclose(rows[:, -1], _sampler(model).samples(4)[2:])


def test_between_truncated_samples_the_words_bound_the_ends_alone():
    sampler = _sampler(_model("gan"), truncation=0.5)
    z = sampler._between(range(200), 200, 0.5).normal((200, 2), torch.zeros(()))
    assert float(z.abs().max()) > 0.5
    bound = "of a normal distribution truncated to |z_i| <= 0.5"
    assert sampler.truncation_in_words(is_between=False) == f"z {bound}"
    assert sampler.truncation_in_words(is_between=True) == f"z of the ends, not those between them, {bound}"
    assert _sampler(_model("gan")).truncation_in_words(is_between=True) == ""


def test_truncated_samples_do_not_depend_on_the_batch_size_and_become_one(model):
    if not isinstance(model, CanDecode):
        with pytest.raises(NotApplicable, match="no z of N"):
            _sampler(model, truncation=0.5)
        return
    truncated = _sampler(model, truncation=0.5, condition=0).samples(6)
    assert truncated.std(0).mean() < _sampler(model, condition=0).samples(6).std(0).mean()
    _close(_sampler(model, batch_size=4, truncation=0.5, condition=0).samples(6), truncated)
    rows = _sampler(model, truncation=0.5, condition=0).interpolations(3, 2)
    _close(rows.transpose(0, 1).flatten(0, 1), truncated)


@pytest.mark.parametrize("name", ["gan", "vae"])
def test_at_zero_truncation_all_samples_are_that_of_the_middle(name):
    model = _model(name)
    with torch.no_grad():
        middle = model.decode(torch.zeros(1, model.latent_dim))
    _close(_sampler(model, truncation=0.0).samples(3), middle.expand(3, -1, -1, -1))


@pytest.mark.parametrize("name", ["cgan", "cvae"])
def test_classes_are_the_same_noise_for_every_class(name):
    model = _model(name)
    grid = _sampler(model).classes(4, NUM_CLASSES)
    for k in range(NUM_CLASSES):
        _close(grid[:, k], _sampler(model, condition=k).samples(4))


def test_model_that_is_not_conditional_has_no_classes():
    sampler = _sampler(_model("gan"))
    assert sampler.classes_of(4) is None
    with pytest.raises(NotApplicable, match="not conditional"):
        sampler.classes(2, NUM_CLASSES)


# --- a latent that is N(0, I) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "can"),
    [
        ("vae", (), True),
        ("vae", ("model.sample_pixels=true",), False),
        ("cvae", (), False),
        ("cvae", ("prior=standard_normal",), True),
        ("gan", (), True),
        ("autoencoder", (), False),
    ],
)
def test_a_model_claims_to_decode_its_noise_if_that_is_how_it_samples(name, overrides, can):
    model = _model(name, *overrides)
    assert isinstance(model, CanDecode) == can
    if can:
        condition = torch.arange(4) % NUM_CLASSES
        z = SampleNoise(0).normal((4, model.latent_dim), torch.zeros(()))
        assert torch.equal(model.sample(4, condition, generator=SampleNoise(0)), model.decode(z, condition))


# --- styles ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["none", "concatenation"])
def styled(request) -> nn.Module:
    return _model("stylegan2", f"conditioning={request.param}")


def _num_layers(styled: nn.Module) -> int:
    return styled.generator.num_layers


def test_without_crossover_mixed_styles_are_the_fine_sources_and_with_all_layers_the_coarse_ones(styled):
    n, sampler = 3, _sampler(styled)
    none, every = sampler.mixed_styles(n, 0), sampler.mixed_styles(n, _num_layers(styled))
    for i in range(n):
        for j in range(n):
            _close(none.mixed[i, j], none.fine[i])
            _close(every.mixed[i, j], every.coarse[j])
    _close(none.fine, every.fine)


def test_mixed_styles_are_between_their_sources_and_by_default_half_of_each(styled):
    sampler = _sampler(styled)
    half = sampler.mixed_styles(2, None)
    _close(half.mixed, sampler.mixed_styles(2, _num_layers(styled) // 2).mixed)
    assert not torch.allclose(half.mixed[0, 0], half.fine[0])
    assert not torch.allclose(half.mixed[0, 0], half.coarse[0])
    _close(_sampler(styled, batch_size=2).mixed_styles(2, None).mixed, half.mixed)


def test_truncated_styles_are_as_they_were_at_one_and_the_mean_at_zero(styled):
    _close(_sampler(styled, truncation=1.0).samples(4), _sampler(styled).samples(4))
    z = torch.randn(4, styled.latent_dim)
    styles = styled.styles(z, torch.arange(4) % NUM_CLASSES, truncation=0.0)
    _close(styles, styled.generator.mean_style.expand_as(styles))


def test_at_zero_truncation_styles_lose_the_class_and_keep_the_noise_of_the_layers(styled):
    a, b = (_sampler(styled, truncation=0.0, condition=k if styled.is_conditional else None).samples(2) for k in (0, 1))
    _close(a, b)
    assert not torch.allclose(a[0], a[1])


def test_crossover_behind_the_last_layer_and_styles_of_others_are_refused(styled):
    with pytest.raises(UserError, match=r"crossover=99 must be at most \d+, the number of styles"):
        _sampler(styled).mixed_styles(2, 99)
    with pytest.raises(NotApplicable, match="its generator has no styles"):
        _sampler(_model("dcgan")).mixed_styles(2, None)


# --- given examples ---------------------------------------------------------------------------------------------------


class _Line(nn.Module):
    """An autoencoder of images by a code of three values, by hand: x = 10 z_0 + z_1 + 0.1 z_2, and 100 a class."""

    is_conditional = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([10.0, 1.0, 0.1]))

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        level = x.flatten(1)[:, :1]
        return torch.cat([torch.zeros_like(level), 2 * level, level], 1)

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        level = (z * self.scale).sum(1) + (0 if condition is None else 100 * condition)
        return level.reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)

    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return x + 1

    def inpaint(self, x: Tensor, mask: Tensor, condition: Tensor | None, *, generator: SampleNoise) -> Tensor:
        return torch.where(mask, x, generator.normal(tuple(x.shape), x) + 100 * condition.reshape(-1, 1, 1, 1))


class _Gaussian(_Line):
    """The same with z ~ N(0, I), and a posterior of standard deviation 0.5."""

    latent_dim = 3

    def posterior(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean = self.encode(x, condition)
        return mean, torch.full_like(mean, 2 * math.log(0.5))


def _levels(n: int) -> Batch:
    return Batch(torch.arange(float(n)).reshape(n, 1, 1, 1).expand(n, 1, 2, 2), torch.arange(n) % 2)


def test_reconstructions_stand_beside_their_examples():
    batch = _levels(5)
    drawn = Viewer(_Line(), 0, batch_size=2).reconstructions(batch)
    assert torch.equal(drawn, torch.stack([batch.x, batch.x + 1], 1))


def test_traversal_goes_along_the_most_active_dimensions_of_the_first_examples_code():
    batch = Batch(_levels(4).x + 1, torch.tensor([1, 0, 0, 0]))
    drawn = Viewer(_Gaussian(), 0, batch_size=3).traversal(batch, 2, 7)
    assert drawn.dimensions == [1, 2]
    assert drawn.x.shape == (2, 7, 1, 2, 2)
    steps = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(drawn.x[0, :, 0, 0, 0], 100 + steps + 0.1)  # of code (0, 2, 1) and class 1
    torch.testing.assert_close(drawn.x[1, :, 0, 0, 0], 100 + 2 + 0.1 * steps)
    of_class = Viewer(_Gaussian(), 0, batch_size=3).traversal(batch, 9, 7, condition=0)
    assert of_class.dimensions == [1, 2, 0]
    torch.testing.assert_close(of_class.x[:2], drawn.x - 100)


def test_without_a_latent_of_known_law_a_traversal_has_the_spread_of_the_codes():
    batch = _levels(3)  # codes (0, 2 x, x) of x = 0, 1, 2
    drawn = Viewer(_Line(), 0, batch_size=100).traversal(batch, 1, 3)
    std = 2 * math.sqrt(2 / 3)
    expected = torch.tensor([2 - 3 * std, 2, 2 + 3 * std])
    torch.testing.assert_close(drawn.x[0, :, 0, 0, 0], expected)


def test_traversal_of_a_generator_goes_from_its_first_sample():
    model = _model("gan")
    drawn = Viewer(model, 3, batch_size=5).traversal(_levels(1), 2, 5)
    assert drawn.dimensions == [0, 1]
    z = SampleNoise(3).normal((1, model.latent_dim), torch.zeros(()))
    z[:, 1] = 0.0
    with torch.no_grad():
        _close(drawn.x[1, 2], model.decode(z)[0])


def test_posterior_draws_have_the_posteriors_moments_and_do_not_depend_on_the_batch_size():
    batch = _levels(3)
    drawn = Viewer(_Gaussian(), 0, batch_size=10_000).posterior_draws(batch, 2000)
    assert torch.equal(drawn[:, 0], batch.x)
    levels = drawn[:, 1:, 0, 0, 0]
    expected = torch.tensor([2.1 * x + 100 * (x % 2) for x in range(3)])
    torch.testing.assert_close(levels.mean(1), expected, rtol=0, atol=0.5)
    torch.testing.assert_close(levels.std(1), torch.full((3,), 0.5 * math.sqrt(101.01)), rtol=0.05, atol=0)
    _close(Viewer(_Gaussian(), 0, batch_size=7).posterior_draws(batch, 2000), drawn)


def test_completions_keep_what_is_known_and_do_not_depend_on_the_batch_size():
    batch, mask = _levels(3), half_mask("left", (1, 2, 2))
    drawn = Viewer(_Line(), 0, batch_size=100).completions(batch, mask, 4, blank=-7.0)
    assert drawn.shape == (3, 6, 1, 2, 2)
    assert torch.equal(drawn[:, -1], batch.x)
    assert torch.equal(drawn[:, :, 0, :, 0], batch.x[:, :, :, 0].expand(-1, 6, -1))
    assert (drawn[:, 0, 0, :, 1] == -7).all()
    assert drawn[:, 1:5, 0, :, 1].flatten(1).unique(dim=1).shape == (3, 8)
    assert (drawn[1, 1:5, 0, :, 1] > 50).all()  # of its class
    assert torch.equal(Viewer(_Line(), 0, batch_size=5).completions(batch, mask, 4, blank=-7.0), drawn)


def test_draws_of_an_example_depend_on_its_place_and_their_number_alone():
    batch, mask, viewer = _levels(3), half_mask("left", (1, 2, 2)), Viewer(_Gaussian(), 0, batch_size=4)
    some, more = (viewer.completions(batch, mask, count, blank=0.0)[:, 1:-1] for count in (2, 5))
    assert torch.equal(more[:, :2], some)
    fewer = Batch(batch.x[:2], batch.condition[:2])
    assert torch.equal(viewer.completions(fewer, mask, 5, blank=0.0)[:, 1:-1], more[:2])
    posterior, longer = (viewer.posterior_draws(batch, count)[:, 1:] for count in (2, 5))
    assert torch.equal(longer[:, :2], posterior)
    assert longer.flatten(0, 1)[:, 0, 0, 0].unique().shape == (15,)


@pytest.mark.parametrize(("side", "known"), [("top", [0]), ("bottom", [2]), ("left", [0]), ("right", [2])])
def test_halves_of_odd_images_are_rounded_down(side, known):
    mask = half_mask(side, (1, 3, 3))[0]
    rows = mask if side in ("top", "bottom") else mask.T
    assert torch.equal(rows.all(1), torch.tensor([i in known for i in range(3)]))
    assert int(mask.sum()) == 3


def test_what_a_model_cannot_show_is_said():
    viewer, batch = Viewer(nn.Linear(1, 1), 0, 10), _levels(2)
    for show, words in (
        (lambda: viewer.reconstructions(batch), "does not reconstruct"),
        (lambda: viewer.traversal(batch, 1, 3), "no latents"),
        (lambda: viewer.posterior_draws(batch, 1), "no posterior"),
        (lambda: viewer.completions(batch, half_mask("top", (1, 2, 2)), 1, 0.0), "does not complete"),
    ):
        with pytest.raises(NotApplicable, match=words):
            show()


class _Steered(nn.Module):
    """Remembers how it was steered."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, float] = {}

    def steer(self, *, steps: int | None = None, guidance: float | None = None) -> None:
        self.given = {"steps": steps, "guidance": guidance}


def test_models_that_draw_in_steps_are_steered_and_others_refuse():
    model = _Steered()
    steer(model, "x", 5, 2)
    assert model.given == {"steps": 5, "guidance": 2}
    steer(model, "x", None, None)
    assert model.given == {"steps": None, "guidance": None}
    steer(nn.Linear(1, 1), "x", None, None)
    for steps, guidance, words in (
        (5, None, r"evaluation\.steps=5 cannot be asked of model=x"),
        (None, 2.0, r"evaluation\.guidance=2.0 cannot be asked"),
        (2.5, None, "whole number"),
        (0, None, "at least 1"),
        (None, -1.0, "at least 0"),
        (None, "much", "must be a number"),
        (True, None, "whole number"),
    ):
        with pytest.raises(UserError, match=words):
            steer(nn.Linear(1, 1), "x", steps, guidance, "evaluation.")


# --- densities and curves of points ----------------------------------------------------------------------------------


def _ring() -> IsotropicMixture:
    angle = math.pi / 4 * torch.arange(8, dtype=torch.float64)
    return IsotropicMixture(torch.stack([angle.cos(), angle.sin()], 1), 0.01, torch.full((8,), 1 / 8, dtype=torch.float64))


def test_histogram_integrates_to_the_share_of_points_in_its_frame():
    corner, length, cells = torch.tensor([-2.0, -1.0]), 3.0, 64
    inside = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0)) * length + corner
    outside = torch.tensor([[5.0, 0.0], [0.0, -1.1], [float("nan"), 0.0]])
    cell = (length / cells) ** 2
    assert float(histogram_density(inside, corner, length, cells).sum() * cell) == pytest.approx(1, rel=1e-5)
    both = histogram_density(torch.cat([inside, outside]), corner, length, cells)
    assert float(both.sum() * cell) == pytest.approx(1000 / 1003, rel=1e-5)


def test_histogram_of_many_points_is_the_density_they_are_drawn_from():
    mixture = IsotropicMixture(torch.zeros(1, 2, dtype=torch.float64), 1.0, torch.ones(1, dtype=torch.float64))
    x, _ = mixture.sample(200_000, SampleNoise(0))
    found = histogram_density(x, torch.tensor([-4.0, -4.0]), 8.0, 16)
    middle = float(mixture.log_prob(torch.tensor([[0.25, 0.25]])).exp())
    assert float(found[7, 8]) == pytest.approx(middle, rel=0.05)


def test_density_of_samples_of_the_data_looks_like_that_of_the_data():
    x, _ = _ring().sample(20_000, SampleNoise(0))
    picture = density_picture(x.float(), x.float(), _ring().log_prob)
    left, right = picture[:, :, :512].float(), picture[:, :, -512:].float()
    assert (picture.shape, picture.dtype) == ((3, 512, 1028), torch.uint8)
    dark = [(side.sum(0) < 300).float() for side in (left, right)]
    assert float((dark[0] * dark[1]).sum() / dark[1].sum()) > 0.8
    assert float((right == 255).all(0).float().mean()) > 0.9  # most of the plane is empty


def test_density_without_a_formula_is_beside_the_histogram_of_the_data():
    x, _ = _ring().sample(500, SampleNoise(0))
    picture = density_picture(x.float(), x.float(), None)
    assert torch.equal(picture[:, :, :512], picture[:, :, -512:])


def test_curves_have_colours_of_their_own():
    data = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    line = torch.linspace(-1, 1, 200)
    curves = torch.stack([torch.stack([line, line.new_full((200,), y)], 1) for y in (-0.5, 0.5)])
    picture = curve_picture(curves, data)
    colours = {tuple(picture[:, y, 256].tolist()) for y in range(512)} - {(255, 255, 255)}
    assert len(colours) == 2


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def styled_run(cache, tmp_path_factory) -> Trained:
    small = ("generator.width=8", "discriminator.width=8", "trainer.max_steps=2", "metric=[]")
    return train(tmp_path_factory.mktemp("styled") / "run", cache, "model=stylegan2", *small)


@pytest.fixture(scope="module")
def points_run(cache, tmp_path_factory) -> Trained:
    small = ("data.num_train=400", "data.num_val=100", "data.num_test=100", "trainer.max_steps=4", "loader.batch_size=100")
    folder = tmp_path_factory.mktemp("points") / "run"
    return train(folder, cache.parent / "small", "model=gan", "data=ring", *small, "metric=[]")


def _drawn(run: Trained, out: Path, *arguments: str) -> str:
    said = call("sample", f"run={run.run.path}", f"out={out}", *arguments)
    assert said.code == 0, said.text
    return said.text


def _tiles(file: Path, side: int = 32) -> np.ndarray:
    """The images of a grid `(rows, columns, side, side)`, one channel."""
    picture = np.asarray(Image.open(file)).astype(int)[..., 0]
    rows, columns = (length // (side + 1) for length in picture.shape)
    return picture[1:, 1:].reshape(rows, side + 1, columns, side + 1).swapaxes(1, 2)[..., :side, :side]


def test_each_kind_of_picture_has_files_of_its_own(trained, tmp_path):
    run, out = trained("cgan"), tmp_path / "out"
    _drawn(run, out, "n=8")
    said = _drawn(run, out, "n=2", "picture=interpolation", "row_length=3")
    assert "interpolation.png with 2 rows of 3 images of the " in said
    _drawn(run, out, "n=2", "picture=classes")
    pictures = {*(f"{i:05d}.png" for i in range(8)), "grid.png", "interpolation.png", "classes.png", ".drawn"}
    assert {file.name for file in out.iterdir()} == pictures
    samples, rows, classes = (_tiles(out / f"{name}.png") for name in ("grid", "interpolation", "classes"))
    assert (rows.shape[:2], classes.shape[:2]) == ((2, 3), (2, 10))
    assert abs(rows[0, 0] - samples[0, 0]).max() <= 1
    assert abs(rows[1, 0] - samples[0, 1]).max() <= 1
    assert abs(classes[0, 0] - samples[0, 0]).max() <= 1
    assert abs(classes[1, 1] - samples[0, 1]).max() <= 1


def test_pictures_of_test_images(trained, tmp_path):
    run, out = trained("vae"), tmp_path / "out"
    assert "reconstruction.png with 3 test images" in _drawn(run, out, "n=3", "picture=reconstruction")
    assert "2 test images and 3 draws of p(x' | z" in _drawn(run, out, "n=2", "picture=posterior", "row_length=4")
    assert "with the latent dimensions " in _drawn(run, out, "n=2", "picture=traversal")
    kinds = ("reconstruction", "posterior", "traversal")
    assert {file.name for file in out.iterdir()} == {*(f"{kind}.png" for kind in kinds), ".drawn"}
    rebuilt, draws, traversed = (_tiles(out / f"{kind}.png") for kind in kinds)
    assert (rebuilt.shape[:2], draws.shape[:2], traversed.shape[:2]) == ((2, 3), (2, 4), (2, 11))
    assert (draws[:, 0] == rebuilt[0, :2]).all()
    _drawn(run, out, "n=3", "picture=reconstruction", "seed=1")
    assert (_tiles(out / "reconstruction.png") != rebuilt).any()


def test_a_model_without_samples_has_reconstructions(trained, tmp_path):
    run = trained("autoencoder")
    _drawn(run, tmp_path, "n=2", "picture=reconstruction")
    _drawn(run, tmp_path, "n=2", "picture=traversal", "row_length=3")
    assert _tiles(tmp_path / "traversal.png").shape[:2] == (2, 3)
    assert "draws no samples" in call("sample", f"run={run.run.path}", "n=2").text


@pytest.mark.slow
def test_a_model_that_draws_in_steps_is_steered_and_completes_images(cache, tmp_path):
    settings = ("model=flow_matching", "trainer.max_steps=5", "metric=[cs]", "sampler=euler", "evaluation.steps=3")
    run = train(tmp_path / "run", cache, *settings)
    assert run.run.results()["costs"]["sampling"]["evaluations_per_sample"] == 3
    out = tmp_path / "out"
    assert "steps=2" in _drawn(run, out, "n=2", "picture=inpainting", "known=left", "steps=2", "row_length=4")
    tiles = _tiles(out / "inpainting.png")
    assert tiles.shape[:2] == (2, 4)
    left = tiles[..., :16]
    assert (left == left[:, -1:]).all()
    said = call("evaluate", f"run={run.run.path}", "metric=[cs]", "evaluation.steps=4")
    assert said.code == 0, said.text
    assert run.run.results()["metrics"]["cs"]["card"]["model"]["settings"]["steps"] == 4
    assert run.run.results()["costs"]["sampling"]["evaluations_per_sample"] == 4


def test_another_truncation_or_class_goes_into_another_folder(trained, tmp_path):
    run = trained("cgan").run
    said = call("sample", f"run={run.path}", "n=2", "condition=3", "truncation=0.5")
    assert said.code == 0, said.text
    assert "z of a normal distribution truncated to |z_i| <= 0.5" in said.text
    (folder,) = run.samples.glob("drawn_*_condition3_truncation0.5")
    assert (folder / "grid.png").is_file()
    said = call("sample", f"run={run.path}", "n=2", "picture=interpolation", "truncation=0.5", f"out={tmp_path}")
    assert "z of the ends, not those between them, of a normal distribution truncated to |z_i| <= 0.5" in said.text


def _in_folder(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("model", "name", "arguments"),
    [
        ("vae", "grid.png", ["n=2"]),
        ("vae", "00001.png", ["n=2"]),
        ("vae", "interpolation.png", ["picture=interpolation"]),
        ("cgan", "classes.png", ["picture=classes"]),
        ("styled", "styles.png", ["picture=styles", "n=2"]),
        ("points", "points.csv", ["n=2"]),
        ("points", "points.png", ["n=2"]),
        ("points", "density.png", ["n=2"]),
        ("points", "interpolation.npy", ["picture=interpolation"]),
        ("points", "interpolation.png", ["picture=interpolation"]),
        ("vae", ".drawn", ["n=2"]),
    ],
)
def test_file_of_someone_else_is_never_overwritten(trained, request, tmp_path, model, name, arguments):
    run = request.getfixturevalue(f"{model}_run") if model in ("styled", "points") else trained(model)
    (tmp_path / name).write_text("mine")
    said = call("sample", f"run={run.run.path}", f"out={tmp_path}", *arguments)
    assert said.code == 1
    assert f"error: out={tmp_path} holds {name}, which was not drawn by this program; give another folder" in said.text
    assert _in_folder(tmp_path) == {name: b"mine"}


def test_picture_of_someone_else_is_never_deleted_nor_becomes_ours(trained, tmp_path):
    run = trained("vae")
    for name in ("2019.png", "00007.png"):
        (tmp_path / name).write_text("mine")
    _drawn(run, tmp_path, "n=3")
    _drawn(run, tmp_path, "n=2")
    (tmp_path / "00002.png").write_text("mine")  # was ours, until it was removed
    drawn = {"00000.png", "00001.png", "grid.png"}
    assert set(json.loads((tmp_path / ".drawn").read_text())) == drawn
    before = _in_folder(tmp_path)
    assert {name for name, content in before.items() if content == b"mine"} == {"2019.png", "00007.png", "00002.png"}
    assert "holds 00002.png, which was not" in call("sample", f"run={run.run.path}", f"out={tmp_path}", "n=3").text
    assert _in_folder(tmp_path) == before
    _drawn(run, tmp_path, "n=1")
    assert set(_in_folder(tmp_path)) == {*before} - {"00001.png"}


def test_call_that_was_killed_owns_what_it_had_written(trained, tmp_path, monkeypatch):
    def killed(*_: object) -> str:
        raise KeyboardInterrupt

    run = trained("vae")
    _drawn(run, tmp_path, "n=2")
    with monkeypatch.context() as patched:
        patched.setattr("src.sample_files.image_grid", killed)  # behind the images
        with pytest.raises(KeyboardInterrupt):
            call("sample", f"run={run.run.path}", f"out={tmp_path}", "n=5")
    assert (tmp_path / "00004.png").is_file()
    _drawn(run, tmp_path, "n=3")
    assert set(_in_folder(tmp_path)) == {".drawn", "grid.png", *(f"{i:05d}.png" for i in range(3))}


def test_folder_of_the_run_from_before_there_were_markers_is_ours(trained, tmp_path):
    shutil.copytree(trained("vae").run.path, tmp_path / "run")
    folder = tmp_path / "run" / "samples" / "old"
    folder.mkdir()
    for name in ("00000.png", "00009.png", "grid.png", "2019.png", "notes.txt"):
        (folder / name).write_text("old")
    said = call("sample", f"run={tmp_path / 'run'}", f"out={folder}", "n=2")
    assert said.code == 0, said.text
    files = _in_folder(folder)
    assert {*files} == {".drawn", "00000.png", "00001.png", "grid.png", "2019.png", "notes.txt"}
    assert {name for name, content in files.items() if content == b"old"} == {"2019.png", "notes.txt"}
    (folder.parent / "grid.png").write_text("mine")
    said = call("sample", f"run={tmp_path / 'run'}", f"out={folder.parent}", "n=2")
    assert "holds grid.png, which was not drawn by this program" in said.text


def test_folder_that_cannot_be_made_is_named(trained, tmp_path):
    file, long = tmp_path / "file", tmp_path / ("a" * 300)
    file.write_text("mine")
    below = f"cannot be a folder, since {file} is a file; give another folder"
    why = "cannot be written to (File name too long); give another folder"
    for out, sentence in ((file, below), (file / "sub", below), (long, why)):
        said = call("sample", f"run={trained('vae').run.path}", f"out={out}", "n=1")
        assert said.code == 1
        assert f"error: out={out} {sentence}" in said.text
    assert file.read_text() == "mine"


class _OfManyClasses(nn.Module):
    """A conditional model that draws the class it is asked for."""

    is_conditional = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def sample(self, n: int, condition: Tensor, *, generator: SampleNoise) -> Tensor:
        return (condition / 1000).reshape(n, 1, 1, 1).expand(n, 1, 32, 32)


@pytest.mark.parametrize(("num_classes", "per_row", "shown"), [(20, 20, 20), (21, 8, 20), (1000, 8, 20)])
def test_of_many_classes_the_first_are_shown(tmp_path, num_classes, per_row, shown):
    spec = image_spec((1, 32, 32), "discrete", num_classes=num_classes)
    sampler, config = Sampler(_OfManyClasses(), num_classes, 0, 100), OmegaConf.create({"n": None, "condition": None})
    files = SampleFiles(tmp_path, spec, lambda: None, is_of_run=False)
    _draw_samples(sampler, files, spec, config)
    assert _tiles(tmp_path / "grid.png").shape[1] == per_row
    of = f"the first 20 of {num_classes}" if num_classes > shown else str(num_classes)
    assert _draw_classes(sampler, files, spec, config) == f"classes.png with 8 latents for each of {of} classes"
    assert _tiles(tmp_path / "classes.png").shape[:2] == (8, shown)


def test_styles_are_mixed_and_truncated(styled_run, tmp_path):
    _drawn(styled_run, tmp_path, "picture=styles", "n=3", "crossover=1")
    assert _tiles(tmp_path / "styles.png").shape[:2] == (4, 4)
    assert "styles at 0.5 of their distance from the mean" in _drawn(styled_run, tmp_path, "truncation=0.5", "n=2")


def test_points_are_drawn_as_a_density_and_as_curves(points_run, tmp_path):
    assert "5 samples and density.png of 50,000 more" in _drawn(points_run, tmp_path, "n=5")
    assert Image.open(tmp_path / "density.png").size == (1028, 512)
    _drawn(points_run, tmp_path, "picture=interpolation", "n=2")
    curves, points = np.load(tmp_path / "interpolation.npy"), np.load(tmp_path / "points.npy")
    assert curves.shape == (2, 200, 2)
    np.testing.assert_allclose(np.concatenate([curves[:, 0], curves[:, -1]]), points[:4], rtol=0, atol=1e-5)


def test_points_are_not_drawn_over_data_that_changed_after_the_training(points_run, tmp_path):
    shutil.copytree(points_run.run.path, tmp_path / "run")
    file = tmp_path / "run" / "spec.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": "0" * 64}))
    for picture in ("samples", "interpolation"):
        said = call("sample", f"run={tmp_path / 'run'}", f"out={tmp_path / picture}", f"picture={picture}", "n=2")
        assert said.code == 1
        assert "have changed since its training: the fingerprint of the prepared examples was 000000000000" in said.text


@pytest.mark.parametrize(
    ("model", "arguments", "sentence"),
    [
        (
            "vae",
            ["picture=foo"],
            "picture=foo is not known; allowed: samples, interpolation, classes, styles, reconstruction",
        ),
        ("vae", ["truncation=-0.1"], "truncation=-0.1 must be a number that is at least 0, or null for no truncation"),
        ("vae", ["truncation=much"], "truncation=much must be a number that is at least 0"),
        ("vae", ["truncation=true"], "truncation=True must be a number"),
        ("vae", ["truncation=nan"], "truncation=nan must be a number"),
        ("cvae", ["truncation=1"], "truncation=1 cannot be asked of model=cvae: it has no z of N(0, I) to truncate"),
        ("vae", ["picture=interpolation", "row_length=1"], "row_length=1 must be at least 2"),
        ("vae", ["picture=interpolation", "row_length=2.5"], "row_length=2.5 must be a whole number"),
        ("vae", ["row_length=5"], "row_length=5 is nothing that picture=samples takes; it is for picture=interpolation"),
        ("vae", ["steps=5"], "steps=5 cannot be asked of model=vae: it does not draw in steps"),
        ("vae", ["guidance=2"], "guidance=2 cannot be asked of model=vae: it does not draw in steps"),
        ("vae", ["steps=0"], "steps=0 must be at least 1"),
        ("vae", ["guidance=much"], "guidance=much must be a number that is at least 0"),
        ("vae", ["picture=posterior", "steps=5"], "steps=5 is nothing that picture=posterior takes"),
        ("vae", ["picture=inpainting"], "picture=inpainting cannot be asked of model=vae: it does not complete examples"),
        ("vae", ["picture=inpainting", "known=middle"], "known=middle is not known; allowed: top, bottom, left, right"),
        ("vae", ["known=top"], "known=top is nothing that picture=samples takes; it is for picture=inpainting"),
        (
            "cgan",
            ["picture=reconstruction"],
            "picture=reconstruction cannot be asked of model=cgan: it does not reconstruct",
        ),
        ("cgan", ["picture=posterior"], "picture=posterior cannot be asked of model=cgan: it has no posterior"),
        ("vae", ["picture=traversal", "truncation=1"], "truncation=1 is nothing that picture=traversal takes"),
        ("vae", ["picture=styles", "crossover=-1"], "crossover=-1 must be at least 0"),
        ("vae", ["picture=classes"], "picture=classes cannot be asked of model=vae: it is not conditional"),
        ("cvae", ["picture=classes", "condition=1"], "condition=1 is nothing that picture=classes takes"),
        ("vae", ["picture=styles"], "picture=styles cannot be asked of model=vae: its generator has no styles"),
        ("vae", ["condition=1"], "condition=1 cannot be asked of model=vae: it is not conditional"),
        ("vae", ["seed=null"], "seed=null must be a whole number"),
        ("vae", ["batch_size=null"], "batch_size=null must be a whole number"),
        ("vae", ["run=null"], "run=null is no directory of a run; give one, as in run=outputs/"),
        ("vae", ["run=2024"], "run=2024 does not exist; give the directory of a run"),
        ("vae", ["class=1"], "class is not a key of the config; allowed: run, picture, n, condition, truncation"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_sentence(trained, tmp_path, model, arguments, sentence):
    said = call("sample", f"run={trained(model).run.path}", f"out={tmp_path / 'out'}", *arguments)
    assert said.code == 1
    assert f"error: {sentence}" in said.text
    assert "Traceback" not in said.text


# --- in training -----------------------------------------------------------------------------------------------------


def _tags(run: Trained) -> set[str]:
    return set(EventAccumulator(str(run.run.tensorboard), size_guidance={"images": 1}).Reload().Tags()["images"])


def _kinds(run: Trained) -> set[str]:
    return {re.split("_(?:step|epoch)_", file.stem)[0] for file in run.run.samples.glob("*_*.png")}


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        ("cgan", {"samples", "latent_interpolations", "classes"}),
        ("vae", {"samples", "latent_interpolations", "interpolations", "reconstructions"}),
        ("cvae", {"samples", "classes", "interpolations", "reconstructions"}),
    ],
)
def test_a_training_shows_latents_and_classes(trained, model, kinds):
    run = trained(model)
    assert _kinds(run) == _tags(run) == kinds
    if "classes" in kinds:
        (first, *_) = sorted(run.run.samples.glob("classes_epoch_*.png"))
        assert _tiles(first).shape[:2] == (8, 10)


def test_a_training_on_points_shows_their_density(points_run):
    assert _kinds(points_run) == _tags(points_run) == {"samples", "latent_interpolations", "density"}


def test_pictures_come_with_every_nth_validation(cache, tmp_path):
    settings = ("model=gan", "trainer.max_steps=30", "callback.pictures.every_n_validations=2", "metric=[]")
    run = train(tmp_path / "run", cache, *settings).run
    for kind in ("samples", "latent_interpolations"):
        assert [file.stem[-4:] for file in sorted(run.samples.glob(f"{kind}_epoch_*.png"))] == ["0001", "0003"]
