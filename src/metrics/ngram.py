"""Yardsticks of text that nobody has to train: n-gram models by interpolated Witten-Bell, and compressors.

    p_k(w | h) = (c(h w) + d(h) p_{k-1}(w | h')) / (c(h) + d(h)),    p_0(w) = 1 / V

where h are the k - 1 tokens before w, h' is h without its first token, c counts in the training stream, and d(h) is the
number of different tokens that follow h there: a context is trusted the more, the oftener it was seen and the fewer
continuations it has. Of a context that was never seen p_k = p_{k-1}.

References:
    Witten, Bell 1991, "The zero-frequency problem: estimating the probabilities of novel events in adaptive text
        compression", IEEE Transactions on Information Theory 37(4).
    Chen, Goodman 1999, "An empirical study of smoothing techniques for language modeling", Computer Speech and Language
        13(4): the interpolated form.
"""

import bz2
import lzma
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["COMPRESSORS", "WittenBell", "compressed_bits", "distinct_symbols"]


@dataclass(frozen=True)
class _Order:
    """What the training stream says of k-grams, for one k.

    Args:
        keys: of the different k-grams, ascending, `(G,)`: (number of the context) * V + token.
        counts: how often each occurs, `(G,)`.
        context_counts: how often each context occurs with a token behind it, `(C,)`; numbered as the (k-1)-grams.
        context_kinds: how many different tokens follow it, `(C,)`.
    """

    keys: np.ndarray
    counts: np.ndarray
    context_counts: np.ndarray
    context_kinds: np.ndarray


class WittenBell:
    """An n-gram model of a stream of tokens.

    Args:
        train: the stream it is counted in, `(N,)` integers from 0 to vocabulary - 1.
        order: n; 0 is the uniform distribution, 1 does not look back.
        vocabulary: V.
    """

    def __init__(self, train: Tensor, order: int, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._orders: list[_Order] = []
        tokens = _as_int64(train)
        assert tokens.size == 0 or (tokens.min() >= 0 and tokens.max() < vocabulary)
        context, num_contexts = np.zeros(len(tokens), dtype=np.int64), 1
        for _ in range(order):
            keys, inverse, counts = np.unique(context * vocabulary + tokens, return_inverse=True, return_counts=True)
            of_context = keys // vocabulary
            context_counts = np.bincount(of_context, weights=counts, minlength=num_contexts)
            context_kinds = np.bincount(of_context, minlength=num_contexts)
            self._orders.append(_Order(keys, counts, context_counts, context_kinds))
            # the k-gram that ends at t is the context of what stands at t + 1
            context, tokens, num_contexts = inverse[:-1], tokens[1:], len(keys)

    def log_prob(self, stream: Tensor) -> Tensor:
        """ln p(x_t | x_{t-n+1} ... x_{t-1}) of every token of a stream `(T,)`, `(T,)` float64 in nats.

        The first tokens have the shorter contexts that there are.
        """
        tokens = _as_int64(stream)
        p = np.full(len(tokens), 1 / self._vocabulary)
        context = np.zeros(len(tokens), dtype=np.int64)  # number of the context of each token; -1 if it was never seen
        for back, order in enumerate(self._orders):
            known = np.flatnonzero(context >= 0)
            gram = np.full(len(tokens), -1, dtype=np.int64)
            gram[known] = _find(order.keys, context[known] * self._vocabulary + tokens[known])
            p[known] = self._interpolate(order, gram[known], context[known], p[known])
            context = np.concatenate([np.full(back + 1, -1, dtype=np.int64), gram[back:-1]])[: len(tokens)]
        return torch.from_numpy(np.log(p))

    def next_probs(self, context: Tensor) -> Tensor:
        """p(w | context) of every w, `(V,)` float64, of which only the last n - 1 tokens of the context `(T,)` count."""
        past = _as_int64(context)
        p = np.full(self._vocabulary, 1 / self._vocabulary)
        for back, order in enumerate(self._orders):
            if back > len(past):
                break
            number = 0
            for depth, token in enumerate(past[len(past) - back :]):
                number = int(_find(self._orders[depth].keys, np.array([number * self._vocabulary + token]))[0])
                if number < 0:
                    return torch.from_numpy(p)
            numbers = np.full(self._vocabulary, number)
            gram = _find(order.keys, numbers * self._vocabulary + np.arange(self._vocabulary))
            p = self._interpolate(order, gram, numbers, p)
        return torch.from_numpy(p)

    @staticmethod
    def _interpolate(order: _Order, gram: np.ndarray, context: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """p_k of tokens from their p_{k-1}; `gram` is the number of the k-gram, -1 if it was never seen."""
        counts = np.where(gram >= 0, order.counts[gram], 0) if len(order.counts) else np.zeros(len(gram))
        total, kinds = order.context_counts[context], order.context_kinds[context]
        mixed = (counts + kinds * lower) / np.maximum(total + kinds, 1)
        return np.where(total > 0, mixed, lower)


def _as_int64(tokens: Tensor) -> np.ndarray:
    return tokens.cpu().numpy().astype(np.int64)


def _find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The place of each wanted key in ascending keys, -1 where it is not among them."""
    if not len(keys):
        return np.full(len(wanted), -1, dtype=np.int64)
    place = np.searchsorted(keys, wanted)
    place[place == len(keys)] = 0
    return np.where(keys[place] == wanted, place, -1)


_LARGEST_DICTIONARY = 2**26  # bytes that xz looks back at its highest preset; it takes ten times their memory


def _xz(data: bytes) -> bytes:
    dictionary = min(max(4096, len(data)), _LARGEST_DICTIONARY)
    settings = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
    return lzma.compress(data, filters=[settings])


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {"bz2": lambda data: bz2.compress(data, 9), "xz": _xz}


def compressed_bits(train: bytes, test: bytes, compress: Callable[[bytes], bytes]) -> int:
    """Bits by which a compressed text grows if another is appended: what the second costs one who has the first.

    bz2 looks back 900 kB at most, xz at its highest preset 64 MiB.
    """
    return 8 * (len(compress(train + test)) - len(compress(train)))


def distinct_symbols(train: np.ndarray, test: np.ndarray) -> tuple[Tensor, Tensor, int]:
    """Any symbols, `(N,)` and `(T,)`, as numbers from 0 to V - 1 in their order, and V: as many as there are in both."""
    known, numbers = np.unique(np.concatenate([train, test]), return_inverse=True)
    return torch.from_numpy(numbers[: len(train)]), torch.from_numpy(numbers[len(train) :]), len(known)
