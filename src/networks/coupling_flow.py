"""A multi-scale coupling flow for images: from data to N(0, I) in the shape of the image, with its log determinant.

Every scale squeezes 2x2 pixels into four channels and couples: of two groups of channels one is left as it is and gives
a scale and a shift for the other,

    y_b = (x_b + t(x_a)) exp(s(x_a)),    log |det| = sum s(x_a),

so nothing has to be inverted but this. After the squeeze the checkerboard of the pixels is a grouping of channels, so all
couplings are of one kind, at a quarter of the pixels. Between two scales one half of the channels is finished: one more
coupling standardizes it given the other half, as a learned prior does. The other half goes on.

References:
    Dinh, Sohl-Dickstein, Bengio 2017, "Density estimation using Real NVP", arXiv:1605.08803: masks, squeeze, scales, and
        log scales bounded by a tanh times a learned factor.
    Kingma, Dhariwal 2018, "Glow: generative flow with invertible 1x1 convolutions", arXiv:1807.03039: the learned prior,
        and last layers that begin at zero.
    Ho et al. 2019, "Flow++", arXiv:1902.00275: gated convolutions as conditioners.
"""

from collections.abc import Iterator, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.core.errors import UserError, require_sizes
from src.core.shapes import append_condition, sum_event

__all__ = ["Coupling", "CouplingFlow", "GatedConvNet", "channel_groups"]


class GatedConvNet(nn.Module):
    """Residual blocks h + a sigmoid(b) of 3x3 convolutions, with an output that begins at zero.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        width: channels in between.
        num_blocks: residual blocks.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 2 * width, 1))
            for _ in range(num_blocks)
        )
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)
        for weight in self.last.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` to `(B, out_channels, H, W)`."""
        h = self.first(x)
        for block in self.blocks:
            h = h + F.glu(block(h), dim=1)
        return self.last(F.silu(h))


