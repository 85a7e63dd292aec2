"""Train a model: `python -m src.train model=vae data=mnist`. Everything the run is ends up in one directory."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from src.claim import claim
from src.cli import CONF, run_entry_point
from src.console import leave_log_file
from src.core.errors import PrunedError, UserError
from src.core.ranks import global_rank
from src.jobs import named, nothing_to_do, run_as_job, wanted_of
from src.runs import Run

log = logging.getLogger(__name__)

_RESUMABLE = ("trainer.max_epochs", "trainer.max_steps", "loader.num_workers")
_OWN_CALLBACKS = ("progress", "pictures", "checkpoint", "light_evaluation")  # they are given more than their settings


def train(config: DictConfig) -> list[float] | None:
    """One run: fit, evaluate, write down; its status says how it ended. As a job of a sweep: its objectives."""
    hydra = cast("DictConfig", HydraConfig.get())
    if hydra.mode is RunMode.MULTIRUN:  # under a launcher that is not ours
        return run_as_job(config, hydra)
    if config.resume is not None:
        _resume(config, list(hydra.overrides.task))
        return None
    directory = Path(hydra.runtime.output_dir)
    own = named(config, hydra)
    if global_rank() > 0:  # the run is rank 0's
        _follow(own, directory)
        return None
    with ExitStack() as held:
        try:
            held.enter_context(claim(directory))
            run = Run.create(directory, own)
        except UserError:
            leave_log_file()  # it belongs to the run that is there
            raise
        log.info(f"model={own.name.model} on data={own.name.data}; the run lies in {run.shown}")
        _to_the_end(own, run, checkpoint=None)
    return None


def _resume(given: DictConfig, overrides: list[str]) -> None:
    """Go on with a run where its last checkpoint is, with its own config; the command line may only lengthen it."""
    keys = {override.lstrip("+~").partition("=")[0] for override in overrides} - {"resume"}
    if others := sorted(keys - set(_RESUMABLE)):
        allowed = ", ".join(_RESUMABLE)
        raise UserError(f"{others[0]} may change the result of the run that is resumed; allowed beside resume=: {allowed}")
    directory = Path(given.resume)
    config = Run.open(directory, "resume").config()
    for key in keys:
        OmegaConf.update(config, key, OmegaConf.select(given, key))
    if global_rank() > 0:
        _follow(config, directory)
        return
    with ExitStack() as held:
        try:
            held.enter_context(claim(directory))
            if (why := nothing_to_do(Run(directory))) is not None:
                log.info(f"{why} ({directory})")
                return
            run = Run.reopen(directory, is_longer=bool({"trainer.max_epochs", "trainer.max_steps"} & keys))
        except UserError:
            leave_log_file()
            raise
        checkpoint = run.checkpoint("last") if run.has_checkpoint("last") else None
        going_on = "going on" if checkpoint else "beginning"
        log.info(f"{going_on} with model={config.name.model} on data={config.name.data} in {run.shown}")
        _to_the_end(config, run, checkpoint)


def _follow(config: DictConfig, directory: Path) -> None:
    """What a further process of a run on several devices does: the training, without the run's books."""
    logging.root.setLevel(logging.WARNING)
    run = Run(directory)
    _train(config, run, run.checkpoint("last") if run.has_checkpoint("last") else None)


def _to_the_end(config: DictConfig, run: Run, checkpoint: Path | None) -> None:
    run.set_status("running")
    try:
        _train(config, run, checkpoint)
    except PrunedError as error:
        run.set_status("pruned", str(error))
        log.info(f"pruned: {error}")
        return
    except Exception as error:
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        run.set_status("failed", f"{name}{' '.join(str(error).split())}")
        raise
    except BaseException:  # Ctrl-C, or Lightning's exit after it
        run.set_status("interrupted")
        log.info(f"interrupted; to go on: python -m src.train resume={run.shown}")
        raise
    run.set_status("done")
    log.info(f"done: the run lies in {run.shown}")
    if any(run.samples.iterdir()):
        log.info(f"  pictures       {run.shown}/samples")
    log.info("  dashboard      make tensorboard")
    if any(run.samples.glob("samples_*")):
        log.info(f"  more samples   python -m src.sample run={run.shown} n=64")
    log.info(f"  score again    python -m src.evaluate run={run.shown}")
    log.info(f"  compare        python -m src.compare {run.shown} OTHER_RUN")


