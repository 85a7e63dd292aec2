"""Networks: shapes, what they refuse, and that no weight and no pixel is idle."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from src.core.errors import UserError
from src.core.rng import SampleNoise
from src.networks.classifier import ConvClassifier, SmallClassifier
from src.networks.conditional_norm import ConditionalBatchNorm
from src.networks.convolutional import ConvDecoder, ConvEncoder, normal_init
from src.networks.mlp import MLP, MaxoutMLP
from src.networks.residual import ResidualDiscriminator, ResidualGenerator

pytestmark = pytest.mark.usefixtures("same_weights")

SIDES = [8, 9, 13, 15, 28, 32, 45, 64, 100, 113, 128]
CONDITION_DIM = 3

sides = pytest.mark.parametrize("side", SIDES)
channels = pytest.mark.parametrize("channels", [1, 3])
conditions = pytest.mark.parametrize("condition_dim", [0, CONDITION_DIM], ids=["unconditional", "conditional"])


def random(*shape: int) -> Tensor:
    return SampleNoise(0).normal(shape, torch.zeros(()))


def one_hot(condition_dim: int, n: int = 2) -> Tensor | None:
    return torch.eye(condition_dim, dtype=torch.int64)[:n] if condition_dim else None


def encoder(shape: tuple[int, ...], condition_dim: int = 0, batch_norm: bool = False) -> ConvEncoder:
    return ConvEncoder(shape, (2, 5), width=2, batch_norm=batch_norm, initial_std=None, condition_dim=condition_dim)


def decoder(shape: tuple[int, ...], condition_dim: int = 0, batch_norm: bool = False) -> ConvDecoder:
    return ConvDecoder((5,), shape, width=4, batch_norm=batch_norm, initial_std=None, condition_dim=condition_dim)


def mlp(shape: tuple[int, ...], condition_dim: int = 0) -> MLP:
    return MLP(shape, (2, 5), hidden=[7, 6], activation=nn.ReLU(), condition_dim=condition_dim)


@sides
@channels
@conditions
def test_encoder_takes_square_images_of_8_to_128_pixels(side, channels, condition_dim):
    out = encoder((channels, side, side), condition_dim)(random(2, channels, side, side), one_hot(condition_dim))
    assert out.shape == (2, 2, 5)


@sides
@channels
@conditions
def test_decoder_gives_square_images_of_8_to_128_pixels(side, channels, condition_dim):
    out = decoder((channels, side, side), condition_dim)(random(2, 5), one_hot(condition_dim))
    assert out.shape == (2, channels, side, side)


@pytest.mark.parametrize("make", [encoder, decoder])
@pytest.mark.parametrize("shape", [(1, 7, 7), (1, 129, 129), (1, 8, 9), (64,), (16, 16)], ids=str)
def test_convolutional_networks_refuse_other_shapes_and_say_which(make, shape):
    given = "x".join(str(n) for n in shape)
    with pytest.raises(UserError, match=rf"square images with a side of 8 to 128 pixels.*gives {given} "):
        make(shape)


@sides
def test_every_pixel_reaches_the_code(side):
    x = random(1, 1, side, side).requires_grad_()
    encoder((1, side, side))(x).square().sum().backward()
    assert (x.grad != 0).all()


@sides
def test_the_code_reaches_every_pixel(side):
    network = decoder((1, side, side), batch_norm=True)
    with torch.no_grad():
        images = network(random(64, 5))
    assert (images.std(0) > 0).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("make", [encoder, decoder])
@conditions
def test_every_convolutional_parameter_gets_a_gradient(make, batch_norm, condition_dim):
    network = make((3, 28, 28), condition_dim, batch_norm)
    x = random(8, 3, 28, 28) if make is encoder else random(8, 5)
    condition = None if condition_dim == 0 else one_hot(condition_dim, 3)[torch.arange(8) % 3]
    network(x, condition).square().sum().backward()
    assert_all_have_gradients(network)


def assert_all_have_gradients(network: nn.Module) -> None:
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9]
    assert not idle


@pytest.mark.parametrize("make", [encoder, mlp])
def test_condition_changes_the_output(make):
    x = random(1, 1, 8, 8).expand(3, -1, -1, -1)
    out = make((1, 8, 8), CONDITION_DIM)(x, one_hot(CONDITION_DIM, 3))
    assert not torch.isclose(out[0], out[1]).any()


def test_condition_changes_the_image():
    out = decoder((1, 8, 8), CONDITION_DIM)(random(1, 5).expand(3, -1), one_hot(CONDITION_DIM, 3))
    assert not torch.equal(out[0], out[1])


def modules(network: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, kind)]


def test_batch_norm_is_where_it_was_asked_for():
    shape = (1, 32, 32)
    assert not modules(encoder(shape), nn.BatchNorm2d)
    assert not modules(decoder(shape), nn.BatchNorm2d)
    num_blocks = 3
    assert len(modules(encoder(shape, batch_norm=True), nn.BatchNorm2d)) == num_blocks - 1
    assert len(modules(decoder(shape, batch_norm=True), nn.BatchNorm2d)) == num_blocks


@torch.no_grad()
@pytest.mark.parametrize("make", [ConvEncoder, ConvDecoder])
def test_initial_std_gives_normal_weights_and_zero_biases(make):
    shapes = [(100,), (1, 28, 28)] if make is ConvDecoder else [(1, 28, 28), (100,)]
    network = make(*shapes, width=32, batch_norm=True, initial_std=0.02)
    weights = torch.cat([m.weight.flatten() for m in modules(network, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))])
    scales = torch.cat([m.weight for m in modules(network, nn.BatchNorm2d)])
    for values, mean in ((weights, 0.0), (scales, 1.0)):
        standard_error = 0.02 / len(values) ** 0.5
        assert abs(float(values.mean()) - mean) < 4 * standard_error
        assert abs(float(values.std()) - 0.02) < 4 * standard_error / 2**0.5
    assert all((p == 0).all() for name, p in network.named_parameters() if name.endswith("bias"))


def test_normal_init_leaves_other_modules_alone():
    layers = nn.Sequential(nn.LayerNorm(4), nn.PReLU())
    before = [p.clone() for p in layers.parameters()]
    normal_init(layers, 0.02)
    assert all(torch.equal(a, b) for a, b in zip(before, layers.parameters(), strict=True))


@conditions
@pytest.mark.parametrize("shape", [(5,), (1, 8, 8), (3, 4, 6)], ids=str)
def test_mlp_takes_any_shape(shape, condition_dim):
    assert mlp(shape, condition_dim)(random(2, *shape), one_hot(condition_dim)).shape == (2, 2, 5)


@conditions
def test_every_mlp_parameter_gets_a_gradient(condition_dim):
    network = mlp((1, 8, 8), condition_dim)
    network(random(2, 1, 8, 8), one_hot(condition_dim)).square().sum().backward()
    assert_all_have_gradients(network)


def test_mlp_ends_without_an_activation():
    network = MLP((3,), (4,), hidden=[], activation=nn.ReLU())
    (layer,) = modules(network, nn.Linear)
    x = random(6, 3)
    torch.testing.assert_close(network(x), x @ layer.weight.T + layer.bias)
    assert (network(x) < 0).any()


classifiers = pytest.mark.parametrize(("classifier", "feature_dim"), [(SmallClassifier, 84), (ConvClassifier, 96)])


@classifiers
@channels
@pytest.mark.parametrize("side", [8, 15, 16, 28, 32, 64, 128])
def test_classifier_gives_features_and_logits_of_any_image_size(side, channels, classifier, feature_dim):
    network = classifier((channels, side, side), num_classes=4).eval()
    features, logits = network(random(2, channels, side, side))
    assert features.shape == (2, feature_dim)
    assert logits.shape == (2, 4)
    torch.testing.assert_close(logits, network.head(features))


@classifiers
def test_every_classifier_parameter_gets_a_gradient(classifier, feature_dim):
    network = classifier((1, 8, 8), num_classes=4)
    network(random(16, 1, 8, 8))[1].square().sum().backward()
    assert_all_have_gradients(network)


def residual_generator(shape: tuple[int, ...], condition_dim: int = 0, batch_norm: bool = True) -> ResidualGenerator:
    return ResidualGenerator((5,), shape, width=4, batch_norm=batch_norm, condition_dim=condition_dim)


def residual_discriminator(shape: tuple[int, ...], condition_dim: int = 0) -> ResidualDiscriminator:
    return ResidualDiscriminator(shape, (2, 5), width=8, condition_dim=condition_dim)


def maxout(shape: tuple[int, ...], condition_dim: int = 0) -> MaxoutMLP:
    return MaxoutMLP(shape, (2, 5), hidden=[7, 6], num_pieces=3, initial_std=None, condition_dim=condition_dim)


@sides
@conditions
def test_residual_networks_take_square_images_of_8_to_128_pixels(side, condition_dim):
    condition = one_hot(condition_dim)
    images = residual_generator((3, side, side), condition_dim)(random(2, 5), condition)
    assert images.shape == (2, 3, side, side)
    assert residual_discriminator((3, side, side), condition_dim)(images, condition).shape == (2, 2, 5)


@pytest.mark.parametrize("make", [residual_generator, residual_discriminator])
@pytest.mark.parametrize("shape", [(1, 7, 7), (1, 129, 129), (1, 8, 9), (64,)], ids=str)
def test_residual_networks_refuse_other_shapes(make, shape):
    with pytest.raises(UserError, match="square images with a side of 8 to 128 pixels"):
        make(shape)


@sides
def test_every_pixel_reaches_the_residual_discriminator(side):
    x = random(1, 1, side, side).requires_grad_()
    residual_discriminator((1, side, side))(x).square().sum().backward()
    assert (x.grad != 0).all()


@sides
@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_code_reaches_every_pixel_of_the_residual_generator(side, batch_norm):
    network = residual_generator((1, side, side), batch_norm=batch_norm)
    with torch.no_grad():
        assert (network(random(8, 5)).std(0) > 0).all()


@pytest.mark.parametrize(("side", "last"), [(8, 4), (15, 7), (28, 7), (32, 8), (64, 8), (100, 6), (128, 8)])
def test_residual_discriminator_halves_the_image_to_about_8_pixels(side, last):
    assert residual_discriminator((1, side, side)).blocks(random(1, 1, side, side)).shape[-1] == last


@torch.no_grad()
def test_residual_discriminator_sums_over_all_positions():
    network, x = residual_discriminator((1, 8, 8)), random(2, 1, 8, 8)
    torch.testing.assert_close(network.features(x), network.blocks(x).flatten(2).sum(2))


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_residual_networks_at_32_pixels_are_those_of_spectral_normalization_for_cifar():
    conv3, conv1, norm = 256 * 256 * 9, 256 * 256, 2 * 256
    start, end = (128 + 1) * 256 * 4 * 4, norm + (256 * 9 + 1) * 3
    generator = start + 3 * (2 * conv3 + conv1 + 2 * norm) + end
    with torch.device("meta"):  # the paper's has 3 * 3 * 256 more: biases that batch norm subtracts again
        assert num_parameters(ResidualGenerator((128,), (3, 32, 32))) == generator
    conv3, conv1 = 128 * 128 * 9 + 128, 128 * 128 + 128
    first = (3 * 9 + 1) * 128 + conv3 + (3 + 1) * 128
    down, flat = 2 * conv3 + conv1, 2 * conv3
    with torch.device("meta"):
        assert num_parameters(ResidualDiscriminator((3, 32, 32), (1,))) == first + down + 2 * flat + (128 + 1)


@torch.no_grad()
def test_residual_networks_start_from_glorots_uniform_weights():
    generator, discriminator = ResidualGenerator((50,), (3, 8, 8), 64), ResidualDiscriminator((3, 8, 8), (9,), 64)
    first, second = discriminator.blocks[:2]
    residuals = [generator.blocks[0].residual[3], first.residual[0], second.residual[1]]
    others = [generator.start[0], generator.blocks[0].shortcut[0], generator.end[-1], discriminator.head]
    for gain, chosen in ((2**0.5, residuals), (1, others)):
        for layer in chosen:
            positions = layer.weight[0, 0].numel()
            bound = gain * (6 / ((layer.weight.shape[0] + layer.weight.shape[1]) * positions)) ** 0.5
            assert 0.95 * bound < layer.weight.abs().max() <= bound
    assert not any(p.any() for net in (generator, discriminator) for n, p in net.named_parameters() if "bias" in n)


@pytest.mark.usefixtures("float64")
def test_residual_shortcuts_commute_with_their_1x1_convolution():
    up = residual_generator((1, 8, 8)).blocks[0].shortcut
    x = random(2, 4, 6, 6).double()
    torch.testing.assert_close(up(x), up[0](up[1](x)))
    down = residual_discriminator((4, 8, 8)).blocks[0].shortcut
    torch.testing.assert_close(down(x), down[0](down[1](x)))


def class_normed(make: str, condition_dim: int = CONDITION_DIM, **others: float) -> nn.Module:
    """A generator of 8x8 images from `(B, 5)` that takes the class by conditional batch norm."""
    norms = {"batch_norm": True, "conditional_batch_norm": True, "condition_dim": condition_dim} | others
    if make == "mlp":
        return MLP((5,), (1, 8, 8), hidden=[7, 6], activation=nn.ReLU(), **norms)
    if make == "conv":
        return ConvDecoder((5,), (1, 8, 8), width=4, **{"initial_std": None} | norms)
    return ResidualGenerator((5,), (1, 8, 8), width=4, **norms)


class_normed_generators = pytest.mark.parametrize("make", ["mlp", "conv", "residual"])


def norm_kinds(network: nn.Module) -> set[tuple[type, bool]]:
    return {(type(m), m.affine) for m in modules(network, _BatchNorm)}


@class_normed_generators
def test_class_changes_the_output_through_batch_norm_alone(make):
    network = class_normed(make).eval()
    with torch.no_grad():
        out = network(random(1, 5).expand(CONDITION_DIM, -1), one_hot(CONDITION_DIM, CONDITION_DIM))
    assert min((out[i] - out[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-6
    assert norm_kinds(network) == {(nn.BatchNorm1d if make == "mlp" else nn.BatchNorm2d, False)}
    assert modules(network, nn.Linear)[0].in_features == 5


@class_normed_generators
def test_conditional_batch_norm_without_a_condition_is_refused(make):
    with pytest.raises(UserError, match=r"conditional_batch_norm=true that is given no class.*conditioning="):
        class_normed(make, condition_dim=0)
    plain = class_normed(make, condition_dim=0, conditional_batch_norm=False)
    assert norm_kinds(plain) == {(nn.BatchNorm1d if make == "mlp" else nn.BatchNorm2d, True)}
    assert plain(random(2, 5)).shape == (2, 1, 8, 8)


@class_normed_generators
def test_conditional_batch_norm_needs_batch_norm(make):
    with pytest.raises(UserError, match=r"conditional_batch_norm=true but no batch norm.*set its batch_norm=true"):
        class_normed(make, batch_norm=False)


def test_conditional_batch_norm_needs_a_hidden_layer():
    with pytest.raises(UserError, match="no hidden layers"):
        MLP((5,), (2,), [], nn.ReLU(), batch_norm=True, conditional_batch_norm=True, condition_dim=CONDITION_DIM)


@torch.no_grad()
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("event", [(), (4, 3)], ids=["vector", "image"])
def test_conditional_batch_norm_scales_and_shifts_by_class(event):
    norm = ConditionalBatchNorm(2, dimensions=len(event) or 1, condition_dim=3)
    x = 5 + 3 * random(6, 2, *event).double()
    classes = torch.tensor([0, 1, 2, 2, 1, 0])
    out = norm(x, nn.functional.one_hot(classes, 3))
    dims = [d for d in range(x.ndim) if d != 1]
    normal = (x - x.mean(dims, keepdim=True)) / (x.var(dims, correction=0, keepdim=True) + norm.norm.eps).sqrt()
    for i, c in enumerate(classes):
        for channel in range(2):
            expected = (1 + norm.gamma[c, channel]) * normal[i, channel] + norm.beta[c, channel]
            torch.testing.assert_close(out[i, channel], expected)


@torch.no_grad()
@pytest.mark.parametrize("initial_std", [None, 0.5])
def test_class_scales_start_near_one_and_shifts_near_zero_whatever_the_other_weights(initial_std):
    norm = ConditionalBatchNorm(1000, 1, 10)
    if initial_std is not None:
        normal_init(norm, initial_std)
    for table in (norm.gamma, norm.beta):
        assert abs(table.mean()) < 0.001
        assert abs(table.std() - 0.02) < 0.001


@pytest.mark.usefixtures("float64")
@class_normed_generators
def test_every_parameter_of_a_class_normed_generator_gets_a_gradient(make):
    network = class_normed(make)
    out = network(random(12, 5).double(), one_hot(CONDITION_DIM, 3)[torch.arange(12) % 3])
    (out * random(1, 8, 8).double()).sum().backward()
    assert_all_have_gradients(network)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("batch_norm", [False, True])
@conditions
def test_every_residual_parameter_gets_a_gradient(batch_norm, condition_dim):
    condition = None if condition_dim == 0 else one_hot(condition_dim, 3)[torch.arange(8) % 3]
    generator = residual_generator((1, 12, 12), condition_dim, batch_norm=batch_norm)
    discriminator = residual_discriminator((1, 12, 12), condition_dim)
    discriminator(generator(random(8, 5).double(), condition), condition).square().sum().backward()
    assert_all_have_gradients(generator)
    assert_all_have_gradients(discriminator)


def test_mlp_normalises_before_every_activation_and_has_no_idle_bias():
    network = MLP((3,), (4,), hidden=[7, 6], activation=nn.ReLU(), batch_norm=True)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]
    assert [type(layer) for layer in network.layers] == kinds
    assert [layer.bias is not None for layer in modules(network, nn.Linear)] == [False, False, True]
    network(random(8, 3)).square().sum().backward()
    assert_all_have_gradients(network)


@torch.no_grad()
def test_initial_std_of_an_mlp_is_that_of_its_weights():
    network = MLP((100,), (50,), [100, 100], nn.ReLU(), batch_norm=True, initial_std=0.02)
    weights = torch.cat([layer.weight.flatten() for layer in modules(network, nn.Linear)])
    assert abs(weights.std() - 0.02) < 0.001
    scales = torch.cat([norm.weight for norm in modules(network, nn.BatchNorm1d)])
    assert abs(scales.mean() - 1) < 0.01
    assert 0.01 < scales.std() < 0.03
    assert not network.head.bias.any()


@torch.no_grad()
def test_maxout_unit_is_the_largest_of_its_pieces():
    network = MaxoutMLP((1, 2, 2), (3,), hidden=[2], num_pieces=5, initial_std=0.02, condition_dim=CONDITION_DIM)
    x, condition = random(4, 1, 2, 2), one_hot(CONDITION_DIM, 3)[[0, 1, 2, 0]]
    flat = torch.cat([x.flatten(1), condition.float()], dim=1)
    (layer,) = network.hidden
    assert layer.out_features == 2 * 5
    units = [
        max(float(layer.weight[k] @ row + layer.bias[k]) for k in range(5 * unit, 5 * unit + 5))
        for row in flat
        for unit in range(2)
    ]
    expected = torch.tensor(units).reshape(4, 2) @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(network(x, condition), expected)


@conditions
def test_every_maxout_parameter_gets_a_gradient(condition_dim):
    network = maxout((1, 8, 8), condition_dim)
    network(random(2, 1, 8, 8), one_hot(condition_dim)).square().sum().backward()
    assert_all_have_gradients(network)


@torch.no_grad()
def test_maxout_mlp_starts_from_normal_weights():
    network = MaxoutMLP((2,), (1,), hidden=[50, 50], num_pieces=5, initial_std=0.02)
    assert abs(network.hidden[1].weight.std() - 0.02) < 0.001
    assert not any(layer.bias.any() for layer in modules(network, nn.Linear))


@torch.no_grad()
@conditions
@pytest.mark.parametrize("make", [encoder, mlp, maxout, residual_discriminator])
def test_output_is_the_head_of_the_features(make, condition_dim):
    network = make((1, 8, 8), condition_dim)
    x, condition = random(2, 1, 8, 8), one_hot(condition_dim)
    features = network.features(x, condition)
    assert isinstance(network.head, nn.Linear)
    assert features.shape == (2, network.num_features)
    assert network.head.in_features == network.num_features
    assert torch.equal(network.head(features).unflatten(1, (2, 5)), network(x, condition))


def test_features_of_an_mlp_without_hidden_layers_are_its_input():
    network = MLP((3,), (1,), hidden=[], activation=nn.ReLU(), condition_dim=CONDITION_DIM)
    x, condition = random(2, 3), one_hot(CONDITION_DIM)
    assert torch.equal(network.features(x, condition), torch.cat([x, condition.float()], 1))
    assert network.num_features == 3 + CONDITION_DIM


NORM = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (lambda: mlp((4,), 3), {0: ["weight", "bias"], 2: ["weight", "bias"], 4: ["weight", "bias"]}),
        (
            lambda: encoder((1, 16, 16), 3, batch_norm=True),
            {0: ["weight", "bias"], 2: ["weight"], 3: NORM, 6: ["weight", "bias"]},
        ),
        (
            lambda: decoder((1, 16, 16), 3, batch_norm=True),
            {0: ["weight"], 2: NORM, 4: ["weight"], 5: NORM, 7: ["weight", "bias"]},
        ),
    ],
    ids=["mlp", "encoder", "decoder"],
)
def test_saved_weights_keep_their_names(make, layers):
    assert list(make().state_dict()) == [f"layers.{i}.{name}" for i, names in layers.items() for name in names]
