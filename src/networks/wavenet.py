"""WaveNet: causal convolutions over tokens whose reach doubles with every layer.

Each layer sees its own input d samples back, with d = 1, 2, 4, ..., so L layers see 2^L samples; a stack of such layers can
be repeated. A gate tanh(a) sigmoid(b) takes the place of the ReLU, each layer adds to its input and, by a skip connection,
to what the head sees. To draw, every layer keeps the last d of its inputs in a queue, so that a new sample costs one
evaluation of each layer (Paine et al. 2016).

References:
    van den Oord, Dieleman, Zen, Simonyan, Vinyals, Graves, Kalchbrenner, Senior, Kavukcuoglu 2016, "WaveNet: a generative
        model for raw audio", arXiv:1609.03499.
    Paine, Khorrami, Chang, Zhang, Ramachandran, Hasegawa-Johnson, Huang 2016, "Fast WaveNet generation algorithm",
        arXiv:1611.09482.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.core.errors import UserError, require_sizes
from src.networks.causal import CausalNetwork

__all__ = ["WaveNet"]


@dataclass
class _State:
    """What a WaveNet keeps of the samples before: of each layer its last inputs, in a ring `(reach, B, width)`.

    A step writes into the rings, so a state can be stepped from only once.
    """

    rings: list[Tensor]
    position: int = 0
    of_condition: list[Tensor] = field(default_factory=list)  # what the class adds to each layer, `(B, 2 width)`


class WaveNet(CausalNetwork):
    """Logits of the next token from the `receptive_field` tokens up to this one.

    Args:
        num_tokens: V.
        length: the longest input in training; it has no effect on the weights.
        width: channels of the layers.
        skip_width: channels of what the head sees.
        num_layers: layers of a stack, the last of which looks 2^(num_layers - 1) samples back.
        num_stacks: stacks, one on the other.
        condition_dim: size of the condition vector, which is added before every gate by way of a linear map; 0 for none.
    """

    def __init__(
        self,
        num_tokens: int,
        length: int,
        width: int,
        skip_width: int,
        num_layers: int,
        num_stacks: int,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(num_tokens=num_tokens, length=length, width=width, skip_width=skip_width)
        require_sizes(num_layers=num_layers, num_stacks=num_stacks)
        if num_layers > 20:
            raise UserError(
                f"has a network with num_layers={num_layers}, of which the last would look 2^{num_layers - 1} back"
            )
        self.num_tokens = num_tokens
        self.tokens = nn.Embedding(num_tokens, width)
        dilations = [2**i for i in range(num_layers)] * num_stacks
        last = len(dilations) - 1  # nobody would see its output
        self.layers = nn.ModuleList(
            _Layer(width, skip_width, dilation, condition_dim, i < last) for i, dilation in enumerate(dilations)
        )
        self.hidden = nn.Linear(skip_width, skip_width)
        self.head = nn.Linear(skip_width, num_tokens)

    @property
    def receptive_field(self) -> int:
        """Tokens that the logits at a place depend on, that place's own included."""
        return 1 + sum(layer.dilation for layer in self._layers)

    @property
    def _layers(self) -> "list[_Layer]":
        return cast("list[_Layer]", list(self.layers))

    def forward(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        """Tokens `(B, T)` and features `(B, condition_dim)` or None to logits `(B, T, V)`."""
        x = self.tokens(tokens).movedim(2, 1)
        total = x.new_zeros(())
        for layer in self._layers:
            x, skip = layer(x, layer.of_condition(condition, x))
            total = total + skip
        return self._logits(total.movedim(1, 2))

    def begin(self, batch_size: int) -> _State:
        like = self.head.weight
        width = self.tokens.embedding_dim
        return _State([like.new_zeros(layer.dilation, batch_size, width) for layer in self._layers])

    def step(self, token: Tensor, state: _State, condition: Tensor | None = None) -> tuple[Tensor, _State]:
        x = self.tokens(token)
        if not state.of_condition:
            state.of_condition = [layer.of_condition(condition, x) for layer in self._layers]
        total = x.new_zeros(())
        for layer, ring, added in zip(self._layers, state.rings, state.of_condition, strict=True):
            place = state.position % layer.dilation
            before = ring[place].clone()
            ring[place] = x
            x, skip = layer.step(before, x, added)
            total = total + skip
        state.position += 1
        return self._logits(total), state

    def _logits(self, total: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(F.relu(total))))


class _Layer(nn.Module):
    """tanh(a) sigmoid(b) of the input now and `dilation` samples back, with a residual and a skip connection."""

    def __init__(self, width: int, skip_width: int, dilation: int, condition_dim: int, has_output: bool) -> None:
        super().__init__()
        self.dilation = dilation
        self.before = nn.Linear(width, 2 * width, bias=False)
        self.now = nn.Linear(width, 2 * width)
        self.condition = nn.Linear(condition_dim, 2 * width, bias=False) if condition_dim else None
        self.skip = nn.Linear(width, skip_width)
        self.out = nn.Linear(width, width) if has_output else None

    def of_condition(self, condition: Tensor | None, like: Tensor) -> Tensor:
        """What the class adds before the gate, `(B, 2 width)`; zero without one."""
        if self.condition is None:
            return like.new_zeros(1, 1)
        assert condition is not None, "a conditional model needs class labels"
        return self.condition(condition.to(like.dtype))

    def forward(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs `(B, width, T)` and what the class adds, to outputs and skips `(B, ..., T)`."""
        weight = torch.stack([self.before.weight, self.now.weight], 2)
        gates = F.conv1d(F.pad(x, (self.dilation, 0)), weight, self.now.bias, dilation=self.dilation)
        z = _gate(gates + added[:, :, None])
        skip = F.conv1d(z, self.skip.weight[:, :, None], self.skip.bias)
        return x if self.out is None else x + F.conv1d(z, self.out.weight[:, :, None], self.out.bias), skip

    def step(self, before: Tensor, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """The same at one place, from the inputs `(B, width)` there and `dilation` samples back."""
        z = _gate(self.before(before) + self.now(x) + added)
        return x if self.out is None else x + self.out(z), self.skip(z)


def _gate(x: Tensor) -> Tensor:
    """tanh(a) sigmoid(b) of the two halves of the channels."""
    a, b = x.chunk(2, dim=1)
    return a.tanh() * b.sigmoid()
