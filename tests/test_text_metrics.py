"""Likelihoods of a held-out text, their yardsticks, and what samples of text repeat, by closed forms and definitions."""

import json
import math
import os
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.core.errors import NotApplicable, UserError
from src.core.rng import SampleNoise
from src.core.spec import DISCRETE, DataSpec, Values
from src.core.tokens import TokenChoice
from src.data.loading import ArrayData
from src.data.text import text_file
from src.data.tokenizers import Bytes, ByteTokenizer, Characters, CharacterTokenizer, TokenizerMaker
from src.evaluation.comparison import RunResults, compare
from src.evaluation.comparison_formats import to_markdown
from src.evaluation.curves import curve_picture, curve_pictures
from src.evaluation.protocol import evaluate
from src.evaluation.results import to_json, yardsticks
from src.metrics.features import ImageSet
from src.metrics.metric import HELD_OUT, NOISE, Inputs, Measurement
from src.metrics.ngram import COMPRESSORS, WittenBell, compressed_bits, distinct_symbols
from src.metrics.overlap import code_points, longest_matches
from src.metrics.store import Store
from src.metrics.text import Text
from src.metrics.text_likelihood import token_nats, windows
from src.metrics.text_samples import distinct_share
from src.models.autoregressive import Autoregressive
from src.networks.lstm import LSTM
from tests.measuring import make_inputs, make_metric

V = 4
SHAKESPEARE = Path(os.environ.get("DATA_ROOT", "data")) / "tinyshakespeare" / "input.txt"
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=f"there is no {SHAKESPEARE} (set DATA_ROOT)")


def random_tokens(count: int, seed: int = 0, size: int = V) -> Tensor:
    return (size * SampleNoise(seed).uniform((count,), torch.zeros((), dtype=torch.float64))).long()


def text_of(train: str, test: str, context: int = 8) -> Text:
    """A text of characters."""
    tokenizer = CharacterTokenizer("".join(sorted(set(train + test))))
    tokens = (tokenizer.encode(some).numpy().astype(np.uint16) for some in (train, test))
    return Text(*tokens, tokenizer, context, {"train": train, "test": test})


def letters(tokens: Tensor) -> str:
    return "".join("abcdefgh"[token] for token in tokens)


class Markov(nn.Module):
    """Says p(next | last) by a table of random probabilities, whatever came before."""

    max_context = None

    def __init__(self, size: int) -> None:
        super().__init__()
        z = SampleNoise(5).normal((size, size), torch.zeros((), dtype=torch.float64))
        self.register_buffer("table", z.log_softmax(1))

    def log_probs(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.table[tokens[:, :-1], tokens[:, 1:]]


class Counting(nn.Module):
    """Gives every token e^-k after k others in its sequence."""

    max_context = None

    def log_probs(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        return -torch.arange(1.0, tokens.shape[1]).expand(len(tokens), -1)


def inputs_of(text: Text | None, model: nn.Module | None = None, store: Store | None = None, seed: int = 0) -> Inputs:
    size = V if text is None else text.tokenizer.num_tokens
    spec = DataSpec("made_up", "tokens", (9,), Values(DISCRETE, low=0, high=size - 1, levels=size))
    return replace(make_inputs(model, store=store, seed=seed), spec=spec, text=text)


def measured(metric: str, text: Text, model: nn.Module, store: Store | None = None, **keys: object) -> Measurement:
    return make_metric(metric, **keys).measure(inputs_of(text, model, store))


TEXT = text_of(letters(random_tokens(500)), letters(random_tokens(101, seed=1)))


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "context", "stride"), [(2, 1, 1), (3, 8, 8), (9, 8, 8), (10, 8, 8), (100, 8, 8), (100, 8, 3), (41, 5, 1)]
)
def test_every_token_but_the_first_is_predicted_exactly_once(num_tokens, context, stride):
    found = list(windows(num_tokens, context, stride))
    predicted = [place for window in found for place in range(window.first, window.end)]
    assert predicted == list(range(1, num_tokens))
    assert all(window.start < window.first < window.end <= window.start + context + 1 for window in found)
    assert all(window.first - window.start > context - stride for window in found[1:])


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (7, 1), (200, 200)])
def test_nats_are_those_of_the_windows_one_by_one(context, stride):
    stream = random_tokens(101)

    def next_nats(tokens: Tensor) -> Tensor:  # depends on where the window begins
        return (tokens[:, :-1] + 1.0).cumsum(1) * (1 + tokens[:, 1:])

    nats, given = token_nats(next_nats, stream, context, stride, torch.device("cpu"))
    for window in windows(101, context, stride):
        for place in range(window.first, window.end):
            before = stream[window.start : place]
            assert given[place - 1] == len(before)
            assert nats[place - 1] == float((before + 1).sum() * (1 + stream[place]))


