"""Score a run: `python -m src.evaluate run=outputs/...`. Model and data are rebuilt from the run's own config.

`python -m src.evaluate selftest=true` measures quantities whose value is known instead, and says which of them are off.
"""

import logging
import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from src.cli import CONF, run_entry_point
from src.core.errors import UserError
from src.runs import Run

log = logging.getLogger(__name__)

_PARTS = ("metric", "evaluation")


def evaluate(config: DictConfig) -> None:
    """Measure what the command line says, as the end of the training does; other results of the run stay."""
    if config.selftest:
        return _selftest()
    from lightning.pytorch.loggers import TensorBoardLogger

    from src.build import build
    from src.evaluation.curves import curve_pictures
    from src.evaluation.results import scalars, to_markdown
    from src.experiment import evaluate_run, load_data_of
    from src.training.final_metrics import log_final_metrics

    run = Run.open(Path(config.run))
    of_run = run.config()
    _take_given(of_run, config, list(HydraConfig.get().overrides.task))
    results = evaluate_run(run, load_data_of(run, of_run), of_run)
    # other loggers would begin their files anew
    nodes = [node for node in of_run.logger.values() if str(node._target_).endswith(TensorBoardLogger.__name__)]
    loggers = [build(node)(save_dir=run.path) for node in nodes]
    steps = [entry["card"]["model"]["step"] for entry in results["metrics"].values() if "card" in entry]
    if steps:
        log_final_metrics(loggers, scalars(results), to_markdown(results), steps[0], curve_pictures(results))
    log.info(f"wrote {run.path / 'results.json'}")
    return None


def _selftest() -> None:
    """Compare known quantities with what is measured here; ends the program with code 1 if one is off."""
    from rich import get_console
    from rich.console import Console

    from src.console import leave_log_file

    leave_log_file()  # there is no run to write it into
    others = [override for override in HydraConfig.get().overrides.task if override.lstrip("+").split("=")[0] != "selftest"]
    if others:
        raise UserError(f"selftest=true takes no other setting; {others[0]} would have no effect")
    from src.build import build
    from src.evaluation.selftest import oracle_table, oracles

    start = time.perf_counter()
    log.info("measuring quantities whose value is known (some seconds)")
    found = list(oracles(_shipped_classifiers(), build))
    console = Console(width=max(120, get_console().width), no_color=True)
    with console.capture() as capture:
        console.print(oracle_table(found))
    log.info(capture.get().rstrip())
    wrong = [oracle.name for oracle in found if not oracle.holds]
    log.info(f"{len(found) - len(wrong)} of {len(found)} are as expected; {time.perf_counter() - start:.1f} s")
    if wrong:
        log.error(f"error: {len(wrong)} of {len(found)} are off: {', '.join(wrong)}")
        sys.exit(1)


def _shipped_classifiers() -> dict[str, str]:
    """The SHA-256 of every classifier that a data set's config names, by file name."""
    files = sorted((CONF / "data").glob("*.yaml"))
    settings = [OmegaConf.select(OmegaConf.load(file), "evaluation.classifier") for file in files]
    return {some.file: str(some.sha256) for some in settings if some is not None}


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
    if config.selftest and config.run is not None:
        raise UserError(f"selftest=true measures no run; leave out run={config.run}")
    if not config.selftest:
        if config.run is None:
            raise UserError("run must be given: run=... (or selftest=true, which needs none)")
        Run.open(Path(config.run))


def main() -> None:
    run_entry_point("evaluate", evaluate, _check)


if __name__ == "__main__":
    main()
