"""StyleGAN2 for small images: a generator that is told its style at every layer, and its discriminator.

    w   = mapping(z, c)                                     one style vector; every layer may be given another
    y_o = d_o sum_i w_oi * (s_i x_i)                        modulated convolution, s = A w + b
    d_o = (sum_ik (w_oik s_i)^2)^(-1/2)                     demodulation: unit variance in, unit variance out
    w_  = mean_w + psi (w - mean_w)                         truncation

There is no path length regularisation and no style mixing here: StyleGAN2-ADA trains small images without them (its
configuration `cifar`), with two mapping layers and a discriminator without residual connections.

References:
    Karras et al. 2018, "Progressive growing of GANs for improved quality, stability, and variation", arXiv:1710.10196
        (equalised learning rate, pixel norm, minibatch standard deviation).
    Karras, Laine, Aila 2019, "A style-based generator architecture for generative adversarial networks",
        arXiv:1812.04948 (mapping network, noise, truncation).
    Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN", arXiv:1912.04958 (StyleGAN2).
    Karras et al. 2020, "Training generative adversarial networks with limited data", arXiv:2006.06676 (StyleGAN2-ADA).
"""

import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from src.core.errors import require_sizes
from src.core.rng import Noise
from src.core.shapes import append_condition
from src.networks.convolutional import base_and_doublings, crop
from src.networks.resampling import downsample, smoothing_filter, stage_channels, upsample, with_even_sides

__all__ = [
    "StyleDiscriminator",
    "StyleGenerator",
    "append_minibatch_std",
    "equalize",
    "modulated_convolution",
    "pixel_norm",
]

_MAPPING_LR = 0.01  # learning rate of the mapping network, relative to the others' (Karras, Laine, Aila 2019)
_MOMENTUM = 0.995  # of the mean style, at each call in training mode
_EPS = 1e-8

_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)


