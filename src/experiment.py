"""Data, model and results of a config: what training, evaluation and sampling share."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich import get_console
from rich.console import Console
from torch import nn

from src.build import build, build_model, plain
from src.core.errors import UserError
from src.core.spec import DataSpec
from src.data.loading import ArrayData
from src.evaluation.protocol import evaluate
from src.evaluation.results import absences, results_table, to_json
from src.runs import Run
from src.training.domain_classifier import domain_classifier
from src.training.weights import load_weights

__all__ = ["evaluate_run", "load_data", "load_model", "load_spec", "load_trained_model"]

log = logging.getLogger(__name__)


def load_data(config: DictConfig) -> ArrayData:
    """The data of a config, prepared, with its loaders."""
    return ArrayData(build(config.data), seed=config.seed, **build(config.loader))


def load_spec(run: Run, config: DictConfig) -> DataSpec:
    """What the model of a run was built for; needs the data only in a run from before `spec.json`."""
    written = run.spec()
    if written is None:
        return load_data(config).spec
    try:
        return DataSpec.from_dict(written)
    except (KeyError, TypeError) as error:
        raise UserError(f"{run.path / 'spec.json'} is damaged ({type(error).__name__}: {error})") from error


def load_model(config: DictConfig, spec: DataSpec) -> nn.Module:
    """The model of a config with its initial weights, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return build_model(config.model, spec, config.name.model)


def load_trained_model(run: Run, config: DictConfig, spec: DataSpec, checkpoint: str) -> tuple[nn.Module, dict[str, Any]]:
    """The trained model of a run on the device its config asks for, in evaluation mode, and where its weights come from."""
    model = load_model(config, spec)
    file = run.checkpoint(checkpoint)
    about = load_weights(model, file)
    wants_gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return model.eval().to("cuda" if wants_gpu else "cpu"), about | {"checkpoint": file.stem}


def evaluate_run(run: Run, data: ArrayData, config: DictConfig) -> dict[str, Any]:
    """Measure a run's checkpoint; writes and prints the results and returns them as plain JSON types.

    Earlier results of metrics that are not measured now stay in the run's `results.json`.
    """
    settings = config.evaluation
    earlier = run.results() or {}
    model, about = load_trained_model(run, config, data.spec, settings.checkpoint)
    log.info(f"evaluating the {about['checkpoint']} checkpoint, {about['weights']} weights, {settings.num_samples} samples")
    results = evaluate(
        model=model,
        untrained=load_model(config, data.spec),
        model_name=config.name.model,
        data=data,
        metrics=build(config.metric),
        classifier=lambda: domain_classifier(
            data,
            cache=Path(config.data.cache) / "classifiers",
            recipe=plain(settings.classifier),
            **build(settings.classifier),
        ),
        num_samples=settings.num_samples,
        batch_size=settings.batch_size,
        seed=settings.seed,
        about=about,
    )
    as_json = to_json(results)
    run.write_results(as_json | {"metrics": earlier.get("metrics", {}) | as_json["metrics"]})
    _report(as_json)
    return as_json


def _report(results: dict[str, Any]) -> None:
    """The results in words, to the console and the log."""
    console = Console(width=max(110, get_console().width), no_color=True)
    with console.capture() as capture:
        console.print(results_table(results))
    log.info(capture.get().rstrip())
    for line in absences(results):
        log.info(line)
