"""Ways to look at what a model makes of given examples: reconstructions, draws from the posterior, completions, traversals.

References:
    Burda, Grosse, Salakhutdinov 2016, "Importance weighted autoencoders", arXiv:1509.00519: a dimension is active if its
        code varies with the example.
    Higgins et al. 2017, "beta-VAE", ICLR: traversals of the latents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import NotApplicable
from src.core.protocols import CanDecode, CanEncode, CanInpaint, CanReconstruct, CompletesOnePart, HasPosterior
from src.core.rng import Noise, SampleNoise

__all__ = ["Traversal", "Viewer", "half_mask"]

_REACH = 3.0  # standard deviations to both sides of a traversal
_NEXT_DRAW = 2**32  # from the noise of one draw of an example to that of the next one


@dataclass(frozen=True)
class Traversal:
    """What becomes of one example as one dimension of its latent changes.

    Args:
        x: `(num_rows, num_columns, *event)`, a dimension each row.
        dimensions: the number of each row's dimension.
    """

    x: Tensor
    dimensions: list[int]


class Viewer:
    """Shows a model given examples. What is random depends on the seed, the example's place and the draw's number alone.

    Args:
        model: in evaluation mode.
        seed: of the noise.
        batch_size: examples that are made at a time; does not change them.
    """

    def __init__(self, model: nn.Module, seed: int, batch_size: int) -> None:
        self._model = model
        self._seed = seed
        self._batch_size = batch_size

    @torch.no_grad()
    def reconstructions(self, batch: Batch) -> Tensor:
        """Each example before its reconstruction, `(n, 2, *event)`."""
        model = self._model
        if not isinstance(model, CanReconstruct):
            raise NotApplicable("it does not reconstruct (it has no CanReconstruct)")
        rebuilt = self._in_parts(lambda x, condition: model.reconstruct(x, condition), batch)
        return torch.stack([batch.x, rebuilt], 1)

    @torch.no_grad()
    def posterior_draws(self, batch: Batch, num_draws: int) -> Tensor:
        """Each example x before the means of p(x' | z) at draws z ~ q(z | x), `(n, 1 + num_draws, *event)`."""
        model = self._model
        if not isinstance(model, HasPosterior):
            raise NotApplicable("it has no posterior q(z | x) to draw from (as model=vae has)")

        def draw(x: Tensor, condition: Tensor | None, noise: Noise) -> Tensor:
            mean, log_var = model.posterior(x, condition)
            z = mean + (0.5 * log_var).exp() * noise.normal(tuple(mean.shape), like=mean)
            return model.decode(z, condition)

        return torch.cat([batch.x[:, None], self._repeatedly(draw, batch, num_draws)], 1)

    def own_mask(self) -> tuple[Tensor, str] | None:
        """The only values that the model takes as known, `(*event)` bool, and in words; None if it takes any."""
        model = self._model
        return (model.known_mask, model.known_in_words) if isinstance(model, CompletesOnePart) else None

    @torch.no_grad()
    def completions(self, batch: Batch, mask: Tensor, num_draws: int, blank: float) -> Tensor:
        """What is known of each example, completions of it, and the example, `(n, num_draws + 2, *event)`.

        Args:
            batch: n examples.
            mask: `(*event)`, True where a value is known.
            num_draws: completions of each.
            blank: stands where a value is not known.
        """
        model = self._model
        if not isinstance(model, CanInpaint):
            raise NotApplicable("it does not complete examples (it has no CanInpaint; model=flow_matching has)")

        def complete(x: Tensor, condition: Tensor | None, noise: Noise) -> Tensor:
            return model.inpaint(x, mask.expand_as(x), condition, generator=noise)

        known = torch.where(mask, batch.x, blank)
        return torch.cat([known[:, None], self._repeatedly(complete, batch, num_draws), batch.x[:, None]], 1)

    @torch.no_grad()
    def traversal(self, batch: Batch, num_rows: int, num_columns: int, condition: int | None = None) -> Traversal:
        """One latent dimension after another from -3 to 3, the others as they are.

        Of a model that encodes, the latent is the code of the first example, and the dimensions are those whose codes vary
        most over the examples, the most active first; steps are standard deviations of z ~ N(0, I), or where the model has
        no such z, of the codes about their mean. Of another model it is the noise of its first sample, and the dimensions
        are the first ones.

        Args:
            batch: examples.
            num_rows: dimensions, at most as many as there are.
            num_columns: values of each, odd for one in the middle.
            condition: the class of what is shown; None for that of the first example.
        """
        model = self._model
        if isinstance(model, CanEncode):
            codes = self._in_parts(lambda x, labels: model.encode(x, labels), batch)
            base, middle, spread = codes[0], codes.mean(0), codes.std(0, unbiased=False)
            dimensions = spread.argsort(descending=True, stable=True)[:num_rows].tolist()
        elif isinstance(model, CanDecode):
            base = SampleNoise(self._seed).normal((1, model.latent_dim), like=next(model.parameters()))[0]
            dimensions = list(range(min(num_rows, model.latent_dim)))
        else:
            raise NotApplicable("it has no latents to go along (neither CanEncode nor CanDecode)")
        if isinstance(model, CanDecode):
            middle, spread = torch.zeros_like(base), torch.ones_like(base)
        steps = torch.linspace(-_REACH, _REACH, num_columns, device=base.device, dtype=base.dtype)
        z = base.repeat(len(dimensions), num_columns, 1)
        for row, dimension in enumerate(dimensions):
            z[row, :, dimension] = middle[dimension] + spread[dimension] * steps
        labels = None if batch.condition is None else batch.condition[:1].expand(len(dimensions) * num_columns)
        if labels is not None and condition is not None:
            labels = torch.full_like(labels, condition)
        decoded = self._in_parts(lambda z, labels: model.decode(z, labels), Batch(z.flatten(0, 1), labels))
        return Traversal(decoded.unflatten(0, (len(dimensions), num_columns)), dimensions)

    def _repeatedly(self, make: Callable[[Tensor, Tensor | None, Noise], Tensor], batch: Batch, count: int) -> Tensor:
        """`make(x, condition, noise)` so many times of each example, `(n, count, *event)`."""
        places = torch.arange(len(batch))[:, None] + _NEXT_DRAW * torch.arange(count)
        parts = iter(places.flatten().split(self._batch_size))

        def with_noise(x: Tensor, condition: Tensor | None) -> Tensor:
            return make(x, condition, SampleNoise(self._seed, next(parts)))

        labels = None if batch.condition is None else batch.condition.repeat_interleave(count)
        return self._in_parts(with_noise, Batch(batch.x.repeat_interleave(count, 0), labels)).unflatten(0, (-1, count))

    def _in_parts(self, make: Callable[[Tensor, Tensor | None], Tensor], batch: Batch) -> Tensor:
        """`make(x, condition)` of all examples, some at a time."""
        parts = []
        for start in range(0, len(batch), self._batch_size):
            part = slice(start, start + self._batch_size)
            parts.append(make(batch.x[part], None if batch.condition is None else batch.condition[part]))
        return torch.cat(parts)


def half_mask(side: str, shape: tuple[int, ...]) -> Tensor:
    """True on one half of an image `(C, H, W)`: its "top", "bottom", "left" or "right" half, rounded down."""
    mask = torch.zeros(shape, dtype=torch.bool)
    _, height, width = shape
    halves = {
        "top": (slice(None), slice(0, height // 2), slice(None)),
        "bottom": (slice(None), slice(height - height // 2, height), slice(None)),
        "left": (slice(None), slice(None), slice(0, width // 2)),
        "right": (slice(None), slice(None), slice(width - width // 2, width)),
    }
    mask[halves[side]] = True
    return mask
