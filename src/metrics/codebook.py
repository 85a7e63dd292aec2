"""How much of its codebook a model uses, over all codes of the test set; a batch alone would seem to use fewer.

References:
    van den Oord, Vinyals, Kavukcuoglu 2017, "Neural discrete representation learning", arXiv:1711.00937.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from src.core.protocols import CanQuantize
from src.metrics.metric import HIGHER, Inputs, Measurement, Metric, require

__all__ = ["CodebookPerplexity", "CodesUsed", "perplexity"]


class _OfCounts(Metric):
    """A quantity of how often each code occurs."""

    unit: str

    @abstractmethod
    def of(self, counts: Tensor) -> float:
        """From `(K,)` counts."""

    def measure(self, inputs: Inputs) -> Measurement:
        require(inputs, CanQuantize)
        num_codes = inputs.model.num_codes
        assert isinstance(num_codes, int)
        counts = torch.zeros(num_codes, dtype=torch.int64)
        num_examples = 0
        with torch.no_grad():
            for batch in inputs.test_batches():
                codes = inputs.model.quantize(batch.x, batch.condition)
                counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
                num_examples += len(batch)
        card = {"split": "test", "num_examples": num_examples, "num_codes": len(counts), "codes_seen": int(counts.sum())}
        return Measurement(self.of(counts), self.unit, card, HIGHER)


class CodebookPerplexity(_OfCounts):
    """exp(-sum_k p_k log p_k) with p_k the share of code k: as many codes would be in use if all were equally so."""

    unit = "codes"

    def of(self, counts: Tensor) -> float:
        return perplexity(counts)


class CodesUsed(_OfCounts):
    """The share of the codes that occur at all."""

    unit = "1"

    def of(self, counts: Tensor) -> float:
        return float((counts > 0).double().mean())


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of a histogram `(K,)`, from 1 to K."""
    shares = counts.double() / counts.sum()
    return float(torch.special.entr(shares).sum().exp())
