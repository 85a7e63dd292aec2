"""The project's own configs, composed for tests and benchmarks."""

import copy
import functools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from src.models.latent import InvertibleLatent, MixtureLatent, NoiseLatent

__all__ = [
    "CONF",
    "compose_config",
    "compose_model",
    "is_of_another",
    "is_of_tokens",
    "is_of_waveforms",
    "load_option",
    "models_by_themselves",
    "models_of_pictures",
    "options",
    "parts",
    "single_options",
    "slow_but_for",
    "small",
    "target",
]

CONF = Path(__file__).resolve().parent.parent / "conf"


def compose_config(*overrides: str, root: str = "config") -> DictConfig:
    """The config of `python -m src.train OVERRIDES`, a copy of its own for every caller."""
    return copy.deepcopy(_composed(overrides, root))


def compose_model(*overrides: str) -> DictConfig:
    """The same without metrics and loggers, for tests of the model and its training: it is composed in half the time."""
    return compose_config(*overrides, "metric=[]", "logger=[]")


@functools.cache
def _composed(overrides: tuple[str, ...], root: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(root, overrides=list(overrides))


def options(group: str) -> list[str]:
    """The names that a config group offers, one for each YAML."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def single_options(group: str) -> list[str]:
    """The options without presets, which only list others of their group."""
    return [name for name in options(group) if not _is_preset(load_option(group, name), options(group))]


def _is_preset(option: DictConfig, names: list[str]) -> bool:
    return set(option) == {"defaults"} and all(part in names for part in option.defaults)


def load_option(group: str, name: str) -> DictConfig:
    """The YAML of one option as it is written, without its defaults, on top of that of the option it adds to, if any."""
    return copy.deepcopy(_loaded(group, name))


@functools.cache
def _loaded(group: str, name: str) -> DictConfig:
    own = OmegaConf.load(CONF / group / f"{name}.yaml")
    base = own.get("defaults", [None])[0]
    if not isinstance(base, str) or base == "_self_" or set(own) == {"defaults"}:
        return own
    whole = OmegaConf.merge(load_option(group, base), own)
    whole.defaults = load_option(group, base).get("defaults", [])
    return whole


def parts(model: str) -> dict[str, str]:
    """What a model's YAML is put together from: `{"network@generator": "mlp", "penalty": "none", ...}`."""
    chosen = (one for one in load_option("model", model).get("defaults", ()) if one != "_self_")
    return {group.lstrip("/"): option for one in chosen for group, option in one.items()}


def slow_but_for(models: Iterable[str], few: Collection[str]) -> list[Any]:
    """The models as parameters of a test, slow but for a few that stand for the others."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in models]


def small(model: str, width: int = 16) -> tuple[str, ...]:
    """Overrides that make two convolutional players narrow, a mixture coarse, paths short; none for other models."""
    if "num_components" in load_option("model", model).model:
        return "model.num_components=4", "model.num_pca=5"
    if "sampler" in parts(model):
        return "network.width=16", "sampler.steps=4", "likelihood_solver.rtol=0.01", "likelihood_solver.atol=0.01"
    if is_of_tokens(model):
        return tuple(f"network.{key}={value}" for key, value in (("width", width), ("num_layers", 2)) if _has(model, key))
    players = {role: parts(model).get(f"network@{role}") for role in ("generator", "discriminator")}
    return tuple(
        f"{role}.width={width}" for role, name in players.items() if name and "width" in load_option("network", name)
    )


def _has(model: str, key: str) -> bool:
    """Whether the network of a model has a setting."""
    return key in load_option("network", parts(model)["network"])


def target(group: str, name: str) -> Any:
    """The class or function that an option builds."""
    option = load_option(group, name)
    built = get_object(option[group]._target_ if group in option else option._target_)
    if group == "model" and is_of_another(name):
        return (
            MixtureLatent if hasattr(built, "maximize") else InvertibleLatent if hasattr(built, "encode") else NoiseLatent
        )
    return built


def is_of_another(model: str) -> bool:
    """Whether a model needs the run of another one."""
    return "autoencoder" in load_option("model", model).keys()  # noqa: SIM118 - `in` is false of a value that is missing


def models_by_themselves() -> list[str]:
    """The models of pictures that need no run of another model."""
    return [name for name in models_of_pictures() if not is_of_another(name)]


def is_of_tokens(model: str) -> bool:
    """Whether a model is of sequences of tokens, and of nothing else."""
    return hasattr(target("model", model), "continue_")


def is_of_waveforms(model: str) -> bool:
    """Whether a model has networks of waveforms."""
    return any(network.startswith("conv1d") for network in parts(model).values())


def models_of_pictures() -> list[str]:
    """The models that train on pictures of discrete levels, as those of digits."""
    return [
        name
        for name in options("model")
        if not is_of_tokens(name) and not is_of_waveforms(name) and not _needs_continuous_values(name)
    ]


def _needs_continuous_values(model: str) -> bool:
    """Whether a model's own likelihood is a density."""
    likelihood = parts(model).get("likelihood")
    return likelihood is not None and "discrete" not in target("likelihood", likelihood).accepts
