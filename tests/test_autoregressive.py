"""Autoregressive models: their probabilities, their networks with and without a cache, and how tokens are drawn."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import UserError
from src.core.protocols import CanContinue, CanScore, PredictsTokens, Trainable
from src.core.rng import SampleNoise, StreamNoise
from src.core.spec import DataSpec
from src.core.tokens import TokenChoice
from src.models.autoregressive import Autoregressive
from src.networks.lstm import LSTM
from src.networks.transformer import Transformer
from src.samplers.autoregressive import chosen_logits, continue_tokens, draw_tokens
from tests.benchmarks.decoding_cost import BOUND, decoding_ratio
from tests.examples import token_spec

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "transformer": functools.partial(Transformer, num_layers=2, num_heads=2, width=16, dropout=0.0, bias=True, tied=True),
    "transformer_plain": functools.partial(
        Transformer, num_layers=1, num_heads=1, width=8, dropout=0.0, bias=False, tied=False
    ),
    "lstm": functools.partial(LSTM, num_layers=2, width=12, dropout=0.0, tied=False),
    "lstm_tied": functools.partial(LSTM, num_layers=1, width=12, dropout=0.0, tied=True),
}
PLAIN = TokenChoice()

pytestmark = pytest.mark.usefixtures("same_weights")
every_network = pytest.mark.parametrize("network", NETWORKS)


def awake(network: nn.Module) -> nn.Module:
    """The network with weights large enough to make a difference."""
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.mul_(5)
    return network.eval()


def built(network: str, length: int = 12, num_tokens: int = 7, condition_dim: int = 0) -> Any:
    return awake(NETWORKS[network](num_tokens=num_tokens, length=length, condition_dim=condition_dim))


def model_of(
    network: str, length: int = 4, num_tokens: int = 3, num_classes: int = 0, sampling: TokenChoice = PLAIN
) -> Autoregressive:
    spec = token_spec(length, num_tokens, num_classes)
    model = Autoregressive(spec, NETWORKS[network], sampling, conditional=bool(num_classes))
    model.first.copy_(torch.randn(model.first.shape).log_softmax(1))
    awake(model.network)
    return model.eval()


def random_tokens(*shape: int, num_tokens: int = 7) -> Tensor:
    return torch.randint(num_tokens, shape, generator=torch.Generator().manual_seed(0))


def all_sequences(length: int, num_tokens: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(num_tokens), repeat=length)))


# --- probabilities ---------------------------------------------------------------------------------------------------


@every_network
def test_probabilities_of_all_sequences_add_up_to_one(network):
    model = model_of(network)
    assert isinstance(model, CanScore)
    total = model.log_prob(all_sequences(4, 3)).detach().double().exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-5)


def test_probabilities_given_each_class_add_up_to_one():
    model, x = model_of("transformer", num_classes=2), all_sequences(4, 3)
    by_class = [model.log_prob(x, torch.full((len(x),), k)).detach().double().exp() for k in range(2)]
    assert all(float(some.sum()) == pytest.approx(1, abs=1e-5) for some in by_class)
    assert (by_class[0] - by_class[1]).abs().max() > 1e-3


@every_network
def test_log_probability_is_the_sum_over_the_places(network):
    model, x = model_of(network, length=6, num_tokens=7), random_tokens(5, 6)
    assert isinstance(model, PredictsTokens)
    logits = model.network(x[:, :-1])
    expected = model.first[0, x[:, 0]] + sum(
        logits[:, t].log_softmax(1).gather(1, x[:, t + 1 : t + 2])[:, 0] for t in range(5)
    )
    torch.testing.assert_close(model.log_prob(x), expected)
    torch.testing.assert_close(model.log_probs(x).sum(1), expected - model.first[0, x[:, 0]])


def test_loss_is_nats_per_predicted_token_of_which_an_example_has_one_fewer_than_tokens():
    model, x = model_of("lstm", length=6, num_tokens=7), random_tokens(5, 6)
    assert isinstance(model, Trainable)
    losses = model.loss(Batch(x))["loss"]
    assert losses.shape == (5,)
    torch.testing.assert_close(losses, -model.log_probs(x).mean(1))


def test_untrained_network_predicts_all_tokens_alike():
    torch.manual_seed(0)
    model = Autoregressive(token_spec(16, 65), NETWORKS["transformer"], PLAIN, conditional=False)
    x = random_tokens(8, 16, num_tokens=65)
    assert float(model.loss(Batch(x))["loss"].detach().mean()) == pytest.approx(math.log(65), abs=0.1)


def test_first_token_has_its_frequency_with_one_added_to_each_count():
    spec = token_spec(3, 4)
    batches = [Batch(torch.tensor([[0, 1, 2], [0, 3, 1]])), Batch(torch.tensor([[2, 2, 2]]))]
    model = Autoregressive(spec, NETWORKS["lstm"], PLAIN, conditional=False)
    model.prepare(lambda: batches, generator=StreamNoise(0))
    torch.testing.assert_close(model.first.exp(), torch.tensor([[3, 1, 2, 1]]) / 7)


def test_window_of_a_text_may_begin_at_any_token():
    spec = DataSpec("made_up", "tokens", (3,), token_spec(3, 4).values, tokenizer="{}")
    model = Autoregressive(spec, NETWORKS["lstm"], PLAIN, conditional=False)
    windows = Batch(torch.tensor([[0, 1, 2], [2, 3, 1]]))  # of the stream 0 1 2 3 1; their last tokens begin the next ones
    model.prepare(lambda: [windows], generator=StreamNoise(0))
    torch.testing.assert_close(model.first.exp(), torch.tensor([[2, 2, 2, 2]]) / 8)


def test_first_token_has_its_frequency_in_each_class():
    batch = Batch(torch.tensor([[0, 1], [1, 1], [1, 0]]), torch.tensor([0, 1, 1]))
    model = Autoregressive(token_spec(2, 2, num_classes=2), NETWORKS["lstm"], PLAIN, conditional=True)
    model.prepare(lambda: [batch], generator=StreamNoise(0))
    torch.testing.assert_close(model.first.exp(), torch.tensor([[2 / 3, 1 / 3], [1 / 4, 3 / 4]]))


# --- networks --------------------------------------------------------------------------------------------------------


@every_network
def test_logits_depend_on_no_later_token(network):
    net, x = built(network), random_tokens(2, 12)
    before = net(x)
    for t in range(12):
        changed = x.clone()
        changed[:, t] = (x[:, t] + 1) % 7
        after = net(changed)
        assert torch.equal(after[:, :t], before[:, :t]) or torch.allclose(after[:, :t], before[:, :t], atol=1e-6)
        assert not torch.allclose(after[:, t], before[:, t], atol=1e-4)


@every_network
@pytest.mark.parametrize("num_classes", [0, 3])
def test_reading_token_by_token_gives_the_same_logits(network, num_classes):
    net, x = built(network, condition_dim=num_classes), random_tokens(3, 12)
    condition = torch.eye(3)[:, :num_classes] if num_classes else None
    expected, state = net(x, condition), net.begin(3)
    for t in range(12):
        logits, state = net.step(x[:, t], state, condition)
        torch.testing.assert_close(logits, expected[:, t], rtol=0, atol=1e-5)
    logits, state = net.read(x[:, :11], net.begin(3), condition)
    torch.testing.assert_close(logits, expected[:, 10], rtol=0, atol=1e-5)
    torch.testing.assert_close(net.step(x[:, 11], state, condition)[0], expected[:, 11], rtol=0, atol=1e-5)


@every_network
def test_condition_changes_the_logits(network):
    net, x = built(network, condition_dim=2), random_tokens(2, 5)
    first, second = (net(x, torch.eye(2)[[k, k]]) for k in range(2))
    assert ((first - second).abs().amax((1, 2)) > 1e-4).all()


def test_transformer_has_as_many_parameters_as_gpt_2_of_its_size():
    def count(bias: bool) -> int:
        net = Transformer(65, 64, num_layers=4, num_heads=4, width=128, dropout=0.0, bias=bias, tied=True)
        return sum(weight.numel() for weight in net.parameters())

    assert count(bias=True) == 809_856  # of Hugging Face's GPT2LMHeadModel
    assert count(bias=False) - 64 * 128 == 795_904  # nanoGPT's 0.80M, which leaves positions out


def test_transformer_begins_as_gpt_2():
    net = Transformer(500, 64, num_layers=8, num_heads=2, width=64, dropout=0.0, bias=True, tied=True)
    assert net.head.weight is net.tokens.weight
    assert float(net.tokens.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(net.blocks[0].up.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(net.blocks[3].down.weight.std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert float(net.blocks[3].out.weight.std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert not net.blocks[0].qkv.bias.any()


def test_forget_gates_begin_open():
    net = LSTM(5, 8, num_layers=2, width=4, dropout=0.0, tied=False)
    biases = net.lstm.bias_ih_l1 + net.lstm.bias_hh_l1
    assert biases.tolist() == [0] * 4 + [1] * 4 + [0] * 8


@pytest.mark.parametrize("network", ["transformer", "lstm"])
def test_dropout_is_of_training_alone(network):
    make = functools.partial(NETWORKS[network], dropout=0.5)
    net, x = make(num_tokens=7, length=12), random_tokens(2, 12)
    net.train()
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Transformer(5, 8, 1, 3, 16, 0.0, True, True), "width=16, which must be a multiple of num_heads=3"),
        (lambda: Transformer(5, 8, 1, 2, 16, 1.0, True, True), "dropout=1.0, which must be at least 0 and below 1"),
        (lambda: LSTM(5, 8, 0, 16, 0.0, False), "num_layers=0, which must be a whole number of at least 1"),
        (lambda: LSTM(5, 8, 1, 16, -0.1, False), "dropout=-0.1, which must be at least 0 and below 1"),
    ],
)
def test_size_that_no_network_can_have_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


# --- how a token is chosen -------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
NOTHING = torch.zeros(1, 0, dtype=torch.int64)


def chosen(before: Tensor = NOTHING, logits: Tensor = LOGITS, **settings: float | None) -> list[float]:
    """The probabilities that tokens are drawn with."""
    return chosen_logits(logits, TokenChoice(**settings), before).softmax(1)[0].tolist()


def test_without_settings_the_distribution_is_the_models_own():
    assert chosen() == pytest.approx([0.5, 0.25, 0.15, 0.1])


def test_temperature_raises_probabilities_to_a_power():
    powers = [p**2 for p in (0.5, 0.25, 0.15, 0.1)]
    assert chosen(temperature=0.5) == pytest.approx([p / sum(powers) for p in powers])
    assert chosen(temperature=0) == [1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-9, 1e-38, 1e-45, 5e-324])
def test_temperature_near_nothing_is_nearly_greedy(temperature):
    assert chosen(temperature=temperature) == [1, 0, 0, 0]
    assert chosen(logits=torch.tensor([[3e38, 3e38, -torch.inf, -3e38]]), temperature=temperature) == [0.5, 0.5, 0, 0]
    assert chosen(temperature=temperature, top_k=2, top_p=0.5, min_p=0.1) == [1, 0, 0, 0]


@pytest.mark.parametrize(("k", "kept"), [(1, 1), (2, 2), (4, 4), (100, 4)])
def test_top_k_keeps_the_k_most_probable(k, kept):
    probabilities = [0.5, 0.25, 0.15, 0.1][:kept]
    expected = [p / sum(probabilities) for p in probabilities] + [0.0] * (4 - kept)
    assert chosen(top_k=k) == pytest.approx(expected)


@pytest.mark.parametrize(("share", "kept"), [(0.01, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.95, 4), (1.0, 4)])
def test_top_p_keeps_the_fewest_with_that_probability(share, kept):
    probabilities = [0.5, 0.25, 0.15, 0.1][:kept]
    expected = [p / sum(probabilities) for p in probabilities] + [0.0] * (4 - kept)
    assert chosen(top_p=share) == pytest.approx(expected)


@pytest.mark.parametrize(("share", "kept"), [(0.19, 4), (0.25, 3), (0.4, 2), (0.6, 1), (1.0, 1)])
def test_min_p_keeps_those_with_that_share_of_the_greatest(share, kept):
    assert sum(p > 0 for p in chosen(min_p=share)) == kept


def test_repetition_penalty_is_of_tokens_that_came_before():
    logits = torch.tensor([[2.0, -1.0, 1.0]])
    expected = torch.tensor([1.0, -2.0, 1.0]).softmax(0).tolist()
    assert chosen(torch.tensor([[1, 0, 0]]), logits, repetition_penalty=2.0) == pytest.approx(expected)


def test_settings_act_one_after_the_other():
    # temperature first: 0.5^2, 0.25^2, ... over their sum 0.345 are 0.725, 0.181, 0.065, 0.029; then 0.725 + 0.181 >= 0.9
    assert chosen(temperature=0.5, top_p=0.9) == pytest.approx([0.8, 0.2, 0, 0])
    assert chosen(top_k=2, top_p=0.66) == pytest.approx([1, 0, 0, 0])  # 2/3 and 1/3 of the two that are left


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
        ({"temperature": None}, "temperature=null must be a number"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": 1.5}, "top_k=1.5 must be a whole number, or null"),
        ({"top_p": 0.0}, "top_p=0 must be above 0 and at most 1"),
        ({"top_p": "half"}, "top_p=half must be a number, or null"),
        ({"min_p": 1.1}, "min_p=1.1 must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0 must be above 0"),
    ],
)
def test_choice_that_is_none_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        TokenChoice(**settings)


def test_token_is_the_first_whose_cumulated_probability_reaches_the_number():
    u = torch.tensor([0.001, 0.499, 0.501, 0.749, 0.751, 0.899, 0.901, 0.999999])
    assert draw_tokens(LOGITS.expand(8, -1), u).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, -torch.inf]])
    assert draw_tokens(logits.expand(3, -1), torch.tensor([1e-12, 0.5, 1 - 1e-12])).tolist() == [1, 1, 1]


# --- drawing ---------------------------------------------------------------------------------------------------------


@every_network
@pytest.mark.parametrize("start", [1, 5, 12, 15])
def test_drawing_with_a_cache_is_drawing_without(network, start):
    net, prompt = built(network, length=12), random_tokens(3, start)
    drawn = [continue_tokens(net, prompt, 20, PLAIN, SampleNoise(0), cached=cached) for cached in (True, False)]
    for with_cache, without in zip(*drawn, strict=True):
        assert with_cache.shape == (20,)
        assert torch.equal(with_cache, without)


def test_transformer_sees_as_many_tokens_as_it_has_positions():
    net, prompt = built("transformer", length=4), random_tokens(1, 9)
    drawn = continue_tokens(net, prompt, 6, TokenChoice(temperature=0.0), SampleNoise(0))[0]
    tokens = prompt[0].tolist()
    for token in drawn.tolist():
        assert token == int(net(torch.tensor([tokens[-4:]]))[0, -1].argmax())
        tokens.append(token)


@pytest.mark.parametrize("network", ["transformer", "lstm"])
def test_samples_have_the_probabilities_of_the_model(network):
    model, count = model_of(network, length=3, num_tokens=3), 5_000
    with torch.no_grad():
        expected = model.log_prob(all_sequences(3, 3)).double().exp()
    x = model.sample(count, generator=SampleNoise(0))
    found = torch.bincount((x * torch.tensor([9, 3, 1])).sum(1), minlength=27) / count
    assert float(((found - expected) ** 2 * count / expected).sum()) < 60  # chi-squared of 26 degrees: 1 in 10,000


def test_continuation_has_the_probabilities_given_the_prompt():
    model, count = model_of("transformer", length=4, num_tokens=3), 5_000
    prompt = torch.tensor([[2, 0]])
    with torch.no_grad():
        expected = model.network(prompt)[0, -1].softmax(0)
    drawn = model.continue_(prompt.expand(count, -1), 1, generator=SampleNoise(0))
    found = torch.bincount(torch.cat(drawn), minlength=3) / count
    assert float((found - expected).abs().max()) < 0.03


def test_sample_is_the_same_in_any_batch_and_however_much_is_drawn_after_it():
    model = model_of("transformer", length=10, num_tokens=7)
    assert isinstance(model, CanContinue)
    together = model.sample(5, generator=SampleNoise(3))
    assert torch.equal(model.sample(2, generator=SampleNoise(3, start=3)), together[3:])
    longer = model.continue_(torch.zeros(5, 0, dtype=torch.int64), 15, generator=SampleNoise(3))
    assert torch.equal(torch.stack(longer)[:, :10], together)


def test_samples_are_drawn_as_the_model_is_configured():
    model = model_of("transformer", length=8, num_tokens=7, sampling=TokenChoice(temperature=0.0))
    x = model.sample(3, generator=SampleNoise(0))
    assert torch.equal(x[0], x[1])
    assert int(x[0, 0]) == int(model.first.argmax())
    assert model.settings()["sampling"]["temperature"] == 0
    free = model.continue_(x[:, :1], 7, choice=PLAIN, generator=SampleNoise(0))
    assert not torch.equal(free[0], free[1])


def test_drawing_ends_where_it_is_done_in_each_row():
    model = model_of("lstm", length=30, num_tokens=3)
    prompt = torch.zeros(6, 0, dtype=torch.int64)
    whole = model.continue_(prompt, 30, generator=SampleNoise(0))
    ended = model.continue_(prompt, 30, is_done=lambda new: new[:, -1] == 2, generator=SampleNoise(0))
    for row, full in zip(ended, whole, strict=True):
        places = (full == 2).nonzero()[:, 0].tolist()
        assert torch.equal(row, full[: places[0] + 1] if places else full)
    assert len({len(row) for row in ended}) > 1


@every_network
def test_samples_do_not_depend_on_how_many_are_drawn_at_a_time(network, monkeypatch):
    model = model_of(network, length=9, num_tokens=3, num_classes=2)
    condition = torch.tensor([0, 1, 1, 0, 1])

    def drawn() -> list[Tensor]:
        empty = torch.zeros(5, 0, dtype=torch.int64)
        end = {"is_done": lambda new: (new == 2).sum(1) >= 2}
        return model.continue_(empty, 9, condition, generator=SampleNoise(0), **end)

    together = drawn()
    monkeypatch.setattr("src.samplers.autoregressive._LOGITS_AT_A_TIME", 2 * 3)
    in_parts = drawn()
    assert len({len(row) for row in together}) > 1
    assert all(torch.equal(a, b) for a, b in zip(together, in_parts, strict=True))


def test_room_for_states_is_of_what_a_network_keeps(monkeypatch):
    small, large = (Transformer(7, 8, 2, 2, width, 0.0, True, True).eval() for width in (4, 8))
    assert (small.state_size(8), large.state_size(8)) == (2 * 2 * 4 * 8, 2 * 2 * 8 * 8)
    assert sum(some.numel() for some in large.read(random_tokens(1, 8), large.begin(1))[1].blocks) == large.state_size(8)
    seen: list[int] = []
    begin = small.begin
    monkeypatch.setattr(small, "begin", lambda size: (seen.append(size), begin(size))[1])
    monkeypatch.setattr("src.samplers.autoregressive._STATE_AT_A_TIME", 3 * small.state_size(8))
    continue_tokens(small, random_tokens(7, 2), 6, PLAIN, SampleNoise(0))
    assert seen == [3, 3, 1]


@pytest.mark.parametrize("num_classes", [0, 2])
def test_likelihood_does_not_depend_on_how_many_are_computed_at_a_time(num_classes, monkeypatch):
    model, x = model_of("transformer", length=6, num_tokens=7, num_classes=num_classes), random_tokens(5, 6)
    condition = torch.tensor([0, 1, 1, 0, 1]) if num_classes else None
    with torch.no_grad():
        whole = model.log_prob(x, condition)
        monkeypatch.setattr("src.models.autoregressive._LOGITS_AT_A_TIME", 2 * 5 * 7)
        sizes: list[int] = []
        model.network.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
        torch.testing.assert_close(model.log_prob(x, condition), whole, rtol=1e-6, atol=1e-6)
        assert sizes == [2, 2, 1]
        assert model.log_probs(x[:0], None if condition is None else condition[:0]).shape == (0, 5)
    model.log_prob(x, condition)
    assert sizes[-1] == 5  # with gradients all is kept in any case


@pytest.mark.slow
@pytest.mark.parametrize("network", ["transformer", "lstm", "gpt2"])
def test_cache_makes_256_tokens_at_least_three_times_as_fast(network):
    ratio, _ = decoding_ratio(network)
    assert ratio >= BOUND


def test_evaluations_are_counted():
    model = model_of("lstm", length=5)
    model.sample(3, generator=SampleNoise(0))
    assert model.num_evaluations == 3 * 4


# --- refusals --------------------------------------------------------------------------------------------------------


def test_data_of_a_single_token_is_refused():
    with pytest.raises(UserError, match="needs at least 2 tokens"):
        Autoregressive(token_spec(1, 4), NETWORKS["lstm"], PLAIN, conditional=False)


def test_classes_that_are_not_there_are_refused():
    with pytest.raises(UserError, match="needs labelled data"):
        Autoregressive(token_spec(4, 4), NETWORKS["lstm"], PLAIN, conditional=True)