# --- likelihoods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [None, 3])
def test_nats_per_token_are_the_mean_over_the_whole_stream(stride):
    model, stream = Markov(V), TEXT.tokens("test")
    expected = -float(model.table[stream[:-1], stream[1:]].mean())
    found = measured("nats_per_token", TEXT, model, stride=stride)
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.card["num_tokens"] == 100
    assert (found.card["context"], found.card["stride"]) == (8, stride or "the context")
    assert found.interval[0] < found.value < found.interval[1]
    assert measured("perplexity", TEXT, model, stride=stride).value == pytest.approx(math.exp(expected), rel=1e-12)
    assert measured("bits_per_char", TEXT, model, stride=stride).value == pytest.approx(expected / math.log(2), rel=1e-12)


def test_sliding_windows_give_more_context():
    nats = [measured("nats_per_token", TEXT, Counting(), stride=stride).value for stride in (8, 4, 1)]
    assert nats[0] < nats[1] < nats[2]  # this model finds tokens the less likely, the more it is given
    assert nats[0] == pytest.approx((12 * 36 + 10) / 100)  # twelve windows of 1 .. 8, and one of 1 .. 4


def test_bits_are_of_symbols_whatever_the_tokens_are():
    train, test = "äb€c" * 50, "xä€b" * 10
    model = Markov(256)
    stream = ByteTokenizer().encode(test)
    text = Text(ByteTokenizer().encode(train).numpy(), stream.numpy(), ByteTokenizer(), 8, "bytes")
    nats = -float(model.table[stream[:-1], stream[1:]].sum())
    per_byte, per_char = (measured(name, text, model) for name in ("bits_per_byte", "bits_per_char"))
    assert per_byte.value == pytest.approx(nats / math.log(2) / 69, rel=1e-12)  # 70 bytes but the x
    assert per_char.value == pytest.approx(nats / math.log(2) / 39, rel=1e-12)
    of_characters = measured("bits_per_char", text_of(train, test), Markov(5))
    assert of_characters.card["data"] == per_char.card["data"]
    assert {name: row.value for name, row in of_characters.anchors.items()} == pytest.approx(
        {name: row.value for name, row in per_char.anchors.items()}
    )
    assert of_characters.anchors["uniform"].value == pytest.approx(math.log2(5))


def test_curve_by_position_is_in_octaves_of_what_was_given():
    found = measured("nats_by_position", replace(TEXT, test=TEXT.test[:97]), Counting())
    assert found.parts == {"after_1": 1, "after_2": 2, "after_3_4": 3.5, "after_5_8": 6.5}
    assert found.value == 6.5
    assert found.card["of"] == "tokens after 5 to 8 others"


def test_estimate_is_of_random_windows_and_says_so():
    exact = measured("nats_per_token", TEXT, Markov(V)).value
    metric = make_metric("estimated_nats", num_batches=100, batch_size=20)
    first, again, other = (metric.measure(inputs_of(TEXT, Markov(V), seed=seed)) for seed in (0, 0, 1))
    assert first.value == again.value != other.value
    assert first.value == pytest.approx(exact, abs=0.1)
    assert first.card["estimate"] == "100 batches of 20 random windows"
    assert make_metric("estimated_nats").measure(inputs_of(TEXT, Counting())).value == 4.5


