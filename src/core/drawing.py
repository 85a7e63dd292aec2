"""Ways to look at what a model draws: samples, interpolations, one latent for all classes, mixed styles; with truncation.

References:
    Brock, Donahue, Simonyan 2019, arXiv:1809.11096: truncation of z.
    Karras, Laine, Aila 2019, "A style-based generator architecture for generative adversarial networks",
        arXiv:1812.04948: truncation of styles, and mixing them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from src.core.errors import NotApplicable, UserError
from src.core.latents import BetweenNoise, TruncatedNoise
from src.core.protocols import CanDecode, CanMixStyles
from src.core.rng import Noise, SampleNoise

__all__ = ["MixedStyles", "Sampler"]


@dataclass(frozen=True)
class MixedStyles:
    """Images whose styles come from two others.

    Args:
        fine: sources `(N, *event)` of the fine styles, a row each.
        coarse: sources `(N, *event)` of the coarse styles, a column each.
        mixed: `(N, N, *event)`.
    """

    fine: Tensor
    coarse: Tensor
    mixed: Tensor


class Sampler:
    """Draws from a model. Sample i depends on the seed and i alone; all that is drawn here is made of these samples.

    Args:
        model: with `CanSample`, in evaluation mode.
        num_classes: of the data.
        seed: of the noise.
        batch_size: drawn at a time; does not change what is drawn.
        condition: the class of all samples; None: the classes take turns. A model that is not conditional has none.
        truncation: None for none. Of a model with styles, psi: the styles are moved towards their mean over all classes,
            at 1 not at all, at 0 onto it, where the class is lost. Of another model whose z is N(0, I), the bound of a
            truncated normal: |z_i| <= truncation of every sample; an arc between two of them may leave this bound.

    Raises:
        NotApplicable: the model has neither styles nor such a z, and shall be truncated.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        seed: int,
        batch_size: int,
        condition: int | None = None,
        truncation: float | None = None,
    ) -> None:
        self._model = model
        self._num_classes = num_classes
        self._seed = seed
        self._batch_size = batch_size
        self._condition = condition
        self._like = next(model.parameters())
        self._has_styles = isinstance(model, CanMixStyles) and model.has_styles
        self._psi = truncation if self._has_styles else None
        self._bound = None if self._has_styles else truncation
        if self._bound is not None and not isinstance(model, CanDecode):
            raise NotApplicable("it has no z of N(0, I) to truncate, and no styles")

    def truncation_in_words(self, is_between: bool) -> str:
        """What the truncation does to samples, or to what is between two of them; empty without one."""
        if self._psi is not None:
            return f"styles at {self._psi:g} of their distance from the mean style"
        if self._bound is None:
            return ""
        whose = "z of the ends, not those between them," if is_between else "z"
        return f"{whose} of a normal distribution truncated to |z_i| <= {self._bound:g}"

    @torch.no_grad()
    def samples(self, n: int) -> Tensor:
        """Samples 0 .. n-1, `(n, *event)`."""
        return torch.cat([self._draw(self._labels(i), self._noise(i)) for i in self._parts(0, n)])

    def classes_of(self, n: int) -> Tensor | None:
        """The classes of samples 0 .. n-1, `(n,)`; None of a model that is not conditional."""
        labels = self._labels(range(n))
        return labels if self._model.is_conditional else None

    @torch.no_grad()
    def interpolations(self, n: int, num_steps: int) -> Tensor:
        """Rows on the arcs from the noise of sample r to that of sample n + r, `(n, num_steps, *event)`.

        All of a row are of the class of sample r. So it begins with sample r, and ends with what the noise of sample n + r
        gives in that class: with sample n + r itself if the model is not conditional, or both are of one class. Of a
        generator with noise besides z this noise, too, goes along its arc.
        """
        shares = [k / (num_steps - 1) for k in range(num_steps)]
        rows = [
            torch.stack([self._draw(self._labels(i), self._between(i, n, share)) for share in shares], 1)
            for i in self._parts(0, n)
        ]
        return torch.cat(rows)

    @torch.no_grad()
    def classes(self, n: int, num_classes: int) -> Tensor:
        """The noise of sample r for each of the first classes, a row each, `(n, num_classes, *event)`."""
        if not self._model.is_conditional:
            raise NotApplicable("it is not conditional, so there are no classes to ask it for")
        rows = [
            torch.stack([self._draw(self._same(i, k), self._noise(i)) for k in range(num_classes)], 1)
            for i in self._parts(0, n)
        ]
        return torch.cat(rows)

    @torch.no_grad()
    def mixed_styles(self, n: int, crossover: int | None) -> MixedStyles:
        """Samples 0 .. n-1 give the fine styles, n .. 2n-1 the coarse ones, all with the generator's fixed noise.

        Args:
            crossover: the first layers, so many, have the coarse styles; None for half of the layers.
        """
        if not self._has_styles:
            raise NotApplicable("its generator has no styles (as that of model=stylegan2 has)")
        fine, coarse = self._styles(0, n), self._styles(n, 2 * n)
        num_layers = fine.shape[1]
        crossover = num_layers // 2 if crossover is None else crossover
        if crossover > num_layers:
            raise UserError(f"crossover={crossover} must be at most {num_layers}, the number of styles of this generator")
        columns = coarse[None, :, :crossover].expand(n, -1, -1, -1)
        rows = fine[:, None, crossover:].expand(-1, n, -1, -1)
        mixed = self._decode_styles(torch.cat([columns, rows], 2).flatten(0, 1))
        return MixedStyles(self._decode_styles(fine), self._decode_styles(coarse), mixed.unflatten(0, (n, n)))

    def _parts(self, start: int, end: int) -> Iterator[range]:
        for first in range(start, end, self._batch_size):
            yield range(first, min(end, first + self._batch_size))

    def _noise(self, index: range) -> Noise:
        noise = SampleNoise(self._seed, index.start)
        return noise if self._bound is None else TruncatedNoise(noise, self._bound)

    def _between(self, index: range, distance: int, share: float) -> Noise:
        ends = range(index.start + distance, index.stop + distance)
        return BetweenNoise(self._noise(index), self._noise(ends), share)

    def _labels(self, index: range) -> Tensor:
        """The classes asked for; a model that is not conditional does not look at them."""
        if self._condition is not None:
            return self._same(index, self._condition)
        return torch.arange(index.start, index.stop, device=self._like.device) % max(1, self._num_classes)

    def _same(self, index: range, condition: int) -> Tensor:
        return torch.full((len(index),), condition, device=self._like.device)

    def _draw(self, labels: Tensor, noise: Noise) -> Tensor:
        condition = labels if self._model.is_conditional else None
        if self._psi is None:
            return self._model.sample(len(labels), condition, generator=noise)
        return self._model.decode_styles(self._styles_of(labels, noise), generator=noise)

    def _styles(self, start: int, end: int) -> Tensor:
        """The styles of samples start .. end-1, `(end - start, num_layers, style_dim)`."""
        return torch.cat([self._styles_of(self._labels(i), self._noise(i)) for i in self._parts(start, end)])

    def _styles_of(self, labels: Tensor, noise: Noise) -> Tensor:
        assert isinstance(self._model, CanMixStyles)
        z = noise.normal((len(labels), self._model.latent_dim), like=self._like)
        return self._model.styles(z, labels if self._model.is_conditional else None, truncation=self._psi)

    def _decode_styles(self, styles: Tensor) -> Tensor:
        return torch.cat([self._model.decode_styles(some) for some in styles.split(self._batch_size)])
