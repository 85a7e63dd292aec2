"""Data, model and results of a config: what training, evaluation and sampling share."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich import get_console
from rich.console import Console
from torch import nn
from torchvision.utils import save_image

from src.build import build, build_model, plain
from src.core.collectives import broadcast_from_first, num_ranks, own_rank, part
from src.core.errors import NotApplicable, UserError, require_at_least
from src.core.protocols import Adversarial, CanBeSteered, CanSample, StartsFromWeights
from src.core.rng import derive_seed
from src.core.sound import Sound
from src.core.spec import DataSpec
from src.data.loading import ArrayData
from src.data.tokenizers import Pretrained, holds_tokenizer, read_tokenizer
from src.evaluation.comparison_rows import leaves
from src.evaluation.costs import SamplingMeter, costs_in_words, costs_to_json
from src.evaluation.curves import curve_pictures
from src.evaluation.protocol import Drawn, draw_together, evaluate, spread_classes
from src.evaluation.results import absences, findings, results_table, scalars, to_json, yardsticks
from src.metrics.features import Extractor, NetworkExtractor
from src.metrics.frozen_classifier import find_frozen, read_frozen
from src.metrics.sound_classifier import SoundExtractor
from src.metrics.stacked_classifier import StackExtractor
from src.metrics.store import Store
from src.models.latent import Latent, fit_on_latents
from src.runs import Run, file_sha256
from src.training.batch_norm import has_batch_norm, renew_batch_norm
from src.training.weights import load_weights

__all__ = [
    "evaluate_run",
    "help_to_evaluate",
    "light_measure",
    "load_autoencoder",
    "load_data",
    "load_data_of",
    "load_model",
    "load_spec",
    "load_trained_model",
    "require_classifier_settings",
    "require_same_data",
    "require_vocabulary_of_weights",
    "steer",
    "steer_as_evaluated",
]

log = logging.getLogger(__name__)

_NUM_THREADS = torch.get_num_threads()  # in training on several devices each process has its share of the cores

LightMeasure = Callable[[nn.Module, int, list[str]], tuple[dict[str, float], dict[str, str | None], list[str]]]


def load_data(config: DictConfig) -> ArrayData:
    """The data of a config, prepared, with its loaders."""
    return ArrayData(build(config.data), seed=config.seed, **build(config.loader))


def load_data_of(run: Run, config: DictConfig) -> ArrayData:
    """The data that a run was trained on; raises `UserError` if they have changed since.

    Texts are cut by the tokenizer that the run keeps: the folder that it came from may be gone.
    """
    own = config.copy()
    if OmegaConf.select(own, "data.tokenizer.path") is not None and (run.spec() or {}).get("tokenizer"):
        OmegaConf.update(own, "data.tokenizer.path", str(run.spec_file))
    data = load_data(own)
    require_same_data(run, data)
    return data


def require_same_data(run: Run, data: ArrayData) -> None:
    """Raise `UserError` if these are not the data that a run was trained on. Of an older run nobody knows."""
    if difference := _difference(run, data):
        raise UserError(
            f"the data of {run.shown} have changed since its training: {difference}; restore them, or train again"
        )


def _difference(run: Run, data: ArrayData) -> str:
    """How the data of a run differ from these, in words; empty if they are the same or it was not written down."""
    recorded, actual = run.fingerprint(), data.arrays.fingerprint
    if recorded is None:
        return ""
    was, spec = load_spec(run, run.config()), data.spec
    vocabularies = _vocabulary(was), _vocabulary(spec)
    if vocabularies[0] != vocabularies[1]:
        return f"its tokens were {vocabularies[0] or 'of no text'}, now they are {vocabularies[1] or 'of no text'}"
    if recorded != actual:
        return f"the fingerprint of the prepared examples was {recorded[:12]}, now it is {actual[:12]}"
    if was.values.kind != spec.values.kind:
        return f"data.values was {was.values.kind}, now {spec.values.kind}"
    told = [dict(leaves(asdict(some))) for some in (was, spec)]
    differing = [key for key in dict.fromkeys([*told[0], *told[1]]) if told[0].get(key) != told[1].get(key)]
    before, now = ({key: shorten(str(some.get(key)), 40, placeholder=" ...") for key in differing} for some in told)
    return "; ".join(f"{key} (in spec.json) was {before[key]}, now {now[key]}" for key in differing)


def _vocabulary(spec: DataSpec) -> str | None:
    return None if spec.tokenizer is None else read_tokenizer(spec.tokenizer).vocabulary


def require_vocabulary_of_weights(config: DictConfig, data: ArrayData) -> None:
    """Raise `UserError` if trained weights that the training begins with are of other tokens than the data.

    That the numbers of tokens agree is the network's matter; this is of what they mean, where the folder says it.
    """
    folder = OmegaConf.select(config, "network.weights")
    if folder is None or data.arrays.tokenizer is None:
        return
    if not holds_tokenizer(Path(folder)):
        given, wanted = config.network.config.get("vocab_size", 50257), data.arrays.tokenizer.num_tokens
        if given != wanted:  # a padded vocabulary or another one: nobody knows
            raise UserError(
                f"network.weights={folder} has {given:,} tokens and data={data.spec.name} has {wanted:,}, and the folder "
                "does not say what its own are; put the tokenizer.json of the weights into it"
            )
        log.info(
            f"network.weights={folder} does not say what its tokens are: that they are those of the data is not checked"
        )
        return
    own, theirs = data.arrays.tokenizer.vocabulary, Pretrained(str(folder)).make("", "").vocabulary
    if theirs != own:
        raise UserError(
            f"network.weights={folder} is of other tokens, {theirs}, than data={data.spec.name}, {own}; cut the text by "
            f"theirs: tokenizer=pretrained tokenizer.path={folder}"
        )


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
        if (of_latents := config.get("autoencoder")) is None:
            return build_model(config.model, spec, config.name.model)
        autoencoder = build_model(of_latents.model, spec, of_latents.name)
        return fit_on_latents(
            spec, autoencoder, of_latents.name, lambda latents: build_model(config.model, latents, config.name.model)
        )


def load_autoencoder(model: nn.Module, config: DictConfig, data: ArrayData) -> None:
    """Give the frozen part of a model that is to be trained its weights, those of the run that the config names.

    Raises `UserError` if that run was trained on other data, as another cut of them would let test examples into the
    training, or if its weights are not those that the config means.
    """
    of_latents = config.get("autoencoder")
    if of_latents is None:
        return
    run = Run.open(Path(of_latents.run), "autoencoder")
    if difference := _difference(run, data):
        raise UserError(
            f"autoencoder={run.shown} was trained on other data than this run: {difference}; train both on the same"
        )
    if run.fingerprint() is None:
        log.warning(f"autoencoder={run.shown} is of an older version: that its data are the same cannot be checked")
    file = run.checkpoint(of_latents.get("checkpoint", "auto"))  # a run of an older version names none
    if of_latents.get("sha256") not in (None, file_sha256(file)):
        raise UserError(
            f"autoencoder={run.shown} has other weights than when this run was made ({file.name} changed); begin a new run"
        )
    about = load_weights(model.frozen_part(), file)
    how = f"{about['weights']} weights of the {file.stem} checkpoint, its status is {run.status()['status']}"
    log.info(f"latents of {run.shown}: model={of_latents.name}, {how}")


def _autoencoder_costs(model: nn.Module, config: DictConfig) -> dict[str, Any] | None:
    """What was spent before the training, for `costs_to_json`; None of a model without an autoencoder."""
    if not isinstance(model, Latent):
        return None
    return {
        "parameters": sum(weight.numel() for weight in model.frozen_part().parameters()),
        **{"training_seconds": None, "training_device": None},
        **(config.autoencoder.get("costs") or {}),
    }


def _untrained(model: nn.Module, config: DictConfig, spec: DataSpec) -> nn.Module | None:
    """A model as it was before its training: what was trained by another run is as in the trained model.

    One that began with the weights of a folder has these; None if they cannot be had any more, or it is not asked for.
    """
    if not config.evaluation.get("untrained", True):  # a run of an older version has no such key
        return None
    untrained = steer_as_evaluated(load_model(config, spec), config)
    if isinstance(model, Latent):
        untrained.frozen_part().load_state_dict(model.frozen_part().state_dict())
    network = getattr(untrained, "network", None)
    if isinstance(network, StartsFromWeights):
        try:
            network.load_weights()
        except UserError as reason:
            log.info(f"there is no row of the untrained model: {reason}")
            return None
    return untrained


def load_trained_model(run: Run, config: DictConfig, spec: DataSpec, checkpoint: str) -> tuple[nn.Module, dict[str, Any]]:
    """The trained model of a run on the device its config asks for, in evaluation mode, and where its weights come from."""
    model = load_model(config, spec)
    file = run.checkpoint(checkpoint)
    about = load_weights(model, file, _vocabulary(spec)) | {"checkpoint": file.stem}
    if (base := OmegaConf.select(config, "network.sha256")) is not None:
        about |= {"began_with": f"weights of the SHA-256 {base[:12]}, of which the row untrained is"}
    model.eval().to(_device(config))
    if about["weights"] == "averaged" and isinstance(model, Adversarial):
        about |= _fit_batch_norm(model, config, spec)
    return model, about


def steer(model: nn.Module, name: str, steps: Any, guidance: Any, prefix: str = "") -> None:
    """Let a model draw in so many steps and with such guidance from now on; None leaves it as its config says.

    Args:
        model: any.
        name: as in `model=NAME`.
        steps, guidance: as they were given.
        prefix: of these keys, for errors.
    """
    given = {key: value for key, value in (("steps", steps), ("guidance", guidance)) if value is not None}
    for key, value in given.items():
        kinds, kind = ((int,), "a whole number") if key == "steps" else ((int, float), "a number")
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            raise UserError(f"{prefix}{key}={value} must be {kind}, or null for what the model was trained with")
        require_at_least(f"{prefix}{key}", value, 1 if key == "steps" else 0)
        if not isinstance(model, CanBeSteered):
            raise UserError(
                f"{prefix}{key}={value} cannot be asked of model={name}: it does not draw in steps (it has no CanBeSteered)"
            )
    if isinstance(model, CanBeSteered):
        model.steer(**given)


def steer_as_evaluated(model: nn.Module, config: DictConfig) -> nn.Module:
    """The model, from now on drawing as `evaluation.steps` and `evaluation.guidance` say."""
    settings = config.evaluation  # that of an older run has neither
    steer(model, config.name.model, settings.get("steps"), settings.get("guidance"), "evaluation.")
    return model


def _fit_batch_norm(model: nn.Module, config: DictConfig, spec: DataSpec) -> dict[str, str]:
    """Give an averaged generator the batch norm statistics that its weights deserve; what a card says of that."""
    num_samples = config.evaluation.get("batch_norm_samples", 0)  # a run of an older version was measured without
    if not isinstance(model, CanSample) or not has_batch_norm(model.players()[0]):
        return {}
    if not num_samples:
        return {"batch_norm": "statistics of the trained weights"}
    device, batch_size = next(model.parameters()).device, config.loader.batch_size
    condition = spread_classes(spec, num_samples, device) if model.is_conditional else None
    renew_batch_norm(model, model.players()[0], num_samples, batch_size, derive_seed(config.evaluation.seed, 4), condition)
    return {"batch_norm": f"statistics of {num_samples // batch_size * batch_size:,} samples of these weights"}


def _device(config: DictConfig) -> str:
    wants_gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "cuda" if wants_gpu else "cpu"  # of several, this process's own


def evaluate_run(run: Run, data: ArrayData, config: DictConfig) -> dict[str, Any]:
    """Measure a run's checkpoint; writes and prints the results and returns them as plain JSON types.

    Earlier results of metrics that are not measured now stay in the run's `results.json`. After a training on several
    devices rank 0 calls this and the others `help_to_evaluate`: all draw the samples, then rank 0 measures them by itself.
    """
    settings = config.evaluation
    earlier = run.results() or {}
    model, about = load_trained_model(run, config, data.spec, settings.checkpoint)
    steer_as_evaluated(model, config)
    log.info(f"evaluating the {about['checkpoint']} checkpoint, {about['weights']} weights")
    meter = SamplingMeter(model)
    drawn = _draw_with_all(model, data, config, meter) if num_ranks() > 1 else None
    results = evaluate(
        model=model,
        untrained=_untrained(model, config, data.spec),
        model_name=config.name.model,
        data=data,
        metrics=build(config.metric),
        classifier=_classifier(config, data, next(model.parameters()).device),
        store=_store(config),
        num_samples=settings.num_samples,
        batch_size=settings.batch_size,
        seed=settings.seed,
        about=about,
        num_likelihood_examples=settings.get("num_likelihood_examples"),  # a run of an older version has none
        drawn=drawn,
        meter=meter,
    )
    costs = costs_to_json(
        model, run.training_time(), meter.to_json(), earlier.get("costs", {}), _autoencoder_costs(model, config)
    )
    as_json = to_json(results) | {"costs": costs}
    kept = earlier.get("metrics", {}) if earlier.get("schema") == as_json["schema"] else {}
    for name, entry in as_json["metrics"].items():
        if "value" in entry or "value" not in kept.get(name, {}):
            kept[name] = entry
        else:
            log.info(f"{name} has no value now; the earlier one stays in the results")
    run.write_results(as_json | {"metrics": kept})
    for name, picture in curve_pictures(as_json).items():
        save_image(picture / 255, run.samples / f"{name}.png")
    _report(as_json)
    log.info(f"costs: {costs_in_words(costs)}")
    return as_json


def help_to_evaluate(data: ArrayData, config: DictConfig) -> None:
    """What the other ranks do while rank 0 is in `evaluate_run`: their share of the drawing, with rank 0's weights."""
    assert own_rank() > 0
    _draw_with_all(steer_as_evaluated(load_model(config, data.spec), config).to(_device(config)), data, config)