def test_likelihood_of_text_is_refused_where_there_is_none():
    with pytest.raises(NotApplicable, match="it is of text; data=made_up gives tokens that are no text"):
        make_metric("nats_per_token").measure(inputs_of(None, Markov(V)))
    with pytest.raises(NotApplicable, match="it is of text; data=made_up gives image"):
        make_metric("nats_per_token").measure(make_inputs())
    with pytest.raises(NotApplicable, match="fake has no PredictsTokens"):
        make_metric("nats_per_token").measure(inputs_of(TEXT, nn.Identity()))
    with pytest.raises(NotApplicable, match="a stride of 9 is more than the context of 8 tokens"):
        make_metric("nats_per_token", stride=9).measure(inputs_of(TEXT, Markov(V)))
    for stride in (0, 2.5):
        with pytest.raises(UserError, match=f"stride={stride} must be a whole number of at least 1"):
            make_metric("nats_per_token", stride=stride)


class Hopeless(nn.Module):
    max_context = None

    def log_probs(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        return torch.full((len(tokens), tokens.shape[1] - 1), -math.inf)


def test_infinite_likelihood_is_no_value():
    with pytest.raises(NotApplicable, match="100 of 100 tokens have no finite likelihood"):
        make_metric("nats_per_token").measure(inputs_of(TEXT, Hopeless()))


# --- yardsticks -------------------------------------------------------------------------------------------------------


def slow_witten_bell(train: str, past: str, token: str, order: int, size: int) -> float:
    """The definition, read aloud."""
    if order == 0:
        return 1 / size
    lower = slow_witten_bell(train, past[1:] if len(past) == order - 1 else past, token, order - 1, size)
    if len(past) < order - 1:
        return lower
    following = Counter(train[i + len(past)] for i in range(len(train) - len(past)) if train[i : i + len(past)] == past)
    if not following:
        return lower
    return (following[token] + len(following) * lower) / (following.total() + len(following))


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_witten_bell_is_its_definition(order):
    train, test = letters(random_tokens(60)), letters(random_tokens(25, seed=2))
    model = WittenBell(random_tokens(60), order, V)
    found = model.log_prob(random_tokens(25, seed=2)).exp()
    for i, token in enumerate(test):
        past = test[max(0, i - order + 1) : i]
        assert float(found[i]) == pytest.approx(slow_witten_bell(train, past, token, order, V), rel=1e-12)
        everywhere = model.next_probs(random_tokens(25, seed=2)[:i])
        assert float(everywhere.sum()) == pytest.approx(1, abs=1e-12)
        assert float(everywhere["abcdefgh".index(token)]) == pytest.approx(float(found[i]), rel=1e-12)


def test_witten_bell_gives_unseen_symbols_a_share_and_empty_text_the_uniform_one():
    model = WittenBell(torch.tensor([0, 1, 0, 1, 0]), 3, V)
    assert (model.next_probs(torch.tensor([0, 1])) > 0).all()
    assert float(model.next_probs(torch.tensor([3, 3])).sum()) == pytest.approx(1)
    assert torch.equal(
        WittenBell(torch.zeros(0), 3, V).log_prob(torch.tensor([1, 2])).exp(), torch.full((2,), 0.25).double()
    )


@needs_shakespeare
@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "nats"), [(0, 4.174), (1, 3.347), (2, 2.486), (3, 2.049), (4, 1.774), (5, 1.669), (6, 1.698)]
)
def test_ladder_of_tiny_shakespeare(order, nats):
    symbols = code_points(SHAKESPEARE.read_text())
    cut = int(0.9 * len(symbols))
    train, test, size = distinct_symbols(symbols[:cut], symbols[cut:])
    assert -float(WittenBell(train, order, size).log_prob(test).mean()) == pytest.approx(nats, abs=1e-3)


