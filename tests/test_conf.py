"""Every YAML that describes an object describes one that exists, with arguments that it has."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from src.build import build
from tests.configs import CONF, compose_config, compose_model, load_option, options, single_options, target

PREPARES_DATA = {"data", "experiment"}  # building it would write to the disk


model_config = functools.cache(lambda name: compose_model(f"model={name}"))


def resolved(group: str, name: str) -> dict[str, Any]:
    """An option by itself; a model, an experiment or a text with the parts that its defaults list brings."""
    is_text = group == "data" and "defaults" in load_option(group, name)
    if group not in ("model", "experiment") and not is_text:
        return OmegaConf.to_container(load_option(group, name), resolve=True)
    own = ["model"] if group == "model" else [key for key in load_option(group, name) if key != "defaults"]
    composed = compose_config if {"metric", "logger"} & set(own) else compose_model
    config = model_config(name) if group == "model" else composed(f"{group}={name}")
    return {key: OmegaConf.to_container(config[key], resolve=True) for key in own}


def nodes(plain: Any) -> Iterator[dict[str, Any]]:
    """All nodes with a `_target_`, inner ones too."""
    if isinstance(plain, dict):
        if "_target_" in plain:
            yield plain
        for value in plain.values():
            yield from nodes(value)


@functools.cache
def plain_nodes(group: str, name: str) -> list[dict[str, Any]]:
    return list(nodes(resolved(group, name)))


BUILT = [
    (path.parent.name, path.stem)
    for path in sorted(CONF.glob("*/*.yaml"))
    if list(nodes(OmegaConf.to_container(OmegaConf.load(path))))
]


def options_of(built: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("group", "name"), built, ids=[f"{group}/{name}" for group, name in built])


@options_of(BUILT)
def test_keys_beside_a_target_are_its_arguments(group, name):
    for node in plain_nodes(group, name):
        arguments = {key: value for key, value in node.items() if not key.startswith("_")}
        signature = inspect.signature(get_object(node["_target_"]))
        bind = signature.bind_partial if node.get("_partial_") else signature.bind
        bind(**arguments)


@options_of(BUILT)
def test_own_targets_take_no_arbitrary_keywords(group, name):
    for built in (get_object(node["_target_"]) for node in plain_nodes(group, name)):
        kinds = {parameter.kind for parameter in inspect.signature(built).parameters.values()}
        assert not built.__module__.startswith("src.") or inspect.Parameter.VAR_KEYWORD not in kinds


CHANGES_NOTHING = {("schedule", "cosine"), ("schedule", "linear")}  # until it is told what


NEEDS_FILES = {("tokenizer", "pretrained")}


@options_of([one for one in BUILT if one[0] not in PREPARES_DATA and one not in CHANGES_NOTHING | NEEDS_FILES])
def test_option_builds(group, name):
    for node in plain_nodes(group, name):
        built = build(node)
        assert callable(built) if node.get("_partial_") else isinstance(built, get_object(node["_target_"]))


@pytest.mark.parametrize("name", single_options("metric"))
def test_metric_is_keyed_by_its_own_name(name):
    assert list(load_option("metric", name)) == [name]


@pytest.mark.parametrize("group", ["metric", "logger"])
def test_options_chosen_as_a_list_are_all_kept(group):
    names = single_options(group)
    assert set(compose_config(f"{group}=[{','.join(names)}]")[group]) == set(names)


ONLY_IF_CHOSEN = {"iw_bound_5000", "path_energy", "prior_mc_100", "bleu", "chrf", "rouge_l"}  # minutes, or say little


@pytest.mark.parametrize("root", ["config", "evaluate"])
def test_all_metrics_are_measured_unless_others_are_chosen(root):
    run = () if root == "config" else ("run=x",)
    assert set(compose_config(*run, root=root).metric) == set(single_options("metric")) - ONLY_IF_CHOSEN
    assert list(compose_config(*run, "metric=[fd,cs]", root=root).metric) == ["fd", "cs"]


@pytest.mark.parametrize(
    "group",
    ["adversarial_loss", "augmentation", "conditioning", "penalty", "likelihood", "prior", "data", "dequantization"],
)
def test_every_option_can_be_chosen(group):
    of_games = ("adversarial_loss", "augmentation", "conditioning", "penalty")
    user = {"prior": "cvae", "dequantization": "flow_image"}.get(group, "dcgan" if group in of_games else "vae")
    for name in options(group):
        assert compose_model(f"model={user}", f"{group}={name}")


@pytest.mark.parametrize("group", ["coupling", "path", "source"])
def test_every_part_of_flow_matching_can_be_chosen(group):
    for name in options(group):
        config = compose_model("model=flow_matching", f"{group}={name}")
        assert list(nodes(OmegaConf.to_container(config[group])))
        assert config.evaluation.checkpoint == ("last" if name == "optimal_transport" else "auto")


@pytest.mark.parametrize("name", options("model"))
def test_model_brings_all_that_training_needs(name):
    config = model_config(name)
    assert OmegaConf.missing_keys(config) <= {"autoencoder"}  # the run of another model
    has_gradients = not hasattr(target("model", name), "maximize")
    assert {"model", "training", *(["optim"] if has_gradients else [])} <= set(config)
