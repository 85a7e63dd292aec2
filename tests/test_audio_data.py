"""Folders of sound files and the spoken digits: what is read, what is done to it and said, and what is refused."""

import importlib.util
import logging
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import resample_poly

from src.core.errors import UserError
from src.core.sound import LOG_MEL, MU_LAW, REPRESENTATIONS, Sound, from_pcm, log_mel, mu_law_encode
from src.data.audio_folder import _clip, _Notes, _read
from src.data.fsdd import fsdd
from src.data.loading import ArrayData
from tests.sounds import RATE, SETTINGS, prepared, tone, write_tones, write_wav16

SOUND = ("representation", "sample_rate", "length", "n_fft", "hop", "num_mels", "log_low", "log_high")
DATA_ROOT = Path(os.environ.get("DATA_ROOT", "data"))
needs_soundfile = pytest.mark.skipif(
    importlib.util.find_spec("soundfile") is None, reason="the extra `audio` is not installed"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tones(tmp_path / "tones")


def loaded(arrays) -> ArrayData:
    return ArrayData(arrays, batch_size=4, eval_batch_size=4, num_workers=0, seed=0)


def test_a_folder_of_sounds_has_its_clips_classes_and_splits(folder, tmp_path):
    arrays = prepared(folder, tmp_path)
    assert arrays.spec.class_names == ("high", "low")
    assert arrays.spec.modality == "audio"
    assert arrays.spec.shape == (1, 512)
    assert {name: len(split) for name, split in arrays.splits.items()} == {"train": 8, "val": 4, "test": 4}
    for split in arrays.splits.values():
        assert split.x.dtype == np.int16
        frequency = np.abs(np.fft.rfft(split.x[:, :300])).argmax(1) * RATE / 300
        np.testing.assert_array_equal(frequency > 700, split.y == 0)
        assert not split.x[:, 380:].any()  # padded with silence


def test_models_see_one_recording_in_three_ways_and_it_is_prepared_once(folder, tmp_path):
    arrays = {name: prepared(folder, tmp_path, representation=name) for name in REPRESENTATIONS}
    assert len({one.fingerprint for one in arrays.values()}) == 1
    assert len(list(tmp_path.glob("audio_folder-*"))) == 1
    clips = from_pcm(torch.from_numpy(np.array(arrays["waveform"].splits["train"].x)))
    seen = {}
    for name, one in arrays.items():
        data = loaded(one)
        batches = [data.to_units(batch) for batch in data.held_out_loader("train")]
        seen[name] = torch.cat([batch.x for batch in batches])
        assert seen[name].shape == (8, *one.spec.shape)
    distance = seen["waveform"][:, 0] - clips
    assert distance.min() > 0
    assert distance.max() < 1 / 32768  # anywhere in the bin of the level
    assert torch.equal((seen["waveform"][:, 0] * 32768).floor(), clips * 32768)
    assert torch.equal(seen[MU_LAW], mu_law_encode(clips))
    assert torch.equal(seen[LOG_MEL], log_mel(clips, arrays[LOG_MEL].spec.sound))


def test_the_place_in_a_bin_is_drawn_once_for_held_out_clips_and_anew_in_training(folder, tmp_path):
    data = loaded(prepared(folder, tmp_path))
    held_out = [next(iter(data.held_out_loader("val"))).x for _ in range(2)]
    assert torch.equal(*held_out)
    loader = data.train_dataloader()
    first = torch.cat([batch.x for batch in loader]).sort(0).values
    loader.sampler.set_epoch(1)
    second = torch.cat([batch.x for batch in loader]).sort(0).values
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second, rtol=0, atol=1 / 32768)