def _draw_with_all(
    model: nn.Module, data: ArrayData, config: DictConfig, meter: SamplingMeter | None = None
) -> tuple[Drawn, Drawn] | None:
    """This process's share in drawing from rank 0's model and from the untrained one; on rank 0 all samples. None if there
    is nothing to measure. It is the last that the processes do together."""
    broadcast_from_first(model)
    settings = config.evaluation
    drawn: tuple[Drawn, Drawn] | None = None
    if config.metric:
        how = (data, settings.num_samples, settings.batch_size, settings.seed)
        before, name = _untrained(model, config, data.spec), config.name.model
        of_model = draw_together(model, name, *how, meter)
        if before is None:
            drawn = of_model, NotApplicable("there is no untrained model")
        else:
            drawn = of_model, draw_together(before.to(_device(config)), f"the untrained {name}", *how)
    part()
    torch.set_num_threads(_NUM_THREADS)
    return drawn


def light_measure(config: DictConfig, data: ArrayData) -> LightMeasure:
    """A function `fn(model, num_samples, metrics)` that measures a model in training: values by name, which values are
    better by name, findings in words.

    Of `metrics` those are measured that the run measures at its end.
    """

    def measure(
        model: nn.Module, num_samples: int, metrics: list[str]
    ) -> tuple[dict[str, float], dict[str, str | None], list[str]]:
        results = evaluate(
            model=model,
            untrained=None,
            model_name=config.name.model,
            data=data,
            metrics=build({name: node for name, node in plain(config.metric).items() if name in metrics}),
            classifier=_classifier(config, data, next(model.parameters()).device),
            store=_store(config),
            num_samples=num_samples,
            batch_size=config.evaluation.batch_size,
            seed=config.evaluation.seed,
            about={},
            num_likelihood_examples=config.evaluation.num_likelihood_examples,
        )
        as_json = to_json(results)
        values = scalars(as_json)
        return values, {name: as_json["metrics"][name]["better"] for name in values}, findings(as_json)

    return measure