@needs_shakespeare
@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), [("bz2", 2.398), ("xz", 2.518)])
def test_compressors_of_tiny_shakespeare(name, bits):
    text = SHAKESPEARE.read_bytes()
    cut = int(0.9 * len(text))
    assert compressed_bits(text[:cut], text[cut:], COMPRESSORS[name]) / len(text[cut:]) == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize("name", list(COMPRESSORS))
def test_compressor_that_has_the_text_needs_little_for_it(name):
    noise, other = (bytes((SampleNoise(i).uniform((3000,), torch.zeros(())) * 256).byte().tolist()) for i in (0, 1))
    known, unknown = (compressed_bits(noise, some, COMPRESSORS[name]) for some in (noise[:1000], other[:1000]))
    assert unknown > 7.9 * 1000
    assert known < (unknown if name == "bz2" else 0.1 * unknown)


def test_yardsticks_stand_beside_every_likelihood_and_are_computed_once(tmp_path):
    per_token = measured("nats_per_token", TEXT, Markov(V), Store(tmp_path)).anchors
    assert list(per_token) == ["uniform", "unigram", "5-gram", "bz2", "xz"]
    assert per_token["uniform"].value == pytest.approx(math.log(V))
    counts = F.one_hot(TEXT.tokens("train"), V).sum(0).double()
    unigram = (counts + V / V) / (500 + V)  # each of the four occurs
    assert per_token["unigram"].value == pytest.approx(-float(unigram[TEXT.tokens("test")[1:]].log().mean()))
    train, test = TEXT.train_text.encode(), TEXT.test_text.encode()
    for name, compress in COMPRESSORS.items():  # a token is a byte here
        bits = compressed_bits(train, test, compress)
        assert per_token[name].value == pytest.approx(bits * math.log(2) / 100)
        assert measured("perplexity", TEXT, Markov(V)).anchors[name].value == pytest.approx(2 ** (bits / 100))
    store = Store(tmp_path)
    measured("nats_per_token", TEXT, Markov(V), store)
    assert store.num_computed == 0
    per_char = measured("bits_per_char", TEXT, Markov(V), store).anchors
    assert list(per_char) == ["uniform", "unigram", "5-gram", "bz2", "xz"]
    assert store.num_computed == 1
    for name in per_token:
        assert per_char[name].value * math.log(2) == pytest.approx(per_token[name].value, rel=1e-6)
    plain = to_json({"nats_per_token": measured("nats_per_token", TEXT, Markov(V), store)})
    beside = ", ".join(f"{name} {reading.value:.4g}" for name, reading in per_token.items())
    assert beside.startswith("uniform 1.386, unigram 1.393, 5-gram ")
    assert [line.partition(" ")[2].partition(" ")[2] for line in yardsticks(plain)] == [f"nats/token, beside {beside}"]


def ngram_nats(order: int) -> Tensor:
    """Of every token of the held-out text."""
    return -WittenBell(TEXT.tokens("train"), order, V).log_prob(TEXT.tokens("test"))


def test_yardsticks_of_the_curve_are_of_the_same_tokens():
    found = measured("nats_by_position", TEXT, Counting())
    # of 100 predicted tokens twelve windows of eight have four each after 5 to 8 others, and none of the last four
    places = [1 + 8 * window + others for window in range(12) for others in (4, 5, 6, 7)]
    assert list(found.anchors) == ["uniform", "unigram", "5-gram", "bz2", "xz"]
    for name, order in (("unigram", 1), ("5-gram", 5)):
        assert found.anchors[name].value == pytest.approx(float(ngram_nats(order)[places].mean()))
        assert (found.anchors[name].count, found.anchors["bz2"].count) == (48, 100)
        assert found.curve.rows[name][-1] == found.anchors[name].value
    assert found.curve.places == ("1", "2", "3 to 4", "5 to 8")
    assert found.curve.rows[""] == tuple(found.parts.values())


