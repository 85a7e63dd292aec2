"""Write a trained network for transformers: `python -m src.export run=outputs/... out=FOLDER`, as `save_pretrained` does.

`GPT2LMHeadModel.from_pretrained(FOLDER)` gives the same logits. What the model has besides its network, the frequencies of
first tokens, has no place in such a folder: there, text is drawn after a prompt.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from src.cli import run_entry_point
from src.core.errors import UserError
from src.core.pretrained import MARKS
from src.runs import Run

if TYPE_CHECKING:
    from src.core.spec import DataSpec
    from src.core.tokens import TokenChoice

log = logging.getLogger(__name__)


def export(config: DictConfig) -> None:
    """Write config.json, the weights in float32, how samples are drawn, and the tokenizer."""
    from src.experiment import load_spec, load_trained_model
    from src.models.autoregressive import Autoregressive
    from src.networks.gpt2 import as_gpt2

    run, out = Run.open(Path(str(config.run))), Path(str(config.out))
    of_run = run.config()
    spec = load_spec(run, of_run)
    model, about = load_trained_model(run, of_run, spec, config.checkpoint)
    if not isinstance(model, Autoregressive):
        raise UserError(
            f"model={of_run.name.model} predicts no next token, so it is no GPT-2; export model=gpt2 or transformer"
        )
    try:
        net: Any = as_gpt2(model.network)
    except UserError as error:
        raise UserError(f"model={of_run.name.model} cannot be exported: {error}") from error
    marks = {name: getattr(net.config, name) for name in MARKS}
    net.generation_config = _generation_config(model.sampling, marks)
    net.cpu().save_pretrained(out)
    tokenizer = _save_tokenizer(spec, out, marks)
    log.info(f"wrote the {about['checkpoint']} checkpoint ({about['weights']} weights) and {tokenizer} to {out}")


def _generation_config(choice: "TokenChoice", marks: dict[str, int | None]) -> Any:
    """How the run draws, field by field: what is left out, transformers fills with its own (the 50 likeliest tokens).

    A text ends there with the mark of the end that the base weights had, if any.
    """
    from transformers import GenerationConfig

    is_drawn = choice.temperature > 0
    fields = {
        "do_sample": is_drawn,
        "repetition_penalty": choice.repetition_penalty,
        "pad_token_id": None,
        **marks,
    }
    if is_drawn:
        fields |= {"temperature": choice.temperature, "top_k": choice.top_k or 0, "top_p": choice.top_p or 1.0}
        fields |= {"min_p": choice.min_p}
    return GenerationConfig(**fields)


def _save_tokenizer(spec: "DataSpec", out: Path, marks: dict[str, int | None]) -> str:
    """The tokenizer as transformers has it, if it is of byte pairs, else as ours; what was written, in words.

    `tokenizer=pretrained tokenizer.path=OUT` reads either.
    """
    from src.data.tokenizers import BytePairTokenizer, read_tokenizer

    if spec.tokenizer is None:
        return "no tokenizer, since its tokens are no text,"
    tokenizer = read_tokenizer(spec.tokenizer)
    if isinstance(tokenizer, BytePairTokenizer):
        tokenizer.save_pretrained(out, {name.removesuffix("_id"): number for name, number in marks.items()})
        return "its tokenizer"
    (out / "tokens.json").write_text(tokenizer.to_json())
    return f"what its tokens are (tokens.json, since transformers has no tokenizer of {tokenizer.in_words})"


def _check(config: DictConfig) -> None:
    Run.open(Path(str(config.run)))
    out = Path(str(config.out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} is there already, and nothing is overwritten; give a new folder")


def main() -> None:
    run_entry_point("export", export, _check)


if __name__ == "__main__":
    main()
