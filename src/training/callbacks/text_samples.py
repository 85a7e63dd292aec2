"""Texts that a model draws in the course of its training."""

from pathlib import Path

import torch
from lightning.pytorch.loggers import TensorBoardLogger

from src.core.protocols import CanSample
from src.core.rng import SampleNoise
from src.core.spec import DataSpec
from src.data.tokenizers import read_tokenizer
from src.training.module import TrainingModule

__all__ = ["MAX_TEXTS", "show_texts"]

MAX_TEXTS = 8  # drawn at a time: they are for reading


@torch.no_grad()
def show_texts(pl_module: TrainingModule, spec: DataSpec, directory: Path, when: str, count: int, seed: int) -> None:
    """Draw texts as long as an example, always from the same noise, into samples_WHEN.txt and to TensorBoard.

    Args:
        pl_module: its model draws them, with the weights that it has now.
        spec: of texts.
        directory: of the file.
        when: part of the file's name.
        count: how many.
        seed: of the noise.
    """
    model = pl_module.model
    assert isinstance(model, CanSample)
    assert spec.tokenizer is not None
    tokenizer = read_tokenizer(spec.tokenizer)
    condition = torch.arange(count, device=pl_module.device) % spec.num_classes if model.is_conditional else None
    drawn = model.sample(count, condition, generator=SampleNoise(seed))
    texts = [f"--- sample {i} ---\n{tokenizer.decode(row)}\n" for i, row in enumerate(drawn)]
    (directory / f"samples_{when}.txt").write_text("".join(texts), encoding="utf-8", newline="")
    for logger in pl_module.loggers:
        if isinstance(logger, TensorBoardLogger):
            as_code = "".join(f"    {line}\n" for text in texts for line in text.splitlines())  # not as Markdown
            logger.experiment.add_text("samples", as_code, pl_module.step)
