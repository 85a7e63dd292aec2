"""Score a run: `python -m src.evaluate run=outputs/...`. Model and data are rebuilt from the run's own config."""

import logging
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from src.cli import run_entry_point
from src.runs import Run

log = logging.getLogger(__name__)


def evaluate(config: DictConfig) -> None:
    """Write `results.json` as the end of the training does."""
    from src.experiment import evaluate_run, load_data

    run = Run.open(Path(config.run))
    of_run = run.config()
    for part in ("metric", "evaluation"):
        if _is_given(part):
            of_run[part] = OmegaConf.create(OmegaConf.to_container(config[part], resolve=True))
    evaluate_run(run, load_data(of_run), of_run)
    log.info(f"wrote {run.path / 'results.json'}")


def _is_given(part: str) -> bool:
    """Whether the command line says something about a part of the config."""
    return any(override.lstrip("+~").startswith((f"{part}=", f"{part}.")) for override in HydraConfig.get().overrides.task)


def _check(config: DictConfig) -> None:
    Run.open(Path(config.run))


def main() -> None:
    run_entry_point("evaluate", evaluate, _check)


if __name__ == "__main__":
    main()
