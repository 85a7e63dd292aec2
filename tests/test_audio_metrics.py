"""How sounds are judged: by their waveforms, whatever models see of them, beside round trips and codes that know little."""

import json
import math
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from src.core.errors import NotApplicable
from src.core.rng import Noise, SampleNoise
from src.core.sound import LOG_MEL, REPRESENTATIONS, Sound, mu_law_encode, recorded_lengths, stft_distance
from src.data.loading import ArrayData
from src.evaluation.protocol import evaluate
from src.metrics.bits_per_sample import BitsPerSample, bigram_bits, pair_counts, unigram_bits
from src.metrics.classifier_score import ClassifierScore
from src.metrics.condition_accuracy import ConditionAccuracy
from src.metrics.frechet import FrechetDistance
from src.metrics.metric import GRIFFIN_LIM, HELD_OUT, MU_LAW, NOISE, UNTRAINED
from src.metrics.reconstruction import PSNR
from src.metrics.sound_classifier import SoundExtractor
from src.metrics.spaces import DomainClassifier, PrincipalComponents
from src.metrics.spectral import LogMelDistance, STFTDistance, log_mel_distance
from src.metrics.store import Store
from src.models.classifier import Classifier
from src.networks.classifier import ConvClassifier
from src.sample_files import SampleFiles
from src.training.callbacks.sound_files import joined, mel_bytes, write_wav
from tests.commands import call
from tests.sounds import prepared, write_tones


