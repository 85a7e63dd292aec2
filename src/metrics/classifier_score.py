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


def classifier_score(logits: Tensor) -> Tensor:
    """exp of the mutual information between sample and class, `()`, from logits `(N, K)`; computed in float64."""
    log_p = logits.double().log_softmax(1)
    log_marginal = torch.logsumexp(log_p, dim=0) - torch.log(torch.tensor(float(len(log_p)), dtype=torch.float64))
    marginal_entropy = torch.special.entr(log_marginal.exp()).sum()
    mean_entropy = torch.special.entr(log_p.exp()).sum(1).mean()
    return (marginal_entropy - mean_entropy).exp()


class ClassifierScore(SampleMetric):
    """`cs`: the score on the domain classifier's logits, over all samples at once, with a jackknife interval."""

    better = HIGHER

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        logits = inputs.features(images, extractor).logits
        if not logits.shape[1]:
            raise NotApplicable(f"{extractor.name} knows no classes")
        score = classifier_score(logits)
        if len(logits) < 2 * NUM_BLOCKS:
            return Reading(float(score), len(logits))
        block = block_of(len(logits))
        found = jackknife(score, torch.stack([classifier_score(logits[block != g]) for g in range(NUM_BLOCKS)]))
        return Reading(float(score), len(logits), found.around(float(score)))

    def protocol(self) -> dict[str, Any]:
        return {"splits": 1}
