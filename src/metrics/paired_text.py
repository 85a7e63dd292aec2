"""Completions of held-out text against the text itself: BLEU, chrF and ROUGE-L, by the library torchmetrics.

A prompt is the first half of a held-out example; what the model draws after it is compared with what really comes. Of free
text these scores say little, since there are many good ways to go on: so the same score of text from elsewhere in the
held-out part stands beside. They are for tasks where the end follows from the beginning.

References:
    Papineni, Roukos, Ward, Zhu 2002, "BLEU: a method for automatic evaluation of machine translation", ACL.
    Popovic 2015, "chrF: character n-gram F-score for automatic MT evaluation", WMT.
    Lin 2004, "ROUGE: a package for automatic evaluation of summaries", Text Summarization Branches Out.
"""

from abc import abstractmethod

import torch
from torch import Tensor
from torchmetrics.functional.text import bleu_score, chrf_score
from torchmetrics.functional.text.rouge import rouge_score

from src.core.errors import NotApplicable, require_at_least
from src.core.protocols import CanContinue
from src.core.rng import SampleNoise, derive_seed
from src.metrics.metric import HIGHER, Inputs, Measurement, Metric, Reading, require

__all__ = ["Bleu", "ChrF", "RougeL"]

_AT_A_TIME = 100


class _OfCompletions(Metric):
    """A score of completions, from 0 to 1.

    Args:
        num_examples: held-out examples that are completed, evenly spread; fewer if there are not so many.
    """

    def __init__(self, num_examples: int) -> None:
        require_at_least("metric.*.num_examples", num_examples, 2)
        self._num_examples = num_examples

    @abstractmethod
    def score(self, given: list[str], wanted: list[str]) -> float:
        """How near the given texts are to the wanted ones, in pairs."""

    def measure(self, inputs: Inputs) -> Measurement:
        text = inputs.need_text()
        require(inputs, CanContinue)
        if getattr(inputs.model, "is_conditional", False):
            raise NotApplicable(f"{inputs.model_name} goes on given a class, and a text has none")
        half = inputs.spec.num_dims // 2
        key = f"completions {self._num_examples}"
        if key not in inputs.kept:
            inputs.kept[key] = _completions(inputs, _windows(text.tokens("test"), inputs.spec.num_dims, self._num_examples))
        given, wanted = inputs.kept[key]
        elsewhere = wanted[len(wanted) // 2 :] + wanted[: len(wanted) // 2]
        card = {
            "split": "test",
            "tokens": text.tokenizer.in_words,
            "prompt_tokens": half,
            "completed_tokens": inputs.spec.num_dims - half,
            "num_examples": len(wanted),
            "seed": inputs.seed,
        }
        anchors: dict[str, Reading | NotApplicable] = {
            "text from elsewhere": Reading(self.score(elsewhere, wanted), len(wanted))
        }
        return Measurement(self.score(given, wanted), "1", card, HIGHER, None, {}, anchors)


class Bleu(_OfCompletions):
    """BLEU of words with n-grams up to 4, over all completions together, without smoothing."""

    def score(self, given: list[str], wanted: list[str]) -> float:
        return float(bleu_score(given, [[text] for text in wanted]))


class ChrF(_OfCompletions):
    """chrF: F-score of n-grams of characters up to 6, recall counting twice, over all completions together."""

    def score(self, given: list[str], wanted: list[str]) -> float:
        return float(torch.as_tensor(chrf_score(given, [[text] for text in wanted], n_word_order=0)))


class RougeL(_OfCompletions):
    """ROUGE-L: F-score of the longest common subsequence of words, mean over completions."""

    def score(self, given: list[str], wanted: list[str]) -> float:
        return float(rouge_score(given, wanted, rouge_keys="rougeL")["rougeL_fmeasure"])


def _windows(stream: Tensor, length: int, most: int) -> Tensor:
    """At most so many windows of a stream, disjoint and evenly spread, `(N, length)`."""
    whole = stream[: len(stream) // length * length].view(-1, length)
    count = min(most, len(whole))
    if count < 2:
        raise NotApplicable(f"{len(whole)} windows of {length} tokens of held-out text are too few to be compared")
    return whole[torch.arange(count) * len(whole) // count]


@torch.no_grad()
def _completions(inputs: Inputs, windows: Tensor) -> tuple[list[str], list[str]]:
    """What the model draws after the first half of each window, and what is there, as texts."""
    half, decode = windows.shape[1] // 2, inputs.need_text().tokenizer.decode
    given: list[str] = []
    for start in range(0, len(windows), _AT_A_TIME):
        prompt = windows[start : start + _AT_A_TIME, :half].to(inputs.device)
        noise = SampleNoise(derive_seed(inputs.seed, 7), start)
        given += [decode(row) for row in inputs.model.continue_(prompt, windows.shape[1] - half, generator=noise)]
    return given, [decode(row) for row in windows[:, half:]]
