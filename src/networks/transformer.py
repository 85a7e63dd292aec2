"""The Transformer of GPT-2 as a network of an autoregressive model.

Layer norm comes before attention and before the feed-forward part (pre-norm), positions are learned, attention is torch's
scaled dot product with a causal mask, and the last layer may share its weights with the embedding of tokens.

References:
    Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762.
    Radford et al. 2019, "Language models are unsupervised multitask learners" (GPT-2): pre-norm, and initial weights of
        standard deviation 0.02, divided by sqrt(2 L) for the last layers of the 2 L residual branches.
    Press, Wolf 2017, "Using the output embedding to improve language models", arXiv:1608.05859: tied weights.
    Karpathy 2022, nanoGPT, github.com/karpathy/nanoGPT: the form without biases.
"""

import math
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from src.core.errors import UserError, require_sizes
from src.networks.causal import CausalNetwork

__all__ = ["Transformer"]

_INITIAL_STD = 0.02

_FIRST_CAPACITY = 64  # tokens that a cache has room for in the beginning


@dataclass
class _Cache:
    """Keys and values of the tokens so far, each `(2, B, heads, room, width / heads)`, of each block.

    A step writes into them, so a state can be stepped from only once. To make a new tensor at every step would cost more
    than the network.
    """

    max_length: int
    length: int = 0
    blocks: list[Tensor] = field(default_factory=list)

    def extended(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a block after those of further tokens, `(B, heads, T, width / heads)` each."""
        end = self.length + k.shape[2]
        if block == len(self.blocks):
            self.blocks.append(k.new_empty(2, *k.shape[:2], self._room_for(end), k.shape[3]))
        if self.blocks[block].shape[3] < end:
            before = self.blocks[block]
            self.blocks[block] = k.new_empty(2, *k.shape[:2], self._room_for(2 * self.length), k.shape[3])
            self.blocks[block][:, :, :, : self.length] = before[:, :, :, : self.length]
        kept = self.blocks[block]
        kept[0, :, :, self.length : end] = k
        kept[1, :, :, self.length : end] = v
        return kept[0, :, :, :end], kept[1, :, :, :end]

    def _room_for(self, length: int) -> int:
        return min(self.max_length, max(length, _FIRST_CAPACITY))


class Transformer(CausalNetwork):
    """Logits of the next token by masked self-attention.

    Args:
        num_tokens: V.
        length: positions that are learned, and so the longest input.
        num_layers: blocks.
        num_heads: of attention in each block.
        width: of what the blocks add to; a multiple of num_heads. The feed-forward part is four times as wide.
        dropout: share of values set to zero in training: of the embedding, of attention weights and of what blocks add.
        bias: whether linear layers and layer norms have biases.
        tied: the last layer has the weights of the token embedding.
        condition_dim: size of the condition vector, which is added to every embedding by way of a linear map; 0 for none.
    """

    def __init__(
        self,
        num_tokens: int,
        length: int,
        num_layers: int,
        num_heads: int,
        width: int,
        dropout: float,
        bias: bool,
        tied: bool,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(num_tokens=num_tokens, length=length, num_layers=num_layers, num_heads=num_heads, width=width)
        if width % num_heads:
            raise UserError(f"has a network with width={width}, which must be a multiple of num_heads={num_heads}")
        if not 0 <= dropout < 1:
            raise UserError(f"has a network with dropout={dropout}, which must be at least 0 and below 1")
        self.max_length: int = length
        self.num_heads = num_heads
        self.num_tokens = num_tokens
        self.tokens = nn.Embedding(num_tokens, width)
        self.positions = nn.Embedding(length, width)
        self.condition = nn.Linear(condition_dim, width, bias=False) if condition_dim else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, num_heads, dropout, bias) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, num_tokens, bias=False)
        self._initialize(num_layers)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        """Tokens `(B, T)` and features `(B, condition_dim)` or None to logits `(B, T, V)`."""
        x = self._embedded(tokens, 0, condition)
        for i, block in enumerate(self.blocks):
            x = block(x, None, i)
        return self.head(self.norm(x))

    def begin(self, batch_size: int) -> _Cache:
        return _Cache(self.max_length)

    def state_size(self, length: int) -> int:
        return 2 * len(self.blocks) * self.tokens.embedding_dim * length

    def step(self, token: Tensor, state: _Cache, condition: Tensor | None = None) -> tuple[Tensor, _Cache]:
        return self.read(token[:, None], state, condition)

    def read(self, tokens: Tensor, state: _Cache, condition: Tensor | None = None) -> tuple[Tensor, _Cache]:
        assert not state.length or tokens.shape[1] == 1, "several tokens at once are read at the beginning only"
        x = self._embedded(tokens, state.length, condition)
        for i, block in enumerate(self.blocks):
            x = block(x, state, i)
        state.length += tokens.shape[1]
        return self.head(self.norm(x[:, -1])), state

    def _embedded(self, tokens: Tensor, start: int, condition: Tensor | None) -> Tensor:
        """What the first block sees of tokens that begin at the position `start`, `(B, T, width)`."""
        end = start + tokens.shape[1]
        assert end <= self.positions.num_embeddings, "the input is longer than the positions"
        x = self.tokens(tokens) + self.positions.weight[start:end]
        if self.condition is not None:
            assert condition is not None, "a conditional model needs class labels"
            x = x + self.condition(condition.to(x.dtype))[:, None]
        return self.dropout(x)

    def _initialize(self, num_layers: int) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=_INITIAL_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, _Block)
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=_INITIAL_STD / math.sqrt(2 * num_layers))


class _Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, width: int, num_heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self._num_heads = num_heads
        self._dropout = dropout
        self.norm_1 = nn.LayerNorm(width, bias=bias)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.norm_2 = nn.LayerNorm(width, bias=bias)
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.down = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor, past: _Cache | None, place: int) -> Tensor:
        """x `(B, T, width)` after what a cache has of this block, which is the one at a place; or at the beginning, without
        a cache. Behind earlier tokens T is 1."""
        q, k, v = self.qkv(self.norm_1(x)).unflatten(2, (3, self._num_heads, -1)).permute(2, 0, 3, 1, 4)
        is_first = past is None or not past.length
        if past is not None:
            k, v = past.extended(place, k, v)
        dropout = self._dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_first)
        x = x + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), self._dropout, self.training)
        hidden = F.gelu(self.up(self.norm_2(x)))
        return x + F.dropout(self.down(hidden), self._dropout, self.training)
