"""StyleGAN2's networks: modulation against the definition, resampling, noise, truncation, derivatives of derivatives."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from src.core.errors import UserError
from src.core.rng import SampleNoise
from src.networks.resampling import downsample, upsample
from src.networks.style import (
    StyleDiscriminator,
    StyleGenerator,
    append_minibatch_std,
    equalize,
    modulated_convolution,
    pixel_norm,
)

pytestmark = pytest.mark.usefixtures("same_weights")

SIDES = [8, 13, 28, 32, 45, 64, 128]
CONDITION_DIM = 3

sides = pytest.mark.parametrize("side", SIDES)
conditions = pytest.mark.parametrize("condition_dim", [0, CONDITION_DIM], ids=["unconditional", "conditional"])
residuals = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return SampleNoise(seed).normal(shape, torch.zeros(()))


def one_hot(condition_dim: int, n: int) -> Tensor | None:
    return torch.eye(condition_dim, dtype=torch.int64)[torch.arange(n) % condition_dim] if condition_dim else None


def generator(shape: tuple[int, ...], condition_dim: int = 0) -> StyleGenerator:
    return StyleGenerator((5,), shape, style_dim=6, num_mapping_layers=2, width=4, max_width=8, condition_dim=condition_dim)


def discriminator(shape: tuple[int, ...], condition_dim: int = 0, residual: bool = False) -> StyleDiscriminator:
    return StyleDiscriminator(
        shape, (2, 5), width=4, max_width=8, minibatch_std_group=4, residual=residual, condition_dim=condition_dim
    )


def awake(network: nn.Module) -> nn.Module:
    """The network as if trained: no weight is zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return network


@sides
@conditions
def test_generator_gives_square_images_of_8_to_128_pixels(side, condition_dim):
    network = generator((3, side, side), condition_dim)
    styles = network.styles(random(2, 5), one_hot(condition_dim, 2))
    assert styles.shape == (2, network.num_layers, 6)
    assert network.synthesize(styles, None).shape == (2, 3, side, side)


@sides
@conditions
@residuals
def test_discriminator_takes_square_images_of_8_to_128_pixels(side, condition_dim, residual):
    network, x = discriminator((3, side, side), condition_dim, residual), random(2, 3, side, side)
    features = network.features(x, one_hot(condition_dim, 2))
    assert features.shape == (2, network.num_features)
    out = network(x, one_hot(condition_dim, 2))
    assert out.shape == (2, 2, 5)
    assert isinstance(network.head, nn.Linear)
    torch.testing.assert_close(network.head(features), out.flatten(1))


@pytest.mark.parametrize("make", [generator, discriminator])
def test_other_shapes_are_refused(make):
    with pytest.raises(UserError, match=r"square images with a side of 8 to 128 pixels.*gives 1x8x9 "):
        make((1, 8, 9))


@sides
@residuals
def test_every_pixel_reaches_the_discriminator(side, residual):
    x = random(1, 1, side, side).requires_grad_()
    discriminator((1, side, side), residual=residual)(x).square().sum().backward()
    assert (x.grad != 0).all()


@sides
@torch.no_grad()
def test_the_code_and_the_noise_reach_every_pixel(side):
    network = awake(generator((1, side, side)))
    assert (network(random(8, 5)).std(0) > 0).all()
    one = network.styles(random(1, 5)).expand(8, -1, -1)
    assert (network.synthesize(one, SampleNoise(0)).std(0) > 0).all()


def test_condition_changes_the_output_of_both():
    classes = one_hot(CONDITION_DIM, 3)
    out = discriminator((1, 8, 8), CONDITION_DIM)(random(1, 1, 8, 8).expand(3, -1, -1, -1), classes)
    images = generator((1, 8, 8), CONDITION_DIM)(random(1, 5).expand(3, -1), classes)
    assert not torch.isclose(out[0], out[1]).any()
    assert not torch.isclose(images[0], images[1]).all()


@pytest.mark.usefixtures("float64")
@conditions
@pytest.mark.parametrize("noise", [None, SampleNoise(0)], ids=["fixed_noise", "drawn_noise"])
def test_every_parameter_of_the_generator_gets_a_gradient(condition_dim, noise):
    network = generator((3, 28, 28), condition_dim)
    network.synthesize(network.styles(random(8, 5), one_hot(condition_dim, 8)), noise).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-12 for p in network.parameters())


