"""Hydra composes one and the same parts only once in a session of tests.

A composition of the project's configs takes a third of a second, nearly all of it for reading the YAML of the chosen
parts and merging them; the values of the command line are set afterwards. Most tests choose the same few parts. So this
module remembers each YAML that was read and, for the parts that were chosen, their list and their merger, and hands out
copies. Hydra still parses, checks and sets every override anew. Nothing is remembered of configs outside `conf/`, which
tests write and change.
"""

import copy
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra.core.default_element import ResultDefault
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

from tests.configs import CONF

__all__ = ["remember_compositions"]

_BOOKS = ("override_choices", "override_metadata", "known_choices", "known_choices_per_group", "deletions")


def remember_compositions() -> None:
    """From now on, in this process."""
    read = ConfigRepository.load_config
    list_parts, merge_parts = defaults_list._create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list
    texts: dict[str, ConfigResult] = {}
    lists: dict[Hashable, tuple[Any, dict[str, Any]]] = {}
    merged: dict[Hashable, DictConfig] = {}

    def read_once(self: ConfigRepository, config_path: str) -> ConfigResult | None:
        if not _is_ours(self):
            return read(self, config_path)
        if config_path not in texts and (found := read(self, config_path)) is not None:
            texts[config_path] = found
        return copy.deepcopy(texts.get(config_path))

    def list_parts_once(
        repo: IConfigRepository, config_name: str, overrides: Any, prepend_hydra: bool, skip_missing: bool
    ) -> Any:
        if not _is_ours(repo):
            return list_parts(repo, config_name, overrides, prepend_hydra, skip_missing)
        chosen = (overrides.override_choices, overrides.append_group_defaults, overrides.deletions)
        key = (config_name, prepend_hydra, skip_missing, repr(chosen))
        if key not in lists:
            found = list_parts(repo, config_name, overrides, prepend_hydra, skip_missing)
            lists[key] = found, copy.deepcopy({book: getattr(overrides, book) for book in _BOOKS})
        found, books = lists[key]
        for book, content in copy.deepcopy(books).items():  # what Hydra notes about the choices as it lists the parts
            setattr(overrides, book, content)
        return found

    def merge_parts_once(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        if not _is_ours(repo):
            return merge_parts(self, defaults, repo)
        key = repr(defaults)
        if key not in merged:
            merged[key] = merge_parts(self, defaults, repo)
        return copy.deepcopy(merged[key])

    ConfigRepository.load_config = read_once
    defaults_list._create_defaults_list = list_parts_once
    ConfigLoaderImpl._compose_config_from_defaults_list = merge_parts_once


def _is_ours(repo: IConfigRepository) -> bool:
    """Whether all files of a search path are the project's own, which no test changes, or Hydra's."""
    return all(Path(source.path) == CONF for source in repo.get_sources() if source.scheme() == "file")
