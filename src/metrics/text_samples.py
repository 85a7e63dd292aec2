"""What samples of text repeat: themselves, and the training text. Held-out text of the same amount stands beside them.

    distinct_n                 share of the n-grams of words that are different, over all samples together
    ngram_copy_rate            share of the passages of n characters that stand in the training text word for word
    longest_common_substring   characters of the longest passage that stands there

The first and the last depend on how much text there is, so that only values of equally many samples can be compared: where
held-out text has fewer windows than there are samples, what is held against it is the value of as many of the samples, the
first ones, which stands among the parts. The last two are of characters, whatever the tokens are: what one tokenizer cuts
differently from the training text is copied all the same.

References:
    Li et al. 2016, "A diversity-promoting objective function for neural conversation models", arXiv:1510.03055.
    Carlini et al. 2021, "Extracting training data from large language models", arXiv:2012.07805: passages word for word.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from src.core.errors import NotApplicable, require_at_least
from src.metrics.features import ImageSet
from src.metrics.metric import HELD_OUT, HIGHER, NOISE, Finding, Inputs, Measurement, Metric, Reading
from src.metrics.overlap import code_points, longest_matches

__all__ = ["DistinctNgrams", "LongestCommonSubstring", "NgramCopyRate", "distinct_share"]

_MOST_CHARACTERS = 50_000_000  # of a training text that is searched: about 5 GB at that size
_LONG = 2.0  # times the longest passage of held-out text: too long for a set phrase
_OFTEN = 2.0  # times the rate of held-out text
_LEAST_RATE = 0.01


def distinct_share(texts: Sequence[Sequence[str]], n: int) -> tuple[float, int]:
    """Different n-grams over all n-grams of some texts, each a sequence of words, and how many there are.

    An n-gram lies within one text. Raises `NotApplicable` if there is none.
    """
    grams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1)]
    if not grams:
        raise NotApplicable(f"there are no {n} words in a row in any of the texts")
    return len(set(grams)) / len(grams), len(grams)


class _OfTexts(Metric):
    """A quantity of a set of texts."""

    unit = "1"
    better: str | None = None
    beside: tuple[str, ...] = (HELD_OUT,)

    @abstractmethod
    def of(self, texts: list[str], inputs: Inputs, key: str) -> Reading:
        """The quantity of some texts; `key` is what is kept of them is called by."""

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """What else the value depends on, for its card."""

    def finding(self, reading: Reading, null: Reading) -> Finding | None:
        """What the samples' value means beside that of as many windows of held-out text."""
        return None

    def measure(self, inputs: Inputs) -> Measurement:
        text = inputs.need_text()
        reading = self.of(_texts(inputs, inputs.need_generated(), "generated"), inputs, "generated")
        anchors: dict[str, Reading | NotApplicable] = {}
        for name in self.beside:
            if name in inputs.anchors:
                try:
                    anchors[name] = self.of(_texts(inputs, inputs.anchors[name], name), inputs, name)
                except NotApplicable as reason:
                    anchors[name] = reason
        null = anchors.get(HELD_OUT)
        finding, parts = None, reading.parts
        if isinstance(null, Reading) and null.count < reading.count:
            first = _texts(inputs, inputs.need_generated(), "generated")[: null.count]
            as_many = self.of(first, inputs, "generated")
            parts = parts | {f"first_{null.count}": as_many.value}
            finding = self.finding(as_many, null)
            if finding is not None:
                finding = replace(finding, words=f"{finding.words}, of {null.count:,} each")
        elif isinstance(null, Reading):
            finding = self.finding(reading, null)
        card = {
            "tokens": text.tokenizer.in_words,
            "sample_tokens": inputs.spec.num_dims,
            "seed": inputs.seed,
            "num_samples": reading.count,
            **self.protocol(),
        }
        return Measurement(reading.value, self.unit, card, self.better, reading.interval, parts, anchors, finding)