def _train(config: DictConfig, run: Run, checkpoint: Path | None) -> None:
    import lightning as L
    from rich import get_console

    from src.build import build, plain
    from src.core.devices import device_name
    from src.core.protocols import Adversarial, ExpectationMaximization
    from src.evaluation.curves import curve_pictures
    from src.evaluation.protocol import require_protocol
    from src.evaluation.results import scalars, to_markdown
    from src.experiment import (
        evaluate_run,
        help_to_evaluate,
        light_measure,
        load_autoencoder,
        load_data,
        load_data_of,
        load_model,
        require_classifier_settings,
        require_vocabulary_of_weights,
        steer_as_evaluated,
    )
    from src.training.batch_norm import require_batch_norm_samples
    from src.training.callbacks.dashboard import Dashboard
    from src.training.callbacks.held_out_means import HeldOutMeans, held_out_means
    from src.training.final_metrics import log_final_metrics, log_hyper_parameters
    from src.training.fit import make_trainer, make_training_module

    _quiet_libraries()
    L.seed_everything(config.seed, verbose=False)
    is_first = global_rank() == 0
    if checkpoint is not None:
        data = load_data_of(run, config)
    else:
        data = load_data(config)
        require_vocabulary_of_weights(config, data)
    if checkpoint is None and is_first:
        run.write_spec(data.spec.to_dict(), data.arrays.fingerprint)
    log.info(f"data: {data.spec.describe()}")
    build(config.metric)  # what cannot be is better refused before the training than after it
    settings = config.evaluation
    require_protocol(settings.num_samples, settings.batch_size, settings.num_likelihood_examples)
    require_classifier_settings(config)
    run.require_checkpoint_name(config.evaluation.checkpoint)
    require_batch_norm_samples(config.evaluation.batch_norm_samples, config.loader.batch_size)
    steer_as_evaluated(load_model(config, data.spec), config)  # refuses what cannot be; the training is as the model says
    model = load_model(config, data.spec)
    if checkpoint is None:
        load_autoencoder(model, config, data)
    if config.evaluation.checkpoint == "best" and isinstance(model, Adversarial):
        raise UserError(
            "evaluation.checkpoint=best: a model of two players has no loss that falls as it gets better, so no best "
            "checkpoint; set evaluation.checkpoint=auto or last"
        )
    is_trained_whole = isinstance(model, ExpectationMaximization)  # though by no gradient
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad or is_trained_whole)
    log.info(f"model: {num_parameters:,} parameters")

    light_evaluation = build(config.callback.light_evaluation)(measure=light_measure(config, data))
    callbacks = [
        build(config.callback.progress)(console=get_console()),
        Dashboard(),
        HeldOutMeans(),
        build(config.callback.pictures)(directory=run.samples),
        build(config.callback.checkpoint)(directory=run.checkpoints),
        light_evaluation,
        *(build(node) for name, node in config.callback.items() if name not in _OWN_CALLBACKS),
    ]
    loggers = [build(node)(save_dir=run.path) for node in config.logger.values()]
    if checkpoint is not None and is_first:
        _go_on_logging(loggers, checkpoint)
    trainer = make_trainer(default_root_dir=run.path, callbacks=callbacks, logger=loggers, **build(config.trainer))
    optimizers = build(config.get("optim", {}))  # none without gradients
    module = make_training_module(model, optimizers, build(config.training), config.seed)
    if is_first:
        run.write_environment(config.seed, str(trainer.strategy.root_device))
    start = time.perf_counter()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    finally:
        if is_first:
            several = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
            run.add_training_time(time.perf_counter() - start, several + device_name(trainer.strategy.root_device))

    if not is_first:
        help_to_evaluate(data, config)
        return
    run.write_course(light_evaluation.course)
    run.write_validation(held_out_means(run.checkpoint(config.evaluation.checkpoint)))
    results = evaluate_run(run, data, config)
    for name, course in light_evaluation.course.items():
        log.info(f"light evaluations: {_course_in_words(name, course)}")
    log_hyper_parameters(loggers, _hyper_parameters(plain(config)), scalars(results))
    log_final_metrics(loggers, scalars(results), to_markdown(results), module.step, curve_pictures(results))


