"""The classifier score: how sure a classifier is of each sample, and how many classes the samples spread over.

    CS = exp( H(mean_i p(y | x_i)) - mean_i H(p(y | x_i)) ),  from 1 (one class, or no idea) to K (all classes, all sure)

With Inception in the classifier's place it is the inception score; on a domain classifier it is called `cs`.

References:
    Salimans et al. 2016, "Improved techniques for training GANs", arXiv:1606.03498, section 4.
"""

from typing import Any

import torch
from torch import Tensor

from src.core.errors import NotApplicable
from src.metrics.features import Extractor, ImageSet
from src.metrics.jackknife import NUM_BLOCKS, block_of, jackknife
from src.metrics.metric import HIGHER, Inputs, Reading, SampleMetric

__all__ = ["ClassifierScore", "classifier_score"]

_CHUNK = 4096  # samples whose probabilities are held at a time


def classifier_score(logits: Tensor) -> Tensor:
    """exp of the mutual information between sample and class, `()`, from logits `(N, K)`; computed in float64."""
    return _score(*_sums(logits), len(logits))


def _sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Over samples, of p(y | x) and of its entropy: `(K,)` and `()` float64, from logits `(N, K)`."""
    p = torch.zeros(logits.shape[1], dtype=torch.float64)
    entropy = torch.zeros((), dtype=torch.float64)
    for part in logits.split(_CHUNK):
        some = part.double().softmax(1)
        p += some.sum(0)
        entropy += torch.special.entr(some).sum()
    return p, entropy


def _score(p: Tensor, entropy: Tensor, count: int) -> Tensor:
    return (torch.special.entr(p / count).sum() - entropy / count).exp()


class ClassifierScore(SampleMetric):
    """`cs`: the score on the domain classifier's logits, over all samples at once, with a jackknife interval."""

    better = HIGHER

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        logits = inputs.features(images, extractor).logits
        if not logits.shape[1]:
            raise NotApplicable(f"{extractor.name} knows no classes")
        count = len(logits)
        if count < 2 * NUM_BLOCKS:
            return Reading(float(classifier_score(logits)), count)
        block = block_of(count)
        sizes = block.bincount(minlength=NUM_BLOCKS)
        p, entropy = (
            torch.stack(sums) for sums in zip(*(_sums(logits[block == g]) for g in range(NUM_BLOCKS)), strict=True)
        )
        score = _score(p.sum(0), entropy.sum(), count)
        # added up anew without each block: a difference of sums could be a little below zero
        others = ~torch.eye(NUM_BLOCKS, dtype=torch.bool)
        left_out = [_score(p[some].sum(0), entropy[some].sum(), int(sizes[some].sum())) for some in others]
        return Reading(float(score), count, jackknife(score, torch.stack(left_out)).around(float(score)))

    def protocol(self) -> dict[str, Any]:
        return {"splits": 1}
