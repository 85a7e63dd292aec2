"""Networks: shapes, what they refuse, and that no weight and no pixel is idle."""

import pytest
import torch
from torch import Tensor, nn

from src.core.errors import UserError
from src.core.rng import SampleNoise
from src.networks.classifier import ConvClassifier, SmallClassifier
from src.networks.convolutional import ConvDecoder, ConvEncoder, normal_init
from src.networks.mlp import MLP

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
