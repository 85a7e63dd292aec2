"""Autoregressive models: the probability of a sequence of tokens, exactly, as a product over its places.

    p(x | c) = p(x_0 | c) prod_t p(x_t | x_0 .. x_{t-1}, c)

The first factor is the frequency of the first token in the training data, each token counted once more than it occurs. So
the network needs no token that stands for the beginning, and an example of T + 1 tokens gives T predictions, as in nanoGPT:
inputs 0 .. T-1, targets 1 .. T. What tokens are (characters, byte pairs, samples of sound) is the data's matter; how the
next one is predicted is the network's.

A network is called as `network(num_tokens=V, length=T, condition_dim=C)` and must then do what `NextTokenNetwork` says
(`src.networks.causal.CausalNetwork` is a base): give logits `(B, T, V)` for tokens `(B, T)`, and be readable token by token
with a state, so that drawing costs one evaluation for each token.

References:
    Bengio, Ducharme, Vincent, Janvin 2003, "A neural probabilistic language model", JMLR 3.
    Graves 2013, "Generating sequences with recurrent neural networks", arXiv:1308.0850.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.core.batch import Batch
from src.core.errors import UserError
from src.core.protocols import StartsFromWeights, Terms
from src.core.rng import Noise, fresh_noise
from src.core.spec import DataSpec
from src.core.tokens import TokenChoice
from src.samplers.autoregressive import chosen_logits, continue_tokens, draw_tokens

__all__ = ["Autoregressive"]


_LOGITS_AT_A_TIME = 2**26  # in the likelihood of examples without gradients, 256 MB in float32 and again as much


class Autoregressive(nn.Module):
    """A distribution of sequences of tokens.

    Args:
        spec: the data: tokens, `(T + 1,)` in an example.
        network: called as `network(num_tokens=, length=, condition_dim=)`, see above.
        sampling: how samples are drawn; the likelihood is always that of the network's own distribution.
        conditional: give the class to the network.
    """

    first: Tensor
    stride = 1  # of what the network sees of more tokens than fit into it, see `continue_tokens`

    def __init__(
        self,
        spec: DataSpec,
        network: Callable[..., nn.Module],
        sampling: TokenChoice,
        conditional: bool,
    ) -> None:
        super().__init__()
        spec.require_modality("tokens")
        if conditional:
            spec.require_classes()
        if spec.num_dims < 2:
            raise UserError(f"needs at least 2 tokens in an example; data={spec.name} gives {spec.num_dims}")
        assert spec.values.levels is not None
        self.is_conditional = conditional
        self.num_tokens = spec.values.levels
        self.num_evaluations = 0  # of the network for one token of one sample
        self._spec = spec
        self.sampling = sampling
        condition_dim = spec.num_classes if conditional else 0
        self.network: Any = network(num_tokens=self.num_tokens, length=spec.num_dims - 1, condition_dim=condition_dim)
        # log p(x_0 | c), a row for each class, one without
        frequencies = torch.full((max(1, condition_dim), self.num_tokens), 1 / self.num_tokens)
        self.register_buffer("first", frequencies.log())

    @property
    def objective(self) -> str:
        of = "of x given its class" if self.is_conditional else "of x"
        return f"- log p(x_t | x_0 .. x_(t-1)), mean over the {self._spec.num_dims - 1} predicted tokens, {of}"

    @property
    def max_context(self) -> int | None:
        return self.network.max_length

    def prepare(self, examples: Callable[[], Iterable[Batch]], *, generator: Noise) -> None:
        """Count the first tokens. A window of a text may begin at any token, so there all tokens count."""
        if isinstance(self.network, StartsFromWeights):
            self.network.load_weights()
        counts = torch.ones(self.first.shape, dtype=torch.float64)
        for batch in examples():
            x = batch.x.cpu()
            seen = x[:, :1] if self._spec.tokenizer is None else x[:, :-1]
            row = torch.zeros(len(x), dtype=torch.int64)
            if self.is_conditional:
                assert batch.condition is not None
                row = batch.condition.cpu()
            place = (row[:, None] * self.num_tokens + seen).flatten()
            counts += torch.bincount(place, minlength=counts.numel()).view_as(counts)
        self.first.copy_((counts / counts.sum(1, keepdim=True)).log())

    def loss(self, batch: Batch, *, generator: Noise | None = None) -> Terms:
        """Nats per predicted token; dropout, where the network has it, draws from torch's own generator."""
        return {"loss": -self.log_probs(batch.x, batch.condition).mean(1)}

    def log_probs(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        """See `PredictsTokens`. Without gradients, of as many rows at a time as there is room for their logits."""
        rows = len(tokens)
        if not torch.is_grad_enabled():
            rows = max(1, _LOGITS_AT_A_TIME // (max(1, tokens.shape[1] - 1) * self.num_tokens))
        if rows >= len(tokens):
            return self._log_probs(tokens, condition)
        labels = [None] * len(tokens) if condition is None else condition.split(rows)
        return torch.cat([self._log_probs(*some) for some in zip(tokens.split(rows), labels, strict=False)])

    def _log_probs(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
        logits = self.network(tokens[:, :-1], self._features(condition))
        return -F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view_as(tokens[:, 1:])

    def token_log_probs(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """See `ScoresTokens`."""
        return torch.cat([self._first(len(x), condition).gather(1, x[:, :1]), self.log_probs(x, condition)], 1)

    def log_prob(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        """Of whole examples, the first token included; exact."""
        return self.token_log_probs(x, condition).sum(1)

    def sample(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        prompt = torch.zeros(n, 0, dtype=torch.int64, device=self.first.device)
        return torch.stack(self.continue_(prompt, self._spec.num_dims, condition, generator=generator))

    @torch.no_grad()
    def continue_(
        self,
        prompt: Tensor,
        num_tokens: int,
        condition: Tensor | None = None,
        *,
        choice: TokenChoice | None = None,
        is_done: Callable[[Tensor], Tensor] | None = None,
        generator: Noise | None = None,
    ) -> list[Tensor]:
        """See `CanContinue`. Without a prompt the first token is drawn by its frequency, under the same choice."""
        assert num_tokens >= 1
        generator, choice = generator or fresh_noise(), choice or self.sampling
        drawn = prompt[:, :0]
        if not prompt.shape[1]:
            u = generator.uniform((len(prompt), 1), like=self.first)[:, 0]
            drawn = draw_tokens(chosen_logits(self._first(len(prompt), condition), choice, prompt), u)[:, None]
        begun = drawn.shape[1]
        has_ended = torch.zeros(len(prompt), dtype=torch.bool) if is_done is None or not begun else is_done(drawn)
        left = num_tokens - begun
        if not left or bool(has_ended.all()):
            return list(drawn)

        def count(num_tokens: int) -> None:
            self.num_evaluations += num_tokens

        rest = continue_tokens(
            self.network,
            torch.cat([prompt, drawn], 1),
            left,
            choice,
            generator,
            self._features(condition),
            is_done,
            stride=self.stride,
            num_drawn=begun,
            told=count,
        )
        rows = zip(drawn, rest, has_ended.tolist(), strict=True)
        return [row if is_over else torch.cat([row, more]) for row, more, is_over in rows]

    def settings(self) -> dict[str, Any]:
        return {"sampling": self.sampling.to_dict()}

    def _first(self, n: int, condition: Tensor | None) -> Tensor:
        """log p(x_0 | c) of every token, `(n, V)`."""
        if not self.is_conditional:
            return self.first.expand(n, -1)
        assert condition is not None, "a conditional model needs class labels"
        return self.first[condition]

    def _features(self, condition: Tensor | None) -> Tensor | None:
        return self._spec.one_hot(condition) if self.is_conditional else None
