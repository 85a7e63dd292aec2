"""One protocol for every model: the same seeds, the same quantisation, the same reference rows."""

import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from src.core.collectives import gather_to_first, num_ranks, own_rank
from src.core.errors import NotApplicable, UserError, require_at_least
from src.core.protocols import CanSample, HasSettings
from src.core.rng import SampleNoise, derive_seed, hash_bits
from src.core.sound import LOG_MEL, Sound, from_pcm, to_pcm, to_waveform
from src.core.spec import DataSpec
from src.data.loading import ArrayData
from src.evaluation.costs import SamplingMeter
from src.metrics.features import Extractor, ImageSet
from src.metrics.metric import HELD_OUT, MU_LAW, NOISE, UNTRAINED, Inputs, Measurement, Metric
from src.metrics.spectral import round_trips
from src.metrics.store import Store
from src.metrics.text import Text

__all__ = ["Drawn", "draw_samples", "draw_together", "evaluate", "require_protocol", "spread_classes"]

Drawn = list[tuple[Tensor, Tensor | None]] | NotApplicable
"""Batches of a model's samples as metrics see them (`_as_measured`), and the classes asked for; or why there are none."""

_DEFAULT_MAX_SAMPLES = 10_000
_CLIPS_AT_A_TIME = 100  # of sound
_SOFTWARE = ("torch", "torchmetrics", "torch-fidelity")


def evaluate(
    model: nn.Module,
    untrained: nn.Module | None,
    model_name: str,
    data: ArrayData,
    metrics: dict[str, Metric],
    classifier: Callable[[], Extractor],
    store: Store,
    num_samples: int | None,
    batch_size: int,
    seed: int,
    about: dict[str, Any],
    num_likelihood_examples: int | None = None,
    drawn: tuple[Drawn, Drawn] | None = None,
    meter: SamplingMeter | None = None,
) -> dict[str, Measurement | NotApplicable]:
    """Measure a model.

    Args:
        model: with the weights to measure; on any device.
        untrained: the same model as it was before training, for a reference row; None for no such row.
        model_name: as in `model=NAME`.
        data: the data set.
        metrics: what to measure, by name.
        classifier: gives the domain classifier, or raises `NotApplicable`; called only if a metric needs it.
        store: what was computed before.
        num_samples: samples drawn, and examples in every reference row if there are as many; None for as many as there are
            test examples, at most 10,000.
        batch_size: samples drawn at a time; it does not change them.
        seed: seed of the samples and of everything else that is random.
        about: what every card shall say of the model, e.g. which weights were measured.
        num_likelihood_examples: so many test examples, evenly spread, have their likelihood computed; None for all.
        drawn: the samples of the model and of the untrained one, if `draw_together` has drawn them.
        meter: told what the model's samples cost, if they are drawn here.
    """
    require_protocol(num_samples, batch_size, num_likelihood_examples)
    num_samples = _num_samples(data, num_samples)
    device = next(model.parameters()).device
    model.eval()
    is_measured = _is_measured(data.spec)
    labels = _data_classes(data, num_samples, seed)
    condition = None if labels is None else labels.to(device)
    draw = (data.spec, condition, num_samples, batch_size, seed)
    drawn_after, drawn_before = (None, None) if drawn is None else drawn
    generated = _generated(model, model_name, *draw, drawn_after, meter) if is_measured else _UNMEASURED
    anchors: dict[str, ImageSet] = {}
    if is_measured:
        anchors[HELD_OUT] = _split_images(data, "test", num_samples)
        anchors[NOISE] = _noise(data, labels, num_samples, batch_size, seed)
        if data.spec.sound is not None:
            anchors |= _round_trips(data.spec.sound, anchors[HELD_OUT])
    if untrained is not None and isinstance(generated, ImageSet):
        before = _generated(untrained.eval().to(device), f"the untrained {model_name}", *draw, drawn_before, None)
        anchors |= {UNTRAINED: before} if isinstance(before, ImageSet) else {}
    inputs = Inputs(
        model=model,
        model_name=model_name,
        device=device,
        spec=data.spec,
        test_batches=lambda: (data.to_units(batch.to(device)) for batch in data.held_out_loader("test")),
        seed=seed,
        generated=generated,
        reference=_split_images(data, "train", None),
        anchors=anchors,
        unseen=_split_images(data, "val", num_samples),
        density=data.arrays.density,
        stack=data.arrays.stack,
        num_likelihood_examples=num_likelihood_examples,
        classifier=functools.cache(classifier),
        store=store,
        text=_text(data),
        clips=None if data.spec.sound is None else data.arrays.splits["test"].x,
    )
    card = {
        "data": f"{data.spec.name}-{data.arrays.fingerprint[:12]}",
        "data_values": data.spec.values.describe(),
        "model": about | _classes_given(model) | _settings(model),
        "software": {name: version(name) for name in _SOFTWARE},
    }
    return {name: _measure(metric, inputs, card) for name, metric in metrics.items()}