def _course_in_words(name: str, course: dict[str, Any]) -> str:
    best, final, ratio = course["best"], course["final"], course["ratio"]
    how_much = "" if ratio is None else f", worse by a factor of {ratio:.3g}" if ratio > 1 else ", the best"
    return f"{name} best {best['value']:.4g} at step {best['step']}, final {final['value']:.4g}{how_much}"


def _go_on_logging(loggers: list[Any], checkpoint: Path) -> None:
    """TensorBoard forgets what the run logged after its checkpoint, since those steps are done again; a CSV file is put
    aside, since Lightning begins it anew."""
    import torch
    from lightning.pytorch.loggers import TensorBoardLogger

    step = torch.load(checkpoint, map_location="cpu", weights_only=True)["progress"]["step"]
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger._kwargs["purge_step"] = step + 1
        table = Path(logger.log_dir or "") / "metrics.csv"
        if table.is_file():
            table.rename(table.with_name(f"metrics_until_step_{step}.csv"))


def _hyper_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """What a person would compare runs by: model and data by name, the config without plumbing, each network once."""
    plumbing = ("callback", "logger", "metric", "evaluation", "name", "model", "data")
    named = {
        f"{part}.{key}": value
        for part in ("model", "data")
        for key, value in config[part].items()
        if not isinstance(value, dict) and key not in ("_target_", "cache", "root")  # the name says it; no matter where
    }
    return config["name"] | named | {key: value for key, value in config.items() if key not in plumbing}


def _quiet_libraries() -> None:
    """Lightning's advice to interactive users is not for the log of a run."""
    import warnings

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # none are needed: see conf/loader
    warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")  # the data module is
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # a frozen part is
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")  # ours is in `training:`
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # lightning 2.6 on torch 2.14
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=DeprecationWarning)


def _check(config: DictConfig) -> None:
    if config.resume is not None:
        Run.open(Path(config.resume), "resume")
    known = [file.stem for file in (CONF / "metric").glob("*.yaml") if file.stem != "default"]
    _check_objective(config)
    if "light_evaluation" not in config.callback:
        raise UserError("callback.light_evaluation is needed; callback.light_evaluation.metrics=[] turns it off")
    for name in config.callback.light_evaluation.metrics or ():
        if name not in known:
            raise UserError(
                f"callback.light_evaluation.metrics: {name} is not a metric; allowed: {', '.join(sorted(known))}"
            )


def _check_objective(config: DictConfig) -> None:
    objective = config.objective
    if not isinstance(objective, DictConfig):
        raise UserError(f"objective={objective} must say what is good, as in objective={{{objective}: minimize}}")
    for name, direction in ((str(name), direction) for name, direction in objective.items()):
        if direction not in ("minimize", "maximize", None):  # None: not this one of a search's
            raise UserError(f"objective={{{name}:{direction}}} is no direction; allowed: minimize, maximize")
        if not name.startswith("val/") and name not in config.metric:
            raise UserError(
                f"objective={name} is neither a held-out mean of the training, as val/loss, nor one of metric=: "
                f"{', '.join(map(str, config.metric))}"
            )


def main() -> Any:
    run_entry_point("config", train, _check, _end_sweep)


def _end_sweep(directory: Path, config: DictConfig) -> bool:
    from src.sweep_report import write_report

    return write_report(directory, wanted_of(config) or None).is_complete


if __name__ == "__main__":
    main()
