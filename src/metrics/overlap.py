"""Where texts repeat another one: for every place the length of the longest passage that also stands in the other text.

The places of all texts are ranked by the 2^k values that begin there, for k = 0, 1, ...: the rank for twice the length is
that of the pair of ranks. When no passage of that length is in both, the nearest neighbours of a place in the order of the
other text's places are those with which it has the most in common, and the ranks say how much.

References:
    Karp, Miller, Rosenberg 1972, "Rapid identification of repeated patterns in strings, trees and arrays", STOC: the ranks.
    Manber, Myers 1993, "Suffix arrays: a new method for on-line string searches", SIAM Journal on Computing 22(5).
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["code_points", "longest_matches"]


def code_points(text: str) -> np.ndarray:
    """The Unicode code points of a text, `(number of characters,)` int64."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.int64)


def longest_matches(known: np.ndarray, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For every place of every text the length of the longest passage from there on that stands somewhere in `known`.

    A passage ends with its text at the latest. Time and memory grow like (N + M) log(longest match).

    Args:
        known: `(N,)` integers of at least 0, as characters or tokens.
        texts: each `(M_i,)`, likewise.

    Returns:
        For each text `(M_i,)` int64.
    """
    if not len(known) or not sum(map(len, texts)):
        return [np.zeros(len(text), dtype=np.int64) for text in texts]
    whole, owner = _joined(known, texts)
    levels = [_dense(whole)]
    while (step := 1 << (len(levels) - 1)) < len(whole) and _has_common(levels[-1], owner):
        ranks = levels[-1]
        following = np.concatenate([ranks[step:] + 1, np.zeros(step, dtype=np.int64)])  # 0: nothing is there
        levels.append(_dense(ranks * (len(whole) + 2) + following))
    places = [np.flatnonzero(owner == i) for i in range(len(texts) + 1)]
    ours = np.concatenate(places[1:])
    theirs = places[0][np.argsort(levels[-1][places[0]], kind="stable")]
    nearest = np.searchsorted(levels[-1][theirs], levels[-1][ours])
    found = np.maximum(
        _common_length(levels, ours, theirs[np.maximum(nearest - 1, 0)]),
        _common_length(levels, ours, theirs[np.minimum(nearest, len(theirs) - 1)]),
    )
    return np.split(found, np.cumsum([len(text) for text in texts])[:-1])


def _joined(known: np.ndarray, texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All of them with a value behind each that is nowhere else, and whose each place is: 0 of `known`, -1 of nobody."""
    parts = [known, *texts]
    first_free = 1 + max(int(part.max(initial=0)) for part in parts)
    whole = [np.append(part.astype(np.int64), first_free + i) for i, part in enumerate(parts)]
    owner = [np.append(np.full(len(part), i), -1) for i, part in enumerate(parts)]
    return np.concatenate(whole), np.concatenate(owner)


def _dense(keys: np.ndarray) -> np.ndarray:
    """The rank of each key among the different ones, from 0."""
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _has_common(ranks: np.ndarray, owner: np.ndarray) -> bool:
    is_known = np.zeros(int(ranks.max()) + 1, dtype=bool)
    is_known[ranks[owner == 0]] = True
    return bool(is_known[ranks[owner > 0]].any())


def _common_length(levels: Sequence[np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many values from the places a on equal those from the places b on, if fewer than the last level's length."""
    length = np.zeros(len(a), dtype=np.int64)
    last = len(levels[0]) - 1
    for k in reversed(range(len(levels))):
        at_a, at_b = a + length, b + length
        is_inside = (at_a <= last) & (at_b <= last)
        same = levels[k][np.minimum(at_a, last)] == levels[k][np.minimum(at_b, last)]
        length += (same & is_inside).astype(np.int64) << k
    return length
