"""A text in two parts, one to train on and one held out, as metrics see it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.core.tokens import Tokenizer, hash_of_texts

__all__ = ["Text"]


@dataclass(frozen=True)
class Text:
    """The tokens of a training text and of a held-out text, and what they mean.

    Args:
        train, test: `(N,)` and `(T,)` tokens from 0 to num_tokens - 1, of any integer type.
        tokenizer: from tokens to text.
        context: so many tokens a model sees at most before the one that it predicts.
        identity: hash of all of it, as plain JSON types.
        known_sha256: hash of both texts, where it was kept when they were prepared.
    """

    train: np.ndarray
    test: np.ndarray
    tokenizer: Tokenizer
    context: int
    identity: Any
    known_sha256: str | None = None

    def tokens(self, split: str) -> Tensor:
        """All tokens of "train" or "test", `(T,)` int64."""
        return torch.from_numpy(getattr(self, split).astype(np.int64))

    @cached_property
    def train_text(self) -> str:
        return self.tokenizer.decode(self.tokens("train"))

    @cached_property
    def test_text(self) -> str:
        return self.tokenizer.decode(self.tokens("test"))

    @property
    def predicted_text(self) -> str:
        """The held-out text without its first token, which has nothing before it to be predicted from."""
        return self.test_text[len(self.tokenizer.decode(self.tokens("test")[:1])) :]

    @cached_property
    def sha256(self) -> str:
        """Hash of both texts as characters, the same whatever the tokens are."""
        return self.known_sha256 or hash_of_texts(self.train_text, self.test_text)
