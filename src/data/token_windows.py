"""A text as one stream of tokens, and its windows as examples.

An example is a window of context + 1 tokens: the first `context` of them are inputs, the last `context` what is predicted.
Held-out windows begin at 0, context, 2 context, ...: each shares one token with the next, so that every token but the first
is predicted exactly once, up to fewer than `context` at the end that fill no window. A training window begins anywhere: an
epoch has as many windows as are disjoint, each at a place drawn anew (`src.data.loading`).
"""

from typing import Any

import numpy as np

__all__ = ["TokenWindows"]


class TokenWindows:
    """The windows of a stream, as an array `(N, context + 1)` that is made as it is read.

    Args:
        stream: `(T,)` uint16, memory-mapped; more than `context` tokens.
        context: tokens that a prediction may be made from.
    """

    dtype = np.dtype(np.int64)

    def __init__(self, stream: np.ndarray, context: int) -> None:
        assert stream.ndim == 1
        assert len(stream) > context >= 1
        self.stream = stream
        self.context = context
        self._offsets = np.arange(context + 1)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.context + 1

    @property
    def num_places(self) -> int:
        """How many places there are for a window to begin at."""
        return len(self.stream) - self.context

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.context

    def __getitem__(self, index: Any) -> np.ndarray:
        """The windows at an index `(B,)`, or of a slice, `(B, context + 1)` int64."""
        return self.beginning_at(np.arange(len(self))[index] * self.context)

    def beginning_at(self, places: np.ndarray) -> np.ndarray:
        """The windows that begin at places `(B,)`, `(B, context + 1)` int64."""
        return self.stream[places[..., None] + self._offsets].astype(np.int64)
