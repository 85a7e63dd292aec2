"""Tokenizers: characters, bytes, byte pairs learned from the data, and those of a folder of weights.

What a config names is a maker, which sees the text once; what it makes does not change any more, goes with the prepared
data and, as JSON, with every run. Byte pairs go through the library `tokenizers`, which is only needed for them. What a
tokenizer cannot give back to the letter it refuses: nats of a text that was changed are no nats of the text.

References:
    Sennrich, Haddow, Birch 2016, "Neural machine translation of rare words with subword units", arXiv:1508.07909: byte
        pairs.
    Radford et al. 2019, "Language models are unsupervised multitask learners" (GPT-2): byte pairs over bytes, and how a
        text is cut into words before.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.core.errors import UserError
from src.core.tokens import MAX_TOKENS, Tokenizer

__all__ = [
    "BytePairTokenizer", "BytePairs", "ByteTokenizer", "Bytes", "CharacterTokenizer", "Characters", "Pretrained",
    "TokenizerMaker", "holds_tokenizer", "read_tokenizer", "stop_at",
]  # fmt: skip

_AT_A_TIME = 2**20  # characters that are cut into byte pairs in one call, about: it takes a hundred times their memory
_SINGLE_BREAK = re.compile(r"(?<=\S\n)(?=\S)")  # where GPT-2's words end whatever comes before and after
_NUM_BYTES = 256
_THEIRS, _OURS = "tokenizer.json", "tokens.json"  # in a folder of weights
_PAIRS = "byte pairs"


class TokenizerMaker(ABC):
    """Makes a tokenizer for a text."""

    @abstractmethod
    def make(self, whole: str, training: str) -> Tokenizer:
        """From the whole text, or its training part alone."""

    @abstractmethod
    def source(self) -> dict[str, Any]:
        """What its tokenizers depend on besides the text, in plain types."""


# --- characters ------------------------------------------------------------------------------------------------------


class CharacterTokenizer:
    """Unicode code points, numbered in their order.

    Args:
        characters: all of them, each once, sorted.
    """

    in_words = "characters"

    def __init__(self, characters: str) -> None:
        self._characters = np.array([ord(character) for character in characters], dtype=np.uint32)
        self.num_tokens = len(characters)

    @property
    def vocabulary(self) -> str:
        return _vocabulary(self, self.to_json())

    def encode(self, text: str) -> Tensor:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        tokens = np.searchsorted(self._characters, points).clip(max=self.num_tokens - 1)
        is_unknown = self._characters[tokens] != points
        if is_unknown.any():
            unknown = list(dict.fromkeys(text[i] for i in np.flatnonzero(is_unknown)[:10_000]))
            shown = ", ".join(f"{character!r}" for character in unknown[:10]) + (", ..." if len(unknown) > 10 else "")
            raise UserError(
                f"{shown} (first at character {int(is_unknown.argmax())}, counted from 0) is not among the "
                f"{self.num_tokens} characters of the text that the tokenizer was made for; leave it out, or train with "
                "tokenizer=byte or bpe, which know every character"
            )
        return torch.from_numpy(tokens.astype(np.int64))

    def decode(self, tokens: Tensor) -> str:
        return self._characters[tokens.cpu().numpy()].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    def to_json(self) -> str:
        characters = "".join(map(chr, self._characters))
        return json.dumps({"kind": "characters", "characters": characters})


class Characters(TokenizerMaker):
    """The characters of the whole text, as in nanoGPT, so that none of the held-out text is unknown."""

    def make(self, whole: str, training: str) -> CharacterTokenizer:
        return CharacterTokenizer("".join(sorted(set(whole))))

    def source(self) -> dict[str, Any]:
        return {"kind": "characters"}


# --- bytes -----------------------------------------------------------------------------------------------------------


class ByteTokenizer:
    """The bytes of a text in UTF-8."""

    in_words = "bytes"
    num_tokens = _NUM_BYTES

    @property
    def vocabulary(self) -> str:
        return _vocabulary(self, self.to_json())

    def encode(self, text: str) -> Tensor:
        return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64))

    def decode(self, tokens: Tensor) -> str:
        return bytes(tokens.cpu().numpy().astype(np.uint8)).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"kind": "bytes"})


class Bytes(TokenizerMaker):
    """The same for any text."""

    def make(self, whole: str, training: str) -> ByteTokenizer:
        return ByteTokenizer()

    def source(self) -> dict[str, Any]:
        return {"kind": "bytes"}


# --- byte pairs ------------------------------------------------------------------------------------------------------


class BytePairTokenizer:
    """Byte pairs over bytes, as GPT-2 has them: any text, and nothing added to it.

    Args:
        described: the tokenizer as the library `tokenizers` writes it. One of another kind will do if it loses nothing.
    """

    in_words = "byte pairs"

    def __init__(self, described: str) -> None:
        self._described = described
        self._tokenizer = _library().Tokenizer.from_str(described)
        self.num_tokens = 1 + max(self._tokenizer.get_vocab().values(), default=-1)  # there may be gaps

    @property
    def vocabulary(self) -> str:
        numbered = sorted((number, token) for token, number in self._tokenizer.get_vocab().items())
        return _vocabulary(self, json.dumps(numbered))

    def encode(self, text: str) -> Tensor:
        """A long text in parts, cut where no token reaches across. Raises `UserError` if they do not give it back."""
        parts, start = [], 0
        while start < len(text):
            cut = _SINGLE_BREAK.search(text, start + _AT_A_TIME)
            end = len(text) if cut is None else cut.start()
            parts.append(self._tokenizer.encode(text[start:end], add_special_tokens=False).ids)
            self._require_same(text[start:end], self._decoded(parts[-1]))
            start = end
        return torch.cat([torch.tensor(part, dtype=torch.int64) for part in [*parts, []]])

    def decode(self, tokens: Tensor) -> str:
        return self._decoded(tokens.tolist())

    def _decoded(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    @staticmethod
    def _require_same(text: str, again: str) -> None:
        if text == again:
            return
        place = next((i for i, (a, b) in enumerate(zip(text, again, strict=False)) if a != b), min(len(text), len(again)))
        was, became = (some[max(0, place - 10) : place + 10] for some in (text, again))
        raise UserError(
            f"the tokenizer changes the text, {was!r} becomes {became!r}, so a likelihood would not be that of the text; "
            "choose one that loses nothing, as that of GPT-2, tokenizer=bpe or tokenizer=byte"
        )

    def to_json(self) -> str:
        return json.dumps({"kind": _PAIRS, "tokenizer": self._described})

    def save_pretrained(self, folder: Path, marks: dict[str, int | None]) -> None:
        """Write it as a fast tokenizer of `transformers`, which must be installed.

        Args:
            folder: for its files.
            marks: the numbers of tokens that mean something, as "eos_token"; None for those that there are not.
        """
        from transformers import PreTrainedTokenizerFast

        tokens = {name: self._tokenizer.id_to_token(number) for name, number in marks.items() if number is not None}
        PreTrainedTokenizerFast(tokenizer_object=self._tokenizer, **tokens).save_pretrained(folder)


class BytePairs(TokenizerMaker):
    """Byte pairs learned from the training part of the text.

    Args:
        num_tokens: of the vocabulary: 256 bytes, and the rest merges of two tokens each; fewer if the text has no more.
    """

    def __init__(self, num_tokens: int) -> None:
        if not isinstance(num_tokens, int) or not _NUM_BYTES < num_tokens <= MAX_TOKENS:
            raise UserError(
                f"tokenizer.num_tokens={num_tokens} must be a whole number from {_NUM_BYTES + 1} to {MAX_TOKENS:,}"
            )
        self._num_tokens = num_tokens

    def make(self, whole: str, training: str) -> BytePairTokenizer:
        library = _library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
        trainer = library.trainers.BpeTrainer(
            vocab_size=self._num_tokens, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
        )
        tokenizer.train_from_iterator(training.splitlines(keepends=True), trainer)
        return BytePairTokenizer(tokenizer.to_str())

    def source(self) -> dict[str, Any]:
        return {"kind": "byte pairs", "num_tokens": self._num_tokens}


class Pretrained(TokenizerMaker):
    """The tokenizer of a local folder of weights: tokenizer.json, as `transformers` saves byte pairs, or our tokens.json.

    Args:
        path: the folder, or the file; or the spec.json of a run, which keeps the tokenizer of its data.
    """

    def __init__(self, path: str) -> None:
        given = Path(path)
        files = [given / name for name in (_THEIRS, _OURS)] if given.is_dir() else [given]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise UserError(
                f"tokenizer.path={path} holds no {_THEIRS}; give a folder that transformers' save_pretrained has "
                "written a fast tokenizer to"
            )
        self._file: Path = found

    def make(self, whole: str, training: str) -> Tokenizer:
        try:
            return read_tokenizer(self._described())
        except UserError:
            raise
        except Exception as error:  # the library raises plain exceptions
            raise UserError(f"{self._file} cannot be read as a tokenizer ({error}); set tokenizer.path=") from error

    def source(self) -> dict[str, Any]:
        """The same of one tokenizer, whichever file it is read from."""
        try:
            plain = json.loads(described := self._described())
        except (ValueError, UserError):
            plain, described = {}, self._file.read_bytes().hex()  # `make` says what is wrong with it
        whole = plain["tokenizer"] if plain.get("kind") == _PAIRS else described
        return {"kind": "pretrained", "sha256": hashlib.sha256(whole.encode()).hexdigest()}

    def _described(self) -> str:
        """As a `to_json` has it, whatever the file is."""
        try:
            text = self._file.read_bytes().decode()
            plain = json.loads(text)
        except (OSError, ValueError) as error:
            raise UserError(f"{self._file} cannot be read as a tokenizer ({error}); set tokenizer.path=") from error
        if isinstance(plain, dict) and "kind" in plain:
            return text
        if isinstance(plain, dict) and isinstance(plain.get("tokenizer"), str):
            return plain["tokenizer"]
        return json.dumps({"kind": _PAIRS, "tokenizer": text})


def holds_tokenizer(folder: Path) -> bool:
    """Whether `Pretrained` finds a tokenizer in a folder."""
    return any((folder / name).is_file() for name in (_THEIRS, _OURS))


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            f"byte pairs need the library tokenizers, which cannot be imported ({error}): `make extra EXTRA=text` installs "
            "it; tokenizer=character and tokenizer=byte do without"
        ) from error
    return tokenizers


# --- of all ----------------------------------------------------------------------------------------------------------


def read_tokenizer(described: str) -> Tokenizer:
    """The tokenizer that a `to_json` has described. Raises `UserError` if it is of no known kind."""
    try:
        plain = json.loads(described)
        kind = plain["kind"]
        if kind == "characters":
            return CharacterTokenizer(plain["characters"])
        if kind == "bytes":
            return ByteTokenizer()
        if kind == _PAIRS:
            return BytePairTokenizer(plain["tokenizer"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the description of a tokenizer is damaged ({type(error).__name__}: {error})") from error
    raise UserError(f"a tokenizer of the kind {kind} is not known; allowed: characters, bytes, byte pairs")


def _vocabulary(tokenizer: Tokenizer, what: str) -> str:
    return f"{tokenizer.num_tokens:,} {tokenizer.in_words}, {hashlib.sha256(what.encode()).hexdigest()[:12]}"


def stop_at(tokenizer: Tokenizer, text: str) -> Callable[[Tensor], Tensor]:
    """Says of which rows of tokens `(B, T)` the text has just come, `(B,)`; for drawing that shall end with it."""
    reach = len(text.encode())  # tokens have at least a byte each

    def has_come(tokens: Tensor) -> Tensor:
        found = [text in tokenizer.decode(row) for row in tokens[:, -reach:].cpu()]
        return torch.tensor(found, device=tokens.device)

    return has_come