class Coupling(nn.Module):
    """Changes some channels by a scale and a shift that depend on the others. The identity as it begins.

    Args:
        is_changed: for each channel of x whether it is changed.
        width, num_blocks: of the conditioner.
        given_dim: further channels that the conditioner sees.
    """

    _order: Tensor
    _back: Tensor

    def __init__(self, is_changed: Sequence[bool], width: int, num_blocks: int, given_dim: int) -> None:
        super().__init__()
        changed = [i for i, change in enumerate(is_changed) if change]
        kept = [i for i, change in enumerate(is_changed) if not change]
        order = torch.tensor(kept + changed)
        self._sizes = (len(kept), len(changed))
        self.register_buffer("_order", order, persistent=False)
        self.register_buffer("_back", order.argsort(), persistent=False)
        self.network = GatedConvNet(len(kept) + given_dim, 2 * len(changed), width, num_blocks)
        self.log_bound = nn.Parameter(torch.zeros(len(changed), 1, 1))  # of the log scales

    def forward(self, x: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """x `(B, C, H, W)` and what else is given `(B, K, H, W)`, to y, same shape, and log |det dy/dx|, `(B,)`."""
        kept, changed = x[:, self._order].split(self._sizes, dim=1)
        log_scale, shift = self._scale_and_shift(kept, given)
        y = torch.cat([kept, (changed + shift) * log_scale.exp()], 1)
        return y[:, self._back], sum_event(log_scale)

    def inverse(self, y: Tensor, given: Tensor | None) -> Tensor:
        """x of y, same shape."""
        kept, changed = y[:, self._order].split(self._sizes, dim=1)
        log_scale, shift = self._scale_and_shift(kept, given)
        return torch.cat([kept, changed * (-log_scale).exp() - shift], 1)[:, self._back]

    def _scale_and_shift(self, kept: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        raw, shift = self.network(kept if given is None else torch.cat([kept, given], 1)).chunk(2, dim=1)
        bound = self.log_bound.exp()
        return bound * torch.tanh(raw / bound), shift


class _Scale(nn.Module):
    """Squeeze, couplings, and half of the channels on to the next scale, if there is one.

    Args:
        channels: of the input.
        widths: of the conditioners, for this scale and those after it.
        num_couplings: couplings of each scale.
        num_blocks: residual blocks of each conditioner.
        context_channels: channels of the context.
        condition_dim: size of the condition vector.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        num_couplings: int,
        num_blocks: int,
        context_channels: int,
        condition_dim: int,
    ) -> None:
        super().__init__()
        given_dim = 4 * context_channels + condition_dim
        groups = islice(cycle(channel_groups(channels)), num_couplings)
        self.couplings = nn.ModuleList(Coupling(group, widths[0], num_blocks, given_dim) for group in groups)
        self.inner = None
        if len(widths) > 1:
            finished = [i >= 2 * channels for i in range(4 * channels)]  # the lower sub-pixels
            self.prior = Coupling(finished, widths[0], num_blocks, given_dim)
            rest = (num_couplings, num_blocks, 4 * context_channels, condition_dim)
            self.inner = _Scale(2 * channels, widths[1:], *rest)

    def forward(self, x: Tensor, condition: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
        h, given, context = self._squeezed(x, condition, context)
        log_det = x.new_zeros(len(x))
        for coupling in self.couplings:
            h, more = coupling(h, given)
            log_det = log_det + more
        if self.inner is not None:
            h, more = self.prior(h, given)
            going_on, finished = h.chunk(2, dim=1)
            going_on, inner_log_det = self.inner(going_on, condition, context)
            h = torch.cat([going_on, finished], 1)
            log_det = log_det + more + inner_log_det
        return _unsqueeze(h), log_det

    def inverse(self, z: Tensor, condition: Tensor | None, context: Tensor | None) -> Tensor:
        h, given, context = self._squeezed(z, condition, context)
        if self.inner is not None:
            going_on, finished = h.chunk(2, dim=1)
            h = torch.cat([self.inner.inverse(going_on, condition, context), finished], 1)
            h = self.prior.inverse(h, given)
        for coupling in reversed(self.couplings):
            h = coupling.inverse(h, given)
        return _unsqueeze(h)

    def _squeezed(
        self, x: Tensor, condition: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x and the context with 2x2 pixels as channels, and all that the conditioners are given besides x."""
        x = _squeeze(x)
        context = None if context is None else _squeeze(context)
        planes = x[:, :0] if context is None else context
        given = append_condition(planes, condition)
        return x, given if given.shape[1] else None, context


class CouplingFlow(nn.Module):
    """All scales.

    Args:
        in_shape: `(C, H, W)`, H and W multiples of 2 to the number of scales.
        widths: channels of the conditioners, one number for each scale.
        num_couplings: couplings of each scale.
        num_blocks: residual blocks of each conditioner.
        context_channels: channels of an image that all conditioners see besides; 0 for none.
        condition_dim: size K of the condition vector; 0 for none.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        widths: Sequence[int],
        num_couplings: int,
        num_blocks: int,
        context_channels: int = 0,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(num_couplings=num_couplings, num_blocks=num_blocks)
        require_sizes(**{f"widths[{i}]": width for i, width in enumerate(widths)})
        _require_divisible(in_shape, len(widths))
        self.scales = _Scale(in_shape[0], widths, num_couplings, num_blocks, context_channels, condition_dim)

    def forward(self, x: Tensor, condition: Tensor | None = None, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z of x, same shape, and log |det dz/dx|, `(B,)` in nats.

        Args:
            x: `(B, C, H, W)`.
            condition: `(B, K)` or None.
            context: an image of the same size, `(B, context_channels, H, W)`, or None.
        """
        return self.scales(x, condition, context)

    def inverse(self, z: Tensor, condition: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """x `(B, C, H, W)` of z, same shape."""
        return self.scales.inverse(z, condition, context)


def channel_groups(channels: int) -> Iterator[list[bool]]:
    """Which of `4 channels` squeezed channels are changed: three ways to halve them, each followed by its opposite.

    First the checkerboard of the pixels, then the rows; last every other channel, or the columns if there is only one.
    """
    places = [(c, i // 2, i % 2) for i in range(4) for c in range(channels)]
    for group in (
        [(row + column) % 2 == 1 for _, row, column in places],
        [row == 1 for _, row, _ in places],
        [(c if channels > 1 else column) % 2 == 1 for c, _, column in places],
    ):
        yield group
        yield [not changed for changed in group]


def _squeeze(x: Tensor) -> Tensor:
    """2x2 pixels as channels: `(B, C, H, W)` to `(B, 4 C, H/2, W/2)`.

    Channel i C + c is channel c at row i // 2 and column i % 2 of the four pixels.
    """
    return F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)


def _unsqueeze(h: Tensor) -> Tensor:
    """Inverse of `_squeeze`."""
    return F.pixel_shuffle(h.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2)


def _require_divisible(shape: Sequence[int], num_scales: int) -> None:
    factor = 2**num_scales
    if len(shape) != 3 or num_scales < 1 or shape[1] % factor or shape[2] % factor:
        given = "x".join(str(n) for n in shape)
        raise UserError(
            f"has a coupling flow of {num_scales} scales, which takes images whose sides are multiples of {factor}; the "
            f"data set gives {given} (set as many network.widths as its sides can be halved, or choose model=flow)"
        )
