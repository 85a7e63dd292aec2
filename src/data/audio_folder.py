"""Any folder of sound files, as clips of one length at one rate; classes come from sub-folders or from file names.

Every file is read once, made mono, resampled and written as 16-bit integers, padded with silence or cut at the end. What
models see of a clip (`core.sound`) is made from these when a batch is gathered, so all representations share one folder of
prepared data. What was done to how many files is said once, with the name of one of them.
"""

import hashlib
import logging
import math
import re
import struct
import wave
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from src.core.errors import UserError
from src.core.sound import LOG_MEL, MU_LAW, MU_LAW_LEVELS, WAVEFORM, Sound, mel_filters
from src.core.spec import CONTINUOUS, DISCRETE, Values
from src.data.arrays import Arrays, prepare, split_indices

__all__ = ["PCM_LEVELS", "audio_folder", "prepare_clips"]

log = logging.getLogger(__name__)

PCM_LEVELS = 65536
_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff")
_MIN_FILES = 10
_PCM_SCALE = 32768
_FILTER_REACH = 10  # of scipy's `resample_poly`: samples before and behind, at the lower of both rates
_UNKNOWN_LENGTH = 0x7FFF0000  # and above: what is written where sound is not stored but streamed

_MODALITIES = {WAVEFORM: "audio", MU_LAW: "tokens", LOG_MEL: "image"}
_VALUES = {
    WAVEFORM: Values(CONTINUOUS, low=-1.0, high=1.0, levels=None),
    MU_LAW: Values(DISCRETE, low=0.0, high=MU_LAW_LEVELS - 1.0, levels=MU_LAW_LEVELS),
    LOG_MEL: Values(CONTINUOUS, low=-1.0, high=1.0, levels=None),
}


def audio_folder(
    path: str,
    cache: str,
    representation: str,
    sample_rate: int,
    length: int,
    n_fft: int,
    hop: int,
    num_mels: int,
    log_low: float,
    log_high: float,
    label_pattern: str | None,
    test_pattern: str | None,
    val_pattern: str | None,
    held_out: float,
) -> Arrays:
    """Clips of sound from WAV, FLAC, OGG, Opus, MP3 and AIFF files.

    Every file must lie in a sub-folder (its class), or none of them (no labels), unless `label_pattern` reads the class
    from the file's name. Folders that all files share are skipped. Other and hidden files are passed over.

    Args:
        path: a folder.
        cache: folder of prepared data sets.
        representation: what models see: "waveform", "mu_law" or "log_mel".
        sample_rate: in Hz; files of another rate are resampled.
        length: samples of a clip; shorter files are padded with silence at the end, longer ones cut there.
        n_fft, hop, num_mels, log_low, log_high: see `core.sound.Sound`.
        label_pattern: a regular expression that is sought in a file's path below the folder; its first group is the class.
        test_pattern, val_pattern: likewise; files in which it is found are for the test, or for validation.
        held_out: share of the files for validation, and again for the test, each where there is no pattern of it.
    """
    if not 0 < held_out < 0.5:
        raise UserError(f"data.held_out={held_out} must be a share between 0 and 0.5")
    sound = Sound(sample_rate, length, representation, n_fft, hop, num_mels, log_low, log_high)
    files = _find(path)
    labels = _Labels(label_pattern)
    patterns = {"test": _compiled("test_pattern", test_pattern), "val": _compiled("val_pattern", val_pattern)}

    def split(files: list[Path], root: Path) -> dict[str, np.ndarray]:
        names = [file.relative_to(root).as_posix() for file in files]
        held = {part: _found_by(pattern, part, names) for part, pattern in patterns.items() if pattern is not None}
        if both := set(held.get("test", ())) & set(held.get("val", ())):
            raise UserError(f"{names[min(both)]} is found by both data.test_pattern and data.val_pattern")
        rest = np.setdiff1d(np.arange(len(files)), np.concatenate([np.array([], int), *held.values()]))
        share = max(1, round(held_out * len(files)))
        counts = {part: 0 if part in held else share for part in ("val", "test")}
        if counts["val"] + counts["test"] >= len(rest):
            raise UserError(
                f"the held-out parts leave none of the {len(files)} files of {path} to train on (data.held_out)"
            )
        parts = split_indices(len(rest), counts["val"], counts["test"])
        return {part: held.get(part, rest[index]) for part, index in parts.items()}

    about = {"patterns": [test_pattern, val_pattern], "held_out": held_out}
    return prepare_clips("audio_folder", Path(path), files, cache, sound, labels, split, about)


