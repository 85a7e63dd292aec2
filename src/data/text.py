"""Texts as data sets: tiny Shakespeare, and any file or folder of text in UTF-8.

The last `test_share` of the characters is the test part, the first `val_share` of the rest the validation part that the
best checkpoint is chosen by. What is learned from lies between, next to the test part: tiny Shakespeare is cut within a
play, and without the 5 % before the cut a 5-gram needs 1.947 nats for a character of the rest, with them 1.669. The text
is cut before it is tokenized, so no token reaches across; each part becomes one stream of tokens on the disk, and
examples are windows of it (`src.data.token_windows`). With val_share=0 there is no part for validation and the test part
stands for it, as in nanoGPT: then the best checkpoint is chosen by what it is measured on.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from src.core.errors import UserError
from src.core.spec import DISCRETE, DataSpec, Values
from src.core.tokens import MAX_TOKENS, Tokenizer, hash_of_texts
from src.data.arrays import Arrays, Split, damaged, fingerprint_of, prepared_folder
from src.data.token_windows import TokenWindows
from src.data.tokenizers import TokenizerMaker, read_tokenizer

__all__ = ["shakespeare", "text_file"]

log = logging.getLogger(__name__)

_SHAKESPEARE_MD5 = "6fb458f1232090904fb40fe944165e91"
_TOKENIZER = "tokenizer.json"
_HASH = "text.sha256"


def shakespeare(
    root: str, cache: str, tokenizer: TokenizerMaker, context: int, val_share: float, test_share: float
) -> Arrays:
    """Tiny Shakespeare: 1,115,394 characters, 65 different ones (Karpathy 2015, github.com/karpathy/char-rnn).

    Args:
        root: folder that holds `tinyshakespeare/input.txt`.
        cache: folder of prepared data sets.
        tokenizer: makes the tokenizer.
        context: tokens that a prediction may be made from; an example has one more.
        val_share: the first of what is left by the test part, for validation; 0 takes the test part for it.
        test_share: the last of the characters.
    """
    file = Path(root) / "tinyshakespeare" / "input.txt"
    if not file.is_file():
        raise UserError(
            f"data=shakespeare is not under {Path(root).resolve()} (no tinyshakespeare/input.txt); set data.root= or the "
            "environment variable DATA_ROOT to the folder that holds it"
        )
    if (md5 := hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()) != _SHAKESPEARE_MD5:
        raise UserError(
            f"{file} has the MD5 {md5}, tiny Shakespeare {_SHAKESPEARE_MD5}; copy it anew, or take it as another text with "
            f"data=text_file data.path={file}"
        )
    return _prepare("shakespeare", [file], str(file), cache, tokenizer, context, val_share, test_share)


def text_file(
    path: str, cache: str, tokenizer: TokenizerMaker, context: int, val_share: float, test_share: float
) -> Arrays:
    """A file of text in UTF-8, or all files of a folder and its sub-folders, one after the other, by their paths.

    Hidden files are passed over, a byte-order mark is left out, and a file that does not end in a line break gets one
    before the next file. Arguments as of `shakespeare`.
    """
    given = Path(path)
    if not given.exists():
        raise UserError(f"data.path={path} does not exist; give a file of text in UTF-8, or a folder of such files")
    files = [given] if given.is_file() else sorted(file for file in given.rglob("*") if _is_wanted(file, given))
    if not files:
        raise UserError(
            f"there is no file in {path}; give a file of text in UTF-8 with data.path=, or a folder of such files"
        )
    return _prepare("text_file", files, path, cache, tokenizer, context, val_share, test_share)


def _is_wanted(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def _prepare(
    name: str,
    files: list[Path],
    path: str,
    cache: str,
    maker: TokenizerMaker,
    context: int,
    val_share: float,
    test_share: float,
) -> Arrays:
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise UserError(f"data.context={context} must be a whole number of at least 1")
    _require_share("data.val_share", val_share, 0)
    _require_share("data.test_share", test_share, None)
    source = {
        "files": [[str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files],
        "tokenizer": maker.source(),
        "parts": {"val": ["first", val_share], "test": ["last", test_share]},
    }

    def make(folder: Path) -> tuple[str, ...]:
        parts = _cut(_read(files, path), val_share, test_share)
        tokenizer = maker.make("".join(parts.values()), parts["train"])
        _require_vocabulary(tokenizer, path)
        for split, text in parts.items():
            if text or split != "val":
                np.save(folder / f"{split}_x.npy", _encoded(tokenizer, text, path).astype(np.uint16))
        (folder / _TOKENIZER).write_text(tokenizer.to_json())
        (folder / _HASH).write_text(hash_of_texts(parts["train"], parts["test"]))
        return ()

    folder = prepared_folder(name, cache, source, make)
    try:
        sums = json.loads((folder / "meta.json").read_text())["sha256"]
        described = (folder / _TOKENIZER).read_text()
        tokenizer = read_tokenizer(described)
        text_sha256 = (
            (folder / _HASH).read_text() if (folder / _HASH).exists() else None
        )  # one of an older version has none
        streams = {split: np.load(folder / f"{split}_x.npy", mmap_mode="r") for split in _splits(val_share)}
    except (OSError, ValueError, KeyError) as error:
        raise damaged(folder, error) from error
    for split, stream in streams.items():
        _require_length(stream, context, split, path)
    if not val_share:
        streams["val"] = streams["test"]
        log.info(
            "data.val_share=0.0: the best checkpoint is chosen by the test part itself, as there is no other held-out text"
        )
    splits = {split: Split(TokenWindows(stream, context), None) for split, stream in streams.items()}
    levels = tokenizer.num_tokens
    values = Values(DISCRETE, low=0, high=levels - 1, levels=levels)
    spec = DataSpec(name, "tokens", (context + 1,), values, tokenizer=described)
    sums = sums | {_TOKENIZER: hashlib.sha256(described.encode()).hexdigest()}
    return Arrays(spec, levels, splits, fingerprint_of(sums), tokenizer=tokenizer, text_sha256=text_sha256)


def _encoded(tokenizer: Tokenizer, text: str, path: str) -> np.ndarray:
    try:
        return tokenizer.encode(text).numpy()
    except UserError as error:
        raise UserError(f"{path} cannot be cut into tokens: {error}") from error


def _splits(val_share: float) -> tuple[str, ...]:
    return ("train", "val", "test") if val_share else ("train", "test")


def _require_share(key: str, share: Any, least: float | None) -> None:
    is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not (is_number and (0 < share < 1 or share == least)):
        raise UserError(f"{key}={share} must be a share between 0 and 1" + (", or 0.0 for none" if least == 0 else ""))


def _read(files: list[Path], path: str) -> str:
    """The texts of the files, joined."""
    parts: list[str] = []
    for file in files:
        if parts and not parts[-1].endswith("\n"):
            parts.append("\n")
        text = _decoded(file)
        if text:
            parts.append(text)
    if not parts:
        raise UserError(f"{path} is empty; give text with data.path=")
    return "".join(parts)


def _decoded(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); mend or remove it") from error
    if (place := content.find(0)) >= 0:
        raise UserError(f"{file} is no text but binary (its byte {place}, counted from 0, is 0); remove it, or convert it")
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is no text in UTF-8 (its byte {error.start}, counted from 0, is 0x{content[error.start]:02x}: "
            f"{error.reason}); convert it to UTF-8, or remove it"
        ) from error


def _cut(text: str, val_share: float, test_share: float) -> dict[str, str]:
    """The parts of a text, cut between characters; that for validation is empty without a share."""
    cut = int(len(text) * (1 - test_share))
    val_cut = cut - int(cut * (1 - val_share))
    return {"train": text[val_cut:cut], "val": text[:val_cut], "test": text[cut:]}


def _require_vocabulary(tokenizer: Tokenizer, path: str) -> None:
    if tokenizer.num_tokens > MAX_TOKENS:
        raise UserError(
            f"{path} has {tokenizer.num_tokens:,} different {tokenizer.in_words}, and tokens are kept in 16 bits, which is "
            f"at most {MAX_TOKENS:,}; choose tokenizer=byte or tokenizer=bpe"
        )


def _require_length(stream: np.ndarray, context: int, split: str, path: str) -> None:
    if len(stream) <= context:
        part = {"train": "training", "val": "validation", "test": "test"}[split]
        raise UserError(
            f"the {part} part of {path} has {len(stream)} tokens, too few for data.context={context} and one to predict; "
            "lower data.context, give more text, or change data.test_share and data.val_share"
        )
