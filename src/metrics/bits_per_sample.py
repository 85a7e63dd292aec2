"""How many bits a sample of sound costs in 256 levels of mu-law, beside codes that know next to nothing of sound.

The yardsticks are counted in the training clips, every event once more than it occurs: `uniform` is 8 bits whatever the
level, `unigram` knows how frequent each level is, `bigram` how frequent it is after the level before it. The silence that
short clips are padded with counts like any sound, and costs next to nothing; so values compare for one length only.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from src.core.errors import NotApplicable
from src.core.sound import MU_LAW, MU_LAW_LEVELS, from_pcm, mu_law_encode
from src.metrics.likelihood import exact_likelihood
from src.metrics.metric import LOWER, Inputs, Measurement, Metric, Reading

__all__ = ["BitsPerSample", "bigram_bits", "unigram_bits"]

_AT_A_TIME = 100  # clips


class BitsPerSample(Metric):
    """The exact log likelihood of whole clips as bits per sample, -log p / (T ln 2); smaller is better."""

    def measure(self, inputs: Inputs) -> Measurement:
        sound = inputs.spec.sound
        if sound is None or inputs.clips is None:
            raise NotApplicable(f"it is of sound; data={inputs.spec.name} gives {inputs.spec.modality}")
        if sound.representation != MU_LAW:
            raise NotApplicable(f"it is of the levels of mu-law; the model is given a {sound.representation}")
        protocol = {"levels": MU_LAW_LEVELS, "length": sound.length, "padding": "counted"}
        found = exact_likelihood(inputs, -1 / (sound.length * math.log(2)), "bits/sample", LOWER, protocol)
        counts = torch.zeros(MU_LAW_LEVELS, MU_LAW_LEVELS, dtype=torch.float64)
        for clips, _ in inputs.reference.batches():
            counts += pair_counts(mu_law_encode(from_pcm(clips)))
        test = torch.from_numpy(np.array(inputs.clips))
        levels = [mu_law_encode(from_pcm(some)) for some in test.split(_AT_A_TIME)]
        codes = {"unigram": unigram_bits, "bigram": bigram_bits}
        anchors: dict[str, Reading | NotApplicable] = {"uniform": Reading(math.log2(MU_LAW_LEVELS), len(test))}
        for name, bits in codes.items():
            anchors[name] = Reading(float(torch.cat([bits(some, counts) for some in levels]).mean()), len(test))
        return replace(found, anchors=anchors)


def pair_counts(levels: Tensor) -> Tensor:
    """How often each level `(V, ...)` is followed by each other `(V, V)` in clips `(B, T)`, float64."""
    pair = levels[:, :-1] * MU_LAW_LEVELS + levels[:, 1:]
    return torch.bincount(pair.flatten(), minlength=MU_LAW_LEVELS**2).view(MU_LAW_LEVELS, -1).double()


def unigram_bits(levels: Tensor, counts: Tensor) -> Tensor:
    """Bits per sample of clips `(B, T)`, `(B,)` float64, when each level costs by its frequency.

    Args:
        levels: 0 .. V-1.
        counts: `(V, V)` of pairs, see `pair_counts`.
    """
    return _unigram(counts)[levels].mean(1)


def bigram_bits(levels: Tensor, counts: Tensor) -> Tensor:
    """Likewise when each level costs by its frequency after the one before; the first as in `unigram_bits`."""
    after = counts + 1
    bits = -(after / after.sum(1, keepdim=True)).log2()
    rest = bits[levels[:, :-1], levels[:, 1:]].sum(1)
    return (_unigram(counts)[levels[:, 0]] + rest) / levels.shape[1]


def _unigram(counts: Tensor) -> Tensor:
    """Bits of each level `(V,)`."""
    single = counts.sum(0) + 1
    return -(single / single.sum()).log2()