@dataclass(frozen=True)
class _Labels:
    """How a file's class is known: by a pattern, or by its folder."""

    pattern: str | None

    def of(self, names: list[str], root: Path) -> tuple[np.ndarray | None, tuple[str, ...]]:
        """Labels `(N,)` and class names; None and () if there are none."""
        words = self._by_folder(names, root) if self.pattern is None else self._by_name(names, root)
        if words is None:
            return None, ()
        class_names = tuple(sorted(set(words)))
        index = {name: i for i, name in enumerate(class_names)}
        return np.array([index[word] for word in words], dtype=np.int64), class_names

    def _by_name(self, names: list[str], root: Path) -> list[str]:
        compiled = _compiled("label_pattern", self.pattern)
        assert compiled is not None
        if compiled.groups < 1:
            raise UserError(f"data.label_pattern={self.pattern} has no group in parentheses, which would be the class")
        words = []
        for name in names:
            found = compiled.search(name)
            if found is None or found.group(1) is None:
                raise UserError(f"data.label_pattern={self.pattern} is not found in {name} of {root}, so it has no class")
            words.append(found.group(1))
        return words

    @staticmethod
    def _by_folder(names: list[str], root: Path) -> list[str] | None:
        folders = [Path(name).parts[:-1] for name in names]
        shared = 0
        while all(len(parts) > shared and parts[shared] == folders[0][shared] for parts in folders):
            shared += 1
        outside = [name for name, parts in zip(names, folders, strict=True) if len(parts) == shared]
        if len(outside) == len(names):
            return None
        if outside:
            raise UserError(
                f"{outside[0]} in {root} lies beside the class folders; put every file into a sub-folder, or none, or give "
                "data.label_pattern"
            )
        return [parts[shared] for parts in folders]


def prepare_clips(
    name: str,
    root: Path,
    files: list[Path],
    cache: str,
    sound: Sound,
    labels: "_Labels | str",
    split: Callable[[list[Path], Path], dict[str, np.ndarray]],
    about: dict[str, Any],
) -> Arrays:
    """The prepared clips of some files, made first if they are not there.

    Args:
        name: the data set's name.
        root: folder that holds the files.
        files: in their order.
        cache: folder of prepared data sets.
        sound: what a clip is, and what models see of it.
        labels: how a file's class is known, or the pattern that says so.
        split: from the files and their folder to the places of those for training, validation and test.
        about: what else the arrays depend on, as plain JSON types.
    """
    if sound.representation == LOG_MEL:
        mel_filters(sound.sample_rate, sound.n_fft, sound.num_mels)  # refuses what cannot be
    labels = _Labels(labels) if isinstance(labels, str) else labels
    stats = [file.stat() for file in files]
    listing = "\n".join(f"{f.relative_to(root)} {s.st_size} {s.st_mtime_ns}" for f, s in zip(files, stats, strict=True))
    source = {
        "files": hashlib.sha256(listing.encode()).hexdigest(),
        "sample_rate": sound.sample_rate,
        "length": sound.length,
        "label_pattern": labels.pattern,
        **about,
    }

    def make(folder: Path) -> tuple[str, ...]:
        y, class_names = labels.of([file.relative_to(root).as_posix() for file in files], root)
        notes = _Notes(sound)
        for part, index in split(files, root).items():
            _write(folder, part, [files[i] for i in index], None if y is None else y[index], sound, notes)
        notes.say()
        return class_names

    values = _VALUES[sound.representation]
    levels = PCM_LEVELS if sound.representation == WAVEFORM else None
    arrays = prepare(name, cache, source, _MODALITIES[sound.representation], values, levels, make)
    return replace(arrays, spec=replace(arrays.spec, shape=sound.shape, sound=sound))


@dataclass
class _Notes:
    """What was done to files, to be said once: how many they are, and the first of them."""

    sound: Sound
    files: dict[str, list[Path]] = field(default_factory=dict)

    def add(self, what: str, file: Path) -> None:
        self.files.setdefault(what, []).append(file)

    def say(self) -> None:
        for what, files in self.files.items():
            several = f"{len(files):,} files ({files[0].name} is the first)" if len(files) > 1 else files[0].name
            log.info(f"{several}: {what}")


def _write(folder: Path, part: str, files: list[Path], y: np.ndarray | None, sound: Sound, notes: _Notes) -> None:
    shape = (len(files), sound.length)
    x = np.lib.format.open_memmap(folder / f"{part}_x.npy", mode="w+", dtype=np.int16, shape=shape)
    for i, file in enumerate(track(files, description=f"reading {part} clips", transient=True)):
        clip = _clip(file, sound, notes)
        x[i, : len(clip)] = clip
    x.flush()
    if y is not None:
        np.save(folder / f"{part}_y.npy", y)


def _clip(file: Path, sound: Sound, notes: _Notes) -> np.ndarray:
    """The beginning of a file as `(t,)` int16 at the rate of the data, t at most its length."""
    x, rate, coding = _read(file, sound)
    if x.shape[1] > 1:
        notes.add("several channels, averaged to one", file)
    if "24" in coding or "32" in coding or "FLOAT" in coding or "DOUBLE" in coding:
        notes.add(f"{coding.replace('_', ' ')}, rounded to 16 bits", file)
    mono = x.mean(1)
    if not np.isfinite(mono).all():
        raise UserError(f"{file} holds values that are not finite; mend or remove it")
    if not len(mono):
        raise UserError(f"{file} holds no samples; remove it")
    if not mono.any():
        notes.add("silent as far as it is used, kept", file)
    if rate != sound.sample_rate:
        notes.add(f"resampled from {rate:,} Hz to {sound.sample_rate:,} Hz", file)
        mono = _resampled(mono, rate, sound.sample_rate)
    if len(mono) < sound.n_fft:
        notes.add(f"shorter than one window of {sound.n_fft} samples, padded with silence", file)
    if len(mono) > sound.length:
        notes.add(f"longer than data.length={sound.length} samples, cut at the end", file)
        mono = mono[: sound.length]
    if np.abs(mono).max() > 1:
        notes.add("louder than 1, clamped", file)
    return np.clip(np.round(mono * _PCM_SCALE), -_PCM_SCALE, _PCM_SCALE - 1).astype(np.int16)