class DistinctNgrams(_OfTexts):
    """distinct-n of words: low if samples repeat themselves or each other, high if words follow at random.

    Args:
        n: words in a row.
    """

    better = HIGHER
    beside = (HELD_OUT, NOISE)

    def __init__(self, n: int) -> None:
        require_at_least("metric.distinct_*.n", n, 1)
        self._n = n

    def of(self, texts: list[str], inputs: Inputs, key: str) -> Reading:
        share, _ = distinct_share([text.split() for text in texts], self._n)
        return Reading(share, len(texts))

    def protocol(self) -> dict[str, Any]:
        return {"of": f"{self._n} words" if self._n > 1 else "words"}


class _AgainstTraining(_OfTexts):
    def _matches(self, texts: list[str], inputs: Inputs, key: str) -> list[np.ndarray]:
        """For every place of every text the length of the longest passage from there on that is in the training text.

        Of the first ones of texts that were searched before, what was found then.
        """
        text, name = inputs.need_text(), f"matches {key}"
        if len(text.train_text) > _MOST_CHARACTERS:
            raise NotApplicable(
                f"the training text has {len(text.train_text):,} characters; at most {_MOST_CHARACTERS:,} are searched"
            )
        if name not in inputs.kept:
            inputs.kept[name] = longest_matches(code_points(text.train_text), [code_points(some) for some in texts])
        return inputs.kept[name][: len(texts)]


class NgramCopyRate(_AgainstTraining):
    """Share of the samples' passages of n characters that stand in the training text.

    Its parts are the rates at other lengths.

    Args:
        n: characters in a passage.
    """

    def __init__(self, n: int) -> None:
        require_at_least("metric.ngram_copy_rate.n", n, 1)
        self._n = n

    def of(self, texts: list[str], inputs: Inputs, key: str) -> Reading:
        matches = self._matches(texts, inputs, key)
        rates = {n: _rate(matches, n) for n in {self._n, self._n // 2, 2 * self._n} if n}
        value = rates.pop(self._n)
        if value is None:
            raise NotApplicable(f"no text has {self._n} characters")
        parts = {f"of_{n}": rate for n, rate in sorted(rates.items()) if rate is not None}
        return Reading(value, len(texts), None, parts)

    def protocol(self) -> dict[str, Any]:
        return {"of": f"{self._n} characters", "compared_with": "the training text"}

    def finding(self, reading: Reading, null: Reading) -> Finding:
        is_copying = reading.value > max(_OFTEN * null.value, _LEAST_RATE)
        words = f"copies {reading.value:.1%} of passages of {self._n} characters (held-out text {null.value:.1%})"
        return Finding(words, "copying" if is_copying else None)


class LongestCommonSubstring(_AgainstTraining):
    """Characters of the longest passage of a sample that stands in the training text; its part is the mean over samples."""

    unit = "characters"

    def of(self, texts: list[str], inputs: Inputs, key: str) -> Reading:
        longest = [int(found.max(initial=0)) for found in self._matches(texts, inputs, key)]
        return Reading(float(max(longest)), len(texts), None, {"mean_over_samples": float(np.mean(longest))})

    def protocol(self) -> dict[str, Any]:
        return {"compared_with": "the training text"}

    def finding(self, reading: Reading, null: Reading) -> Finding:
        is_copying = reading.value > _LONG * null.value
        words = f"longest passage copied: {reading.value:.0f} characters (held-out text {null.value:.0f})"
        return Finding(words, "copying" if is_copying else None)


def _rate(matches: Sequence[np.ndarray], n: int) -> float | None:
    """The share of the places with n characters from them on where all of these are copied; None if there is none."""
    places = [found[: len(found) - n + 1] for found in matches if len(found) >= n]
    return float((np.concatenate(places) >= n).mean()) if places else None


def _texts(inputs: Inputs, examples: ImageSet, name: str) -> list[str]:
    """The texts of a set of examples, which are tokens `(B, L)` in its batches."""
    key, tokenizer = f"texts {name}", inputs.need_text().tokenizer
    if key not in inputs.kept:
        inputs.kept[key] = [tokenizer.decode(row.long()) for tokens, _ in examples.batches() for row in tokens]
    return inputs.kept[key]