def require_protocol(num_samples: int | None, batch_size: int, num_likelihood_examples: int | None = None) -> None:
    """Raise `UserError` for settings that no evaluation can have."""
    for key, count in (("num_samples", num_samples), ("num_likelihood_examples", num_likelihood_examples)):
        if count is not None and not isinstance(count, int):
            raise UserError(f"evaluation.{key}={count} must be a whole number, or null")
        require_at_least(f"evaluation.{key}", count, 2)
    require_at_least("evaluation.batch_size", batch_size, 1)


@torch.no_grad()
def draw_samples(
    model: CanSample,
    num_samples: int,
    batch_size: int,
    seed: int,
    condition: Tensor | None,
    turn: tuple[int, int] = (0, 1),
) -> Iterable[Tensor]:
    """Batches of samples in data units; sample i depends on the seed and i alone, not on the batch size.

    With turn = (i, n), the i-th batch (from 0) and every n-th from there.
    """
    for start in range(turn[0] * batch_size, num_samples, turn[1] * batch_size):
        n = min(batch_size, num_samples - start)
        part = None if condition is None else condition[start : start + n]
        yield model.sample(n, part, generator=SampleNoise(seed, start))


def spread_classes(spec: DataSpec, num_samples: int, device: torch.device) -> Tensor:
    """Class labels `(num_samples,)` that take turns, so that every class is asked for equally often."""
    return torch.arange(num_samples, device=device) % spec.num_classes


def draw_together(
    model: nn.Module,
    model_name: str,
    data: ArrayData,
    num_samples: int | None,
    batch_size: int,
    seed: int,
    meter: SamplingMeter | None = None,
) -> Drawn:
    """The samples that `evaluate` would draw, drawn by all processes of the run, which call this at the same time.

    They take turns in batches, so that each sample is drawn once and is, to the bit, that of a run on one device. Rank 0
    gets all of them, the others nothing. `meter` is told what this process's share costs.
    """
    if not _is_measured(data.spec):
        return _UNMEASURED
    if not isinstance(model, CanSample):
        return NotApplicable(f"{model_name} has no {CanSample.__name__}")
    num_samples = _num_samples(data, num_samples)
    labels = _data_classes(data, num_samples, seed) if model.is_conditional else None
    condition = None if labels is None else labels.to(next(model.parameters()).device)
    turn = (own_rank(), num_ranks())
    own = _drawn(model.eval(), model_name, data.spec, condition, num_samples, batch_size, seed, turn, meter)
    shares = gather_to_first(own)
    for share in shares:
        if isinstance(share, NotApplicable):
            return share
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


_MEASURED = ("image", "vector", "tokens")
_UNMEASURED = NotApplicable(f"only samples of {' or '.join((*_MEASURED, 'sound'))} data are measured so far")


def _is_measured(spec: DataSpec) -> bool:
    return spec.sound is not None or spec.modality in _MEASURED


def _as_measured(spec: DataSpec, x: Tensor) -> Tensor:
    """What metrics see of examples: images as bytes, sounds as waveforms of 16 bits, tokens as their numbers, vectors as
    they are, in float32."""
    if spec.sound is not None:
        return to_pcm(to_waveform(x, spec.sound))
    if spec.modality == "tokens":
        return x.long()
    return spec.to_bytes(x) if spec.modality == "image" else x.float()


def _text(data: ArrayData) -> Text | None:
    arrays, streams = data.arrays, data.arrays.streams
    if arrays.tokenizer is None or not streams:
        return None
    identity = {"fingerprint": arrays.fingerprint, "tokenizer": arrays.tokenizer.in_words}
    context = data.spec.num_dims - 1
    return Text(streams["train"], streams["test"], arrays.tokenizer, context, identity, arrays.text_sha256)


def _num_samples(data: ArrayData, num_samples: int | None) -> int:
    num_test = len(data.arrays.splits["test"])
    return min(num_test, _DEFAULT_MAX_SAMPLES) if num_samples is None else num_samples


