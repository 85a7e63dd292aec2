"""The Free Spoken Digit Dataset: 3,000 recordings of ten digits in English by six speakers, 8 kHz, 16 bits.

The recordings are called `<digit>_<speaker>_<index>.wav`. As the authors ask, those with index 0 to 4 are the test set; of
the others, those with index 5 to 9 are for validation. So every speaker says every digit in every part.

References:
    Jackson et al., "Free Spoken Digit Dataset", github.com/Jakobovski/free-spoken-digit-dataset, CC BY-SA 4.0.
"""

import re
from pathlib import Path

import numpy as np

from src.core.errors import UserError
from src.core.sound import Sound
from src.data.arrays import Arrays
from src.data.audio_folder import prepare_clips

__all__ = ["fsdd"]

_NAME = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav")
_SAMPLE_RATE = 8000
_NUM_TEST = _NUM_VAL = 5  # of the recordings of each digit by each speaker


def fsdd(
    root: str,
    cache: str,
    representation: str,
    length: int,
    n_fft: int,
    hop: int,
    num_mels: int,
    log_low: float,
    log_high: float,
) -> Arrays:
    """The recordings in `<root>/fsdd/recordings`, cut into 2,400 for training, 300 for validation and 300 for the test.

    Args:
        root: folder that holds `fsdd/recordings/`.
        cache: folder of prepared data sets.
        representation: what models see: "waveform", "mu_law" or "log_mel".
        length: samples of a clip; shorter recordings are padded with silence at the end, longer ones cut there.
        n_fft, hop, num_mels, log_low, log_high: see `core.sound.Sound`.
    """
    sound = Sound(_SAMPLE_RATE, length, representation, n_fft, hop, num_mels, log_low, log_high)
    folder = Path(root) / "fsdd" / "recordings"
    files = sorted(file for file in folder.glob("*.wav") if _NAME.fullmatch(file.name))
    if not files:
        raise UserError(
            f"data=fsdd is not under {Path(root).resolve()} (no recording in fsdd/recordings); set data.root= or the "
            "environment variable DATA_ROOT to the folder that holds it, or fetch it from "
            "github.com/Jakobovski/free-spoken-digit-dataset"
        )

    def split(files: list[Path], root: Path) -> dict[str, np.ndarray]:
        place = np.array([int(found.group(3)) for file in files if (found := _NAME.fullmatch(file.name))])
        is_test, is_val = place < _NUM_TEST, (place >= _NUM_TEST) & (place < _NUM_TEST + _NUM_VAL)
        parts = {"train": ~is_test & ~is_val, "val": is_val, "test": is_test}
        if empty := [part for part, is_in in parts.items() if not is_in.any()]:
            raise UserError(f"{folder} holds no recording for {empty[0]}; fetch all 3,000 recordings")
        return {part: np.flatnonzero(is_in) for part, is_in in parts.items()}

    return prepare_clips("fsdd", folder, files, cache, sound, r"^(\d)_", split, {"split": [_NUM_TEST, _NUM_VAL]})