@pytest.mark.usefixtures("float64")
@conditions
@residuals
def test_every_parameter_of_the_discriminator_gets_a_gradient(condition_dim, residual):
    network = discriminator((3, 28, 28), condition_dim, residual)
    network(random(8, 3, 28, 28), one_hot(condition_dim, 8)).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-12 for p in network.parameters())


@residuals
def test_gradient_penalty_has_finite_gradients(residual):
    network = discriminator((1, 13, 13), residual=residual)
    x = random(4, 1, 13, 13).requires_grad_()
    (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert network.from_image.parametrizations.weight.original.grad.any()


def test_slope_of_the_image_along_the_style_is_differentiable():
    network = generator((1, 13, 13))
    styles = network.styles(random(2, 5)).detach().requires_grad_()
    images = network.synthesize(styles, None)
    (slope,) = torch.autograd.grad((images * random(2, 1, 13, 13, seed=1)).sum(), styles, create_graph=True)
    slope.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
    assert network.constant.grad.any()


def per_example(x: Tensor, weight: Tensor, style: Tensor, demodulate: bool) -> list[Tensor]:
    """The weights of each example, by the definition (Karras et al. 2020, equations 1 and 3)."""
    found = []
    for s in style:
        w = weight * s[None, :, None, None]
        norm = w.square().sum((1, 2, 3), keepdim=True).sqrt()
        found.append(w / norm if demodulate else w)
    return found


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_modulated_convolution_is_a_convolution_with_weights_of_each_example(demodulate, kernel):
    x, weight, style = random(3, 4, 6, 6), random(5, 4, kernel, kernel, seed=1), random(3, 4, seed=2)
    expected = [
        F.conv2d(one[None], w, padding=kernel // 2)
        for one, w in zip(x, per_example(x, weight, style, demodulate), strict=True)
    ]
    torch.testing.assert_close(modulated_convolution(x, weight, style, demodulate), torch.cat(expected))


@pytest.mark.usefixtures("float64")
def test_modulated_convolution_upwards_fills_with_zeros_convolves_and_filters():
    x, weight, style = random(3, 4, 6, 6), random(5, 4, 3, 3, seed=1), random(3, 4, seed=2)
    spread = torch.zeros(3, 4, 13, 13)
    spread[:, :, 1::2, 1::2] = x
    wide = F.pad(spread, (1, 1, 1, 1))
    expected = []
    for one, w in zip(wide, per_example(x, weight, style, demodulate=True), strict=True):
        y = F.pad(F.conv2d(one[None], w.flip(2, 3)), (1, 1, 1, 1))
        taps = torch.tensor([1.0, 3, 3, 1]) / 4
        expected.append(
            sum(a * b * y[:, :, i : i + 12, j : j + 12] for i, a in enumerate(taps) for j, b in enumerate(taps))
        )
    torch.testing.assert_close(modulated_convolution(x, weight, style, demodulate=True, up=True), torch.cat(expected))


@pytest.mark.usefixtures("float64")
def test_modulated_convolution_has_right_second_derivatives():
    inputs = (random(2, 2, 3, 3), random(2, 2, 3, 3, seed=1), random(2, 2, seed=2))
    inputs = tuple(x.requires_grad_() for x in inputs)
    assert torch.autograd.gradgradcheck(lambda *args: modulated_convolution(*args, demodulate=True), inputs)


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_demodulation_keeps_unit_variance_whatever_the_style(size):
    x, style = random(16, 32, 16, 16), size * random(16, 32, seed=1)
    out = modulated_convolution(x, random(64, 32, 3, 3, seed=2), style, demodulate=True)
    assert abs(float(out[:, :, 1:-1, 1:-1].std()) - 1) < 0.02


def test_demodulation_is_computed_in_float32():
    x, weight, style = random(2, 4, 6, 6), random(5, 4, 3, 3, seed=1), 300 * random(2, 4, seed=2)
    exact = modulated_convolution(x, weight, style, demodulate=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert (modulated_convolution(x, weight, style, demodulate=True) - exact).abs().max() < 0.1
    half = modulated_convolution(x.half() / 300, weight.half(), style.half(), demodulate=True)  # 300^2 > 65504
    torch.testing.assert_close(300 * half.float(), exact, rtol=0.02, atol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("lr_multiplier", [1.0, 0.01])
@pytest.mark.parametrize("make", [lambda: nn.Linear(48, 96), lambda: nn.Conv2d(16, 32, 3)], ids=["linear", "conv"])
def test_equalized_weights_are_standard_normal_over_the_root_of_the_fan_in(make, lr_multiplier):
    layer = equalize(make(), lr_multiplier)
    raw = layer.parametrizations.weight.original
    fan_in = raw[0].numel()
    assert abs(float(raw.std()) * lr_multiplier - 1) < 0.05
    torch.testing.assert_close(layer.weight, raw * lr_multiplier / fan_in**0.5)
    assert not layer.bias.any()


def test_learning_rate_multiplier_scales_what_a_step_does():
    steps = []
    for multiplier in (1.0, 0.01):
        layer = equalize(nn.Linear(4, 3), multiplier)
        before = [layer.weight.detach().clone(), layer.bias.detach().clone()]
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        layer(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        steps.append([now - then for now, then in zip((layer.weight, layer.bias), before, strict=True)])
    for full, reduced in zip(*steps, strict=True):
        torch.testing.assert_close(reduced, 0.01 * full)


def test_spectral_norm_goes_on_top_of_an_equalized_layer():
    layer = parametrizations.spectral_norm(equalize(nn.Linear(4, 3)), n_power_iterations=50)
    torch.testing.assert_close(torch.linalg.matrix_norm(layer.weight, 2), torch.tensor(1.0))


def test_pixel_norm_gives_a_mean_square_of_one():
    torch.testing.assert_close(pixel_norm(5 * random(3, 7)).square().mean(1), torch.ones(3))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("batch", "group", "size"), [(8, 4, 4), (8, 32, 8), (6, 4, 3), (1, 4, 1)])
def test_minibatch_std_is_the_mean_deviation_in_groups_of_neighbours(batch, group, size):
    x = random(batch, 3, 2, 2)
    out = append_minibatch_std(x, group)
    assert torch.equal(out[:, :3], x)
    for i in range(batch):
        members = x[i // size * size :][:size]
        deviations = [
            (members[:, c, h, w].var(unbiased=False) + 1e-8).sqrt() for c in range(3) for h in range(2) for w in range(2)
        ]
        torch.testing.assert_close(out[i, 3], torch.stack(deviations).mean().expand(2, 2))


def test_a_batch_that_cannot_be_cut_evenly_has_groups_that_differ_by_one_example():
    x = random(7, 3, 2, 2)
    parts = [append_minibatch_std(part, 4) for part in (x[:4], x[4:])]
    torch.testing.assert_close(append_minibatch_std(x, 4), torch.cat(parts))


@pytest.mark.parametrize("group", [2, 4, 32])
def test_repeating_a_batch_leaves_its_minibatch_std_unchanged(group):
    x = random(4, 3, 2, 2)
    torch.testing.assert_close(append_minibatch_std(x.repeat(2, 1, 1, 1), group)[:4], append_minibatch_std(x, group))


def test_discriminator_sees_that_a_batch_is_all_alike():
    x, network = random(4, 1, 8, 8), discriminator((1, 8, 8))
    assert not torch.allclose(network(x)[0], network(x[:1].expand(4, -1, -1, -1))[0], atol=1e-3)


@pytest.mark.parametrize("size", [(4, 4), (5, 7)])
def test_resampling_preserves_constants(size):
    x = torch.tensor([2.0, -3.0])[None, :, None, None].expand(1, 2, *size)
    up, down = upsample(x), downsample(x)
    assert up.shape[2:] == (2 * size[0], 2 * size[1])
    assert down.shape[2:] == tuple((n + 1) // 2 for n in size)
    for out in (up, down):
        torch.testing.assert_close(out, x[:, :, :1, :1].expand_as(out))


@pytest.mark.usefixtures("float64")
def test_resampling_is_that_of_the_filter():
    x = random(2, 3, 6, 6)
    torch.testing.assert_close(upsample(x), F.interpolate(x, scale_factor=2, mode="bilinear"))
    wide = F.pad(x, (1, 1, 1, 1), mode="replicate")
    taps = torch.tensor([1.0, 3, 3, 1]) / 8
    places = itertools.product(range(4), repeat=2)
    expected = sum(taps[i] * taps[j] * wide[:, :, i : i + 5 : 2, j : j + 5 : 2] for i, j in places)
    torch.testing.assert_close(downsample(x), expected)


def test_odd_sides_go_on_as_they_end():
    x = random(1, 2, 5, 5)
    torch.testing.assert_close(downsample(x), downsample(F.pad(x, (0, 1, 0, 1), mode="replicate")))


@torch.no_grad()
def test_noise_changes_the_picture_and_the_same_noise_does_not():
    network = awake(generator((1, 13, 13))).eval()
    styles = network.styles(random(2, 5))
    first, again, other = (network.synthesize(styles, SampleNoise(seed)) for seed in (0, 0, 1))
    fixed = network.synthesize(styles, None)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)
    assert not torch.allclose(first, fixed, atol=1e-3)
    assert torch.equal(fixed, network(random(2, 5)))


@torch.no_grad()
def test_noise_has_no_strength_at_the_start():
    network = generator((1, 13, 13))
    styles = network.styles(random(2, 5))
    assert torch.equal(network.synthesize(styles, SampleNoise(0)), network.synthesize(styles, None))


@torch.no_grad()
def test_every_layer_follows_its_own_style():
    network = awake(generator((1, 28, 28)))
    styles = network.styles(random(1, 5))
    image = network.synthesize(styles, None)
    for i in range(network.num_layers):
        mixed = styles.clone()
        mixed[:, i] += 1
        assert not torch.allclose(network.synthesize(mixed, None), image, atol=1e-4)


@torch.no_grad()
def test_truncation_pulls_towards_the_mean_style():
    network = generator((1, 8, 8))
    network.mean_style.copy_(random(6, seed=1))
    styles = network.styles(random(2, 5))
    torch.testing.assert_close(network.truncate(styles, 0), network.mean_style.expand_as(styles))
    torch.testing.assert_close(network.truncate(styles, 1), styles)
    torch.testing.assert_close(network.truncate(styles, 0.5), (styles + network.mean_style) / 2)


@torch.no_grad()
@conditions
def test_mean_style_follows_the_styles_in_training_only(condition_dim):
    network = generator((1, 8, 8), condition_dim).eval()
    z, classes = random(30, 5), one_hot(condition_dim, 30)
    mean = network.styles(z, classes).mean((0, 1))
    assert not network.mean_style.any()
    network.train()
    network.styles(z, classes)
    torch.testing.assert_close(network.mean_style, 0.005 * mean)
    for _ in range(5000):
        network.mean_style.lerp_(mean, 0.1)
    network.styles(z, classes)
    torch.testing.assert_close(network.mean_style, mean)


@torch.no_grad()
def test_signal_keeps_its_size_whatever_the_depth():
    for side in (8, 64):
        network = StyleGenerator((16,), (3, side, side), style_dim=16, num_mapping_layers=2, width=16, max_width=32)
        assert 0.3 < float(network(random(32, 16)).std()) < 4


@torch.no_grad()
@conditions
def test_image_does_not_depend_on_its_batch(condition_dim):
    network = awake(generator((1, 13, 13), condition_dim)).eval()
    z, classes = random(4, 5), one_hot(condition_dim, 4)
    together = network(z, classes)
    apart = [network(z[i : i + 1], None if classes is None else classes[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(apart), together, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("make", [generator, discriminator])
def test_copy_and_loaded_state_are_equal_and_their_own(make):
    network, fresh = awake(make((1, 8, 8), CONDITION_DIM)).eval(), make((1, 8, 8), CONDITION_DIM).eval()
    x = random(2, 1, 8, 8) if make is discriminator else random(2, 5)
    before = network(x, one_hot(CONDITION_DIM, 2))
    twin = copy.deepcopy(network)
    fresh.load_state_dict(network.state_dict())
    assert all(isinstance(value, Tensor) for value in network.state_dict().values())
    assert len(list(twin.buffers())) == len(list(network.buffers()))
    for other in (twin, fresh):
        assert torch.equal(other(x, one_hot(CONDITION_DIM, 2)), before)
        awake(other)
        assert not torch.equal(other(x, one_hot(CONDITION_DIM, 2)), before)
    assert torch.equal(network(x, one_hot(CONDITION_DIM, 2)), before)


def test_settings_below_one_are_refused():
    with pytest.raises(UserError, match="num_mapping_layers=0, which must be"):
        StyleGenerator((5,), (1, 8, 8), style_dim=6, num_mapping_layers=0, width=4, max_width=8)
    with pytest.raises(UserError, match="minibatch_std_group=0, which must be"):
        StyleDiscriminator((1, 8, 8), (1,), width=4, max_width=8, minibatch_std_group=0, residual=True)
