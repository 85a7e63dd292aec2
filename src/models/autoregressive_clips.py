"""Autoregressive models of clips of sound: thousands of tokens of which a training step sees a stretch.

A clip of a second has 8,000 tokens, many of them the silence that it was padded with. So a training step predicts a
stretch of each clip or a few, at places drawn anew, and mostly where something was recorded. A stretch of S tokens is
drawn from all that touch the region of N tokens that it is for, and there are N + S - 1 of them; each token of the region
lies in S of these, so that (N + S - 1) / (S N) times the sum over those that a stretch holds has the mean over the region
as its expectation. Tokens just before a stretch are read and not predicted, so that no prediction is learned from less
than it will be made from. That no network sees more than its context is also how clips are drawn and scored:

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

_ENDING = 1 / 8  # of a stretch: the silence behind a recording that counts as a part of it, to learn where sounds end
_SILENT_SHARE = 1 / 16  # of the training loss, of the silence behind that


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
        if spec.tokenizer is not None:
            raise UserError(
                f"is of clips; data={spec.name} gives windows of a text (choose model=transformer or model=lstm)"
            )
        length = max(1, min(window, spec.num_dims - 1))
        super().__init__(spec, lambda **sizes: network(**(sizes | {"length": length})), sampling, conditional)
        self._window = length
        is_whole = length == spec.num_dims - 1
        self._context = 0 if is_whole else context  # a whole clip has no tokens before it
        self._num_windows = num_windows
        self._require_fit(is_whole)
        if self.network.max_length is not None:
            self.stride = self._window - self._context

    def _require_fit(self, is_whole: bool) -> None:
        seen, longest = getattr(self.network, "receptive_field", None), self.network.max_length
        if is_whole:
            return
        if seen is not None and self._context < seen - 1:
            raise UserError(
                f"model.context={self._context} must be at least {seen - 1}, the network's receptive field less 1, or it "
                "would learn from less than it predicts from (set it, with a larger model.window, or network.num_layers)"
            )
        if longest is not None and longest != self._window:
            raise UserError(
                f"model.window={self._window} is not the {longest} positions of the network: it would be drawn from and "
                f"judged by what it has not learned (set model.window={longest})"
            )

    @property
    def objective(self) -> str:
        of = "of x given its class" if self.is_conditional else "of x"
        return f"- log p(x_t | x_0 .. x_(t-1)), mean over the tokens that were recorded, {of}"

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        """Nats per token of all that was recorded; in training an estimate without bias, by stretches at random places, of
        it and a small share of silence. Dropout, where the network has it, draws from torch's own generator."""
        lengths = self._lengths(batch.x)
        if not self.training:
            end = int(lengths.max())
            nats = -self.token_log_probs(batch.x[:, :end], batch.condition)[:, 1:]
            is_recorded = torch.arange(1, end, device=nats.device) < lengths[:, None]
            return {"loss": (nats * is_recorded).sum(1) / (lengths - 1)}
        starts, weights = self._stretches(lengths, generator or fresh_noise())
        x = batch.x.repeat_interleave(self._num_windows, 0)
        condition = None if batch.condition is None else batch.condition.repeat_interleave(self._num_windows)
        place = starts.flatten()[:, None] + torch.arange(self._window + 1, device=starts.device)
        nats = -self.log_probs(x.gather(1, place), condition)
        loss = (nats * weights.flatten(0, 1)).sum(1)
        return {"loss": loss.view(len(batch), -1).mean(1)}

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
        """How many tokens of each clip were recorded, `(B,)`; at least 2, the first of which is not predicted."""
        if self._spec.sound is None:
            return torch.full((len(x),), x.shape[1], device=x.device)
        return recorded_lengths(x).clamp(min=2)

    def _stretches(self, lengths: Tensor, generator: Noise) -> tuple[Tensor, Tensor]:
        """Where the windows of clips with so many recorded tokens begin, `(B, W)` int64 for W windows a clip, and what the
        nats of each token but the first count for, `(B, W, window)`.

        The sum of these products has the expectation (1 - a) m_r + a m_s: m_r is the mean over the recording and the
        silence that ends it, m_s that over the silence behind, and a is 1/16, or 0 where there is none.
        """
        total, stretch = self._spec.num_dims, self._window - self._context
        where, which = generator.uniform((len(lengths), 2 * self._num_windows), like=self.first).chunk(2, 1)
        end = (lengths + int(_ENDING * stretch)).clamp(max=total)[:, None]
        if self._window == total - 1:
            place = torch.arange(1, total, device=lengths.device)
            of_silence = torch.where(end < total, _SILENT_SHARE / (total - end).clamp(min=1), 0.0)
            of_recording = torch.where(end < total, 1 - _SILENT_SHARE, 1.0) / (end - 1)
            weights = torch.where(place < end, of_recording, of_silence)[:, None].expand(-1, self._num_windows, -1)
            return torch.zeros_like(where, dtype=torch.int64), weights
        is_silent = (which < _SILENT_SHARE) & (end < total)
        low, high = torch.where(is_silent, end, 1), torch.where(is_silent, total, end)
        num_places = high - low + stretch - 1
        before = (
            low - stretch + (where * num_places).long().minimum(num_places - 1)
        )  # the stretch is of the tokens after it
        starts = (before - self._context).clamp(0, total - 1 - self._window)
        place = starts[..., None] + torch.arange(1, self._window + 1, device=starts.device)
        first, last = torch.maximum(before + 1, low)[..., None], torch.minimum(before + stretch, high - 1)[..., None]
        each = num_places / (stretch * (high - low))
        return starts, ((place >= first) & (place <= last)) * each[..., None]
