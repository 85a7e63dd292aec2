"""The project's own configs, composed for tests and benchmarks."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

__all__ = ["CONF", "compose_config", "options"]

CONF = Path(__file__).resolve().parent.parent / "conf"


def compose_config(*overrides: str, root: str = "config") -> DictConfig:
    """The config of `python -m src.train OVERRIDES`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(root, overrides=list(overrides))


def options(group: str) -> list[str]:
    """The names that a config group offers, one for each YAML."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))