class Repeats(nn.Module):
    """Draws, and rebuilds, the examples it was given; finds every token equally likely."""

    is_conditional = True

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x, requires_grad=False)

    def sample(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        assert condition is not None
        return torch.stack([self.x[int(k)] for k in condition])

    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return x

    def token_log_probs(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Like any level each, but sure of what a clip is padded with."""
        place = torch.arange(x.shape[1])
        return torch.where(place < recorded_lengths(x)[:, None], -math.log(256), 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tones(tmp_path_factory.mktemp("sounds") / "tones", per_class=80)


def data_of(folder: Path, representation: str) -> ArrayData:
    arrays = prepared(folder, folder.parent / "cache", representation=representation)
    return ArrayData(arrays, batch_size=8, eval_batch_size=20, num_workers=0, seed=0)


def judged(folder: Path, representation: str, metrics: dict) -> dict:
    data = data_of(folder, representation)
    sound = data.spec.sound
    first = {int(k): int(np.flatnonzero(data.arrays.splits["train"].y == k)[0]) for k in (0, 1)}
    index = torch.tensor([first[0], first[1]])
    batch = data.to_units(next(iter(data.held_out_loader("train", index))))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ConvClassifier(sound.mel_shape, 2, width=4, feature_dim=4)
    extractor = SoundExtractor("heard", network, sound.seen_as(LOG_MEL))
    return evaluate(
        model=Repeats(batch.x),
        untrained=None,
        model_name="repeats",
        data=data,
        metrics=metrics,
        classifier=lambda: extractor,
        store=Store(None),
        num_samples=40,
        batch_size=20,
        seed=0,
        about={},
    )


@pytest.fixture(scope="module")
def results(folder) -> dict[str, dict]:
    classifier = DomainClassifier()
    metrics = {
        "fd": FrechetDistance(classifier),
        "cs": ClassifierScore(classifier),
        "condition_accuracy": ConditionAccuracy(classifier),
        "fd_pca": FrechetDistance(PrincipalComponents(4)),
        "psnr": PSNR(),
        "bits": BitsPerSample(),
        "log_mel": LogMelDistance(None),
        "stft": STFTDistance([32, 64], 1e-3, None),
    }
    return {name: judged(folder, name, metrics) for name in REPRESENTATIONS}


@pytest.mark.parametrize("metric", ["fd", "cs", "condition_accuracy"])
def test_reference_rows_are_the_same_for_all_representations(results, metric):
    cards, rows = [], []
    for found in results.values():
        assert {HELD_OUT, NOISE, MU_LAW, GRIFFIN_LIM} == set(found[metric].anchors) - {UNTRAINED}
        rows.append({name: reading.value for name, reading in found[metric].anchors.items()})
        cards.append(found[metric].card)
    assert rows[0] == rows[1] == rows[2]
    assert cards[0] == cards[1] == cards[2]  # so that they stand in one column of a table
    assert cards[0]["quantisation"] == cards[0]["data_values"] == "waveforms of 16 bits"


def test_samples_are_heard_as_waveforms_so_that_representations_compare(results):
    values = {name: found["fd"].value for name, found in results.items()}
    scale = results["waveform"]["fd"].anchors[NOISE].value
    assert abs(values["mu_law"] - values["waveform"]) < 0.1 * scale
    assert abs(values["log_mel"] - values["waveform"]) < 0.5 * scale


@pytest.mark.parametrize("metric", ["log_mel", "stft"])
def test_a_perfect_reconstruction_is_as_far_off_as_its_representation(results, metric):
    found = {name: one[metric] for name, one in results.items()}
    anchors = found["waveform"].anchors
    assert {one.card["data_values"] for one in found.values()} == {"waveforms of 16 bits"}
    assert found["waveform"].value < 0.05 * anchors[MU_LAW].value + 0.01  # the place in the bin alone
    assert found["mu_law"].value == pytest.approx(anchors[MU_LAW].value, rel=1e-6)
    assert found["log_mel"].value == pytest.approx(anchors[GRIFFIN_LIM].value, rel=1e-3)
    assert anchors[NOISE].value > 5 * max(anchors[MU_LAW].value, anchors[GRIFFIN_LIM].value)


def test_what_is_of_images_is_not_of_sounds(results):
    for found in results.values():
        for name in ("fd_pca", "psnr"):
            assert isinstance(found[name], NotApplicable)
            assert "gives sound" in str(found[name])


def test_bits_per_sample_of_a_model_that_knows_nothing_are_8_and_yardsticks_know_more(results):
    found = results["mu_law"]["bits"]
    assert found.value == pytest.approx(8)
    assert found.interval == pytest.approx((8, 8))
    share = found.card["num_recorded"] / found.card["num_examples"] / 512
    assert 0.5 < share < 0.9
    assert found.parts["with_padding"] == pytest.approx(8 * share)
    readings = {name: reading.value for name, reading in found.anchors.items()}
    assert readings["uniform"] == 8
    assert readings["unigram"] < 8
    assert readings["bigram"] < 8  # of so few clips, in which most pairs never occur, not less than those of levels
    assert "levels of mu-law" in str(results["waveform"]["bits"])


def test_bits_of_yardsticks_are_those_of_their_counts():
    train, test = torch.tensor([[1, 1, 2, 1, 128, 128]]), torch.tensor([[1, 2, 128, 128]])
    counts = pair_counts(train, torch.tensor([4]))
    assert counts.sum() == 3
    assert (counts[1, 1], counts[1, 2], counts[2, 1]) == (1, 1, 1)
    single = {1: 3 / (3 + 256), 2: 2 / (3 + 256)}  # of what follows, each once more
    expected = -(math.log2(single[1]) + math.log2(single[2]))
    assert float(unigram_bits(test, counts)) == pytest.approx(expected)
    expected = -(math.log2(single[1]) + math.log2(2 / (2 + 256)))
    assert float(bigram_bits(test, counts)) == pytest.approx(expected)


def tones(loudness: float) -> Tensor:
    return loudness * torch.sin(0.7 * torch.arange(512))[None]


def test_distances_of_a_louder_sound_are_known():
    sound = Sound(4000, 512, LOG_MEL, 64, 32, 16, -60.0, 10.0)  # so low that nothing is clamped
    assert float(log_mel_distance(tones(0.1), tones(0.2), sound)) == pytest.approx(20 * math.log10(2), rel=1e-2)
    found = float(stft_distance(tones(0.1), tones(0.2), 64, 16, floor=1e-12))
    assert found == pytest.approx(1 + math.log(2), rel=1e-2)  # |X| once too much, and everywhere twice
    assert float(stft_distance(tones(0.1), tones(0.1), 64, 16, floor=1e-3)) == 0


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_a_classifier_hears_every_representation_as_the_same_log_mel(representation, folder):
    data = data_of(folder, representation)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(data.spec, lambda **sizes: ConvClassifier(width=4, feature_dim=4, **sizes), max_shift=2)
    assert model.in_shape == data.spec.sound.mel_shape
    batch = data.to_units(next(iter(data.train_dataloader())))
    assert model.loss(batch, generator=SampleNoise(0))["loss"].shape == (len(batch),)
    clips = torch.from_numpy(np.array(data.arrays.splits["val"].x[:3]))
    extractor = SoundExtractor("heard", model.eval().network, data.spec.sound.seen_as(LOG_MEL))
    held_out = data.to_units(next(iter(data.held_out_loader("val", torch.arange(3)))))
    tolerance = 0.1 if representation == "mu_law" else 1e-3
    torch.testing.assert_close(model.classify(held_out.x), extractor(clips)[1], rtol=0, atol=tolerance)


def test_wav_files_and_pictures_of_samples(folder, tmp_path):
    data = data_of(folder, "mu_law")
    x = data.to_units(next(iter(data.held_out_loader("test", torch.arange(4))))).x
    files = SampleFiles(tmp_path / "drawn", data.spec, lambda: data, is_of_run=False)
    assert files.write_samples(x, None, 2) == "grid.png"
    files.write_rows("reconstruction", x[:, None])
    names = sorted(file.name for file in (tmp_path / "drawn").iterdir() if not file.name.startswith("."))
    assert names == [*(f"{i:05d}.wav" for i in range(4)), "grid.png", "reconstruction.png", "reconstruction.wav"]
    with wave.open(str(tmp_path / "drawn" / "00001.wav")) as stream:
        assert (stream.getframerate(), stream.getnchannels(), stream.getnframes()) == (4000, 1, 512)
        heard = torch.from_numpy(np.frombuffer(stream.readframes(512), "<i2").copy()) / 32768
    assert torch.equal(mu_law_encode(heard), x[1])


def test_clips_are_joined_with_pauses_and_high_notes_are_above(tmp_path):
    sound = Sound(4000, 512, "waveform", 64, 32, 16, -16.0, 2.0)
    clips = torch.cat([tones(0.5), tones(0.25)])
    row = joined(clips, sound)
    assert row.shape == (512 + 1000 + 512,)
    assert torch.equal(row[-512:], clips[1])
    assert not row[512:-512].any()
    write_wav(tmp_path / "a.wav", row, 4000)
    t = torch.arange(512) / 4000
    low, high = (0.5 * torch.sin(2 * math.pi * hertz * t) for hertz in (150, 1800))
    loudest = mel_bytes(torch.stack([low, high])[:, None], sound)[:, 0].float().mean(2).argmax(1)
    assert loudest[0] > 12
    assert loudest[1] < 3


def tags_of(run: Path) -> dict[str, set[str]]:
    """What TensorBoard has to show and to play."""
    accumulators = [EventAccumulator(str(file)) for file in (run / "tensorboard").glob("events*")]
    for accumulator in accumulators:
        accumulator.Reload()
    return {kind: {tag for one in accumulators for tag in one.Tags()[kind]} for kind in ("audio", "images")}


def samples_of(file: Path) -> np.ndarray:
    with wave.open(str(file)) as stream:
        assert (stream.getframerate(), stream.getnchannels(), stream.getsampwidth()) == (4000, 1, 2)
        return np.frombuffer(stream.readframes(stream.getnframes()), "<i2").astype(float)


@pytest.mark.slow
def test_a_frozen_classifier_of_a_folder_judges_models_of_every_representation_and_their_sounds_are_heard(folder, tmp_path):
    sizes = ("sample_rate=4000", "length=512", "n_fft=64", "hop=32", "num_mels=16")
    data = ("data=audio_folder", f"data.path={folder}", f"data.cache={tmp_path}", *(f"data.{size}" for size in sizes))
    said = call("train", "experiment=classifier", *data, "trainer.max_steps=200", f"hydra.run.dir={tmp_path / 'run'}")
    assert "froze the classifier" in said.text
    for model in ("audio_vae", "audio_vae_mel", "wavenet", "transformer_mu_law", "flow_matching_mel"):
        short = ("trainer.max_steps=2", "metric=[cs]", "callback.light_evaluation.metrics=[]", "evaluation.num_samples=16")
        run = tmp_path / model
        said = call("train", f"model={model}", *data, *short, "callback.pictures.num_samples=4", f"hydra.run.dir={run}")
        assert said.code == 0, said.text
        found = json.loads((run / "results.json").read_text())["metrics"]["cs"]
        assert found["anchors"]["held_out"]["value"] > 1.5  # of two classes
        shown = {"samples", "reconstructions"} if "vae" in model else {"samples"}
        assert tags_of(run)["audio"] == shown
        assert tags_of(run)["images"] >= shown
        for name in shown:
            (file,) = (run / "samples").glob(f"{name}_epoch_*.wav")
            x = samples_of(file)
            assert len(x) == 4 * 512 + 3 * 1000
            assert (x != 0).mean() > 0.05
            assert (np.abs(x) >= 32767).mean() < 0.05
            assert list((run / "samples").glob(f"{name}_epoch_*.png"))
    said = call("compare", str(tmp_path))
    assert said.code == 0
    assert "is refused" not in said.text
    for model in ("wavenet", "transformer_mu_law"):
        drawn = tmp_path / f"drawn_{model}"
        call("sample", f"run={tmp_path / model}", "n=2", "condition=low", f"out={drawn}")
        assert sorted(file.name for file in drawn.glob("*.wav")) == ["00000.wav", "00001.wav"]
