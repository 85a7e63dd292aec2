"""The final metrics in TensorBoard: as scalars, and as an entry of the HPARAMS page beside the hyper-parameters."""

from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

__all__ = ["log_final_metrics"]


def log_final_metrics(
    loggers: list[Logger], hyper_parameters: dict[str, Any], metrics: dict[str, float], step: int
) -> None:
    """Write `final/<metric>` curves of one point, and the HPARAMS entry.

    Args:
        hyper_parameters: nested plain types; flattened to `a.b.c`. What is no number, text or truth value, and how
            things are built (`_partial_`), is left out.
        metrics: final values by name.
        step: the step they belong to.
    """
    named = {f"final/{name}": value for name, value in metrics.items()}
    flat = dict(_flatten(hyper_parameters, ""))
    for logger in loggers:
        logger.log_metrics(named, step=step)
        if isinstance(logger, TensorBoardLogger):
            for summary in hparams(flat, named):
                logger.experiment._get_file_writer().add_summary(summary)
        logger.finalize("success")


def _flatten(node: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return [pair for key, value in node.items() for pair in _flatten(value, f"{path}.{key}" if path else str(key))]
    if isinstance(node, list):
        return [(path, str(node))]
    is_shown = isinstance(node, (int, float, str, bool)) and not path.endswith("._partial_")
    return [(path, node)] if is_shown else []
