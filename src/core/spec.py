"""What a data set gives: the one place where shapes, value ranges and classes are written down.

A model reads its sizes from the `DataSpec`; nobody types a number twice. Raw arrays hold *levels* (uint8 integers
0 .. levels-1) or real numbers; everything outside a likelihood works in *data units*, which for images are [-1, 1].
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from src.core.errors import UserError
from src.core.sound import LOG_MEL, MU_LAW, WAVEFORM, Sound, from_pcm, from_waveform

__all__ = ["BINARY_DYNAMIC", "BINARY_STATIC", "CONTINUOUS", "DISCRETE", "DataSpec", "OwnUnits", "Values"]

BINARY_STATIC = "binary_static"  # each pixel drawn from Bernoulli(grey value) once and for all
BINARY_DYNAMIC = "binary_dynamic"  # drawn afresh each time a training example is seen; held-out data drawn once
DISCRETE = "discrete"  # integer levels, 256 of them for 8-bit images
CONTINUOUS = "continuous"  # real numbers, in [low, high] if they are bounded


@dataclass(frozen=True)
class Values:
    """The set that one value of an example comes from.

    Args:
        kind: one of `BINARY_STATIC`, `BINARY_DYNAMIC`, `DISCRETE`, `CONTINUOUS`.
        low: smallest value in data units (`-inf` if unbounded).
        high: largest value in data units.
        levels: number of distinct values, or None for continuous values.
    """

    kind: str
    low: float
    high: float
    levels: int | None

    @property
    def is_bounded(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def is_binary(self) -> bool:
        return self.kind in (BINARY_STATIC, BINARY_DYNAMIC)

    def describe(self) -> str:
        if self.kind == DISCRETE:
            return f"discrete values ({self.levels} levels)"
        if self.kind == CONTINUOUS:
            where = f"in [{self.low:g}, {self.high:g}]" if self.is_bounded else "without bounds"
            return f"continuous values {where}"
        return f"binary values ({self.kind.removeprefix('binary_')} binarization)"


@dataclass(frozen=True)
class OwnUnits:
    """The units that vectors came in, where they were standardized: x in data units is (own - shift) / scale.

    Args:
        columns: the name of each of D values.
        shift: D numbers, in own units.
        scale: D positive numbers, in own units.
        label: the name of the column of classes, or None without one.
    """

    columns: tuple[str, ...]
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    label: str | None = None

    @property
    def log_volume(self) -> float:
        """sum_i ln scale_i: a density in own units is exp(-log_volume) times that in data units."""
        return sum(math.log(scale) for scale in self.scale)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "OwnUnits":
        columns, shift, scale = (tuple(plain[key]) for key in ("columns", "shift", "scale"))
        return cls(columns, shift, scale, plain["label"])


@dataclass(frozen=True)
class DataSpec:
    """What one example of a data set is.

    Args:
        name: the data set's name, as in `data=NAME`.
        modality: "image", "vector", "tokens" or "audio".
        shape: event shape of one example, `(channels, height, width)` for images.
        values: what one value is.
        class_names: one name per class; empty if the data set has no labels.
        own_units: what the values were before they were standardized, if they were.
        tokenizer: what tokens of texts mean, as JSON (`core.tokens.Tokenizer.to_json`); None of tokens that are no text.
            A text example is a window that may begin anywhere in a text.
        sound: how the examples are clips of sound, if they are.
    """

    name: str
    modality: str
    shape: tuple[int, ...]
    values: Values
    class_names: tuple[str, ...] = ()
    own_units: OwnUnits | None = None
    tokenizer: str | None = None
    sound: Sound | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if there are no labels."""
        return len(self.class_names)

    @property
    def num_dims(self) -> int:
        """Number of values in one example."""
        return math.prod(self.shape)

    @property
    def log_scale(self) -> float:
        """What a log density in data units is larger by than in the data's own units, in nats; 0 if they are the same."""
        return 0.0 if self.own_units is None else self.own_units.log_volume

    def describe(self) -> str:
        size = "x".join(str(n) for n in self.shape)
        labels = f"{self.num_classes} classes" if self.num_classes else "no labels"
        sound = "" if self.sound is None else f", {self.sound.describe()}"
        return f"{self.modality} {size}, {self.values.describe()}, {labels}{sound}"

    def require_modality(self, *allowed: str) -> None:
        """Raise `UserError` unless this is one of the `allowed` modalities."""
        if self.modality not in allowed:
            wanted = " or ".join(allowed)
            how = "choose another with data="
            if self.sound is not None:
                others = {"audio": WAVEFORM, "tokens": MU_LAW, "image": LOG_MEL}
                fitting = " or ".join(others[some] for some in allowed if some in others)
                how = f"set data.representation={fitting}" if fitting else how
            raise UserError(f"takes {wanted} data; data={self.name} gives {self.modality} ({how})")

    def require_classes(self) -> None:
        """Raise `UserError` unless the examples carry class labels."""
        if not self.num_classes:
            raise UserError(
                f"needs labelled data; data={self.name} has no labels (for data=image_folder and data=audio_folder, put "
                "the files of each class in a folder of its own; or set model.conditional=false)"
            )

    def to_units(self, levels: Tensor) -> Tensor:
        """Integer levels 0 .. levels-1 to float32 data units, linearly onto [low, high]. Same shape.

        Values without levels are in data units already. Tokens are their numbers, int64.
        Clips of sound in 16 bits become what models see of them.
        """
        if self.sound is not None and levels.dtype == torch.int16:
            return from_waveform(from_pcm(levels), self.sound)
        if self.modality == "tokens":
            return levels.long()
        if self.values.levels is None:
            assert levels.is_floating_point()
            return levels
        assert not levels.is_floating_point()
        step = (self.values.high - self.values.low) / (self.values.levels - 1)
        return levels.float().mul_(step).add_(self.values.low)

    def to_levels(self, x: Tensor) -> Tensor:
        """Data units to integer levels 0 .. levels-1 (int64): clamp, then round. Inverse of `to_units`."""
        assert self.values.levels is not None
        if self.modality == "tokens":
            return x.long()
        unit = (x - self.values.low) / (self.values.high - self.values.low)
        return unit.clamp(0, 1).mul(self.values.levels - 1).round().long()

    def to_unit_interval(self, x: Tensor) -> Tensor:
        """Data units to [0, 1], linearly. Same shape and dtype."""
        return (x - self.values.low) / (self.values.high - self.values.low)

    def to_bytes(self, x: Tensor) -> Tensor:
        """Data units to uint8 0 .. 255, clamped and rounded: the one quantisation that pictures and metrics use."""
        assert self.values.is_bounded
        return self.to_unit_interval(x).clamp(0, 1).mul(255).round().byte()

    def to_own_units(self, x: Tensor) -> Tensor:
        """Vectors `(..., D)` in the units they came in, float64 in main memory; as they are if there are no others."""
        if self.own_units is None:
            return x
        scale, shift = (torch.tensor(v, dtype=torch.float64) for v in (self.own_units.scale, self.own_units.shift))
        return x.cpu().double() * scale + shift

    def squash(self, out: Tensor) -> Tensor:
        """A network's output onto the data's range: through a tanh if there is a range, else unchanged."""
        if not self.values.is_bounded:
            return out
        return self.values.low + (self.values.high - self.values.low) * 0.5 * (1 + torch.tanh(out))

    def one_hot(self, condition: Tensor | None) -> Tensor:
        """Class labels `(B,)` as vectors `(B, num_classes)`."""
        assert condition is not None, "a conditional model needs class labels"
        return F.one_hot(condition, self.num_classes)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; `from_dict` is the inverse."""
        plain = asdict(self)
        if self.own_units is None:
            del plain["own_units"]  # what is kept under the hash of a spec is found by it as before
        if self.sound is None:
            del plain["sound"]
        if self.tokenizer is None:
            del plain["tokenizer"]
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "DataSpec":
        return cls(
            name=plain["name"],
            modality=plain["modality"],
            shape=tuple(plain["shape"]),
            values=Values(**plain["values"]),
            class_names=tuple(plain["class_names"]),
            own_units=OwnUnits.from_dict(plain["own_units"]) if "own_units" in plain else None,
            tokenizer=plain.get("tokenizer"),
            sound=Sound(**plain["sound"]) if "sound" in plain else None,
        )

    def with_values(self, values: Values) -> "DataSpec":
        return replace(self, values=values)