def test_curve_is_drawn_for_what_has_one():
    both = {name: measured(name, TEXT, Markov(V)) for name in ("nats_by_position", "nats_per_token")}
    plain = json.loads(json.dumps(to_json(both)))
    pictures = curve_pictures(plain)
    assert list(pictures) == ["nats_by_position"]
    picture = pictures["nats_by_position"]
    assert (picture.shape, picture.dtype) == ((3, 400, 640), torch.uint8)
    rising = {"of": "x", "places": ["1", "2"], "rows": {"": [0.0, 1.0]}}
    is_red = (curve_picture("made_up", "1", rising)[1] < 30) & (curve_picture("made_up", "1", rising)[0] > 150)
    left, right = (is_red[40:, half].nonzero()[:, 0].double().mean() for half in (slice(0, 320), slice(320, 640)))
    assert left > right + 50  # further up on the right
    flat = {"of": "x", "places": ["1"], "rows": {"": [2.0]}}
    assert curve_picture("made_up", "1", flat).shape == (3, 400, 640)


def test_yardsticks_of_the_estimate_are_of_the_same_windows():
    found = measured("estimated_nats", TEXT, Counting(), num_batches=200, batch_size=20)
    assert list(found.anchors) == ["uniform", "unigram", "5-gram", "bz2", "xz"]
    assert found.anchors["uniform"].value == pytest.approx(math.log(V))
    assert found.anchors["5-gram"].count == 200 * 20 * 8
    # each of the 93 windows is as likely; the tokens at both ends are in fewer of them
    expected = torch.stack([ngram_nats(5)[start + 1 : start + 9].mean() for start in range(93)]).mean()
    assert found.anchors["5-gram"].value == pytest.approx(float(expected), abs=0.01)


def test_yardsticks_of_a_text_that_is_too_long_are_absent_with_the_reason(monkeypatch):
    monkeypatch.setattr("src.metrics.text_likelihood._MOST_COUNTED", 499)
    found = measured("bits_per_char", TEXT, Markov(V))
    assert found.value > 0
    assert str(found.anchors["5-gram"]) == "the training text has 500 tokens, yardsticks are of at most 499"


# --- completions ------------------------------------------------------------------------------------------------------


class Knowing(nn.Module):
    """Goes on as a text does that it knows, where a prompt stands there; else with its first token for ever."""

    is_conditional = False
    sampling = TokenChoice()

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self._known = known

    def continue_(self, prompt: Tensor, num_tokens: int, condition: Tensor | None = None, **_: object) -> list[Tensor]:
        return [self._after(row, num_tokens) for row in prompt]

    def _after(self, prompt: Tensor, num_tokens: int) -> Tensor:
        found = (self._known.unfold(0, len(prompt), 1) == prompt).all(1).nonzero()
        start = int(found[0]) + len(prompt) if len(found) else None
        return self._known[:1].expand(num_tokens) if start is None else self._known[start : start + num_tokens]


def rhyme(seed: int) -> str:
    return " ".join(["ab", "ba", "cab", "bad", "dab", "abba"][token] for token in random_tokens(2000, seed, size=6))


@pytest.mark.parametrize("metric", ["bleu", "chrf", "rouge_l"])
def test_completions_are_compared_with_what_really_comes(metric):
    text = text_of(rhyme(0), rhyme(1), context=64)
    spec = DataSpec("made_up", "tokens", (65,), Values(DISCRETE, low=0, high=4, levels=5))
    perfect, lost = (
        make_metric(metric, num_examples=20).measure(replace(inputs_of(text, Knowing(text.tokens(split))), spec=spec))
        for split in ("test", "train")
    )
    assert perfect.value == pytest.approx(1)
    assert lost.value <= perfect.anchors["text from elsewhere"].value < 0.9
    assert perfect.card["num_examples"] == 20
    assert (perfect.card["prompt_tokens"], perfect.card["completed_tokens"]) == (32, 33)


