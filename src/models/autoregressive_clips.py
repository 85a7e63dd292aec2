"""Autoregressive models of clips of sound: thousands of tokens of which a training step sees a stretch.

A clip of a second has 8,000 tokens, many of them the silence that it was padded with. So a training step predicts a
stretch of each clip or a few, at places drawn anew, and mostly where something was recorded. The tokens just before a
stretch are read and not predicted, so that no prediction is learned from less than it will be made from. That no network
sees more than its context is also how clips are drawn and scored:

    p(x_t | x_0 .. x_(t-1))  is taken as  p(x_t | x_b .. x_(t-1))

where b is 0 as long as all tokens fit into the network, and then moves on by whole stretches, so that at least `context`
tokens are seen. A network of any length, as WaveNet, sees its whole receptive field everywhere. The likelihood is exactly
that of the distribution that samples are drawn from.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import UserError, require_at_least
from src.core.protocols import Terms
from src.core.rng import Noise, fresh_noise
from src.core.sound import recorded_lengths
from src.core.spec import DataSpec
from src.core.tokens import TokenChoice
from src.models.autoregressive import Autoregressive

__all__ = ["AutoregressiveClips"]

_ENDING = 1 / 8  # of a stretch: the silence behind a recording that its last one takes in, to learn where sounds end
_SILENT_SHARE = 1 / 16  # of the stretches, from anywhere in the silence


class AutoregressiveClips(Autoregressive):
    """A distribution of clips as tokens, learned from stretches of them.

    Args:
        spec: the data: tokens, `(T,)` in an example; of sounds those in mu-law.
        network: called as `network(num_tokens=, length=, condition_dim=)`, where the length is `window`, see
            `Autoregressive`.
        sampling: how samples are drawn; the likelihood is always that of the network's own distribution.
        conditional: give the class to the network.
        window: tokens that the network reads at a time in training, and at most if it has a longest input.
        context: the first tokens of a window, which are read and not predicted, except at the beginning of a clip; at least
            the receptive field of a network that has one, less 1.
        num_windows: of each clip in a training step.
    """

    def __init__(
        self,
        spec: DataSpec,
        network: Callable[..., nn.Module],
        sampling: TokenChoice,
        conditional: bool,
        window: int,
        context: int,
        num_windows: int,
    ) -> None:
        require_at_least("model.window", window, 2)
        require_at_least("model.context", context, 0)
        require_at_least("model.num_windows", num_windows, 1)
        if context >= window:
            raise UserError(f"model.context={context} must be smaller than model.window={window}, or nothing is predicted")
        length = max(1, min(window, spec.num_dims - 1))
        super().__init__(spec, lambda **sizes: network(**(sizes | {"length": length})), sampling, conditional)
        self._window = length
        self._context = context if window == length else 0  # a whole clip has no tokens before it
        self._num_windows = num_windows
        if self.network.max_length is not None:
            self.stride = self._window - self._context

    @property
    def objective(self) -> str:
        of = "of x given its class" if self.is_conditional else "of x"
        return f"- log p(x_t | x_0 .. x_(t-1)), mean over the predicted tokens that were recorded, {of}"

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        """Nats per predicted token: in training of stretches at random places of each clip; else of all that was
        recorded. Dropout, where the network has it, draws from torch's own generator."""
        lengths = self._lengths(batch.x)
        if not self.training:
            end = max(2, int(lengths.max()))
            nats = -self.token_log_probs(batch.x[:, :end], batch.condition)[:, 1:]
            place = torch.arange(1, end, device=nats.device)
            return {"loss": _mean_where(nats, place < lengths[:, None].clamp(min=2))}
        starts = self._starts(lengths, generator or fresh_noise()).flatten()
        offset = torch.arange(self._window + 1, device=starts.device)
        x = batch.x.repeat_interleave(self._num_windows, 0)
        condition = None if batch.condition is None else batch.condition.repeat_interleave(self._num_windows)
        nats = -self.log_probs(x.gather(1, starts[:, None] + offset), condition)
        is_predicted = (offset[:-1] >= self._context) | (starts[:, None] == 0)
        return {"loss": _mean_where(nats, is_predicted).view(len(batch), -1).mean(1)}

    def token_log_probs(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return torch.cat([self._first(len(x), condition).gather(1, x[:, :1]), self._rest(x, condition)], 1)

    def _rest(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """log p of all tokens of `(B, T)` but the first, `(B, T - 1)`, in blocks as they are drawn in."""
        num_inputs, limit = x.shape[1] - 1, self.network.max_length
        if not num_inputs:
            return self.first.new_zeros(len(x), 0)
        if limit is None or num_inputs <= limit:
            return self.log_probs(x, condition)
        found = []
        for begin in range(0, num_inputs - self._context, limit - self._context):
            nats = self.log_probs(x[:, begin : begin + limit + 1], condition)
            found.append(nats[:, self._context if begin else 0 :])
        return torch.cat(found, 1)

    def _lengths(self, x: Tensor) -> Tensor:
        """How many tokens of each clip were recorded, `(B,)`."""
        if self._spec.sound is None:
            return torch.full((len(x),), x.shape[1], device=x.device)
        return recorded_lengths(x)

    def _starts(self, lengths: Tensor, generator: Noise) -> Tensor:
        """Where the windows of clips with so many recorded tokens begin, `(B, num_windows)` int64.

        The stretch of predicted tokens is drawn from all that touch the recording. One that juts out is moved back to its
        end or to its beginning, so that both are seen as often as the rest.
        """
        stretch, last = self._window - self._context, self._spec.num_dims - 1 - self._window
        where, which = generator.uniform((len(lengths), 2 * self._num_windows), like=self.first).chunk(2, 1)
        end = lengths[:, None] + int(_ENDING * stretch)
        anywhere = (((end + stretch) * where).floor().long() - stretch).minimum(end - stretch)
        silent = lengths[:, None] + ((self._spec.num_dims - lengths[:, None]) * where).floor().long()
        stretches = torch.where(which < _SILENT_SHARE, silent, anywhere)
        return (stretches - self._context).clamp(0, last)


def _mean_where(values: Tensor, is_counted: Tensor) -> Tensor:
    """Mean over the counted places of each row, `(B,)`; every row has one."""
    return (values * is_counted).sum(1) / is_counted.expand_as(values).sum(1)
