"""Exact likelihoods of a held-out text, beside yardsticks that need no training.

Every token but the first is predicted exactly once, from the tokens before it in its window:

    nats per token  L = - 1/(T - 1) sum_{t >= 1} ln p(x_t | x_{s(t)} ... x_{t-1}),   perplexity  exp(L)
    bits per character, per byte  the same sum / (ln 2) over the characters of the text, or the bytes of its UTF-8

Beside every value stand those of the uniform distribution, of n-gram models that were counted in the training text, and of
compressors that have seen it: what the held-out text adds to the compressed whole, over as many tokens, symbols or bytes.

Windows of C + 1 tokens begin at 0, S, 2S, ... for a context C and a stride S <= C. With S = C they are disjoint but for one
token; with a smaller S each window after the first predicts its last S tokens only, so that none of them has fewer than
C - S tokens before it: a better value for C/S times the work, and another protocol. Both stand on the card.

References:
    Hugging Face transformers, "Perplexity of fixed-length models": GPT-2 large has 19.44 on WikiText-2 with a stride of
        1,024 and 16.44 with one of 512.
    Karpathy 2022, nanoGPT, https://github.com/karpathy/nanoGPT: the estimate from random windows.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from src.core.errors import NotApplicable, UserError, require_at_least
from src.core.protocols import PredictsTokens
from src.core.rng import SampleNoise, derive_seed
from src.metrics.intervals import mean_interval
from src.metrics.metric import LOWER, Curve, Inputs, Measurement, Metric, Reading, require
from src.metrics.ngram import COMPRESSORS, WittenBell, compressed_bits, distinct_symbols
from src.metrics.overlap import code_points
from src.metrics.text import Text

__all__ = [
    "BitsPerByte",
    "BitsPerChar",
    "EstimatedNats",
    "NatsByPosition",
    "NatsPerToken",
    "Perplexity",
    "Window",
    "token_nats",
    "windows",
]

_ORDER = 5  # of the n-gram yardstick
_MOST_COUNTED = 30_000_000  # tokens of a training text; counting takes about 100 bytes for each
_LOGITS_AT_A_TIME = 2**24  # tokens times vocabulary
_MOST_TOKENS_AT_A_TIME = 16_384


@dataclass(frozen=True)
class Window:
    """Tokens start .. end of a stream; those from `first` on are predicted, each from all before it in the window."""

    start: int
    first: int
    end: int


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of at most context + 1 tokens in which every token of a stream but the first is predicted exactly once."""
    assert 1 <= stride <= context
    done = 1  # tokens before it are predicted, or are the first
    for start in range(0, num_tokens - 1, stride):
        end = min(start + context + 1, num_tokens)
        yield Window(start, done, end)
        done = end
        if end == num_tokens:
            return