def test_completions_need_a_model_that_goes_on():
    with pytest.raises(NotApplicable, match="fake has no CanContinue"):
        make_metric("bleu").measure(inputs_of(TEXT, Markov(V)))


# --- what samples repeat ----------------------------------------------------------------------------------------------


def slow_matches(known: str, text: str) -> list[int]:
    return [max(k for k in range(len(text) - i + 1) if text[i : i + k] in known) for i in range(len(text))]


def test_longest_matches_are_those_of_a_search():
    for seed in range(20):
        known = letters(random_tokens(5 + 3 * seed, seed, size=3))
        texts = [letters(random_tokens(count, 100 + seed, size=4)) for count in (0, 1, 7, 30)] + [known[2:9], known]
        found = longest_matches(code_points(known), [code_points(text) for text in texts])
        assert [list(some) for some in found] == [slow_matches(known, text) for text in texts]


def test_longest_matches_of_nothing():
    assert [list(some) for some in longest_matches(code_points(""), [code_points("ab")])] == [[0, 0]]
    assert longest_matches(code_points("ab"), []) == []


def test_code_points_are_of_whole_characters():
    assert code_points("a€😀").tolist() == [ord("a"), ord("€"), ord("😀")]


def test_distinct_ngrams_are_counted_within_texts():
    assert distinct_share([["a", "b", "a"], ["a", "b"]], 1) == (2 / 5, 5)
    assert distinct_share([["a", "b", "a"], ["a", "b"]], 2) == (2 / 3, 3)
    with pytest.raises(NotApplicable, match="no 4 words in a row"):
        distinct_share([["a", "b", "a"]], 4)


def text_set(text: Text, *samples: str) -> ImageSet:
    tokens = torch.stack([text.tokenizer.encode(sample) for sample in samples])
    return ImageSet(lambda: [(tokens, None)], len(samples))


def sampled(metric: str, text: Text, samples: list[str], held_out: list[str], **keys: object) -> Measurement:
    sets = {HELD_OUT: text_set(text, *held_out), NOISE: text_set(text, *held_out)}
    inputs = replace(inputs_of(text), generated=text_set(text, *samples), anchors=sets)
    return make_metric(metric, **keys).measure(inputs)


TALE = text_of("once upon a time there was a king who had a daughter", "she was a beauty. the king had a son upon a time ")


def test_samples_that_copy_are_found_and_named():
    samples, held_out = [" upon a time there", "daughter and a pen"], ["she was a beauty. ", "the king had a son"]
    rate = sampled("ngram_copy_rate", TALE, samples, held_out, n=9)
    # of 10 + 10 passages of 9 characters all of the first text and "daughter " not
    assert rate.value == pytest.approx(0.5)
    # of 4 characters of the second text five of "daughter", and "d a "
    assert rate.parts == pytest.approx({"of_4": (15 + 6) / 30, "of_18": 1 / 2})
    assert rate.anchors[HELD_OUT].value == 0
    assert rate.finding.alarm == "copying"
    longest = sampled("longest_common_substring", TALE, samples, held_out)
    assert (longest.value, longest.anchors[HELD_OUT].value) == (18, 8)
    assert longest.parts["mean_over_samples"] == 13
    assert longest.finding.words == "longest passage copied: 18 characters (held-out text 8)"
    assert longest.finding.alarm == "copying"


def test_samples_are_held_against_as_many_windows_of_held_out_text():
    copied, free = "daughter and a pen", "she was a beauty. "
    samples, held_out = [free, free, " upon a time there", copied], [free, "the king had a son"]
    longest = sampled("longest_common_substring", TALE, samples, held_out)
    assert (longest.value, longest.parts["first_2"], longest.anchors[HELD_OUT].value) == (18, 8, 8)
    assert longest.finding.alarm is None  # of the first two, though all four go further
    assert longest.finding.words == "longest passage copied: 8 characters (held-out text 8), of 2 each"
    words = sampled("distinct_1", TALE, samples, held_out)
    assert (words.value, words.parts["first_2"]) == (10 / 16, 4 / 8)
    assert "first_4" not in sampled("distinct_1", TALE, samples, [*held_out, *held_out]).parts
    rate = sampled("ngram_copy_rate", TALE, samples, held_out, n=5)
    assert rate.parts["first_2"] == pytest.approx(sampled("ngram_copy_rate", TALE, samples[:2], held_out, n=5).value)


