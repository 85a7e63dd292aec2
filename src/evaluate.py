"""Score a run: `python -m src.evaluate run=outputs/...`. Model and data are rebuilt from the run's own config."""

import logging
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from src.cli import run_entry_point
from src.runs import Run

log = logging.getLogger(__name__)

_PARTS = ("metric", "evaluation")


def evaluate(config: DictConfig) -> None:
    """Measure what the command line says, as the end of the training does; other results of the run stay."""
    from src.experiment import evaluate_run, load_data

    run = Run.open(Path(config.run))
    of_run = run.config()
    _take_given(of_run, config, list(HydraConfig.get().overrides.task))
    evaluate_run(run, load_data(of_run), of_run)
    log.info(f"wrote {run.path / 'results.json'}")


def _take_given(of_run: DictConfig, config: DictConfig, overrides: list[str]) -> None:
    """Put what the command line says into a run's config, and nothing else.

    A whole part (`metric=[fd,cs]`) takes the place of the run's; a key below it changes that key alone.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    of_parts = [override for override in parsed if override.key_or_group.partition(".")[0] in _PARTS]
    for override in sorted(of_parts, key=lambda override: override.key_or_group in _PARTS, reverse=True):
        key = override.key_or_group
        parent = key.rpartition(".")[0]
        if key in _PARTS:
            of_run[key] = _plain(config, key)
        elif override.is_delete():
            OmegaConf.select(of_run, parent).pop(key.rpartition(".")[2], None)
        elif OmegaConf.select(of_run, parent) is None:  # a setting of a metric that the run did not have
            OmegaConf.update(of_run, parent, _plain(config, parent))
        else:
            OmegaConf.update(of_run, key, override.value(), merge=True)


def _plain(config: DictConfig, key: str) -> object:
    return OmegaConf.to_container(OmegaConf.select(config, key), resolve=True)


def _check(config: DictConfig) -> None:
    Run.open(Path(config.run))


def main() -> None:
    run_entry_point("evaluate", evaluate, _check)


if __name__ == "__main__":
    main()
