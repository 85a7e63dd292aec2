"""A long short-term memory as a network of an autoregressive model.

References:
    Hochreiter, Schmidhuber 1997, "Long short-term memory", Neural Computation 9.
    Zaremba, Sutskever, Vinyals 2014, "Recurrent neural network regularization", arXiv:1409.2329: dropout between layers.
    Jozefowicz, Zaremba, Sutskever 2015, "An empirical exploration of recurrent network architectures", ICML: the forget
        gate's bias begins at 1.
"""

from typing import cast

import torch
from torch import Tensor, nn

from src.core.errors import UserError, require_sizes
from src.networks.causal import CausalNetwork

__all__ = ["LSTM"]

State = tuple[Tensor, Tensor]
"""Hidden and cell state, each `(layers, B, width)`."""


class LSTM(CausalNetwork):
    """Logits of the next token from a recurrent state, which is zero before the first one.

    Args:
        num_tokens: V.
        length: the longest input in training; in drawing the state goes on without end.
        num_layers: recurrent layers.
        width: of each layer, and of the embedding of tokens.
        dropout: share of values set to zero in training: of the embedding and after each layer.
        tied: the last layer has the weights of the embedding.
        condition_dim: size of the condition vector, which is added to every embedding by way of a linear map; 0 for none.
    """

    def __init__(
        self,
        num_tokens: int,
        length: int,
        num_layers: int,
        width: int,
        dropout: float,
        tied: bool,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(num_tokens=num_tokens, length=length, num_layers=num_layers, width=width)
        if not 0 <= dropout < 1:
            raise UserError(f"has a network with dropout={dropout}, which must be at least 0 and below 1")
        self.num_tokens = num_tokens
        self.tokens = nn.Embedding(num_tokens, width)
        self.condition = nn.Linear(condition_dim, width, bias=False) if condition_dim else None
        between = dropout if num_layers > 1 else 0.0  # torch warns of dropout between layers where there is one
        self.lstm = nn.LSTM(width, width, num_layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_tokens)
        self._initialize()
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        """Tokens `(B, T)` and features `(B, condition_dim)` or None to logits `(B, T, V)`."""
        return self.head(self.dropout(self.lstm(self._embedded(tokens, condition))[0]))

    def begin(self, batch_size: int) -> State:
        zeros = self.head.weight.new_zeros(self.lstm.num_layers, batch_size, self.lstm.hidden_size)
        return zeros, zeros

    def step(self, token: Tensor, state: State, condition: Tensor | None = None) -> tuple[Tensor, State]:
        return self.read(token[:, None], state, condition)

    def read(self, tokens: Tensor, state: State, condition: Tensor | None = None) -> tuple[Tensor, State]:
        out, state = self.lstm(self._embedded(tokens, condition), state)
        return self.head(self.dropout(out[:, -1])), state

    def _embedded(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
        x = self.tokens(tokens)
        if self.condition is not None:
            assert condition is not None, "a conditional model needs class labels"
            x = x + self.condition(condition.to(x.dtype))[:, None]
        return self.dropout(x)

    @torch.no_grad()
    def _initialize(self) -> None:
        nn.init.normal_(self.tokens.weight, std=self.tokens.embedding_dim**-0.5)  # also of a tied last layer
        for name, bias in self.lstm.named_parameters():
            if name.startswith("bias_ih"):  # the other bias of the same gates begins at zero
                _, forget, _, _ = bias.chunk(4)
                nn.init.zeros_(bias)
                forget.fill_(1.0)
            elif name.startswith("bias_hh"):
                nn.init.zeros_(cast(Tensor, bias))
