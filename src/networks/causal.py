"""What the networks of autoregressive models share: the base of networks that predict the next token.

A network of an autoregressive model is called as `network(num_tokens=V, length=T, condition_dim=C)`: it gets at most T
tokens at a time, and a class as a vector of C features (0 for none). It must then do what `core.protocols.NextTokenNetwork`
says.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

__all__ = ["CausalNetwork"]


class CausalNetwork(nn.Module, ABC):
    """Logits of the next token at every place, at once or token by token (see `NextTokenNetwork`)."""

    max_length: int | None = None  # the longest input; None for any length
    num_tokens: int  # V

    @abstractmethod
    def forward(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        """Tokens `(B, T)` int64 and features `(B, C)` or None to logits `(B, T, V)`; place t sees tokens 0 .. t."""

    @abstractmethod
    def begin(self, batch_size: int) -> Any:
        """The state before the first token."""

    def state_size(self, length: int) -> int:
        """How many numbers the state of one row holds after so many tokens, about; 0 if it is small whatever they are."""
        return 0

    @abstractmethod
    def step(self, token: Tensor, state: Any, condition: Tensor | None = None) -> tuple[Tensor, Any]:
        """Logits `(B, V)` after one more token `(B,)`, and the next state."""

    def read(self, tokens: Tensor, state: Any, condition: Tensor | None = None) -> tuple[Tensor, Any]:
        """Logits `(B, V)` after L >= 1 more tokens `(B, L)`, and the next state; here step by step."""
        for token in tokens.unbind(1):
            logits, state = self.step(token, state, condition)
        return logits, state
