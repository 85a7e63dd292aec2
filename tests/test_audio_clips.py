"""Clips learned from stretches of them: where these lie, and that likelihood and samples are of one distribution."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import UserError
from src.core.rng import SampleNoise
from src.core.sound import MU_LAW, SILENCE, Sound
from src.core.spec import DISCRETE, DataSpec, Values
from src.core.tokens import TokenChoice
from src.models.autoregressive_clips import AutoregressiveClips
from src.networks.causal import CausalNetwork
from src.networks.transformer import Transformer
from src.networks.wavenet import WaveNet
from src.samplers.autoregressive import continue_tokens, draw_tokens


class Spy(CausalNetwork):
    """Remembers what it was given; every token is equally likely to it."""

    def __init__(self, num_tokens: int, length: int, condition_dim: int) -> None:
        super().__init__()
        self.num_tokens, self.length, self.seen = num_tokens, length, []
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        self.seen.append(tokens)
        return self.weight.expand(*tokens.shape, self.num_tokens)

    def begin(self, batch_size: int) -> None: ...

    def step(self, token: Tensor, state: None, condition: Tensor | None = None) -> tuple[Tensor, None]:
        return self.weight.expand(len(token), self.num_tokens), None


def transformer(**sizes: int) -> Transformer:
    return Transformer(num_layers=2, num_heads=2, width=8, dropout=0.0, bias=True, tied=False, **sizes)


def wavenet(**sizes: int) -> WaveNet:
    return WaveNet(width=8, skip_width=8, num_layers=2, num_stacks=1, **sizes)


def clips(network, length: int = 64, levels: int = 256, is_sound: bool = False, **settings) -> AutoregressiveClips:
    sound = Sound(4000, length, MU_LAW, 16, 8, 4, -16.0, 2.0) if is_sound else None
    spec = DataSpec("made_up", "tokens", (length,), Values(DISCRETE, 0.0, levels - 1.0, levels), ("a", "b"), sound=sound)
    plain = {"conditional": False, "window": 16, "context": 6, "num_windows": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoregressiveClips(spec, network, TokenChoice(), **(plain | settings))
        for weight in model.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.5)  # so that the context matters
    return model


def some_tokens(n: int, length: int, levels: int = 256) -> Tensor:
    return (SampleNoise(1).uniform((n, length), torch.zeros(())) * levels).long()


def stretches(model: AutoregressiveClips, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Where the windows of one training step on clips with so many recorded places begin, `(B * W,)`, and what each place
    of the clip counts for, `(B, 64)`, mean over the windows of a clip."""
    x = torch.arange(64).expand(len(lengths), -1).clone()  # a token tells its place
    x[torch.arange(64) >= lengths[:, None]] = SILENCE
    starts, weights = model._stretches(model._lengths(x), SampleNoise(0))
    model.train().loss(Batch(x), generator=SampleNoise(0))
    seen = model.network.seen[-1]
    place = starts.flatten()[:, None] + torch.arange(17)
    assert torch.equal(seen, x.repeat_interleave(starts.shape[1], 0).gather(1, place[:, :-1]))
    counted = torch.zeros(place.shape[0], 64).scatter(1, place[:, 1:], weights.flatten(0, 1))
    return starts.flatten(), counted.view(len(lengths), -1, 64).mean(1)


def test_windows_are_in_the_clip_and_every_place_counts_the_same():
    starts, counted = stretches(clips(Spy, num_windows=2), torch.full((20000,), 64))
    assert starts.min() == 0
    assert starts.max() == 63 - 16
    assert not counted[:, 0].any()
    torch.testing.assert_close(counted.mean(0)[1:], torch.full((63,), 1 / 63), rtol=0.1, atol=0)


def test_the_recording_counts_for_fifteen_sixteenths_and_the_silence_for_the_rest():
    _, counted = stretches(clips(Spy, is_sound=True, num_windows=4), torch.full((40000,), 20))
    mean, end = counted.mean(0), 20 + 10 // 8
    torch.testing.assert_close(mean[1:end], torch.full((end - 1,), 15 / 16 / (end - 1)), rtol=0.06, atol=0)
    assert float(mean[end:].sum()) == pytest.approx(1 / 16, rel=0.08)
    assert float(mean[end:].std()) < 0.3 * float(mean[end:].mean())


@pytest.mark.parametrize("length", [1, 2, 20, 60, 64])
def test_windows_of_clips_of_any_length_lie_inside(length):
    starts, counted = stretches(clips(Spy, is_sound=True), torch.full((500,), length))
    assert starts.min() >= 0
    assert starts.max() <= 63 - 16
    assert float(counted.mean(0).sum()) == pytest.approx(1, abs=0.2)


def test_only_the_beginning_of_a_clip_is_predicted_from_less_than_the_context():
    model, x = clips(transformer), some_tokens(200, 64)
    starts, weights = (found[:, 0] for found in model._stretches(model._lengths(x), SampleNoise(0)))
    found = model.train().loss(Batch(x), generator=SampleNoise(0))["loss"]
    for row, start in enumerate(starts.tolist()[:20]):
        nats = -model.log_probs(x[row : row + 1, start : start + 17])[0]
        torch.testing.assert_close(found[row], (nats * weights[row]).sum())
        assert start == 0 or not weights[row, :6].any()