def test_samples_like_held_out_text_raise_no_alarm():
    held_out = ["she was a beauty. ", "the king had a son"]
    for metric in ("ngram_copy_rate", "longest_common_substring"):
        found = sampled(metric, TALE, held_out, held_out, **({"n": 5} if metric == "ngram_copy_rate" else {}))
        assert found.value == found.anchors[HELD_OUT].value > 0
        assert found.finding.alarm is None


def test_passages_longer_than_the_samples_have_no_rate():
    with pytest.raises(NotApplicable, match="no text has 20 characters"):
        sampled("ngram_copy_rate", TALE, ["a king who"], ["a king who"])


def test_distinct_words_stand_beside_those_of_held_out_text():
    found = sampled("distinct_2", TALE, ["a king a king a ", "a king a king a "], ["a king who had a", "once upon a time"])
    assert found.value == 2 / 8
    assert found.anchors[HELD_OUT].value == 7 / 7
    assert found.card["of"] == "2 words"
    assert found.card["num_samples"] == 2


# --- whole evaluations ------------------------------------------------------------------------------------------------


OF_TEXT = (
    *("nats_per_token", "bits_per_char", "bits_per_byte", "perplexity", "nats_by_position", "estimated_nats"),
    *("distinct_1", "ngram_copy_rate", "longest_common_substring", "chrf"),
)


def results_of_text(folder: Path, tokenizer: TokenizerMaker, context: int, store: Store) -> dict[str, Any]:
    """The results of an untrained LSTM on a rhyme."""
    (folder / "rhyme.txt").write_text(rhyme(3))
    arrays = text_file(str(folder / "rhyme.txt"), str(folder / "cache"), tokenizer, context, val_share=0.1, test_share=0.2)
    data = ArrayData(arrays, batch_size=8, eval_batch_size=8, num_workers=0, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoregressive(
            data.spec, partial(LSTM, num_layers=1, width=4, dropout=0.0, tied=False), TokenChoice(), False
        )
    found = evaluate(
        model=model,
        untrained=None,
        model_name="lstm",
        data=data,
        metrics={name: make_metric(name) for name in OF_TEXT},
        classifier=lambda: pytest.fail("text has no classifier"),
        store=store,
        num_samples=20,
        batch_size=10,
        seed=0,
        about={"weights": "raw", "checkpoint": "best"},
    )
    return to_json(found)["metrics"]


def test_models_of_other_tokens_and_contexts_stand_in_one_column_beside_the_yardsticks(tmp_path):
    store = Store(None)
    kinds = {"characters": (Characters(), 32), "longer": (Characters(), 48), "bytes": (Bytes(), 32)}
    found = {name: results_of_text(tmp_path, *kind, store) for name, kind in kinds.items()}
    assert {metric: "value" in entry for metric, entry in found["characters"].items()} == dict.fromkeys(OF_TEXT, True)
    runs = [
        RunResults(name, "lstm", "text_file", 0, {"model": {"of": name}}, metrics, f"{i}")
        for i, (name, metrics) in enumerate(found.items())
    ]
    table = compare(runs, ["bits_per_char", "nats_per_token"])
    per_char, per_token = ([cell.mean for cell in column.cells] for column in table.columns)
    assert all(per_char)
    assert [value is None for value in per_token] == [False, False, True]  # nats for a byte are no nats for a character
    shown = to_markdown(table)
    for row in ("uniform", "unigram", "5-gram", "bz2", "xz"):
        assert f"| {row} |" in shown
    assert "its tokens is bytes, the column's is characters" in shown