def _drawn(
    model: CanSample,
    model_name: str,
    spec: DataSpec,
    condition: Tensor | None,
    num_samples: int,
    batch_size: int,
    seed: int,
    turn: tuple[int, int] = (0, 1),
    meter: SamplingMeter | None = None,
) -> Drawn:
    """The samples, of a conditional model for the classes `(num_samples,)`; `turn` as in `draw_samples`."""
    parts: list[tuple[Tensor, Tensor | None]] = []
    start = turn[0] * batch_size
    batches = draw_samples(model, num_samples, batch_size, seed, condition, turn)
    for x in batches if meter is None else meter.timed(batches):
        asked = (min(batch_size, num_samples - start), *spec.shape)
        if tuple(x.shape) != asked:
            return NotApplicable(f"{model_name} drew samples of the shape {tuple(x.shape)} where {asked} was asked for")
        if not x.isfinite().all():
            return NotApplicable(f"{model_name} drew samples that are not finite")
        labels = None if condition is None else condition[start : start + len(x)].cpu()
        parts.append((_as_measured(spec, x).cpu(), labels))
        start += turn[1] * batch_size
    return parts


def _generated(
    model: nn.Module,
    model_name: str,
    spec: DataSpec,
    condition: Tensor | None,
    num_samples: int,
    batch_size: int,
    seed: int,
    drawn: Drawn | None,
    meter: SamplingMeter | None,
) -> ImageSet | NotApplicable:
    """The model's samples as metrics see them, drawn when they are first asked for, and kept."""
    if not isinstance(model, CanSample):
        return NotApplicable(f"{model_name} has no {CanSample.__name__}")
    condition = condition if model.is_conditional else None

    @functools.cache
    def all_drawn() -> Drawn:
        if drawn is not None:
            return drawn
        return _drawn(model, model_name, spec, condition, num_samples, batch_size, seed, meter=meter)

    def images() -> list[tuple[Tensor, Tensor | None]]:
        parts = all_drawn()
        if isinstance(parts, NotApplicable):
            raise parts
        return parts

    return ImageSet(images, num_samples)


def _split_images(data: ArrayData, split: str, limit: int | None) -> ImageSet:
    """Real examples of a split, through the same quantisation as samples: all, or so many of them at random."""
    arrays = data.arrays.splits[split]
    count = len(arrays) if limit is None else min(limit, len(arrays))
    # not the first ones: a folder of images is sorted by class
    chosen = torch.randperm(len(arrays), generator=torch.Generator().manual_seed(derive_seed(0, 4)))[:count].sort().values

    def batches() -> Iterable[tuple[Tensor, Tensor | None]]:
        if data.spec.sound is not None:  # as they were recorded, whatever models see of them
            for index in chosen.split(_CLIPS_AT_A_TIME):
                y = None if arrays.y is None else torch.from_numpy(arrays.y[index.numpy()])
                yield torch.from_numpy(arrays.x[index.numpy()]), y
            return
        for batch in data.held_out_loader(split, chosen):
            some = data.to_units(batch)
            yield _as_measured(data.spec, some.x), some.condition

    def identity() -> dict[str, Any]:
        about = {"sha256": arrays.sha256, "split": split, "count": count}
        if data.spec.sound is not None:
            return about | {"clips": "16 bits"}
        return about | {"levels": data.arrays.source_levels, "spec": data.spec.to_dict()}

    return ImageSet(batches, count, identity)


def _classes_given(model: nn.Module) -> dict[str, str]:
    """A conditional model is told the classes, so their histogram comes free to it."""
    is_told = isinstance(model, CanSample) and model.is_conditional
    return {"classes": "given, as frequent as in the training data"} if is_told else {}


def _data_classes(data: ArrayData, num_samples: int, seed: int) -> Tensor | None:
    """Class labels `(num_samples,)` as frequent as in the training data; None without labels."""
    y = data.arrays.splits["train"].y
    if y is None:
        return None
    place = hash_bits(derive_seed(seed, 1), torch.arange(num_samples), 1).squeeze(1) % len(y)
    return torch.from_numpy(y)[place]


def _settings(model: nn.Module) -> dict[str, Any]:
    return {"settings": model.settings()} if isinstance(model, HasSettings) else {}