@torch.no_grad()
def token_nats(
    next_nats: Callable[[Tensor], Tensor],
    stream: Tensor,
    context: int,
    stride: int,
    device: torch.device,
    tokens_at_a_time: int = _MOST_TOKENS_AT_A_TIME,
) -> tuple[Tensor, Tensor]:
    """-ln p of every token of a stream but the first, `(T - 1,)` float64 in nats, and how many tokens it was given.

    Args:
        next_nats: from tokens `(B, L)` to -ln p of each but the first given those before it, `(B, L - 1)`.
        stream: `(T,)` int64.
        context, stride: see `windows`.
        device: where `next_nats` takes tokens.
        tokens_at_a_time: given to it in one call, about.
    """
    nats = torch.empty(len(stream) - 1, dtype=torch.float64)
    given = torch.empty(len(stream) - 1, dtype=torch.int64)
    for some in _of_equal_length(windows(len(stream), context, stride), max(1, tokens_at_a_time // context)):
        batch = torch.stack([stream[window.start : window.end] for window in some])
        found = next_nats(batch.to(device)).cpu().double()
        for window, row in zip(some, found, strict=True):
            nats[window.first - 1 : window.end - 1] = row[window.first - window.start - 1 :]
            given[window.first - 1 : window.end - 1] = torch.arange(window.first, window.end) - window.start
    return nats, given


def _of_equal_length(found: Iterator[Window], most: int) -> Iterator[list[Window]]:
    some: list[Window] = []
    for window in found:
        if some and (len(some) == most or window.end - window.start != some[0].end - some[0].start):
            yield some
            some = []
        some.append(window)
    if some:
        yield some


class _OverHeldOutText(Metric):
    """A function of the nats of every token of the held-out text.

    Args:
        stride: from one window to the next, in tokens; None for the context, which makes windows disjoint.
    """

    unit = "nats/token"

    def __init__(self, stride: int | None = None) -> None:
        if stride is not None and (isinstance(stride, bool) or not isinstance(stride, int) or stride < 1):
            raise UserError(f"metric.*.stride={stride} must be a whole number of at least 1, or null for the context")
        self._stride = stride

    def measure(self, inputs: Inputs) -> Measurement:
        text = inputs.need_text()
        stride = text.context if self._stride is None else self._stride
        if stride > text.context:
            raise NotApplicable(
                f"a stride of {stride} is more than the context of {text.context} tokens, so that some would be left out"
            )
        key = f"token_nats {stride}"
        if key not in inputs.kept:
            inputs.kept[key] = self._nats(inputs, text, stride)
        nats, given = inputs.kept[key]
        if not nats.isfinite().all():
            raise NotApplicable(f"{int((~nats.isfinite()).sum())} of {len(nats)} tokens have no finite likelihood")
        ends = mean_interval(_means_of_blocks(nats, text.context))
        interval = None if ends is None else (self._in_unit(ends[0], text), self._in_unit(ends[1], text))
        card = _card(text) | {"stride": "the context" if stride == text.context else stride, "num_tokens": len(nats)}
        return Measurement(
            self._in_unit(float(nats.mean()), text),
            self.unit,
            self._about(card, inputs, text),
            LOWER,
            interval,
            self._parts(nats, given),
            self._anchors(inputs, text),
        )

    @staticmethod
    def _nats(inputs: Inputs, text: Text, stride: int) -> tuple[Tensor, Tensor]:
        how = (text.context, stride, inputs.device, _tokens_at_a_time(text))
        return token_nats(_next_nats(inputs), text.tokens("test"), *how)

    def _anchors(self, inputs: Inputs, text: Text) -> dict[str, Reading | NotApplicable]:
        if (reason := _why_none(text)) is not None:
            return {f"{_ORDER}-gram": reason}
        rows, count = self._rows(inputs, text), self._count(text)
        return {name: Reading(self._in_unit(row, text), count) for name, row in rows.items()}

    def _count(self, text: Text) -> int:
        """How many are predicted."""
        return len(text.test) - 1

    def _in_unit(self, nats_per_token: float, text: Text) -> float:
        return nats_per_token

    def _rows(self, inputs: Inputs, text: Text) -> dict[str, float]:
        """Mean nats per token of the yardsticks, by name."""
        return _rows_of_tokens(inputs, text)

    def _about(self, card: dict[str, Any], inputs: Inputs, text: Text) -> dict[str, Any]:
        return card

    def _parts(self, nats: Tensor, given: Tensor) -> dict[str, float]:
        return {}


class NatsPerToken(_OverHeldOutText):
    """Exact cross-entropy of the held-out text in nats per token; smaller is better.

    The n-grams beside it are of tokens: uniform, the frequencies of the training text, and a Witten-Bell 5-gram.
    """


class Perplexity(_OverHeldOutText):
    """exp(nats per token): as if each token were chosen among so many; it depends on what the tokens are."""

    unit = "1"

    def _in_unit(self, nats_per_token: float, text: Text) -> float:
        return math.exp(min(nats_per_token, 700.0))  # float64 ends there


class _PerSymbol(_OverHeldOutText):
    """In bits for each symbol of the text, whatever its tokens are; beside n-grams of the symbols, and compressors."""

    def _in_unit(self, nats_per_token: float, text: Text) -> float:
        return nats_per_token * (len(text.test) - 1) / (math.log(2) * self._count(text))

    def _about(self, card: dict[str, Any], inputs: Inputs, text: Text) -> dict[str, Any]:
        """The data are the text itself: models of different tokens may be compared."""
        of_text = {"data": f"{inputs.spec.name}-text-{text.sha256[:12]}", "data_values": "text"}
        about = {key: value for key, value in card.items() if key != "tokens"}
        return about | of_text | {"num_symbols": self._count(text)}

    def _rows(self, inputs: Inputs, text: Text) -> dict[str, float]:
        of_characters = _rows_of_characters(inputs, text).items()
        return {name: total / (len(text.test) - 1) for name, total in of_characters} | _rows_of_compressors(inputs, text)


class BitsPerChar(_PerSymbol):
    """Exact code length of the held-out text in bits for each of its characters (Unicode code points)."""

    unit = "bits/char"

    def _count(self, text: Text) -> int:
        return max(1, len(text.predicted_text))


class BitsPerByte(_PerSymbol):
    """Exact code length of the held-out text in bits for each byte of its UTF-8."""

    unit = "bits/byte"

    def _count(self, text: Text) -> int:
        return max(1, len(_as_bytes(text.predicted_text)))


class NatsByPosition(_OverHeldOutText):
    """Cross-entropy where more than half of the context is given; its parts are the whole curve in octaves of the position.

    The part "after_5_8" is of tokens that were predicted from 5 to 8 others. Windows are disjoint, so that every position
    is equally often. How fast the curve falls, and whether it still does at its end, says what the context is worth. The
    n-grams beside it are of the same tokens; compressors know no positions and stand there with the whole held-out text.
    """

    def __init__(self) -> None:
        super().__init__(None)

    def measure(self, inputs: Inputs) -> Measurement:
        text, found = inputs.need_text(), super().measure(inputs)
        last = list(found.parts)[-1]
        value = found.parts[last]
        card = found.card | {"of": f"tokens after {_places(last)} others"}
        of_rows = {"": found.parts}
        if _why_none(text) is None:
            _, given = self._kept(inputs, text)
            of_rows |= {name: self._parts(nats[1:], given) for name, nats in _ngrams_of_tokens(inputs, text).items()}
        curve = Curve(
            tuple(map(_places, found.parts)),
            "tokens before it",
            {name: tuple(parts.values()) for name, parts in of_rows.items()},
        )
        return replace(found, value=value, card=card, interval=None, curve=curve)

    def _kept(self, inputs: Inputs, text: Text) -> tuple[Tensor, Tensor]:
        """What `measure` has computed: nats of all tokens but the first, and how many each was given."""
        return inputs.kept[f"token_nats {text.context}"]

    def _anchors(self, inputs: Inputs, text: Text) -> dict[str, Reading | NotApplicable]:
        if (reason := _why_none(text)) is not None:
            return {f"{_ORDER}-gram": reason}
        _, given = self._kept(inputs, text)
        inside = given > given.max() // 2
        of_ngrams: dict[str, Reading | NotApplicable] = {
            name: Reading(float(nats[1:][inside].mean()), int(inside.sum()))
            for name, nats in _ngrams_of_tokens(inputs, text).items()
        }
        return of_ngrams | {name: Reading(row, len(given)) for name, row in _rows_of_compressors(inputs, text).items()}

    def _parts(self, nats: Tensor, given: Tensor) -> dict[str, float]:
        ends = [int(given.max())]
        while ends[-1] > 1:
            ends.append(ends[-1] // 2)
        parts = {}
        for low, high in itertools.pairwise([0, *reversed(ends)]):
            inside = (given > low) & (given <= high)
            parts[f"after_{high}" if high == low + 1 else f"after_{low + 1}_{high}"] = float(nats[inside].mean())
        return parts


class EstimatedNats(Metric):
    """An estimate of nats per token from random windows, as nanoGPT prints it; `nats_per_token` is exact.

    Its luck is of the size of many differences between models: with 20 batches of 12 windows of 64 characters its standard
    deviation is 0.015. It is here to stand beside published numbers. The n-grams beside it are of the tokens of the same
    windows, compressors of the whole held-out text.

    Args:
        num_batches: nanoGPT's eval_iters.
        batch_size: windows in each of them.
    """

    def __init__(self, num_batches: int, batch_size: int) -> None:
        require_at_least("metric.estimated_nats.num_batches", num_batches, 1)
        require_at_least("metric.estimated_nats.batch_size", batch_size, 1)
        self._num_batches = num_batches
        self._batch_size = batch_size

    @torch.no_grad()
    def measure(self, inputs: Inputs) -> Measurement:
        text = inputs.need_text()
        next_nats, stream = _next_nats(inputs), text.tokens("test")
        length = min(text.context + 1, len(stream))
        count = self._num_batches * self._batch_size
        noise = SampleNoise(derive_seed(inputs.seed, 6))
        u = noise.uniform((count,), torch.zeros((), dtype=torch.float64))
        starts = (u * (len(stream) - length + 1)).long()
        means = []
        for some in starts.split(max(1, _tokens_at_a_time(text) // text.context)):
            batch = stream[some[:, None] + torch.arange(length)]
            means.append(next_nats(batch.to(inputs.device)).cpu().double().mean(1))
        of_windows = torch.cat(means)
        card = _card(text) | {
            "estimate": f"{self._num_batches} batches of {self._batch_size} random windows",
            "seed": inputs.seed,
        }
        value = float(of_windows.mean())
        anchors = self._anchors(inputs, text, starts[:, None] + torch.arange(1, length))
        return Measurement(value, "nats/token", card, LOWER, mean_interval(of_windows), {}, anchors)

    @staticmethod
    def _anchors(inputs: Inputs, text: Text, predicted: Tensor) -> dict[str, Reading | NotApplicable]:
        """Yardsticks at the places of the predicted tokens `(N, length)`."""
        if (reason := _why_none(text)) is not None:
            return {f"{_ORDER}-gram": reason}
        of_ngrams: dict[str, Reading | NotApplicable] = {
            name: Reading(float(nats[predicted].mean()), predicted.numel())
            for name, nats in _ngrams_of_tokens(inputs, text).items()
        }
        rows = _rows_of_compressors(inputs, text).items()
        return of_ngrams | {name: Reading(row, len(text.test) - 1) for name, row in rows}


def _next_nats(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    require(inputs, PredictsTokens)
    if getattr(inputs.model, "is_conditional", False):
        raise NotApplicable(f"{inputs.model_name} scores tokens given a class, and a text has none")
    return lambda tokens: -inputs.model.log_probs(tokens)


def _tokens_at_a_time(text: Text) -> int:
    return min(_MOST_TOKENS_AT_A_TIME, _LOGITS_AT_A_TIME // text.tokenizer.num_tokens)


def _card(text: Text) -> dict[str, Any]:
    return {"split": "test", "tokens": text.tokenizer.in_words, "context": text.context}


def _means_of_blocks(nats: Tensor, size: int) -> Tensor:
    """Means over blocks of neighbours, which are closer to independent than they are; a shorter last block is left out."""
    whole = len(nats) // size * size
    return nats[:whole].view(-1, size).mean(1)


def _why_none(text: Text) -> NotApplicable | None:
    """Why there are no yardsticks of a text; None if there are."""
    if len(text.train) <= _MOST_COUNTED:
        return None
    return NotApplicable(f"the training text has {len(text.train):,} tokens, yardsticks are of at most {_MOST_COUNTED:,}")


def _places(part: str) -> str:
    """The name of a part in words: "5 to 8" of after_5_8."""
    return part.removeprefix("after_").replace("_", " to ")


def _rows_of_tokens(inputs: Inputs, text: Text) -> dict[str, float]:
    """Mean nats of the predicted tokens by n-gram models of tokens, and by compressors."""
    nats = _ngrams_of_tokens(inputs, text)
    return {name: float(values[1:].mean()) for name, values in nats.items()} | _rows_of_compressors(inputs, text)


def _ngrams_of_tokens(inputs: Inputs, text: Text) -> dict[str, Tensor]:
    size = text.tokenizer.num_tokens
    return _ngram_nats(inputs, text, "tokens", lambda: (text.tokens("train"), text.tokens("test"), size))


def _rows_of_characters(inputs: Inputs, text: Text) -> dict[str, float]:
    """Total nats of the predicted characters by n-gram models of characters."""

    def make() -> tuple[Tensor, Tensor, int]:
        return distinct_symbols(code_points(text.train_text), code_points(text.test_text))

    nats = _ngram_nats(inputs, text, "characters", make)
    count = len(text.predicted_text)
    return {name: float(values[len(values) - count :].sum()) for name, values in nats.items()}


def _ngram_nats(
    inputs: Inputs, text: Text, of: str, make_streams: Callable[[], tuple[Tensor, Tensor, int]]
) -> dict[str, Tensor]:
    """-ln p of every symbol of the held-out text by the yardsticks, `(T,)` float64 each."""
    orders = {"uniform": 0, "unigram": 1, f"{_ORDER}-gram": _ORDER}

    def make() -> dict[str, Tensor]:
        train, test, size = make_streams()
        return {name: -WittenBell(train, order, size).log_prob(test) for name, order in orders.items()}

    found = inputs.store.of("ngram", {"text": text.identity, "of": of, "orders": orders}, make)
    return {name: found[name] for name in orders}  # in this order, whatever that of the store is


def _rows_of_compressors(inputs: Inputs, text: Text) -> dict[str, float]:
    """What the held-out text costs by compressors that have seen the training text, in nats for each predicted token."""

    def make() -> dict[str, Tensor]:
        train, test = _as_bytes(text.train_text), _as_bytes(text.test_text)
        return {name: torch.tensor(compressed_bits(train, test, some)) for name, some in COMPRESSORS.items()}

    bits = inputs.store.of("compressors", {"text": text.identity}, make)
    return {name: float(bits[name]) * math.log(2) / (len(text.test) - 1) for name in COMPRESSORS}


def _as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