def require_classifier_settings(config: DictConfig) -> None:
    """Raise `UserError` for settings of the frozen classifier that are none."""
    settings = config.evaluation.get("classifier")
    if not isinstance(settings, DictConfig) or not {"file", "sha256"} <= set(settings):
        raise UserError("evaluation.classifier must have the keys file and sha256 (a run of an older version has others)")


def _store(config: DictConfig) -> Store:
    return Store(Path(config.data.cache) / "statistics")


def _classifier(config: DictConfig, data: ArrayData, device: torch.device) -> Callable[[], Extractor]:
    """Gives the frozen classifier of the data on a device, or raises `NotApplicable` with the reason why there is none."""
    require_classifier_settings(config)
    settings, spec = config.evaluation.classifier, data.spec

    def load() -> Extractor:
        if not spec.num_classes:
            raise NotApplicable(f"data={spec.name} has no labels, so there is no classifier of it")
        folder = Path(config.data.cache) / "classifiers"
        file = find_frozen(settings.file, folder, spec, data.arrays.fingerprint)
        state, about, sha256 = read_frozen(file, settings.sha256)
        if spec.sound is not None:
            return _sound_classifier(file, state, about, sha256, spec, device)
        seen, stack = (about["in_shape"], len(about["class_names"])), data.arrays.stack
        is_of_parts = stack is not None and seen == ([1, *spec.shape[1:]], stack.num_classes)
        if not is_of_parts and seen != (list(spec.shape), spec.num_classes):
            raise NotApplicable(
                f"the classifier {file} is of {about['in_shape']} images in {len(about['class_names'])} classes; "
                f"data={spec.name} gives {spec.describe()}"
            )
        network = _network_of(file, state, about)
        extractor = NetworkExtractor(file.stem, network.to(device), sha256, about["accuracy"])
        return StackExtractor(extractor, stack) if stack is not None and is_of_parts else extractor

    return load