def test_a_window_as_long_as_the_clip_is_the_whole_clip():
    x = some_tokens(3, 64)
    model = clips(transformer, window=100)
    training = model.train().loss(Batch(x), generator=SampleNoise(0))["loss"]
    torch.testing.assert_close(training, model.eval().loss(Batch(x))["loss"])
    torch.testing.assert_close(training, -model.log_probs(x).mean(1))


def test_the_held_out_loss_is_of_what_was_recorded():
    model, x = clips(wavenet, is_sound=True).eval(), some_tokens(3, 64)
    lengths = [5, 64, 30]
    for row, length in enumerate(lengths):
        x[row, length - 1], x[row, length:] = 7, SILENCE
    found = model.loss(Batch(x))["loss"]
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row], -model.token_log_probs(x[row : row + 1])[0, 1:length].mean())
    silent = torch.full((2, 64), SILENCE)
    assert model.loss(Batch(silent))["loss"].isfinite().all()
    assert model.train().loss(Batch(silent), generator=SampleNoise(0))["loss"].isfinite().all()


def first_seen(place: int, limit: int, stride: int) -> int:
    """Where what the token at a place is predicted from begins: at 0, or moved on by strides until it fits."""
    begin = 0
    while place - begin > limit:
        begin += stride
    return begin


@pytest.mark.parametrize("network", [transformer, wavenet])
@pytest.mark.parametrize("length", [16, 17, 18, 40, 64])
def test_the_likelihood_is_of_tokens_given_what_the_network_sees_before_them(network, length):
    model, x = clips(network, length).eval(), some_tokens(2, length)
    found = model.token_log_probs(x)
    assert found.shape == (2, length)
    torch.testing.assert_close(found[:, 0], model.first[0, x[:, 0]])
    for place in range(1, length):
        limit = model.network.max_length or length
        begin = first_seen(place, limit, model.stride)
        logits = model.network(x[:, begin:place])[:, -1]
        by_hand = logits.log_softmax(1).gather(1, x[:, place, None])[:, 0]
        torch.testing.assert_close(found[:, place], by_hand, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.log_prob(x), found.sum(1))


@pytest.mark.parametrize("network", [transformer, wavenet])
def test_samples_are_of_the_distribution_that_the_likelihood_is_of(network):
    model = clips(network, levels=8).eval()
    x = model.sample(3, generator=SampleNoise(0))
    noise = SampleNoise(0)
    u = torch.cat([noise.uniform((3, count), torch.zeros(())) for count in (1, 63)], 1)
    assert torch.equal(x[:, 0], draw_tokens(model.first.expand(3, -1), u[:, 0]))
    for place in range(1, 64):
        begin = first_seen(place, model.network.max_length or 64, model.stride)
        assert torch.equal(x[:, place], draw_tokens(model.network(x[:, begin:place])[:, -1], u[:, place]))


def test_the_probabilities_of_all_clips_sum_to_1():
    model = clips(transformer, length=6, levels=3, window=3, context=1).eval()
    every = torch.tensor(list(itertools.product(range(3), repeat=6)))
    assert model.log_prob(every).double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_what_a_transformer_keeps_has_room_for_all_tokens():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformer(num_tokens=8, length=200).eval()
    x = some_tokens(2, 200, levels=8)
    at_once, state = network(x), network.begin(2)
    for place in range(200):
        logits, state = network.step(x[:, place], state)
        torch.testing.assert_close(logits, at_once[:, place], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
def test_what_the_network_is_given_is_counted(cached):
    model = clips(transformer, levels=8).eval()
    given = []
    model.network.register_forward_hook(lambda module, inputs, output: given.append(inputs[0].numel()))
    if not cached:
        model.network.step = None
    prompt, total = some_tokens(3, 1, levels=8), []
    choice = {"stride": model.stride, "cached": cached, "told": total.append}
    continue_tokens(model.network, prompt, 63, TokenChoice(), SampleNoise(0), **choice)
    begins = [first_seen(place, 16, 10) for place in range(1, 64)]
    by_hand = sum(place - begin for place, begin in zip(range(1, 64), begins, strict=True))
    if cached:  # a state is read once, and goes on
        moved = [begins.index(begin) + 1 - begin for begin in sorted(set(begins))]
        by_hand = sum(moved) + 63 - len(moved)
    assert sum(total) == 3 * by_hand
    if not cached:
        assert sum(given) == sum(total)


def test_a_network_that_sees_more_than_it_learns_from_is_refused():
    def far(**sizes: int) -> WaveNet:
        return WaveNet(width=8, skip_width=8, num_layers=4, num_stacks=1, **sizes)

    with pytest.raises(UserError, match=r"model\.context=6 must be at least 15, .*network\.num_layers"):
        clips(far)
    with pytest.raises(UserError, match=r"model\.window=16 is not the 32 positions"):
        clips(lambda **sizes: transformer(**(sizes | {"length": 32})))


def test_texts_are_refused():
    spec = DataSpec("made_up", "tokens", (64,), Values(DISCRETE, 0.0, 255.0, 256), tokenizer="{}")
    with pytest.raises(UserError, match="is of clips; data=made_up gives windows of a text"):
        AutoregressiveClips(spec, transformer, TokenChoice(), False, 16, 6, 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"window": 1}, r"model\.window=1 must be .*at least 2"),
        ({"context": -1}, r"model\.context=-1 must be .*at least 0"),
        ({"context": 16}, r"model\.context=16 must be smaller than model\.window=16"),
        ({"num_windows": 0}, r"model\.num_windows=0 must be .*at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        clips(transformer, **settings)
