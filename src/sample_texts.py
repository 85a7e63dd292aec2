"""What is drawn of a model of tokens: how each token is chosen, and texts that may continue a prompt."""

import hashlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from src.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from src.core.spec import DataSpec
    from src.sample_files import SampleFiles

__all__ = ["OF_CHOICE", "OF_TEXTS", "choose_tokens", "draw_texts", "given_keys", "name_of_given", "text_of"]

log = logging.getLogger(__name__)

OF_CHOICE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # how a token is drawn, of any tokens
OF_TEXTS = ("prompt", "length", "stop")
_TEXTS = 4  # where n is not given


def given_keys(config: DictConfig, keys: tuple[str, ...] = (*OF_CHOICE, *OF_TEXTS)) -> dict[str, Any]:
    """Those of these keys that the command line has set."""
    return {key: config[key] for key in keys if config[key] is not None}


def name_of_given(config: DictConfig) -> str:
    """What these keys add to the name of a folder: numbers as they are, texts by a hash."""
    numbers = "".join(f"_{key}{value:g}" for key, value in given_keys(config, (*OF_CHOICE, "length")).items())
    texts = "".join(
        f"_{key}{hashlib.sha256(str(text_of(config, key)).encode()).hexdigest()[:8]}"
        for key in given_keys(config, ("prompt", "stop"))
    )
    return numbers + texts


def text_of(config: DictConfig, key: str) -> str | None:
    """A text of the command line as it was written, also where it reads as a number (1e3), a truth value or a list."""
    value = config[key]
    if value is None or isinstance(value, str):
        return value
    given = [one for one in HydraConfig.get().overrides.task if one.lstrip("+").startswith(f"{key}=")]
    return given[-1].partition("=")[2]


def choose_tokens(model: "nn.Module", name: str, spec: "DataSpec", config: DictConfig) -> None:
    """Let a model of tokens draw as the command line says; raises `UserError` for keys that are nothing to a model."""
    from src.core.protocols import CanContinue

    choice = given_keys(config, OF_CHOICE)
    if choice:
        if not isinstance(model, CanContinue):
            key, value = next(iter(choice.items()))
            raise UserError(
                f"{key}={value} cannot be asked of model={name}: it does not draw tokens (it has no CanContinue)"
            )
        model.sampling = replace(model.sampling, **choice)
    of_texts = given_keys(config, OF_TEXTS)
    if of_texts and (spec.tokenizer is None or config.picture != "samples"):
        key, value = next(iter(of_texts.items()))
        what = f"data={spec.name} has no texts" if spec.tokenizer is None else f"picture={config.picture} has no texts"
        raise UserError(f"{key}={value} cannot be asked of model={name}: {what}")


def draw_texts(
    model: "nn.Module", name: str, spec: "DataSpec", files: "SampleFiles", config: DictConfig, condition: int | None
) -> str:
    """Texts that begin with the prompt, if there is one, to a file each and to the screen; says what was drawn."""
    import torch

    from src.core.rng import SampleNoise
    from src.data.tokenizers import read_tokenizer, stop_at

    assert spec.tokenizer is not None
    tokenizer = read_tokenizer(spec.tokenizer)
    device = next(model.parameters()).device
    n, length = config.n or _TEXTS, config.length or spec.num_dims
    text, stop = (_with_breaks(text_of(config, key)) for key in ("prompt", "stop"))
    try:
        prompt = tokenizer.encode(text or "")
    except UserError as error:
        raise UserError(f"prompt={text!r} cannot be read by model={name}: {error}") from error
    limit = model.max_context
    if limit is not None and len(prompt) > limit:
        log.info(f"the prompt has {len(prompt)} tokens, of which model={name} sees the last {limit}")
    elif limit is not None and len(prompt) + length - 1 > limit:
        log.info(f"model={name} sees at most {limit} tokens: later ones are drawn from the last {limit} before them")
    texts: list[str] = []
    for start in range(0, n, config.batch_size):
        size = min(config.batch_size, n - start)
        classes = None
        if model.is_conditional:
            classes = torch.arange(start, start + size, device=device) % spec.num_classes
            classes = classes if condition is None else torch.full_like(classes, condition)
        drawn = model.continue_(
            prompt.to(device).expand(size, -1),
            length,
            classes,
            is_done=None if stop is None else stop_at(tokenizer, stop),
            generator=SampleNoise(config.seed, start),
        )
        texts += [(text or "") + _until(tokenizer.decode(row), stop) for row in drawn]
    files.write_texts(texts)
    for i, one in enumerate(texts):
        log.info(f"--- sample {i} ---\n{one}")
    after = "" if text is None else " after the prompt"
    return f"{n} texts of {'at most ' if stop else ''}{length} tokens{after}"


def _with_breaks(given: str | None) -> str | None:
    """A text of the command line, on which a line break is written as \\n and a tab as \\t; None if there is none."""
    if not given:
        return None
    return given.replace("\\n", "\n").replace("\\t", "\t")


def _until(text: str, stop: str | None) -> str:
    """The text up to the end of the first `stop` in it."""
    place = -1 if stop is None else text.find(stop)
    return text if stop is None or place < 0 else text[: place + len(stop)]