def _sound_classifier(
    file: Path, state: dict[str, Any], about: dict[str, Any], sha256: str, spec: DataSpec, device: torch.device
) -> Extractor:
    assert spec.sound is not None
    try:
        sound = Sound(**about["sound"])
    except (KeyError, TypeError, UserError) as error:
        raise NotApplicable(f"the classifier {file} is not of sounds; data={spec.name} gives sounds") from error
    of_file, of_data = ((some.sample_rate, some.length) for some in (sound, spec.sound))
    if of_file != of_data or len(about["class_names"]) != spec.num_classes:
        raise NotApplicable(
            f"the classifier {file} is of {sound.describe()} in {len(about['class_names'])} classes; data={spec.name} "
            f"gives {spec.describe()}"
        )
    network = _network_of(file, state, about)
    return SoundExtractor(file.stem, network.to(device), sound, sha256, about["accuracy"])


def _network_of(file: Path, state: dict[str, Any], about: dict[str, Any]) -> nn.Module:
    """The network of a frozen file with its weights."""
    try:
        with torch.random.fork_rng():  # its first weights, replaced at once, come from the global generator
            network = _built_network(about["network"])
        network.load_state_dict(state)
    except Exception as error:  # a file of somebody else may describe anything
        raise NotApplicable(f"the network of {file} cannot be built ({str(error).splitlines()[0]})") from error
    return network


def _built_network(node: dict[str, Any]) -> nn.Module:
    """The network that a file describes, which may come from a stranger: one of ours, of plain arguments."""
    own = [value for value in node.values() if isinstance(value, dict) or "_target_" in str(value)]  # in a list, too
    if not str(node.get("_target_", "")).startswith("src.networks.") or own:
        raise ValueError("it is none of src.networks with plain arguments")
    return build(node)


def _report(results: dict[str, Any]) -> None:
    """The results in words, to the console and the log."""
    console = Console(width=max(120, get_console().width), no_color=True)
    with console.capture() as capture:
        console.print(results_table(results))
    log.info(capture.get().rstrip())
    for line in findings(results) + yardsticks(results) + absences(results):
        log.info(line)
