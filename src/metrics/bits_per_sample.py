"""How many bits a sample of sound costs in 256 levels of mu-law, beside codes that know next to nothing of sound.

Short clips are padded with silence, which costs next to nothing; half of all samples of a data set may be padding. So only
what was recorded is counted (`core.sound.recorded_lengths`): all bits of recorded samples over their number. What a clip
costs with its padding, where the model has to know that the sound has ended, is a part of the value, by name.

The yardsticks are counted in the recorded samples of the training clips, every event once more than it occurs: `uniform` is
8 bits whatever the level, `unigram` knows how frequent each level is, and `bigram` how frequent after the level before it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from src.core.batch import Batch
from src.core.errors import NotApplicable
from src.core.protocols import ScoresTokens, Terms
from src.core.rng import SampleNoise
from src.core.sound import MU_LAW, MU_LAW_LEVELS, from_pcm, mu_law_encode, recorded_lengths
from src.metrics.intervals import mean_interval
from src.metrics.likelihood import conditions_of_exact, terms_of_test
from src.metrics.metric import LOWER, Inputs, Measurement, Metric, Reading, require

__all__ = ["BitsPerSample", "bigram_bits", "pair_counts", "unigram_bits"]

_WITH_PADDING = "with_padding"


class BitsPerSample(Metric):
    """The exact log likelihood of recorded samples in bits, -log p / (n ln 2) of all n of them; smaller is better."""

    def measure(self, inputs: Inputs) -> Measurement:
        sound = inputs.spec.sound
        if sound is None or inputs.clips is None:
            raise NotApplicable(f"it is of sound; data={inputs.spec.name} gives {inputs.spec.modality}")
        if sound.representation != MU_LAW:
            raise NotApplicable(f"it is of the levels of mu-law; the model is given a {sound.representation}")
        require(inputs, ScoresTokens)
        counts = torch.zeros(MU_LAW_LEVELS, MU_LAW_LEVELS, dtype=torch.float64)
        for clips, _ in inputs.reference.batches():
            levels = mu_law_encode(from_pcm(clips))
            counts += pair_counts(levels, recorded_lengths(levels))
        codes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"unigram": unigram_bits, "bigram": bigram_bits}

        def of(batch: Batch, noise: SampleNoise) -> Terms:
            lengths = recorded_lengths(batch.x)
            bits = inputs.model.token_log_probs(batch.x, batch.condition).double() / -math.log(2)
            own = {"value": _of_recorded(bits, lengths), _WITH_PADDING: bits.sum(1)}
            return own | {"recorded": lengths} | {name: code(batch.x.cpu(), counts) for name, code in codes.items()}

        found = terms_of_test(inputs, of, inputs.num_likelihood_examples)
        bits, recorded = found["value"], found["recorded"]
        if not bits.isfinite().all():
            raise NotApplicable("some test examples have no finite value")
        if not recorded.sum():
            raise NotApplicable("all test clips are silent")
        mean = recorded.mean()
        value = bits.mean() / mean
        card = {
            "split": "test",
            "num_examples": len(bits),
            "levels": MU_LAW_LEVELS,
            "samples": "those recorded",
            "num_recorded": int(recorded.sum()),
            **conditions_of_exact(inputs),
        }
        anchors: dict[str, Reading | NotApplicable] = {"uniform": Reading(math.log2(MU_LAW_LEVELS), len(bits))}
        anchors |= {name: Reading(float(found[name].mean() / mean), len(bits)) for name in codes}
        spread = value + (bits - value * recorded) / mean  # of a ratio of two sums, to first order
        parts = {_WITH_PADDING: float(found[_WITH_PADDING].mean()) / sound.length}
        return Measurement(float(value), "bits/sample", card, LOWER, mean_interval(spread), parts, anchors)


def pair_counts(levels: Tensor, lengths: Tensor) -> Tensor:
    """How often each level `(V, ...)` is followed by each other `(V, V)` in the first samples, `(B,)` of them, of clips
    `(B, T)`, float64."""
    place = torch.arange(1, levels.shape[1], device=levels.device)
    pair = (levels[:, :-1] * MU_LAW_LEVELS + levels[:, 1:])[place < lengths[:, None]]
    return torch.bincount(pair, minlength=MU_LAW_LEVELS**2).view(MU_LAW_LEVELS, -1).double()


def unigram_bits(levels: Tensor, counts: Tensor) -> Tensor:
    """Bits of the recorded samples of clips `(B, T)`, `(B,)` float64, when each level costs by its frequency.

    Args:
        levels: 0 .. V-1.
        counts: `(V, V)` of pairs, see `pair_counts`.
    """
    return _of_recorded(_unigram(counts)[levels], recorded_lengths(levels))


def bigram_bits(levels: Tensor, counts: Tensor) -> Tensor:
    """Likewise when each level costs by its frequency after the one before; the first as in `unigram_bits`."""
    after = counts + 1
    bits = -(after / after.sum(1, keepdim=True)).log2()
    first = _unigram(counts)[levels[:, :1]]
    return _of_recorded(torch.cat([first, bits[levels[:, :-1], levels[:, 1:]]], 1), recorded_lengths(levels))


def _of_recorded(bits: Tensor, lengths: Tensor) -> Tensor:
    """The sum over the first samples, `(B,)` of them, of `(B, T)`."""
    place = torch.arange(bits.shape[1], device=bits.device)
    return (bits * (place < lengths[:, None])).sum(1)


def _unigram(counts: Tensor) -> Tensor:
    """Bits of each level `(V,)`."""
    single = counts.sum(0) + 1
    return -(single / single.sum()).log2()
