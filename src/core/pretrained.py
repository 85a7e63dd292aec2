"""Folders with weights that were trained elsewhere, as Hugging Face's `save_pretrained` writes them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from src.core.errors import UserError

__all__ = ["MARKS", "gpt2_config", "weights_sha256"]

MARKS = ("bos_token_id", "eos_token_id")  # tokens that stand for the beginning and the end of a text
_KINDS = ("*.safetensors", "*.bin")  # of files of weights; what transformers prefers comes first

# what the network is; the rest of such a file is of training, of sampling or of the tool that wrote it
_OF_NETWORK = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
    *MARKS,
)


def gpt2_config(folder: str) -> dict[str, Any]:
    """What the config.json in a folder of GPT-2 weights says of the network, as plain types.

    Raises `UserError`, which names the folder, if there is none, or if it is of another architecture.
    """
    file = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(
            f"network.weights={folder} is no folder; give one that transformers' save_pretrained has written, with "
            "config.json and model.safetensors"
        )
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"network.weights={folder} has no config.json that can be read ({error})") from error
    if not isinstance(found, dict) or found.get("model_type") != "gpt2":
        kind = found.get("model_type") if isinstance(found, dict) else None
        raise UserError(f"network.weights={folder} holds weights of {kind or 'no known architecture'}; only gpt2 is known")
    return {key: found[key] for key in _OF_NETWORK if key in found}


def weights_sha256(folder: str) -> str | None:
    """SHA-256 of the files of weights in a folder, in the order of their names; None if there are none."""
    for kind in _KINDS:
        files = sorted(Path(folder).glob(kind))
        if files:
            digest = hashlib.sha256()
            for file in files:
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            return digest.hexdigest()
    return None