def test_classes_and_splits_come_from_file_names_if_a_pattern_says_so(tmp_path):
    for i in range(12):
        write_wav16(tmp_path / "sounds" / f"{i % 3}_speaker{i}_{i // 3}.wav", tone(300))
    patterns = {"label_pattern": r"^(\d)_", "test_pattern": r"_0\.wav$", "val_pattern": r"_1\.wav$"}
    arrays = prepared(tmp_path / "sounds", tmp_path, **patterns)
    assert arrays.spec.class_names == ("0", "1", "2")
    for split in arrays.splits.values():
        assert sorted(split.y.tolist()) == sorted([0, 1, 2] * (len(split) // 3))
    assert [len(arrays.splits[name]) for name in ("train", "val", "test")] == [6, 3, 3]


def test_sounds_in_no_sub_folders_have_no_classes(tmp_path):
    for i in range(12):
        write_wav16(tmp_path / "sounds" / f"{i}.wav", tone(300))
    assert prepared(tmp_path / "sounds", tmp_path).spec.num_classes == 0


HANDLED = {
    "stereo": (lambda file: write_wav16(file, np.stack([tone(200), tone(300)], 1)), "several channels, averaged to one"),
    "silent": (lambda file: write_wav16(file, np.zeros(300)), "silent as far as it is used, kept"),
    "one sample": (lambda file: write_wav16(file, np.full(1, 0.5)), "shorter than one window of 64 samples, padded"),
    "long": (lambda file: write_wav16(file, tone(200, 600)), r"longer than data\.length=512 samples, cut at the end"),
    "another rate": (lambda file: write_wav16(file, tone(200, 600, 6000), 6000), "resampled from 6,000 Hz to 4,000 Hz"),
}


@pytest.mark.parametrize("case", HANDLED)
def test_what_is_done_to_a_file_is_said_with_its_name(case, folder, tmp_path, caplog):
    write, said = HANDLED[case]
    write(folder / "low" / "odd.wav")
    with caplog.at_level(logging.INFO):
        prepared(folder, tmp_path)
    assert re.search(f"odd.wav: {said}", caplog.text)


def test_stereo_is_averaged_and_a_resampled_tone_is_the_same_tone(tmp_path):
    for i in range(10):
        write_wav16(tmp_path / "sounds" / f"{i}.wav", np.stack([tone(200, 512), 0.5 * tone(200, 512)], 1))
        write_wav16(tmp_path / "sounds" / f"fast{i}.wav", 0.75 * tone(200, 1024, 2 * RATE), 2 * RATE)
    x = prepared(tmp_path / "sounds", tmp_path).splits["train"].x / 32768
    np.testing.assert_allclose(x[:, 50:-50], np.broadcast_to(0.75 * tone(200, 512), x.shape)[:, 50:-50], rtol=0, atol=2e-3)


@needs_soundfile
def test_flac_ogg_and_24_bits_are_read(folder, tmp_path, caplog):
    import soundfile

    soundfile.write(folder / "low" / "a.flac", tone(200), RATE)
    soundfile.write(folder / "low" / "b.ogg", tone(200, 4000), RATE)
    soundfile.write(folder / "low" / "c.wav", tone(200), RATE, subtype="PCM_24")
    with caplog.at_level(logging.INFO):
        arrays = prepared(folder, tmp_path, val_pattern="/[ab]", test_pattern="/c")
    assert "c.wav: PCM 24, rounded to 16 bits" in caplog.text
    expected = np.pad(tone(200), (0, 112))
    np.testing.assert_allclose(arrays.splits["test"].x[0] / 32768, expected, rtol=0, atol=1 / 32768)
    np.testing.assert_allclose(arrays.splits["val"].x[0] / 32768, expected, rtol=0, atol=1 / 32768)
    assert np.corrcoef(arrays.splits["val"].x[1], tone(200, 512))[0, 1] > 0.99


def cut(file: Path, count: int) -> None:
    """Write a tone, and take off the last bytes of the file."""
    write_wav16(file, tone(200))
    file.write_bytes(file.read_bytes()[:-count])


@pytest.mark.parametrize("has_soundfile", [pytest.param(True, marks=needs_soundfile), False])
def test_a_file_that_ends_too_early_is_named(has_soundfile, folder, tmp_path, monkeypatch):
    if not has_soundfile:
        monkeypatch.setitem(sys.modules, "soundfile", None)
    cut(folder / "low" / "odd.wav", 300)
    with pytest.raises(UserError, match=r"odd\.wav is cut off: 300 of the 800 bytes of its samples are missing; fetch it"):
        prepared(folder, tmp_path)


@needs_soundfile
@pytest.mark.parametrize("kind", ["flac", "aiff"])
def test_files_of_other_formats_that_end_too_early_are_named(kind, folder, tmp_path):
    import soundfile

    file = folder / "low" / f"odd.{kind}"
    soundfile.write(file, tone(200, 512), RATE)
    file.write_bytes(file.read_bytes()[: -200 if kind == "aiff" else -20])
    with pytest.raises(UserError, match=rf"odd\.{kind} is (cut off|not a readable sound file)"):
        prepared(folder, tmp_path)


def test_a_file_whose_header_gives_no_length_is_read(folder, tmp_path):
    """As those that are written to a pipe, by programs that cannot go back to the header."""
    file = folder / "low" / "odd.wav"
    write_wav16(file, tone(200))
    content = file.read_bytes()
    place = content.index(b"data") + 4
    file.write_bytes(content[:place] + b"\xff\xff\xff\xff" + content[place + 4 :])
    assert sum(len(split) for split in prepared(folder, tmp_path).splits.values()) == 17


@pytest.mark.parametrize("rate", [RATE, 6000, 2000])
@pytest.mark.parametrize("has_soundfile", [pytest.param(True, marks=needs_soundfile), False])
def test_of_a_long_file_only_the_clip_is_read_and_it_is_as_of_the_whole_file(rate, has_soundfile, tmp_path, monkeypatch):
    if not has_soundfile:
        monkeypatch.setitem(sys.modules, "soundfile", None)
    file, sound = tmp_path / "long.wav", Sound(**{key: SETTINGS[key] for key in SOUND})
    write_wav16(file, tone(200, 60 * rate, rate), rate)
    x, found_rate, _ = _read(file, sound)
    assert found_rate == rate
    assert len(x) < 2 * 512 * rate / RATE
    clip = _clip(file, sound, _Notes(sound))
    whole = np.round(tone(200, 60 * rate, rate) * 32767) / 32768
    expected = resample_poly(whole, RATE, rate)[:512]
    assert len(clip) == 512
    np.testing.assert_allclose(clip, np.round(expected * 32768), rtol=0, atol=0)


REFUSED = {
    "text": (lambda file: file.write_text("Dear reader"), r"low/odd\.wav is not a readable"),
    "empty": (lambda file: file.write_bytes(b""), r"low/odd\.wav is not a readable"),
    "no samples": (lambda file: write_wav16(file, np.zeros(0)), r"low/odd\.wav holds no samples; remove it"),
    "beside": (lambda file: write_wav16(file.parent.parent / "odd.wav", tone(200)), "odd.wav in .* lies beside the class"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_is_named(case, folder, tmp_path):
    write, said = REFUSED[case]
    write(folder / "low" / "odd.wav")
    with pytest.raises(UserError, match=said):
        prepared(folder, tmp_path)
    assert not list(tmp_path.glob("audio_folder-*"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"label_pattern": r"(\d)x"}, r"data\.label_pattern=\(\\d\)x is not found in high/0\.wav"),
        ({"label_pattern": r"\d"}, r"has no group in parentheses"),
        ({"label_pattern": "("}, r"data\.label_pattern=\( is no regular expression"),
        ({"test_pattern": "nothing"}, r"data\.test_pattern=nothing is found in no file"),
        ({"test_pattern": "low/1", "val_pattern": "1.wav"}, "low/1.wav is found by both"),
        ({"held_out": 0.5}, r"data\.held_out=0\.5 must be a share between 0 and 0\.5"),
        ({"held_out": 0.49, "test_pattern": "low|high/[0-5]"}, "leave none of the 16 files"),
        ({"representation": "log_mel", "num_mels": 60}, r"data\.num_mels=60 leaves \d+ of the bands without"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said, folder, tmp_path):
    with pytest.raises(UserError, match=said):
        prepared(folder, tmp_path, **settings)


def test_a_folder_without_sounds_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.path=.* holds no sound file \(\.wav, \.flac.*; at least 10 are needed"):
        prepared(tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"data\.path=.*nowhere does not exist; give a folder of sound files"):
        prepared(tmp_path / "nowhere", tmp_path)


def test_without_soundfile_plain_wav_files_are_read_and_others_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert len(prepared(folder, tmp_path / "a").splits["train"]) == 8
    (folder / "low" / "odd.flac").write_bytes(b"fLaC")
    with pytest.raises(UserError, match=r"odd\.flac is no WAV file; to read it, install the extra `audio`"):
        prepared(folder, tmp_path / "b")


def digits(root: Path, cache: Path):
    mel = {key: SETTINGS[key] for key in ("representation", "n_fft", "hop", "num_mels", "log_low", "log_high")}
    return fsdd(root=str(root), cache=str(cache), length=512, **mel)


def test_spoken_digits_are_split_by_their_index(tmp_path):
    for digit in range(3):
        for index in range(12):
            write_wav16(tmp_path / "fsdd" / "recordings" / f"{digit}_theo_{index}.wav", tone(300), 8000)
    arrays = digits(tmp_path, tmp_path)
    assert {name: len(split) for name, split in arrays.splits.items()} == {"train": 6, "val": 15, "test": 15}
    assert arrays.spec.class_names == ("0", "1", "2")
    with pytest.raises(UserError, match=r"data=fsdd is not under .*set data\.root= or the environment variable DATA_ROOT"):
        digits(tmp_path / "nowhere", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA_ROOT / "fsdd").is_dir(), reason=f"no fsdd under {DATA_ROOT}; set DATA_ROOT")
def test_the_3000_recordings_are_300_for_the_test_and_every_speaker_says_every_digit(tmp_path):
    arrays = digits(DATA_ROOT, tmp_path)
    assert {name: len(split) for name, split in arrays.splits.items()} == {"train": 2400, "val": 300, "test": 300}
    assert all((np.bincount(split.y) == len(split) // 10).all() for split in arrays.splits.values())
