"""Texts as tokens, and how the next token is chosen: what tokenizers promise, and the settings of a choice.

References:
    Keskar et al. 2019, "CTRL: a conditional transformer language model for controllable generation", arXiv:1909.05858:
        the repetition penalty.
    Fan, Lewis, Dauphin 2018, "Hierarchical neural story generation", arXiv:1805.04833: top-k.
    Holtzman et al. 2020, "The curious case of neural text degeneration", arXiv:1904.09751: top-p.
    Nguyen et al. 2024, "Turning up the heat: min-p sampling", arXiv:2407.01082.
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from src.core.errors import UserError, require_at_least

__all__ = ["MAX_TOKENS", "TokenChoice", "Tokenizer", "hash_of_texts"]

MAX_TOKENS = 65_536  # in a vocabulary: tokens are kept as uint16


@runtime_checkable
class Tokenizer(Protocol):
    """Texts to tokens 0 .. num_tokens - 1 and back; decode(encode(text)) is the text."""

    num_tokens: int  # V, the size of the vocabulary

    @property
    def in_words(self) -> str:
        """What its tokens are, for logs and cards: "characters", "bytes", "byte pairs"."""
        ...

    @property
    def vocabulary(self) -> str:
        """How many tokens of what kind, and a hash of which one has which number: "65 characters, 3f2a91c0b1d2"."""
        ...

    def encode(self, text: str) -> Tensor:
        """The tokens `(T,)` int64 of a text. Raises `UserError` for a character that it does not know, and names it."""
        ...

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens `(T,)`; what is no whole character in UTF-8 becomes U+FFFD."""
        ...

    def to_json(self) -> str:
        """All that it is, as JSON; `src.data.tokenizers.read_tokenizer` is the inverse."""
        ...


def hash_of_texts(*texts: str) -> str:
    """SHA-256 of some texts in UTF-8, in this order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class TokenChoice:
    """How the next token is drawn from its logits, in this order: penalty, temperature, top-k, top-p, min-p.

    The defaults draw from the model's own distribution.

    Args:
        temperature: logits are divided by it; 0 takes the most probable token without chance.
        top_k: only the k most probable tokens, with all that are as probable as the last of them; None for all.
        top_p: only the fewest most probable tokens that together have at least this probability; None for all.
        min_p: only tokens with at least this share of the greatest probability; None for all.
        repetition_penalty: logits of tokens that came before are divided by it where positive, else multiplied; 1 for none.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            may_be_null = name not in ("temperature", "repetition_penalty")
            kinds, kind = ((int,), "a whole number") if name == "top_k" else ((int, float), "a number")
            if not (isinstance(value, kinds) and not isinstance(value, bool)) and not (value is None and may_be_null):
                given = "null" if value is None else value
                raise UserError(f"{name}={given} must be {kind}" + (", or null" if may_be_null else ""))
        require_at_least("temperature", self.temperature, 0)
        require_at_least("top_k", self.top_k, 1)
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            if share is not None and not 0 < share <= 1:
                raise UserError(f"{name}={share:g} must be above 0 and at most 1, or null for all tokens")
        if not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty={self.repetition_penalty:g} must be above 0; 1 is none")

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for cards."""
        return asdict(self)