class StyleGenerator(nn.Module):
    """A vector to an image by way of a style: a learnt constant, then modulated convolutions that double its side.

    Each side adds a picture of its own to the sum of the smaller ones. A side that is no power of two is cropped from the
    next larger one. In training mode `styles` moves `mean_style`, the running mean over all classes.

    Args:
        in_shape: `(D,)`.
        out_shape: `(C, S, S)`, S from 8 to 128.
        style_dim: length of a style vector.
        num_mapping_layers: layers of the mapping network: 2 for small images, 8 for large ones (StyleGAN2-ADA).
        width: channels next to the image; doubles with every halving of it.
        max_width: largest number of channels.
        condition_dim: size K of the condition; 0 for none.
    """

    mean_style: Tensor

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        style_dim: int,
        num_mapping_layers: int,
        width: int,
        max_width: int,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(width=width, max_width=max_width, style_dim=style_dim, num_mapping_layers=num_mapping_layers)
        base, num_doublings = base_and_doublings(out_shape)
        channels = stage_channels(width, max_width, num_doublings)[::-1]
        self.num_layers = 2 * len(channels)
        self._side = out_shape[-1]
        self.embedding = equalize(nn.Linear(condition_dim, style_dim)) if condition_dim else None
        widths = [math.prod(in_shape) + (style_dim if condition_dim else 0), *[style_dim] * num_mapping_layers]
        self.mapping = nn.ModuleList(
            equalize(nn.Linear(n_in, n_out), _MAPPING_LR) for n_in, n_out in itertools.pairwise(widths)
        )
        self.register_buffer("mean_style", torch.zeros(style_dim))
        self.constant = nn.Parameter(torch.randn(channels[0], base, base))
        convolutions = [_StyledConv(channels[0], channels[0], style_dim, base)]
        for i, (c_in, c_out) in enumerate(itertools.pairwise(channels)):
            side = base * 2 ** (i + 1)
            convolutions += [_StyledConv(c_in, c_out, style_dim, side, up=True), _StyledConv(c_out, c_out, style_dim, side)]
        self.convolutions = nn.ModuleList(convolutions)
        self.to_image = nn.ModuleList(_ToImage(c, out_shape[0], style_dim) for c in channels)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, D)` and a condition `(B, K)` or None, to `(B, C, S, S)`, with the fixed noise."""
        return self.synthesize(self.styles(z, condition), None)

    def styles(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """One style for all layers, of `(B, D)` and a condition `(B, K)` or None: `(B, num_layers, style_dim)`."""
        x = pixel_norm(z.flatten(1))
        if self.embedding is not None:
            assert condition is not None
            x = torch.cat([x, pixel_norm(self.embedding(condition.to(x.dtype)))], dim=1)
        for layer in self.mapping:
            x = _activate(layer(x))
        if self.training:
            with torch.no_grad():
                self.mean_style.lerp_(x.mean(0).to(self.mean_style.dtype), 1 - _MOMENTUM)
        return x[:, None].expand(-1, self.num_layers, -1)

    def truncate(self, styles: Tensor, psi: float) -> Tensor:
        """Styles `(..., style_dim)` pulled towards the mean style: psi = 1 changes nothing, psi = 0 gives the mean."""
        return self.mean_style + psi * (styles - self.mean_style)

    def synthesize(self, styles: Tensor, noise: Noise | None) -> Tensor:
        """The images `(B, C, S, S)` of styles `(B, num_layers, style_dim)`; without a `noise` the one drawn at build."""
        w = styles.unbind(1)
        x = self.convolutions[0](self.constant.expand(len(styles), -1, -1, -1), w[0], noise)
        image = self.to_image[0](x, w[1])
        for i, to_image in enumerate(self.to_image[1:], start=1):
            x = self.convolutions[2 * i - 1](x, w[2 * i - 1], noise)
            x = self.convolutions[2 * i](x, w[2 * i], noise)
            image = upsample(image) + to_image(x, w[2 * i + 1])
        return crop(image, self._side)


class StyleDiscriminator(nn.Module):
    """An image to one logit: convolutions that halve its side, the batch's spread as one more channel, two linear layers.

    A side that is odd on the way down is rounded up, the last row and column standing in for those that are missing.

    Args:
        in_shape: `(C, S, S)`, S from 8 to 128.
        out_shape: event shape of the output.
        width: channels next to the image; doubles with every halving of it.
        max_width: largest number of channels.
        minibatch_std_group: largest number of examples that the spread is over; 1 for none.
        residual: connections around the blocks; StyleGAN2 has them, StyleGAN2-ADA leaves them out for small images.
        condition_dim: size K of the condition, appended to the image as K constant planes; 0 for none.
    """

    is_equalized = True  # what is put on top of its features may follow

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        width: int,
        max_width: int,
        minibatch_std_group: int,
        residual: bool,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(width=width, max_width=max_width, minibatch_std_group=minibatch_std_group)
        base, num_halvings = base_and_doublings(in_shape)
        channels = stage_channels(width, max_width, num_halvings)
        last = self.num_features = channels[-1]
        self._group = minibatch_std_group
        self._out_shape = tuple(out_shape)
        self.from_image = equalize(nn.Conv2d(in_shape[0] + condition_dim, channels[0], 1))
        self.blocks = nn.Sequential(*(_Down(c_in, c_out, residual) for c_in, c_out in itertools.pairwise(channels)))
        self.convolution = equalize(nn.Conv2d(last + 1, last, 3, padding=1))
        self.linear = equalize(nn.Linear(last * base**2, last))
        self.head = equalize(nn.Linear(last, math.prod(out_shape)))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(B, C, S, S)` and a condition `(B, K)` or None, to `(B, *out_shape)`."""
        return self.head(self.features(x, condition)).unflatten(1, self._out_shape)

    def features(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """What the last layer sees of `(B, C, S, S)` and a condition `(B, K)` or None: `(B, num_features)`."""
        x = self.blocks(_activate(self.from_image(append_condition(x, condition))))
        x = _activate(self.convolution(append_minibatch_std(x, self._group)))
        return _activate(self.linear(x.flatten(1)))


class _StyledConv(nn.Module):
    """A modulated 3x3 convolution, noise, a bias and a leaky ReLU; `up` doubles the side before."""

    noise: Tensor

    def __init__(self, c_in: int, c_out: int, style_dim: int, side: int, up: bool = False) -> None:
        super().__init__()
        self._up = up
        self.affine = _affine(style_dim, c_in)
        self.convolution = equalize(nn.Conv2d(c_in, c_out, 3, bias=False))
        self.bias = nn.Parameter(torch.zeros(c_out, 1, 1))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise", torch.randn(side, side))

    def forward(self, x: Tensor, style: Tensor, noise: Noise | None) -> Tensor:
        x = modulated_convolution(x, self.convolution.weight, self.affine(style), demodulate=True, up=self._up)
        drawn = self.noise if noise is None else noise.normal((len(x), 1, *x.shape[2:]), like=x)
        return _activate(x + (self.noise_strength * drawn).to(x.dtype) + self.bias.to(x.dtype))


class _ToImage(nn.Module):
    """Features to the channels of an image: a modulated 1x1 convolution and a bias."""

    def __init__(self, c_in: int, c_out: int, style_dim: int) -> None:
        super().__init__()
        self.affine = _affine(style_dim, c_in)
        self.convolution = equalize(nn.Conv2d(c_in, c_out, 1, bias=False))
        self.bias = nn.Parameter(torch.zeros(c_out, 1, 1))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = modulated_convolution(x, self.convolution.weight, self.affine(style), demodulate=False)
        return x + self.bias


class _Down(nn.Module):
    """Two convolutions, the second of which halves the side (rounded up), and perhaps a connection around both."""

    def __init__(self, c_in: int, c_out: int, residual: bool) -> None:
        super().__init__()
        self.first = equalize(nn.Conv2d(c_in, c_in, 3, padding=1))
        self.second = equalize(nn.Conv2d(c_in, c_out, 3, stride=2))
        self.skip = equalize(nn.Conv2d(c_in, c_out, 1, bias=False)) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        x = with_even_sides(x)
        y = _activate(self.first(x))
        y = _activate(self.second(F.conv2d(y, smoothing_filter(y), padding=2, groups=y.shape[1])))
        return y if self.skip is None else (y + self.skip(downsample(x))) * math.sqrt(0.5)


def equalize(layer: _Layer, lr_multiplier: float = 1.0) -> _Layer:
    """Equalised learning rate: weights are kept as N(0, 1) and divided by sqrt(fan-in) at every use; biases start at 0.

    With a multiplier m the layer starts as it would without, and every step of an optimiser like Adam moves it m times as
    far: weights are kept as N(0, 1/m^2), and weights and biases multiplied by m at every use.
    """
    fan_in = layer.weight[0].numel()
    nn.init.normal_(layer.weight, 0.0, 1 / lr_multiplier)
    parametrize.register_parametrization(layer, "weight", _Scale(lr_multiplier / math.sqrt(fan_in)))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
        if lr_multiplier != 1:
            parametrize.register_parametrization(layer, "bias", _Scale(lr_multiplier))
    return layer


class _Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self._factor * x


def _affine(style_dim: int, num_channels: int) -> nn.Linear:
    """From a style to one factor a channel, one on average at the start."""
    layer = equalize(nn.Linear(style_dim, num_channels))
    nn.init.ones_(layer.bias)
    return layer


def pixel_norm(x: Tensor) -> Tensor:
    """`(B, D)` over its root mean square over D."""
    return x * (x.square().mean(1, keepdim=True) + _EPS).rsqrt()


def modulated_convolution(x: Tensor, weight: Tensor, style: Tensor, demodulate: bool, up: bool = False) -> Tensor:
    """A convolution with weights of its own for every example: `weight` with its input channels scaled by `style`.

    The activations are scaled instead of the weights (StyleGAN2, section 2.2), so that one convolution does for the batch.

    Args:
        x: `(B, I, H, W)`.
        weight: `(O, I, k, k)`, k odd.
        style: `(B, I)`.
        demodulate: divide by the norm of the scaled weights, in float32 at least.
        up: double the side, by a transposed convolution and the filter that takes out its checkerboard.

    Returns:
        `(B, O, H, W)`, or twice the side.
    """
    x = x * style[:, :, None, None].to(x.dtype)
    if up:
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        x = F.conv2d(x, 4 * smoothing_filter(x), padding=1, groups=x.shape[1])
    else:
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    if not demodulate:
        return x
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(style.dtype, torch.float32)
        power = F.linear(style.to(dtype).square(), weight.to(dtype).square().sum((2, 3)))
        norm = (power + _EPS).rsqrt()
    return x * norm[:, :, None, None].to(x.dtype)


def append_minibatch_std(x: Tensor, group: int) -> Tensor:
    """Append one constant plane that says how much the examples differ: `(B, C, H, W)` to `(B, C+1, H, W)`.

    It is the standard deviation over a group of neighbours in the batch, averaged over channels and pixels. There are as
    few groups as can be of at most `group` examples; they differ by one example at most.
    """
    groups = x.to(torch.promote_types(x.dtype, torch.float32)).tensor_split(-(-len(x) // group))
    stds = [(some.var(0, unbiased=False) + _EPS).sqrt().mean().expand(len(some)) for some in groups]
    of_each = torch.cat(stds).reshape(-1, 1, 1, 1)
    return torch.cat([x, of_each.expand(-1, 1, *x.shape[2:]).to(x.dtype)], dim=1)


def _activate(x: Tensor) -> Tensor:
    """Leaky ReLU that keeps the mean square of N(0, 1), nearly."""
    return math.sqrt(2) * F.leaky_relu(x, 0.2)