def _read(file: Path, sound: Sound) -> tuple[np.ndarray, int, str]:
    """Samples `(t, channels)` float64 in [-1, 1], their rate in Hz, and how they are coded; of a long file no more than a
    clip is made of."""
    _require_whole(file)
    try:
        import soundfile
    except (ImportError, OSError):  # the latter if it finds no libsndfile
        return _read_plain_wav(file, sound)
    try:
        with soundfile.SoundFile(file) as stream:
            wanted = _needed(stream.samplerate, sound)
            x = stream.read(wanted, dtype="float64", always_2d=True)
            if stream.format == "FLAC" and len(x) < min(wanted, stream.frames):
                raise _cut_off(file, f"{stream.frames - len(x):,} of its {stream.frames:,} samples")
            return x, stream.samplerate, stream.subtype
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is not a readable sound file ({error}); mend or remove it") from error


def _read_plain_wav(file: Path, sound: Sound) -> tuple[np.ndarray, int, str]:
    """The same of the one format that needs no library: WAV of 16-bit integers."""
    needed = "to read it, install the extra `audio` (make extra EXTRA=audio)"
    if file.suffix.lower() != ".wav":
        raise UserError(f"{file} is no WAV file; {needed}")
    try:
        with wave.open(str(file), "rb") as stream:
            if stream.getsampwidth() != 2:
                raise UserError(f"{file} has samples of {8 * stream.getsampwidth()} bits; {needed}")
            content = stream.readframes(min(stream.getnframes(), _needed(stream.getframerate(), sound)))
            samples = np.frombuffer(content, "<i2").reshape(-1, stream.getnchannels())
            return samples / _PCM_SCALE, stream.getframerate(), "PCM_16"
    except (wave.Error, EOFError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is not a readable WAV file of 16-bit integers ({error}); {needed}") from error


def _needed(rate: int, sound: Sound) -> int:
    """Samples of a file at some rate that its clip depends on, and one more, to see whether the file is longer."""
    up, down = _ratio(rate, sound.sample_rate)
    reach = -(-_FILTER_REACH * max(up, down) // up) if up != down else 0
    return -(-sound.length * down // up) + reach + 1


def _require_whole(file: Path) -> None:
    """Raise `UserError` if a WAV or AIFF file ends before the end of its samples: libraries read what is left, and say
    nothing."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        form = stream.read(12)
        order, wanted = {b"RIFF": ("<", b"data"), b"FORM": (">", b"SSND")}.get(form[:4], ("", b""))
        while order and len(head := stream.read(8)) == 8:
            name, length = struct.unpack(f"{order}4sI", head)
            if name == wanted:
                missing = stream.tell() + length - size
                if missing > 0 and length < _UNKNOWN_LENGTH:
                    raise _cut_off(file, f"{missing:,} of the {length:,} bytes of its samples")
                return
            stream.seek(length + length % 2, 1)


def _cut_off(file: Path, what: str) -> UserError:
    return UserError(f"{file} is cut off: {what} are missing; fetch it again or remove it")


def _ratio(rate: int, wanted: int) -> tuple[int, int]:
    """Factors up and down, without a common divisor, that take one rate to another."""
    divisor = math.gcd(rate, wanted)
    return wanted // divisor, rate // divisor


def _resampled(x: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples `(t,)` at another rate, `(ceil(t wanted / rate),)`, by a polyphase low-pass filter."""
    from scipy.signal import resample_poly  # slow to import, and rarely needed

    return resample_poly(x, *_ratio(rate, wanted))


def _find(path: str) -> list[Path]:
    root = Path(path)
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"data.path={path} {problem}; give a folder of sound files ({', '.join(_SUFFIXES)})")
    found = (file for file in root.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
    files = sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts))
    if len(files) < _MIN_FILES:
        count = {0: "no sound file", 1: "only one sound file"}.get(len(files), f"only {len(files)} sound files")
        raise UserError(
            f"data.path={path} holds {count} ({', '.join(_SUFFIXES)}); at least {_MIN_FILES} are needed to train and hold "
            "some out"
        )
    return files


def _compiled(key: str, pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise UserError(f"data.{key}={pattern} is no regular expression ({error})") from error


def _found_by(pattern: re.Pattern[str], part: str, names: Iterable[str]) -> np.ndarray:
    found = np.array([i for i, name in enumerate(names) if pattern.search(name)], dtype=int)
    if not len(found):
        raise UserError(f"data.{part}_pattern={pattern.pattern} is found in no file, so nothing would be held out")
    return found
