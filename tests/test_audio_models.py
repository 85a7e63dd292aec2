"""WaveNet and the networks of waveforms: what they see, and that drawing with queues is the same network."""

import pytest
import torch

from src.core.errors import UserError
from src.core.rng import SampleNoise
from src.core.sound import MU_LAW, Sound
from src.core.spec import DISCRETE, DataSpec, Values
from src.core.tokens import TokenChoice
from src.models.autoregressive import Autoregressive
from src.networks.convolutional_1d import Conv1dDecoder, Conv1dEncoder
from src.networks.wavenet import WaveNet

CLASSES = torch.eye(3)


def wavenet(num_stacks: int = 2, num_layers: int = 3, condition_dim: int = 3) -> WaveNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WaveNet(16, 40, 8, 12, num_layers, num_stacks, condition_dim)


def tokens(n: int = 3, length: int = 40) -> torch.Tensor:
    return (SampleNoise(0).uniform((n, length), torch.zeros(())) * 16).long()


def test_logits_depend_on_the_receptive_field_and_on_nothing_else():
    network = wavenet()
    assert network.receptive_field == 1 + 2 * (1 + 2 + 4)
    x, changed = tokens(), tokens()
    changed[:, 10] = (changed[:, 10] + 1) % 16
    moved = (network(x, CLASSES) - network(changed, CLASSES)).abs().amax((0, 2))
    is_seen = torch.zeros(40, dtype=torch.bool)
    is_seen[10 : 10 + network.receptive_field] = True
    assert (moved[~is_seen] == 0).all()
    assert (moved[is_seen] > 0).all()


@pytest.mark.parametrize("condition_dim", [0, 3])
def test_reading_token_by_token_gives_the_same_logits(condition_dim):
    network, x = wavenet(condition_dim=condition_dim), tokens()
    condition = CLASSES if condition_dim else None
    at_once, state = network(x, condition), network.begin(len(x))
    for t in range(x.shape[1]):
        logits, state = network.step(x[:, t], state, condition)
        torch.testing.assert_close(logits, at_once[:, t], rtol=0, atol=1e-5)


def test_the_class_matters_and_must_be_given():
    network, x = wavenet(), tokens()
    assert (network(x, CLASSES) - network(x, CLASSES.flip(0))).abs().max() > 1e-3
    with pytest.raises(AssertionError, match="needs class labels"):
        network(x)


def test_every_weight_of_a_wavenet_is_trained():
    network = wavenet()
    network(tokens(), CLASSES).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in network.parameters())


def model_of_sound() -> Autoregressive:
    sound = Sound(4000, 64, MU_LAW, 16, 8, 4, -16.0, 2.0)
    spec = DataSpec("tones", "tokens", (64,), Values(DISCRETE, 0.0, 255.0, 256), ("a", "b", "c"), sound=sound)

    def network(**sizes) -> WaveNet:
        return WaveNet(width=8, skip_width=8, num_layers=3, num_stacks=1, **sizes)

    return Autoregressive(spec, network, TokenChoice(), conditional=True).eval()


def test_a_wavenet_draws_levels_of_mu_law_and_its_likelihood_sums_its_steps():
    model = model_of_sound()
    labels = torch.arange(4) % 3
    x = model.sample(4, labels, generator=SampleNoise(0))
    assert x.shape == (4, 64)
    assert x.dtype == torch.int64
    assert 0 <= x.min() <= x.max() < 256
    by_hand = model.network(x[:, :-1], torch.eye(3)[labels]).log_softmax(2).gather(2, x[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(model.log_prob(x, labels), by_hand + model.first[labels, x[:, 0]])


@pytest.mark.parametrize("length", [4, 17, 64, 100, 1024])
@pytest.mark.parametrize("condition_dim", [0, 2])
def test_networks_of_waveforms_fit_any_length(length, condition_dim):
    condition = torch.ones(3, condition_dim) if condition_dim else None
    encoder = Conv1dEncoder((1, length), (2, 5), 4, 8, batch_norm=True, condition_dim=condition_dim)
    decoder = Conv1dDecoder((5,), (2, length), 4, 8, batch_norm=True, condition_dim=condition_dim)
    code = encoder(torch.ones(3, 1, length), condition)
    assert code.shape == (3, 2, 5)
    assert decoder(code[:, 0], condition).shape == (3, 2, length)


@pytest.mark.parametrize(
    ("shape", "settings", "said"),
    [
        ((1, 8, 8), {}, r"take waveforms of at least 4 samples; the data set gives 1x8x8 \(choose data=fsdd"),
        ((5,), {}, "gives 5 "),
        ((1, 64), {"kernel_size": 5}, "kernel_size=5, which must be even and at least 4"),
        ((1, 64), {"width": 0}, "width=0, which must be a whole number of at least 1"),
    ],
)
def test_networks_of_waveforms_refuse_what_is_none(shape, settings, said):
    with pytest.raises(UserError, match=said):
        Conv1dEncoder(shape, (2,), **({"width": 4, "kernel_size": 8, "batch_norm": False} | settings))