def _noise(data: ArrayData, labels: Tensor | None, num_samples: int, batch_size: int, seed: int) -> ImageSet:
    """Images of independent uniform bytes, clips of such numbers of 16 bits, points uniform in the box that the training
    points span, or uniform tokens."""
    if data.spec.sound is not None:
        return _noise_clips(data, labels, num_samples, batch_size, seed)
    makers = {"image": _noise_images, "vector": _noise_points, "tokens": _noise_tokens}
    return makers[data.spec.modality](data, labels, num_samples, batch_size, seed)


def _noise_images(data: ArrayData, labels: Tensor | None, num_samples: int, batch_size: int, seed: int) -> ImageSet:
    spec = data.spec

    def images(index: Tensor) -> Tensor:
        count = (spec.num_dims + 7) // 8
        words = hash_bits(derive_seed(seed, 2), index, count)
        return words.view(torch.uint8)[:, : spec.num_dims].reshape(-1, *spec.shape)

    about = {"noise": "uniform bytes", "shape": spec.shape, "count": num_samples, "seed": seed}
    return _noise_set(images, labels, num_samples, batch_size, about)


def _noise_clips(data: ArrayData, labels: Tensor | None, num_samples: int, batch_size: int, seed: int) -> ImageSet:
    assert data.spec.sound is not None
    length = data.spec.sound.length

    def clips(index: Tensor) -> Tensor:
        return hash_bits(derive_seed(seed, 2), index, (length + 3) // 4).view(torch.int16)[:, :length]

    about = {"noise": "uniform 16 bits", "length": length, "count": num_samples, "seed": seed}
    return _noise_set(clips, labels, num_samples, batch_size, about)


def _round_trips(sound: Sound, held_out: ImageSet) -> dict[str, ImageSet]:
    """Held-out clips by way of mu-law, and by way of a log-mel: what models of these cannot surpass."""
    ways = round_trips(sound)

    def through(name: str) -> ImageSet:
        def batches() -> Iterable[tuple[Tensor, Tensor | None]]:
            for clips, labels in held_out.batches():
                yield to_pcm(ways[name](from_pcm(clips))), labels

        settings = {"silence": "0"} if name == MU_LAW else asdict(sound.seen_as(LOG_MEL))
        return ImageSet(batches, held_out.count, lambda: {"of": held_out.identity, "round_trip": name, **settings})

    return {name: through(name) for name in ways}


def _noise_points(data: ArrayData, labels: Tensor | None, num_samples: int, batch_size: int, seed: int) -> ImageSet:
    x = data.arrays.splits["train"].x
    low, high = torch.from_numpy(x.min(0)), torch.from_numpy(x.max(0))

    def points(index: Tensor) -> Tensor:
        u = SampleNoise(derive_seed(seed, 2), int(index[0])).uniform((len(index), *low.shape), low)
        return low + (high - low) * u

    box = [low.tolist(), high.tolist()]
    about = {"noise": "uniform in a box", "box": box, "count": num_samples, "seed": seed}
    return _noise_set(points, labels, num_samples, batch_size, about)


def _noise_tokens(data: ArrayData, labels: Tensor | None, num_samples: int, batch_size: int, seed: int) -> ImageSet:
    spec, levels = data.spec, data.spec.values.levels
    assert levels is not None

    def tokens(index: Tensor) -> Tensor:
        return (hash_bits(derive_seed(seed, 2), index, spec.num_dims) % levels).reshape(-1, *spec.shape)

    about = {"noise": "uniform tokens", "levels": levels, "shape": spec.shape, "count": num_samples, "seed": seed}
    return _noise_set(tokens, labels, num_samples, batch_size, about)


def _noise_set(
    of: Callable[[Tensor], Tensor], labels: Tensor | None, num_samples: int, batch_size: int, about: dict[str, Any]
) -> ImageSet:
    """The noise `of(index)` of all indices 0 .. num_samples - 1, which come in order."""

    def batches() -> Iterable[tuple[Tensor, Tensor | None]]:
        for index in torch.arange(num_samples).split(batch_size):
            yield of(index), None if labels is None else labels[index]

    def identity() -> dict[str, Any]:
        of_labels = None if labels is None else hashlib.sha256(labels.numpy().tobytes()).hexdigest()
        return {**about, "labels": of_labels}

    return ImageSet(batches, num_samples, identity)


def _measure(metric: Metric, inputs: Inputs, card: dict[str, Any]) -> Measurement | NotApplicable:
    try:
        found = metric.measure(inputs)
    except NotApplicable as reason:
        return reason
    return replace(found, card=card | found.card)  # a metric may say more exactly what its data are
